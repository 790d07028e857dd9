"""The worker as a process: what it claims, how many at once, and how it leaves."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cluster import Cluster
from doors import query
from workers import Processes, Workers

import pgchan
from pgchan import errors
from pgchan.wakeups import SWEEP_SECONDS


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


class Crowd:
    """A workflow whose runs meet in one step, and how many of them were in it at once."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.most = 0
        self.total = 0
        self.gate = asyncio.Event()

        @pgchan.workflow
        async def meet(run: pgchan.Run) -> None:
            async def be_inside() -> None:
                assert run.id not in self.inside, "one run is executed twice at once"
                self.inside.append(run.id)
                self.total += 1
                self.most = max(self.most, len(self.inside))
                await self.gate.wait()
                self.inside.remove(run.id)

            await run.step(be_inside)

        self.meet = meet


@pytest.fixture
def crowd() -> Crowd:
    return Crowd()


# ------------------------------------------------------------------------------------------------ claiming


async def test_a_worker_executes_no_more_runs_at_once_than_it_may(
    client: pgchan.AsyncClient, workers: Workers, crowd: Crowd, wait_until: Callable[..., Any]
) -> None:
    worker = await workers.start(crowd.meet, concurrency=3)
    handles = [await client.start(crowd.meet) for _ in range(10)]
    await wait_until(lambda: crowd.most == 3)
    assert worker.running == 3
    assert len(await client.runs(state="scheduled")) == 7
    crowd.gate.set()
    for handle in handles:
        await handle.result(10)
    assert crowd.most == 3


async def test_two_workers_never_execute_one_run_at_once(
    client: pgchan.AsyncClient, workers: Workers, crowd: Crowd
) -> None:
    crowd.gate.set()
    await asyncio.gather(*(workers.start(crowd.meet, concurrency=7, name=f"w{n}") for n in range(3)))
    handles = await asyncio.gather(*(client.start(crowd.meet) for _ in range(150)))
    await asyncio.gather(*(handle.result(30) for handle in handles))
    assert crowd.total == 150
    assert {status.attempt for status in await client.runs(limit=200)} == {1}


async def test_a_worker_serves_its_queues_in_the_order_it_was_given_them(
    client: pgchan.AsyncClient, workers: Workers, crowd: Crowd
) -> None:
    crowd.gate.set()
    for queue in ("slow", "urgent", "elsewhere"):
        await client.start(crowd.meet, id=queue, queue=queue)
    await workers.start(crowd.meet, queues=["urgent", "slow"], concurrency=1)
    for run in ("urgent", "slow"):
        await client.run(run).result(10)
    urgent, slow, elsewhere = [await client.run(id).status() for id in ("urgent", "slow", "elsewhere")]
    assert urgent.started_at is not None and slow.started_at is not None and urgent.started_at < slow.started_at
    assert elsewhere.state == "scheduled"


async def test_an_idle_worker_is_told_of_work(client: pgchan.AsyncClient, workers: Workers, crowd: Crowd) -> None:
    crowd.gate.set()
    await workers.start(crowd.meet)
    took = []
    for _ in range(5):
        began = time.monotonic()
        await (await client.start(crowd.meet)).result(10)
        took.append(time.monotonic() - began)
    assert min(took) < 0.3  # by polling it would be half a second on average


async def test_several_workers_may_share_a_client(
    dsn: str, client: pgchan.AsyncClient, workers: Workers, crowd: Crowd
) -> None:
    crowd.gate.set()
    shared = pgchan.AsyncClient(dsn)
    first = await workers.start(crowd.meet, client=shared, name="first", queues=["a"])
    second = await workers.start(crowd.meet, client=shared, name="second", queues=["b"])
    assert first.id != second.id
    for queue in ("a", "b"):
        await (await client.start(crowd.meet, queue=queue)).result(10)
    assert [found.name for found in await client.workers()] == ["first", "second"]


# ------------------------------------------------------------------------------------------------ leaving


