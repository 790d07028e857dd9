"""What can go wrong, and what to do about it.

Error
├── InvalidInput           the call is wrong and nothing was sent; also a ValueError
├── ChannelNotFound, ChannelClosed, RunNotFound
├── IdempotencyConflict, RunConflict   this key, this id, was used with something else
├── Reset                  the reader cannot simply continue; .first, .last
│   ├── HistoryLost        the message at this cursor is not the one the reader saw
│   └── Trimmed            messages after this position were removed
├── RunFailed, RunCancelled            how the run ended, raised by result()
├── Interrupted            a signal stopped an interruptible step; .signal
├── StepFailed             a recorded step failed; raised again where the code reaches it
├── StepMismatch           the journal and the code disagree about a step
├── Fenced                 a newer attempt owns this run; stop
├── SchemaMismatch         the tables are older or newer than this code
├── UnsafeDeployment       this server, pooler or setting breaks a promise; names the fix
├── Unavailable            not done; retry
└── Indefinite             perhaps done: the connection died during commit; retry with the same key

Raised by users inside a step, drawn apart: Fatal (do not try again), RetryAfter (try again then).

    try:
        await channel.publish(body, key="order-42")
    except pgchan.Indefinite:
        ...                 # publish again with the same key: stored once
    except pgchan.Unavailable:
        ...                 # not stored
    except pgchan.Error:
        ...                 # everything else that pgchan raises
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgchan.model import Message


class Error(Exception):
    """Everything that pgchan raises on its own account. `code` is the word that HTTP answers carry."""

    code = "error"

    def __init__(self, message: str, /, **facts: Any) -> None:
        super().__init__(message)
        for name, value in facts.items():
            setattr(self, name, value)


class InvalidInput(Error, ValueError):
    """The call is wrong; nothing was sent and nothing was written."""

    code = "invalid_input"


class ChannelNotFound(Error):
    """No channel of this name exists. `.channel`"""

    code = "channel_not_found"
    channel: str


class ChannelClosed(Error):
    """The channel takes no further messages. `.channel`"""

    code = "channel_closed"
    channel: str


class RunNotFound(Error):
    """No run of this id exists. `.run`"""

    code = "run_not_found"
    run: str


class IdempotencyConflict(Error):
    """This key was published before with another body. `.channel`, `.key`, `.position` of the first message."""

    code = "idempotency_conflict"
    channel: str
    key: str
    position: int


class RunConflict(Error):
    """This id was started before with another workflow or other arguments. `.run`"""

    code = "run_conflict"
    run: str


class Reset(Error):
    """The reader cannot simply continue. `.channel`, `.first` and `.last` kept position, `.cursor` to go on from."""

    code = "reset"
    channel: str
    first: int
    last: int
    cursor: str


class HistoryLost(Reset):
    """The message at this cursor is not the one that the reader saw: discard what was read, go on from `.cursor`."""

    code = "history_lost"


class Trimmed(Reset):
    """Messages after this position were removed: keep what was read, go on from `.cursor`."""

    code = "trimmed"


class RunFailed(Error):
    """The run ended in failure. `.run`, and `.type` and `.message` of the exception that ended it."""

    code = "run_failed"
    run: str
    type: str
    message: str


class RunCancelled(Error):
    """The run was cancelled. `.run`"""

    code = "run_cancelled"
    run: str


class Interrupted(Error):
    """A signal arrived during an interruptible step. `.signal` is that message, `.step` the step's name."""

    code = "interrupted"
    signal: Message
    step: str


class StepFailed(Error):
    """A step failed for good in an earlier attempt. `.step`, and `.type` and `.message` of what it raised.

    The attempt in which the step fails raises the exception itself; a later attempt, which only has the record
    of it, raises this.
    """

    code = "step_failed"
    step: str
    type: str
    message: str


class StepMismatch(Error):
    """The journal and the code disagree about a step. `.step`; change the name, or start a new run."""

    code = "step_mismatch"
    step: str


class Fenced(Error):
    """A newer attempt owns this run: stop, for what this attempt writes is refused. `.run`"""

    code = "fenced"
    run: str


class SchemaMismatch(Error):
    """The tables are older or newer than this code. `.found`, `.wanted`"""

    code = "schema_mismatch"
    found: str | None
    wanted: str


class UnsafeDeployment(Error):
    """This server, pooler, role or setting would break a promise; the message names the fix."""

    code = "unsafe_deployment"


class Unavailable(Error):
    """Not done, because the database could not be reached or refused for now: retry."""

    code = "unavailable"


class Indefinite(Error):
    """Perhaps done: the connection was lost while committing. Retry with the same key."""

    code = "indefinite"


class Fatal(Exception):
    """Raise this in a step to fail it at once, whatever attempts its Retry has left."""


class RetryAfter(Exception):
    """Raise this in a step to try it again after `seconds`, if its Retry has attempts left (without one: of three)."""

    def __init__(self, seconds: float, message: str = "") -> None:
        super().__init__(message or f"retry after {seconds:g} s")
        self.seconds = seconds


# Codes that our routines raise. Class PC is free in PostgreSQL and both drivers pass it through.
BY_SQLSTATE: dict[str, type[Error]] = {
    "PC001": InvalidInput,
    "PC002": ChannelNotFound,
    "PC003": RunNotFound,
    "PC004": ChannelClosed,
    "PC005": IdempotencyConflict,
    "PC006": RunConflict,
    "PC007": Fenced,
}

# Server errors that cannot follow the COMMIT inside a CALL, so the write is known not to be done. The rest of
# what can happen after a CALL was sent leaves the outcome unknown (Indefinite).
NOT_DONE = frozenset(
    {
        "08001", "08004",  # could not connect, connection rejected
        "53100", "53200", "53300",  # disk full, out of memory (locks), too many connections
        "57P03",  # the server is starting up or shutting down
        "40001", "40P01",  # serialization failure, deadlock
        "25006",  # read-only transaction: this is not the primary
    }
)  # fmt: skip

# Classes of errors that our routines can raise before their COMMIT only: data, integrity, names and rights.
REFUSED = frozenset({"22", "23", "42"})


def channel_closed(channel: str) -> ChannelClosed:
    return ChannelClosed(f"channel {channel!r} is closed; it takes no further messages", channel=channel)


def channel_not_found(channel: str) -> ChannelNotFound:
    return ChannelNotFound(f"there is no channel {channel!r}", channel=channel)


def run_not_found(run: str) -> RunNotFound:
    return RunNotFound(f"there is no run {run!r}", run=run)


def fenced(run: str) -> Fenced:
    return Fenced(f"a newer attempt owns run {run!r}; stop: what this attempt writes is refused", run=run)


def idempotency_conflict(channel: str, key: str, position: int) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"key {key!r} was published to {channel!r} at position {position} with another body; use another key",
        channel=channel, key=key, position=position,
    )  # fmt: skip
