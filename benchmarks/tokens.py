"""What do token streams cost, and how late is a token, with a thousand runs that speak at the same time?

One process executes a thousand runs. Each has a step that says a token whenever one is due, by publish(wait=False), as
a model's client would; another process reads all of their channels through `tail`. The tokens are due by this process's
clock, one millisecond's worth at a time, whether the publisher keeps up or not (an open loop), and latency counts from
there. The floor: a list of what is due, written by hand in one statement whenever the last one is acknowledged, and
another process that reads back what was announced.

Saturated: as much as one process gets acknowledged, against raw `unnest` of 1,000 rows with the same columns and
indexes, which has no channels, positions, keys or wakeups. And what publish(wait=False) costs its caller.

Long, because there are four processes, two of them written by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg

import pgchan
from pgchan.benchmarks._common import Pipe, Process, Report, cpu_seconds, due_times, interleave, main, percentile
from pgchan.benchmarks.steps import working

CHANNELS = 1_000
RATES = (1_000, 10_000, 50_000)
SECONDS = 2.0  # of one rate in one round
TICK_SECONDS = 0.001  # what is due within it is due at its end
LATE_MS_MAX = {10_000: {99: 3.0}, 50_000: {50: 3.0, 99: 10.0}}  # percentiles, by rate
CORE_MAX = {50_000: {"publisher": 50.0, "reader": 30.0}}  # % of a core, by rate
FLOOR_IDS = 1_000_000  # of the floor's channels, and above
SOME = 50  # that are begun at a time
ROWS = 1_000  # of a raw insert, and of one publish_many
SATURATED_SECONDS = 0.6
SATURATED_AT_LEAST = 0.4
COST_TOKENS = 2_000
JOIN_SECONDS = 0.01
COST_MICROSECONDS_MAX = {"mean": 10.0, "p99": 50.0}
END = 0  # due when a run is to end
PAD = "x" * 78  # with 20 digits and two quotes: 100 bytes

FLOOR_SCHEMA = """
create function floor.append_all(channels bigint[], counts integer[], slots integer[], nths integer[], bodies bytea[])
returns void language plpgsql as $$
declare
  heads bigint[];
begin
  with given as (select * from unnest(channels, counts) with ordinality g (id, n, slot)),
       moved as (update floor.channels c set head = c.head + g.n from given g where c.id = g.id
                 returning c.id, c.head, g.slot)
  select array_agg(m.head order by m.slot) into heads from moved m;
  insert into floor.messages (channel_id, "position", at, kind, body)
    select channels[e.slot], heads[e.slot] - counts[e.slot] + e.nth, clock_timestamp(), 0, e.body
    from unnest(slots, nths, bodies) e (slot, nth, body);
  perform pg_notify('floor_all', string_agg(a.id || ':' || a.head, ','))
    from unnest(channels, heads) with ordinality a (id, head, n) group by a.n / 300;
end $$;
"""
FLOOR_APPEND_ALL = "select floor.append_all($1::bigint[], $2::integer[], $3::integer[], $4::integer[], $5::bytea[])"
FLOOR_READ_ALL = """
select m.channel_id, m."position", m.body
from unnest($1::bigint[], $2::bigint[]) f (id, after) join floor.messages m
  on m.channel_id = f.id and m."position" > f.after
