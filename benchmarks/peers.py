"""How does pgchan compare with what people use for the same, on the same server?

Workflows: DBOS and Absurd. Queues: procrastinate and pgqueuer. Streams: Redis and NATS, in servers of their own on the
same disk. Each contestant is one process; they take turns, and one that is not asked anything does nothing but what it
does when idle. The second column is the peer, and the ratio is ours by the peer's. What is not installed is left out,
with a line that says how to get it.

The peers do other things well that this does not show, and Redis and NATS are bound by their Python clients here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pgchan.benchmarks import _contestants
from pgchan.benchmarks._common import Report, cpu_seconds, interleave, main, percentile

TICKS = os.sysconf("SC_CLK_TCK")
SECONDS = 1.0  # of one rate in one round
COUNT = 30  # latencies in one round
JOBS = {1: 100, 32: 600}
BATCHES = (1, 100, 1_000)
RECOVERY_SECONDS = 20.0
ANSWER_SECONDS = 90.0
REQUIREMENTS = os.path.relpath(Path(__file__).with_name("requirements-peers.txt"))
AT_LEAST = {("dbos", 1): 5.0, ("dbos", 32): 40.0}
PACKAGES = {"dbos": "dbos", "absurd": "absurd_sdk", "procrastinate": "procrastinate", "pgqueuer": "pgqueuer",
            "redis": "redis", "nats": "nats"}  # fmt: skip
SETTINGS = {
    "dbos": "as documented: queues polled every 1 s, notifications held back for 10 ms",
    "dbos-fast": "queues polled every 10 ms (polling_interval_sec), notifications held back for 1 ms",
    "absurd": "as documented: polled every 250 ms; rates are of tasks that wait already",
    "absurd-fast": "polled every 10 ms (poll_interval)",
    "redis-always": "appendfsync always: durable when acknowledged, as with us",
    "redis-everysec": "appendfsync everysec, the default: a crash of the machine loses up to 1 s",
    "nats": "JetStream in files, as documented: no flush to the disk per message",
}


class Missing(Exception):
    """A peer that is not installed, or does not work here; the text is the line to print."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text)
        self.name = name


