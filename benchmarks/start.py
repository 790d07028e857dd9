"""How soon does a run that is started execute, and how soon does a running step hear a signal or a cancellation?

start: from when it was due until the first step of the run begins, in another process. Its floor is a queue by hand: an
INSERT with a NOTIFY in it; the other process listens, claims with SKIP LOCKED, and has committed.
signal, cancel: from when they were due until the running step has the signal, or CancelledError is raised in it. Their
floor is that of publish → tail: counter row + insert + NOTIFY in one routine, read back.
Then the first again with up to 100,000 runs that wait for a signal or sleep, each number in a database of its own,
measured in turns; "floor" is the smallest of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import asyncpg

import pgchan
from pgchan.benchmarks._common import Pipe, Process, Report, another_database, due_times, interleave, main, percentile
from pgchan.benchmarks._fill import RUNS, fill
from pgchan.benchmarks.latency import CHANNEL_ID, read_floor

STARTS = 40  # per round
START_SECONDS = 0.02  # between two
SIGNALS = 60
SIGNAL_SECONDS = 0.01
CANCELS = 20
CANCEL_SECONDS = 0.02
SIZES = (100, 1_000, 10_000, 100_000)  # runs that wait or sleep
START_MICROSECONDS_MAX = 5_000.0
START_P99_MICROSECONDS_MAX = 10_000.0
REACH_MICROSECONDS_MAX = 10_000.0
PEERS = {"dbos": "dbos", "procrastinate": "procrastinate", "pgqueuer": "pgqueuer"}
QUEUE = """
create table floor.queue (
  id bigint generated always as identity primary key, taken_at timestamptz, body bytea not null);
