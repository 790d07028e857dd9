"""Bad input on the command line: one line on stderr, no traceback, no secret; 2 for bad input, 1 for what is refused.

What is refused before anything is done is tried within this process; a process of its own costs half a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from commands import SECRET, Done, command, done, environment, refused
from doors import pretend, rows

import pgchan
from pgchan import cli

UNREACHABLE = f"postgresql://me:{SECRET}@127.0.0.1:1/nowhere"
MEMORY_MAX = 300 << 20  # bytes of a process; a line of a gigabyte must not be read to its end


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Run the command in an empty directory."""
    return partial(done, tmp_path)


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process, as if it were alone in it."""
    for name in [name for name in os.environ if name.startswith("PGCHAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def main(*arguments: str, dsn: str | None = None) -> Done:
        if dsn is not None:
            monkeypatch.setenv("PGCHAN_DSN", dsn)
        status = cli.main(arguments)
        out, error = capfd.readouterr()
        return Done(subprocess.CompletedProcess(arguments, status, out.encode(), error.encode()))

    return main


# ---- 2: refused before the database is asked

BAD: dict[str, list[str]] = {
    "no command": [], "an unknown command": ["unknown"], "no channel": ["tail"],
    "an unknown option": ["tail", "c", "--x"], "too many arguments": ["tail", "a", "b"],
    "a view": ["tail", "c", "--view", "half"], "tail, name empty": ["tail", ""],
    "tail, name with a space": ["tail", "a b"], "name not UTF-8": ["tail", "\udcff"],
    "after 1e3": ["tail", "c", "--after", "1e3"], "after -1": ["tail", "c", "--after=-1"],
    "after of 65": ["tail", "c", "--after", "1" * 65], "after empty": ["tail", "c", "--after="],
    "publish, reserved": ["publish", "pgchan:x", "1"], "publish, 201": ["publish", "x" * 201, "1"],
    "publish, no JSON": ["publish", "c", "hello"], "publish, 100,000 levels": ["publish", "c", "[" * 100_000],
    "publish, 65 levels": ["publish", "c", "[" * 65 + "]" * 65], "publish, NaN": ["publish", "c", "NaN"],
    "publish, 1e400000": ["publish", "c", "1e400000"], "publish, a surrogate": ["publish", "c", '"\\ud800"'],
    "publish, not UTF-8": ["publish", "c", "--text", "\udcff"], "publish, 5,000 digits": ["publish", "c", "9" * 5_000],
    "key empty": ["publish", "c", "1", "--key", ""], "key of 201": ["publish", "c", "1", "--key", "k" * 201],
    "key of many lines": ["publish", "c", "-", "--key", "k"], "channels, limit -1": ["channels", "--limit", "-1"],
    "channels, limit 1,001": ["channels", "--limit", "1001"], "channels, prefix": ["channels", "--prefix", "a b"],
    "start, an object": ["start", "w", "{}"], "start, cut off": ["start", "w", "[1"],
    "start, NaN": ["start", "w", "[NaN]"], "start, priority": ["start", "w", "[]", "--priority", "high"],
    "start, workflow empty": ["start", ""],
    "start, priority of 5,000 digits": ["start", "w", "--priority", "9" * 5_000],
    "start, priority too high": ["start", "w", "--priority", "1000001"],
    "start, id": ["start", "w", "--id", "a/result"], "start, queue": ["start", "w", "--queue", ""],
    "start, delay NaN": ["start", "w", "--delay", "nan"], "start, delay inf": ["start", "w", "--delay", "inf"],
    "start, timeout -1": ["start", "w", "--timeout", "-1"], "signal, no JSON": ["signal", "r", "{"],
    "signal, run": ["signal", "a/cancel", "1"], "cancel, run": ["cancel", "a//b"], "resume, run": ["resume", ""],
    "show, run": ["show", "run/journal"], "runs, state": ["runs", "--state", "sleeping"],
    "runs, limit 0": ["runs", "--limit", "0"], "runs, limit of 5,000 digits": ["runs", "--limit", "9" * 5_000],
    "runs, workflow": ["runs", "--workflow", ""], "runs, queue with a line end": ["runs", "--queue", "a\n"],
    "worker, no attribute": ["worker", "nothing"], "worker, no module": ["worker", ":worker"],
    "worker, unknown module": ["worker", "no_such_module_anywhere:worker"],
    "worker, unknown": ["worker", "json:nothing"], "worker, of another kind": ["worker", "json:loads"],
    "worker, a path": ["worker", "../json:loads"], "serve, no app": ["serve", "json:__name__"],
    "serve, workers of an app": ["serve", "json:loads", "--workers", "1"],
    "serve, port": ["serve", "json:loads", "--port", "99999"], "migrate, unknown": ["migrate", "pgchan_9999", "--sql"],
    "migrate, start": ["migrate", "--start", "base"], "demo, workers": ["demo", "--workers", "-1"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_ends_with_2_and_one_line(main: Any, arguments: list[str]) -> None:
    """Nothing is asked of the database: it is not there."""
    refused(main(*arguments, dsn=UNREACHABLE), 2)


COMMANDS = [
    ["tail", "chat/42"], ["publish", "chat/42", "1"], ["channels"], ["start", "research"], ["signal", "r", "1"],
    ["cancel", "r"], ["compact", "c"], ["resume", "r"], ["runs"], ["show", "r"], ["migrate"], ["migrate", "base"],
    ["migrate", "--current"], ["doctor"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_missing_dsn_is_2(main: Any, arguments: list[str]) -> None:
    assert "PGCHAN_DSN" in refused(main(*arguments), 2)


MALFORMED = [f"postgresql://me:{SECRET}@127.0.0.1:x/db", f"postgresql://me:{SECRET}/@127.0.0.1:1/db", f"mysql://{SECRET}"]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_malformed_dsn_is_2_and_not_shown(main: Any, arguments: list[str]) -> None:
    refused(main(*arguments, "--dsn", MALFORMED[0]), 2)


@pytest.mark.parametrize("dsn", MALFORMED, ids=["port", "slash", "scheme"])
def test_a_malformed_dsn_in_the_environment_is_2_and_not_shown(run: Any, dsn: str) -> None:
    refused(run("publish", "chat/42", "1", dsn=dsn), 2)
    refused(run("migrate", dsn=dsn), 2)


def test_a_command_that_is_wrong_ends_so_as_a_process(run: Any) -> None:
    refused(run("unknown"), 2)
    refused(run("publish", "a b", "1", dsn=UNREACHABLE), 2)


BAD_LINES = {"not UTF-8": b"\xff\xfe", "not JSON": b"{", "5 MB": b'"' + b"x" * 5_000_000, "a surrogate": b'"\\ud800"'}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_input_is_2_and_those_before_it_are_published(run: Any, dsn: str, line: bytes) -> None:
    ended = run("publish", "chat/42", dsn=dsn, stdin=b"1\n2\n" + line)
    assert (ended.status, ended.out, ended.error.count("\n")) == (2, "1\n2\n", 1)
    with pgchan.Client(dsn) as client:
        assert [message.body for message in client.channel("chat/42").read()] == [1, 2]


def test_a_line_of_a_gigabyte_is_refused_with_bounded_memory(dsn: str) -> None:
    before = rows(dsn)
    source = subprocess.Popen(["head", "--bytes=1G", "/dev/zero"], stdout=subprocess.PIPE)
    sink = subprocess.Popen(
        command("publish", "chat/42", "--text"), env=environment(dsn), stdin=source.stdout, stderr=subprocess.PIPE
    )
    assert source.stdout is not None and sink.stderr is not None
    source.stdout.close()
    said = sink.stderr.read().decode()
    _, status, used = os.wait4(sink.pid, 0)
    sink.returncode = os.waitstatus_to_exitcode(status)  # it was waited for
    sink.stderr.close()
    source.wait(30)
    assert sink.returncode == 2, said
    assert (said.count("\n"), "1048576 bytes" in said) == (1, True)
    assert used.ru_maxrss * 1024 < MEMORY_MAX
    assert rows(dsn) == before


# ---- 2: this database will not do


def test_a_database_that_a_newer_pgchan_made_is_2(run: Any, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("update pgchan.alembic_version set version_num = 'pgchan_9999'")
    assert run("migrate", dsn=dsn).out == "pgchan_9999\n", "it serves this code: nothing is to be done"
    assert "pgchan_9999" in refused(run("migrate", "base", "--yes", dsn=dsn), 2)
    pretend(dsn, "pgchan_9999", "pgchan_9999")
    assert "pgchan_9999" in refused(run("migrate", dsn=dsn), 2)
    assert "pgchan_9999" in refused(run("publish", "chat/42", "1", dsn=dsn), 2)


def test_a_database_that_was_not_migrated_is_2(run: Any, empty_dsn: str) -> None:
    assert "pgchan migrate" in refused(run("publish", "chat/42", "1", dsn=empty_dsn), 2)


@pytest.mark.parametrize("options", [[], ["--insecure", "--host", "0.0.0.0"]], ids=["secure", "to everybody"])
def test_a_worker_is_not_served_to_everybody(tmp_path: Path, run: Any, options: list[str]) -> None:
    (tmp_path / "mine.py").write_text("import pgchan\nworker = pgchan.Worker(pgchan.AsyncClient(), [])\n")
    refused(run("serve", "mine:worker", *options, dsn=UNREACHABLE), 2)


def test_what_a_users_module_raises_is_shown_in_one_line(tmp_path: Path, run: Any) -> None:
    (tmp_path / "mine.py").write_text("raise KeyError('first\\nsecond')\n")
    assert "KeyError" in refused(run("worker", "mine:worker"), 2)


# ---- 1: refused, not found, not reached


@pytest.mark.parametrize("arguments", [["migrate"], ["migrate", "--current"]], ids=" ".join)
def test_a_server_that_cannot_be_reached_is_1_and_its_password_not_shown(run: Any, arguments: list[str]) -> None:
    refused(run(*arguments, dsn=UNREACHABLE), 1)


def test_what_is_not_there_or_refused_is_1_and_changes_nothing(run: Any, dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").publish(1, key="k")
        client.channel("closed").create()
        client.channel("closed").close()
        client.start("w", id="r")
    before = rows(dsn)
    for arguments in (
        ["cancel", "nobody"], ["resume", "nobody"], ["show", "nobody"], ["signal", "nobody", "1"],
        ["publish", "chat/42", "2", "--key", "k"], ["publish", "closed", "1"], ["start", "v", "--id", "r"],
        ["start", "w", "--id", "closed"], ["tail", "chat/42", "--after", "7"], ["compact", "nobody"],
    ):  # fmt: skip
        refused(run(*arguments, dsn=dsn), 1)
    refused(run("resume", "r", dsn=dsn), 2)
    refused(run("compact", "r", dsn=dsn), 2)
    assert rows(dsn) == before


# ---- the reader has enough


@pytest.mark.parametrize(
    "arguments", [["channels"], ["runs"], ["migrate", "--sql"], ["--help"], ["publish", "chat/42"]], ids=" ".join
)
def test_an_output_that_is_closed_is_quiet(dsn: str, arguments: list[str]) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("chat/42").publish(1)
        client.start("w")
    began = time.monotonic()
    ours, theirs = os.pipe()
    os.close(ours)  # nobody reads
    with subprocess.Popen(
        command(*arguments), env=environment(dsn), stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE
    ) as process:
        os.close(theirs)
        _, said = process.communicate(b"1\n" * 100, timeout=60)
    assert (process.returncode, said) == (0, b"")
    assert time.monotonic() - began < 60
