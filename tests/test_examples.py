"""Every example runs by itself and prints what its last comment says; the app of the README does what it says."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import command, environment

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
RUN_SECONDS = 60


def promised(path: Path) -> list[str]:
    """The lines of the comment that ends the file, after its heading."""
    lines = path.read_text("utf-8").splitlines()
    comment: list[str] = []
    while lines and lines[-1].startswith("#"):
        comment.insert(0, lines.pop().removeprefix("#").strip())
    assert comment, f"{path.name} does not end in a comment that says what it prints"
    assert comment[0].startswith("Prints")
    return comment[1:]


def run(name: str, dsn: str, **variables: str) -> list[str]:
    """The lines that an example prints, run as its docstring says."""
    environment = os.environ | {"PGCHAN_DSN": dsn, "RESEARCH_PACE": "0", "PYTHONIOENCODING": "utf-8"}
    environment.pop("OPENAI_BASE_URL", None)
    ran = subprocess.run(
        [sys.executable, "-m", f"pgchan.examples.{name}"],
        env=environment | variables, capture_output=True, text=True, encoding="utf-8", timeout=RUN_SECONDS, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_its_last_comment_says(name: str, dsn: str) -> None:
    printed, lines = run(name, dsn), promised(EXAMPLES / f"{name}.py")
    # The report depends on the Python that is installed; what counts is how it ends.
    assert (printed[-len(lines) :] if name == "research" else printed) == lines


def test_each_example_says_in_one_sentence_what_it_shows() -> None:
    for name in NAMES:
        first = (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()[0]
        assert first.startswith('"""'), f"{name} has no docstring"
        assert first.endswith("."), f"{name}: the first line of the docstring is not a sentence"


class Model(ThreadingHTTPServer):
    """Speaks as an OpenAI-compatible server does, three pieces for each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Completion)
        self.asked: list[dict[str, Any]] = []


class _Completion(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        assert self.headers["Authorization"] == "Bearer key"
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        deltas = [{"role": "assistant"}, *({"content": piece} for piece in ("words ", "of a ", "model"))]
        for choices in [*([{"index": 0, "delta": delta}] for delta in deltas), []]:
            self.wfile.write(b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_agent_streams_from_a_model_when_one_is_named(model: Model, dsn: str) -> None:
    address = f"http://127.0.0.1:{model.server_port}/v1/"
    printed = run("research", dsn, OPENAI_BASE_URL=address, OPENAI_API_KEY="key", OPENAI_MODEL="small")
    assert printed.count("words of a model") == 4
    assert [(asked["model"], asked["stream"]) for asked in model.asked] == [("small", True)] * 4
    assert "asyncio queues" in model.asked[0]["messages"][1]["content"]


@pytest.fixture
def readme_app(tmp_path: Path) -> Path:
    """The files of the README's app, as somebody types them."""
    for name in ("agent.py", "ask.py", "web.py"):
        block = re.search(rf"`{name}`\):\n\n   ```python\n(.*?)   ```\n", README, re.DOTALL)
        assert block is not None, f"the README has no {name}"
        (tmp_path / name).write_text(textwrap.dedent(block[1]), "utf-8")
    return tmp_path


async def test_the_app_of_the_readme_answers_and_streams(readme_app: Path, dsn: str, wait_until: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = environment(dsn) | {"PYTHONPATH": str(readme_app)}
    programs = [command("worker", "agent:worker"), command("serve", "web:app", "--port", str(port))]
    running = [subprocess.Popen(program, cwd=readme_app, env=variables) for program in programs]
    try:
        asked = subprocess.run(
            [sys.executable, "ask.py"], cwd=readme_app, env=variables, capture_output=True, text=True,
            timeout=RUN_SECONDS, check=False,
        )  # fmt: skip
        assert (asked.returncode, asked.stderr) == (0, "")
        assert asked.stdout == "It depends on the tides\nresult: It depends on the tides\n"

        def is_open() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        await wait_until(is_open, seconds=20)
        address = f"http://127.0.0.1:{port}"
        heard = httpx.get(f"{address}/channels/chat/42", headers={"Accept": "text/event-stream"}, timeout=20).text
        found = [json.loads(data) for data in re.findall(r"^event: message\ndata: (.*)$", heard, re.MULTILINE)]
        assert [message["body"] for message in found] == ["It ", "depends ", "on ", "the tides"]
        told = httpx.post(f"{address}/runs/chat/42/signals", json={"body": {"topic": "whales"}})
        assert told.status_code == 409, "the run has ended"
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)
