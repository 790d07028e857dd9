"""Writing in the caller's own transaction, on whatever connection: there with its commit, gone with its rollback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy as sa
from doors import Door, Reading, query
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from ways import WAYS, Caller, async_engine, url

import pgchan
from pgchan import callers, errors

WAKEUP_SECONDS = 0.8  # less than a sweep: whoever is this fast was woken


@pytest.fixture(params=WAYS)
async def both(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[tuple[Any, Caller]]:
    """A client, and an open transaction of its caller."""
    kind, way = WAYS[request.param]
    door = Door(kind, dsn)
    async with way(dsn) as caller:
        yield door.client(), caller
    await door.close()


# ------------------------------------------------------------------------------------------------ every connection


async def test_it_is_there_and_announced_when_the_caller_commits(
    both: tuple[Any, Caller], dsn: str, reading: Callable[[Any], Reading]
) -> None:
    client, caller = both
    reader = reading(client.channel("mine").tail())
    await client.channel("mine").publish("first")
    await reader.has(1)
    message = await client.channel("mine").publish("second", key="k", connection=caller.connection)
    more = await client.channel("mine").publish_many(["third", "fourth"], connection=caller.connection)
    assert (message.position, message.body, message.key) == (2, "second", "k")
    assert [one.position for one in more] == [3, 4]
    assert query(dsn, "select head from pgchan.channels") == [(1,)]
    await caller.commit()
    await reader.has(4, WAKEUP_SECONDS)
    assert reader.messages[1:] == [message, *more]


async def test_a_rollback_leaves_nothing_and_no_hole(both: tuple[Any, Caller], dsn: str) -> None:
    client, caller = both
    await client.channel("mine").publish("kept")
    await client.channel("mine").publish("gone", key="k", connection=caller.connection)
    await client.channel("new").publish_many(["gone"] * 3, connection=caller.connection)
    await client.start("work", 1, id="gone/run", connection=caller.connection)
    await caller.rollback()
    assert (await client.channel("mine").publish("next", key="k")).position == 2
    assert query(dsn, "select name from pgchan.channels") == [("mine",)]
    assert query(dsn, "select count(*) from pgchan.runs") == [(0,)]


async def test_a_refused_entry_leaves_the_transaction_usable(both: tuple[Any, Caller]) -> None:
    client, caller = both
    await client.channel("closed").create()
    await client.channel("closed").close()
    await client.channel("mine").publish("first", key="k")
    with pytest.raises(errors.ChannelClosed):
        await client.channel("closed").publish(1, connection=caller.connection)
    with pytest.raises(errors.IdempotencyConflict):
        await client.channel("mine").publish("other", key="k", connection=caller.connection)
    with pytest.raises(errors.IdempotencyConflict):
        await client.channel("mine").publish_many(["a", "b"], keys=[None, "k"], connection=caller.connection)
    with pytest.raises(errors.RunNotFound):
        await client.run("nobody").signal(1, connection=caller.connection)
    await caller.select()
    assert (await client.channel("mine").publish("first", key="k", connection=caller.connection)).position == 1
    await client.channel("mine").publish("second", connection=caller.connection)
    await caller.commit()
    assert [message.body for message in await client.channel("mine").read()] == ["first", "second"]


async def test_a_run_is_started_and_signalled_with_the_callers_commit(both: tuple[Any, Caller], dsn: str) -> None:
    client, caller = both
    handle = await client.start("work", "x", id="job/1", connection=caller.connection)
    signal = await handle.signal({"go": True}, key="s", connection=caller.connection)
    assert (handle.created, signal.kind, signal.position) == (True, "signal", 1)
    assert query(dsn, "select count(*) from pgchan.runs") == [(0,)]
    await caller.commit()
    assert (await client.run("job/1").status()).state == "scheduled"
    assert [message.body for message in await handle.channel.read()] == [{"go": True}]
    with pytest.raises(errors.RunConflict):
        await client.start("work", "y", id="job/1", connection=caller.connection)
    assert not (await client.start("work", "x", id="job/1", connection=caller.connection)).created


async def test_a_large_batch_is_one_unit_in_the_callers_transaction(both: tuple[Any, Caller]) -> None:
    client, caller = both
    await client.channel("mine").publish("taken", key="last")
    keys = [*(f"k{n}" for n in range(1499)), "last"]
    with pytest.raises(errors.IdempotencyConflict):
        await client.channel("mine").publish_many(list(range(1500)), keys=keys, connection=caller.connection)
    stored = await client.channel("mine").publish_many(list(range(1500)), connection=caller.connection)
    await caller.commit()
    assert stored[-1].position == (await client.channel("mine").info()).head == 1501


# ------------------------------------------------------------------------------------------------ what is refused


async def test_a_connection_that_cannot_be_used_is_invalid_input(dsn: str) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        channel = client.channel("c")
        closed = await asyncpg.connect(dsn)
        await closed.close()
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            async with pool.acquire() as returned:
                pass
            gone = psycopg.connect(dsn)
            gone.close()
            engine = sa.create_engine(url(dsn, "psycopg"))
            with engine.connect() as ended:
                pass
            bare = psycopg2.connect(dsn)  # of a driver that only SQLAlchemy speaks to
            bare.close()
            sqlite = sa.create_engine("sqlite://")
            with sqlite.connect() as other:
                unusable = (closed, returned, pool, gone, ended, bare, other, engine, sqlite, "connection", object(), 1)
                for bad in unusable:
                    with pytest.raises(errors.InvalidInput, match="connection"):
                        await channel.publish(1, connection=bad)
            engine.dispose()
            sqlite.dispose()
        assert await channel.read() == []


async def test_the_blocking_door_refuses_what_needs_an_event_loop(dsn: str) -> None:
    class Subclass(AsyncSession):
        pass

    engine = async_engine(dsn, "asyncpg")
    connection = await asyncpg.connect(dsn)
    async with Subclass(engine) as session:
        for bad in (session, connection, engine.connect()):
            with pytest.raises(errors.InvalidInput, match="AsyncClient"):
                callers.blocking(bad)
    await connection.close()
    await engine.dispose()


async def test_subclasses_of_the_users_own_are_recognised(dsn: str) -> None:
    class Mine(psycopg.Connection[Any]):
        pass

    class MySession(Session):
        pass

    async with pgchan.AsyncClient(dsn) as client:
        with Mine.connect(dsn) as connection:
            await client.channel("c").publish(1, connection=connection)
        engine = sa.create_engine(url(dsn, "psycopg"))
        with MySession(engine) as session, session.begin():
            await client.channel("c").publish(2, connection=session)
        engine.dispose()
        assert [message.body for message in await client.channel("c").read()] == [1, 2]


async def test_errors_of_the_driver_pass_through(dsn: str) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        connection = await asyncpg.connect(dsn)
        transaction = connection.transaction()
        await transaction.start()
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.execute("select from nowhere")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await client.channel("c").publish(1, connection=connection)
        await transaction.rollback()
        await connection.close()
        with psycopg.connect(dsn) as blocking:
            with pytest.raises(psycopg.errors.UndefinedTable):
                blocking.execute("select from nowhere")
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                await client.channel("c").publish(1, connection=blocking)
            blocking.rollback()


@pytest.mark.parametrize("exists", [True, False], ids=["existing channel", "new channel"])
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_under_repeatable_read_a_race_is_a_retryable_error(dsn: str, isolation: str, exists: bool) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        if exists:
            await client.channel("c").publish("before")
        with psycopg.connect(dsn) as connection:
            connection.execute(f"set transaction isolation level {isolation}".encode())
            connection.execute("select 1 from pgchan.channels")
            await client.channel("c").publish("meanwhile")
            with pytest.raises(psycopg.errors.SerializationFailure):
                await client.channel("c").publish("late", connection=connection)
            connection.rollback()
            connection.execute(f"set transaction isolation level {isolation}".encode())
            await client.channel("c").publish("again", connection=connection)
        assert (await client.channel("c").read())[-1].body == "again"


async def test_the_callers_transaction_becomes_durable_whatever_it_said(dsn: str) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        with psycopg.connect(dsn) as connection:
            for weak in ("off", "local", "remote_write", "remote_apply"):
                then = "remote_apply" if weak == "remote_apply" else "on"
                connection.execute(f"set synchronous_commit = {weak}".encode())
                connection.commit()
                await client.channel("c").publish(1, connection=connection)
                assert connection.execute("show synchronous_commit").fetchone() == (then,)
                connection.commit()
                assert connection.execute("show synchronous_commit").fetchone() == (weak,)


async def test_savepoints_of_a_session_neither_lose_nor_hasten_the_wakeup(
    dsn: str, reading: Callable[[Any], Reading]
) -> None:
    engine = sa.create_engine(url(dsn, "psycopg"))
    async with pgchan.AsyncClient(dsn) as client:
        reader = reading(client.channel("c").tail())
        await client.channel("c").publish(0)
        await reader.has(1)
        with Session(engine) as session, session.begin():
            with session.begin_nested():
                await client.channel("c").publish(1, connection=session)
            savepoint = session.begin_nested()
            await client.channel("c").publish("gone", connection=session)
            savepoint.rollback()
        await reader.has(2, WAKEUP_SECONDS)
        assert reader.bodies == [0, 1]
    engine.dispose()
