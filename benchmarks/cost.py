"""What do a thousand tokens, a run of ten steps and an idle process cost the database?

The thousand tokens once more as a step of a run says them: all at once, and 5 ms apart as a model does; without
joining, joined for a while, and after the channel was compacted. Bytes of table are what pgchan.messages takes with its
indexes when it is packed (VACUUM FULL before and after); the letters are random, for equal ones would be compressed.

Counts, not times: they are the same on every machine. Rows and commits are counted in the write-ahead log itself
(pg_walinspect, PostgreSQL 15 and newer), so a server that others use at the time counts their work too. NOTIFYs are
heard by a connection that listens to all of pgchan's names. Statements are those of pg_stat_statements, which the
embedded server loads and others may lack; it misses procedure calls in sessions that force generic plans, so it is
first compared with a number of calls that is known, and its figures are left out where it fell short. The floor of
the log is one plain INSERT of the same rows, in as many statements as there were batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

import pgchan
from pgchan.benchmarks._common import Process, Report, cpu_seconds, main
from pgchan.benchmarks.latency import read_ours
from pgchan.benchmarks.steps import ten, working
from pgchan.wakeups import LISTEN_NAMES

TOKENS = 1_000
TOKEN = "x" * 32  # 34 bytes as JSON
BATCH = 100
RUNS = 32
IDLE_SECONDS = 8.0
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PACE_SECONDS = 0.005
JOIN_SECONDS = (0.01, 0.05)  # 10 ms is not seen, 50 ms hardly
JOINED_ROWS_MAX = {0.01: 500, 0.05: 120}  # of a thousand tokens, at that pace
SETTLE_SECONDS = 0.3  # for wakeups that are still on their way
COMMITS_PER_RUN_MAX = {1: 12.0, 32: 1.0}
FLOOR_ROWS = """
insert into floor.messages (channel_id, "position", at, kind, body)
select 5, e.place, clock_timestamp(), 0, $2::bytea from unnest($1::bigint[]) e (place)
"""
POSITION = "select pg_current_wal_flush_lsn()"
# A transaction that only sends NOTIFYs has a commit record and nothing else; it does not wait for the disk.
LOGGED = """
with w as materialized (
  select r.xid::text as xid, r.resource_manager || '/' || r.record_type as kind, r.description
  from pg_get_wal_records_info($1::pg_lsn, $2::pg_lsn) r
), writing as (select distinct w.xid from w where w.kind ~ '^Heap2?/')
select $2::pg_lsn - $1::pg_lsn,
       count(*) filter (where w.kind = 'Transaction/COMMIT'
                          and (w.xid in (select xid from writing) or w.description like '%subxacts%')),
       count(*) filter (where w.kind ~ '^Heap2?/(INSERT|UPDATE|HOT_UPDATE|DELETE)')
