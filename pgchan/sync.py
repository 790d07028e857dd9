"""The blocking door: Client, its channels and its runs, on psycopg.

Long, because it is all that a user calls. The same as aio.py without `async` and `await`: each method steps the same
coroutine to its end over a Db that blocks. test_house compares the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from pgchan import callers, channels, errors, names, runs, sql
from pgchan.channels import Tail
from pgchan.codec import encode
from pgchan.db import drive
from pgchan.dsn import resolve, resolve_control
from pgchan.model import ChannelInfo, Message, Page, RunStatus, WorkerInfo
from pgchan.psycopg_db import PsycopgDb
from pgchan.workflows import Workflow

POOL_SIZE = 5  # connections for statements, beside one that writes and one that listens
PATIENCE_SECONDS = 30.0


class Client:
    """One database. Connects on first use; `with` or `close()` closes.

    dsn: default $PGCHAN_DSN, then $DATABASE_URL. control_dsn: a direct connection for LISTEN and locks where dsn goes
    through a transaction pooler; default $PGCHAN_CONTROL_DSN. timeout: seconds for which a call is retried while the
    database cannot be reached. pool_size: connections for statements; up to two more write and listen.
    AsyncClient is for one event loop, Client may be shared by threads; each belongs to the process that made it.
    Raises InvalidInput (the DSN); at first use UnsafeDeployment, SchemaMismatch, Unavailable.
    """

    def __init__(
        self, dsn: str | None = None, *, control_dsn: str | None = None, timeout: float = PATIENCE_SECONDS,
        pool_size: int = POOL_SIZE, name: str = "pgchan",
    ) -> None:  # fmt: skip
        self.dsn = resolve(dsn)
        self.control_dsn = resolve_control(control_dsn, dsn)
        self._db = PsycopgDb(
            self.dsn, self.control_dsn if self.control_dsn != self.dsn else None,
            patience=names.check_seconds(timeout, "timeout", 0.001),
            pool_size=names.check_integer(pool_size, "pool_size", 1, 1000), name=names.check_label(name, "name")[:40],
        )  # fmt: skip
        self._pid = os.getpid()
        self._closed = False

    def __enter__(self) -> Client:
        self._use().open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Send what waits to be written, then close all connections. The client cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._db.close()

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the client was made: batches written, their entries, reads of moved channels, statements."""
        return self._db.stats

    @property
    def health(self) -> str:
        """How the process hears of news: "idle", "connecting", "listening" or "closed"."""
        return self._db.listener.state

    def _use(self) -> PsycopgDb:
        if self._closed:
            raise errors.InvalidInput("this client is closed; make a new one")
        if os.getpid() != self._pid:
            raise errors.InvalidInput("this client was made before a fork; make one in each process")
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise errors.InvalidInput("pgchan.Client blocks and would stop this event loop; use pgchan.AsyncClient")
        return self._db

    # -- channels

    def channel(self, name: str) -> Channel:
        """The channel of this name. No I/O; it comes into being with its first message, or by create()."""
        return Channel(self, names.check_name(name))

    def channels(self, *, prefix: str = "", limit: int = 100, after: str = "") -> list[ChannelInfo]:
        """Channels whose name begins with `prefix`, in order of name; after: the last name of the page before."""
        return drive(channels.listing(self._use(), after=after, prefix=prefix, limit=limit))

    # -- runs

    def start(
        self, workflow: Workflow[Any, Any] | str, /, *args: Any, id: str | None = None, queue: str | None = None,
        priority: int = 0, delay: float | None = None, timeout: float | None = None, connection: Any = None,
        defer: bool = False, **kwargs: Any,
    ) -> RunHandle:  # fmt: skip
        """Start a run of a workflow, given as the function or by name, and return its handle.

        Idempotent by id: starting an id again returns the same run. args, kwargs: JSON values, converted to the
        function's annotations. priority: higher first. delay: seconds before it may begin. timeout: seconds after
        which it fails. connection: part of its open transaction; the run exists if and when that commits.
        defer: as in publish.
        Raises InvalidInput, RunConflict (the id was used for something else), ChannelClosed, Unavailable, Indefinite.
        Source: routine pgchan.enqueue.
        """
        db = self._use()
        values = runs.start_arguments(
            workflow, args, kwargs, id=id, queue=queue, priority=priority, delay=delay, timeout=timeout
        )
        if defer:
            _defer(callers.blocking(connection), runs.deferred_start(values), db)
            return RunHandle(self, values[0])
        if connection is not None:
            (row,) = drive(callers.fetch(callers.blocking(connection), sql.ENQUEUE_IN, *values))
        else:
            row = _start(db, values, keyed=id is not None)
        return RunHandle(self, values[0], created=runs.started(values[0], row[0]))

    def run(self, id: str) -> RunHandle:
        """The handle of a run. No I/O."""
        return RunHandle(self, names.check_run(id))

    def runs(
        self, *, state: str | None = None, workflow: str | None = None, queue: str | None = None, limit: int = 100,
        after: str | None = None,
    ) -> list[RunStatus]:  # fmt: skip
        """Runs, newest first, filtered; after: the id of the last run of the page before."""
        return drive(runs.listing(
            self._use(), state=state, workflow=workflow, queue=queue, limit=limit, after=after
        ))  # fmt: skip

    def set_retention(self, *, ended_runs: float | None) -> None:
        """Keep runs for `ended_runs` seconds after their end; None: for ever, as at first.

        Then workers remove them, with all that they said and recorded, and their ids may be used again. A run that
        another one has started stays as long as that one may ask for its result; a channel with a ttl goes by that.
        Raises InvalidInput.
        """
        drive(runs.set_retention(self._use(), ended_runs))

    def workers(self) -> list[WorkerInfo]:
        """The workers that are registered, and how many runs each executes."""
        return [WorkerInfo(*row) for row in drive(self._use().fetch(sql.WORKERS))]


