"""How long until a message is durable, and until another process has it?

publish → tail: from when a message was due until `tail` in another process gives it. Its floor: a routine that raises
a counter's row, inserts and sends a NOTIFY, called with bare asyncpg; the other process reads back what was announced.
publish: until the call returns; its floor is one INSERT.
Lost wakeup: messages that nobody was told of, and messages sent while the listening connection is cut.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import asyncpg

import pgchan
from pgchan.benchmarks._common import FLOOR_INSERT, FLOOR_READ, Pipe, Process, Report, due_times, interleave, main

MESSAGES = 100  # per round
INTERVAL_SECONDS = 0.008  # leaves a busy machine the time to catch up
LOST = 30  # messages that nobody is told of
CUTS = 5
SWEEP_SECONDS_MAX = 1.2
CHANNEL_ID = 1  # of the floor's channel
# A message that was written by another client whose wakeup was lost: the append without its announcement.
APPEND_QUIETLY = """
select a.channel_ids from pgchan.append(
  array[null::bigint], array[$1::text], array['application/json'], array[null::bigint], array[null::bigint], array[1],
  array[null::bigint], array[1], array[1], array[0::smallint], array[null::text], array[null::text],
  array[null::integer], array[null::bigint], array[$2::bytea]) a
"""
CUT_LISTENERS = """
select pg_terminate_backend(pid) from pg_stat_activity
where datname = current_database() and application_name = $1
"""


async def read_ours(pipe: Pipe, dsn: str, name: str) -> None:
    """The other process: tail a channel and note how late each message was."""
    late: list[float] = []
    async with pgchan.AsyncClient(dsn, name="reader") as client:
        tail = client.channel(name).tail(after="now")
        await tail.next_page(0.01)
        answering = asyncio.create_task(_answer(pipe, late))
        async for message in tail:
            late.append((time.monotonic_ns() - message.body["due"]) / 1e3)
        await answering


async def read_floor(pipe: Pipe, dsn: str) -> None:
    """The other process, by hand: LISTEN, and read what is new on the same connection."""
    late: list[float] = []
    connection = await asyncpg.connect(dsn)
    heard = asyncio.Event()
    await connection.add_listener("floor", lambda *_: heard.set())
    last = await connection.fetchval("select head from floor.channels where id = $1::bigint", CHANNEL_ID)
    answering = asyncio.create_task(_answer(pipe, late))
    while True:
        await heard.wait()
        heard.clear()
        for position, body in await connection.fetch(FLOOR_READ, CHANNEL_ID, last):
            last = position
            late.append((time.monotonic_ns() - int(body[7:-1])) / 1e3)
    await answering


async def _answer(pipe: Pipe, late: list[float]) -> None:
    """Whenever asked for that many latencies: when they are there, and never more."""
    pipe.send("ready")
    while True:
        count = await pipe.receive()
        while len(late) < count:  # noqa: ASYNC110 - an event would have to be set in the path that is measured
            await asyncio.sleep(0.005)
        pipe.send(list(late))
        late.clear()


async def delivery(report: Report) -> None:
    """publish → tail, and publish → acknowledged, each beside its floor."""
    writing = await asyncpg.connect(report.dsn)
    await writing.execute("insert into floor.channels (id) values ($1::bigint)", CHANNEL_ID)
    async with pgchan.AsyncClient(report.dsn) as client:
        channel = client.channel("latency/tail")
        await channel.publish({"due": 0})
        readers = {"ours": Process(read_ours, report.dsn, channel.name), "floor": Process(read_floor, report.dsn)}
        for reader in readers.values():
            await reader.answer()

        async def ours() -> list[float]:
            async for due in due_times(MESSAGES, INTERVAL_SECONDS):
                await channel.publish({"due": due})
            return list(await readers["ours"].ask(MESSAGES))

        async def floor() -> list[float]:
            async for due in due_times(MESSAGES, INTERVAL_SECONDS):
                await writing.fetchval("select floor.append($1, $2)", CHANNEL_ID, b'{"due":%d}' % due)
            return list(await readers["floor"].ask(MESSAGES))

        found = await interleave(report.arguments.rounds, ours=ours, floor=floor)
        report.times("publish → tail in another process", found["ours"], found["floor"], at_most={50: 1.15, 99: 1.5})
        for reader in readers.values():
            reader.kill()

        alone = client.channel("latency/alone")
        count = 0

        async def publish() -> list[float]:
            late = []
            async for due in due_times(MESSAGES, INTERVAL_SECONDS):
                await alone.publish({"due": due})
                late.append((time.monotonic_ns() - due) / 1e3)
            return late

        async def insert() -> list[float]:
            nonlocal count
            late = []
            async for due in due_times(MESSAGES, INTERVAL_SECONDS):
                count += 1
                await writing.execute(FLOOR_INSERT, 2, count, b'{"due":%d}' % due)
                late.append((time.monotonic_ns() - due) / 1e3)
            return late

        found = await interleave(report.arguments.rounds, ours=publish, floor=insert)
        report.times("one durable publish, against INSERT", found["ours"], found["floor"], at_most={50: 1.75, 99: 2.0})
    await writing.close()


async def lost_wakeups(report: Report) -> None:
    """How late messages are that nobody was told of, and that every one arrives, once and in order."""
    quiet = await asyncpg.connect(report.dsn)
    late: list[float] = []
    positions: list[int] = []
    async with pgchan.AsyncClient(report.dsn, name="lost") as client:
        channel = client.channel("latency/lost")
        await channel.publish({"due": 0})

        async def read() -> None:
            async for message in channel.tail(after=1):
                late.append((time.monotonic_ns() - message.body["due"]) / 1e9)
                positions.append(message.position)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        for _ in range(LOST):
            await asyncio.sleep(random.uniform(0.02, 0.3))
            await quiet.execute(APPEND_QUIETLY, channel.name, b'{"due":%d}' % time.monotonic_ns())
        await _until(lambda: len(late) == LOST)
        swept = late[:]
        late.clear()
        for number in range(CUTS):
            await quiet.fetch(CUT_LISTENERS, "lost listen")
            await channel.publish({"due": time.monotonic_ns()})
            await _until(lambda number=number: len(late) == number + 1)
            await _until(lambda: client.health == "listening")
        reading.cancel()
    await quiet.close()
    expected = range(2, LOST + CUTS + 2)
    wrong = 0 if positions == list(expected) else max(1, len(set(expected) ^ set(positions)))
    report.figure("wakeup lost, until delivered, worst", "s", max(swept), at_most=SWEEP_SECONDS_MAX)
    report.figure("listener cut, until delivered, worst", "s", max(late), at_most=SWEEP_SECONDS_MAX)
    report.figure("messages lost, doubled or out of order", "messages", wrong, at_most=0)


async def _until(claim: Any) -> None:
    async with asyncio.timeout(20):
        while not claim():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)


async def measure(report: Report) -> None:
    """All of it."""
    await delivery(report)
    await lost_wakeups(report)


if __name__ == "__main__":
    main(__doc__, measure, seconds=45)