async def test_a_worker_that_is_stopped_lets_steps_finish_and_hands_the_rest_back(
    client: pgchan.AsyncClient, workers: Workers, dsn: str
) -> None:
    reached, gate, calls = asyncio.Event(), asyncio.Event(), []

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> str:
        async def first() -> None:
            calls.append("first")
            reached.set()
            await gate.wait()

        async def second() -> str:
            calls.append("second")
            return "done"

        await run.step(first)
        return await run.step(second)

    worker = await workers.start(flow, drain=10)
    handle = await client.start(flow)
    await reached.wait()
    stopping = asyncio.create_task(workers.stop(worker))
    worker.stop()
    other = await client.start(flow)
    gate.set()
    await stopping
    assert calls == ["first"]  # it has finished, and nothing was begun after it
    assert [m.key for m in await handle.journal()] == ["first"]
    assert [(await h.status()).state for h in (handle, other)] == ["scheduled", "scheduled"]
    assert await client.workers() == []
    await workers.start(flow)
    assert [await handle.result(10), await other.result(10)] == ["done", "done"]
    assert calls.count("first") == 2


async def test_a_worker_that_is_stopped_does_not_wait_for_what_only_waits(
    client: pgchan.AsyncClient, workers: Workers, wait_until: Callable[..., Any]
) -> None:
    @pgchan.workflow
    async def waits(run: pgchan.Run) -> None:
        await run.receive()

    worker = await workers.start(waits, drain=10, linger=10)
    await client.start(waits)
    await wait_until(lambda: worker.running == 1)
    began = time.monotonic()
    await workers.stop(worker)
    assert time.monotonic() - began < 3
    assert [status.state for status in await client.runs()] == ["scheduled"]


async def test_a_step_that_does_not_end_in_time_is_cancelled_and_its_run_handed_back(
    client: pgchan.AsyncClient, workers: Workers, crowd: Crowd, wait_until: Callable[..., Any]
) -> None:
    worker = await workers.start(crowd.meet, drain=0.2)
    handle = await client.start(crowd.meet)
    await wait_until(lambda: crowd.inside)
    await workers.stop(worker)
    status = await handle.status()
    assert (status.state, status.worker) == ("scheduled", None)
    assert await handle.journal() == []


async def test_a_worker_can_be_stopped_before_it_has_begun(dsn: str, crowd: Crowd) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        worker = pgchan.Worker(client, [crowd.meet])
        worker.stop()
        await asyncio.wait_for(worker.run(signals=False), 10)


async def test_sigterm_ends_the_process_in_good_order(
    dsn: str, client: pgchan.AsyncClient, processes: Processes
) -> None:
    process = await processes.start("first", drain=10.0)
    talking, waiting = await client.start("talk"), await client.start("ping")
    await process.tells("gate", "speak")
    await process.tells("listening")
    process.send(signal.SIGTERM)
    await waiting.signal("stop")
    process.open("speak")
    assert await process.exits() == 0
    assert [m.key for m in await talking.journal()] == ["before", "speak"]
    assert [m.key for m in await waiting.journal()] == ["listen"]
    assert {status.state for status in await client.runs()} <= {"scheduled", "succeeded"}
    assert query(dsn, "select from pgchan.workers") == []


async def test_a_thread_that_does_not_come_back_does_not_keep_the_process(
    client: pgchan.AsyncClient, processes: Processes
) -> None:
    process = await processes.start("first", drain=0.2)
    handle = await client.start("stubborn")
    await process.tells("hanging")
    process.send(signal.SIGTERM)
    assert await process.exits(10) == 0
    assert (await handle.status()).state == "scheduled"


# ------------------------------------------------------------------------------------------------ staying alive


async def test_a_blocked_event_loop_does_not_look_dead(
    client: pgchan.AsyncClient, processes: Processes, workers: Workers
) -> None:
    process = await processes.start("first", lease=1.0)
    handle = await client.start("blocks", 2.5)  # far past the lease
    await process.tells("blocking")
    await workers.start(lease=1.0)
    assert await handle.result(15) == "done"
    assert (await handle.status()).attempt == 1
    assert len(process.told("blocking")) == 1


