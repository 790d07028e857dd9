"""Does anything grow in an hour of messages that are trimmed as they come?

5,000 messages a second are published to a hundred channels, each of which keeps its last hundred; a worker removes the
others, and another process reads all of them through `tail`. They are due by this process's clock (an open loop) and
latency counts from there. The floor is the beginning, once the buffers of the reader are full: memory, latency and size
of the table stay what they are. A minute by default, in stretches of five seconds; --minutes 60 is the whole of it.

The embedded server vacuums after ten seconds instead of a minute, or a minute's run would end before it has begun.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from dataclasses import dataclass

import asyncpg

import pgchan
from pgchan.benchmarks._common import Pipe, Process, Report, due_times, main, percentile
from pgchan.benchmarks.steps import working
from pgchan.benchmarks.tokens import answer, token

CHANNELS = 100
KEPT = 100  # messages of each channel
RATE = 5_000
TICK_SECONDS = 0.002  # what is due within it is due at its end
STRETCHES = 12  # in all
WARM = 4  # of them: until the buffers of the reader are full
SOME = 4  # at the beginning and at the end, which are compared
MINUTES = 1.0
MEMORY_MOST = 1.1  # times the first
LATE_MOST = 1.2
TABLE_MOST = 1.2
SIZE = "select pg_total_relation_size('pgchan.messages'), (select count(*) from pgchan.messages)"
SETTINGS = {"autovacuum_naptime": "10s"}


@dataclass(frozen=True, slots=True)
class Stretch:
    """What was seen in some seconds. late: p99 in ms. memory: resident bytes of publisher and reader."""

    late: float
    publisher: int
    reader: int
    table: int
    rows: int


async def say(pipe: Pipe, dsn: str) -> None:
    """The publishing process, which also has the worker that trims. Answers how many messages were acknowledged."""
    acknowledged = 0
    async with pgchan.AsyncClient(dsn, name="publisher") as client, working(client, 1):
        channels = [client.channel(f"soak/{number}") for number in range(CHANNELS)]
        for channel in channels:
            await channel.create()
            await channel.set_retention(messages=KEPT)
        turns = itertools.cycle(channels)
        publishing: set[asyncio.Task[None]] = set()

        async def publish(channel: pgchan.AsyncChannel, due: int) -> None:
            nonlocal acknowledged
            await channel.publish(token(due))
            acknowledged += 1

        pipe.send("ready")
        while True:
            order = await pipe.receive()
            if order == "acknowledged":
                if publishing:
                    await asyncio.wait(publishing)
                pipe.send(acknowledged)
                continue
            due, count = order
            for channel in itertools.islice(turns, count):
                task = asyncio.create_task(publish(channel, due))
                publishing.add(task)
                task.add_done_callback(publishing.discard)


async def read(pipe: Pipe, dsn: str) -> None:
    """The reading process: a tail of each channel."""
    late: list[int] = []
    async with pgchan.AsyncClient(dsn, name="reader") as client:

        async def follow(tail: pgchan.AsyncTail) -> None:
            async for page in tail.pages():
                now = time.monotonic_ns()
                late.extend([now - int(message.raw[1:21]) for message in page])

        tails = [client.channel(f"soak/{number}").tail(after="now") for number in range(CHANNELS)]
        await asyncio.gather(*(tail.next_page(0.01) for tail in tails))  # each has to know where "now" is
        await asyncio.gather(answer(pipe, late), *(follow(tail) for tail in tails))


async def measure(report: Report) -> None:
    """Stretch after stretch."""
    seconds = report.arguments.minutes * 60 / STRETCHES
    per_tick, ticks = max(1, round(RATE * TICK_SECONDS)), math.ceil(seconds / TICK_SECONDS)
    connection = await asyncpg.connect(report.dsn)
    publisher = Process(say, report.dsn)
    await publisher.answer()
    reader = Process(read, report.dsn)
    await reader.answer()
    found: list[Stretch] = []
    for number in range(STRETCHES):
        began = time.monotonic()
        async for due in due_times(ticks, TICK_SECONDS):
            publisher.pipe.send((due, per_tick))
        late = await reader.ask(per_tick * ticks)
        ((table, rows),) = await connection.fetch(SIZE)
        found.append(Stretch(percentile(late, 99) / 1e6, publisher.memory(), reader.memory(), table, rows))
        print(f"  {number + 1} of {STRETCHES}: {per_tick * ticks / (time.monotonic() - began):,.0f} messages/s, p99 "
              f"{found[-1].late:.1f} ms, {rows:,} rows, {table / 1e6:.1f} MB", flush=True)  # fmt: skip
    acknowledged = await publisher.ask("acknowledged")
    publisher.kill()
    reader.kill()
    await connection.close()

    first, last = found[WARM : WARM + SOME], found[-SOME:]
    offered = per_tick * ticks * STRETCHES
    report.figure("messages that were not acknowledged", "messages", offered - acknowledged, at_most=0)
    for what, unit, bound, name in (
        ("publisher", 1e6, MEMORY_MOST, "memory of the publisher, MB"),
        ("reader", 1e6, MEMORY_MOST, "memory of the reader, MB"),
        ("late", 1, LATE_MOST, "due → delivered, p99, ms"), ("table", 1e6, TABLE_MOST, "table, MB"),
    ):  # fmt: skip
        end, begin = (statistics.median(getattr(stretch, what) for stretch in some) / unit for some in (last, first))
        report.figure(name, "", end, floor=begin, ratio_at_most=bound)
    report.note(f"{acknowledged:,} messages were published, {found[-1].rows:,} rows are left; {seconds:g} s a stretch")
    report.note(f"medians of the last {SOME} stretches, against the {SOME} after warming up")


def options(parser: argparse.ArgumentParser) -> None:
    """How long."""
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long in all; 60 is the whole of it")


if __name__ == "__main__":
    main(__doc__, measure, seconds=70, options=options, settings=SETTINGS)
