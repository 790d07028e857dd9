"""The transactional door: what is published, started and signalled with a Session, written just before that commits.

With `defer=True` nothing is sent at once. What a Session has to say is kept in memory and written in one go when the
Session is about to commit, after its last flush: so the channels are locked for as short as can be, and in the same
order by everybody. Savepoints are respected: what was deferred in one that is rolled back is dropped with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from pgchan import callers, channels, errors
from pgchan.callers import Announce, Statement
from pgchan.db import STORED, Entry, Row, drive

DEFERRED_ENTRIES_MAX = 50_000  # of one transaction …
DEFERRED_BYTES_MAX = 64 << 20  # … and the bytes of their bodies

_STATE = "pgchan deferred"  # in Session.info


@dataclass(slots=True, eq=False)
class _Deferred:
    transaction: SessionTransaction  # or savepoint, in which it was deferred
    what: Entry | Statement
    announce: Announce


@dataclass(slots=True, eq=False)
class _State:
    """What a Session has deferred. releasing: the savepoint whose end was announced last."""

    deferred: list[_Deferred] = field(default_factory=list)
    size: int = 0
    releasing: SessionTransaction | None = None


def defer(connection: Any, what: Entry | Statement, announce: Announce) -> None:
    """Write this just before the transaction of a Session commits. Raises InvalidInput for other connections."""
    session = session_of(connection)
    state: _State | None = session.info.get(_STATE)
    if state is None:
        state = session.info[_STATE] = _State()
        _follow(session, state)
    size = len(what.body) if isinstance(what, Entry) else what.size
    if len(state.deferred) >= DEFERRED_ENTRIES_MAX or state.size + size > DEFERRED_BYTES_MAX:
        raise errors.InvalidInput(
            f"one transaction may defer at most {DEFERRED_ENTRIES_MAX} messages and {DEFERRED_BYTES_MAX} bytes"
        )
    transaction = session.get_nested_transaction() or session.get_transaction() or session.begin()
    state.deferred.append(_Deferred(transaction, what, announce))
    state.size += size


def session_of(connection: Any) -> Session:
    """The Session behind what the caller gave. Raises InvalidInput for anything that does not tell of its commit."""
    if isinstance(connection, scoped_session | async_scoped_session):
        connection = connection()
    if isinstance(connection, AsyncSession):
        return connection.sync_session
    if isinstance(connection, Session):
        return connection
    raise errors.InvalidInput(
        f"defer=True takes a SQLAlchemy Session or AsyncSession as connection=, not {type(connection).__name__}; "
        f"other connections do not tell when they commit"
    )


def _follow(session: Session, state: _State) -> None:
    @event.listens_for(session, "before_commit")
    def write(session: Session) -> None:
        savepoint = session.get_nested_transaction()
        if savepoint is not None and savepoint is not state.releasing:
            # The end of this savepoint. Or the end of the transaction around it, while it is open: then SQLAlchemy
            # tells of the savepoint's end next, and not of the other again.
            state.releasing = savepoint
            return
        if state.deferred:
            session.flush()  # or the last flush would run with the channels locked
            deferred, state.deferred, state.size = state.deferred, [], 0
            _write(session, deferred)

    @event.listens_for(session, "after_soft_rollback")
    def drop(_session: Session, ended: SessionTransaction) -> None:
        _keep(state, [one for one in state.deferred if not _is_inside(one.transaction, ended)])

    @event.listens_for(session, "after_transaction_end")
    def forget(_session: Session, ended: SessionTransaction) -> None:
        if ended.parent is None:  # also of a Session that was closed and is used again
            _keep(state, [])
            state.releasing = None


def _keep(state: _State, deferred: list[_Deferred]) -> None:
    state.deferred = deferred
    state.size = sum(len(d.what.body) if isinstance(d.what, Entry) else d.what.size for d in deferred)


def _is_inside(transaction: SessionTransaction | None, other: SessionTransaction) -> bool:
    while transaction is not None:
        if transaction is other:
            return True
        transaction = transaction.parent
    return False


def _write(session: Session, deferred: list[_Deferred]) -> None:
    # Rows of runs are locked before rows of channels, and both in order of name.
    statements = [(one.what, one.announce) for one in deferred if isinstance(one.what, Statement)]
    for statement, _ in sorted(statements, key=lambda pair: pair[0].name):
        row: Row
        (row,) = drive(callers.fetch(session, statement.text, *statement.args))
        statement.check(row)
    entries = sorted((one.what for one in deferred if isinstance(one.what, Entry)), key=lambda entry: entry.name)
    for batch in channels.in_batches(entries):
        row = drive(callers.append(session, batch, deferred[0].announce))
        for queued, outcome in zip(batch.queued, batch.outcomes(row), strict=True):
            if outcome.word not in STORED:
                raise channels.refusal(queued.entry, outcome)