async def test_a_worker_that_cannot_register_says_why(workers: Workers, crowd: Crowd, empty_dsn: str) -> None:
    with pytest.raises(errors.SchemaMismatch, match="pgchan migrate"):
        await Workers(empty_dsn).start(crowd.meet)


async def test_a_run_that_this_worker_claims_again_while_its_last_attempt_still_ends_is_kept_apart(
    client: pgchan.AsyncClient, workers: Workers, wait_until: Callable[..., Any]
) -> None:
    cleaning = asyncio.Event()

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> list[Any]:
        try:
            first = await run.receive()
        finally:
            if run.attempt == 1:
                await cleaning.wait()
        second = await run.receive()
        assert first is not None and second is not None
        return [first.body, second.body]

    worker = await workers.start(flow, linger=0.05)
    handle = await client.start(flow)

    async def is_waiting() -> bool:
        return (await handle.status()).state == "waiting"

    await wait_until(is_waiting)
    assert worker.running == 1  # its first attempt is still cleaning up
    await handle.signal("a")

    async def is_again() -> bool:
        return bool(await handle.journal())

    await wait_until(is_again)
    cleaning.set()
    await handle.signal("b")
    assert await handle.result(5) == ["a", "b"]
    await wait_until(lambda: worker.running == 0)


async def test_a_worker_that_cannot_connect_yet_can_be_stopped() -> None:
    client = pgchan.AsyncClient("postgresql://me@127.0.0.1:1/nowhere", timeout=60)

    @pgchan.workflow
    async def nothing(run: pgchan.Run) -> None: ...

    worker = pgchan.Worker(client, [nothing])
    task = asyncio.create_task(worker.run(signals=False))
    await asyncio.sleep(0)
    worker.stop()
    await asyncio.wait_for(task, 5)
    await client.close()


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in a step"])
async def test_a_worker_that_is_stopped_while_the_database_is_away_ends_soon_after_its_drain(
    server: Cluster, is_busy: bool
) -> None:
    inside = asyncio.Event()

    @pgchan.workflow
    async def work(run: pgchan.Run) -> str:
        async def hang() -> str:
            inside.set()
            if is_busy and run.attempt == 1:
                await asyncio.Event().wait()
            return "done"

        return await run.step(hang)

    async with pgchan.AsyncClient(server.dsn) as client:
        worker = pgchan.Worker(client, [work], lease=3.0, takeover_grace=0.3, drain=0.5)
        working = asyncio.create_task(worker.run(signals=False))
        handle = await client.start(work)
        await asyncio.wait_for(inside.wait(), 10) if is_busy else await handle.result(10)
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(2 * SWEEP_SECONDS)  # by then it claims, and would try to for as long as it is patient
        began = time.monotonic()
        worker.stop()
        await working
        assert time.monotonic() - began < 8
        await asyncio.to_thread(server.start)
        workers = Workers(server.dsn)
        await workers.start(work)
        assert await handle.result(20) == "done"
        await workers.close()


async def test_what_is_wrong_between_code_and_database_does_not_fail_a_run(
    client: pgchan.AsyncClient, dsn: str, workers: Workers, crowd: Crowd, wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its end cannot be recorded for a while, as in the middle of a deploy that goes wrong."""
    await workers.start(crowd.meet)
    handle = await client.start(crowd.meet)
    await wait_until(lambda: crowd.inside)
    query(dsn, "alter routine pgchan.call_finish rename to call_finish_later")
    crowd.gate.set()
    attempts = "select attempt from pgchan.runs"
    await wait_until(lambda: query(dsn, attempts)[0][0] > 2)
    assert (await handle.status()).state in ("scheduled", "running")
    assert "run: pgchan migrate; it goes back" in caplog.text
    query(dsn, "alter routine pgchan.call_finish_later rename to call_finish")
    assert await handle.result(10) is None
    assert crowd.total == 1
