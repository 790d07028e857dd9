"""One attempt and the database: answers that are lost, writes that must not be parted, and who owns the run by then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from doors import query
from proxy import Proxy
from workers import Workers

import pgchan
from pgchan.db import Entry
from pgchan.wakeups import LISTEN_NAMES
from pgchan.writer import Batch, Queued


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


@pytest.fixture
async def proxy(direct_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(direct_dsn) as proxy:  # what it cuts is the server's connection, not that of a pooler
        yield proxy


@pgchan.workflow
async def child(run: pgchan.Run, word: str) -> str:
    return word


@pgchan.workflow
async def everything(run: pgchan.Run, calls: list[str]) -> Any:
    """All that an attempt writes, once; bodies by which a test recognises what it is about."""
    executed.append("run")

    async def speak() -> str:
        executed.append("speak")
        for n in range(3):
            await run.publish(f"output {n}", wait=n == 1)
        signal = await run.receive()
        assert signal is not None
        return f"result of {signal.body}"

    await run.publish("in the body")
    first = await run.step(speak)
    async with run.transaction("rows") as connection:
        await connection.execute("insert into ledger values (1)")
        await run.publish("with the rows")
    second = await (await run.start(child, "word for the child")).result()
    third = await run.receive()
    assert third is not None
    return [first, second, third.body, "the very end"]


executed: list[str] = []

ANSWERS = {
    "the claim": b"pgchan.claim(",
    "a message of the body": b"in the body",
    "output": b"output 1",
    "a result": b"result of",
    "a commit": b"COMMIT;",
    "the start of a child": b"word for the child",
    "leaving memory": b"pgchan.suspend(",
    "the end": b"the very end",
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_lost_answer_repeats_and_loses_nothing(
    answer: str, dsn: str, client: pgchan.AsyncClient, proxy: Proxy, workers: Workers, wait_until: Callable[..., Any]
) -> None:
    query(dsn, "create table ledger (n int)")
    executed.clear()
    handle = await client.start(everything, [])
    await handle.signal("hello")
    proxy.swallow(ANSWERS[answer])
    await workers.start(everything, child, client=pgchan.AsyncClient(proxy.dsn), linger=0.05, lease=10.0)

    async def is_waiting() -> bool:
        return (await handle.status()).state == "waiting" or proxy.swallowed == 1

    await wait_until(is_waiting)
    await handle.signal("bye")
    assert await handle.result(15) == ["result of hello", "word for the child", "bye", "the very end"]
    await wait_until(lambda: proxy.swallowed == 1)  # the result may be seen before the proxy has seen the answer
    messages = await handle.channel.read(view="raw", limit=1000)
    assert [m.body for m in messages if m.kind == "message"] == [
        "in the body", "output 0", "output 1", "output 2", "with the rows",
    ]  # fmt: skip
    consumed = [m.body["signal"] for m in messages if m.kind == "control" and m.body["type"] == "consumed"]
    assert consumed == [m.position for m in messages if m.kind == "signal"]
    assert [m.key for m in await handle.journal()] == ["speak", "rows", "start", "result", "receive"]
    assert query(dsn, "select n from ledger") == [(1,)]
    assert executed.count("speak") == 1
    assert len(await client.runs(workflow="child")) == 1


async def test_what_others_publish_on_the_channel_is_not_taken_for_a_batch_that_was_lost(
    client: pgchan.AsyncClient,
) -> None:
    handle = await client.start(child, "x")
    await handle.channel.publish("from outside", key="k")  # which also connects the writer
    await handle.signal("a signal", key="s")
    writer = client._db.writer
    ((id,),) = query(client.dsn, "select id from pgchan.channels where name = %s", handle.id)
    writer.heads[id] = 0
    batch = Batch()
    batch.add(Queued(Entry(handle.id, b"1", channel_id=id, step="s", attempt=1, fence=0, owner=7), None, 1e9))
    assert await writer._look_for(batch, None) == {}


async def test_what_a_later_owner_wrote_is_not_taken_for_a_batch_that_was_lost(client: pgchan.AsyncClient) -> None:
    handle = await client.start(child, "x")
    writer = client._db.writer
    ((id,),) = query(client.dsn, "select id from pgchan.channels where name = %s", handle.id)
    entry = Entry(handle.id, b"1", channel_id=id, step="s", attempt=1, fence=0, owner=7)
    batch = Batch()
    batch.add(Queued(entry, None, 1e9))
    await client._db.append(entry)
    query(client.dsn, "update pgchan.channels set epoch = 1 where id = %s", id)
    writer.heads[id] = 0
    assert await writer._look_for(batch, None) is None


async def test_a_signal_is_consumed_in_the_commit_of_the_result_however_full_a_batch_is(
    dsn: str, client: pgchan.AsyncClient, workers: Workers
) -> None:
    @pgchan.workflow
    async def flow(run: pgchan.Run) -> int:
        async def take() -> None:
            for n in range(998):  # with these, two signals and the record do not fit into one batch
                await run.publish(n, wait=False)
            await run.receive()
            await run.receive()

        await run.step(take)
        return 0

    handle = await client.start(flow)
    await handle.signal(1)
    await handle.signal(2)
    await workers.start(flow)
    await handle.result(10)
    keys = ["take", "pgchan:consumed:1", "pgchan:consumed:2"]
    assert len(query(dsn, "select distinct xmin::text from pgchan.messages where key = any (%s)", keys)) == 1


async def test_a_run_whose_database_stays_away_goes_back_and_is_not_failed(
    client: pgchan.AsyncClient, proxy: Proxy, workers: Workers, wait_until: Callable[..., Any]
) -> None:
    reached, gate = asyncio.Event(), asyncio.Event()

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> str:
        async def work() -> str:
            reached.set()
            await gate.wait()
            await run.publish("said", wait=False)
            return "done"

        return await run.step(work)

    cut_off = pgchan.AsyncClient(proxy.dsn, control_dsn=proxy.dsn, timeout=0.3)
    await workers.start(flow, client=cut_off, lease=2.0)
    handle = await client.start(flow)
    await reached.wait()
    proxy.silence()
    proxy.cut()
    gate.set()

    async def is_taken_from_it() -> bool:
        return (await handle.status()).attempt > 1

    await workers.start(flow, lease=2.0)
    await wait_until(is_taken_from_it)
    proxy.silence(False)
    assert await handle.result(10) == "done"
    assert [m.body for m in await handle.channel.read() if m.kind == "message"] == ["said"]


@pgchan.workflow
async def silent(run: pgchan.Run, steps: int, word: str | None = None) -> None:
    """Steps, of which each says a word, or none does."""
    for _ in range(steps):
        await run.step(say, run, word)
    async with run.transaction("rows"):
        if word is not None:
            await run.publish("committed")


async def say(run: pgchan.Run, word: str | None) -> None:
    """The step."""
    if word is not None:
        await run.publish(word)


async def test_channels_are_announced_and_journals_are_not(
    client: pgchan.AsyncClient, dsn: str, direct_dsn: str, workers: Workers
) -> None:
    """Nobody can follow a journal; a hint for each step would wake every process that listens to anything."""
    await workers.start(silent)
    with psycopg.connect(direct_dsn, autocommit=True) as listener:
        for name in LISTEN_NAMES[:-2]:
            listener.execute(f"listen {name}")
        handles = [await client.start(silent, 5, word) for word in (None, "spoken", None, "spoken")]
        await asyncio.gather(*(handle.result(timeout=20) for handle in handles))
        hints = [hint for notify in listener.notifies(timeout=1.0) for hint in notify.payload.split(",")]
    heard = {int(hint.partition(":")[0]) for hint in hints}
    rows = query(dsn, "select name, c.id, journal_id from pgchan.runs r join pgchan.channels c on c.id = channel_id")
    assert heard == {channel_id for _, channel_id, _ in rows}
    ids = {name: channel_id for name, channel_id, _ in rows}
    for handle, words in zip(handles, (0, 6, 0, 6), strict=True):
        # What is written together is announced together; its last word is announced in any case, and its end.
        told = [hint for hint in hints if hint.startswith(f"{ids[handle.id]}:")]
        assert f"{ids[handle.id]}:-1" in told
        assert (f"{ids[handle.id]}:{words}" in told) == (words > 0)