create index on floor.queue (id) where taken_at is null;
"""
FLOOR_START = "with i as (insert into floor.queue (body) values ($1::bytea)) select pg_notify('floor_queue', '')"
FLOOR_CLAIM = """
update floor.queue q set taken_at = clock_timestamp()
where q.id = (select c.id from floor.queue c where c.taken_at is null order by c.id limit 1 for update skip locked)
returning q.body
"""

_here: list[str] = []  # in the worker's process: runs whose step has begun
_cut: dict[str, int] = {}  # and when CancelledError was raised in it


@pgchan.workflow
async def begin(run: pgchan.Run) -> int:
    """One step that says when it began."""
    return await run.step(moment)


async def moment() -> int:
    """The step. The clock is one that all processes of a machine share."""
    return time.monotonic_ns()


@pgchan.workflow
async def hear(run: pgchan.Run) -> list[float]:
    """One step that notes how late each signal is, in µs."""
    return await run.step(note, run)


async def note(run: pgchan.Run) -> list[float]:
    """The step."""
    late: list[float] = []
    _here.append(run.id)
    async for signal in run.signals():
        late.append((time.monotonic_ns() - signal.body["due"]) / 1e3)
        if len(late) == SIGNALS:
            break
    return late


@pgchan.workflow
async def hold(run: pgchan.Run) -> None:
    """One step that lasts until it is cancelled."""
    await run.step(wait, run)


async def wait(run: pgchan.Run) -> None:
    """The step."""
    _here.append(run.id)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        _cut[run.id] = time.monotonic_ns()
        raise


async def work(pipe: Pipe, dsn: str) -> None:
    """A worker process. Asked for runs, it answers when their steps have begun; asked to cut, when they were cut."""
    async with pgchan.AsyncClient(dsn, name="worker") as client:
        worker = pgchan.Worker(client, [begin, hear, hold])
        running = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        pipe.send("ready")
        while True:
            what, ids = await pipe.receive()
            known: Any = _here if what == "here" else _cut
            while not set(ids) <= set(known):  # noqa: ASYNC110 - as in the floor
                await asyncio.sleep(0.005)
            pipe.send([_cut.get(id) for id in ids])
        await running


async def work_floor(pipe: Pipe, dsn: str) -> None:
    """The worker by hand: LISTEN, claim one after the other, note how late each was when it was committed."""
    late: list[float] = []
    connection = await asyncpg.connect(dsn)
    heard = asyncio.Event()
    await connection.add_listener("floor_queue", lambda *_: heard.set())

    async def claim() -> None:
        while True:
            await heard.wait()
            heard.clear()
            while (body := await connection.fetchval(FLOOR_CLAIM)) is not None:
                late.append((time.monotonic_ns() - int(body)) / 1e3)

    claiming = asyncio.create_task(claim())
    pipe.send("ready")
    while True:
        count = await pipe.receive()
        while len(late) < count:  # noqa: ASYNC110 - an event would have to be set in the path that is measured
            await asyncio.sleep(0.005)
        pipe.send(list(late))
        late.clear()
    await claiming


async def starts(client: pgchan.AsyncClient) -> list[float]:
    """How late the first steps of so many runs begin, in µs."""
    due_at: list[int] = []
    begun = []
    async for due in due_times(STARTS, START_SECONDS):
        due_at.append(due)
        begun.append(asyncio.create_task(_begun(client)))
    return [(began - due) / 1e3 for began, due in zip(await asyncio.gather(*begun), due_at, strict=True)]


async def _begun(client: pgchan.AsyncClient) -> int:
    result: int = await (await client.start(begin)).result(timeout=60)
    return result


@contextlib.asynccontextmanager
async def process(target: Any, dsn: str) -> AsyncIterator[Process]:
    """A process that is ready."""
    process = Process(target, dsn)
    try:
        await process.answer()
        yield process
    finally:
        process.kill()


async def starting(report: Report, client: pgchan.AsyncClient) -> None:
    """start → first step."""
    connection = await asyncpg.connect(report.dsn)
    await connection.execute(QUEUE)
    async with process(work_floor, report.dsn) as by_hand:

        async def floor() -> list[float]:
            async for due in due_times(STARTS, START_SECONDS):
                await connection.fetchval(FLOOR_START, str(due).encode())
            return list(await by_hand.ask(STARTS))

        found = await interleave(report.arguments.rounds, ours=lambda: starts(client), floor=floor)
    await connection.close()
    everything = [late for values in found["ours"] for late in values]
    report.times("start → first step runs", found["ours"], found["floor"], at_most={50: 1.5, 99: 2.0})
    report.figure("the same, p50", "µs", percentile(everything, 50), at_most=START_MICROSECONDS_MAX)
    report.figure("the same, p99", "µs", percentile(everything, 99), at_most=START_P99_MICROSECONDS_MAX)


async def reaching(report: Report, client: pgchan.AsyncClient, worker: Process) -> None:
    """signal → seen, cancel → CancelledError."""
    connection = await asyncpg.connect(report.dsn)
    await connection.execute("insert into floor.channels (id) values ($1::bigint)", CHANNEL_ID)

    async def signals() -> list[float]:
        handle = await client.start(hear)
        await worker.ask(("here", [handle.id]))
        sent = []
        async for due in due_times(SIGNALS, SIGNAL_SECONDS):
            sent.append(asyncio.create_task(handle.signal({"due": due})))
        await asyncio.gather(*sent)
        return list(await handle.result(timeout=60))

    async def cancels() -> list[float]:
        handles = [await client.start(hold) for _ in range(CANCELS)]
        ids = [handle.id for handle in handles]
        await worker.ask(("here", ids))
        due_at: list[int] = []
        sent = []
        async for due in due_times(CANCELS, CANCEL_SECONDS):
            sent.append(asyncio.create_task(handles[len(due_at)].cancel()))
            due_at.append(due)
        await asyncio.gather(*sent)
        cut = await worker.ask(("cut", ids))
        return [(at - due) / 1e3 for at, due in zip(cut, due_at, strict=True)]

    async with process(read_floor, report.dsn) as by_hand:

        async def floor() -> list[float]:
            async for due in due_times(SIGNALS, SIGNAL_SECONDS):
                await connection.fetchval("select floor.append($1, $2)", CHANNEL_ID, b'{"due":%d}' % due)
            return list(await by_hand.ask(SIGNALS))

        found = await interleave(report.arguments.rounds, signals=signals, cancels=cancels, floor=floor)
    await connection.close()
    for name, what in (
        ("signals", "signal → seen in a running step"),
        ("cancels", "cancel → CancelledError in the step"),
    ):
        everything = [late for values in found[name] for late in values]
        report.times(what, found[name], found["floor"], at_most={50: 1.3})
        report.figure(f"{what}, p50", "µs", percentile(everything, 50), at_most=REACH_MICROSECONDS_MAX)
        report.figure(f"{what}, p99", "µs", percentile(everything, 99))


async def crowded(report: Report) -> None:
    """start → first step while so many other runs wait for a signal or sleep."""
    async with contextlib.AsyncExitStack() as stack:
        variants = {}
        for size in report.arguments.sizes:
            dsn = await stack.enter_async_context(another_database(report.dsn))
            await fill(
                dsn, (RUNS, "waiting/", size // 2, "waiting", None), (RUNS, "asleep/", size // 2, "scheduled", 3600.0)
            )
            await stack.enter_async_context(process(work, dsn))
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn, name=f"client{size}"))
            variants[str(size)] = partial(starts, client)
        found = await interleave(max(2, report.arguments.rounds // 2), **variants)
    fewest, *_ = found
    for size in found:
        if size != fewest:
            what = f"start → first step, {int(size):,} runs wait or sleep, against {int(fewest):,}"
            report.times(what, found[size], found[fewest], at_most={50: 1.5})


async def measure(report: Report) -> None:
    """All of it."""
    async with process(work, report.dsn) as worker, pgchan.AsyncClient(report.dsn, name="starter") as client:
        await starting(report, client)
        await reaching(report, client, worker)
    await crowded(report)
    if missing := [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]:
        report.note(f"peers: {', '.join(missing)} not installed")


def options(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="runs that wait or sleep")


if __name__ == "__main__":
    main(__doc__, measure, seconds=80, options=options)
