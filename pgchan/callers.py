"""Connections that the caller brought: writing within the caller's own transaction.

pgchan never commits, rolls back or closes what it was given, and errors of its driver pass through untouched. A
caller's transaction cannot be announced by a procedure that commits, so the wakeup goes with it: as a NOTIFY inside
the transaction (sent when that commits), or, where SQLAlchemy tells of the commit, after it, which spares all other
commits of the server from queueing behind this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pgchan import sql
from pgchan.db import Row
from pgchan.errors import InvalidInput
from pgchan.writer import Batch

Announce = Callable[[list[int], list[int], bool, list[str]], None]


@dataclass(frozen=True, slots=True)
class Statement:
    """A call that is kept for later: the start of a run, or a signal to one, by its name.

    check: raises if the row that comes back is a refusal. size: bytes that it holds in memory.
    """

    name: str
    text: str
    args: tuple[Any, ...]
    check: Callable[[Row], object]
    size: int



_PARAMETER = re.compile(r"\$(\d+)")
_PENDING = "pgchan announcements"  # in Session.info


async def append(connection: Any, batch: Batch, announce: Announce) -> Row:
    """`pgchan.append_messages` of a batch in the caller's transaction. The channels stay locked until it ends."""
    session = _session(connection)
    if session is None:
        (row,) = await fetch(connection, sql.APPEND_MESSAGES, *batch.messages())
        return row
    (row,) = await fetch(connection, sql.APPEND_MESSAGES_QUIETLY, *batch.messages())
    _announce_after_commit(session, announce, (list(row[0]), list(row[1]), bool(row[7]), []))
    return row


async def fetch(connection: Any, statement: str, *args: object) -> list[Row]:
    """The rows of one statement, on whatever connection of asyncpg, psycopg or SQLAlchemy."""
    modules = _modules(connection)
    if "asyncpg" in modules:
        return await _asyncpg(connection, statement, args)
    if "psycopg" in modules:
        return await _psycopg(connection, statement, args)
    if "sqlalchemy" in modules:
        return await _sqlalchemy(connection, statement, args)
    raise InvalidInput(
        f"connection must be of asyncpg, psycopg or SQLAlchemy, not {type(connection).__module__}."
        f"{type(connection).__name__}"
    )


def _modules(connection: Any) -> set[str]:
    # Of all its classes, for it may be a subclass of the user's own.
    return {kind.__module__.partition(".")[0] for kind in type(connection).__mro__}


def blocking(connection: Any) -> Any:
    """The connection, unless only async code can use it."""
    kinds = type(connection).__mro__
    if any(kind.__module__.startswith("asyncpg") or "async" in kind.__name__.lower() for kind in kinds):
        raise InvalidInput(f"a {kinds[0].__name__} needs an event loop; use it with pgchan.AsyncClient")
    return connection


async def _asyncpg(connection: Any, statement: str, args: tuple[object, ...]) -> list[Row]:
    try:
        closed = connection.is_closed()
    except Exception as error:  # a proxy whose connection went back to its pool
        raise InvalidInput(f"connection cannot be used: {error}") from None
    if closed:
        raise InvalidInput("connection is closed")
    rows: list[Row] = await connection.fetch(statement, *args)
    return rows


async def _psycopg(connection: Any, statement: str, args: tuple[object, ...]) -> list[Row]:
    import psycopg  # noqa: PLC0415
    from psycopg.rows import tuple_row  # noqa: PLC0415

    if not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        raise InvalidInput(f"connection must be a psycopg connection, not a {type(connection).__name__}")
    if connection.closed:
        raise InvalidInput("connection is closed")
    if isinstance(connection, psycopg.AsyncConnection):
        async with psycopg.AsyncRawCursor(connection, row_factory=tuple_row) as cursor:
            await cursor.execute(statement, args)
            return list(await cursor.fetchall())
    with psycopg.RawCursor(connection, row_factory=tuple_row) as blocking:
        blocking.execute(statement, args)
        return list(blocking.fetchall())


async def _sqlalchemy(connection: Any, statement: str, args: tuple[object, ...]) -> list[Row]:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session  # noqa: PLC0415
    from sqlalchemy.orm import Session, scoped_session  # noqa: PLC0415

    if isinstance(connection, scoped_session | async_scoped_session):
        connection = connection()
    if isinstance(connection, AsyncSession):
        connection = await connection.connection()
    elif isinstance(connection, Session):
        connection = connection.connection()
    if not hasattr(connection, "exec_driver_sql"):
        raise InvalidInput(f"connection must be a Session or Connection, not a {type(connection).__name__}")
    if connection.closed:
        raise InvalidInput("connection is closed")
    if connection.dialect.name != "postgresql":
        raise InvalidInput(f"connection must be to PostgreSQL, not {connection.dialect.name}")
    # The driver's own parameter style, past SQLAlchemy's, which would parse the statement and guess types.
    style = connection.dialect.paramstyle
    parameters: Any
    if style == "numeric_dollar":
        parameters = args
    elif style == "pyformat":
        statement = _PARAMETER.sub(r"%(p\1)s", statement)
        parameters = {f"p{n}": value for n, value in enumerate(args, 1)}
    else:
        raise InvalidInput(f"connection uses the driver {connection.dialect.driver!r}; use psycopg or asyncpg")
    if isinstance(connection, AsyncConnection):
        return [tuple(row) for row in (await connection.exec_driver_sql(statement, parameters)).fetchall()]
    return [tuple(row) for row in connection.exec_driver_sql(statement, parameters).fetchall()]


def _session(connection: Any) -> Any:
    """The Session behind a Session or AsyncSession (scoped or not), which tells when it commits; else None."""
    if "sqlalchemy" not in _modules(connection):
        return None
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session  # noqa: PLC0415
    from sqlalchemy.orm import Session, scoped_session  # noqa: PLC0415

    if isinstance(connection, scoped_session | async_scoped_session):
        connection = connection()
    if isinstance(connection, AsyncSession):
        return connection.sync_session
    return connection if isinstance(connection, Session) else None


def _announce_after_commit(session: Any, announce: Announce, announcement: tuple[Any, ...]) -> None:
    from sqlalchemy import event  # noqa: PLC0415

    pending: list[tuple[Announce, tuple[Any, ...]]] | None = session.info.get(_PENDING)
    if pending is None:
        waiting: list[tuple[Announce, tuple[Any, ...]]] = []
        pending = session.info[_PENDING] = waiting

        @event.listens_for(session, "after_commit")
        def announce_all(session: Any) -> None:
            if session.in_nested_transaction():  # only a savepoint
                return
            # A session joined to an outer transaction tells early. The announcement is a hint; the sweep covers that.
            ready = waiting.copy()
            waiting.clear()
            for announce, announcement in ready:
                announce(*announcement)

        @event.listens_for(session, "after_transaction_end")
        def forget_all(_session: Any, ended: Any) -> None:
            if ended.parent is None:
                waiting.clear()

    pending.append((announce, announcement))
