"""What becomes slower as channels, messages, runs, workers, readers and old snapshots become more?

The same calls beside little and beside much, in turns: channels of several lengths in one database, databases of
several sizes on one server, filled by plain INSERTs and vacuumed. The "floor" of a line is the smallest size, the ratio
is what growth costs; flat is 1. With matplotlib (benchmarks/requirements.txt) each question is drawn, too.
The journal of a run is compared with one bare SELECT of it, and the sweep of a process that follows many channels with
a core.

Long, because each thing that grows is filled and asked in its own way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

import pgchan
from pgchan import sql
from pgchan.attempt import Attempt, Claimed
from pgchan.benchmarks._common import (
    Pipe,
    Process,
    Report,
    another_database,
    cpu_seconds,
    due_times,
    interleave,
    main,
    percentile,
)
from pgchan.benchmarks._fill import CHANNELS, JOURNAL, MESSAGES, RUNS, fill
from pgchan.benchmarks.start import begin, process, starts

CALLS = 24  # of one kind, per round
INTERVAL_SECONDS = 0.006
SPREAD = 8  # channels that are written to, out of many
FLAT = 1.3
BURST = 100  # publishes to a hot channel, per point
RELEASED_SECONDS = 5.0  # within which a released snapshot must be forgotten
SNAPSHOT_RATIO_MAX = 1.6
JOURNAL_RATIO_MAX = 2.0
LAST_MICROSECONDS_MAX = 150_000.0
DELIVERY_SECONDS = 0.0001  # that each reader is given until the next message comes: less would be a queue's growth
FOLLOWED = 10_000
SWEEP_SECONDS = 5.0  # for which the sweeps are watched
SWEEP_PERCENT_MAX = 2.0
STEPS = (1, 10, 100, 1_000)
WORKERS_PER_PROCESS = 8
BARE = """
select m.channel_id, m.kind, m.key, m.step, m.attempt, m.body, m.at from pgchan.messages m
where m.channel_id = $1::bigint order by m."position"
"""
REGISTER = """
insert into pgchan.workers (id, name, host, pid, backend_pid) overriding system value
values (1, 'growth', 'here', 1, pg_backend_pid()) on conflict do nothing
"""
FINISH = "select pgchan.finish($1::bigint, $2::bigint, 'succeeded', '1', null)"
BACKEND = "select pid from pg_stat_activity where application_name = $1::text and datname = current_database()"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How far each thing grows."""

    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)
    channels: tuple[int, ...] = (10, 1_000, 100_000)
    ended: tuple[int, ...] = (0, 1_000, 100_000)
    asleep: tuple[int, ...] = (100, 10_000, 100_000)
    workers: tuple[int, ...] = (1, 4, 16)
    readers: tuple[int, ...] = (1, 100, 1_000)
    snapshot_seconds: float = 15.0


FULL = Sizes(
    (1_000, 10_000, 100_000, 1_000_000), (10, 1_000, 100_000), (0, 1_000, 100_000, 1_000_000), (100, 10_000, 100_000),
    (1, 4, 16, 32), (1, 100, 1_000, 5_000), 60.0,
)  # fmt: skip


@dataclass(slots=True)
class Curve:
    """One question's answer over sizes. lines: by what was called, (size, µs)."""

    name: str
    title: str
    along: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


class Growth:
    """Reports a measurement beside that of the smallest size, and remembers the curves."""

    def __init__(self, report: Report, sizes: Sizes) -> None:
        self.report = report
        self.sizes = sizes
        self.curves: list[Curve] = []

    def curve(self, name: str, title: str, along: str) -> Curve:
        """A new one."""
        self.curves.append(Curve(name, title, along))
        return self.curves[-1]

    def line(self, curve: Curve, what: str, found: dict[int, list[list[float]]], *, at_most: float | None) -> None:
        """found: µs by size, round by round."""
        sizes = sorted(found)
        curve.lines[what] = [(size, percentile([us for values in found[size] for us in values], 50)) for size in sizes]
        if at_most is not None:
            title = f"{what}, {sizes[-1]:,} {curve.along}, against {sizes[0]:,}"
            self.report.times(title, found[sizes[-1]], found[sizes[0]], at_most={50: at_most})

    async def rounds(self, variants: Mapping[int, Callable[[], Awaitable[dict[str, list[float]]]]]) -> dict[str, Any]:
        """Interleave sizes that answer several questions at once: by question, µs by size, round by round."""
        count = max(2, self.report.arguments.rounds)
        found = await interleave(count, **{str(size): variant for size, variant in variants.items()})
        return {
            question: {int(size): [values[question] for values in rounds] for size, rounds in found.items()}
            for question in next(iter(found.values()))[0]
        }


