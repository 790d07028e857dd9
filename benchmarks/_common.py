"""What the benchmarks share: a database, processes, rounds, pacing, and the table that is printed.

Ours and its floor are measured in turns, in one run, in an order that is drawn anew for each round; what counts is the
median over the rounds of their ratio. Single figures differ by 1.7 × from run to run on a shared machine, ratios by
much less. A floor is the same durable effect, written by hand with a bare driver.

The file is long because the scripts are to hold nothing but their question.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

from pgchan import dsn as dsns
from pgchan import migrate
from pgchan.console import spare_collector
from pgchan.embedded import Embedded
from pgchan.errors import Error

T = TypeVar("T")

ROUNDS = 7  # that count; one more comes first, to warm up
ASLEEP_SECONDS = 0.002  # the end of a pause that is slept outside of the event loop, see `due_times`
ANSWER_SECONDS = 30.0  # what a process of a benchmark may take to answer

# The floors write what pgchan.messages holds: same columns, same indexes, same fill factor of the counter's row.
FLOOR_SCHEMA = """
create schema floor;
create table floor.channels (id bigint primary key, head bigint not null default 0) with (fillfactor = 50);
create table floor.messages (
  channel_id bigint not null, "position" bigint not null, at timestamptz not null, kind smallint not null,
  key text collate "C", step text collate "C", attempt integer, void_from bigint, body bytea not null,
  primary key (channel_id, "position"));
create unique index on floor.messages (channel_id, key) where key is not null;
create index on floor.messages (channel_id, kind, "position") where kind <> 0;
create index on floor.messages (channel_id, step, "position") where void_from is not null;
create function floor.append(channel bigint, body bytea) returns bigint language plpgsql as $$
declare
  placed bigint;
begin
  update floor.channels c set head = head + 1 where c.id = channel returning c.head into placed;
  insert into floor.messages (channel_id, "position", at, kind, body)
    values (channel, placed, clock_timestamp(), 0, body);
  perform pg_notify('floor', placed::text);
  return placed;
end $$;
"""
FLOOR_INSERT = """
insert into floor.messages (channel_id, "position", at, kind, body)
values ($1::bigint, $2::bigint, clock_timestamp(), 0, $3::bytea)
"""
FLOOR_READ = """
select m."position", m.body from floor.messages m
where m.channel_id = $1::bigint and m."position" > $2::bigint order by m."position"
"""


class Refused(Exception):
    """The server or the role does not let a benchmark do what it has to; the text says what is missing."""


# ------------------------------------------------------------------------------------------------ the report


@dataclass(slots=True)
class Line:
    """One line of the table. ratio: ours by the floor's, median, least and greatest of the rounds."""

    what: str
    unit: str
    ours: float
    floor: float | None = None
    ratio: tuple[float, float, float] | None = None
    target: str = ""
    passed: bool | None = None


