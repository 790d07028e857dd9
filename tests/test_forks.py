"""Runs that go on from another's record, and runs that begin anew under the same id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import pgchan
from pgchan import errors

executed: list[str] = []


async def read(topic: str) -> str:
    executed.append("read")
    return f"about {topic}"


async def write(text: str) -> str:
    executed.append("write")
    return f"written {text}"


@pgchan.workflow
async def report(run: pgchan.Run, topic: str) -> str:
    return await run.step(write, await run.step(read, topic))


@pgchan.workflow
async def counting(run: pgchan.Run, n: int) -> int:
    await run.publish({"n": n})
    signal = await run.receive(timeout=0.0)
    if n < 3:
        await run.continue_as(n + 1)
    return n if signal is None else int(signal.body)


@pgchan.workflow
def counting_in_a_thread(run: Any, n: int) -> int:
    if n < 3:
        run.continue_as(n + 1)
    return n


@pytest.fixture
async def working(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    executed.clear()
    async with pgchan.AsyncClient(dsn) as client:
        worker = pgchan.Worker(client, [report, counting, counting_in_a_thread], drain=1.0)
        task = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        yield client
        worker.stop()
        await task


async def test_a_fork_executes_only_what_comes_from_its_step_on(working: pgchan.AsyncClient) -> None:
    first = await working.start(report, "tides")
    assert await first.result(10) == "written about tides"
    fork = await first.fork("write")
    assert await fork.result(10) == "written about tides"
    assert executed == ["read", "write", "write"]
    assert [message.key for message in await fork.journal()] == ["read", "write"]


async def test_forking_to_the_same_id_again_returns_the_same_run(working: pgchan.AsyncClient) -> None:
    first = await working.start(report, "tides")
    await first.result(10)
    one, two = await first.fork("write", id="fork/1"), await first.fork("write", id="fork/1")
    assert (one.id, one.created, two.id, two.created) == ("fork/1", True, "fork/1", False)


async def test_a_fork_of_what_is_not_there_is_refused(working: pgchan.AsyncClient) -> None:
    first = await working.start(report, "tides")
    await first.result(10)
    with pytest.raises(errors.InvalidInput):
        await first.fork("no such step")
    with pytest.raises(errors.RunNotFound):
        await working.run("nobody").fork("write")


async def test_a_run_continues_as_itself_with_an_empty_journal(working: pgchan.AsyncClient) -> None:
    handle = await working.start(counting, 1)
    assert await handle.result(10) == 3
    said = [message.body for message in await handle.channel.read() if message.kind == "message"]
    assert said == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [message.key for message in await handle.journal()] == ["receive"]


async def test_a_workflow_in_a_thread_continues_too(working: pgchan.AsyncClient) -> None:
    assert await (await working.start(counting_in_a_thread, 1)).result(10) == 3
