"""A standby becomes the primary. What it never got is lost: who saw it is told, and nobody reads or writes astray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from doors import Door, Reading, query
from serving import Reader, Running, follow, message_of
from storm import Storm, bodies
from workers import Processes

import pgchan
from pgchan import errors, migrate
from pgchan.server import Insecure, create_app

WaitUntil = Callable[..., Awaitable[None]]


class Pair:
    """A primary and its standby. `dsn` leads to whichever of them takes writes."""

    def __init__(self) -> None:
        self.primary = Cluster(tcp=True)
        self.primary.start()
        migrate.upgrade(self.primary.dsn)
        self.standby = Cluster(tcp=True, copy_of=self.primary)
        self.standby.start()
        hosts = ",".join(f"127.0.0.1:{cluster.port}" for cluster in (self.primary, self.standby))
        self.dsn = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"

    def is_level(self) -> bool:
        """Whether the standby has, and shows, all that the primary has."""
        return query(
            self.primary.dsn,
            "select 1 from pg_stat_replication where state = 'streaming' and replay_lsn >= pg_current_wal_lsn()",
        ) != []

    def hold_back(self) -> None:
        """From now on the standby gets nothing more."""
        ((sender,),) = query(self.primary.dsn, "select pid from pg_stat_replication")
        os.kill(sender, signal.SIGSTOP)

    def fail_over(self) -> float:
        """Kill the primary and promote the standby; seconds until that took writes."""
        began = time.monotonic()
        self.primary.kill()
        self.standby.promote()
        return time.monotonic() - began

    def remove(self) -> None:
        self.standby.remove()
        self.primary.remove()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.remove()


@pytest.fixture
async def doors(pair: Pair) -> AsyncIterator[list[Door]]:
    doors = [Door("async", pair.dsn), Door("blocking", pair.dsn)]
    yield doors
    await asyncio.gather(*(door.close() for door in doors))


class Watcher:
    """A reader over HTTP: the positions and bodies it was given since it began or was last reset."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.events: list[str] = []
        self.seen: list[Any] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for block in self.reader.blocks():
            if "event" not in block:
                continue
            self.events.append(block["event"])
            if block["event"] == "reset":
                assert json.loads(block["data"])["reason"] == "history_lost"
                self.seen = []
            else:
                message = message_of(block)
                assert message["position"] == len(self.seen) + 1
                self.seen.append(message["body"])


# Each channel loses LOST messages. How many it gets afterwards decides how the loss can be noticed.
KEPT, LOST = 50, 30
AFTER = {"untouched": 0, "shorter": 7, "as-long": LOST, "longer": LOST + 20}