from w
"""
CALLS = """
select coalesce(sum(s.calls), 0)::bigint from pg_stat_statements s join pg_database d on d.oid = s.dbid
where d.datname = current_database() and s.query not like '%pg_stat_%'
"""


@dataclass(slots=True)
class Counts:
    """What happened between two looks. commits: those that wrote. statements: None where nothing counts them."""

    wal: float
    commits: float
    rows: float
    notifies: float
    statements: float | None


class Counter:
    """Counts what a server does, from a connection beside those that are measured."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._counts_statements = False
        self._heard = 0

    async def start(self) -> None:
        """Listen, and see whether statements are counted."""
        for name in LISTEN_NAMES:
            await self._connection.add_listener(name, self._hear)
        await self._connection.execute("create extension if not exists pg_walinspect")
        with contextlib.suppress(asyncpg.PostgresError):
            await self._connection.execute("create extension if not exists pg_stat_statements")
            await self._connection.fetchval(CALLS)
            self._counts_statements = True

    def verify(self, counted: Counts, least: int) -> bool:
        """Whether the statements counted can be true, given how many were sent at least; if not, count no more."""
        if counted.statements is not None and counted.statements < least:
            self._counts_statements = False
            counted.statements = None
            return False
        return True

    def _hear(self, *_: object) -> None:
        self._heard += 1

    async def during(self, work: Callable[[], Awaitable[object]]) -> Counts:
        """What is counted while this is done."""
        start, heard, calls = await self._look()
        await work()
        end, heard_then, calls_then = await self._look()
        ((wal, commits, rows),) = await self._connection.fetch(LOGGED, start, end)
        return Counts(
            float(wal), commits, rows, heard_then - heard, calls_then - calls if self._counts_statements else None
        )

    async def _look(self) -> tuple[str, int, int]:
        await asyncio.sleep(SETTLE_SECONDS)
        position = await self._connection.fetchval(POSITION)
        calls = await self._connection.fetchval(CALLS) if self._counts_statements else 0
        return position, self._heard, calls


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
        if not counter.verify(counted, TOKENS // size):
            report.note("statements are not shown: pg_stat_statements missed calls that were certainly made")
        report.figure(f"{name}: log", "B", counted.wal, floor=beside.wal, ratio_at_most=1.1 if size == BATCH else 2.0)
        _lines(report, name, counted, per=1)
    await floor.close()


@pgchan.workflow
async def stream(run: pgchan.Run, pace: float, join: float | None) -> None:
    """One step says all the tokens."""

    async def speak() -> None:
        said = ["".join(random.choices(LETTERS, k=len(TOKEN))) for _ in range(TOKENS)]
        begins = time.monotonic()
        for number in range(TOKENS):
            if pace:
                await asyncio.sleep(max(0.0, begins + number * pace - time.monotonic()))
            await run.publish(said[number], wait=False, join=join)

    await run.step(speak)


async def streams(
    report: Report, client: pgchan.AsyncClient, counter: Counter, connection: asyncpg.Connection
) -> None:  # fmt: skip
    """Rows, log and table of a thousand tokens: as they come, joined, compacted."""

    async def messages(channel: pgchan.AsyncChannel) -> int:
        return sum(message.kind == "message" for message in await channel.read(limit=1000))

    async def packed() -> int:
        await connection.execute("vacuum full pgchan.messages")
        return int(await connection.fetchval("select pg_total_relation_size('pgchan.messages')"))

    async with working(client, 1, stream):
        await (await client.start(stream, 0, None)).result(timeout=30)
        for pace, joins in ((0.0, (None, JOIN_SECONDS[0])), (PACE_SECONDS, (*JOIN_SECONDS, None))):
            for join in joins:
                channel = client.channel(f"cost/{pace}/{join}")
                size = await packed()

                async def say(pace: float = pace, join: float | None = join, id: str = channel.name) -> None:
                    await (await client.start(stream, pace, join, id=id)).result(timeout=60)

                said = await counter.during(say)
                taken = await packed() - size
                name = f"1,000 tokens of a step, {f'{1e3 * pace:g} ms apart' if pace else 'at once'}"
                name += ", not joined" if join is None else f", join={join:g}"
                most = JOINED_ROWS_MAX.get(join or 0) if pace else None
                report.figure(f"{name}: rows", "", await messages(channel), at_most=most)
                report.figure(f"{name}: log", "B", said.wal)
                report.figure(f"{name}: table", "B", taken)
        compacted = await counter.during(channel.compact)
        report.figure("the last of these, compacted: rows", "", await messages(channel), at_most=1)
        report.figure("the last of these, compacted: log of that", "B", compacted.wal)
        report.figure("the last of these, compacted: table", "B", await packed() - size)


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
            _lines(report, name, counted, per=RUNS, commits_max=COMMITS_PER_RUN_MAX[count])


def _lines(report: Report, name: str, counted: Counts, *, per: int, commits_max: float | None = None) -> None:
    report.figure(f"{name}: commits", "", counted.commits / per, at_most=commits_max)
    report.figure(f"{name}: rows written", "", counted.rows / per)
    report.figure(f"{name}: NOTIFYs", "", counted.notifies / per)
    if counted.statements is not None:
        report.figure(f"{name}: statements", "", counted.statements / per)


async def idle(report: Report, counter: Counter) -> None:
    """A reader in another process that follows one channel, and a worker with its client in this one."""
    async with pgchan.AsyncClient(report.dsn, name="idle") as client:
        reader = Process(read_ours, report.dsn, "cost/tokens")
        await reader.answer()

        async def measured(name: str, pid: int) -> None:
            used = cpu_seconds(pid)
            counted = await counter.during(lambda: asyncio.sleep(IDLE_SECONDS))
            used = cpu_seconds(pid) - used
            seconds = IDLE_SECONDS + SETTLE_SECONDS
            if counted.statements is not None:
                report.figure(f"idle {name}: statements per second", "/s", counted.statements / seconds, at_most=3.0)
            report.figure(f"idle {name}: processor", "% of a core", 100 * used / seconds, at_most=0.5)

        await measured("reader", reader.pid)
        reader.kill()
        async with working(client, 10):
            await asyncio.sleep(1)
            await measured("worker", os.getpid())


async def measure(report: Report) -> None:
    """All of it."""
    connection = await asyncpg.connect(report.dsn)
    counter = Counter(connection)
    await counter.start()
    async with pgchan.AsyncClient(report.dsn) as client:
        await tokens(report, client, counter)
        await streams(report, client, counter, connection)
        await runs(report, client, counter)
    await idle(report, counter)
    await connection.close()


if __name__ == "__main__":
    main(
        __doc__, measure, seconds=55,
        settings={"shared_preload_libraries": "pg_stat_statements", "autovacuum": "off"},
    )  # fmt: skip
