"""defer=True: what a Session has to say is written just before it commits, and dropped with what it belongs to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from doors import Door, Reading
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from ways import SESSIONS, WAYS, Caller, async_engine

import pgchan
from pgchan import errors

WAKEUP_SECONDS = 0.8  # less than a sweep: whoever is this fast was woken


@pytest.fixture(params=SESSIONS)
async def deferring(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[tuple[Any, Any, Caller]]:
    """A client, a function that defers a publish to channel "c", and the caller's Session."""
    kind, way = SESSIONS[request.param]
    door = Door(kind, dsn)
    client = door.client()
    async with way(dsn) as caller:

        async def defer(body: Any, name: str = "c", **options: Any) -> None:
            assert await client.channel(name).publish(body, connection=caller.connection, defer=True, **options) is None

        yield client, defer, caller
    await door.close()


async def within(caller: Caller, function: Callable[[Session], Any]) -> Any:
    """Run blocking Session code, in the greenlet that an AsyncSession needs for it."""
    if isinstance(caller.connection, AsyncSession):
        return await caller.connection.run_sync(function)
    return function(caller.connection)


async def test_deferred_messages_are_written_by_the_commit(
    deferring: tuple[Any, Any, Caller], dsn: str, reading: Callable[[Any], Reading]
) -> None:
    client, defer, caller = deferring
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish(0)
    await reader.has(1)
    for body in (1, 2):
        await defer(body)
    await defer("other", "b/other")
    await caller.select()
    await client.channel("c").publish("not blocked")
    await caller.commit()
    await reader.has(4, WAKEUP_SECONDS)
    assert reader.bodies == [0, "not blocked", 1, 2]
    assert [m.body for m in await client.channel("b/other").read()] == ["other"]
    await caller.commit()
    assert (await client.channel("c").info()).head == 4


async def test_deferred_messages_are_dropped_by_a_rollback_and_a_close(deferring: tuple[Any, Any, Caller]) -> None:
    client, defer, caller = deferring
    await defer("rolled back")
    await caller.rollback()
    await defer("closed")
    await within(caller, lambda session: session.close())
    await caller.commit()
    await defer("kept")
    await caller.commit()
    assert [m.body for m in await client.channel("c").read()] == ["kept"]


async def test_deferred_messages_respect_savepoints(deferring: tuple[Any, Any, Caller]) -> None:
    client, defer, caller = deferring
    await defer(1)
    outer = await within(caller, lambda session: session.begin_nested())
    await defer(2)
    inner = await within(caller, lambda session: session.begin_nested())
    await defer("gone")
    await within(caller, lambda _: inner.rollback())
    await defer(3)
    await within(caller, lambda _: outer.commit())
    assert await client.channel("c").read() == []
    lost = await within(caller, lambda session: session.begin_nested())
    inside = await within(caller, lambda session: session.begin_nested())
    await defer("gone too")
    await within(caller, lambda _: inside.commit())
    await within(caller, lambda _: lost.rollback())
    await caller.commit()
    assert [m.body for m in await client.channel("c").read()] == [1, 2, 3]


async def test_deferred_messages_are_written_with_a_savepoint_still_open(deferring: tuple[Any, Any, Caller]) -> None:
    client, defer, caller = deferring
    root = await within(caller, lambda session: session.begin())
    await within(caller, lambda session: session.begin_nested())
    await defer(1)
    await within(caller, lambda _: root.commit())
    await within(caller, lambda session: session.begin_nested())
    await defer(2)
    await caller.commit()
    assert [m.body for m in await client.channel("c").read()] == [1, 2]


async def test_a_refusal_of_what_was_deferred_is_raised_by_the_commit(deferring: tuple[Any, Any, Caller]) -> None:
    client, defer, caller = deferring
    await client.channel("c").publish("first", key="k")
    await client.channel("closed").create()
    await client.channel("closed").close()
    for body, name, key, error in (
        ("other", "c", "k", errors.IdempotencyConflict), (1, "closed", None, errors.ChannelClosed)
    ):  # fmt: skip
        await defer(1)
        await defer(body, name, key=key)
        with pytest.raises(error):
            await caller.commit()
        await caller.rollback()
    await defer("first", key="k")
    await caller.commit()
    assert (await client.channel("c").info()).head == 1
    with pytest.raises(errors.InvalidInput):
        await defer(float("nan"))


async def test_runs_and_signals_can_be_deferred_too(deferring: tuple[Any, Any, Caller]) -> None:
    client, _, caller = deferring
    handle = await client.start("work", "x", id="job/1", connection=caller.connection, defer=True)
    assert handle.id == "job/1"
    with pytest.raises(errors.RunNotFound):
        await handle.status()
    await caller.commit()
    assert (await handle.status()).state == "scheduled"
    assert await handle.signal(1, connection=caller.connection, defer=True) is None
    assert await handle.channel.read() == []
    await caller.commit()
    assert [m.kind for m in await handle.channel.read()] == ["signal"]
    await client.start("work", "y", id="job/1", connection=caller.connection, defer=True)
    with pytest.raises(errors.RunConflict):
        await caller.commit()


async def test_a_failed_flush_keeps_what_was_deferred_out(deferring: tuple[Any, Any, Caller]) -> None:
    client, defer, caller = deferring
    await defer("gone")
    with pytest.raises(sa.exc.ProgrammingError):
        await within(caller, lambda session: session.execute(sa.text("select from nowhere")))
    await caller.rollback()
    await defer("kept")
    await caller.commit()
    assert [m.body for m in await client.channel("c").read()] == ["kept"]


async def test_two_sessions_that_defer_in_opposite_order_do_not_deadlock(dsn: str) -> None:
    engine = async_engine(dsn, "asyncpg")
    async with pgchan.AsyncClient(dsn) as client:
        await client.channel("a").create()
        await client.channel("b").create()

        async def work(order: str) -> None:
            for _ in range(25):
                async with AsyncSession(engine) as session, session.begin():
                    for name in order:
                        await client.channel(name).publish(name, connection=session, defer=True)

        async with asyncio.timeout(20):
            await asyncio.gather(work("ab"), work("ba"), work("ab"), work("ba"))
        assert [(await client.channel(name).info()).head for name in "ab"] == [100, 100]
    await engine.dispose()


@pytest.mark.parametrize("way", [name for name in WAYS if "Session" not in name and WAYS[name][0] == "async"])
async def test_other_connections_cannot_defer(dsn: str, way: str) -> None:
    async with WAYS[way][1](dsn) as caller, pgchan.AsyncClient(dsn) as client:
        for refused in (
            client.channel("c").publish(1, connection=caller.connection, defer=True),
            client.start("work", connection=caller.connection, defer=True),
            client.run("r").signal(1, connection=caller.connection, defer=True),
            client.channel("c").publish(1, defer=True),
        ):
            with pytest.raises(errors.InvalidInput, match=re.escape("defer=True takes a SQLAlchemy Session")):
                await refused