order by m.channel_id, m."position"
"""
FLOOR_ROWS = """
insert into floor.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
select e.id, e.place, clock_timestamp(), 0, null, null, null, null, e.body
from unnest($1::bigint[], $2::bigint[], $3::bytea[]) e (id, place, body)
"""
STORED = """
select count(*) from pgchan.channels c join pgchan.messages m on m.channel_id = c.id
where c.name like 'tokens/%' and m.kind = 0
"""
BACKENDS = """
select array_agg(pid) from pg_stat_activity
where datname = current_database() and backend_type = 'client backend'
"""


# ------------------------------------------------------------------------------------------------ the two processes


class Speaker:
    """A step that is told when a token of its is due."""

    everybody: dict[int, Speaker]

    def __init__(self) -> None:
        self.due: list[int] = []
        self.wake: asyncio.Future[None] | None = None

    def tell(self, due: int) -> None:
        """A token is due."""
        self.due.append(due)
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


async def speak(run: pgchan.Run, number: int) -> None:
    """The step: say what is due, until END is."""
    speaker = Speaker.everybody[number] = Speaker()
    while True:
        due, speaker.due = speaker.due, []
        for moment in due:
            if moment == END:
                return
            await run.publish(token(moment), wait=False)
        if not speaker.due:
            speaker.wake = asyncio.get_running_loop().create_future()
            await speaker.wake


def token(due: int) -> str:
    """100 bytes as JSON that say when it was due."""
    return f"{due:020d}{PAD}"


@pgchan.workflow
async def stream(run: pgchan.Run, number: int) -> None:
    """A run that speaks."""
    await run.step(speak, run, number)


async def say_ours(pipe: Pipe, dsn: str, channels: int) -> None:
    """The publishing process: a worker with all of these runs. Answers how many entries were acknowledged."""
    Speaker.everybody = {}
    async with pgchan.AsyncClient(dsn, name="publisher") as client:
        worker = pgchan.Worker(client, [stream], concurrency=channels, queues=["tokens"])
        running = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        for number in range(0, channels, SOME):
            some = range(number, min(number + SOME, channels))
            await asyncio.gather(*(client.start(stream, n, id=f"tokens/{n}", queue="tokens") for n in some))
        while len(Speaker.everybody) < channels:  # noqa: ASYNC110 - before what is measured
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # each step is recorded as started after a moment
        pipe.send("ready")
        turns = itertools.cycle([Speaker.everybody[number].tell for number in range(channels)])
        while (order := await pipe.receive()) != "end":
            if order == "acknowledged":
                pipe.send(client.stats["entries"])
                continue
            due, count = order
            for tell in itertools.islice(turns, count):
                tell(due)
        for speaker in Speaker.everybody.values():
            speaker.tell(END)
        while worker.running:  # noqa: ASYNC110 - after what is measured
            await asyncio.sleep(0.01)
        worker.stop()
        await running
        pipe.send("ended")


async def read_ours(pipe: Pipe, dsn: str, channels: int) -> None:
    """The reading process: a tail of each channel."""
    late: list[int] = []
    async with pgchan.AsyncClient(dsn, name="reader") as client:

        async def read(tail: pgchan.AsyncTail) -> None:
            async for page in tail.pages():
                now = time.monotonic_ns()
                late.extend([now - int(message.raw[1:21]) for message in page if message.kind == "message"])

        tails = [client.channel(f"tokens/{number}").tail(after="now") for number in range(channels)]
        for number in range(0, channels, SOME):  # each has to know where "now" is
            await asyncio.gather(*(tail.next_page(0.01) for tail in tails[number : number + SOME]))
        await asyncio.gather(answer(pipe, late), *(read(tail) for tail in tails))


async def say_floor(pipe: Pipe, dsn: str, channels: int) -> None:
    """The publishing process, by hand: what is due goes into one statement when the last one is acknowledged."""
    connection = await asyncpg.connect(dsn)
    turns = itertools.cycle(range(FLOOR_IDS, FLOOR_IDS + channels))
    waiting: list[tuple[int, bytes]] = []
    soon = asyncio.Event()
    acknowledged = 0

    async def pump() -> None:
        nonlocal acknowledged
        while True:
            await soon.wait()
            soon.clear()
            while waiting:
                batch, waiting[:] = waiting[:ROWS], waiting[ROWS:]
                slots: dict[int, int] = {}
                counts: list[int] = []
                places, nths = [], []
                for id, _ in batch:
                    slot = slots.setdefault(id, len(slots))
                    if slot == len(counts):
                        counts.append(0)
                    counts[slot] += 1
                    places.append(slot + 1)
                    nths.append(counts[slot])
                await connection.execute(FLOOR_APPEND_ALL, list(slots), counts, places, nths, [b for _, b in batch])
                acknowledged += len(batch)

    pumping = asyncio.create_task(pump())
    pipe.send("ready")
    while (order := await pipe.receive()) != "end":
        if order == "acknowledged":
            pipe.send(acknowledged)
            continue
        due, count = order
        waiting.extend([(id, f'"{token(due)}"'.encode()) for id in itertools.islice(turns, count)])
        soon.set()
    pumping.cancel()
    pipe.send("ended")


async def read_floor(pipe: Pipe, dsn: str, channels: int) -> None:
    """The reading process, by hand: one statement reads all that was announced."""
    late: list[int] = []
    heads = {FLOOR_IDS + number: 0 for number in range(channels)}
    dirty: set[int] = set()
    heard = asyncio.Event()
    connection = await asyncpg.connect(dsn)

    def hear(_connection: Any, _pid: int, _name: str, payload: Any) -> None:
        dirty.update(int(hint.partition(":")[0]) for hint in payload.split(","))
        heard.set()

    async def read() -> None:
        while True:
            await heard.wait()
            heard.clear()
            ids = list(dirty)
            dirty.clear()
            rows = await connection.fetch(FLOOR_READ_ALL, ids, [heads[id] for id in ids])
            now = time.monotonic_ns()
            for id, position, body in rows:
                heads[id] = position
                late.append(now - int(body[1:21]))

    await connection.add_listener("floor_all", hear)
    reading = asyncio.create_task(read())
    await asyncio.gather(answer(pipe, late), reading)


async def answer(pipe: Pipe, late: list[int]) -> None:
    """Whenever asked for that many latencies: when they are there, and never more."""
    pipe.send("ready")
    while True:
        count = await pipe.receive()
        while len(late) < count:  # noqa: ASYNC110 - an event would have to be set in the path that is measured
            await asyncio.sleep(0.005)
        pipe.send(list(late))
        late.clear()


# ------------------------------------------------------------------------------------------------ a stretch of time


@dataclass(slots=True)
class Stretch:
    """What became of the tokens of some seconds. late: µs of each. cores: by process, what the rate takes of a core, in
    per cent; more than 100 where it cannot be kept. kept: the rate of delivery, of the rate at which they were due."""

    late: list[float]
    offered: int
    acknowledged: int
    kept: float
    cores: dict[str, float]


class Pair:
    """A publishing and a reading process."""

    def __init__(self, say: Any, read: Any, dsn: str) -> None:
        self._dsn = dsn
        self.publisher = Process(say, dsn, CHANNELS)
        self._read = (read, dsn, CHANNELS)

    async def ready(self) -> None:
        """The reader begins when there is something to read."""
        await self.publisher.answer()
        self.reader = Process(*self._read)
        await self.reader.answer()

    async def stretch(self, rate: int, seconds: float) -> Stretch:
        """Let so many tokens a second be said and read, for so long."""
        pids = {"publisher": [self.publisher.pid], "reader": [self.reader.pid]}
        if not os.environ.get("PGCHAN_DSN"):
            pids["server"] = await _backends(self._dsn)
        before = await self.publisher.ask("acknowledged")
        used = {name: cpu_seconds(*some) for name, some in pids.items()}
        per_tick, ticks = max(1, round(rate * TICK_SECONDS)), math.ceil(seconds / TICK_SECONDS)
        began = time.monotonic()
        async for due in due_times(ticks, TICK_SECONDS):
            self.publisher.pipe.send((due, per_tick))
        late = await self.reader.ask(offered := per_tick * ticks)
        took = time.monotonic() - began
        cores = {name: 100 * (cpu_seconds(*some) - used[name]) / seconds for name, some in pids.items()}
        acknowledged = await self.publisher.ask("acknowledged") - before
        return Stretch([value / 1e3 for value in late], offered, acknowledged, min(1.0, seconds / took), cores)

    async def end(self) -> None:
        """Let the runs end, so that no other worker takes them over, and end both processes."""
        await self.publisher.ask("end")
        self.publisher.kill()
        self.reader.kill()


async def _backends(dsn: str) -> list[int]:
    connection = await asyncpg.connect(dsn)
    try:
        return [pid for pid in await connection.fetchval(BACKENDS) if pid != connection.get_server_pid()]
    finally:
        await connection.close()


async def make_floor(dsn: str) -> None:
    """The floor's routine, and its channels."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(FLOOR_SCHEMA)
    await connection.execute(
        "insert into floor.channels (id) select g from generate_series($1::bigint, $2::bigint) g",
        FLOOR_IDS, FLOOR_IDS + CHANNELS - 1,
    )  # fmt: skip
    await connection.close()


