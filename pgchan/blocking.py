"""What a `def` workflow or step holds: the same as Run, with methods that block its thread. No logic of its own.

The function runs in a thread of the worker's pool; its calls run in the worker's event loop, in the thread's context.
A thread cannot be stopped: cancel, interruption and fencing reach it at its next call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar

import psycopg

from pgchan import callers, channels, codec, db, errors, sql
from pgchan.attempt import Attempt, StepContext, current_step
from pgchan.model import Message, Retry, RunStatus
from pgchan.steps import Child, Run
from pgchan.transactions import StandIn, is_cut, is_passed, may_pass, recorded_result
from pgchan.workflows import Workflow

T = TypeVar("T")


class Threads(concurrent.futures.Executor):
    """A thread of its own for each call. As many as the runs of a worker ask for: with a limit, workflows could occupy
    all of them and wait for steps that get none. Daemons: code that does not come back must not keep the process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """See Executor."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        threading.Thread(target=call, name="pgchan run", daemon=True).start()
        return future


class BlockingRun:
    """The run that a `def` workflow executes. See Run; each method blocks until it is done."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        self._run = run
        self._loop = loop
        self.id = run.id
        self.channel = run.channel
        self.attempt = run.attempt

    def __repr__(self) -> str:
        return repr(self._run)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        attempt = self._run._attempt
        try:
            attempt.check()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        attempt.on_end.append(future.cancel)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise errors.fenced(self.id) from None
        finally:
            attempt.on_end.remove(future.cancel)

    async def _soon(self, call: Callable[[], T]) -> T:
        return call()

    @property
    def idempotency_key(self) -> str:
        """See Run."""
        return self._run.idempotency_key

    def step(
        self, fn: Callable[..., Any], /, *args: Any, name: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, interruptible: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """See Run.step."""
        return self._wait(
            self._run.step(
                fn, *args, name=name, retry=retry, timeout=timeout, interruptible=interruptible, **kwargs
            )
        )  # fmt: skip

    def publish(self, body: Any, wait: bool = True, *, join: float | None = None) -> Message | None:
        """See Run.publish."""
        return self._wait(self._run.publish(body, wait, join=join))

    def previous(self) -> list[Message]:
        """See Run.previous."""
        return self._run.previous()

    def receive(self, timeout: float | None = None) -> Message | None:
        """See Run.receive."""
        return self._wait(self._run.receive(timeout))

    def signals(self) -> Iterator[Message]:
        """See Run.signals."""
        while True:
            signal = self.receive()
            if signal is not None:
                yield signal

    def sleep(self, seconds: float) -> None:
        """See Run.sleep."""
        self._wait(self._run.sleep(seconds))

    def sleep_until(self, at: datetime) -> None:
        """See Run.sleep_until."""
        self._wait(self._run.sleep_until(at))

    def now(self) -> datetime:
        """See Run.now."""
        return self._wait(self._soon(self._run.now))

    def random(self) -> float:
        """See Run.random."""
        return self._wait(self._soon(self._run.random))

    def transaction(self, name: str) -> BlockingTransaction:
        """See Run.transaction; the connection is psycopg's."""
        step = self._wait(self._soon(lambda: self._run._next_name(name, "transaction", name)))
        return BlockingTransaction(self, step, None)

    def session(self, name: str, engine: Any) -> BlockingTransaction:
        """See Run.session; a Session on an Engine."""
        step = self._wait(self._soon(lambda: self._run._next_name(name, "session", name)))
        return BlockingTransaction(self, step, engine)

    def start(
        self, workflow: Workflow[Any, Any] | str, /, *args: Any, id: str | None = None, queue: str | None = None,
        priority: int = 0, delay: float | None = None, timeout: float | None = None, **kwargs: Any,
    ) -> BlockingChild:  # fmt: skip
        """See Run.start."""
        child = self._wait(
            self._run.start(
                workflow, *args, id=id, queue=queue, priority=priority, delay=delay, timeout=timeout, **kwargs
            )
        )  # fmt: skip
        return BlockingChild(self, child)


    def continue_as(self, *args: Any, **kwargs: Any) -> None:
        """See Run.continue_as."""
        self._wait(self._run.continue_as(*args, **kwargs))


class BlockingChild:
    """A run that was started by this one. See Child."""

    def __init__(self, parent: BlockingRun, child: Child) -> None:
        self._parent = parent
        self._child = child
        self.id = child.id

    def result(self) -> Any:
        """See Child.result."""
        return self._parent._wait(self._child.result())

    def status(self) -> RunStatus:
        """See Child.status."""
        return self._parent._wait(self._child.status())

    def signal(self, body: Any, *, key: str | None = None) -> Message:
        """See Child.signal."""
        return self._parent._wait(self._child.signal(body, key=key))

    def cancel(self) -> bool:
        """See Child.cancel."""
        return self._parent._wait(self._child.cancel())


class BlockingTransaction:
    """What BlockingRun.transaction() and .session() return. See Transaction in transactions.py."""

    def __init__(self, run: BlockingRun, name: str, engine: Any) -> None:
        self._run = run
        self._attempt: Attempt = run._run._attempt
        self._name = name
        self._engine = engine
        self._recorded = self._attempt.journal.reach(name)
        self._step: StepContext | None = None
        self._token: contextvars.Token[StepContext | None] | None = None
        self._connection: Any = None
        self.result: Any = None

    def __enter__(self) -> Any:
        if self._recorded is not None:
            self.result = recorded_result(self._name, self._recorded)
            self._token = current_step.set(StepContext(self._name, 0, passed=True))
            return StandIn()
        self._step = self._run._wait(self._begin())
        try:
            if self._engine is None:
                self._connection = self._connect()
            else:
                from sqlalchemy.orm import Session  # noqa: PLC0415

                self._connection = Session(self._engine)
        except BaseException:
            self._idle()
            raise
        self._token = current_step.set(self._step)
        return self._connection

    async def _begin(self) -> StepContext:
        self._attempt.busy += 1
        try:
            step = await self._attempt.begin(self._name)
        except BaseException:
            self._attempt.busy -= 1
            raise
        step.buffer = []
        return step

    def _idle(self) -> None:
        def idle() -> None:
            self._attempt.busy -= 1

        self._run._loop.call_soon_threadsafe(idle)  # counted in the loop's thread only

    def _connect(self) -> psycopg.Connection[Any]:
        database = self._attempt.db
        until = database.monotonic() + database.patience
        tries = 0
        while True:
            self._attempt.check()
            try:
                return psycopg.connect(database.dsn, **database.libpq_options())
            except psycopg.OperationalError as error:
                tries += 1
                pause = db.backoff(tries)
                if database.monotonic() + pause > until:
                    raise errors.Unavailable("the database cannot be reached") from error
            time.sleep(pause)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._token is not None
        current_step.reset(self._token)
        if self._recorded is not None:
            return is_passed(kind)
        assert self._step is not None
        self._step.over = True
        try:
            if error is None:
                self._commit(self._step)
                return False
            self._roll_back()
            self._give_back(self._step)
            if is_cut(error, self._engine is None and self._connection.closed):
                self._end("unavailable")
                raise errors.fenced(self._run.id) from error
        finally:
            self._idle()
            self._connection.close()
        return False

    def _give_back(self, step: StepContext) -> None:
        self._run._loop.call_soon_threadsafe(self._attempt.give_back, step.taken)

    def _end(self, why: str) -> None:
        self._run._loop.call_soon_threadsafe(self._attempt.end, why)

    def _commit(self, step: StepContext) -> None:
        run, attempt = self._run, self._attempt
        assert step.buffer is not None
        try:
            body = codec.encode(self.result, f"the result of step {self._name!r}")
            run._wait(attempt.close_gate())
        except BaseException:
            self._roll_back()
            self._give_back(step)
            raise
        try:
            entries = [*step.buffer, *run._wait(run._soon(lambda: attempt.result_entries(step, "result", body)))]
            rows = []
            for batch in channels.in_batches(entries):
                (row,) = db.drive(callers.fetch(self._connection, sql.APPEND_QUIETLY, *batch.arguments()))
                rows.append(row)
                if any(outcome.word not in db.STORED for outcome in batch.outcomes(row)):
                    self._roll_back()
                    self._end("fenced")
                    raise errors.fenced(run.id)
            self._connection.commit()
            attempt.committed(rows)
        except Exception as error:
            self._roll_back()
            if may_pass(error):
                self._end("unavailable")  # perhaps committed: the next attempt will know
                raise errors.fenced(run.id) from error
            self._give_back(step)
            raise
        finally:
            self._run._loop.call_soon_threadsafe(attempt.open_gate)

    def _roll_back(self) -> None:
        with contextlib.suppress(psycopg.Error, OSError):
            self._connection.rollback()