async def timed(call: Callable[[], Awaitable[object]], count: int = CALLS) -> list[float]:
    """µs of so many calls, one after the other."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        found.append((time.perf_counter() - began) * 1e6)
    return found


# ------------------------------------------------------------------------------------------------ channels


async def read(pipe: Pipe, dsn: str, names: Sequence[str]) -> None:
    """Another process: follows channels; asked for so many, it answers how late they were, in µs."""
    late: list[float] = []
    async with pgchan.AsyncClient(dsn, name="reader") as client:

        async def follow(name: str) -> None:
            tail = client.channel(name).tail(after="now")
            await tail.next_page(0.01)
            ready.release()
            async for message in tail:
                late.append((time.monotonic_ns() - message.body["due"]) / 1e3)

        ready = asyncio.Semaphore(0)
        following = [asyncio.create_task(follow(name)) for name in names]
        for _ in names:
            await ready.acquire()
        pipe.send("ready")
        while True:
            count = await pipe.receive()
            while len(late) < count:  # noqa: ASYNC110 - an event would have to be set in the path that is measured
                await asyncio.sleep(0.005)
            pipe.send(list(late))
            late.clear()
        await asyncio.gather(*following)


async def traffic(client: pgchan.AsyncClient, names: Sequence[str], reader: Process) -> dict[str, list[float]]:
    """What a durable publish takes, and how late the message is in the other process."""
    appended = []
    count = 0
    async for due in due_times(CALLS, INTERVAL_SECONDS):
        await client.channel(names[count % len(names)]).publish({"due": due})
        appended.append((time.monotonic_ns() - due) / 1e3)
        count += 1
    return {"append": appended, "tail": list(await reader.ask(CALLS))}


@contextlib.asynccontextmanager
async def reading(dsn: str, names: Sequence[str]) -> AsyncIterator[Process]:
    """That process, ready."""
    reader = Process(read, dsn, names)
    try:
        await reader.answer()
        yield reader
    finally:
        reader.kill()


async def lengths(growth: Growth) -> None:
    """Append, tail, and a page from the middle, of channels that hold more and more."""
    dsn = growth.report.dsn
    names = {length: f"long/{length}" for length in growth.sizes.lengths}
    await fill(dsn, *((MESSAGES, names[length], length) for length in names))
    async with pgchan.AsyncClient(dsn) as client, reading(dsn, list(names.values())) as reader:

        async def variant(length: int) -> dict[str, list[float]]:
            channel = client.channel(names[length])
            found = await traffic(client, [names[length]], reader)
            return found | {"read": await timed(lambda: channel.read(after=length // 2, limit=100))}

        found = await growth.rounds({length: partial(variant, length) for length in names})
    curve = growth.curve("length", "A channel grows", "messages in the channel")
    growth.line(curve, "append", found["append"], at_most=FLAT)
    growth.line(curve, "publish → tail", found["tail"], at_most=FLAT)
    growth.line(curve, "100 messages from the middle", found["read"], at_most=FLAT)


async def channels(growth: Growth) -> None:
    """The same beside more and more other channels."""
    async with contextlib.AsyncExitStack() as stack:
        variants = {}
        for size in growth.sizes.channels:
            dsn = await stack.enter_async_context(another_database(growth.report.dsn))
            names = [f"many/{1 + n * size // SPREAD}" for n in range(SPREAD)]
            await fill(dsn, (CHANNELS, "many/", size), *((MESSAGES, name, 200) for name in names))
            reader = await stack.enter_async_context(reading(dsn, names))
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn))
            variants[size] = partial(_among_many, client, names, reader)
        found = await growth.rounds(variants)
    curve = growth.curve("channels", "A database fills with channels", "channels")
    growth.line(curve, "append", found["append"], at_most=FLAT)
    growth.line(curve, "publish → tail", found["tail"], at_most=FLAT)
    growth.line(curve, "100 messages from the middle", found["read"], at_most=FLAT)
    growth.line(curve, "list of 20 channels", found["list"], at_most=FLAT)


async def _among_many(client: pgchan.AsyncClient, names: list[str], reader: Process) -> dict[str, list[float]]:
    found = await traffic(client, names, reader)
    return found | {
        "read": await timed(lambda: client.channel(names[1]).read(after=100, limit=100)),
        "list": await timed(lambda: client.channels(prefix="many/", limit=20)),
    }


async def follow_many(pipe: Pipe, dsn: str, count: int) -> None:
    """Another process: follows so many channels on which nothing happens."""
    async with pgchan.AsyncClient(dsn, name="follower") as client:
        tails = [client.channel(f"many/{n + 1}").tail(after=0) for n in range(count)]
        for start in range(0, count, 200):
            await asyncio.gather(*(tail.next_page(0.0) for tail in tails[start : start + 200]))
        pipe.send(len(client._use().listener.hub.swept_ids()))
        await asyncio.Event().wait()


async def sweeps(growth: Growth) -> None:
    """What the sweeps of a process that follows many channels cost it and the server."""
    async with another_database(growth.report.dsn) as dsn:
        await fill(dsn, (CHANNELS, "many/", FOLLOWED))
        follower = Process(follow_many, dsn, FOLLOWED)
        try:
            assert await follower.answer() == FOLLOWED
            connection = await asyncpg.connect(dsn)
            backends = [row[0] for row in await connection.fetch(BACKEND, "follower listen")]
            await connection.close()
            await asyncio.sleep(1.5)  # what was followed a moment ago is looked at once more
            for what, pids in (("process", [follower.pid]), ("server", backends)):
                with contextlib.suppress(OSError):  # the server may be on another machine
                    used = cpu_seconds(*pids)
                    await asyncio.sleep(SWEEP_SECONDS)
                    percent = 100 * (cpu_seconds(*pids) - used) / SWEEP_SECONDS
                    growth.report.figure(
                        f"sweep of {FOLLOWED:,} followed channels, in the {what}", "% of a core", percent,
                        at_most=SWEEP_PERCENT_MAX,
                    )  # fmt: skip
        finally:
            follower.kill()


# ------------------------------------------------------------------------------------------------ runs


class Claimer:
    """A worker by hand: starts runs, claims them, ends them; times each."""

    def __init__(self, client: pgchan.AsyncClient, connection: asyncpg.Connection) -> None:
        self.client = client
        self.connection = connection

    async def claim(self, queues: list[str], workflow: str) -> list[Any]:
        """The rows of one claim."""
        return list(await self.connection.fetch(sql.CLAIM, 1, queues, [workflow], 1))

    async def calls(self) -> dict[str, list[float]]:
        """What a start, a claim, a look at the queues, a run's state and the first page of all runs take."""
        found: dict[str, list[float]] = defaultdict(list)

        async def clock(question: str, call: Awaitable[Any]) -> Any:
            began = time.perf_counter()
            value = await call
            found[question].append((time.perf_counter() - began) * 1e6)
            return value

        for _ in range(CALLS):
            handle = await clock("start", self.client.start(begin, queue="growth"))
            (claimed,) = await clock("claim", self.claim(["growth"], "begin"))
            await clock("look", self.connection.fetch(sql.READY, ["growth"], ["begin"]))
            await clock("status", handle.status())
            await clock("list", self.client.runs(limit=20))
            await self.connection.execute(FINISH, claimed["channel_id"], claimed["epoch"])
        return found