# ------------------------------------------------------------------------------------------------ the questions


async def streams(report: Report) -> None:
    """Tokens at a given rate, over a thousand channels."""
    rates, seconds = report.arguments.rate or RATES, report.arguments.seconds
    await make_floor(report.dsn)
    ours = Pair(say_ours, read_ours, report.dsn)
    floor = Pair(say_floor, read_floor, report.dsn)
    await ours.ready()
    await floor.ready()
    variants = {
        f"{name}{rate}": lambda pair=pair, rate=rate: pair.stretch(rate, seconds)
        for rate in rates for name, pair in (("ours", ours), ("floor", floor))
    }  # fmt: skip
    found: dict[str, list[Stretch]] = await interleave(_rounds(report), **variants)
    connection = await asyncpg.connect(report.dsn)
    stored = await connection.fetchval(STORED)
    await connection.close()
    await ours.end()
    await floor.end()
    for rate in rates:
        _report(report, rate, found[f"ours{rate}"], found[f"floor{rate}"])
    offered = sum(s.offered for rate in rates for s in found[f"ours{rate}"])
    report.note(f"{stored:,} tokens are stored, warming up included; {offered:,} of them were measured")


def _report(report: Report, rate: int, ours: list[Stretch], floor: list[Stretch]) -> None:
    name = f"{rate:,} tokens/s, {CHANNELS:,} channels"
    for q in (50, 99):
        report.figure(
            f"{name}: due → delivered, p{q}", "ms",
            statistics.median(percentile(s.late, q) for s in ours) / 1e3,
            floor=statistics.median(percentile(s.late, q) for s in floor) / 1e3,
            at_most=LATE_MS_MAX.get(rate, {}).get(q),
        )  # fmt: skip
    for process in ours[0].cores:
        report.figure(
            f"{name}: {process}", "% of a core", statistics.median(s.cores[process] for s in ours),
            floor=statistics.median(s.cores[process] for s in floor), at_most=CORE_MAX.get(rate, {}).get(process),
        )  # fmt: skip
    missing = sum(abs(s.offered - s.acknowledged) + abs(s.offered - len(s.late)) for s in ours)
    report.figure(f"{name}: not acknowledged, not delivered, or twice", "tokens", missing, at_most=0)
    report.rates(
        f"{name}: of the rate, delivered in time", "", [s.kept for s in ours], [s.kept for s in floor], at_least=0.95
    )