class Report:
    """Collects lines; prints them as one table and, if asked, writes them as JSON."""

    def __init__(self, arguments: argparse.Namespace, dsn: str) -> None:
        self.dsn = dsn
        self.arguments = arguments
        self.lines: list[Line] = []
        self.notes: list[str] = []
        self.server = "PostgreSQL"
        self.beside = "floor"  # what the second column holds

    def times(
        self, what: str, ours: Sequence[Sequence[float]], floor: Sequence[Sequence[float]] = (), *,
        at_most: Mapping[float, float | None],
    ) -> None:  # fmt: skip
        """Lines for percentiles of latencies in µs, given round by round. at_most: percentile to the ratio allowed."""
        for q, most in at_most.items():
            ratios = [percentile(a, q) / percentile(b, q) for a, b in zip(ours, floor, strict=True)]
            self.lines.append(
                Line(
                    f"{what}, p{q:g}", "µs", percentile(_flat(ours), q), percentile(_flat(floor), q), _spread(ratios),
                    "" if most is None else f"≤ {most:g} ×",
                    None if most is None else statistics.median(ratios) <= most,
                )
            )  # fmt: skip

    def rates(
        self, what: str, unit: str, ours: Sequence[float], floor: Sequence[float], *, at_least: float | None = None
    ) -> None:
        """A line for rates, given round by round. at_least: the ratio wanted."""
        ratios = [a / b for a, b in zip(ours, floor, strict=True)]
        self.lines.append(
            Line(
                what, unit, statistics.median(ours), statistics.median(floor), _spread(ratios),
                "" if at_least is None else f"≥ {at_least:g} ×",
                None if at_least is None else statistics.median(ratios) >= at_least,
            )
        )  # fmt: skip

    def figure(
        self, what: str, unit: str, ours: float, *, floor: float | None = None, at_most: float | None = None,
        ratio_at_most: float | None = None,
    ) -> None:  # fmt: skip
        """A line for one number, with a bound on it or on its ratio to the floor."""
        ratio = (ours / floor,) * 3 if floor else None
        target, passed = "", None
        if at_most is not None:
            target, passed = f"≤ {at_most:g} {unit}", ours <= at_most
        elif ratio_at_most is not None and ratio is not None:
            target, passed = f"≤ {ratio_at_most:g} ×", ratio[0] <= ratio_at_most
        self.lines.append(Line(what, unit, ours, floor, ratio, target, passed))

    def note(self, text: str) -> None:
        """A remark below the table."""
        self.notes.append(text)

    def show(self) -> None:
        """Print the table; write the JSON file."""
        rows = [("", "ours", self.beside, "ratio", "target", "")]
        rows += [
            (
                line.what, f"{_number(line.ours)} {line.unit}", "" if line.floor is None else _number(line.floor),
                _ratio(line.ratio), line.target, {True: "pass", False: "MISS", None: ""}[line.passed],
            )
            for line in self.lines
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        for number, row in enumerate(rows):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:5], strict=True)), row[5]]
            print("  ".join(cells).rstrip())
            if number == 0:
                print("-" * (sum(widths) + 10))
        for text in self.notes:
            print(f"· {text}")
        print(flush=True)
        if self.arguments.json:
            lines = [asdict(line) for line in self.lines]
            found = {"machine": machine(self.server), "lines": lines, "notes": self.notes}
            Path(self.arguments.json).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main(
    description: str | None, measure: Callable[[Report], Coroutine[Any, Any, None]], *, seconds: float,
    options: Callable[[argparse.ArgumentParser], None] | None = None, settings: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Run one benchmark as a program: arguments, a database of its own, the header, the measurement, the table.

    seconds: what the measurement takes about. settings: of the embedded server, beside those of every benchmark.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the table, and what the machine is, to this file")
    parser.add_argument("--seed", type=int, default=1, help="for the order of the variants in each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that count; one more comes first")
    if options is not None:
        options(parser)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    # What was made is removed then too: a database on somebody's server must not stay behind. Handlers of our own, also
    # for SIGINT: that of asyncio would cancel the measurement, which something in it may catch.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        _run(arguments, measure, seconds, settings or {})
    except (Refused, Error) as error:
        sys.exit(f"pgchan: {error}")


def _run(
    arguments: argparse.Namespace, measure: Callable[[Report], Coroutine[Any, Any, None]], seconds: float,
    settings: Mapping[str, str],
) -> None:  # fmt: skip
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(settings))
        report = Report(arguments, stack.enter_context(_database(server)))
        report.server = asyncio.run(_server_version(server))
        print(" · ".join(f"{name}: {value}" for name, value in machine(report.server).items()))
        busy = " · others are at work here: trust ratios only" if os.getloadavg()[0] > (os.cpu_count() or 1) / 2 else ""
        print(f"takes about {seconds:g} s with {ROUNDS} rounds, this is {arguments.rounds}{busy}", flush=True)
        spare_collector()  # as in a process of `pgchan worker`, and for the floors and peers as well
        asyncio.run(measure(report))
        report.show()


# ------------------------------------------------------------------------------------------------ the machine