async def runs(
    growth: Growth, name: str, title: str, along: str, sizes: Sequence[int], *states: tuple[str, float | None]
) -> None:
    """Starts, claims, looks and lists beside more and more runs in these states."""
    async with contextlib.AsyncExitStack() as stack:
        variants = {}
        for size in sizes:
            dsn = await stack.enter_async_context(another_database(growth.report.dsn))
            await fill(dsn, *((RUNS, f"{state}/", size // len(states), state, wakes) for state, wakes in states))
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn))
            connection = await asyncpg.connect(dsn)
            stack.push_async_callback(connection.close)
            await connection.execute(REGISTER)
            variants[size] = Claimer(client, connection).calls
        found = await growth.rounds(variants)
    curve = growth.curve(name, title, along)
    for question, what, most in (
        ("start", "start", 1.5), ("claim", "claim", 1.5), ("look", "a worker's look", 1.5), ("status", "status", 1.5),
        ("list", "list of 20 runs", 1.5),
    ):  # fmt: skip
        growth.line(curve, what, found[question], at_most=most)


async def journals(growth: Growth) -> None:
    """A claim of a run with more and more recorded steps, and what it has to load, against one SELECT of them."""
    async with another_database(growth.report.dsn) as dsn, pgchan.AsyncClient(dsn) as client:
        result = b'"' + b"x" * 58 + b'"'
        await fill(
            dsn, *((RUNS, f"steps/{steps}/", 1, "scheduled", None) for steps in STEPS),
            *((JOURNAL, f"steps/{steps}/1", steps, result) for steps in STEPS),
        )  # fmt: skip
        connection = await asyncpg.connect(dsn)
        await connection.execute(REGISTER)
        await connection.execute(
            "update pgchan.runs r set queue = c.name, wake_at = null from pgchan.channels c where c.id = r.channel_id"
        )
        claimer = Claimer(client, connection)
        await client.channel("journal").publish(1)

        async def variant(steps: int) -> dict[str, list[float]]:
            found: dict[str, list[float]] = {"claim": [], "load": [], "bare": []}
            for _ in range(CALLS // 2):
                began = time.perf_counter()
                (row,) = await claimer.claim([f"steps/{steps}/1"], "filled")
                claimed = time.perf_counter()
                attempt = Attempt(client._use(), Claimed(*row), begin, 1.0)
                await attempt.load()
                loaded = time.perf_counter()
                rows = await connection.fetch(BARE, row["journal_id"])
                found["bare"].append((time.perf_counter() - loaded) * 1e6)
                assert len(rows) == steps
                found["claim"].append((loaded - began) * 1e6)
                found["load"].append((loaded - claimed) * 1e6)
                attempt.forget()
                await connection.execute(sql.RELEASE, 1, [row["channel_id"]])
            return found

        found = await growth.rounds({steps: partial(variant, steps) for steps in STEPS})
        await connection.close()
    curve = growth.curve("journal", "A run with a long record is taken over", "recorded steps")
    for question, what in (("claim", "claim and load"), ("load", "load"), ("bare", "one bare SELECT")):
        curve.lines[what] = [
            (steps, statistics.median(us for values in found[question][steps] for us in values)) for steps in STEPS
        ]
    for question, what in (("claim", "claim and load"), ("load", "load")):
        growth.report.times(
            f"{what} of a run with {STEPS[-1]:,} steps, against a SELECT", found[question][STEPS[-1]],
            found["bare"][STEPS[-1]], at_most={50: JOURNAL_RATIO_MAX},
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ processes


async def work_many(pipe: Pipe, dsn: str, count: int) -> None:
    """Another process, with so many workers, each with connections of its own."""
    async with contextlib.AsyncExitStack() as stack:
        running = []
        for number in range(count):
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn, name=f"worker{number}"))
            worker = pgchan.Worker(client, [begin], name=f"worker{number}")
            running.append(asyncio.create_task(worker.run(signals=False)))
            await worker.wait_started()
        pipe.send("ready")
        await asyncio.gather(*running)


async def workers(growth: Growth) -> None:
    """start → first step, with more and more workers that all hear of each run."""
    async with contextlib.AsyncExitStack() as stack:
        variants = {}
        for size in growth.sizes.workers:
            dsn = await stack.enter_async_context(another_database(growth.report.dsn))
            for number in range(0, size, WORKERS_PER_PROCESS):
                some = partial(work_many, count=min(WORKERS_PER_PROCESS, size - number))
                await stack.enter_async_context(process(some, dsn))
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn))
            variants[size] = partial(_starts, client)
        found = await growth.rounds(variants)
    curve = growth.curve("workers", "More workers hear of each run", "workers")
    growth.line(curve, "start → first step", found["start"], at_most=2.0)


