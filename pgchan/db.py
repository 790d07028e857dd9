"""The seam between what pgchan does and how it waits.

What pgchan does is written once, as coroutines over `Db`. `AsyncClient` awaits them. `Client` steps them with
`drive`: its `Db` blocks instead of suspending, so the first `send` runs a coroutine to its end. Code above this seam
knows no driver, no event loop and no thread.
"""

from __future__ import annotations

import random
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote

from pgchan import errors
from pgchan.model import MESSAGE, Message

if TYPE_CHECKING:
    from pgchan.writer import Batch

# Revisions compare as text. A deploy migrates first: the new schema serves old code until pgchan.serves() ends that.
SCHEMA_VERSION = "pgchan_0002"  # the newest revision that this code knows
SCHEMA_OLDEST = "pgchan_0002"  # the oldest on which it has all that it needs

T = TypeVar("T")
Row = Sequence[Any]

APPENDED = "appended"
REPEATED = "repeated"
STORED = frozenset({APPENDED, REPEATED})


class Entry:
    """One message on its way into a channel; slots and no defaults machinery, for there is one per token.

    channel_id is None until the name was looked up. fence: the epoch that must own the channel. owner: entries of one
    owner in a batch are written together or not at all. inbox: signals up to here are consumed with it.
    """

    __slots__ = (
        "attempt", "body", "channel_id", "content_type", "fence", "inbox", "key", "kind", "name", "owner", "step",
        "void_from",
    )  # fmt: skip

    def __init__(
        self, name: str, body: bytes, *, channel_id: int | None = None, content_type: str = "application/json",
        kind: int = MESSAGE, key: str | None = None, step: str | None = None, attempt: int | None = None,
        void_from: int | None = None, fence: int | None = None, owner: int | None = None, inbox: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.body = body
        self.channel_id = channel_id
        self.content_type = content_type
        self.kind = kind
        self.key = key
        self.step = step
        self.attempt = attempt
        self.void_from = void_from
        self.fence = fence
        self.owner = owner
        self.inbox = inbox


@dataclass(slots=True)  # not frozen: there is one per token, and each would cost a microsecond more
class Outcome:
    """What became of an entry: a word of `pgchan.append`, and where the message is if it is stored."""

    word: str
    channel_id: int | None
    position: int | None
    at: datetime | None


@dataclass(frozen=True, slots=True)
class Known:
    """What a process remembers of a channel, so that it need not ask before each publish."""

    id: int
    content_type: str


class Follow(Protocol):
    """A reader's interest in a channel, kept alive by holding it."""

    @property
    def is_closed(self) -> bool:
        """Whether the channel takes no more messages, as far as is known."""

    def recent(self, after: int, after_us: int | None) -> list[Message] | None:
        """Messages behind a position from memory; None if memory does not reach back to it."""

    def unfollow(self) -> None:
        """Give the interest up; called when the reader is done."""


class Ending(Protocol):
    """An interest in a channel's end only, kept alive by holding it.

    missed: whether the channel may have ended since the mark: look again before waiting.
    """

    missed: bool

    def unfollow(self) -> None:
        """Give the interest up."""


class Db(Protocol):
    """One database, as the code above the seam sees it."""

    async def fetch(self, statement: str, *args: object) -> list[Row]:
        """Run a statement that only reads, again after any failure until the patience is over; its rows."""

    async def call(self, statement: str, *args: object) -> Row:
        """Run a statement that writes, in a transaction of its own; its single row.

        It is tried again only while it is known not to be done; then Unavailable. Perhaps done: Indefinite.
        """

    async def append(self, entry: Entry) -> Outcome:
        """Write an entry with the next batch; durable when it returns."""

    async def append_together(self, batches: Sequence[Batch]) -> list[Outcome]:
        """Write batches in one transaction, or none of them where one of their entries is refused."""

    def announce(self, ids: list[int], heads: list[int], created: bool, queues: list[str]) -> None:
        """Send wakeups for what another transaction has committed, soon and without waiting."""

    async def follow(self, name: str) -> Follow:
        """Start hearing of a channel; wakeups from then on are not missed."""

    async def wait(self, follow: Follow, after: int, seconds: float) -> None:
        """Until there may be something behind `after`, or something else changed, or the time is over."""

    def mark(self) -> int:
        """A mark for watch_end, to be taken before the look that found that the channel has not ended."""

    async def watch_end(self, channel_id: int, mark: int) -> Ending:
        """Start hearing of a channel's end, and of nothing else."""

    async def wait_end(self, ending: Ending, seconds: float) -> None:
        """Until the channel may have ended, or the time is over."""

    def known(self, name: str) -> Known | None:
        """What is remembered of a channel."""

    def learn(self, name: str, known: Known | None) -> None:
        """Remember, or forget, a channel."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps."""

    @property
    def patience(self) -> float:
        """Seconds for which a call is retried before it is Unavailable."""


# Settings of every connection that pgchan opens for itself: a role or a database may have other defaults, and each of
# these would break something (a lease on a connection that listens, a snapshot that outlives its statement, …).
SESSION: dict[str, str] = {
    "default_transaction_isolation": "read committed",  # the append is written for it
    "statement_timeout": "30s",  # nothing that pgchan sends takes that long
    "lock_timeout": "0",  # it could strike after a commit
    "idle_in_transaction_session_timeout": "60s",  # a transaction of run.transaction() whose worker hangs
    "array_nulls": "on",  # or a null in an array would arrive as the text NULL
    "timezone": "UTC",
    "datestyle": "ISO",  # psycopg reads timestamps as text, in this style only
    "client_encoding": "UTF8",  # or text that the other encoding lacks could not be sent
}
# The same, of settings that servers before this version do not know and refuse.
SESSION_SINCE: dict[str, tuple[int, str]] = {
    "idle_session_timeout": (140_000, "0"),
    "client_connection_check_interval": (140_000, "500ms"),  # a dead client's statement ends, and with it its locks
    "transaction_timeout": (170_000, "0"),  # it ends the session
}
# The connections that write and listen send the same few statements for ever: one plan each, made once, is enough. The
# pool lends its connections to run.transaction(), whose statements are not ours to plan.
DEDICATED: dict[str, str] = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
# Not every platform that PostgreSQL runs on has these; a server that refuses them is asked again without.
SESSION_OPTIONAL = ("client_connection_check_interval",)

BACKOFF_SECONDS = (0.02, 1.0)  # first and longest pause between tries; each doubles and is drawn at random below that

# What a server must not be. The text is what the user reads, so it names the fix.
_OLDEST_SERVER = 140_000


# The second is about a control_dsn that was given.
POOLER = (
    "the DSN leads through a transaction pooler, on which LISTEN hears nothing and session locks hold nothing; "
    "give control_dsn= (or PGCHAN_CONTROL_DSN), a direct connection to the same database"
)
CONTROL_POOLER = (
    "a NOTIFY sent over the DSN is not heard over control_dsn, or a lock taken over control_dsn is not held; "
    "let control_dsn lead to the same database, directly and not through a transaction pooler"
)


LOGIN = "the server refused this user, password or database; check the DSN"
LOCKED = "the channel is locked by a transaction that is still open; nothing was written"


def lock_wait(patience: float) -> int:
    """Milliseconds for which a call may wait for a locked channel; less than statement_timeout."""
    return int(1000 * min(patience, 25.0))


def settings(role: str, server_version: int) -> dict[str, str]:
    """The settings of a connection that pgchan opens for this purpose; server_version: 0 while it is not known."""
    chosen = SESSION | {name: value for name, (since, value) in SESSION_SINCE.items() if since <= server_version}
    return chosen | DEDICATED if role in ("writer", "listen") else chosen


def session_options(values: dict[str, str], dsn: str) -> str:
    """Settings as libpq's `options`, behind those that the DSN has and which they would replace."""
    parameters = (part.partition("=") for part in dsn.partition("?")[2].split("&"))
    given = [unquote(value) for name, _, value in parameters if name == "options"]
    return " ".join([*given, *(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in values.items())])


def backoff(tries: int) -> float:
    """How long to pause after the `tries`-th failure, from 1: exponential, with full jitter."""
    first, longest = BACKOFF_SECONDS
    return random.uniform(first / 2, min(longest, first * 2 ** min(tries, 16)))  # noqa: S311 - not a secret


def check_server(row: Row) -> None:
    """Refuse a server or database in which pgchan's tables cannot be of use. row: sql.DEPLOYMENT."""
    number, encoding, database = row[0], row[1], row[8]
    if number < _OLDEST_SERVER:
        raise errors.UnsafeDeployment(
            f"PostgreSQL {number // 10_000} is too old; pgchan needs 14 or newer: upgrade the server"
        )
    if encoding != "UTF8":
        raise errors.UnsafeDeployment(f"database {database!r} is encoded in {encoding}; pgchan needs one in UTF8")


def check_deployment(row: Row, what: str = "the DSN") -> None:
    """Refuse a server on which a promise would break; row: sql.DEPLOYMENT, asked over `what`.

    Raises UnsafeDeployment, SchemaMismatch (not migrated).
    """
    check_server(row)
    _number, _encoding, fsync, full_page_writes, read_only, standby, _pid, migrated, database, _user = row
    if standby:
        raise errors.UnsafeDeployment(f"{what} leads to a standby, which takes no writes; point it at the primary")
    if read_only == "on":
        raise errors.UnsafeDeployment(
            f"{what} leads to a read-only session; point it at the primary, or unset default_transaction_read_only"
        )
    for name, value in (("fsync", fsync), ("full_page_writes", full_page_writes)):
        if value != "on":
            raise errors.UnsafeDeployment(f"the server runs with {name}={value} and may lose commits; set {name}=on")
    if not migrated:
        raise errors.SchemaMismatch(
            f"database {database!r} has no pgchan schema; run: pgchan migrate", found=None, wanted=SCHEMA_VERSION
        )


def check_inherited(rows: Sequence[Row], user: str) -> None:
    """Refuse a role whose settings would break something where a pooler passes them on. rows: sql.INHERITED."""
    for name, value, wanted in rows:
        raise errors.UnsafeDeployment(
            f"{name}={value} reaches pgchan through the pooler, which does not let it choose its own; "
            f"run: alter role {user} set {name} = '{wanted}'"
        )


def check_control(row: Row, database: str) -> None:
    """Refuse a control_dsn that leads elsewhere than the DSN, which led to this database. row: sql.DEPLOYMENT."""
    if row[8] != database:
        raise errors.UnsafeDeployment(
            f"control_dsn leads to database {row[8]!r}, the DSN to {database!r}; both must lead to the same one"
        )
    check_deployment(row, "control_dsn")


def check_version(row: Row) -> None:
    """Refuse a schema that lacks what this code needs, or no longer has what this code knows; row: sql.VERSION."""
    found, serves = row
    if found < SCHEMA_OLDEST:
        raise errors.SchemaMismatch(
            f"the database is at {found}, this code needs {SCHEMA_OLDEST}; run: pgchan migrate",
            found=found, wanted=SCHEMA_OLDEST,
        )  # fmt: skip
    if serves > SCHEMA_VERSION:
        raise errors.SchemaMismatch(
            f"the database is at {found} and serves code of {serves} and later, this code is of {SCHEMA_VERSION}; "
            f"install a newer pgchan",
            found=found, wanted=SCHEMA_VERSION,
        )  # fmt: skip


# What the network, or libpq, says, and what it means. Its own text names hosts and ports, so it is not passed on.
_REASONS = {
    "refused": "nothing listens at that host and port",
    "connect call failed": "nothing listens at that host and port",
    "timeout": "no answer",
    "timed out": "no answer",
    "translate host name": "the host name is not known",
    "name or service not known": "the host name is not known",
    "name resolution": "the host name is not known",
    "no such file": "there is no such socket",
}


def unreachable(text: str) -> errors.Unavailable:
    """Unavailable, with the reason as far as the text of a failed connection tells it."""
    reason = next((reason for words, reason in _REASONS.items() if words in text.lower()), "")
    return errors.Unavailable("the database cannot be reached" + (f": {reason}; check the DSN" if reason else ""))


def translate(sqlstate: str | None, message: str, hint: str | None, *, writing: bool) -> errors.Error:
    """The error of the tree for a driver's error on a connection of pgchan's own.

    sqlstate None: the connection failed or was lost. writing: the statement may have committed before it failed.
    Texts of the server are passed on only where our own routines wrote them.
    """
    if sqlstate is not None and (known := errors.BY_SQLSTATE.get(sqlstate)) is not None:
        return known(f"{message}; {hint}" if hint else message)
    if sqlstate == "42501":
        return errors.UnsafeDeployment(
            f"the database role lacks a right ({message}); run: grant {_role_for(message)} to <the role>; "
            "or see: pgchan doctor"
        )
    if sqlstate is not None and (sqlstate in ("3D000", "28P01") or sqlstate.startswith("28")):
        return errors.UnsafeDeployment(LOGIN)
    if sqlstate in ("42883", "42P01", "3F000"):
        return errors.SchemaMismatch("the pgchan schema is not what this code expects; run: pgchan migrate",
                                     found=None, wanted=SCHEMA_VERSION)  # fmt: skip
    if sqlstate in errors.NOT_DONE:
        return errors.Unavailable(f"the database refused for now (SQLSTATE {sqlstate}); nothing was written")
    lost = sqlstate is None or sqlstate[:2] in ("08", "57", "55", "54")
    # What a writing call raises may come from its second transaction, the wakeup, when all is stored.
    refused = not lost and (not writing or (sqlstate is not None and sqlstate[:2] in errors.REFUSED))
    if refused:
        return errors.Error(f"the database refused a statement of pgchan (SQLSTATE {sqlstate})")
    if writing:
        return errors.Indefinite(
            "the connection was lost before the answer came; perhaps it was written: retry with the same key"
        )
    return unreachable("")


# The least of the roles in schema.sql that has a right on what the server names in its refusal, in whatever language.
# What is not here is a worker's.
_ROLES: dict[str, frozenset[str]] = {
    "pgchan_publisher": frozenset({
        "publish", "start", "signal", "cancel", "append_messages", "write_messages", "append_message",
        "write_message", "find_channel", "create_channel", "close_channel", "enqueue", "call_enqueue",
        "try_enqueue_many", "call_enqueue_many", "deliver", "call_deliver", "try_deliver_many", "call_deliver_many",
        "wake",
    }),
    "pgchan_subscriber": frozenset({
        "read", "status", "as_json", "ping", "take_probe", "free_probe", "channels", "messages", "runs", "workers",
        "retention", "removed",
        "final_messages", "run_status", "channel_status", "worker_status", "pgchan", "version", "serves",
    }),
    "pgchan_admin": frozenset({
        "trim_channel", "compact_channel", "delete_channel", "resume", "fork", "call_fork", "set_retention",
        "set_channel_retention",
    }),
}  # fmt: skip


def _role_for(message: str) -> str:
    words = set(re.findall(r"\w+", message))
    return next((role for role, names in _ROLES.items() if words & names), "pgchan_worker")


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Step a coroutine to its end, for a door that blocks where the other one suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        coroutine.close()
    raise AssertionError("a blocking Db suspended")
