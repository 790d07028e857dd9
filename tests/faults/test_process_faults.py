"""Processes die together, hang in C, run out of descriptors or memory; hundreds of readers come back at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import psutil
import pytest
from cluster import free_port
from doors import query
from serving import Running, follow, message_of
from workers import Processes

import pgchan
from pgchan.server import Insecure, create_app

WaitUntil = Callable[..., Awaitable[None]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


async def said(client: pgchan.AsyncClient, run: str) -> list[Any]:
    return [m.body for m in await client.channel(run).read(limit=1000) if m.kind == "message"]


# ------------------------------------------------------------------------------------------------ workers


async def test_one_of_five_workers_continues_what_the_others_had(
    dsn: str, client: pgchan.AsyncClient, processes: Processes
) -> None:
    grace = 1.0
    all_five = [processes.begin(f"w{n}", concurrency=10, takeover_grace=grace) for n in range(5)]
    await asyncio.gather(*(process.tells("started", seconds=60) for process in all_five))
    handles = [await client.start("talk") for _ in range(20)]

    def at_the_gate() -> int:
        return sum(len(process.told("gate", "speak")) for process in all_five)

    until = time.monotonic() + 30
    while at_the_gate() < len(handles):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    *victims, survivor = sorted(all_five, key=lambda process: len(process.told("gate", "speak")))
    own = len(survivor.told("gate", "speak"))
    for victim in victims:
        victim.send(signal.SIGKILL)
    killed = time.monotonic()
    survivor.open("speak")
    results = await asyncio.gather(*(handle.result(30) for handle in handles))
    seconds = time.monotonic() - killed
    print(f"4 of 5 killed, {len(handles) - own} runs: all ended {seconds:.2f} s later")
    assert results == [3] * len(handles)
    assert grace <= seconds < 2 * 2.0 + 6.0 if own < len(handles) else True
    for handle in handles:
        assert await said(client, handle.id) == ["a", "b", "c"]
        assert [m.key for m in await handle.journal()] == ["before", "speak", "after"]
    assert query(dsn, "select count(*) from pgchan.workers") == [(1,)]


async def test_a_worker_in_which_c_code_keeps_the_gil_beyond_its_lease_is_taken_over(
    client: pgchan.AsyncClient, processes: Processes, dsn: str, wait_until: WaitUntil
) -> None:
    lease = 1.5
    first = await processes.start("first", lease=lease)
    handle = await client.start("hogs", 4 * lease)
    began = await first.tells("hogging", handle.id, True)
    second = await processes.start("second", lease=lease)
    taken = await second.tells("hogging", handle.id, False) - began
    print(f"the GIL kept for {4 * lease} s, lease {lease} s: taken over {taken:.2f} s")
    assert await handle.result(10) == "done"
    (old,) = [event[2] for event in first.told("started")]
    await wait_until(lambda: [row for row in query(dsn, "select id from pgchan.workers") if row[0] > old + 1], 20)
    assert (await handle.status()).attempt == 2
    assert [m.body for m in await handle.journal()] == ["done"]  # of one of the two
    following = await client.start("talk", id="next")  # the first one works on
    second.send(signal.SIGTERM)
    await second.exits()
    await first.tells("gate", "speak")
    first.open("speak")
    assert await following.result(10) == 3


def limit(pid: int, kind: int, most: int) -> tuple[int, int]:
    """Lower a limit of another process; what it was."""
    return resource.prlimit(pid, kind, (most, resource.prlimit(pid, kind)[1]))


async def test_a_worker_that_can_open_no_connection_is_taken_over_and_comes_back(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, wait_until: WaitUntil
) -> None:
    first = await processes.start("first", lease=2.0)
    handle = await client.start("talk")
    await first.tells("gate", "speak")
    second = await processes.start("second", lease=2.0)
    before = limit(first.process.pid, resource.RLIMIT_NOFILE, 4)  # a new descriptor would have a higher number
    assert first.cut() >= 4
    await second.tells("gate", "speak")
    second.open("speak")
    assert await handle.result(10) == 3
    assert first.process.poll() is None
    resource.prlimit(first.process.pid, resource.RLIMIT_NOFILE, before)
    (old,) = [event[2] for event in first.told("started")]
    await wait_until(lambda: len(ids := query(dsn, "select id from pgchan.workers")) == 2 and (old,) not in ids, 20)
    first.open("speak")
    following = await client.start("talk", id="next")
    second.send(signal.SIGTERM)
    await second.exits()
    assert await following.result(10) == 3
    assert await said(client, handle.id) == ["a", "b", "c"]
    assert first.told("executed", handle.id, "after") == []


async def test_a_step_without_enough_memory_fails_its_run_and_no_other(
    client: pgchan.AsyncClient, processes: Processes
) -> None:
    worker = await processes.start("worker")
    used = psutil.Process(worker.process.pid).memory_info().vms
    limit(worker.process.pid, resource.RLIMIT_AS, used + (256 << 20))
    other = await client.start("talk")
    await worker.tells("gate", "speak")
    greedy = await client.start("greedy", 4 << 30)
    with pytest.raises(pgchan.RunFailed, match="MemoryError"):
        await greedy.result(10)
    worker.open("speak")
    assert await other.result(10) == 3


# ------------------------------------------------------------------------------------------------ readers


async def test_five_hundred_readers_that_are_cut_at_once_come_back_and_miss_nothing(
    client: pgchan.AsyncClient, wait_until: WaitUntil
) -> None:
    readers, channels = 500, 5
    seen: list[list[int]] = [[] for _ in range(readers)]
    opened = [0] * readers
    async with Running(create_app(client, auth=Insecure())) as served:

        async def read(number: int) -> None:
            cursor, retry = "0", 0.0
            while True:
                try:
                    name = f"/channels/c/{number % channels}"
                    headers = {} if cursor == "0" else {"Last_Event_ID": cursor}
                    async with follow(served.port, name, **headers) as reader:
                        if reader.status == 204:
                            return
                        opened[number] += 1
                        async for block in reader.blocks():
                            retry = int(block.get("retry", retry * 1000)) / 1000
                            cursor = block.get("id", cursor)
                            if block.get("event") == "message":
                                seen[number].append(message_of(block)["position"])
                except (ConnectionError, asyncio.IncompleteReadError):
                    pass
                await asyncio.sleep(retry)  # as a browser does

        async def publish() -> None:
            while not stopping.is_set():
                await asyncio.gather(*(client.channel(f"c/{n}").publish(None) for n in range(channels)))
                await asyncio.sleep(0.1)

        stopping = asyncio.Event()
        reading = [asyncio.create_task(read(number)) for number in range(readers)]
        publishing = asyncio.create_task(publish())
        await wait_until(lambda: all(seen), 60)
        pages = client.stats["pages"]
        assert served.server is not None
        for connection in list(served.server.server_state.connections):
            connection.transport.abort()
        reset = time.monotonic()
        await wait_until(lambda: min(opened) == 2, 30)
        back = time.monotonic() - reset
        await asyncio.sleep(0.5)
        stopping.set()
        await publishing
        print(f"{readers} readers reset: all back {back:.2f} s, {client.stats['pages'] - pages} pages read")
        assert back < 10
        assert max(opened) == 2
        for n in range(channels):
            await client.channel(f"c/{n}").close()
        await asyncio.wait_for(asyncio.gather(*reading), 60)
    heads = [(await client.channel(f"c/{n}").info()).head for n in range(channels)]
    assert all(positions == list(range(1, heads[n % channels] + 1)) for n, positions in enumerate(seen))


SERVER = """
import asyncio, sys
from pgchan import AsyncClient
from pgchan.server import Insecure, create_app, serve

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        await serve(create_app(client, auth=Insecure()), port=int(sys.argv[2]))