async def _starts(client: pgchan.AsyncClient) -> dict[str, list[float]]:
    return {"start": await starts(client)}


async def read_together(pipe: Pipe, dsn: str, name: str, count: int) -> None:
    """Another process: many readers of one channel. Answers how late the first and the last of them were, in µs."""
    heard: Counter[int] = Counter()
    late: list[tuple[float, float]] = []
    first: dict[int, float] = {}
    async with pgchan.AsyncClient(dsn, name="readers") as client:

        async def follow() -> None:
            tail = client.channel(name).tail(after="now")
            await tail.next_page(0.01)
            ready.release()
            async for message in tail:
                us = (time.monotonic_ns() - message.body["due"]) / 1e3
                heard[message.position] += 1
                first.setdefault(message.position, us)
                if heard[message.position] == count:
                    late.append((first.pop(message.position), us))

        ready = asyncio.Semaphore(0)
        following = []
        for start in range(0, count, 200):
            some = range(min(200, count - start))
            following += [asyncio.create_task(follow()) for _ in some]
            for _ in some:
                await ready.acquire()
        pipe.send("ready")
        while True:
            wanted = await pipe.receive()
            while len(late) < wanted:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.005)
            pipe.send(list(late))
            late.clear()
        await asyncio.gather(*following)


async def readers(growth: Growth) -> None:
    """publish → tail, for the first and the last of more and more readers of one channel in one process."""
    dsn = growth.report.dsn
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(pgchan.AsyncClient(dsn))
        variants = {}
        for size in growth.sizes.readers:
            channel = client.channel(f"readers/{size}")
            await channel.publish({"due": 0})
            crowd = partial(read_together, name=channel.name, count=size)
            seconds = max(0.05, size * DELIVERY_SECONDS)
            there = await stack.enter_async_context(process(crowd, dsn))
            variants[size] = partial(_read_by_all, channel, there, seconds)
        found = await growth.rounds(variants)
    curve = growth.curve("readers", "More readers of one channel in one process", "readers")
    growth.line(curve, "first reader", found["first"], at_most=2.0)
    growth.line(curve, "last reader", found["last"], at_most=None)
    last = max(growth.sizes.readers)
    figure = percentile([us for values in found["last"][last] for us in values], 99)
    growth.report.figure(f"last of {last:,} readers, p99", "µs", figure, at_most=LAST_MICROSECONDS_MAX)


