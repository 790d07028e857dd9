"""What a workflow holds: steps, output, signals, sleep, transactions, children. The record-keeping is in attempt.py.

Each operation that is recorded follows one pattern: take the next name, see whether the journal has it, else do it
and record it. So a function that is replayed after a crash runs quickly through what is recorded and goes on where
the record ends. Long, for it is the whole of what a workflow may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, ParamSpec, TypeVar, cast, overload

from pgchan import codec, errors, names, runs, sql
from pgchan.attempt import Attempt, Passed, StepContext, current_step
from pgchan.db import Row, backoff
from pgchan.errors import Fatal, InvalidInput, RetryAfter, StepFailed, StepMismatch
from pgchan.journal import Recorded
from pgchan.model import Message, Retry, RunStatus
from pgchan.points import point
from pgchan.transactions import Transaction
from pgchan.workflows import Step, Workflow, check_retry, encode_input

P = ParamSpec("P")
R = TypeVar("R")

_CHILDREN = uuid.UUID("6f3d8f0e-0f6e-4a57-9d3e-7c5b8f6f2a11")  # namespace of the ids of child runs
NO_RETRY = Retry(attempts=1)

current: contextvars.ContextVar[Any] = contextvars.ContextVar("pgchan_run")


class Run:
    """The run that a workflow executes, its first parameter. `def` workflows get the same with methods that block.

    id, channel: its name, the address for signals and the channel it speaks on. attempt: how often it was claimed.
    """

    def __init__(self, attempt: Attempt, executor: Executor) -> None:
        self._attempt = attempt
        self._executor = executor
        self._running: set[str] = set()
        self._in_threads: Any = self  # what `def` code is handed: the same with methods that block
        self.id = attempt.claimed.run
        self.channel = attempt.claimed.run
        self.attempt = attempt.claimed.number

    def __repr__(self) -> str:
        return f"<run {self.id} attempt {self.attempt}>"

    @property
    def idempotency_key(self) -> str:
        """In a step: "run/step", the same in every try. Hand it to services that take one, so that they act once."""
        step = current_step.get()
        if step is None:
            raise InvalidInput("run.idempotency_key exists within a step")
        return f"{self.id}/{step.name}"

    # -- steps

    @overload
    async def step(
        self, fn: Callable[P, Awaitable[R]], /, *args: Any, name: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, interruptible: bool | None = None, **kwargs: Any,
    ) -> R: ...  # fmt: skip
    @overload
    async def step(
        self, fn: Callable[P, R], /, *args: Any, name: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, interruptible: bool | None = None, **kwargs: Any,
    ) -> R: ...  # fmt: skip
    async def step(
        self, fn: Callable[..., Any], /, *args: Any, name: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, interruptible: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Execute `fn(*args, **kwargs)` and record its result under its name; if that is recorded, return it instead.

        The result is a JSON value and comes back as one (a tuple as a list). It is recorded once; the function may
        execute again if it had not returned when its process died, so hand run.idempotency_key to outside services.
        The record shares one commit with what the step published and the signals that it consumed.

        name: default the function's; repeated names are numbered. retry: default that of @pgchan.step, then of the
        workflow, then none. timeout: seconds for one try. interruptible: a signal that arrives during the step, or is
        pending when it begins, cancels it and raises Interrupted. A `def` function runs in a thread.

        Raises what the function raised in its last try (StepFailed when only the record of it is left), Interrupted,
        StepMismatch, InvalidInput (a step inside a step, a result that is not JSON), Fenced.
        """
        await self._attempt.still_ours()
        declared = fn if isinstance(fn, Step) else None
        function = declared.fn if declared else fn
        if not callable(function):
            raise InvalidInput(f"run.step takes a function and its arguments, not {function!r:.80}")
        default = declared.name if declared else getattr(function, "__name__", type(function).__name__)
        step_name = self._next_name(name, function, default)
        recorded = self._attempt.journal.reach(step_name)
        if recorded is not None:
            return _replay(self.id, step_name, recorded)
        if retry is None:
            retry = (declared.retry if declared else None) or self._attempt.workflow.retry
        if timeout is None and declared:
            timeout = declared.timeout
        if interruptible is None:
            interruptible = declared.interruptible if declared else False
        names.check_optional_seconds(timeout, "timeout", 0.001)
        call = _Call(self, function, args, kwargs, timeout, interruptible)
        if name is not None:
            if name in self._running:
                raise StepMismatch(f"two steps named {name!r} run at once; give each its own name", step=name)
            self._running.add(name)
        try:
            return await self._execute(step_name, call, check_retry(retry))
        finally:
            if name is not None:
                self._running.discard(name)

    def _next_name(self, given: str | None, function: Any, default: str) -> str:
        self._attempt.check()
        if (step := current_step.get()) is not None:
            if step.passed:
                raise Passed
            raise InvalidInput("a step cannot hold another step; call the function itself, or return to the workflow")
        if given is None and (not default.isidentifier() or not default.isprintable()):
            default = "step"  # a lambda or a partial
        return self._attempt.journal.name(given, function, default)

    async def _execute(self, name: str, call: _Call, retry: Retry | None) -> Any:
        attempt = self._attempt
        tries = attempt.journal.tries(name)
        if tries.failed_at is not None and tries.pause:
            due = tries.failed_at + timedelta(seconds=tries.pause)
            await self._pause(attempt.seconds_until(due))
        while True:
            attempt.busy += 1
            step: StepContext | None = None
            try:
                step = await attempt.begin(name)
                value = await call.run(step)
                body = codec.encode(value, f"the result of step {name!r}")
                await attempt.record(step, "result", body)
                return codec.decode(body)
            except errors.Interrupted as interrupted:
                if step is None or step.interrupt is None or interrupted.step != name:
                    raise
                step.taken.append(interrupted.signal)
                body = codec.encode_record({"type": "interrupted", "signal": _signal_json(interrupted.signal)})
                await attempt.record(step, "interrupted", body)
                raise
            except errors.Fenced:
                raise
            except asyncio.CancelledError:
                if step is not None:
                    attempt.give_back(step.taken)
                raise
            except Exception as error:
                if step is None:
                    raise
                attempt.check()
                tries.failures += 1
                pause = _pause_after(error, retry, tries.failures)
                await attempt.record_failure(step, error, pause)
                if pause is None:
                    raise
            finally:
                if step is not None:
                    step.over = True
                attempt.busy -= 1
            await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            await self._attempt.park(never, seconds, None)

    # -- output

    async def publish(self, body: Any, wait: bool = True, *, join: float | None = None) -> Message | None:
        """Say something on the run's channel; readers get it at once.

        wait=True returns the stored message when it is durable. wait=False returns None as soon as it is handed to the
        writer (it waits only when too much is on its way); it is durable with the step's result at the latest.
        In a step the message carries the step's name and attempt; if the step has to be tried again, it becomes void
        unless that try asks for previous(). Outside of a step it is published once, however often the run is replayed;
        the order of the calls is its identity, so in parallel branches publish within steps.
        Within run.transaction() it goes with the transaction's commit, and this returns None.
        join: with wait=False, in a step, and a body that is a str: seconds (at most 1) for which it may wait for the
        text that follows it, so that both become one message. Readers who string the text together get the same, from
        fewer rows; nothing else of the run overtakes it, and it is durable with the step's result at the latest, as
        ever. 0 joins what is published without a pause. A message ends where something else is published or recorded,
        or past 16 KiB. Outside of steps it is refused: there the order of the calls is each message's identity, and a
        replay could not cut the text up in the same way, for that depends on time.
        Raises InvalidInput, Fenced.
        """
        return await self._attempt.publish(body, wait, join)

    def previous(self) -> list[Message]:
        """In a step: what its earlier tries published and is not void, in order. From then on it stays valid.

        Carry on from there, so that what was paid for is not paid for twice. Empty in a first try.
        """
        step = current_step.get()
        if step is None:
            raise InvalidInput("run.previous() belongs within a step")
        if step.passed:
            raise Passed
        if step.said:
            raise InvalidInput("call run.previous() before the step publishes: earlier output is void already")
        step.keeps = True
        return list(step.earlier)

    # -- signals

    async def receive(self, timeout: float | None = None) -> Message | None:
        """The next signal that was not consumed yet; None when `timeout` seconds are over.

        In a workflow the answer is recorded, and a run that only waits leaves memory until the signal comes. In a step
        the signal is consumed with the step's result, and returns to the queue if the step fails.
        """
        names.check_optional_seconds(timeout, "timeout")
        attempt = self._attempt
        await attempt.still_ours()
        if (step := current_step.get()) is not None and not step.passed:
            signal = await attempt.next_signal(timeout, may_leave=False)
            if signal is not None:
                step.taken.append(signal)
            return signal
        name = self._next_name(None, None, "receive")
        if (recorded := attempt.journal.reach(name)) is not None:
            return _signal_message(self.id, _replay(self.id, name, recorded))
        if timeout is not None:
            timeout = await self._began(name, timeout)
        signal = await attempt.next_signal(timeout, may_leave=True)
        await self._record(name, None if signal is None else _signal_json(signal), [signal] if signal else [])
        return signal

    async def _began(self, name: str, seconds: float) -> float:
        """What is left of a wait that may have begun in an earlier attempt."""
        attempt = self._attempt
        if (began := attempt.journal.until(name)) is not None:
            return max(0.0, attempt.seconds_until(began[1] + timedelta(seconds=began[0])))
        await attempt.write_soon(attempt.note(codec.encode({"type": "until", "seconds": seconds}), step=name))
        return seconds

    async def signals(self) -> AsyncIterator[Message]:
        """The signals as they come, for `async for`, without end: in a workflow each as by receive(), in a step each
        consumed with the step's result."""
        while True:
            signal = await self.receive()
            if signal is not None:
                yield signal

    # -- time and chance

    async def sleep(self, seconds: float) -> None:
        """Wait, over crashes and deploys; a run that only sleeps leaves memory. By the database's clock."""
        names.check_seconds(seconds, "seconds")
        await self._sleep({"seconds": seconds})

    async def sleep_until(self, at: datetime) -> None:
        """Wait until a moment, given with its time zone; as sleep."""
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise InvalidInput(f"sleep_until takes a datetime with a time zone, not {at!r}")
        names.check_seconds(max(0.0, (at - datetime.now(UTC)).total_seconds()), "seconds")
        await self._sleep({"until": at.astimezone(UTC).isoformat()})

    async def _sleep(self, what: dict[str, Any]) -> None:
        attempt = self._attempt
        if (step := current_step.get()) is not None and not step.passed:
            raise InvalidInput("run.sleep belongs into the workflow; in a step use asyncio.sleep or time.sleep")
        name = self._next_name(None, None, "sleep")
        recorded = attempt.journal.reach(name)
        if recorded is None:
            await self._record(name, what, [])
            recorded = attempt.journal.reach(name)
            assert recorded is not None
        else:
            what = codec.decode(recorded.value)
        until = (
            datetime.fromisoformat(what["until"]) if "until" in what
            else recorded.at + timedelta(seconds=what["seconds"])
        )  # fmt: skip
        await self._pause(attempt.seconds_until(until))

    def now(self) -> datetime:
        """The time, UTC, recorded: a replay gets the same."""
        return datetime.fromisoformat(cast(str, self._recorded_value("now", lambda: self._attempt.now().isoformat())))

    def random(self) -> float:
        """A random number from 0 to 1, recorded: a replay gets the same."""
        return cast(float, self._recorded_value("random", random.random))

    def _recorded_value(self, kind: str, make: Callable[[], Any]) -> Any:
        # Not awaited: what is recorded later carries it along, and a step that could depend on it waits for it.
        attempt = self._attempt
        name = self._next_name(None, None, kind)
        if (recorded := attempt.journal.reach(name)) is not None:
            return _replay(self.id, name, recorded)
        value = make()
        attempt.record_soon(name, codec.encode(value))
        return value

    # -- transactions

    def transaction(self, name: str) -> Transaction:
        """`async with run.transaction("reserve") as connection:` an asyncpg connection, in a transaction that commits
        the user's writes, this step's record and what is published inside, once.

        When it is recorded the block is passed over: it ends at its first use of the connection or the run. So what
        the block computes must not be used behind it, but for `.result` of the object that this returns, a JSON value.
        An exception rolls everything back, and the block executes again if the run does.
        """
        return Transaction(self._attempt, self._next_name(name, "transaction", name), None)

    def session(self, name: str, engine: Any) -> Transaction:
        """As transaction, with a SQLAlchemy AsyncSession on `engine` (an AsyncEngine for the same database)."""
        return Transaction(self._attempt, self._next_name(name, "session", name), engine)

    # -- children

    async def start(
        self, workflow: Workflow[Any, Any] | str, /, *args: Any, id: str | None = None, queue: str | None = None,
        priority: int = 0, delay: float | None = None, timeout: float | None = None, **kwargs: Any,
    ) -> Child:  # fmt: skip
        """Start another run, once, and return its handle; `await child.result()` waits for it, also out of memory.

        Arguments as for client.start; the id defaults to one that is derived from this run and the place of the call.
        """
        attempt = self._attempt
        name = self._next_name(None, None, "start")
        recorded = attempt.journal.reach(name)
        if recorded is not None:
            return Child(self, _replay(self.id, name, recorded))
        default = str(uuid.uuid5(_CHILDREN, f"{attempt.claimed.journal_id}/{name}"))
        values = runs.start_arguments(
            workflow, args, kwargs, id=id or default, queue=queue, priority=priority, delay=delay, timeout=timeout,
            parent=attempt.claimed.channel_id,
        )  # fmt: skip
        attempt.busy += 1
        try:
            await attempt.flushed()
            row = await _repeated(attempt, sql.ENQUEUE, *values)
            runs.started(values[0], row[0])
            await self._record(name, values[0], [])
        finally:
            attempt.busy -= 1
        return Child(self, values[0])

    async def continue_as(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End this execution and begin the workflow anew with these arguments: same id, same channel, empty journal.

        For runs that never end: what was recorded is removed. Signals that were not consumed wait for the new one.
        """
        attempt = self._attempt
        await attempt.still_ours()
        if current_step.get() is not None:
            raise InvalidInput("run.continue_as belongs into the workflow, not into a step")
        raw = encode_input(attempt.workflow, args, kwargs)
        attempt.busy += 1
        try:
            await attempt.flushed()
            with contextlib.suppress(errors.Indefinite):  # if it was done, this attempt is fenced and ends all the same
                await attempt.db.call(sql.CONTINUE, attempt.claimed.channel_id, attempt.claimed.epoch, raw)
        finally:
            attempt.busy -= 1
        attempt.end("continued")
        await attempt.still_ours()
        raise AssertionError("an ended attempt goes on")

    async def _record(self, name: str, value: Any, signals: list[Message]) -> None:
        attempt = self._attempt
        attempt.busy += 1
        try:
            step = StepContext(name, attempt.journal.tries(name).last + 1, taken=signals)
            await attempt.record(step, "result", codec.encode_record(value))
        finally:
            attempt.busy -= 1


class Child:
    """A run that was started by this one."""

    def __init__(self, parent: Run, id: str) -> None:
        self._parent = parent
        self.id = id

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    async def result(self) -> Any:
        """Wait for its end and return its result, recorded. Raises RunFailed, RunCancelled."""
        parent, attempt = self._parent, self._parent._attempt
        name = parent._next_name(None, None, "result")
        recorded = attempt.journal.reach(name)
        found = _replay(parent.id, name, recorded) if recorded is not None else await self._ended(name)
        if found["state"] == "succeeded":
            return found["value"]
        error = codec.encode(found["value"]) if found["value"] is not None else None
        return runs.ended_value(self.id, found["state"], None, error)

    async def _ended(self, name: str) -> dict[str, Any]:
        attempt = self._parent._attempt
        ending = None
        try:
            while True:
                mark = attempt.db.mark()
                attempt.busy += 1  # the run must not leave memory while this child is not among what it waits for
                try:
                    rows = await attempt.db.fetch(sql.RUN_RESULT, self.id)
                finally:
                    attempt.busy -= 1
                if not rows:
                    raise errors.run_not_found(self.id)
                channel_id, state, value, error = rows[0]
                if state in ("succeeded", "failed", "cancelled"):
                    raw = value if state == "succeeded" else error
                    found = {"state": state, "value": codec.decode(raw) if raw is not None else None}
                    await self._parent._record(name, found, [])
                    return found
                if ending is None:
                    ending = await attempt.db.watch_end(channel_id, mark)
                    if ending.missed:
                        continue
                told = asyncio.ensure_future(ending.wait())
                try:
                    await attempt.park(told, runs.RESULT_WAIT_SECONDS * 360, self.id)
                finally:
                    told.cancel()
        finally:
            if ending is not None:
                ending.unfollow()

    async def status(self) -> RunStatus:
        """Its state now; not recorded."""
        return await runs.status(self._parent._attempt.db, self.id)

    async def signal(self, body: Any, *, key: str | None = None) -> Message:
        """Send it a message; keyed by this run and the place of the call unless a key is given, so it is sent once."""
        parent = self._parent
        default = f"{parent._attempt.claimed.journal_id}/{parent._attempt.journal.name(None, None, 'signal')}"
        raw, key = codec.encode(body), names.check_key(key if key is not None else default)
        await parent._attempt.flushed()
        return runs.signalled(self.id, raw, key, await _repeated(parent._attempt, sql.DELIVER, self.id, raw, key))

    async def cancel(self) -> bool:
        """Cancel it; False if it had ended."""
        return await runs.cancel(self._parent._attempt.db, self.id)


class _Call:
    """A step's function with its arguments, and how one try of it is made."""

    def __init__(
        self, run: Run, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        timeout: float | None, interruptible: bool,
    ) -> None:  # fmt: skip
        self._run = run
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self._timeout = timeout
        self._interruptible = interruptible
        self._is_async = _is_coroutine_function(function)

    async def run(self, step: StepContext) -> Any:
        """One try; its value."""
        attempt = self._run._attempt
        if self._interruptible:
            step.interrupt = lambda signal: False
            if (signal := attempt.take_pending()) is not None:
                raise _interrupted(step.name, signal)
        attempt.show_if_long(step)
        token = current_step.set(step)
        try:
            point("step_started")
            if self._timeout is None:
                return await self._until_done(attempt, step)
            async with asyncio.timeout(self._timeout):
                return await self._until_done(attempt, step)
        finally:
            current_step.reset(token)
            step.under_way = False

    async def _until_done(self, attempt: Attempt, step: StepContext) -> Any:
        return await (self._until_interrupted(attempt, step) if self._interruptible else self._call())

    async def _call(self) -> Any:
        if self._is_async:
            return await self._function(*self._args, **self._kwargs)
        context = contextvars.copy_context()
        context.run(current.set, self._run._in_threads)
        value = await asyncio.get_running_loop().run_in_executor(
            self._run._executor, lambda: context.run(self._function, *self._args, **self._kwargs)
        )
        return await value if inspect.isawaitable(value) else value

    async def _until_interrupted(self, attempt: Attempt, step: StepContext) -> Any:
        task = asyncio.ensure_future(self._call())
        caught: list[Message] = []

        def interrupt(signal: Message) -> bool:
            if task.done() or caught:
                return False
            caught.append(signal)
            step.over = not self._is_async  # a thread cannot be cancelled; what it says from here on is refused
            task.cancel()
            return True

        step.interrupt = interrupt
        attempt.interruptible(step, True)
        try:
            value = await task
        except asyncio.CancelledError:
            cancelling = asyncio.current_task()
            if caught and not (cancelling is not None and cancelling.cancelling()):
                raise _interrupted(step.name, caught[0]) from None
            task.cancel()
            if self._is_async:  # let it clean up; a thread cannot be waited for
                await asyncio.wait({task})
            attempt.give_back(caught)
            raise
        except BaseException:
            attempt.give_back(caught)
            raise
        finally:
            attempt.interruptible(step, False)
        attempt.give_back(caught)  # it had finished, or would not be interrupted
        return value


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    code = getattr(function, "__code__", None)  # what most functions are can be told without unwrapping them
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return True
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def current_run() -> Any:
    """The run that is being executed here: a Run, or in `def` code the one whose methods block. Raises InvalidInput."""
    try:
        return current.get()
    except LookupError:
        raise InvalidInput("pgchan.current_run() is for code that a worker executes") from None


def _replay(run: str, name: str, recorded: Recorded) -> Any:
    if recorded.word == "result":
        return codec.decode(recorded.value)
    if recorded.word == "interrupted":
        raise _interrupted(name, cast(Message, _signal_message(run, recorded.value["signal"])))
    found = recorded.value["error"]
    raise StepFailed(
        f"step {name!r} failed: {found['type']}: {found['message']}", step=name, type=found["type"],
        message=found["message"],
    )  # fmt: skip


async def _repeated(attempt: Attempt, statement: str, *args: object) -> Row:
    """Call a routine that recognises a repeat by its key, until it is known to be done."""
    while True:
        attempt.check()
        try:
            return await attempt.db.call(statement, *args)
        except errors.Indefinite:
            await asyncio.sleep(backoff(1))


def _interrupted(step: str, signal: Message) -> errors.Interrupted:
    return errors.Interrupted(f"step {step!r} was interrupted by a signal", signal=signal, step=step)


def _signal_json(signal: Message) -> dict[str, Any]:
    return {"position": signal.position, "at": signal.at.isoformat(), "key": signal.key, "body": signal.body}


def _signal_message(channel: str, found: dict[str, Any] | None) -> Message | None:
    if found is None:
        return None
    return Message(
        channel, found["position"], datetime.fromisoformat(found["at"]), "signal", codec.encode(found["body"]),
        found["key"],
    )  # fmt: skip


def _pause_after(error: Exception, retry: Retry | None, failures: int) -> float | None:
    """Seconds to the next try; None if there is none."""
    if isinstance(error, Fatal | InvalidInput | StepMismatch):
        return None
    if isinstance(error, RetryAfter):
        retry = retry or Retry()
        return None if failures >= retry.attempts else max(0.0, float(error.seconds))
    retry = retry or NO_RETRY
    if failures >= retry.attempts or (retry.only is not None and not isinstance(error, retry.only)):
        return None
    return retry.seconds(failures)
