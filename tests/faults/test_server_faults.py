"""A server crashes, fills up, has no free connection, or its clock jumps: nothing acknowledged is lost or done twice.

A server that is restarted as a whole: test_outages.py, test_takeover.py. Standbys: test_failovers.py.

Long, because each fault is a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from clocks import Clock
from cluster import SMALL_QUEUE, Cluster, full_queue
from disks import Disk
from doors import Door, Reading, query
from storm import Storm, bodies
from workers import Processes, Workers

import pgchan
from pgchan import doctor, errors, migrate

WaitUntil = Callable[..., Awaitable[None]]


@pytest.fixture(params=["async", "blocking"])
async def own(request: pytest.FixtureRequest, server: Cluster) -> AsyncIterator[Door]:
    """A door on a server of this test's own."""
    door = Door(request.param, server.dsn)
    yield door
    await door.close()


@pytest.fixture
def processes(server: Cluster) -> Iterator[Processes]:
    processes = Processes(server.dsn)
    yield processes
    processes.close()


def kill_a_backend(dsn: str) -> float:
    """SIGKILL for one backend: the server ends all others and recovers. Returns when it accepts; the time."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while True:
            try:
                connection.execute("select 1")
            except psycopg.OperationalError:
                break
            assert time.monotonic() < until
    while True:
        try:
            query(dsn, "select 1")
        except psycopg.OperationalError:
            assert time.monotonic() < until
        else:
            return time.monotonic()


async def said(client: pgchan.AsyncClient, run: str, view: str = "raw") -> list[Any]:
    return [m.body for m in await client.channel(run).read(view=view, limit=1000) if m.kind == "message"]


# ------------------------------------------------------------------------------------------------ crashes


async def test_the_death_of_a_backend_loses_nothing_that_was_acknowledged(
    own: Door, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    query(own.dsn, "alter database postgres set synchronous_commit = off")
    client = own.client()
    reader = reading(client.channel("storm").tail())
    storm = Storm(client, "storm")
    took = []
    for _ in range(3):
        reached = len(storm.acknowledged) + 30
        await wait_until(lambda reached=reached: len(storm.acknowledged) >= reached)
        accepts = await asyncio.to_thread(kill_a_backend, own.dsn)
        reached = len(storm.acknowledged) + 1
        await wait_until(lambda reached=reached: len(storm.acknowledged) >= reached)
        took.append(time.monotonic() - accepts)
    await storm.stop()
    stored = bodies(own.dsn, "storm")
    await reader.has(len(stored))
    storm.check(stored, reader)
    assert not storm.not_done
    print("server accepts to acknowledgement: " + ", ".join(f"{seconds:.3f} s" for seconds in took))
    assert sorted(took)[1] < 3


async def test_the_death_of_a_backend_costs_no_step(server: Cluster, processes: Processes) -> None:
    async with pgchan.AsyncClient(server.dsn) as client:
        both = [processes.begin(name, lease=10.0, takeover_grace=5.0, concurrency=2) for name in ("a", "b")]
        await asyncio.gather(*(process.tells("started", seconds=30) for process in both))
        handles = [await client.start("talk") for _ in range(4)]
        await asyncio.gather(*(process.tells("gate", "speak", times=2) for process in both))
        await asyncio.to_thread(kill_a_backend, server.dsn)
        for process in both:
            process.open("speak")
        assert [await handle.result(20) for handle in handles] == [3] * 4
        assert [(await handle.status()).attempt for handle in handles] == [1] * 4
        assert [await said(client, handle.id) for handle in handles] == [["a", "b", "c"]] * 4
        assert sum(len(process.told("executed")) for process in both) == 12


async def test_who_stays_away_beyond_the_grace_of_a_restart_is_taken_over(
    server: Cluster, processes: Processes, wait_until: WaitUntil
) -> None:
    async with pgchan.AsyncClient(server.dsn) as client:
        first = await processes.start("first", lease=10.0, takeover_grace=1.0)
        handle = await client.start("talk")
        await first.tells("gate", "speak")
        second = await processes.start("second", lease=10.0, takeover_grace=1.0)
        first.send(signal.SIGSTOP)
        await asyncio.to_thread(server.restart, "immediate")
        back = time.monotonic()
        assert await second.tells("gate", "speak") - back >= 1.0 - 0.5  # the grace begins with the first look
        second.open("speak")
        assert await handle.result(20) == 3
        first.open("speak")
        first.send(signal.SIGCONT)
        (old,) = [event[2] for event in first.told("started")]
        await wait_until(lambda: len(ids := workers_of(server.dsn)) == 2 and old not in ids)
        assert await said(client, handle.id, "final") == ["a", "b", "c"]
        assert [m.key for m in await handle.journal()] == ["before", "speak", "after"]
        assert (await handle.status()).attempt == 2
        assert first.told("executed", handle.id, "after") == []


def workers_of(dsn: str) -> list[int]:
    return [row[0] for row in query(dsn, "select id from pgchan.workers")]


async def test_an_outage_that_is_longer_than_the_lease_repeats_steps_and_doubles_nothing(
    server: Cluster, processes: Processes
) -> None:
    async with pgchan.AsyncClient(server.dsn, timeout=60) as client:
        both = [processes.begin(name, lease=2.0, takeover_grace=0.3, concurrency=2) for name in ("a", "b")]
        await asyncio.gather(*(process.tells("started", seconds=30) for process in both))
        handles = [await client.start("talk") for _ in range(4)]
        await asyncio.gather(*(process.tells("gate", "speak", times=2) for process in both))
        await asyncio.to_thread(server.stop, "immediate")
        await asyncio.sleep(3.0)  # what is tested: an outage of more than the lease
        await asyncio.to_thread(server.start)
        for process in both:
            process.open("speak")
        assert [await handle.result(30) for handle in handles] == [3] * 4
        assert [await said(client, handle.id, "final") for handle in handles] == [["a", "b", "c"]] * 4
        for handle in handles:
            assert [m.key for m in await handle.journal()] == ["before", "speak", "after"]
            assert sum(len(process.told("executed", handle.id, "before")) for process in both) == 1  # it was recorded


# ------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def disks() -> Iterator[tuple[Disk, Disk]]:
    """Two small disks, for the data and for the WAL of a server."""
    with Disk(160) as data, Disk(80) as wal:
        yield data, wal


@pytest.fixture
def small(disks: tuple[Disk, Disk]) -> Iterator[Cluster]:
    """A server on these disks, where each append may need another block."""
    data, wal = disks
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "checkpoint_timeout": "30s"}
    cluster = Cluster(settings, tcp=True, data=data.directory, wal=wal.directory)
    try:
        cluster.start()
        migrate.upgrade(cluster.dsn)
        yield cluster
    finally:
        cluster.remove()


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_a_full_disk_is_unavailable_until_there_is_room(
    small: Cluster, disks: tuple[Disk, Disk], kind: str
) -> None:
    door = Door(kind, small.dsn)
    client = door.client(timeout=1.0)
    channel = client.channel("c")
    await channel.publish("first")
    disks[0].fill(leave=6)
    acknowledged, refused = [1], None
    for _ in range(2000):  # bodies that do not compress
        try:
            acknowledged.append((await channel.publish(os.urandom(25_000).hex())).position)
        except errors.Unavailable as error:
            refused = error
            break
    assert refused is not None, "the disk did not fill up"
    print(f"acknowledged until the disk was full: {len(acknowledged)}")
    assert [message.position for message in await channel.read(limit=1000)] == acknowledged  # reading goes on
    waiting = asyncio.create_task(door.client(timeout=20.0).channel("c").publish("patient", key="k"))
    disks[0].free()
    freed = time.monotonic()
    assert (await waiting).position == len(acknowledged) + 1
    print(f"room on the disk to acknowledgement: {time.monotonic() - freed:.3f} s")
    assert (await channel.publish("last")).position == len(acknowledged) + 2
    assert len(bodies(small.dsn, "c")) == len(acknowledged) + 2
    await door.close()


async def test_a_full_wal_disk_stops_the_server_and_loses_nothing(
    small: Cluster, disks: tuple[Disk, Disk]
) -> None:
    door = Door("async", small.dsn)
    client = door.client(timeout=0.5)
    channel, acknowledged, doubt = client.channel("c"), {}, set()
    disks[1].fill(leave=1)
    for n in range(4000):
        if small.process is None or small.process.poll() is not None:
            break
        body = f"{n} {os.urandom(12_000).hex()}"
        try:
            acknowledged[(await channel.publish(body)).position] = body
        except errors.Indefinite:
            doubt.add(body)
        except errors.Unavailable:
            pass
    assert small.process is not None
    assert await asyncio.to_thread(small.process.wait, 30) != 0, "the server did not stop"
    assert len(acknowledged) > 10
    print(f"acknowledged until the WAL disk was full: {len(acknowledged)}")
    with pytest.raises(errors.Unavailable):
        await channel.publish("nobody there")
    disks[1].free()
    disks[1].grow(400)
    small.process = None
    await asyncio.to_thread(small.start)
    stored = bodies(small.dsn, "c")
    assert {position: stored[position - 1] for position in acknowledged} == acknowledged
    assert set(stored) <= set(acknowledged.values()) | doubt
    assert (await door.client().channel("c").publish("back")).position == len(stored) + 1
    await door.close()


# ------------------------------------------------------------------------------------------------ the NOTIFY queue


@pytest.mark.parametrize("server", [SMALL_QUEUE], indirect=True)
async def test_a_full_notify_queue_delays_runs_by_a_sweep_and_its_culprit_is_named(
    server: Cluster, processes: Processes
) -> None:
    worker = await processes.start("worker")
    async with pgchan.AsyncClient(server.dsn) as client:
        with full_queue(server.dsn) as culprit:
            took = []
            for n in range(3):
                began = time.monotonic()
                handle = await client.start("ping")
                await worker.tells("listening", handle.id)
                sent = time.monotonic()
                await handle.signal(n)
                took += [sent - began, await worker.tells("signal", n) - sent]
                await handle.signal("stop")
                assert await handle.result(10) == 1
            print(f"start and signal without wakeups: max {max(took):.2f} s")
            assert max(took) < 1.0 + 2.0  # the sweep, and what a busy machine adds
            (finding,) = [f for f in await doctor.check(server.dsn) if f.check == "queue of notifies"]
            assert not finding.is_fine
            assert f"session {culprit} " in finding.detail
        await client.channel("c").publish("asks for the usage, which cuts the queue")
        (finding,) = [f for f in await doctor.check(server.dsn) if f.check == "queue of notifies"]
        assert finding.is_fine, finding


# ------------------------------------------------------------------------------------------------ connections


@pytest.mark.parametrize("server", [{"max_connections": "25"}], indirect=True)
async def test_a_server_without_free_connections_refuses_newcomers_and_keeps_who_is_there(
    own: Door, server: Cluster, processes: Processes, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    worker = await processes.start("worker", lease=2.0)
    client = own.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish("first")
    await reader.has(1)
    handle = await client.start("talk")
    await worker.tells("gate", "speak")
    taken: list[psycopg.Connection[Any]] = []
    try:
        with contextlib.suppress(psycopg.OperationalError):
            while len(taken) < 25:
                taken.append(psycopg.connect(server.dsn))
        assert len(taken) < 25
        newcomer = own.client(timeout=0.5)
        for call in (newcomer.channel("c").publish(1), newcomer.channel("c").read(), newcomer.start("talk")):
            with pytest.raises(errors.Unavailable):
                await call
        await client.channel("c").publish("second")
        await reader.has(2, 3)
        patient = asyncio.create_task(own.client(timeout=30).channel("c").publish("third"))
        lost = worker.told("started")
        await asyncio.sleep(2.5)  # longer than the lease: the lock connection is alive
        assert (await handle.status()).attempt == 1
        assert worker.told("started") == lost
        assert not patient.done()
    finally:
        for connection in taken:
            connection.close()
    assert (await patient).position == 3
    await reader.has(3)
    worker.open("speak")
    assert await handle.result(10) == 3
    assert (await handle.status()).attempt == 1
    assert len(worker.told("executed", handle.id, "speak")) == 1


async def test_a_pool_of_one_that_is_held_is_named_and_nothing_hangs(
    dsn: str, workers: Workers
) -> None:
    query(dsn, "create table held (n integer)")
    gate, inside = asyncio.Event(), asyncio.Event()

    @pgchan.workflow
    async def holds(run: pgchan.Run) -> str:
        async with run.transaction("hold") as connection:
            await connection.execute("insert into held values (1)")
            inside.set()
            await gate.wait()
        return "done"

    small = pgchan.AsyncClient(dsn, pool_size=1, timeout=0.5)
    await workers.start(holds, client=small)
    async with pgchan.AsyncClient(dsn) as client:
        handle = await client.start("holds")
        await asyncio.wait_for(inside.wait(), 10)
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match="all 1 connections of the pool"):
            await small.channel("c").read()
        assert time.monotonic() - began < 10
        assert (await small.channel("c").publish("the writer has its own")).position == 1
        gate.set()
        assert await handle.result(15) == "done"
        assert query(dsn, "select n from held") == [(1,)]
        assert (await handle.status()).attempt == 1


# ------------------------------------------------------------------------------------------------ an old snapshot


async def test_an_old_snapshot_makes_appends_slower_and_not_wrong_and_is_named(
    door: Door, reading: Callable[[Any], Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SNAPSHOT_SECONDS", 0.2)
    client = door.client()
    reader = reading(client.channel("c").tail())
    channel = client.channel("c")
    await channel.publish(0)
    with psycopg.connect(door.dsn) as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("select count(*) from pgchan.messages")
        since = time.monotonic()
        took = []
        for batch in range(5):
            began = time.monotonic()
            await asyncio.gather(*(channel.publish(1 + 600 * batch + n) for n in range(600)))
            took.append(time.monotonic() - began)
        print("600 appends under an old snapshot: " + ", ".join(f"{seconds:.2f} s" for seconds in took))
        await asyncio.sleep(max(0.0, since + 0.3 - time.monotonic()))  # until it is old
        (finding,) = [f for f in await doctor.check(door.dsn) if f.check == "old snapshot"]
        assert not finding.is_fine
        assert f"session {old.info.backend_pid} " in finding.detail
        assert old.execute("select count(*) from pgchan.messages").fetchone() == (1,)
    stored = bodies(door.dsn, "c")
    assert sorted(stored) == list(range(3001))
    await reader.has(3001, 20)
    assert reader.bodies == stored


# ------------------------------------------------------------------------------------------------ clocks


@pytest.fixture
def clock() -> Iterator[Clock]:
    with Clock() as clock:
        yield clock


@pytest.fixture
def skewed(clock: Clock) -> Iterator[Cluster]:
    """A server with this clock."""
    cluster = Cluster(tcp=True, environment=clock.environment)
    try:
        cluster.start()
        migrate.upgrade(cluster.dsn)
        yield cluster
    finally:
        cluster.remove()


JUMPS = [0, 3600, -1800, 0]
LAST_JUMP = 4000


async def test_jumps_of_the_servers_clock_lose_no_timer_and_no_place(
    skewed: Cluster, clock: Clock, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    dsn = skewed.dsn
    processes, doors = Processes(dsn), [Door(kind, dsn) for kind in ("async", "blocking")]
    try:
        clients = [door.client() for door in doors]
        # The lease is switched off: a jump makes this server end sessions, as if they had been idle for so long.
        worker = await processes.start("worker", lease=100_000.0)
        readers = [reading(client.channel("c").tail()) for client in clients]
        far = await clients[0].start("nap", LAST_JUMP + 8.0)
        began = await worker.tells("napping", far.id)
        naps, cursors = [far], []
        for jump in JUMPS:
            clock.shift(jump)
            await wait_until(lambda jump=jump: abs(now_of(dsn) - time.time() - jump) < 60)
            naps.append(await clients[1].start("nap", 0.5))
            for n in range(10):
                cursors.append((await clients[n % 2].channel("c").publish(f"{jump} {n}")).cursor)
        assert [int(cursor[:16]) for cursor in cursors] == list(range(1, 41))
        stored = bodies(dsn, "c")
        for client, reader in zip(clients, readers, strict=True):
            await reader.has(40, 15)
            assert reader.bodies == stored
            for cursor in cursors[::7]:
                found = await client.channel("c").read(after=cursor)
                assert [m.position for m in found] == list(range(int(cursor[:16]) + 1, 41))
        assert worker.told("napped", far.id) == []
        clock.shift(LAST_JUMP)
        await asyncio.gather(*(nap.result(30) for nap in naps))
        assert worker.told("napped", far.id)[0][0] - began >= 8.0 - 0.1  # early by no more than the jump
        assert [(await nap.status()).attempt <= 2 for nap in naps] == [True] * 5
    finally:
        for reader in readers:
            await reader.stop()
        await asyncio.gather(*(door.close() for door in doors))
        processes.close()


def now_of(dsn: str) -> float:
    ((seconds,),) = query(dsn, "select extract(epoch from clock_timestamp())::float8")
    return float(seconds)


async def test_a_worker_whose_clock_jumps_keeps_its_runs(dsn: str, clock: Clock) -> None:
    processes = Processes(dsn)
    try:
        async with pgchan.AsyncClient(dsn) as client:
            first = await processes.start("first", lease=2.0, environment=clock.environment)
            handle = await client.start("talk")
            await first.tells("gate", "speak")
            second = await processes.start("second", lease=2.0)
            for jump in (3600, -1800):
                clock.shift(jump)
                nap = await client.start("nap", 0.5)
                await asyncio.sleep(2.5)  # longer than the lease
                assert await nap.result(10) is None
            first.open("speak")
            assert await handle.result(10) == 3
            assert (await handle.status()).attempt == 1
            assert second.told("executed", handle.id, "speak") == []
            assert len(workers_of(dsn)) == 2
    finally:
        processes.close()
