"""A step that is one database transaction: the user's rows, the step's record and its output commit together, once.

The record is written last, in the user's transaction, under the run's epoch: an attempt that was superseded meanwhile
is refused there, and the user's rows go with it. If the answer to the commit is lost, this attempt cannot know; it
gives the run back, and the next one finds the record or does not. It does the same when the connection is cut before.

A `with` block cannot be skipped. When the step is recorded already, the block gets a stand-in that raises at its
first use; leaving the block swallows that, so nothing of the block that touches the database or the run happens
twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from types import TracebackType
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg

from pgchan import callers, channels, codec, db, errors, sql
from pgchan.asyncpg_db import DRIVER_ERRORS
from pgchan.attempt import Passed, StepContext, current_step
from pgchan.db import STORED
from pgchan.journal import Recorded
from pgchan.points import point, point_soon

if TYPE_CHECKING:
    from pgchan.attempt import Attempt


class StandIn:
    """In place of a connection, in a block that was committed before."""

    def __getattribute__(self, name: str) -> Any:
        raise Passed


def recorded_result(name: str, recorded: Recorded) -> Any:
    """What a block that is passed over had as its result. Raises StepMismatch if another step has its name."""
    if recorded.word != "result":
        raise errors.StepMismatch(f"step {name!r} is recorded as {recorded.word}, not as a transaction", step=name)
    return codec.decode(recorded.value)


def is_passed(kind: type[BaseException] | None) -> bool:
    """Whether a block was left by the stand-in."""
    return kind is not None and issubclass(kind, Passed)


def may_pass(error: BaseException) -> bool:
    """Whether a database error says nothing against the transaction as such: a lost connection, a deadlock, …"""
    found = getattr(error, "orig", error)  # SQLAlchemy wraps those of its driver
    if not isinstance(found, (*DRIVER_ERRORS, psycopg.Error)) and found is error:
        return False
    named = db.translate(getattr(found, "sqlstate", None), "", None, writing=True)
    return isinstance(named, errors.Unavailable | errors.Indefinite)


def is_cut(error: BaseException, closed: bool) -> bool:
    """Whether an error in the user's block means that its connection was lost. closed: whether that is closed now."""
    if (invalidated := getattr(error, "connection_invalidated", None)) is not None:  # of SQLAlchemy
        return bool(invalidated)
    return closed and isinstance(error, (*DRIVER_ERRORS, psycopg.Error))


def _is_closed(connection: Any) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:  # the pool has taken it back already
        return True


class Transaction:
    """What run.transaction() and run.session() return. result: a JSON value that is recorded with the commit."""

    def __init__(self, attempt: Attempt, name: str, engine: Any) -> None:
        self._attempt = attempt
        self._name = name
        self._engine = engine
        self._recorded = attempt.journal.reach(name)
        self._stack = contextlib.AsyncExitStack()
        self._step: StepContext | None = None
        self._token: contextvars.Token[StepContext | None] | None = None
        self._connection: Any = None
        self._transaction: Any = None
        self.result: Any = None

    async def __aenter__(self) -> Any:
        if self._recorded is not None:
            self.result = recorded_result(self._name, self._recorded)
            self._token = current_step.set(StepContext(self._name, 0, passed=True))
            return StandIn()
        attempt = self._attempt
        attempt.busy += 1
        self._stack.callback(self._idle)
        try:
            self._step = await attempt.begin(self._name)
            self._step.buffer = []
            if self._engine is None:
                await self._open()
            else:
                from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415

                self._connection = await self._stack.enter_async_context(AsyncSession(self._engine))
                await self._connection.begin()
        except BaseException:
            await self._stack.aclose()
            raise
        self._token = current_step.set(self._step)
        return self._connection

    async def _open(self) -> None:
        database = self._attempt.db
        until = database.monotonic() + database.patience
        tries = 0
        while True:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    self._connection = await stack.enter_async_context(database.acquire())
                    self._transaction = self._connection.transaction()
                    await self._transaction.start()
                except DRIVER_ERRORS as error:  # it was cut while it lay in the pool
                    tries += 1
                    pause = db.backoff(tries)
                    if database.monotonic() + pause > until:
                        raise errors.Unavailable("the database cannot be reached") from error
                else:
                    self._stack.push_async_exit(stack.pop_all())
                    return
            await asyncio.sleep(pause)

    def _idle(self) -> None:
        self._attempt.busy -= 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._token is not None
        current_step.reset(self._token)
        if self._recorded is not None:
            return is_passed(kind)
        async with self._stack:
            assert self._step is not None
            self._step.over = True
            if error is None:
                await self._commit()
                return False
            await self._roll_back()
            self._attempt.give_back(self._step.taken)
            if is_cut(error, self._engine is None and _is_closed(self._connection)):
                self._attempt.end("unavailable")
                raise errors.fenced(self._attempt.claimed.run) from error
        return False

    async def _commit(self) -> None:
        attempt, step = self._attempt, self._step
        assert step is not None and step.buffer is not None
        try:
            body = codec.encode(self.result, f"the result of step {self._name!r}")
            attempt.check()
            # Nothing else of this attempt may be on its way: what a lost answer would mean is told by positions.
            await attempt.close_gate()
        except BaseException:
            await self._roll_back()
            attempt.give_back(step.taken)
            raise
        try:
            entries = [*step.buffer, *attempt.result_entries(step, "result", body)]
            rows = []
            for batch in channels.in_batches(entries):
                if self._engine is not None:
                    await self._connection.flush()
                (row,) = await callers.fetch(self._connection, sql.APPEND_QUIETLY, *batch.arguments())
                rows.append(row)
                if any(outcome.word not in STORED for outcome in batch.outcomes(row)):
                    await self._roll_back()
                    attempt.end("fenced")
                    raise errors.fenced(attempt.claimed.run)
            point_soon("checkpoint_sent", asyncio.get_running_loop().call_soon)
            await (self._transaction if self._engine is None else self._connection).commit()
            point("checkpointed")
            attempt.committed(rows)
        except Exception as error:
            await self._roll_back()
            if may_pass(error):
                attempt.end("unavailable")  # perhaps committed: the next attempt will know
                raise errors.fenced(attempt.claimed.run) from error
            attempt.give_back(step.taken)  # what the user's rows violate shows at the flush or the commit
            raise
        except BaseException:
            attempt.end("unavailable")
            await self._roll_back()
            raise
        finally:
            attempt.open_gate()

    async def _roll_back(self) -> None:
        with contextlib.suppress(*DRIVER_ERRORS):
            await (self._transaction if self._engine is None else self._connection).rollback()