class Channel:
    """A named, durable sequence of messages: positions 1, 2, 3… in commit order. Made by `client.channel(name)`."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    def __repr__(self) -> str:
        return f"<channel {self.name}>"

    @overload
    def publish(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: Literal[False] = False
    ) -> Message: ...

    @overload
    def publish(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool
    ) -> Message | None: ...

    def publish(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool = False
    ) -> Message | None:
        """Append `body` to this channel and return the stored message, durable unless `connection` is given.

        Positions are 1, 2, 3… in commit order, without gaps. With `key` a repeat stores nothing and returns the
        first message, so a lost reply can be retried; without it a retry appends twice.

        body: any JSON value, at most BODY_BYTES_MAX bytes encoded; str or bytes on channels of other types.
        connection: of asyncpg, psycopg or SQLAlchemy: part of its open transaction, visible and announced if and when
        that commits; the channel takes no other publisher until then. defer: with a SQLAlchemy Session or AsyncSession,
        keep the message until just before that commits, and return None; a refusal is then raised by the commit.
        Raises InvalidInput, ChannelClosed, IdempotencyConflict, Unavailable, Indefinite.
        Source: routine pgchan.append.
        """
        db = self._client._use()
        if defer:
            entry = drive(channels.prepare_deferred(db, self.name, body, key))
            _defer(callers.blocking(connection), entry, db)
            return None
        if connection is None:
            return drive(channels.publish(db, self.name, body, key=key))
        return (self.publish_many([body], keys=[key], connection=connection))[0]

    def publish_many(
        self, bodies: Sequence[Any], *, keys: Sequence[str | None] | None = None, connection: Any = None
    ) -> list[Message]:
        """Append several bodies, all or nothing, and return the stored messages in order. One transaction.

        Otherwise as publish. Up to 1,000 bodies and 4 MiB take one round trip.
        """
        return drive(
            channels.publish_many(
                self._client._use(), self.name, bodies, channels.check_batch(bodies, keys), callers.blocking(connection)
            )
        )

    def read(self, *, after: int | str = 0, limit: int = 100, view: str = "final") -> list[Message]:
        """The messages behind `after`, at most `limit`; never waits.

        after: a position, a cursor, or "now". view: "final" leaves out void output of runs, "raw" has everything.
        Raises InvalidInput, HistoryLost, Trimmed.
        """
        return drive(channels.read(self._client._use(), self.name, after=after, limit=limit, view=view))

    def page(self, *, after: int | str = 0, limit: int = 100, view: str = "final") -> Page:
        """The next `limit` positions: their messages, the cursor of the last position considered, head and state.

        Void output leaves gaps, so a page may have fewer messages although more follow: go on from its cursor until
        that is at `head`. Otherwise as read.
        """
        return drive(channels.page(self._client._use(), self.name, after=after, limit=limit, view=view))

    def tail(self, *, after: int | str = 0, view: str = "final") -> ChannelTail:
        """The messages behind `after` and those to come, for `for`; ends when the channel is closed and all read.

        A lost connection is not seen: the tail reconnects and goes on exactly behind the last message it gave.
        Raises InvalidInput, HistoryLost, Trimmed, UnsafeDeployment.
        """
        return ChannelTail(self._client, Tail(self._client._db, self.name, after=after, view=view))

    def info(self) -> ChannelInfo:
        """The channel's state. Raises ChannelNotFound."""
        return drive(channels.info(self._client._use(), self.name))

    def create(self, content_type: str = "application/json", ttl: float | None = None) -> None:
        """Create the channel, unless it exists. ttl: seconds after which workers remove it, with all messages.

        The channel of a run stays until that has ended.
        Raises InvalidInput if it exists with another content type.
        """
        drive(channels.create(self._client._use(), self.name, content_type, ttl))

    def close(self) -> None:
        """Let the channel take no more messages; its readers end when they have read all. Closing again does nothing.

        Raises ChannelNotFound; InvalidInput on the channel of a run that has not ended.
        """
        drive(channels.close(self._client._use(), self.name))

    def trim(self, before: int) -> None:
        """Remove the messages before a position. Raises ChannelNotFound, InvalidInput past the head plus one."""
        drive(channels.trim(self._client._use(), self.name, before))

    def compact(self) -> int:
        """Rewrite this closed channel as its final text, and return by how many messages it became shorter.

        Text (bodies that are strings) is joined to the text of the same step that it follows, in as few messages as
        BODY_BYTES_MAX allows; other bodies stay as they are, and so does what was published with a key. What is void,
        the signals and all control messages go, but for the one that tells of a run's end. For a channel that was
        closed, or whose run has succeeded or was cancelled; the run itself, its result and its journal stay.

        The new messages stand behind the old ones, under new positions and times. They begin with a control message
        {"type": "reset", "from": n}: all from n on up to there is void. So a reader who comes late reads the text once;
        one who had read it is told to drop it and reads the same again; one in between is told Trimmed before that.
        `attempt` is the last that said some of the text. What set_retention() keeps by age counts from now.
        It is one transaction, and doing it again changes nothing and returns 0: after Indefinite just call it again.
        Raises ChannelNotFound; InvalidInput if the channel is open, that of a failed run (which may be resumed), not
        JSON, or longer than 250,000 messages.
        """
        return drive(channels.compact(self._client._use(), self.name))

    def set_retention(self, *, messages: int | None = None, seconds: float | None = None) -> None:
        """Keep only the last `messages`, and none that is older than `seconds`; None: no such bound, as at first.

        Workers trim the channel now and then, so for a while it may hold more. A reader that stands before what is
        kept is told Trimmed. Signals that nobody has consumed stay, and what a run that has not ended says on it.
        Raises ChannelNotFound, InvalidInput.
        """
        drive(channels.set_retention(self._client._use(), self.name, messages, seconds))

    def delete(self) -> None:
        """Delete the channel with its messages; its readers are told HistoryLost. Raises ChannelNotFound."""
        drive(channels.delete(self._client._use(), self.name))


