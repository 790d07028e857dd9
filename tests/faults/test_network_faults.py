"""The network between clients and server swallows, loses, resets, or crawls: everything arrives, once and in order."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cluster import Cluster, on_database
from doors import Door, Reading, query
from networks import CLIENT_ADDRESS, SERVER_ADDRESS, Network
from proxy import Proxy
from storm import Storm, bodies
from workers import Process, Processes, Workers

import pgchan
from pgchan import errors, migrate

pytestmark = pytest.mark.xdist_group("network")  # one network and one server for all of them

WaitUntil = Callable[..., Awaitable[None]]
PORT = 5432
LEASE, GRACE = 10.0, 1.0  # the defaults
TAKEOVER_SECONDS = 12.0


@dataclass
class Site:
    """A database behind a network. dsn: over the cable. local: past it."""

    network: Network
    dsn: str
    local: str


@pytest.fixture(scope="module")
def server_behind() -> Iterator[tuple[Network, Cluster]]:
    with Network(PORT) as network:
        cluster = Cluster({"listen_addresses": "*"})
        try:
            with (cluster.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {CLIENT_ADDRESS}/32 trust\n")
            with network.inside(network.server):
                cluster.start()
            migrate.upgrade(on_database(cluster.dsn, "postgres"))
            yield network, cluster
        finally:
            cluster.remove()


@pytest.fixture
def site(server_behind: tuple[Network, Cluster], request: pytest.FixtureRequest) -> Iterator[Site]:
    """A database of this test's own; the test stands at the far end of the cable."""
    network, cluster = server_behind
    name = f"site_{abs(hash(request.node.name))}"
    query(cluster.dsn, f"create database {name} template postgres")
    dsn = f"postgresql://postgres@{SERVER_ADDRESS}:{PORT}/{name}"
    with network.inside(network.client):
        yield Site(network, dsn, on_database(cluster.dsn, name))
    network.heal()
    query(cluster.dsn, f"drop database {name} with (force)")


@pytest.fixture(params=["async", "blocking"])
async def far(request: pytest.FixtureRequest, site: Site) -> AsyncIterator[Door]:
    door = Door(request.param, site.dsn)
    yield door
    site.network.heal()
    await door.close()


async def said(client: pgchan.AsyncClient, run: str) -> list[Any]:
    return [m.body for m in await client.channel(run).read(limit=1000) if m.kind == "message"]


# ------------------------------------------------------------------------------------------------ a black hole