async def _read_by_all(channel: pgchan.AsyncChannel, crowd: Process, seconds: float) -> dict[str, list[float]]:
    async for due in due_times(CALLS // 2, seconds):
        await channel.publish({"due": due})
    late = await crowd.ask(CALLS // 2)
    return {"first": [first for first, _ in late], "last": [last for _, last in late]}


# ------------------------------------------------------------------------------------------------ snapshots


class Turns:
    """Publishes and claims in two databases, in turns; a snapshot is old in the second of them."""

    def __init__(self, claimers: Sequence[Claimer], curves: dict[str, Curve]) -> None:
        self.claimers = claimers
        self.curves = curves
        self.count = 0

    async def take(self, seconds: float, line: str | None) -> dict[str, tuple[list[list[float]], list[list[float]]]]:
        """For so long; µs, turn by turn, beside and in the second. line: what the second is called in the curves."""
        found: dict[str, tuple[list[list[float]], list[list[float]]]] = {"publish": ([], []), "claim": ([], [])}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.count += 1
            for place, claimer in enumerate(self.claimers):
                hot = claimer.client.channel("hot")
                found["publish"][place].append(await timed(lambda: hot.publish({"token": "word"}), BURST))  # noqa: B023
                found["claim"][place].append((await claimer.calls())["claim"])
            if line is not None:
                for what, per in (("publish", BURST), ("claim", CALLS)):
                    for name, values in zip(("in another database", line), found[what], strict=True):
                        point = self.count * per, statistics.median(values[-1])
                        self.curves[what].lines.setdefault(name, []).append(point)
        return found


async def snapshot(growth: Growth) -> None:
    """Publishes to one channel, and claims, as many as go, while somebody holds an old snapshot; then without it.

    In turns with another database, for a snapshot holds back what its own database may clean up, and no other's.
    """
    report, seconds = growth.report, growth.sizes.snapshot_seconds
    async with contextlib.AsyncExitStack() as stack:
        dsns = [report.dsn, await stack.enter_async_context(another_database(report.dsn))]
        claimers = []
        for dsn in dsns:
            client = await stack.enter_async_context(pgchan.AsyncClient(dsn))
            connection = await asyncpg.connect(dsn)
            stack.push_async_callback(connection.close)
            await connection.execute(REGISTER)
            claimers.append(Claimer(client, connection))
        turns = Turns(claimers, {
            "publish": growth.curve("snapshot", "Publishes, an old snapshot open, then released", "publishes since"),
            "claim": growth.curve("snapshot_runs", "Claims, an old snapshot open, then released", "runs since"),
        })  # fmt: skip
        await turns.take(RELEASED_SECONDS, None)  # warms up
        turns.count = 0
        other = await asyncpg.connect(dsns[1])
        old = other.transaction(isolation="repeatable_read")
        await old.start()
        await other.fetchval("select count(*) from pgchan.channels")
        held = await turns.take(seconds, "snapshot open")
        many = {"publish": turns.count * BURST, "claim": turns.count * CALLS}
        await old.commit()
        await other.close()
        await turns.take(RELEASED_SECONDS, "released")
        released = await turns.take(2.0, "released")
    last = max(1, len(held["publish"][0]) // 5)
    for what in many:
        beside, hot = held[what]
        title = f"{what}, snapshot open for {seconds:g} s and {many[what]:,} of them"
        report.times(title, hot[-last:], beside[-last:], at_most={50: SNAPSHOT_RATIO_MAX})
        beside, hot = released[what]
        report.times(f"{what}, {RELEASED_SECONDS:g} s after its release", hot, beside, at_most={50: 1.2})


# ------------------------------------------------------------------------------------------------ all


def draw(curves: Sequence[Curve], directory: Path) -> None:
    """One picture per question."""
    import matplotlib  # noqa: PLC0415 - optional

    matplotlib.use("svg")
    from matplotlib import pyplot  # noqa: PLC0415 - optional, and it wants the line before

    pyplot.rcParams |= {"svg.hashsalt": "pgchan", "svg.fonttype": "none", "font.size": 9}
    directory.mkdir(parents=True, exist_ok=True)
    for curve in curves:
        figure, axes = pyplot.subplots(figsize=(5.6, 3.0), layout="constrained")
        for what, points in curve.lines.items():
            # A size of none has no place on a logarithmic axis; it is drawn as one.
            axes.plot(
                [max(1, x) for x, _ in points], [y / 1e3 for _, y in points], marker="o", markersize=3, label=what
            )
        axes.set(xscale="log", xlabel=curve.along, ylabel="ms, median", title=curve.title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(directory / f"{curve.name}.svg", metadata={"Date": None})
        pyplot.close(figure)


async def measure(report: Report) -> None:
    """All of it."""
    growth = Growth(report, FULL if report.arguments.full else Sizes())
    questions: dict[str, Callable[[], Awaitable[None]]] = {
        "length": lambda: lengths(growth),
        "channels": lambda: channels(growth),
        "sweep": lambda: sweeps(growth),
        "ended": lambda: runs(
            growth, "ended", "Runs that have ended are kept", "ended runs", growth.sizes.ended, ("succeeded", None)
        ),
        "asleep": lambda: runs(
            growth, "asleep", "Runs wait for a signal or sleep", "waiting runs", growth.sizes.asleep,
            ("waiting", None), ("scheduled", 3600.0),
        ),
        "journal": lambda: journals(growth),
        "workers": lambda: workers(growth),
        "readers": lambda: readers(growth),
        "snapshot": lambda: snapshot(growth),
    }  # fmt: skip
    for name, question in questions.items():
        if name in (report.arguments.only or questions):
            await question()
    if importlib.util.find_spec("matplotlib") is None:
        report.note("no plots: matplotlib is not installed (pip install -r benchmarks/requirements.txt)")
    elif report.arguments.plots:
        draw(growth.curves, Path(report.arguments.plots))
        report.note(f"plots are in {report.arguments.plots}")


def options(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    here = Path(__file__).resolve().parent.parent / "docs" / "growth"
    parser.add_argument("--full", action="store_true", help="up to 1,000,000 of each, 32 workers, 5,000 readers, 60 s")
    parser.add_argument("--only", nargs="+", metavar="QUESTION", help="length, channels, sweep, ended, asleep, …")
    parser.add_argument("--plots", default=str(here), metavar="DIRECTORY", help="'' draws none; default docs/growth")


if __name__ == "__main__":
    main(__doc__, measure, seconds=240, options=options, settings={"max_connections": "500"})
