"""How soon does a step run elsewhere when the worker that was executing it dies, hangs, or loses its connection?

Killed: SIGKILL of the process; counted from the kill until the step of the next attempt begins in another process. A
second of it is grace, in which a worker that only lost its connection may come back.
Stopped: SIGSTOP; its connection stays open, so the server waits for the lease.
Cut: the writer's and the listener's connection of a living worker are ended while a step publishes; the longest pause
between two acknowledged messages, and whether each arrived once and in order.
Many: a worker that holds a thousand runs is killed; counted until the step of each has begun in the other one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import time

import asyncpg

import pgchan
from pgchan.benchmarks._common import Pipe, Process, Report, main, percentile

KILLS = 12
RUNS = 4  # held by each worker that is killed, about
STOPS = 2
LEASE_SECONDS = 2.0  # of the workers that are stopped
CUTS = 5
TAKEOVER_SECONDS_MAX = 2.0
TAKEOVER_SECONDS_P50_MAX = 1.2  # a second of it is grace
MANY = 1_000  # runs, held by one worker, and taken over by another
MANY_SECONDS_MAX = 5.0
SPEAK_SECONDS = 0.005  # between two messages of the step whose connection is cut
BEGUN = """
select count(*) from pgchan.messages m join pgchan.channels c on c.id = m.channel_id
where c.name = any ($1::text[]) and m.kind = 0 and m.attempt = $2::integer
"""
CUT = """
select pg_terminate_backend(pid) from pg_stat_activity
where datname = current_database() and application_name = $1::text
"""


@pgchan.workflow
async def hold(run: pgchan.Run) -> None:
    """One step that never ends, and says where and when it began."""
    await run.step(begin, run)


async def begin(run: pgchan.Run) -> None:
    """The step. The moment is on the clock that all processes of a machine share."""
    await run.publish({"pid": os.getpid(), "began": time.monotonic_ns()})
    await asyncio.Event().wait()


@pgchan.workflow
async def speak(run: pgchan.Run) -> list[float]:
    """One step that publishes until it gets a signal; the moments of the acknowledgements."""
    return await run.step(count, run)


async def count(run: pgchan.Run) -> list[float]:
    """The step."""
    moments: list[float] = []
    told = asyncio.create_task(run.receive())
    while not told.done():
        await run.publish(len(moments))
        moments.append(time.monotonic())
        await asyncio.sleep(SPEAK_SECONDS)
    return moments


async def work(pipe: Pipe, dsn: str, lease: float) -> None:
    """A worker process."""
    async with pgchan.AsyncClient(dsn, name=f"worker{os.getpid()}") as client:
        worker = pgchan.Worker(client, [hold, speak], lease=lease, concurrency=MANY)
        running = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        pipe.send("ready")
        await running


class Holders:
    """Which process executes each run, as the runs themselves have said."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[int, int]] = {}  # by run: the process, and when its step began there
        self._news = asyncio.Event()

    async def watch(self, handle: pgchan.AsyncRunHandle) -> None:
        """Follow one run."""
        async for message in handle.tail():
            if message.kind == "message":
                self.began[handle.id] = message.body["pid"], message.body["began"]
                self._news.set()

    async def wait_until_none(self, pid: int, runs: set[str], seconds: float) -> None:
        """Until this process executes none of them any more."""
        async with asyncio.timeout(seconds):
            while any(self.began[run][0] == pid for run in runs):
                self._news.clear()
                await self._news.wait()

    async def wait_until_all(self, count: int) -> None:
        """Until so many runs have begun."""
        async with asyncio.timeout(30):
            while len(self.began) < count:
                self._news.clear()
                await self._news.wait()


async def worker(dsn: str, lease: float) -> Process:
    """A new worker process, when it claims."""
    process = Process(work, dsn, lease)
    await process.answer()
    return process


