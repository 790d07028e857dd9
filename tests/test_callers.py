"""Writing in the caller's own transaction, on whatever connection: there with its commit, gone with its rollback."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from doors import Door, Reading, query
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import pgchan
from pgchan import callers, errors

WAKEUP_SECONDS = 0.8  # less than a sweep: whoever is this fast was woken


@dataclass
class Caller:
    """An open transaction of the caller's. select: proves that it can go on."""

    connection: Any
    commit: Callable[[], Awaitable[Any]]
    rollback: Callable[[], Awaitable[Any]]
    select: Callable[[], Awaitable[Any]]


def awaitable(function: Callable[..., Any], *args: Any) -> Callable[[], Awaitable[Any]]:
    async def call() -> Any:
        return function(*args)

    return call


def url(dsn: str, driver: str) -> str:
    return dsn.replace("postgresql://", f"postgresql+{driver}://")


@asynccontextmanager
async def by_asyncpg(dsn: str) -> AsyncIterator[Caller]:
    connection = await asyncpg.connect(dsn)
    transaction = connection.transaction()
    await transaction.start()
    yield Caller(connection, transaction.commit, transaction.rollback, lambda: connection.fetchval("select 1"))
    await connection.close()


@asynccontextmanager
async def by_asyncpg_pool(dsn: str) -> AsyncIterator[Caller]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        yield Caller(connection, transaction.commit, transaction.rollback, lambda: connection.fetchval("select 1"))


@asynccontextmanager
async def by_psycopg(dsn: str) -> AsyncIterator[Caller]:
    connection = psycopg.connect(dsn)
    select = awaitable(lambda: connection.execute("select 1").fetchone())
    yield Caller(connection, awaitable(connection.commit), awaitable(connection.rollback), select)
    connection.close()


@asynccontextmanager
async def by_async_psycopg(dsn: str) -> AsyncIterator[Caller]:
    connection = await psycopg.AsyncConnection.connect(dsn)
    yield Caller(connection, connection.commit, connection.rollback, lambda: connection.execute("select 1"))
    await connection.close()


@asynccontextmanager
async def by_session(dsn: str) -> AsyncIterator[Caller]:
    engine = sa.create_engine(url(dsn, "psycopg"))
    with Session(engine) as session:
        select = awaitable(lambda: session.execute(sa.text("select 1")).all())
        yield Caller(session, awaitable(session.commit), awaitable(session.rollback), select)
    engine.dispose()


@asynccontextmanager
async def by_connection(dsn: str) -> AsyncIterator[Caller]:
    engine = sa.create_engine(url(dsn, "psycopg"))
    with engine.connect() as connection:
        select = awaitable(lambda: connection.execute(sa.text("select 1")).all())
        yield Caller(connection, awaitable(connection.commit), awaitable(connection.rollback), select)
    engine.dispose()


def by_async_session(driver: str) -> Any:
    @asynccontextmanager
    async def open_session(dsn: str) -> AsyncIterator[Caller]:
        engine = create_async_engine(url(dsn, driver))
        async with AsyncSession(engine) as session:
            yield Caller(session, session.commit, session.rollback, lambda: session.execute(sa.text("select 1")))
        await engine.dispose()

    return open_session


def by_async_connection(driver: str) -> Any:
    @asynccontextmanager
    async def open_connection(dsn: str) -> AsyncIterator[Caller]:
        engine = create_async_engine(url(dsn, driver))
        async with engine.connect() as connection:
            select = lambda: connection.execute(sa.text("select 1"))  # noqa: E731
            yield Caller(connection, connection.commit, connection.rollback, select)
        await engine.dispose()

    return open_connection


WAYS: dict[str, tuple[str, Any]] = {
    "asyncpg": ("async", by_asyncpg),
    "asyncpg pool": ("async", by_asyncpg_pool),
    "async psycopg": ("async", by_async_psycopg),
    "psycopg in async code": ("async", by_psycopg),
    "AsyncSession on asyncpg": ("async", by_async_session("asyncpg")),
    "AsyncSession on psycopg": ("async", by_async_session("psycopg")),
    "AsyncConnection on asyncpg": ("async", by_async_connection("asyncpg")),
    "AsyncConnection on psycopg": ("async", by_async_connection("psycopg")),
    "psycopg": ("blocking", by_psycopg),
    "Session": ("blocking", by_session),
    "Connection": ("blocking", by_connection),
}


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
            sqlite = sa.create_engine("sqlite://")
            with sqlite.connect() as other:
                for bad in (closed, returned, pool, gone, ended, other, engine, sqlite, "connection", object(), 1):
                    with pytest.raises(errors.InvalidInput, match="connection"):
                        await channel.publish(1, connection=bad)
            engine.dispose()
            sqlite.dispose()
        assert await channel.read() == []


async def test_the_blocking_door_refuses_what_needs_an_event_loop(dsn: str) -> None:
    class Subclass(AsyncSession):
        pass

    engine = create_async_engine(url(dsn, "asyncpg"))
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


# ------------------------------------------------------------------------------------------------ defer=True

SESSIONS = {
    "Session": ("blocking", by_session),
    "Session in async code": ("async", by_session),
    "AsyncSession on asyncpg": ("async", by_async_session("asyncpg")),
    "AsyncSession on psycopg": ("async", by_async_session("psycopg")),
}


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


def plain(caller: Caller) -> Session:
    session: Session = getattr(caller.connection, "sync_session", caller.connection)
    return session


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
    engine = create_async_engine(url(dsn, "asyncpg"))
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
