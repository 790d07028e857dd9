"""What do a thousand tokens, a run of ten steps and an idle process cost the database?

Counts, not times: they are the same on every machine. Commits and rows come from pg_stat_database, the write-ahead log
from its position, NOTIFYs from a connection that listens to all of pgchan's names, statements from pg_stat_statements
(which the embedded server loads; elsewhere that column stays empty). The floor of the log is one plain INSERT of the
same rows, in as many statements as there were batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg
import psutil
from _common import Process, Report, main
from latency import read_ours
from steps import ten, working

import pgchan
from pgchan.wakeups import LISTEN_NAMES

TOKENS = 1_000
TOKEN = "x" * 32  # 34 bytes as JSON
BATCH = 100
RUNS = 32
IDLE_SECONDS = 8.0
SETTLE_SECONDS = 0.6  # counters of other sessions are reported with a delay
COMMITS_PER_RUN_MAX = {1: 12.0, 32: 1.0}
FLOOR_ROWS = """
insert into floor.messages (channel_id, "position", at, kind, body)
select 5, e.place, clock_timestamp(), 0, $2::bytea from unnest($1::bigint[]) e (place)
"""
COUNTERS = """
select d.xact_commit, d.tup_inserted + d.tup_updated + d.tup_deleted, pg_current_wal_lsn() - '0/0'::pg_lsn
from pg_stat_database d where d.datname = current_database()
"""
CALLS = """
select coalesce(sum(s.calls), 0)::bigint from pg_stat_statements s join pg_database d on d.oid = s.dbid
where d.datname = current_database() and s.query not like '%pg_stat_%'
"""


@dataclass(slots=True)
class Counts:
    """What happened between two looks. statements: None where nothing counts them."""

    commits: float
    rows: float
    wal: float
    notifies: float
    statements: float | None


class Counter:
    """Counts what a database does, from a connection beside those that are measured."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._counts_statements = False
        self._heard = 0
        self._looks = 0

    async def start(self) -> None:
        """Listen, and see whether statements are counted."""
        for name in LISTEN_NAMES:
            await self._connection.add_listener(name, self._hear)
        with contextlib.suppress(asyncpg.PostgresError):
            await self._connection.execute("create extension if not exists pg_stat_statements")
            await self._connection.fetchval(CALLS)
            self._counts_statements = True

    def _hear(self, *_: object) -> None:
        self._heard += 1

    async def during(self, work: Callable[[], Awaitable[object]]) -> Counts:
        """What is counted while this is done."""
        before = await self._look()
        await work()
        after = await self._look()
        # A look is up to three statements in transactions of their own, which are not the work's.
        commits, rows, wal, notifies, statements = (b - a for a, b in zip(before, after, strict=True))
        return Counts(commits - self._looks, rows, wal, notifies, statements if self._counts_statements else None)

    async def _look(self) -> tuple[float, float, float, float, float]:
        await asyncio.sleep(SETTLE_SECONDS)
        self._looks = 0
        statements = 0
        if self._counts_statements:
            statements = await self._connection.fetchval(CALLS)
            self._looks += 1
        await self._connection.execute("select pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
        commits, rows, wal = await self._connection.fetchrow(COUNTERS)
        self._looks += 2
        return commits, rows, float(wal), self._heard, statements


async def tokens(report: Report, client: pgchan.AsyncClient, counter: Counter) -> None:
    """A thousand tokens, in batches of a hundred and one by one."""
    places = itertools.count(1)
    floor = await asyncpg.connect(report.dsn)
    channel = client.channel("cost/tokens")
    await channel.publish(TOKEN)

    async def ours(size: int) -> None:
        for _ in range(TOKENS // size):
            await channel.publish_many([TOKEN] * size)

    async def by_hand(size: int) -> None:
        for _ in range(TOKENS // size):
            await floor.execute(FLOOR_ROWS, [next(places) for _ in range(size)], f'"{TOKEN}"'.encode())

    for size in (BATCH, 1):
        await ours(size)
        await by_hand(size)  # the tables have grown alike, and whole pages are not written again
        counted = await counter.during(lambda size=size: ours(size))  # type: ignore[misc]
        beside = await counter.during(lambda size=size: by_hand(size))  # type: ignore[misc]
        name = f"1,000 tokens, {size} a batch"
        report.figure(f"{name}: log", "B", counted.wal, floor=beside.wal, ratio_at_most=1.1 if size == BATCH else 2.0)
        _lines(report, name, counted, per=1)
    await floor.close()


async def runs(report: Report, client: pgchan.AsyncClient, counter: Counter) -> None:
    """Runs of ten steps, from start to result, one after the other and all at once."""

    async def one() -> None:
        await (await client.start(ten)).result(timeout=30)

    async def all_at_once() -> None:
        await asyncio.gather(*(one() for _ in range(RUNS)))

    async def one_by_one() -> None:
        for _ in range(RUNS):
            await one()

    async with working(client, RUNS):
        for count, work in ((1, one_by_one), (RUNS, all_at_once)):
            await work()
            counted = await counter.during(work)
            name = f"run of 10 steps, {count} at a time"
            report.figure(f"{name}: log", "B", counted.wal / RUNS)
            _lines(report, name, counted, per=RUNS)


def _lines(report: Report, name: str, counted: Counts, *, per: int) -> None:
    report.figure(f"{name}: rows written", "", counted.rows / per)
    report.figure(f"{name}: commits, those of NOTIFYs and reads too", "", counted.commits / per)
    report.figure(f"{name}: NOTIFYs", "", counted.notifies / per)
    if counted.statements is not None:
        report.figure(f"{name}: statements", "", counted.statements / per)


async def idle(report: Report, counter: Counter) -> None:
    """A reader in another process that follows one channel, and a worker with its client in this one."""
    async with pgchan.AsyncClient(report.dsn, name="idle") as client:
        reader = Process(read_ours, report.dsn, "cost/tokens")
        await reader.answer()

        async def measured(name: str) -> None:
            own, other = psutil.Process().cpu_times(), reader.cpu()
            counted = await counter.during(lambda: asyncio.sleep(IDLE_SECONDS))
            now = psutil.Process().cpu_times()
            seconds = IDLE_SECONDS + SETTLE_SECONDS
            calls = counted.commits if counted.statements is None else counted.statements
            report.figure(f"idle {name}: statements per second", "/s", calls / seconds, at_most=3.0)
            used = reader.cpu() - other if name == "reader" else now.user + now.system - own.user - own.system
            report.figure(f"idle {name}: processor", "% of a core", 100 * used / seconds, at_most=0.5)

        await measured("reader")
        reader.kill()
        await asyncio.sleep(0.5)
        async with working(client, 10):
            await asyncio.sleep(1)
            await measured("worker")


async def measure(report: Report) -> None:
    """All of it."""
    connection = await asyncpg.connect(report.dsn)
    counter = Counter(connection)
    await counter.start()
    async with pgchan.AsyncClient(report.dsn) as client:
        await tokens(report, client, counter)
        await runs(report, client, counter)
    await idle(report, counter)
    await connection.close()


if __name__ == "__main__":
    main(
        __doc__, measure, seconds=35,
        settings={"shared_preload_libraries": "pg_stat_statements", "autovacuum": "off"},
    )  # fmt: skip
