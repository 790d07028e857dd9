"""What do wakeups cost the writers, and do many processes share one server well, on a fast disk and on slow ones?

Publishing processes, each of which waits for every message to be durable, beside processes that listen; against the
same append by the same clients where `pgchan.wake` has been emptied, so that nothing is announced.
Workers and clients: runs from start to result, and how evenly the workers share them.
Token streams: whether a slow fsync delays them by more than itself, or takes of their rate.

A slow disk is a library of a few lines before the server's own fsync and fdatasync, which sleeps. It is compiled here,
so without a C compiler, and on a server of $PGCHAN_DSN, only the disk as it is is measured.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg

import pgchan
from pgchan.benchmarks._common import Pipe, Process, Report, interleave, main, percentile
from pgchan.benchmarks.steps import working
from pgchan.benchmarks.tokens import (
    CHANNELS,
    Pair,
    Stretch,
    flood,
    make_floor,
    read_floor,
    read_ours,
    say_floor,
    say_ours,
)
from pgchan.wakeups import LISTEN_NAMES

PUBLISHERS = (1, 8, 32)
LISTENERS = (0, 1, 100)
SLOW_MS = (1, 5)
SECONDS = 0.4  # of one variant in one round
AT_LEAST = 0.9  # of the rate without wakeups
WORKERS = (1, 2, 4)
CLIENTS = 4
RUNS = 8  # that a client has under way at a time
CONCURRENCY = 10  # of a worker
WORKING_SECONDS = 0.8
UNEVEN_MAX = 2.0  # runs of the busiest worker, by those of the least busy one
RATE = 10_000  # tokens a second
STREAM_SECONDS = 1.0
STREAM_P99_MAX = 2.0  # of the floor's on the same disk
FLOOD_SECONDS = 0.6

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
static volatile unsigned *delay; /* microseconds, in a file that the benchmark writes */
__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("PGCHAN_BENCH_DELAY");
  int file = path ? open(path, O_RDONLY) : -1;
  void *found = file < 0 ? MAP_FAILED : mmap(0, sizeof *delay, PROT_READ, MAP_SHARED, file, 0);
  if (found != MAP_FAILED) delay = found;
}
static void wait(void) {
  struct timespec until;
  if (!delay || !*delay) return;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += *delay * 1000L;
  until.tv_sec += until.tv_nsec / 1000000000L;
  until.tv_nsec %= 1000000000L;
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR) { }
}
int fsync(int file) {
  wait();
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
int fdatasync(int file) {
  wait();
  return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file);
}
"""
WAKE = "pgchan.wake(bigint[], bigint[], boolean, text[])"
SILENT = """
create or replace function
  pgchan.wake(ids bigint[], heads bigint[], created boolean default false, queues text[] default null)
returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$ begin end $$
"""


class Disk:
    """The server's disk, which can be slowed. delays: what it can be asked for, in ms; 0 is as it is."""

    def __init__(self, delay: Path | None) -> None:
        self._delay = delay
        self.delays = (0, *SLOW_MS) if delay is not None else (0,)

    def slow(self, milliseconds: int) -> None:
        """From now on each fsync takes so much longer."""
        if self._delay is not None:
            with self._delay.open("r+b") as file:  # in its place: the server has it in memory
                file.write((milliseconds * 1000).to_bytes(4, "little"))


@contextlib.contextmanager
def slowable() -> Iterator[Disk]:
    """Servers that are started within have a disk that can be slowed, if there is a compiler and they are ours."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.environ.get("PGCHAN_DSN"):
        yield Disk(None)
        return
    home = Path(tempfile.mkdtemp(prefix="pgchan-disk-"))
    try:
        home.chmod(0o755)  # the server does not run as root
        (home / "slow.c").write_text(SHIM)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", home / "slow.so", home / "slow.c", "-ldl"], check=True
        )
        disk = Disk(home / "delay")
        (home / "delay").write_bytes(bytes(4))
        os.environ["PGCHAN_BENCH_DELAY"] = str(home / "delay")
        os.environ["LD_PRELOAD"] = str(home / "slow.so")
        yield disk
    finally:
        os.environ.pop("LD_PRELOAD", None)
        shutil.rmtree(home, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ wakeups


async def publish(pipe: Pipe, dsn: str, number: int) -> None:
    """A publishing process: one message after the other, on a channel of its own."""
    async with pgchan.AsyncClient(dsn, name="publisher") as client:
        channel = client.channel(f"notify/{number}")
        await channel.publish(number)
        pipe.send("ready")
        while True:
            begin, end = await pipe.receive()
            await asyncio.sleep(begin - time.monotonic())
            count = 0
            while time.monotonic() < end:
                await channel.publish(number)
                count += 1
            pipe.send(count)


async def listen(pipe: Pipe, dsn: str) -> None:
    """The listeners: sessions that LISTEN to all of pgchan's names. What they hear is read and thrown away."""
    loop = asyncio.get_running_loop()
    sessions: list[psycopg.Connection[Any]] = []
    while True:
        count = await pipe.receive()
        for session in sessions:
            loop.remove_reader(session.fileno())
            session.close()
        sessions = [psycopg.connect(dsn, autocommit=True) for _ in range(count)]
        for session in sessions:
            for name in LISTEN_NAMES:
                session.execute(f"listen {name}".encode())
            loop.add_reader(session.fileno(), os.read, session.fileno(), 1 << 20)
        pipe.send("listening")


