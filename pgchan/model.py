"""The nouns: what readers and callers are handed. Frozen, slotted, compared by value."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pgchan import codec, names

Kind = Literal["message", "signal", "control"]
State = Literal["scheduled", "running", "waiting", "succeeded", "failed", "cancelled"]

KINDS: tuple[Kind, ...] = ("message", "signal", "control")  # by the number that messages.kind holds
MESSAGE, SIGNAL, CONTROL = range(3)
STATES: tuple[State, ...] = ("scheduled", "running", "waiting", "succeeded", "failed", "cancelled")
ENDED = frozenset({"succeeded", "failed", "cancelled"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNSET: Any = object()


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a channel.

    position: 1, 2, 3… within the channel. at: when it was appended, UTC. kind: "message", "signal" (sent to a run) or
    "control" (written by pgchan itself: reset, consumed, ended). raw: the stored bytes. key: its idempotency key; in a
    journal the step's name. step, attempt: the step of a run that published it, and which try of it, from 1.
    """

    channel: str
    position: int
    at: datetime
    kind: Kind
    raw: bytes = field(repr=False)
    key: str | None = None
    step: str | None = None
    attempt: int | None = None
    content_type: str = field(default=codec.JSON, repr=False)
    void_from: int | None = field(default=None, repr=False)  # of a reset: where the output that it voids begins
    _body: Any = field(default=_UNSET, init=False, repr=False, compare=False)
    # Encodings of this message (its JSON, its SSE frame), made once and shared by all readers of the process.
    cache: dict[str, bytes] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def body(self) -> Any:
        """The decoded body: a JSON value, a str for text types (read as UTF-8), bytes for others."""
        if self._body is _UNSET:
            if codec.is_json(self.content_type) or self.kind == "control":
                body = codec.decode(self.raw)
            else:
                body = self.raw.decode(errors="replace") if self.content_type.startswith("text/") else self.raw
            object.__setattr__(self, "_body", body)
        return self._body

    @property
    def cursor(self) -> str:
        """The position as a token that can be verified: pass it as `after=` to go on behind this message."""
        return names.format_cursor(self.position, microseconds(self.at))

    def to_json(self) -> bytes:
        """This message as the JSON object that HTTP, the CLI and browsers get. Encoded once."""
        if self.cache is None:
            object.__setattr__(self, "cache", {})
        assert self.cache is not None
        if (found := self.cache.get("json")) is None:
            found = self.cache["json"] = self._to_json()
        return found

    def _to_json(self) -> bytes:
        at = self.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        head = json.dumps(
            {"channel": self.channel, "position": self.position, "cursor": self.cursor, "kind": self.kind},
            separators=(",", ":"),
        )
        tail = json.dumps(
            {"key": self.key, "step": self.step, "attempt": self.attempt, "at": at},
            separators=(",", ":"), ensure_ascii=False,
        )  # fmt: skip
        if codec.is_json(self.content_type) or self.kind == "control":
            body = self.raw
        elif self.content_type.startswith("text/"):
            body = json.dumps(self.raw.decode(errors="replace"), ensure_ascii=False).encode()
        else:
            body = json.dumps(base64.b64encode(self.raw).decode()).encode() + b',"encoding":"base64"'
        return head[:-1].encode() + b',"body":' + body + b"," + tail[1:].encode()


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a channel: its messages, the cursor of the last position considered, and the channel's state.

    A reader is done when `closed` and the cursor's position is `head`.
    """

    messages: list[Message]
    cursor: str
    head: int
    closed: bool


@dataclass(frozen=True, slots=True)
class ChannelInfo:
    """A channel's state. head: last position, 0 while empty. trimmed: last position removed. expires_at: with a ttl.

    keep_messages, keep_seconds: what set_retention() has bounded; None: it has not.
    """

    name: str
    head: int
    trimmed: int
    epoch: int
    closed: bool
    content_type: str
    created_at: datetime
    expires_at: datetime | None
    keep_messages: int | None = None
    keep_seconds: float | None = None


class RunError(str):
    """What ended a failed run, as text: "ValueError: no such city". `.type` and `.message` have its two parts."""

    __slots__ = ("message", "type")
    type: str
    message: str

    def __new__(cls, type: str, message: str) -> RunError:
        error = super().__new__(cls, f"{type}: {message}" if message else type)
        error.type, error.message = type, message
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        return RunError, (self.type, self.message)


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run seen from outside. attempt: how often it was claimed. worker: who runs it. step: the step under way, shown
    once it has taken longer than a moment. wake_at: when a scheduled or waiting run goes on by itself."""

    id: str
    workflow: str
    queue: str
    priority: int
    state: State
    attempt: int
    worker: str | None
    step: str | None
    error: RunError | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    wake_at: datetime | None

    @property
    def is_ended(self) -> bool:
        """Whether the run has succeeded, failed or been cancelled."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker process that is registered. runs: how many it executes."""

    id: int
    name: str
    host: str
    pid: int
    started_at: datetime
    runs: int


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a failing step is tried, and when: the n-th retry after delay × backoff^(n-1) s, at most max_delay.

    only: the exception types worth another try; others fail the step at once.
    """

    attempts: int = 3
    delay: float = 1.0
    backoff: float = 2.0
    max_delay: float = 60.0
    only: type[BaseException] | tuple[type[BaseException], ...] | None = None

    def __post_init__(self) -> None:
        names.check_integer(self.attempts, "Retry.attempts", 1, 1_000_000)
        names.check_seconds(self.delay, "Retry.delay")
        names.check_seconds(self.max_delay, "Retry.max_delay")
        names.check_number(self.backoff, "Retry.backoff", 1, 1000)

    def seconds(self, failed: int) -> float:
        """How long to wait after the `failed`-th failure, from 1."""
        try:
            return float(min(self.max_delay, self.delay * self.backoff ** (failed - 1)))
        except OverflowError:
            return self.max_delay


def microseconds(at: datetime) -> int:
    """Whole microseconds since 1970, the check in a cursor."""
    return (at - _EPOCH) // _MICROSECOND
