"""The commands: what they print, and how they end. Long, because there are many of them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from cluster import free_port
from commands import command, done, environment, refused
from logins import Logins

import pgchan
from pgchan import db
from pgchan.console import COLLECTOR_THRESHOLDS


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Run the command in an empty directory."""
    return partial(done, tmp_path)


# ---- migrate


def test_migrate_brings_a_database_to_the_newest_revision(run: Any, empty_dsn: str) -> None:
    assert run("migrate", "--current", dsn=empty_dsn).out == "base\n"
    assert run("migrate", dsn=empty_dsn).out == f"{db.SCHEMA_VERSION}\n"
    assert run("migrate", dsn=empty_dsn).out == f"{db.SCHEMA_VERSION}\n"
    assert run("migrate", "--current", "--dsn", empty_dsn).out == f"{db.SCHEMA_VERSION}\n"


def test_migrate_prints_sql_without_a_database(run: Any, empty_dsn: str) -> None:
    done = run("migrate", "--sql")
    assert done.status == 0
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(done.out.encode())
    assert run("migrate", "--current", dsn=empty_dsn).out == f"{db.SCHEMA_VERSION}\n"
    assert "drop table" in run("migrate", "base", "--sql", "--start", "head").out


def test_a_downgrade_that_loses_data_wants_a_yes(run: Any, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('chat/1', '1')")
    assert "--yes" in refused(run("migrate", "base", dsn=dsn), 1)
    assert run("migrate", "--current", dsn=dsn).out == f"{db.SCHEMA_VERSION}\n"
    assert run("migrate", "base", "--yes", dsn=dsn).out == "base\n"


def test_a_downgrade_that_loses_nothing_does_not_ask(run: Any, dsn: str) -> None:
    assert run("migrate", "base", dsn=dsn).out == "base\n"


@pytest.mark.parametrize(("answer", "left"), [("y", "base"), ("n", db.SCHEMA_VERSION)])
def test_at_a_terminal_a_downgrade_asks(run: Any, dsn: str, answer: str, left: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('chat/1', '1')")
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        command("migrate", "base"), env=environment(dsn), stdin=theirs, capture_output=True, timeout=60
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == (0 if answer == "y" else 1)
    assert run("migrate", "--current", dsn=dsn).out == f"{left}\n"


# ---- channels


def test_publish_prints_the_position_and_tail_the_messages(run: Any, dsn: str) -> None:
    assert run("publish", "chat/42", '{"a": 1}', dsn=dsn).out == "1\n"
    assert run("publish", "chat/42", "hello", "--text", dsn=dsn).out == "2\n"
    assert run("publish", "chat/42", "again", "--text", "--key", "k", dsn=dsn).out == "3\n"
    assert run("publish", "chat/42", "again", "--text", "--key", "k", dsn=dsn).out == "3\n"
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").close()
    assert run("tail", "chat/42", dsn=dsn).out == '1\tmessage\t{"a": 1}\n2\tmessage\thello\n3\tmessage\tagain\n'
    (line,) = run("tail", "chat/42", "--after", "2", "--json", dsn=dsn).out.splitlines()
    message = json.loads(line)
    assert (message["position"], message["kind"], message["body"], message["key"]) == (3, "message", "again", "k")
    assert run("tail", "chat/42", "--after", message["cursor"], dsn=dsn).out == ""


def test_publish_reads_a_message_from_each_line(run: Any, dsn: str) -> None:
    assert run("publish", "chat/42", dsn=dsn, stdin=b'{"a":1}\r\n\n"\xc3\xa4"').out == "1\n2\n"
    assert run("publish", "chat/42", "-", "--text", dsn=dsn, stdin=b"one\ntwo").out == "3\n4\n"
    with pgchan.Client(dsn) as client:
        assert [message.body for message in client.channel("chat/42").read()] == [{"a": 1}, "ä", "one", "two"]


def test_compact_prints_by_how_many_messages_a_channel_is_shorter(run: Any, dsn: str) -> None:
    run("publish", "chat/42", "-", "--text", dsn=dsn, stdin=b"a\nb\nc\nd")
    refused(run("compact", "chat/42", dsn=dsn), 2)
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").close()
    assert run("compact", "chat/42", dsn=dsn).out == "2\n"
    assert run("compact", "chat/42", dsn=dsn).out == "0\n"
    assert run("tail", "chat/42", "--after", "5", dsn=dsn).out == "6\tmessage\tabcd\n"


def test_channels_are_listed(run: Any, dsn: str) -> None:
    for name in ("chat/1", "chat/2", "other"):
        run("publish", name, "1", dsn=dsn)
    lines = run("channels", "--prefix", "chat/", dsn=dsn).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["chat/1", "chat/2"]
    (found,) = map(json.loads, run("channels", "--after", "chat/2", "--json", dsn=dsn).out.splitlines())
    assert (found["name"], found["head"], found["closed"]) == ("other", 1, False)


def test_a_reader_that_has_enough_is_no_error(dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").publish_many(["x" * 1000] * 500)
        client.channel("chat/42").close()
    with (
        subprocess.Popen(
            command("tail", "chat/42"), env=environment(dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as tail,
    ):
        assert tail.stdout is not None
        assert tail.stdout.readline().startswith(b"1\tmessage\t")
        tail.stdout.close()
        assert tail.stderr is not None
        assert tail.stderr.read() == b""
        assert tail.wait(30) == 0


def test_tail_waits_until_the_channel_is_closed(dsn: str) -> None:
    with (
        subprocess.Popen(command("tail", "chat/42", "--json"), env=environment(dsn), stdout=subprocess.PIPE) as tail,
        pgchan.Client(dsn) as client,
    ):
        assert tail.stdout is not None
        client.channel("chat/42").publish("first")
        assert json.loads(tail.stdout.readline())["body"] == "first"
        client.channel("chat/42").publish("second")
        assert json.loads(tail.stdout.readline())["body"] == "second"
        client.channel("chat/42").close()
        assert tail.stdout.read() == b""
        assert tail.wait(30) == 0


def test_nothing_that_a_terminal_would_obey_is_printed(run: Any, dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").publish("\x1b]0;title\x07\x9b31m\n")
        client.channel("chat/42").close()
    out = run("tail", "chat/42", dsn=dsn).out
    assert out.count("\n") == 1
    assert not set("\x1b\x07\x9b") & set(out)


# ---- runs

WORKFLOWS = """
import gc
import pgchan

@pgchan.workflow
async def greet(run: pgchan.Run, name: str) -> str:
    word = await run.step(choose, "hello")
    signal = await run.receive()
    await run.publish(signal.body)
    return f"{word}, {name}"

async def choose(word: str) -> str:
    return word

@pgchan.workflow
async def fail(run: pgchan.Run) -> None:
    raise pgchan.Fatal("as told")

@pgchan.workflow
async def collector(run: pgchan.Run) -> list[int]:
    return [*gc.get_threshold(), gc.get_freeze_count()]

worker = pgchan.Worker(pgchan.AsyncClient(), [greet, fail, collector])
"""


@pytest.fixture
def worker(tmp_path: Path, dsn: str) -> Any:
    """`pgchan worker` with two workflows, as a process."""
    (tmp_path / "mine.py").write_text(WORKFLOWS)
    with subprocess.Popen(command("worker", "mine:worker"), env=environment(dsn), cwd=tmp_path) as process:
        yield process
        process.kill()


def test_a_run_is_started_signalled_and_shown(run: Any, dsn: str, worker: Any, block_until: Any) -> None:
    assert run("start", "greet", '["you"]', "--id", "run-1", dsn=dsn).out == "run-1\n"
    assert run("start", "greet", '["you"]', "--id", "run-1", dsn=dsn).out == "run-1\n"
    refused(run("start", "greet", '["me"]', "--id", "run-1", dsn=dsn), 1)
    assert run("signal", "run-1", '"go on"', dsn=dsn).status == 0
    with pgchan.Client(dsn) as client:
        assert client.run("run-1").result(timeout=30) == "hello, you"
    shown = run("show", "run-1", dsn=dsn).out
    assert "succeeded" in shown
    assert "choose" in shown
    found = json.loads(run("show", "run-1", "--json", dsn=dsn).out)
    assert found["run"]["state"] == "succeeded"
    assert "choose" in [message["key"] for message in found["journal"]]
    (line,) = run("runs", "--workflow", "greet", dsn=dsn).out.splitlines()
    assert line.split("\t")[:4] == ["run-1", "greet", "default", "succeeded"]
    assert json.loads(run("runs", "--json", dsn=dsn).out)["id"] == "run-1"
    refused(run("cancel", "run-1", dsn=dsn), 1)
    refused(run("signal", "run-1", "1", dsn=dsn), 1)


def test_the_collector_spares_a_process_of_our_own_and_no_other(run: Any, dsn: str, worker: Any) -> None:
    before = gc.get_threshold()
    run("start", "collector", "--id", "run-1", dsn=dsn)
    with pgchan.Client(dsn) as client:
        *thresholds, frozen = client.run("run-1").result(timeout=30)
    assert tuple(thresholds) == COLLECTOR_THRESHOLDS
    assert frozen > 0
    assert gc.get_threshold() == before != COLLECTOR_THRESHOLDS


def test_a_run_is_cancelled(run: Any, dsn: str) -> None:
    run("start", "greet", '["you"]', "--id", "run-1", dsn=dsn)
    assert run("cancel", "run-1", dsn=dsn).out == "cancelled\n"
    assert json.loads(run("runs", "--state", "cancelled", "--json", dsn=dsn).out)["id"] == "run-1"


def test_only_a_failed_run_is_resumed(run: Any, dsn: str, worker: Any, block_until: Any) -> None:
    run("start", "fail", "--id", "run-1", dsn=dsn)
    with pgchan.Client(dsn) as client:
        block_until(lambda: client.run("run-1").status().state == "failed", 30)
    assert "as told" in run("show", "run-1", dsn=dsn).out
    assert run("resume", "run-1", dsn=dsn).out == "resumed\n"
    run("start", "greet", '["you"]', "--id", "run-2", dsn=dsn)
    refused(run("resume", "run-2", dsn=dsn), 2)


def test_a_worker_that_is_told_to_stop_ends_with_0(dsn: str, worker: Any, block_until: Any) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        block_until(lambda: connection.execute("select from pgchan.worker_status").rowcount == 1, 30)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert connection.execute("select from pgchan.worker_status").rowcount == 0


# ---- serve

APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"served"})
"""


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def test_serve_serves_an_app_and_ends_with_0(tmp_path: Path, block_until: Any) -> None:
    (tmp_path / "mine.py").write_text(APP)
    port = free_port()
    serve = command("serve", "mine:app", "--port", str(port))
    with subprocess.Popen(serve, env=environment(None), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        block_until(lambda: answers(f"http://127.0.0.1:{port}/"), 30)
        assert httpx.get(f"http://127.0.0.1:{port}/").text == "served"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_serve_runs_workers_beside_it_and_stops_them(tmp_path: Path, dsn: str, block_until: Any) -> None:
    (tmp_path / "mine.py").write_text(WORKFLOWS)
    port = free_port()
    serve = command("serve", "mine:worker", "--insecure", "--workers", "2", "--port", str(port))
    with (
        subprocess.Popen(serve, env=environment(dsn), cwd=tmp_path, stderr=subprocess.DEVNULL) as process,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        block_until(lambda: connection.execute("select from pgchan.worker_status").rowcount == 2, 30)
        block_until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert connection.execute("select from pgchan.worker_status").rowcount == 0


# ---- doctor


def test_the_doctor_finds_nothing_wrong_with_a_migrated_database(run: Any, dsn: str) -> None:
    done = run("doctor", dsn=dsn)
    assert done.status == 0, done.out + done.error
    assert [json.loads(line) for line in run("doctor", "--json", dsn=dsn).out.splitlines()]


def test_the_doctor_sees_that_a_database_was_not_migrated(run: Any, empty_dsn: str) -> None:
    done = run("doctor", dsn=empty_dsn)
    assert done.status == 1
    assert "pgchan migrate" in done.out


# ---- bench


class Measurer:
    """A role that may create databases, and nothing else: what it has made is what a benchmark has made."""

    def __init__(self, admin: psycopg.Connection[Any], logins: Logins) -> None:
        self._admin = admin
        self.dsn = logins.of()
        (self._name,) = logins.names
        admin.execute(f"alter role {self._name} createdb".encode())

    def databases(self) -> list[str]:
        owned = "select datname from pg_database where datdba = %s::regrole"
        return [row[0] for row in self._admin.execute(owned, [self._name])]


@pytest.fixture
def measurer(admin: psycopg.Connection[Any], direct_dsn: str) -> Iterator[Measurer]:
    logins = Logins(admin, direct_dsn)
    yield Measurer(admin, logins)
    logins.close()


@pytest.mark.timeout(240)
def test_bench_measures_in_a_database_of_its_own(run: Any, measurer: Measurer, tmp_path: Path) -> None:
    done = run("bench", "floors", "--rounds", "1", "--json", "found.json", dsn=measurer.dsn)
    assert done.status == 0, done.error
    assert "made on this server and dropped again" in done.out.partition("\n")[0]
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    lines = {line["what"]: line for line in found["floors"]["lines"]}
    assert lines["rows by unnest, 100 a statement"]["ours"] > lines["rows by unnest, 1 a statement"]["ours"] > 0
    assert all(what in done.out for what in lines)
    assert measurer.databases() == []


def test_bench_says_which_right_is_missing(run: Any, direct_dsn: str, admin: psycopg.Connection[Any]) -> None:
    logins = Logins(admin, direct_dsn)
    done = run("bench", "floors", "latency", dsn=logins.of())
    logins.close()
    assert done.status == 1
    assert done.error.count("may not create databases") == 1, done.error
    assert "CREATEDB" in done.error


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_stopped_leaves_no_database(
    measurer: Measurer, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command("bench", "floors", "latency", "--rounds", "100"), env=environment(measurer.dsn), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "takes about" not in process.stdout.readline():
        assert process.poll() is None
    assert len(measurer.databases()) == 1
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "latency" not in out
    assert measurer.databases() == []


def test_bench_needs_a_database_and_a_question_that_there_is(run: Any) -> None:
    assert "PGCHAN_DSN" in refused(run("bench"), 2)
    assert "'speed'" in refused(run("bench", "speed"), 2)
    assert "cannot connect" in run("bench", "floors", dsn=f"postgresql://127.0.0.1:{free_port()}/none").error