class Contestant:
    """A process of _contestants.py, that ends with this one."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, server: Callable[[], float]) -> None:
        self.name = name
        self.shares: dict[str, list[tuple[float, float]]] = {}
        self._process = process
        self._server = server

    async def ask(self, question: str, **values: Any) -> Any:
        """The answer, and beside it note what share of a core it and its server took."""
        began, ours, theirs = time.monotonic(), cpu_seconds(self._process.pid), self._server()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ask": question, **values}).encode() + b"\n")
        found = await self.answer()
        spent = time.monotonic() - began
        used = cpu_seconds(self._process.pid) - ours, max(0.0, self._server() - theirs)
        key = " ".join(str(part) for part in (question, *values.values()))
        self.shares.setdefault(key, []).append((used[0] / spent, used[1] / spent))
        return found

    async def answer(self) -> Any:
        """The next line that it writes."""
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_SECONDS)
            found = json.loads(line) if line else {"error": "the process ended"}
        except TimeoutError:
            found = {"error": f"no answer in {ANSWER_SECONDS:g} s"}
        if "error" in found:
            raise Missing(f"{self.name}: {found['error']}", self.name)
        return found["value"]

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


def _server_seconds(database: str) -> float:
    """Processor time of the whole server that has this database, if it runs on this machine; else nothing.

    A session that has ended counts by what its parent has collected of it.
    """
    stats: dict[int, tuple[int, float, float]] = {}
    parent = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            own, collected = (sum(map(int, fields[first : first + 2])) / TICKS for first in (11, 13))
            stats[int(process.name)] = int(fields[1]), own, collected
            title = (process / "cmdline").read_bytes()
            if title.startswith(b"postgres:") and database.encode() in title:
                parent = int(fields[1])
    if parent not in stats:
        return 0.0
    return sum(own for above, own, _ in stats.values() if above == parent) + sum(stats[parent][1:])


@contextlib.asynccontextmanager
async def contestants(
    report: Report, *names: str, address: str | None = None, pid: int = 0
) -> AsyncIterator[dict[str, Contestant]]:
    """Those of them that there are, started; for one that there is not, a line in the report."""
    found: dict[str, Contestant] = {}
    try:
        for name in names:
            try:
                found[name] = await (
                    start(report, name) if name == "pgchan" else start(report, name, address=address, pid=pid)
                )
            except Missing as missing:
                report.note(str(missing))
        yield found
    finally:
        for contestant in found.values():
            await contestant.kill()


async def start(report: Report, name: str, *, address: str | None = None, pid: int = 0) -> Contestant:
    """Start this one. address, pid: of its server, if that is not Postgres. Raises Missing."""
    kind = name.partition("-")[0] if name.startswith("redis") else name
    python = sys.executable
    if name != "pgchan":
        python = report.arguments.python
        package = PACKAGES[name.partition("-")[0]]
        if not _has(python, package):
            raise Missing(f"{package} not installed: pip install -r {REQUIREMENTS}")
    process = await asyncio.create_subprocess_exec(
        python, _contestants.__file__, kind, address or report.dsn,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, limit=1 << 24,
    )  # fmt: skip
    database = urlsplit(report.dsn).path.lstrip("/")
    contestant = Contestant(name, process, lambda: cpu_seconds(pid) if pid else _server_seconds(database))
    try:
        await contestant.answer()
    except BaseException:
        await contestant.kill()
        raise
    return contestant


def _has(python: str, package: str) -> bool:
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return Path(python).exists() and subprocess.run([python, "-c", program], check=False).returncode == 0


async def compare(
    report: Report, field: dict[str, Contestant], what: str, unit: str, question: str, *,
    only: Sequence[str] | None = None, at_least: dict[str, float] | None = None, **values: Any,
) -> None:  # fmt: skip
    """Ask all the same in turns; a line for each peer, ours beside it."""
    there = {name: one for name, one in field.items() if only is None or name in only}
    if len(there) < 2:
        return
    try:
        found = await interleave(
            max(2, report.arguments.rounds // 3),
            **{name: lambda one=one: one.ask(question, **values) for name, one in there.items()},
        )  # fmt: skip
    except Missing as missing:
        report.note(f"{what}: {missing}")
        await field.pop(missing.name).kill()
        if missing.name == "pgchan":
            raise
        await compare(report, field, what, unit, question, only=only, at_least=at_least, **values)
        return
    for name in there:
        if name == "pgchan":
            continue
        if unit == "µs":
            report.times(f"{what}: pgchan, {name}", found["pgchan"], found[name], at_most={50: None, 99: None})
        else:
            least = (at_least or {}).get(name)
            report.rates(f"{what}: pgchan, {name}", unit, found["pgchan"], found[name], at_least=least)
    key = " ".join(str(part) for part in (question, *values.values()))
    shares = []
    for name, one in there.items():
        client, server = (percentile(values, 50) for values in zip(*one.shares[key], strict=True))
        shares.append(f"{name} {client:.0%} + {server:.0%}")
    report.note(f"processor, client + server, {what}: {', '.join(shares)}")


async def workflows(report: Report) -> None:
    """Runs of ten steps; starting, streaming, sending."""
    async with contestants(report, "pgchan", "dbos", "absurd") as field:
        for count in (1, 32):
            least = {name: value for (name, at), value in AT_LEAST.items() if at == count}
            what = f"runs of 10 steps, {count} at a time"
            await compare(report, field, what, "/s", "runs", at_least=least, concurrency=count, seconds=SECONDS)
        await compare(report, field, "start → first step", "µs", "begin", count=COUNT // 3)
        both = ("pgchan", "dbos")
        await compare(report, field, "published in a run → read", "µs", "stream", only=both, count=COUNT)
        await compare(report, field, "signal → waiting run", "µs", "send", only=both, count=COUNT)
    async with contestants(report, "pgchan", "dbos-fast", "absurd-fast") as field:
        both = ("pgchan", "dbos-fast")
        await compare(report, field, "start → first step", "µs", "begin", count=COUNT)
        await compare(report, field, "published in a run → read", "µs", "stream", only=both, count=COUNT)
        await compare(report, field, "signal → waiting run", "µs", "send", only=both, count=COUNT)


async def recovery(report: Report) -> None:
    """A worker is killed in a step, another one is there: when does the step begin there?"""
    for name in ("pgchan", "dbos"):
        waiting = None
        try:
            if name == "dbos":  # one that is launched later takes what belongs to one of its own name, dead or not
                waiting = await start(report, name)
            first = await start(report, name)
            try:
                await first.ask("hold")
                waiting = waiting or await start(report, name)
                began = time.monotonic_ns()
            finally:
                await first.kill()
            taken = await waiting.ask("taken", seconds=RECOVERY_SECONDS)
        except Missing as missing:
            report.note(f"recovery: {missing}")
            continue
        finally:
            if waiting is not None:
                await waiting.kill()
        if taken is None:
            report.note(
                f"recovery of a killed worker's run by another that is there: {name}: not in {RECOVERY_SECONDS:g} s"
            )
        else:
            report.figure(f"killed worker's run begun by another: {name}", "s", (taken - began) / 1e9)


async def queues(report: Report) -> None:
    """Jobs that do nothing."""
    async with contestants(report, "pgchan", "procrastinate", "pgqueuer") as field:
        await compare(report, field, "job: deferred → begun", "µs", "job_begins", count=COUNT)
        for concurrency, count in JOBS.items():
            what = f"jobs worked off, {concurrency} at a time"
            await compare(report, field, what, "/s", "jobs", concurrency=concurrency, count=count)


async def streams(report: Report) -> None:
    """One message; many."""
    for name, serving in SERVERS.items():
        try:
            with serving() as (address, pid):
                async with contestants(report, "pgchan", name, address=address, pid=pid) as field:
                    await compare(report, field, "publish → deliver", "µs", "deliver", count=COUNT)
                    for batch in BATCHES:
                        what = f"publish, {batch:,} at a time"
                        await compare(report, field, what, "/s", "publish", batch=batch, seconds=SECONDS / 2)
        except Missing as missing:
            report.note(str(missing))


@contextlib.contextmanager
def _serving(
    program: str, package: str, scheme: str, arguments: Callable[[int, str], list[str]]
) -> Iterator[tuple[str, int]]:
    """A server of a peer on a free port, with a directory that goes away: its address and pid. Raises Missing."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise Missing(f"{program} not installed: apt-get install {package}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pgchan-bench-") as home:
        process = subprocess.Popen(
            [found, *arguments(port, home)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise Missing(f"{program} did not start") from None
                    time.sleep(0.05)
            yield f"{scheme}://127.0.0.1:{port}", process.pid
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _redis(fsync: str) -> contextlib.AbstractContextManager[tuple[str, int]]:
    return _serving(
        "redis-server", "redis-server", "redis",
        lambda port, home: ["--port", str(port), "--bind", "127.0.0.1", "--dir", home, "--save", "",
                            "--appendonly", "yes", "--appendfsync", fsync],
    )  # fmt: skip


SERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[tuple[str, int]]]] = {
    "redis-always": lambda: _redis("always"),
    "redis-everysec": lambda: _redis("everysec"),
    "nats": lambda: _serving(
        "nats-server",
        "nats-server",
        "nats",
        lambda port, home: ["-a", "127.0.0.1", "-p", str(port), "-js", "-sd", home],
    ),
}
PARTS: dict[str, Callable[[Report], Awaitable[None]]] = {
    "workflows": workflows, "recovery": recovery, "queues": queues, "streams": streams,
}  # fmt: skip


async def measure(report: Report) -> None:
    """The parts that were asked for, else all."""
    report.beside = "peer"
    for part in report.arguments.parts or PARTS:
        await PARTS[part](report)
    report.note("the ratio is pgchan's by the peer's: above 1 is faster for /s, slower for µs")
    for name, text in SETTINGS.items():
        if any(line.what.endswith(f", {name}") for line in report.lines):
            report.note(f"{name}: {text}")


def _options(parser: argparse.ArgumentParser) -> None:
    beside = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
    parser.add_argument("parts", nargs="*", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument(
        "--python", default=str(beside if beside.exists() else sys.executable),
        help="of the environment that the peers are installed in",
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, measure, seconds=200, options=_options, settings={"max_connections": "300"})