def machine(server: str) -> dict[str, str]:
    """What the figures depend on."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("asyncpg", "pgchan"))
    return {
        "versions": f"{server}, Python {platform.python_version()}, {packages}",
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "fdatasync": f"{fdatasync_microseconds():.0f} µs",
    }


def fdatasync_microseconds() -> float:
    """Median time to make one written page durable, where temporary files lie."""
    times = []
    with tempfile.TemporaryFile() as file:
        for number in range(60):
            os.pwrite(file.fileno(), os.urandom(8192), 8192 * (number % 8))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times[10:])


async def _server_version(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    try:
        version = str(await connection.fetchval("show server_version")).split()[0]
        commit = await connection.fetchval("show synchronous_commit")
        return f"PostgreSQL {version} (fsync {await connection.fetchval('show fsync')}, synchronous_commit {commit})"
    finally:
        await connection.close()


@contextlib.contextmanager
def _server(settings: Mapping[str, str]) -> Iterator[str]:
    """The server of $PGCHAN_DSN, else one of our own in a directory that goes away at the end."""
    if os.environ.get("PGCHAN_DSN"):
        yield dsns.resolve(None)
        return
    home = Path(tempfile.mkdtemp(prefix="pgchan-bench-"))
    home.chmod(0o755)  # the server does not run as root
    try:
        # No checkpoint within a measurement: it would write whole pages into the log.
        chosen = {"checkpoint_timeout": "1h", "max_wal_size": "4GB", "max_connections": "200", **settings}
        with Embedded(str(home)) as server:
            asyncio.run(_configure(server.dsn, chosen))
        with Embedded(str(home)) as server:
            yield server.dsn
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def _configure(dsn: str, settings: Mapping[str, str]) -> None:
    connection = await asyncpg.connect(dsn)
    for name, value in settings.items():
        await connection.execute(f"alter system set {name} = '{value}'")
    await connection.close()


@contextlib.contextmanager
def _database(server: str) -> Iterator[str]:
    """A fresh database with pgchan's schema and the floor's; nothing that was there before is touched."""
    name = f"pgchan_bench_{secrets.token_hex(4)}"
    dsn = urlsplit(server)._replace(path=f"/{name}").geturl()
    asyncio.run(_create(server, name))
    try:
        migrate.upgrade(dsn)
        asyncio.run(_execute(dsn, FLOOR_SCHEMA))
        yield dsn
    finally:
        asyncio.run(_execute(server, f"drop database {name} with (force)"))


@contextlib.asynccontextmanager
async def another_database(dsn: str) -> AsyncIterator[str]:
    """One more database like that of the benchmark, on the same server: its DSN."""
    with contextlib.ExitStack() as stack:
        try:
            yield await asyncio.to_thread(stack.enter_context, _database(dsn))
        finally:
            await asyncio.to_thread(stack.close)


async def _create(server: str, name: str) -> None:
    try:
        connection = await asyncpg.connect(server)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Refused(f"cannot connect to the server: {error}") from None
    try:
        await connection.execute(f"create database {name}")
    except asyncpg.InsufficientPrivilegeError:
        role = await connection.fetchval("select quote_ident(current_user)")
        raise Refused(
            f"role {role} may not create databases, and a benchmark runs in one of its own: "
            f"ALTER ROLE {role} CREATEDB, or name another role in the DSN"
        ) from None
    finally:
        await connection.close()


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


# ------------------------------------------------------------------------------------------------ measuring


async def interleave(rounds: int, **variants: Callable[[], Awaitable[T]]) -> dict[str, list[T]]:
    """Call all variants once per round, in an order drawn for each; the first round only warms up."""
    found: dict[str, list[T]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        order = list(variants)
        random.shuffle(order)
        for name in order:
            value = await variants[name]()
            if number:
                found[name].append(value)
    return found


async def due_times(count: int, interval: float) -> Any:
    """Yield `count` moments on time.monotonic_ns()'s clock, each when it has come: an open loop.

    The moments are fixed beforehand. Whoever is late is charged for it, since latency counts from when it was due.
    asyncio rounds timers up to whole milliseconds, so the last two are slept in the kernel instead, loop and all.
    """
    start = time.monotonic_ns() + 5_000_000
    for number in range(count):
        due = start + round(number * interval * 1e9)
        left = (due - time.monotonic_ns()) / 1e9
        if left > ASLEEP_SECONDS:
            await asyncio.sleep(left - ASLEEP_SECONDS)
        while (left := (due - time.monotonic_ns()) / 1e9) > 0:
            time.sleep(left)  # noqa: ASYNC251 - on purpose, see above
        yield due


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which `q` percent lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))]


def _flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [value for values in rounds for value in values]


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(ratios), min(ratios), max(ratios)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _ratio(ratio: tuple[float, float, float] | None) -> str:
    if ratio is None:
        return ""
    middle, low, high = ratio
    return f"{middle:.3g} ×" if low == high else f"{middle:.3g} × ({low:.3g}-{high:.3g})"


# ------------------------------------------------------------------------------------------------ processes


class Pipe:
    """One end of the pipe between a benchmark and a process of its own; both ends are alike."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._came: asyncio.Queue[Any] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    def _read(self) -> None:
        try:
            self._came.put_nowait(self._connection.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._came.put_nowait(EOFError("the other process is gone"))

    def send(self, value: Any) -> None:
        """Hand a value over."""
        self._connection.send(value)

    async def receive(self) -> Any:
        """The next value. Raises EOFError when the other process is gone."""
        value = await self._came.get()
        if isinstance(value, EOFError):
            raise value
        return value


class Process:
    """`target(pipe, *args)`, a coroutine function, in a process that ends with this one, however that ends."""

    def __init__(self, target: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, target, args), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        self.pipe = Pipe(ours)

    async def ask(self, value: Any) -> Any:
        """Send a value and wait for the answer."""
        self.pipe.send(value)
        return await self.answer()

    async def answer(self) -> Any:
        """What the process sends next."""
        async with asyncio.timeout(ANSWER_SECONDS):
            return await self.pipe.receive()

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        return cpu_seconds(self.pid)

    def memory(self) -> int:
        """Bytes that it has in memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.join()


def _child(connection: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the benchmark, whose end is ours

    async def run() -> None:
        with contextlib.suppress(EOFError):
            await target(Pipe(connection), *args)
        sys.stdout.flush()
        os._exit(0)  # the benchmark has ended: leave without closing anything, like a process that is killed

    spare_collector()
    asyncio.run(run())


def cpu_seconds(*pids: int) -> float:
    """Processor time of these processes, in user and in kernel mode."""
    ticks = 0
    for pid in pids:
        # The second field is a name in parentheses and may hold anything, so count from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
