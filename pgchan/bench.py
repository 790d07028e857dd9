"""The benchmarks as a command: each is a program of pgchan.benchmarks, run one after the other on the user's server.

They are processes of their own, so that none runs in what another has left behind: caches, garbage, tasks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pgchan import dsn as dsns

# What needs no more than a role that may create databases, and about a minute in all with ROUNDS of them.
DEFAULTS = ("floors", "latency", "steps")
QUESTIONS = (*DEFAULTS, "cost", "growth", "notify", "peers", "soak", "sse", "start", "takeover", "tokens")
ROUNDS = 3  # enough for a first look; the programs by themselves take more


def main(questions: Sequence[str], *, dsn: str | None, rounds: int, json_path: str | None) -> int:
    """Run these benchmarks, else DEFAULTS, in databases of their own on this server, until one fails; its exit status.

    json_path: a file for all tables, as one object with a member for each question.
    """
    chosen = tuple(dict.fromkeys(questions)) or DEFAULTS
    environment = os.environ | {"PGCHAN_DSN": dsns.resolve(dsn)}
    print(
        f"{', '.join(chosen)}: each in a database of its own, pgchan_bench_…, made on this server and dropped again; "
        "nothing else is touched, but the server is busy meanwhile",
        flush=True,
    )
    tables: dict[str, object] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="pgchan-bench-") as home:
        for question in chosen:
            print(f"\n== {question}", flush=True)
            found = Path(home) / f"{question}.json"
            status = _run(question, ["--rounds", str(rounds), "--json", str(found)], environment)
            if status:
                break
            tables[question] = json.loads(found.read_text("utf-8"))
    if json_path is not None and tables:
        Path(json_path).write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return status


def _run(question: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Run one of them to its end. A signal is for it to obey: it has a database to drop before it goes."""
    program = [sys.executable, "-m", f"pgchan.benchmarks.{question}", *arguments]
    with subprocess.Popen(program, env=environment) as process:  # noqa: S603 - one of QUESTIONS
        # Control-C reaches it as it reaches us; what is sent to us alone is passed on.
        kept = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            status = process.wait()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status