async def takeovers(
    report: Report, client: pgchan.AsyncClient, *, number: int, lease: float, how: signal.Signals
) -> list[float]:
    """Seconds from the signal to each run's next beginning. Two workers at a time; who is hit is replaced."""
    workers = {process.pid: process for process in [await worker(report.dsn, lease)]}
    handles = [await client.start(hold) for _ in range(RUNS)]
    holders = Holders()
    watching = [asyncio.create_task(holders.watch(handle)) for handle in handles]
    await holders.wait_until_all(len(handles))
    seconds: list[float] = []
    try:
        for _ in range(number):
            fresh = await worker(report.dsn, lease)
            workers[fresh.pid] = fresh
            pid = next(iter(holders.began.values()))[0]
            held = {run for run, (holder, _) in holders.began.items() if holder == pid}
            hit = time.monotonic_ns()
            os.kill(pid, how)
            await holders.wait_until_none(pid, held, lease + 20)
            seconds += [(holders.began[run][1] - hit) / 1e9 for run in held]
            workers.pop(pid).kill()
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for handle in handles:
            await handle.cancel()
        for process in workers.values():
            process.kill()
    return seconds


async def cuts(report: Report, client: pgchan.AsyncClient) -> None:
    """What those who publish and those who read see of cut connections."""
    admin = await asyncpg.connect(report.dsn)
    process = await worker(report.dsn, 10.0)
    handle = await client.start(speak)
    heard: list[int] = []
    attempts: set[int | None] = set()

    async def read() -> None:
        async for message in handle.tail():
            if message.kind == "message":
                heard.append(message.body)
                attempts.add(message.attempt)

    reading = asyncio.create_task(read())
    for number in range(2 * CUTS):
        await asyncio.sleep(0.3)
        await admin.fetch(CUT, f"worker{process.pid} writer" if number % 2 else "takeover listen")
    await asyncio.sleep(0.5)
    await handle.signal("stop")
    moments = await handle.result(timeout=30)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await reading
    process.kill()
    await admin.close()
    pauses = [after - before for before, after in itertools.pairwise(moments)]
    report.figure("writer cut, longest pause of its publisher", "s", max(pauses), at_most=1.0)
    report.figure("messages lost, doubled or out of order", "messages", _wrong(heard, len(moments)), at_most=0)
    report.figure("tries of the step", "", len(attempts), at_most=1)


def _wrong(heard: list[int], count: int) -> int:
    if heard == list(range(count)):
        return 0
    return max(1, len(set(range(count)) ^ set(heard)) + len(heard) - len(set(heard)))


async def many(report: Report, client: pgchan.AsyncClient) -> None:
    """A thousand runs at once. The database is asked, for a thousand readers would be the measurement."""
    connection = await asyncpg.connect(report.dsn)

    async def until_begun(attempt: int, since: float) -> float:
        async with asyncio.timeout(60):
            while await connection.fetchval(BEGUN, ids, attempt) < MANY:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        return time.monotonic() - since

    first = await worker(report.dsn, 10.0)
    began = time.monotonic()
    handles = await asyncio.gather(*(client.start(hold) for _ in range(MANY)))
    ids = [handle.id for handle in handles]
    report.figure(f"{MANY:,} runs started at once, all running", "s", await until_begun(1, began))
    second = await worker(report.dsn, 10.0)
    first.kill()
    seconds = await until_begun(2, time.monotonic())
    name = f"kill -9 of the worker of {MANY:,} runs, all running again"
    report.figure(name, "s", seconds, at_most=MANY_SECONDS_MAX)
    await asyncio.gather(*(handle.cancel() for handle in handles))
    second.kill()
    await connection.close()


async def measure(report: Report) -> None:
    """All of it."""
    async with pgchan.AsyncClient(report.dsn, name="takeover") as client:
        killed = await takeovers(report, client, number=report.arguments.kills, lease=10.0, how=signal.SIGKILL)
        for q, most in ((50, TAKEOVER_SECONDS_P50_MAX), (99, TAKEOVER_SECONDS_MAX)):
            report.figure(f"kill -9 until the step runs elsewhere, p{q}", "s", percentile(killed, q), at_most=most)
        report.figure("kill -9 until the step runs elsewhere, worst", "s", max(killed), at_most=TAKEOVER_SECONDS_MAX)
        stopped = await takeovers(report, client, number=STOPS, lease=LEASE_SECONDS, how=signal.SIGSTOP)
        report.figure(
            f"SIGSTOP, lease of {LEASE_SECONDS:g} s, worst", "s", max(stopped),
            at_most=LEASE_SECONDS + TAKEOVER_SECONDS_MAX,
        )  # fmt: skip
        await cuts(report, client)
        await many(report, client)
        report.note(f"{report.arguments.kills} kills, {len(killed)} takeovers of a run; grace 1 s")


def options(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("--kills", type=int, default=KILLS)


if __name__ == "__main__":
    main(__doc__, measure, seconds=55, options=options)