async def saturated(report: Report) -> None:
    """As much as one process gets acknowledged."""
    connection = await asyncpg.connect(report.dsn)
    body, raw = token(0), f'"{token(0)}"'.encode()
    places = itertools.count(1, ROWS)

    async def by_hand() -> float:
        async def insert() -> int:
            first = next(places)
            await connection.execute(FLOOR_ROWS, [7] * ROWS, list(range(first, first + ROWS)), [raw] * ROWS)
            return ROWS

        return await _rate(insert)

    async with pgchan.AsyncClient(report.dsn) as client, working(client, 10, flood):
        channels = [client.channel(f"saturated/{number}") for number in range(ROWS)]

        async def many() -> float:
            async def publish() -> int:
                return len(await channels[0].publish_many([body] * ROWS))

            return await _rate(publish)

        async def single() -> float:
            begun = time.monotonic()
            # Two for each channel, so that there is a batch to be made while one is on its way.
            tasks = (_until(begun + SATURATED_SECONDS, channel.publish, body) for channel in channels * 2)
            counts = await asyncio.gather(*tasks)
            return sum(counts) / (time.monotonic() - begun)

        async def deferred() -> float:
            begun = time.monotonic()
            count = await (await client.start(flood, SATURATED_SECONDS)).result(timeout=30)
            return float(count / (time.monotonic() - begun))

        found = await interleave(_rounds(report), floor=by_hand, many=many, single=single, deferred=deferred)
    await connection.close()
    for variant, name in (
        ("many", f"publish_many, {ROWS:,} bodies, one channel"),
        ("single", f"publish, {2 * ROWS:,} tasks, {ROWS:,} channels"),
        ("deferred", "publish(wait=False), one run, with its result"),
    ):
        report.rates(
            f"saturated {name}: against raw unnest", "/s", found[variant], found["floor"], at_least=SATURATED_AT_LEAST
        )