class ChannelTail:
    """An endless reader, for `for`; `with` or unfollow() ends it early. pages() gives all there is."""

    def __init__(self, client: Client, tail: Tail) -> None:
        self._client = client
        self._tail = tail
        self._page: list[Message] = []

    @property
    def cursor(self) -> str | None:
        """Where this reader stands: pass it as `after=` to go on later."""
        return self._tail.cursor

    def __iter__(self) -> ChannelTail:
        return self

    def __next__(self) -> Message:
        while not self._page:
            found = self.next_page()
            if found is None:
                raise StopIteration
            self._page = found[::-1]
        return self._page.pop()

    def next_page(self, wait: float = channels.WAIT_SECONDS) -> list[Message] | None:
        """All that has come, at least one message unless `wait` seconds are over; None at the channel's end."""
        self._client._use()
        try:
            found = drive(self._tail.next(wait))
        except errors.Reset:
            self.unfollow()
            raise
        if found is None:
            self.unfollow()
        return found

    def pages(self) -> Iterator[list[Message]]:
        """Page by page, until the channel's end."""
        while (found := self.next_page()) is not None:
            if found:
                yield found

    def unfollow(self) -> None:
        """Stop hearing of the channel."""
        self._tail.unfollow()

    def __enter__(self) -> ChannelTail:
        return self

    def __exit__(self, *_: object) -> None:
        self.unfollow()

    def __del__(self) -> None:
        self._tail.unfollow()


