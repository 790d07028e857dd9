"""A worker dies, freezes or loses its connections, a server restarts: the run goes on, and nothing happens twice.

Faults at each named point are in faults/test_points.py.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cluster import Cluster
from doors import direct, query
from workers import Process, Processes, Workers

import pgchan

TAKEOVER_SECONDS = 2.0  # promised, with the default grace of 1 s
BUSY_SECONDS = 1.0  # what a busy machine may add


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


async def bodies(client: pgchan.AsyncClient, run: str, view: str = "final") -> list[Any]:
    """What the run has said."""
    return [m.body for m in await client.channel(run).read(view=view, limit=1000) if m.kind == "message"]


async def controls(client: pgchan.AsyncClient, run: str, kind: str) -> list[dict[str, Any]]:
    messages = await client.channel(run).read(view="raw", limit=1000)
    return [m.body for m in messages if m.kind == "control" and m.body["type"] == kind]


def workers_of(dsn: str) -> list[int]:
    return [row[0] for row in query(dsn, "select id from pgchan.workers order by id")]


# ------------------------------------------------------------------------------------------------ death


async def test_a_run_goes_on_elsewhere_within_two_seconds_of_a_sigkill(
    dsn: str, client: pgchan.AsyncClient, processes: Processes
) -> None:
    first = await processes.start("first", lease=10.0, takeover_grace=1.0)
    handle = await client.start("talk")
    await first.tells("gate", "speak")
    second = await processes.start("second", lease=10.0, takeover_grace=1.0)
    killed = first.kill()
    again = await second.tells("executed", handle.id, "speak")
    assert again - killed < TAKEOVER_SECONDS + BUSY_SECONDS
    print(f"SIGKILL to the next attempt's step: {again - killed:.3f} s")
    second.open("speak")
    assert await handle.result(10) == 3
    assert second.told("executed", handle.id, "before") == []  # it was recorded
    assert (await handle.status()).attempt == 2


async def test_the_output_of_a_killed_attempt_is_void(client: pgchan.AsyncClient, processes: Processes) -> None:
    first = await processes.start("first")
    handle = await client.start("talk")
    await first.tells("gate", "speak")
    async with asyncio.timeout(10):
        async for message in handle.tail():
            if message.body == "b":
                break
    second = await processes.start("second")
    first.kill()
    await second.tells("gate", "speak")
    second.open("speak")
    await handle.result(10)
    assert await bodies(client, handle.id) == ["a", "b", "c"]
    assert await bodies(client, handle.id, "raw") == ["a", "b", "a", "b", "c"]
    assert [body["step"] for body in await controls(client, handle.id, "reset")] == ["speak"]


async def test_a_new_worker_continues_what_all_the_dead_ones_had(
    dsn: str, client: pgchan.AsyncClient, processes: Processes
) -> None:
    dead = [processes.begin(name, concurrency=2) for name in ("a", "b", "c")]
    await asyncio.gather(*(process.tells("started", seconds=30) for process in dead))
    handles = [await client.start("talk") for _ in range(6)]
    await asyncio.gather(*(process.tells("gate", "speak", times=2) for process in dead))
    for process in dead:
        process.kill()
    living = processes.begin("living")
    await living.tells("gate", "speak", times=6)
    living.open("speak")
    assert [await handle.result(10) for handle in handles] == [3] * 6
    assert [await bodies(client, handle.id) for handle in handles] == [["a", "b", "c"]] * 6
    assert len(workers_of(dsn)) == 1


async def test_rows_of_a_killed_transaction_are_there_once(
    dsn: str, client: pgchan.AsyncClient, processes: Processes
) -> None:
    query(dsn, "create table rows_of_users (run text)")
    first = await processes.start("first")
    handle = await client.start("reserve", id="r")
    await first.tells("gate", "reserve")
    second = await processes.start("second")
    first.kill()
    await second.tells("gate", "reserve")
    second.open("reserve")
    await handle.result(10)
    assert query(dsn, "select run from rows_of_users") == [("r",)]
    assert await bodies(client, "r") == ["reserved"]


# ------------------------------------------------------------------------------------------------ a frozen worker


async def frozen_past_its_lease(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, workflow: str, gate: str, *signals: str
) -> tuple[Process, Process, str]:  # fmt: skip
    """A worker that woke up in the middle of a step of a run that a second one has finished meanwhile."""
    first = await processes.start("first", lease=2.0)
    handle = await client.start(workflow, id="r")
    for body in signals:
        await handle.signal(body)
    await first.tells("gate", gate)
    second = await processes.start("second", lease=2.0)
    first.send(signal.SIGSTOP)
    await second.tells("gate", gate)
    second.open(gate)
    await handle.result(10)
    first.open(gate)
    first.send(signal.SIGCONT)
    return first, second, handle.id


async def gets_a_new_id(dsn: str, process: Process, wait_until: Callable[..., Any]) -> None:
    (old,) = [event[2] for event in process.told("started")]
    await wait_until(lambda: len(workers_of(dsn)) == 2)
    assert old not in workers_of(dsn)


async def test_a_worker_that_was_frozen_cannot_record_or_publish(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, wait_until: Callable[..., Any]
) -> None:
    first, second, run = await frozen_past_its_lease(dsn, client, processes, "talk", "speak")
    await gets_a_new_id(dsn, first, wait_until)
    assert await bodies(client, run) == ["a", "b", "c"]
    assert [m.key for m in await client.run(run).journal()] == ["before", "speak", "after"]
    assert first.told("executed", run, "after") == []
    handle = await client.start("talk", id="next")  # it works on, under its new id
    second.send(signal.SIGTERM)
    await second.exits()
    await first.tells("executed", "next", "after")
    assert await handle.result(10) == 3


async def test_a_worker_that_was_frozen_cannot_commit_rows_in_a_transaction(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, wait_until: Callable[..., Any]
) -> None:
    query(dsn, "create table rows_of_users (run text)")
    first, _, run = await frozen_past_its_lease(dsn, client, processes, "reserve", "reserve")
    await gets_a_new_id(dsn, first, wait_until)
    left = "select 1 from pg_stat_activity where state like 'idle in transaction%' and datname = current_database()"
    await wait_until(lambda: query(dsn, left) == [])
    assert query(dsn, "select run from rows_of_users") == [(run,)]


async def test_a_worker_that_was_frozen_cannot_consume_a_signal(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, wait_until: Callable[..., Any]
) -> None:
    first, _, run = await frozen_past_its_lease(dsn, client, processes, "receive", "receive", "hello")
    await gets_a_new_id(dsn, first, wait_until)
    assert [body["signal"] for body in await controls(client, run, "consumed")] == [1]
    assert [m.body for m in await client.run(run).journal()] == ["hello"]
    assert (await client.run(run).status()).attempt == 2


# ------------------------------------------------------------------------------------------------ cut connections


@pytest.mark.parametrize("roles", [["writer"], ["pool"], ["listen"], ["lock"], ["watch"], []], ids="-".join)
async def test_a_cut_connection_neither_moves_a_run_nor_repeats_its_output(
    dsn: str, client: pgchan.AsyncClient, processes: Processes, workers: Workers, roles: list[str]
) -> None:
    first = await processes.start("first", takeover_grace=1.0)
    handle = await client.start("talk")
    await first.tells("gate", "speak")
    await workers.start(takeover_grace=1.0)
    # The connections of a pooler bear the name of who used them last.
    assert first.cut(*roles) >= 1 or direct(dsn) != dsn
    first.open("speak")
    assert await handle.result(10) == 3
    assert (await handle.status()).attempt == 1
    assert await bodies(client, handle.id, "raw") == ["a", "b", "c"]
    assert len(first.told("executed", handle.id, "speak")) == 1


async def test_a_signal_reaches_a_step_whose_connections_were_cut(
    client: pgchan.AsyncClient, processes: Processes
) -> None:
    first = await processes.start("first")
    handle = await client.start("ping")
    await first.tells("listening")
    first.cut()
    await handle.signal("stop")
    sent = time.monotonic()
    assert await first.tells("signal", "stop") - sent < 3.0
    assert await handle.result(10) == 0


# ------------------------------------------------------------------------------------------------ the server


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_restarts_within_the_grace_costs_no_step(
    server: Cluster, mode: str
) -> None:
    processes = Processes(server.dsn)
    try:
        async with pgchan.AsyncClient(server.dsn) as client:
            both = [processes.begin(name, lease=10.0, takeover_grace=3.0, concurrency=2) for name in ("a", "b")]
            await asyncio.gather(*(process.tells("started", seconds=30) for process in both))
            handles = [await client.start("talk") for _ in range(4)]
            await asyncio.gather(*(process.tells("gate", "speak", times=2) for process in both))
            await asyncio.to_thread(server.restart, mode)
            for process in both:
                process.open("speak")
            assert [await handle.result(20) for handle in handles] == [3] * 4
            assert [(await handle.status()).attempt for handle in handles] == [1] * 4
            assert [await bodies(client, handle.id, "raw") for handle in handles] == [["a", "b", "c"]] * 4
            assert sum(len(process.told("executed")) for process in both) == 12
    finally:
        processes.close()


async def test_a_worker_that_cannot_reach_the_server_stops_its_runs_before_its_lease_ends(server: Cluster) -> None:
    processes = Processes(server.dsn)
    try:
        async with pgchan.AsyncClient(server.dsn) as client:
            first = await processes.start("first", lease=3.0)
            handle = await client.start("endless")
            await first.tells("hanging")
            stopped = time.monotonic()
            await asyncio.to_thread(server.stop, "immediate")
            assert await first.tells("cancelled") - stopped < 3.0
            await asyncio.to_thread(server.start)
            await first.tells("hanging", times=2)
            assert await handle.cancel()
    finally:
        processes.close()


# ------------------------------------------------------------------------------------------------ how fast


async def test_a_running_step_sees_a_signal_at_once(client: pgchan.AsyncClient, processes: Processes) -> None:
    first = await processes.start("first")
    handle = await client.start("ping")
    await first.tells("listening")
    took = []
    for n in range(30):
        sent = time.monotonic()
        await handle.signal(n)
        took.append(await first.tells("signal", n) - sent)
    await handle.signal("stop")
    assert await handle.result(10) == 30
    print(f"signal to running step: p50 {statistics.median(took) * 1000:.1f} ms, max {max(took) * 1000:.1f} ms")
    assert statistics.median(took) < 0.1


async def test_a_cancel_reaches_a_running_step(client: pgchan.AsyncClient, processes: Processes) -> None:
    first = await processes.start("first")
    handle = await client.start("endless")
    await first.tells("hanging")
    sent = time.monotonic()
    assert await handle.cancel()
    assert await first.tells("cancelled", handle.id) - sent < 0.5
    with pytest.raises(pgchan.RunCancelled):
        await handle.result(5)
    assert await handle.journal() == []