async def _rate(act: Callable[[], Awaitable[int]]) -> float:
    begun, done = time.monotonic(), 0
    while time.monotonic() < begun + SATURATED_SECONDS:
        done += await act()
    return done / (time.monotonic() - begun)


async def _until(end: float, publish: Any, body: str) -> int:
    count = 0
    while time.monotonic() < end:
        await publish(body)
        count += 1
    return count


async def cost(report: Report) -> None:
    """What publish(wait=False) costs its caller."""
    async with pgchan.AsyncClient(report.dsn) as client, working(client, 10, talk):
        for how, join in (("wait=False", None), (f"wait=False, join={JOIN_SECONDS}", JOIN_SECONDS)):
            rounds = [await (await client.start(talk, join)).result(timeout=60) for _ in range(3)][1:]
            costs = [value for values in rounds for value in values]
            name = f"publish({how}), cost to the caller"
            report.figure(f"{name}, mean", "µs", statistics.mean(costs), at_most=COST_MICROSECONDS_MAX["mean"])
            report.figure(f"{name}, p99", "µs", percentile(costs, 99), at_most=COST_MICROSECONDS_MAX["p99"])


@pgchan.workflow
async def flood(run: pgchan.Run, seconds: float) -> int:
    """As many tokens as it can say in this time; how many."""
    return await run.step(say_all, run, seconds)


async def say_all(run: pgchan.Run, seconds: float) -> int:
    """The step. It has ended when all of them are durable."""
    end, count, body = time.monotonic() + seconds, 0, token(0)
    while time.monotonic() < end:
        for _ in range(20):  # as many as a model's client may find in what it has received
            await run.publish(body, wait=False)
        count += 20
        await asyncio.sleep(0)
    return count


@pgchan.workflow
async def talk(run: pgchan.Run, join: float | None = None) -> list[float]:
    """What each of many tokens costs its caller, in µs."""
    return await run.step(say_some, run, join)


async def say_some(run: pgchan.Run, join: float | None) -> list[float]:
    """The step, which lets the event loop go on after every tenth."""
    costs = []
    for number in range(COST_TOKENS):
        body = {"token": f"word{number}"} if join is None else f"word{number}"  # only text is joined
        began = time.perf_counter()
        await run.publish(body, wait=False, join=join)
        costs.append((time.perf_counter() - began) * 1e6)
        if number % 10 == 9:
            await asyncio.sleep(0.001)
    return costs


def _rounds(report: Report) -> int:
    return int(max(1, report.arguments.rounds // 2))


async def measure(report: Report) -> None:
    """All of it."""
    await streams(report)
    await saturated(report)
    await cost(report)


def options(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("--rate", type=int, action="append", metavar="N", help="tokens a second; may be given again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each rate in each round")


if __name__ == "__main__":
    main(__doc__, measure, seconds=75, options=options)