class RunHandle:
    """A run seen from outside. Made by `client.start(…)` and `client.run(id)`.

    channel: what the run says and is told. created: whether this start began it (False: it had been started before).
    """

    def __init__(self, client: Client, id: str, *, created: bool = False) -> None:
        self._client = client
        self.id = id
        self.created = created
        self.channel = Channel(client, id)

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    def status(self) -> RunStatus:
        """The run's state now. Raises RunNotFound."""
        return drive(runs.status(self._client._use(), self.id))

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the run's end and return its result. timeout: seconds to wait.

        Raises RunFailed, RunCancelled, RunNotFound, TimeoutError (the run goes on).
        """
        return drive(runs.result(self._client._use(), self.id, timeout))

    @overload
    def signal(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: Literal[False] = False
    ) -> Message: ...

    @overload
    def signal(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool
    ) -> Message | None: ...

    def signal(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool = False
    ) -> Message | None:
        """Send the run a message, durable when this returns, and wake it if it waits.

        The run consumes signals in order, each once; a `consumed` control message on its channel names the step that
        did. Signals that it did not consume are named `missed` when it ends. key, connection, defer: as in publish.
        Raises InvalidInput, RunNotFound, ChannelClosed (it has ended), IdempotencyConflict, Unavailable, Indefinite.
        Source: routine pgchan.deliver.
        """
        raw, key = encode(body), names.check_key(key)
        if defer:
            _defer(callers.blocking(connection), runs.deferred_signal(self.id, raw, key), self._client._use())
            return None
        if connection is not None:
            (row,) = drive(callers.fetch(callers.blocking(connection), sql.DELIVER_IN, self.id, raw, key))
        else:
            row = drive(self._client._use().call(sql.DELIVER, self.id, raw, key))
        return runs.signalled(self.id, raw, key, row)

    def cancel(self) -> bool:
        """Cancel the run: from here on nothing is recorded for it. False if it had ended. Raises RunNotFound."""
        return drive(runs.cancel(self._client._use(), self.id))

    def resume(self) -> None:
        """Put a failed run back into its queue; recorded steps are not executed again.

        Raises RunNotFound; InvalidInput unless it has failed.
        """
        drive(runs.resume(self._client._use(), self.id))

    def fork(self, step: str, *, id: str | None = None) -> RunHandle:
        """Start another run that has this one's record up to, and without, a step; it goes on from there.

        step: a name in the journal. id: of the new run; forking to it again returns the same run.
        Raises RunNotFound, InvalidInput (no such step), RunConflict (the id was used for something else).
        """
        new, created = drive(runs.fork(self._client._use(), self.id, step, id))
        return RunHandle(self._client, new, created=created)

    def tail(self, *, after: int | str = 0, view: str = "final") -> ChannelTail:
        """What the run says, as channel.tail; ends when the run has ended."""
        return self.channel.tail(after=after, view=view)

    def journal(self) -> list[Message]:
        """The recorded results in order: `.key` is the step's name, `.body` its result. Raises RunNotFound."""
        return drive(runs.journal(self._client._use(), self.id))

    def delete(self) -> None:
        """Delete a run that has ended, with its channel and journal. Raises RunNotFound, InvalidInput."""
        drive(channels.delete(self._client._use(), self.id, run=True))


def _start(db: PsycopgDb, values: tuple[Any, ...], *, keyed: bool) -> Any:
    """Enqueue; the id is the key, so a lost answer is asked for again."""
    try:
        return drive(db.call(sql.ENQUEUE, *values))
    except errors.Indefinite:
        row = drive(db.call(sql.ENQUEUE, *values))
        # Without an id of the caller's own nobody else can have started this run.
        return row if keyed or row[0] != "existed" else ("started", row[1])


def _defer(session: Any, what: Any, db: PsycopgDb) -> None:
    from pgchan.sqlalchemy import defer  # noqa: PLC0415 - most processes need no SQLAlchemy

    defer(session, what, db.announce)
