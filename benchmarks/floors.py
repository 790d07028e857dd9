"""What can this server do at the least, with bare asyncpg and none of pgchan?

Each line is a durable effect written by hand. What pgchan adds is in the other scripts, each beside its floor; a figure
here that is much higher than usual says that the disk or the network is slow, and then nothing above it can be fast.
The ratio is to INSERT, autocommit: one round trip and one flush of the log.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable

import asyncpg

from pgchan.benchmarks._common import (
    FLOOR_INSERT,
    FLOOR_READ,
    Pipe,
    Process,
    Report,
    due_times,
    fdatasync_microseconds,
    interleave,
    main,
)

MESSAGES = 60  # per round and line
INTERVAL_SECONDS = 0.004
SECONDS = 0.3  # of one batch size in one round
ROWS = (1, 10, 100, 1_000)
CLAIMED = (1, 10, 100)
INSERTED, POINTED, COUNTED, UNNESTED = range(1, 5)  # channels
SCHEMA = """
create table floor.jobs (id bigint primary key, state text not null);
create index on floor.jobs (id) where state = 'waiting';
"""
NOTIFY = "select pg_notify('floor_raw', $1::text)"
NOTIFY_POINTER = "select pg_notify('floor_pointer', $1::text)"
NOTIFY_WORK = "select pg_notify('floor_jobs', $1::text)"
UNNEST = """
insert into floor.messages (channel_id, "position", at, kind, body)
select $1::bigint, e.place, clock_timestamp(), 0, e.body from unnest($2::bigint[], $3::bytea[]) e (place, body)
"""
OFFER = "insert into floor.jobs (id, state) select unnest($1::bigint[]), 'waiting'"
CLAIM = """
with chosen as (
  select j.id from floor.jobs j where j.state = 'waiting' order by j.id limit $1::integer for update skip locked
)
update floor.jobs j set state = 'running' from chosen where j.id = chosen.id returning j.id
"""
COMPLETE = "update floor.jobs set state = 'done' where id = any ($1::bigint[])"
BODY = b'{"token": "' + b"x" * 22 + b'"}'  # 35 bytes

_places = itertools.count(1)


async def hear(pipe: Pipe, dsn: str) -> None:
    """The other process: say when each thing is there. Bodies and payloads are moments at which they were due."""
    listening = await asyncpg.connect(dsn)
    late: list[float] = []

    def came(due: str | bytes) -> None:
        late.append((time.monotonic_ns() - int(due)) / 1e3)

    await listening.add_listener("floor_raw", lambda *found: came(found[3]))

    async def follow(told: asyncio.Event, look: Callable[[asyncpg.Connection], Awaitable[None]]) -> None:
        reading = await asyncpg.connect(dsn)
        while True:
            await told.wait()
            told.clear()
            await look(reading)

    def reader(channel: int) -> Callable[[asyncpg.Connection], Awaitable[None]]:
        last = 0

        async def read(reading: asyncpg.Connection) -> None:
            nonlocal last
            for position, body in await reading.fetch(FLOOR_READ, channel, last):
                last = position
                came(body)

        return read

    async def claim(reading: asyncpg.Connection) -> None:
        while claimed := await reading.fetch(CLAIM, 1):
            came(str(claimed[0][0]))

    following = []
    for name, look in (("floor_pointer", reader(POINTED)), ("floor", reader(COUNTED)), ("floor_jobs", claim)):
        told = asyncio.Event()
        following.append(asyncio.create_task(follow(told, look)))
        await listening.add_listener(name, lambda *_, told=told: told.set())
    pipe.send("ready")
    while True:
        count = await pipe.receive()
        while len(late) < count:  # noqa: ASYNC110 - an event would stand in what is measured
            await asyncio.sleep(0.005)
        pipe.send(list(late))
        late.clear()


async def _paced(work: Callable[[int], Awaitable[object]]) -> list[float]:
    """Until each call has returned, in µs from when it was due."""
    late = []
    async for due in due_times(MESSAGES, INTERVAL_SECONDS):
        await work(due)
        late.append((time.monotonic_ns() - due) / 1e3)
    return late


async def latencies(report: Report, connection: asyncpg.Connection) -> None:
    """One thing at a time, with time between them."""
    other = Process(hear, report.dsn)
    await other.answer()

    async def heard(work: Callable[[int], Awaitable[object]]) -> list[float]:
        async for due in due_times(MESSAGES, INTERVAL_SECONDS):
            await work(due)
        return list(await other.ask(MESSAGES))

    async def insert(due: int, channel: int = INSERTED) -> None:
        await connection.execute(FLOOR_INSERT, channel, next(_places), b"%d" % due)

    async def insert_and_point(due: int) -> None:
        async with connection.transaction():
            await insert(due, POINTED)
            await connection.execute(NOTIFY_POINTER, str(due))

    async def append(due: int) -> None:
        await connection.fetchval("select floor.append($1, $2)", COUNTED, b"%d" % due)

    async def offer(due: int) -> None:
        async with connection.transaction():
            await connection.execute(OFFER, [due])
            await connection.execute(NOTIFY_WORK, str(due))

    found = await interleave(
        report.arguments.rounds,
        insert=lambda: _paced(insert),
        notify=lambda: heard(lambda due: connection.execute(NOTIFY, str(due))),
        pointer=lambda: heard(insert_and_point),
        append=lambda: heard(append),
        claim=lambda: heard(offer),
    )
    other.kill()
    for name, what in (
        ("insert", "INSERT, autocommit, until it returns"),
        ("notify", "raw NOTIFY → another process, nothing stored"),
        ("pointer", "begin, INSERT, NOTIFY, commit → read in another process"),
        ("append", "counter row + INSERT + NOTIFY in one routine → the same"),
        ("claim", "INSERT, NOTIFY → claimed in another, SKIP LOCKED, durable"),
    ):
        report.times(what, found[name], found["insert"], at_most={50: None, 99: None})


async def rates(report: Report, connection: asyncpg.Connection) -> None:
    """As fast as it goes, on one connection."""

    async def unnest(count: int) -> float:
        began, written = time.monotonic(), 0
        while time.monotonic() < began + SECONDS:
            await connection.execute(UNNEST, UNNESTED, [next(_places) for _ in range(count)], [BODY] * count)
            written += count
        return written / (time.monotonic() - began)

    async def claim(count: int) -> float:
        """Only claims and completions count; what they find was put there before."""
        claims = 300 // count + 3
        await connection.execute("truncate floor.jobs")
        await connection.execute(OFFER, list(range(claims * count)))
        began = time.monotonic()
        for _ in range(claims):
            claimed = await connection.fetch(CLAIM, count)
            await connection.execute(COMPLETE, [row[0] for row in claimed])
        return claims * count / (time.monotonic() - began)

    found = await interleave(
        max(2, report.arguments.rounds // 2),
        **{f"rows{count}": lambda count=count: unnest(count) for count in ROWS},
        **{f"jobs{count}": lambda count=count: claim(count) for count in CLAIMED},
    )  # fmt: skip
    for count in ROWS:
        report.rates(f"rows by unnest, {count:,} a statement", "/s", found[f"rows{count}"], found["rows1"])
    for count in CLAIMED:
        report.rates(f"claim + complete, {count} at a time", "/s", found[f"jobs{count}"], found["jobs1"])


async def measure(report: Report) -> None:
    """All of it."""
    connection = await asyncpg.connect(report.dsn)
    await connection.execute(SCHEMA)
    await connection.execute("insert into floor.channels (id) values ($1::bigint)", COUNTED)
    report.figure("fdatasync of one page where this runs, median", "µs", fdatasync_microseconds())
    await latencies(report, connection)
    await rates(report, connection)
    report.note("ratio: to INSERT, autocommit, for times; to one at a time for rates")
    report.note("if fdatasync is far from INSERT, the server is not on this machine, or another disk is under it")
    await connection.close()


if __name__ == "__main__":
    main(__doc__, measure, seconds=30)
