"""How many steps a second does one worker record, and what does a step cost?

A step returns 60 bytes, at once: what is measured is the record of it. Its floors are the same rows written by hand on
one connection: one INSERT after the other, and, as many as there are tasks, in one statement (group commit without
runs, replay, signals or fencing: an upper bound).
A run has ten steps and is started, claimed, executed and ended by one process; its floor is twelve commits by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

import pgchan
from pgchan.benchmarks._common import FLOOR_INSERT, Report, interleave, main

TASKS = (1, 8, 32, 256)
SECONDS = 0.6  # of one variant in one round
STEPS_PER_RUN = 10
GROUPED_AT_LEAST = 8.0  # 32 tasks, against one
BY_HAND_AT_LEAST = 0.25  # 32 tasks, against a group commit by hand
COMMITS_AT_MOST = 2.5  # what a step of 32 at a time takes, in INSERTs that are alone
RESULT = "x" * 58  # 60 bytes as JSON
RAW = b'"' + RESULT.encode() + b'"'
FLOOR_GROUP = """
insert into floor.messages (channel_id, "position", at, kind, key, step, attempt, body)
select e.id, e.place, clock_timestamp(), 0, e.place::text, 'step', 1, $3::bytea
from unnest($1::bigint[], $2::bigint[]) e (id, place)
"""
FLOOR_RUN = "insert into floor.runs (id, state) values ($1::bigint, 'running')"
FLOOR_END = "update floor.runs set state = 'succeeded' where id = $1::bigint"

_places = itertools.count(1)
_stop_at = 0.0
_done = 0
_took: list[float] = []  # each step, in µs


async def result() -> str:
    """The step."""
    return RESULT


@pgchan.workflow
async def many(run: pgchan.Run) -> int:
    """Steps until the time is over; how many."""
    global _done
    while time.monotonic() < _stop_at:
        began = time.perf_counter()
        await run.step(result)
        _took.append((time.perf_counter() - began) * 1e6)
        _done += 1
    return 0


@pgchan.workflow
async def ten(run: pgchan.Run) -> str:
    """Ten steps."""
    for _ in range(STEPS_PER_RUN):
        await run.step(result)
    return RESULT


@contextlib.asynccontextmanager
async def working(
    client: pgchan.AsyncClient, concurrency: int, *workflows: pgchan.Workflow[Any, Any]
) -> AsyncIterator[None]:  # fmt: skip
    """A worker in this process, of these workflows or of those here."""
    worker = pgchan.Worker(client, workflows or (many, ten), concurrency=concurrency)
    running = asyncio.create_task(worker.run(signals=False))
    try:
        await worker.wait_started()
        yield
    finally:
        worker.stop()
        await running


async def checkpoints(report: Report, client: pgchan.AsyncClient) -> None:
    """Steps per second of so many runs at a time."""
    connection = await asyncpg.connect(report.dsn)
    took: dict[int, list[list[float]]] = {count: [] for count in TASKS}  # by tasks, of each round
    alone: list[list[float]] = []

    async def ours(count: int) -> float:
        global _stop_at, _done
        _stop_at = time.monotonic() + 3600
        _done = 0
        handles = [await client.start(many) for _ in range(count)]
        async with asyncio.timeout(30):
            while _done < count:  # noqa: ASYNC110 - until all of them are under way
                await asyncio.sleep(0.005)
        began, _done = time.monotonic(), 0
        _took.clear()
        _stop_at = began + SECONDS
        await asyncio.sleep(SECONDS)
        rate = _done / (time.monotonic() - began)
        took[count].append(_took[:])
        for handle in handles:
            await handle.result(timeout=30)
        return rate

    async def one_by_one() -> float:
        began, late = time.monotonic(), list[float]()
        while time.monotonic() < began + SECONDS:
            begun = time.perf_counter()
            await connection.execute(FLOOR_INSERT, 3, next(_places), RAW)
            late.append((time.perf_counter() - begun) * 1e6)
        alone.append(late)
        return len(late) / (time.monotonic() - began)

    async def grouped(count: int) -> float:
        began, written = time.monotonic(), 0
        ids = list(range(10, 10 + count))
        while time.monotonic() < began + SECONDS:
            await connection.execute(FLOOR_GROUP, ids, [next(_places)] * count, RAW)
            written += count
        return written / (time.monotonic() - began)

    variants: dict[str, Any] = {"one": one_by_one}
    for count in TASKS:
        variants[f"ours{count}"] = lambda count=count: ours(count)
        variants[f"grouped{count}"] = lambda count=count: grouped(count)
    found = await interleave(max(3, report.arguments.rounds // 3), **variants)
    for count in TASKS:
        name = f"steps, {count} runs at a time, against INSERTs one by one"
        report.rates(name, "/s", found[f"ours{count}"], found["one"])
    for count in TASKS[1:]:
        name = f"steps, {count} runs at a time, against a group by hand"
        least = BY_HAND_AT_LEAST if count == 32 else None
        report.rates(name, "/s", found[f"ours{count}"], found[f"grouped{count}"], at_least=least)
    report.rates("group commit: 32 runs against 1", "/s", found["ours32"], found["ours1"], at_least=GROUPED_AT_LEAST)
    name = "a step, 32 runs at a time, against one INSERT"
    report.times(name, took[32][1:], alone[1:], at_most={50: COMMITS_AT_MOST, 99: None})
    await connection.close()


async def runs(report: Report, client: pgchan.AsyncClient) -> None:
    """Runs of ten steps per second, from start to result."""
    connection = await asyncpg.connect(report.dsn)
    await connection.execute("create table floor.runs (id bigint primary key, state text not null)")

    async def ours(count: int) -> float:
        ended = 0
        began = time.monotonic()

        async def loop() -> None:
            nonlocal ended
            while time.monotonic() < began + SECONDS:
                await (await client.start(ten)).result(timeout=30)
                ended += 1

        await asyncio.gather(*(loop() for _ in range(count)))
        return ended / (time.monotonic() - began)

    async def by_hand() -> float:
        began, ended = time.monotonic(), 0
        while time.monotonic() < began + SECONDS:
            number = next(_places)
            await connection.execute(FLOOR_RUN, number)
            for _ in range(STEPS_PER_RUN):
                await connection.execute(FLOOR_INSERT, 4, next(_places), RAW)
            await connection.execute(FLOOR_END, number)
            ended += 1
        return ended / (time.monotonic() - began)

    variants: dict[str, Any] = {"hand": by_hand, **{f"ours{c}": lambda c=c: ours(c) for c in TASKS}}
    found = await interleave(max(2, report.arguments.rounds // 3), **variants)
    for count in TASKS:
        name = f"runs of 10 steps, {count} at a time, against one by one by hand"
        report.rates(name, "/s", found[f"ours{count}"], found["hand"])
    await connection.close()


async def measure(report: Report) -> None:
    """All of it, in one process."""
    async with pgchan.AsyncClient(report.dsn) as client, working(client, max(TASKS)):
        await checkpoints(report, client)
        await runs(report, client)


if __name__ == "__main__":
    main(__doc__, measure, seconds=50)
