"""Every kind of connection that a caller may bring, each with an open transaction."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session


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


# What asyncpg, and SQLAlchemy above it, must be told behind a transaction pooler: prepared statements stay where they
# were made, and the next statement may go elsewhere.
IS_POOLED = bool(os.environ.get("PGCHAN_TEST_POOLER"))
UNPREPARED: dict[str, Any] = {"statement_cache_size": 0} if IS_POOLED else {}


def async_engine(dsn: str, driver: str) -> AsyncEngine:
    options: dict[str, Any] = {}
    if IS_POOLED and driver == "asyncpg":
        names = {"prepared_statement_name_func": lambda: f"__{uuid.uuid4()}__", "prepared_statement_cache_size": 0}
        options = {"connect_args": UNPREPARED | names}
    return create_async_engine(url(dsn, driver), **options)


@asynccontextmanager
async def by_asyncpg(dsn: str) -> AsyncIterator[Caller]:
    connection = await asyncpg.connect(dsn, **UNPREPARED)
    transaction = connection.transaction()
    await transaction.start()
    yield Caller(connection, transaction.commit, transaction.rollback, lambda: connection.fetchval("select 1"))
    await connection.close()


@asynccontextmanager
async def by_asyncpg_pool(dsn: str) -> AsyncIterator[Caller]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1, **UNPREPARED) as pool, pool.acquire() as connection:
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
async def by_session(dsn: str, driver: str = "psycopg") -> AsyncIterator[Caller]:
    engine = sa.create_engine(url(dsn, driver))
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
        engine = async_engine(dsn, driver)
        async with AsyncSession(engine) as session:
            yield Caller(session, session.commit, session.rollback, lambda: session.execute(sa.text("select 1")))
        await engine.dispose()

    return open_session


def by_async_connection(driver: str) -> Any:
    @asynccontextmanager
    async def open_connection(dsn: str) -> AsyncIterator[Caller]:
        engine = async_engine(dsn, driver)
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
    "Session on psycopg2": ("blocking", partial(by_session, driver="psycopg2")),
    "Connection": ("blocking", by_connection),
}

SESSIONS: dict[str, tuple[str, Any]] = {
    "Session": ("blocking", by_session),
    "Session in async code": ("async", by_session),
    "AsyncSession on asyncpg": ("async", by_async_session("asyncpg")),
    "AsyncSession on psycopg": ("async", by_async_session("psycopg")),
}