asyncio.run(main())
"""


def leaving(pid: int, free: int) -> int:
    """The limit that leaves a process so many descriptors: gaps below those that are open count too."""
    taken = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    return next(most for most in itertools.count() if sum(number not in taken for number in range(most)) == free)


async def test_a_server_without_descriptors_keeps_its_readers_and_lets_others_in_when_some_leave(
    dsn: str, client: pgchan.AsyncClient, wait_until: WaitUntil
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, dsn, str(port), stderr=asyncio.subprocess.DEVNULL
    )
    seen: dict[int, list[int]] = {}

    async def read(number: int) -> None:
        async with follow(port, "/channels/c") as reader:
            async for block in reader.blocks():
                if block.get("event") == "message":
                    seen.setdefault(number, []).append(message_of(block)["position"])

    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/channels/c")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until(is_up, 30)
        await client.channel("c").publish(1)
        early = [asyncio.create_task(read(number)) for number in range(10)]
        await wait_until(lambda: len(seen) == 10)
        limit(process.pid, resource.RLIMIT_NOFILE, leaving(process.pid, 6))
        late = [asyncio.create_task(read(number)) for number in range(10, 20)]
        await client.channel("c").publish(2)
        await wait_until(lambda: all(seen[number] == [1, 2] for number in range(10)))
        assert len(seen) < 20
        for task in early:
            task.cancel()
        await wait_until(lambda: all(seen.get(number) == [1, 2] for number in range(10, 20)), 20)
        await client.channel("c").publish(3)
        await wait_until(lambda: all(seen[number] == [1, 2, 3] for number in range(10, 20)))
        for task in late:
            task.cancel()
        await asyncio.gather(*early, *late, return_exceptions=True)
        assert process.returncode is None
    finally:
        process.kill()
        await process.wait()
