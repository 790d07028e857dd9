"""A run from outside: start, status, result, signal, cancel, resume, journal. Coroutines over `Db`; see db.py."""

from __future__ import annotations

import json
from typing import Any

from pgchan import channels, codec, errors, names, sql
from pgchan.callers import Statement
from pgchan.db import Db, Row
from pgchan.model import ENDED, SIGNAL, STATES, Message, RunError, RunStatus
from pgchan.workflows import DEFAULT_QUEUE, Workflow, encode_input, workflow_name

PRIORITY_MAX = 1_000_000
RESULT_WAIT_SECONDS = 10.0  # how often a waiting result() looks by itself; it is told when the run ends


def start_arguments(
    workflow: Workflow[Any, Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any], *, id: str | None,
    queue: str | None, priority: int, delay: float | None, timeout: float | None, parent: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `pgchan.enqueue`, checked. The first is the run's id."""
    name = workflow_name(workflow)
    declared = workflow if isinstance(workflow, Workflow) else None
    if queue is None:
        queue = declared.queue if declared else DEFAULT_QUEUE
    if timeout is None and declared:
        timeout = declared.timeout
    return (
        names.check_run(id) if id is not None else names.new_run_id(),
        name,
        declared.version if declared else None,
        names.check_label(queue, "queue"),
        names.check_integer(priority, "priority", -PRIORITY_MAX, PRIORITY_MAX),
        names.check_optional_seconds(delay, "delay"),
        names.check_optional_seconds(timeout, "timeout", 0.001),
        encode_input(workflow, args, kwargs),
        parent,
    )


def started(run: str, outcome: str) -> bool:
    """Whether this call started the run (False: it had been started before). Raises RunConflict, ChannelClosed."""
    if outcome == "conflict":
        raise errors.RunConflict(
            f"run {run!r} was started with another workflow or other arguments; use another id", run=run
        )
    if outcome == "closed":
        raise errors.channel_closed(run)
    return outcome == "started"


def deferred_start(values: tuple[Any, ...]) -> Statement:
    """The start of a run, to be made later. values: of `start_arguments`."""
    return Statement(
        values[0], sql.ENQUEUE_IN, values, lambda row: started(values[0], row[0]), len(values[7])
    )  # fmt: skip


def deferred_signal(run: str, body: bytes, key: str | None) -> Statement:
    """A signal to a run, to be sent later."""
    return Statement(
        run, sql.DELIVER_IN, (run, body, key), lambda row: signalled(run, body, key, row), len(body)
    )  # fmt: skip


async def status(db: Db, run: str) -> RunStatus:
    """The run's state; see RunHandle.status."""
    rows = await db.fetch(sql.RUN_STATUS, run)
    if not rows:
        raise errors.run_not_found(run)
    return row_status(rows[0])


def row_status(row: Row) -> RunStatus:
    """A RunStatus from the columns of sql.RUN_STATUS."""
    error = RunError(row[8], row[9] or "") if row[8] is not None else None
    values: list[Any] = [*row[:8], error, *row[10:]]
    return RunStatus(*values)


async def listing(
    db: Db, *, state: str | None, workflow: str | None, queue: str | None, limit: int, after: str | None
) -> list[RunStatus]:
    """Runs, newest first; see AsyncClient.runs."""
    if state is not None and state not in STATES:
        raise errors.InvalidInput(f"state must be one of {', '.join(STATES)}, not {state!r:.60}")
    if workflow is not None:
        names.check_label(workflow, "workflow")
    if queue is not None:
        names.check_label(queue, "queue")
    if after is not None:
        names.check_name(after, "after")
    rows = await db.fetch(sql.RUNS, state, workflow, queue, names.check_limit(limit), after)
    return [row_status(row) for row in rows]


async def result(db: Db, run: str, timeout: float | None) -> Any:
    """Wait for the run's end; see RunHandle.result."""
    until = None if timeout is None else db.monotonic() + names.check_seconds(timeout, "timeout")
    ending = None
    try:
        while True:
            mark = db.mark()
            rows = await db.fetch(sql.RUN_RESULT, run)
            if not rows:
                raise errors.run_not_found(run)
            channel_id, state, value, error = rows[0]
            if state in ENDED:
                return ended_value(run, state, value, error)
            if ending is None:
                ending = await db.watch_end(channel_id, mark)
                if ending.missed:
                    continue
            left = RESULT_WAIT_SECONDS if until is None else min(RESULT_WAIT_SECONDS, until - db.monotonic())
            if left <= 0:
                raise TimeoutError(f"run {run!r} has not ended within {timeout:g} s; it is {state}")
            await db.wait_end(ending, left)
    finally:
        if ending is not None:
            ending.unfollow()


def ended_value(run: str, state: str, value: bytes | None, error: bytes | None) -> Any:
    """The result of a run that has ended. Raises RunFailed, RunCancelled."""
    if state == "succeeded":
        return codec.decode(value) if value is not None else None
    if state == "cancelled":
        raise errors.RunCancelled(f"run {run!r} was cancelled", run=run)
    found = json.loads(error or b"{}")
    raise errors.RunFailed(
        f"run {run!r} failed: {found.get('type')}: {found.get('message')}",
        run=run, type=found.get("type", ""), message=found.get("message", ""),
    )  # fmt: skip


def signalled(run: str, body: bytes, key: str | None, row: Row) -> Message:
    """The message that a signal became, from a row of `pgchan.deliver`. Raises what it was refused for."""
    outcome, _, position, at = row[:4]
    if outcome == "missing":
        raise errors.run_not_found(run)
    if outcome == "closed":
        raise errors.ChannelClosed(f"run {run!r} has ended; it takes no more signals", channel=run)
    if outcome == "conflict":
        raise errors.idempotency_conflict(run, key or "", position)
    return channels.row_message(run, codec.JSON, (position, at, SIGNAL, key, None, None, None, body))


async def cancel(db: Db, run: str) -> bool:
    """Cancel the run; see RunHandle.cancel."""
    (done,) = await db.call(sql.CANCEL, run)
    if done is None:
        raise errors.run_not_found(run)
    return bool(done)


async def resume(db: Db, run: str) -> None:
    """Put a failed run back; see RunHandle.resume."""
    (outcome,) = await db.call(sql.RESUME, run)
    if outcome == "missing":
        raise errors.run_not_found(run)
    if outcome != "resumed":
        raise errors.InvalidInput(f"run {run!r} is {outcome}; only a failed run can be resumed")


async def fork(db: Db, run: str, step: str, id: str | None) -> tuple[str, bool]:
    """Start a run from another's record; see RunHandle.fork. The new id, and whether this call started it."""
    names.check_step(step)
    new = names.check_run(id) if id is not None else names.new_run_id()
    try:
        (outcome, _) = await db.call(sql.FORK, run, step, new)
    except errors.Indefinite:  # the id is the key: asking again finds what the first call did
        (outcome, _) = await db.call(sql.FORK, run, step, new)
    if outcome == "missing":
        raise errors.run_not_found(run)
    if outcome == "unrecorded":
        raise errors.InvalidInput(f"run {run!r} has recorded no step {step!r}; its journal() has the names")
    return new, started(new, outcome)


async def set_retention(db: Db, ended_runs: float | None) -> None:
    """How long runs are kept after their end; see AsyncClient.set_retention."""
    await db.call(sql.SET_RETENTION, names.check_optional_seconds(ended_runs, "ended_runs"))


async def journal_name(db: Db, run: str) -> str:
    """The name of the channel that holds the run's results."""
    rows = await db.fetch(sql.RUN_JOURNAL, run)
    if not rows:
        raise errors.run_not_found(run)
    name: str = rows[0][0]
    return name


async def journal(db: Db, run: str) -> list[Message]:
    """The recorded results in order; see RunHandle.journal."""
    name = await journal_name(db, run)
    found: list[Message] = []
    cursor: int | str = 0
    while True:
        page = await channels.page(db, name, after=cursor, limit=names.PAGE_MESSAGES_MAX)
        found += [message for message in page.messages if message.kind == "message"]
        if page.cursor == cursor or not page.messages:
            return found
        cursor = page.cursor