async def wakeups(report: Report, disk: Disk) -> None:
    """Publishing with and without wakeups."""
    publishers = [Process(publish, report.dsn, number) for number in range(max(PUBLISHERS))]
    for publisher in publishers:
        await publisher.answer()
    listeners = Process(listen, report.dsn)
    admin = await asyncpg.connect(report.dsn)
    telling = await admin.fetchval("select pg_get_functiondef($1::text::regprocedure)", WAKE)

    async def rate(count: int, delay: int, wake: str) -> float:
        disk.slow(0)
        await admin.execute(wake)
        disk.slow(delay)
        begin = time.monotonic() + 0.02
        for publisher in publishers[:count]:
            publisher.pipe.send((begin, begin + SECONDS))
        return float(sum([await publisher.answer() for publisher in publishers[:count]]) / SECONDS)

    for listening in LISTENERS:
        await listeners.ask(listening)
        cells = [(count, delay) for count in PUBLISHERS for delay in disk.delays if delay < 5 or count != 8]
        found = await interleave(
            _rounds(report),
            **{
                f"{word}{count}/{delay}": lambda count=count, delay=delay, wake=wake: rate(count, delay, wake)
                for count, delay in cells for word, wake in (("told", telling), ("silent", SILENT))
            },
        )  # fmt: skip
        for count, delay in cells:
            name = f"publishes by {count} processes, {listening} listeners{_disk(delay)}, against no wakeups"
            told, silent = found[f"told{count}/{delay}"], found[f"silent{count}/{delay}"]
            report.rates(name, "/s", told, silent, at_least=AT_LEAST)
    disk.slow(0)
    await admin.execute(telling)
    await admin.close()
    for process in (*publishers, listeners):
        process.kill()


# ------------------------------------------------------------------------------------------------ workers


@pgchan.workflow
async def who(run: pgchan.Run) -> int:
    """A run of one step: which process executes it."""
    return await run.step(own_pid)


async def own_pid() -> int:
    """The step."""
    return os.getpid()


async def work(pipe: Pipe, dsn: str, queues: list[str]) -> None:
    """A worker process, for these queues."""
    async with pgchan.AsyncClient(dsn, name="worker") as client:
        worker = pgchan.Worker(client, [who], queues=queues, concurrency=CONCURRENCY)
        running = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        pipe.send("ready")
        await running


async def ask(pipe: Pipe, dsn: str) -> None:
    """A client process: starts runs, and waits for their results."""
    async with pgchan.AsyncClient(dsn, name="client") as client:
        pipe.send("ready")
        while True:
            begin, end, queue = await pipe.receive()
            counts: collections.Counter[int] = collections.Counter()

            async def loop(end: float = end, queue: str = queue, counts: Any = counts) -> None:
                while time.monotonic() < end:
                    counts[await (await client.start(who, queue=queue)).result(timeout=20)] += 1

            await asyncio.sleep(begin - time.monotonic())
            await asyncio.gather(*(loop() for _ in range(RUNS)))
            pipe.send(counts)