async def test_every_reader_of_what_a_failover_lost_is_told_and_the_others_go_on(
    pair: Pair, doors: list[Door], reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    clients = [door.client() for door in doors]
    publisher = doors[0].client()
    names = [*AFTER, "whole"]
    for name in names:
        await publisher.channel(name).publish_many([f"kept {n}" for n in range(KEPT)])
    resumed_at = (await publisher.channel("longer").read(limit=20))[-1].cursor
    async with pgchan.AsyncClient(pair.dsn) as serving, Running(create_app(serving, auth=Insecure())) as served:
        readers = [(name, reading(client.channel(name).tail())) for client in clients for name in names]
        async with contextlib.AsyncExitStack() as stack:
            paths = {name: follow(served.port, f"/channels/{name}") for name in names}
            watchers = {name: Watcher(await stack.enter_async_context(path)) for name, path in paths.items()}
            await asyncio.gather(*(reader.has(KEPT) for _, reader in readers))
            await wait_until(pair.is_level)
            pair.hold_back()
            for name in AFTER:
                for n in range(LOST):
                    await publisher.channel(name).publish(f"lost {n}")
            await asyncio.gather(*(reader.has(KEPT + LOST) for name, reader in readers if name in AFTER))
            await wait_until(lambda: all(len(watchers[name].seen) == KEPT + LOST for name in AFTER), 20)
            seconds = await asyncio.to_thread(pair.fail_over)
            print(f"promotion: {seconds:.2f} s")
            for name, count in AFTER.items():
                for n in range(count):
                    await publisher.channel(name).publish(f"new {n}")
            await publisher.channel("whole").publish("new")

            for name, reader in readers:
                if name == "whole":
                    await reader.has(KEPT + 1, 20)
                    continue
                with pytest.raises(errors.HistoryLost) as caught:
                    await reader.end(20)
                assert len(reader.messages) == KEPT + LOST, name
                assert (caught.value.first, caught.value.cursor) == (1, "0000000000000000_0000000000000000")
                assert KEPT <= caught.value.last <= KEPT + AFTER[name]
            stored = {name: bodies(pair.standby.dsn, name) for name in names}
            assert {name: len(stored[name]) - KEPT for name in AFTER} == AFTER
            await wait_until(lambda: all(watchers[name].seen == stored[name] for name in names), 20)
            for name, watcher in watchers.items():
                assert watcher.events.count("reset") == (0 if name == "whole" else 1), name
                before = watcher.events.index("reset") if name in AFTER else len(watcher.events)
                assert before == (KEPT + LOST if name in AFTER else KEPT + 1)
        for client in clients:  # who stands in what was kept goes on exactly
            found = await client.channel("longer").read(after=resumed_at, limit=1000)
            assert [message.body for message in found] == stored["longer"][20:]


async def test_channels_that_a_failover_forgot_are_not_mistaken_for_those_that_got_their_numbers(
    pair: Pair, doors: list[Door], reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    await wait_until(pair.is_level)
    clients = [door.client() for door in doors]
    other = doors[0].client()
    await asyncio.gather(*(client.channel("known").publish("before") for client in clients))
    await wait_until(pair.is_level)
    pair.hold_back()
    readers = []
    for client, mine in zip(clients, ("a", "b"), strict=True):
        await asyncio.gather(*(client.channel(f"{mine}/{n}").publish(f"{mine}/{n}") for n in range(30)))
        await client.channel(f"{mine}/empty").create()
        readers.append(reading(client.channel(f"{mine}/empty").tail()))
    await wait_until(lambda: all(client.health == "listening" for client in clients))
    await asyncio.to_thread(pair.fail_over)
    await other.channel("known").publish("after")
    foreign = [f"foreign/{n}" for n in range(90)]
    await asyncio.gather(*(other.channel(name).publish(name) for name in foreign))
    for client, mine in zip(clients, ("a", "b"), strict=True):
        await asyncio.gather(*(client.channel(f"{mine}/{n}").publish("again", key="k") for n in range(0, 30, 2)))
        await asyncio.gather(*(client.channel(f"{mine}/{n}").publish_many(["again"]) for n in range(1, 30, 2)))
        await client.channel(f"{mine}/empty").publish(f"{mine}/empty")
    for name in foreign:
        assert bodies(pair.standby.dsn, name) == [name]
    for mine, reader in zip(("a", "b"), readers, strict=True):
        assert [bodies(pair.standby.dsn, f"{mine}/{n}") for n in range(30)] == [["again"]] * 30
        await reader.has(1)
        assert reader.bodies == [f"{mine}/empty"]


def claim(dsn: str) -> tuple[int, int, int]:
    """Claim the one run there is as a worker by hand: the worker, the run's channel, its epoch."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        worker = connection.execute("select pgchan.new_worker()").fetchone()[0]  # type: ignore[index]
        connection.execute("select pgchan.register(%s, 'by hand', 'here', 1)", [worker])
        found = connection.execute(
            "select channel_id, epoch from pgchan.claim(%s, '{default}', '{work}', 1)", [worker]
        ).fetchone()
        assert found is not None
        return worker, *found


async def test_an_attempt_that_a_failover_forgot_is_fenced(pair: Pair, wait_until: WaitUntil) -> None:
    query(pair.dsn, "select pgchan.start('work', id => 'r')")
    await wait_until(pair.is_level)
    pair.hold_back()
    _, run, forgotten = claim(pair.dsn)
    await asyncio.to_thread(pair.fail_over)
    _, again, epoch = claim(pair.dsn)
    assert again == run
    finish = "select outcome from pgchan.finish(%s, %s, 'succeeded', '1', null)"
    assert query(pair.dsn, finish, run, forgotten) == [("fenced",)]
    assert query(pair.dsn, finish, run, epoch) == [("finished",)]


async def test_a_run_begins_again_from_what_a_failover_left_of_it(pair: Pair, wait_until: WaitUntil) -> None:
    processes = Processes(pair.dsn)
    try:
        async with pgchan.AsyncClient(pair.dsn) as client:
            worker = await processes.start("worker", lease=10.0, takeover_grace=1.0)
            handle = await client.start("everything", id="r")
            channel = client.channel("r")
            tail = channel.tail()
            assert (await anext(tail)).body == "begin"
            await wait_until(pair.is_level)
            pair.hold_back()
            await handle.signal("first")  # with it are lost: two steps, and what the third one says
            await worker.tells("executed", "r", "answer")
            async with asyncio.timeout(10):
                while (await anext(tail)).body != "thinking":
                    pass
            await asyncio.to_thread(pair.fail_over)
            with pytest.raises(errors.HistoryLost):
                await anext(tail)
            for body in ("first", "second"):  # what the sender does once it is told
                await handle.signal(body)
            assert await handle.result(20) == ["first", "second"]
            messages = await channel.read(limit=1000)
            assert [m.body for m in messages if m.kind == "message"] == ["begin", "thinking", "answer to second", "end"]
            assert Counter(m.key for m in await handle.journal()) == {"receive": 1, "middle": 1, "answer": 1}
            assert len(worker.told("executed", "r", "middle")) == 2  # its record was lost
            consumed = [m.body for m in messages if m.kind == "control" and m.body["type"] == "consumed"]
            assert [(body["signal"], body["step"]) for body in consumed] == [(2, "receive"), (3, "answer")]
    finally:
        processes.close()


async def test_a_synchronous_standby_loses_nothing_and_nobody_is_told(
    pair: Pair, doors: list[Door], reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    for statement in ("alter system set synchronous_standby_names = '*'", "select pg_reload_conf()"):
        query(pair.dsn, statement)
    state = "select sync_state from pg_stat_replication"
    await wait_until(lambda: query(pair.dsn, state) == [("sync",)])
    processes = Processes(pair.dsn)
    try:
        worker = await processes.start("worker", lease=10.0, takeover_grace=5.0)
        clients = [door.client() for door in doors]
        handle = await clients[0].start("talk")
        await worker.tells("gate", "speak")
        readers = [reading(client.channel(door.kind).tail()) for door, client in zip(doors, clients, strict=True)]
        storms = [Storm(client, door.kind, publishers=4) for door, client in zip(doors, clients, strict=True)]
        await wait_until(lambda: all(len(storm.acknowledged) >= 50 for storm in storms))
        seconds = await asyncio.to_thread(pair.fail_over)
        reached = [len(storm.acknowledged) + 30 for storm in storms]
        await wait_until(lambda: all(len(s.acknowledged) >= n for s, n in zip(storms, reached, strict=True)), 20)
        for door, storm, reader in zip(doors, storms, readers, strict=True):
            await storm.stop()
            stored = bodies(pair.standby.dsn, door.kind)
            await reader.has(len(stored))
            storm.check(stored, reader)
            assert not storm.not_done
            print(f"synchronous failover in {seconds:.2f} s: 0 of {len(storm.acknowledged)} acknowledged lost")
        worker.open("speak")
        assert await handle.result(10) == 3
        assert (await handle.status()).attempt == 1
    finally:
        processes.close()