async def test_a_client_notices_a_black_hole_and_goes_on_after_it(
    far: Door, site: Site, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    client = far.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish("before")
    await reader.has(1)
    site.network.swallow()
    began = time.monotonic()
    unkeyed = asyncio.create_task(client.channel("c").publish("unkeyed"))
    keyed = asyncio.create_task(client.channel("d").publish("keyed", key="k"))
    await wait_until(lambda: client.health != "listening", 20)
    listener = time.monotonic() - began
    with pytest.raises(errors.Indefinite):
        await asyncio.wait_for(unkeyed, 20)
    writer = time.monotonic() - began
    print(f"black hole noticed: listener {listener:.2f} s, writer {writer:.2f} s")
    assert max(listener, writer) < 9
    assert not keyed.done()
    async with pgchan.AsyncClient(site.local) as other:
        await other.channel("c").publish("meanwhile")
    site.network.heal()
    assert (await asyncio.wait_for(keyed, 20)).position == 1
    await client.channel("c").publish("after")
    stored = bodies(site.local, "c")
    assert stored == ["before", "meanwhile", "after"]  # packets that were swallowed came to nothing
    await reader.has(3, 10)
    assert reader.bodies == stored
    assert bodies(site.local, "d") == ["keyed"]


async def test_a_worker_in_a_black_hole_stops_in_time_and_is_taken_over(
    site: Site, wait_until: WaitUntil
) -> None:
    far, near = Processes(site.dsn), Processes(site.local)
    try:
        async with pgchan.AsyncClient(site.local) as client:
            cut_off = await far.start("far", lease=LEASE, takeover_grace=GRACE)
            endless, talk = await client.start("endless"), await client.start("talk")
            await asyncio.gather(cut_off.tells("hanging"), cut_off.tells("gate", "speak"))
            healthy = await near.start("near", lease=LEASE, takeover_grace=GRACE)
            site.network.swallow()
            began = time.monotonic()
            stopped = await cut_off.tells("cancelled", endless.id) - began
            taken = max(await healthy.tells("hanging", endless.id), await healthy.tells("gate", "speak")) - began
            print(f"black hole: runs stopped {stopped:.2f} s, taken over {taken:.2f} s")
            assert stopped < LEASE
            assert stopped < taken < TAKEOVER_SECONDS
            healthy.open("speak")
            assert await talk.result(10) == 3
            cut_off.open("speak")
            site.network.heal()
            await gets_a_new_id(site.local, cut_off, wait_until)
            assert await said(client, talk.id) == ["a", "b", "c"]
            assert [m.key for m in await talk.journal()] == ["before", "speak", "after"]
            assert cut_off.told("executed", talk.id, "after") == []
            assert (await endless.status()).attempt == 2
            assert await endless.cancel()
    finally:
        site.network.heal()
        far.close()
        near.close()


async def gets_a_new_id(dsn: str, process: Process, wait_until: WaitUntil) -> None:
    (old,) = [event[2] for event in process.told("started")]

    def has_one() -> bool:
        ids = [row[0] for row in query(dsn, "select id from pgchan.workers")]
        return len(ids) == 2 and old not in ids

    await wait_until(has_one, 20)


async def test_the_lease_takes_over_from_a_worker_whose_connections_are_half_open(
    dsn: str, workers: Workers, wait_until: WaitUntil
) -> None:
    """Keepalives do not notice: the kernel at the other end still answers."""
    lease = 2.0
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(dsn) as client:
        processes = Processes(proxy.dsn)
        try:
            cut_off = await processes.start("far", lease=lease)
            endless = await client.start("endless")
            await cut_off.tells("hanging")
            await workers.start(lease=lease, name="near")
            proxy.silence()
            began = time.monotonic()
            stopped = await cut_off.tells("cancelled", endless.id) - began
            assert stopped < lease

            async def is_taken() -> bool:
                return (await endless.status()).worker == "near"

            await wait_until(is_taken, 10)
            print(f"half-open, lease {lease} s: taken over {time.monotonic() - began:.2f} s")
            assert time.monotonic() - began > 0.7 * lease
            proxy.silence(False)
            proxy.cut()
            await gets_a_new_id(dsn, cut_off, wait_until)
            assert (await endless.status()).attempt == 2
            assert await endless.cancel()
        finally:
            await asyncio.to_thread(processes.close)


# ------------------------------------------------------------------------------------------------ a bad cable


async def test_everything_arrives_in_order_though_a_third_of_the_packets_is_lost(
    far: Door, site: Site, reading: Callable[[Any], Reading]
) -> None:
    client = far.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish("first")
    await reader.has(1)
    site.network.lose(30)
    took: list[float] = []

    async def publish(who: int) -> None:
        for n in range(12):
            began = time.monotonic()
            await client.channel("c").publish([who, n], key=f"{who} {n}")
            took.append(time.monotonic() - began)

    await asyncio.wait_for(asyncio.gather(*(publish(who) for who in range(4))), 90)
    site.network.heal()
    stored = bodies(site.local, "c")
    await reader.has(49, 20)
    assert reader.bodies == stored
    assert all([n for one, n in stored[1:] if one == who] == list(range(12)) for who in range(4))
    print(f"publish at 30 % loss: p50 {statistics.median(took):.3f} s, max {max(took):.2f} s")


async def test_two_seconds_of_resets_lose_nothing(
    far: Door, site: Site, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    client = far.client()
    reader = reading(client.channel("storm").tail())
    storm = Storm(client, "storm", publishers=4)
    await wait_until(lambda: len(storm.acknowledged) >= 50)
    site.network.reset()
    await asyncio.sleep(2.0)
    site.network.heal()
    healed, reached = time.monotonic(), len(storm.acknowledged) + 20
    await wait_until(lambda: len(storm.acknowledged) >= reached)
    print(f"end of resets to 20 acknowledgements: {time.monotonic() - healed:.2f} s")
    await storm.stop()
    stored = bodies(site.local, "storm")
    await reader.has(len(stored), 5)
    storm.check(stored, reader)
    assert not storm.not_done


async def test_connections_outlast_a_cable_that_is_out_for_three_seconds(
    far: Door, site: Site, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    client = far.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish(1)
    await reader.has(1)
    names = "application_name in ('pgchan writer', 'pgchan listen')"
    own = f"select pid from pg_stat_activity where {names} and datname = %s"
    database = site.dsn.rpartition("/")[2]
    before = query(site.local, own, database)
    site.network.link(up=False)
    publishing = asyncio.create_task(client.channel("c").publish(2))
    await asyncio.sleep(3.0)
    site.network.link(up=True)
    back = time.monotonic()
    assert (await asyncio.wait_for(publishing, 10)).position == 2
    await reader.has(2, 10)
    print(f"cable back to delivery: {time.monotonic() - back:.2f} s")
    assert sorted(query(site.local, own, database)) == sorted(before)
    assert len(before) == 2


async def test_a_thin_pipe_slows_down_and_reorders_nothing(
    far: Door, site: Site, reading: Callable[[Any], Reading]
) -> None:
    client = far.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish(["first", 0])
    await reader.has(1)
    site.network.throttle(256)
    began = time.monotonic()
    await asyncio.gather(*(client.channel("c").publish([n, "x" * 1000]) for n in range(99)))
    seconds = time.monotonic() - began
    stored = bodies(site.local, "c")
    await reader.has(100, 30)
    assert reader.bodies == stored
    assert sorted(body[0] for body in stored[1:]) == list(range(99))
    assert seconds > 100_000 * 8 / 256_000 / 2  # the pipe was thin indeed
    print(f"100 kB at 256 kbit/s: {seconds:.1f} s")