async def workers(report: Report, disk: Disk) -> None:
    """Runs by several clients, executed by one worker and by several; a queue for each number of workers."""
    executing = [
        Process(work, report.dsn, [f"of-{count}" for count in WORKERS if number < count])
        for number in range(max(WORKERS))
    ]
    clients = [Process(ask, report.dsn) for _ in range(CLIENTS)]
    for process in (*executing, *clients):
        await process.answer()

    async def runs(count: int, delay: int) -> list[int]:
        disk.slow(delay)
        begin = time.monotonic() + 0.02
        for client in clients:
            client.pipe.send((begin, begin + WORKING_SECONDS, f"of-{count}"))
        counts: collections.Counter[int] = collections.Counter()
        for client in clients:
            counts.update(await client.answer())
        return [counts[worker.pid] for worker in executing[:count]]

    delays = disk.delays[::2]
    found = await interleave(
        _rounds(report),
        **{f"{c}/{d}": lambda c=c, d=d: runs(c, d) for c in WORKERS for d in delays},
    )  # fmt: skip
    disk.slow(0)
    for process in (*clients, *executing):
        process.kill()
    for delay in delays:
        alone = [sum(counts) / WORKING_SECONDS for counts in found[f"1/{delay}"]]
        for count in WORKERS[1:]:
            name = f"runs of {CLIENTS} clients, {count} workers{_disk(delay)}"
            shares = found[f"{count}/{delay}"]
            report.rates(f"{name}, against 1", "/s", [sum(counts) / WORKING_SECONDS for counts in shares], alone)
            uneven = statistics.median(max(counts) / max(1, min(counts)) for counts in shares)
            report.figure(f"{name}: the busiest has, of the least busy", "times", uneven, at_most=UNEVEN_MAX)


# ------------------------------------------------------------------------------------------------ token streams


async def streams(report: Report, disk: Disk) -> None:
    """Token streams, on each disk."""
    await make_floor(report.dsn)
    pairs = {"ours": Pair(say_ours, read_ours, report.dsn), "floor": Pair(say_floor, read_floor, report.dsn)}
    for pair in pairs.values():
        await pair.ready()

    async def stretch(pair: Pair, delay: int) -> Stretch:
        disk.slow(delay)
        return await pair.stretch(RATE, STREAM_SECONDS)

    found = await interleave(
        _rounds(report),
        **{f"{n}{d}": lambda pair=pair, d=d: stretch(pair, d) for n, pair in pairs.items() for d in disk.delays},
    )  # fmt: skip
    disk.slow(0)
    for pair in pairs.values():
        await pair.end()
    for delay in disk.delays:
        ours, floor = found[f"ours{delay}"], found[f"floor{delay}"]
        name = f"{RATE:,} tokens/s, {CHANNELS:,} channels{_disk(delay)}"
        for q, most in ((50, None), (99, STREAM_P99_MAX)):
            both = [statistics.median(percentile(s.late, q) for s in some) / 1e3 for some in (ours, floor)]
            report.figure(f"{name}: due → delivered, p{q}", "ms", both[0], floor=both[1], ratio_at_most=most)
        kept = [s.kept for s in ours], [s.kept for s in floor]
        report.rates(f"{name}: of the rate, delivered in time", "", *kept, at_least=0.95)

    async with pgchan.AsyncClient(report.dsn) as client, working(client, 10, flood):

        async def flooded(delay: int) -> float:
            disk.slow(delay)
            begun = time.monotonic()
            count = await (await client.start(flood, FLOOD_SECONDS)).result(timeout=30)
            return float(count / (time.monotonic() - begun))

        rates = await interleave(_rounds(report), **{f"{d}": lambda d=d: flooded(d) for d in disk.delays})
        disk.slow(0)
    for delay in disk.delays[1:]:
        name = f"saturated publish(wait=False), one run{_disk(delay)}, against the disk as it is"
        report.rates(name, "/s", rates[f"{delay}"], rates["0"], at_least=0.5)


def _disk(delay: int) -> str:
    return f", fsync + {delay} ms" if delay else ""


def _rounds(report: Report) -> int:
    return int(max(1, report.arguments.rounds // 2))


async def verify(report: Report, disk: Disk) -> None:
    """See that a slowed disk is slow; leave it out where it is not, and say so."""
    if len(disk.delays) == 1:
        report.note("no slowed fsync: it takes a C compiler, and a server that is started here")
        return
    connection = await asyncpg.connect(report.dsn)
    disk.slow(SLOW_MS[-1])
    began = time.monotonic()
    await connection.execute("create table floor.slow ()")
    took = time.monotonic() - began
    disk.slow(0)
    await connection.close()
    if took < SLOW_MS[-1] / 1e3:
        disk.delays = (0,)
        report.note("no slowed fsync: this server did not call the library that was loaded before its own")


if __name__ == "__main__":
    with slowable() as found_disk:

        async def measure(report: Report) -> None:
            """All of it."""
            await verify(report, found_disk)
            await wakeups(report, found_disk)
            await workers(report, found_disk)
            await streams(report, found_disk)

        main(__doc__, measure, seconds=150, settings={"max_connections": "300"})
