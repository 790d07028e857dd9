"""The async door: AsyncClient, its channels and its runs, on asyncpg.

Long, because it is all that a user calls, and thin: what these methods do is in channels.py and runs.py, how they wait
in asyncpg_db.py. sync.py has the same classes, which block; test_house compares the two.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, overload

from pgchan import callers, channels, errors, names, runs, sql
from pgchan.asyncpg_db import AsyncpgDb
from pgchan.channels import Tail
from pgchan.codec import encode
from pgchan.dsn import resolve, resolve_control
from pgchan.model import ChannelInfo, Message, Page, RunStatus, WorkerInfo
from pgchan.workflows import Workflow

POOL_SIZE = 5  # connections for statements, beside one that writes and one that listens
PATIENCE_SECONDS = 30.0


class AsyncClient:
    """One database. Connects on first use; `async with` or `await close()` closes.

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
        self._db = AsyncpgDb(
            self.dsn, self.control_dsn if self.control_dsn != self.dsn else None,
            patience=names.check_seconds(timeout, "timeout", 0.001),
            pool_size=names.check_integer(pool_size, "pool_size", 1, 1000), name=names.check_label(name, "name")[:40],
        )  # fmt: skip
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        await self._use().open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Send what waits to be written, then close all connections. The client cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            await self._db.close()

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the client was made: batches written, their entries, reads of moved channels, statements."""
        return self._db.stats

    @property
    def health(self) -> str:
        """How the process hears of news: "idle", "connecting", "listening" or "closed"."""
        return self._db.listener.state

    def _use(self) -> AsyncpgDb:
        if self._closed:
            raise errors.InvalidInput("this client is closed; make a new one")
        if os.getpid() != self._pid:
            raise errors.InvalidInput("this client was made before a fork; make one in each process")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = self._db.loop = loop
        elif self._loop is not loop:
            raise errors.InvalidInput("this client belongs to another event loop; make one in each loop")
        return self._db

    # -- channels

    def channel(self, name: str) -> AsyncChannel:
        """The channel of this name. No I/O; it comes into being with its first message, or by create()."""
        return AsyncChannel(self, names.check_name(name))

    async def channels(self, *, prefix: str = "", limit: int = 100, after: str = "") -> list[ChannelInfo]:
        """Channels whose name begins with `prefix`, in order of name; after: the last name of the page before."""
        return await channels.listing(self._use(), after=after, prefix=prefix, limit=limit)

    # -- runs

    async def start(
        self, workflow: Workflow[Any, Any] | str, /, *args: Any, id: str | None = None, queue: str | None = None,
        priority: int = 0, delay: float | None = None, timeout: float | None = None, connection: Any = None,
        defer: bool = False, **kwargs: Any,
    ) -> AsyncRunHandle:  # fmt: skip
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
            _defer(connection, runs.deferred_start(values), db)
            return AsyncRunHandle(self, values[0])
        if connection is not None:
            (row,) = await callers.fetch(connection, sql.ENQUEUE_IN, *values)
        else:
            row = await _start(db, values, keyed=id is not None)
        return AsyncRunHandle(self, values[0], created=runs.started(values[0], row[0]))

    def run(self, id: str) -> AsyncRunHandle:
        """The handle of a run. No I/O."""
        return AsyncRunHandle(self, names.check_run(id))

    async def runs(
        self, *, state: str | None = None, workflow: str | None = None, queue: str | None = None, limit: int = 100,
        after: str | None = None,
    ) -> list[RunStatus]:  # fmt: skip
        """Runs, newest first, filtered; after: the id of the last run of the page before."""
        return await runs.listing(
            self._use(), state=state, workflow=workflow, queue=queue, limit=limit, after=after
        )  # fmt: skip

    async def set_retention(self, *, ended_runs: float | None) -> None:
        """Keep runs for `ended_runs` seconds after their end; None: for ever, as at first.

        Then workers remove them, with all that they said and recorded, and their ids may be used again. A run that
        another one has started stays as long as that one may ask for its result; a channel with a ttl goes by that.
        Raises InvalidInput.
        """
        await runs.set_retention(self._use(), ended_runs)

    async def workers(self) -> list[WorkerInfo]:
        """The workers that are registered, and how many runs each executes."""
        return [WorkerInfo(*row) for row in await self._use().fetch(sql.WORKERS)]


class AsyncChannel:
    """A named, durable sequence of messages: positions 1, 2, 3… in commit order. Made by `client.channel(name)`."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self._client = client
        self.name = name

    def __repr__(self) -> str:
        return f"<channel {self.name}>"

    @overload
    async def publish(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: Literal[False] = False
    ) -> Message: ...

    @overload
    async def publish(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool
    ) -> Message | None: ...

    async def publish(
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
            entry = await channels.prepare_deferred(db, self.name, body, key)
            _defer(connection, entry, db)
            return None
        if connection is None:
            return await channels.publish(db, self.name, body, key=key)
        return (await self.publish_many([body], keys=[key], connection=connection))[0]

    async def publish_many(
        self, bodies: Sequence[Any], *, keys: Sequence[str | None] | None = None, connection: Any = None
    ) -> list[Message]:
        """Append several bodies, all or nothing, and return the stored messages in order. One transaction.

        Otherwise as publish. Up to 1,000 bodies and 4 MiB take one round trip.
        """
        return await channels.publish_many(
            self._client._use(), self.name, bodies, channels.check_batch(bodies, keys), connection
        )

    async def read(self, *, after: int | str = 0, limit: int = 100, view: str = "final") -> list[Message]:
        """The messages behind `after`, at most `limit`; never waits.

        after: a position, a cursor, or "now". view: "final" leaves out void output of runs, "raw" has everything.
        Raises InvalidInput, HistoryLost, Trimmed.
        """
        return await channels.read(self._client._use(), self.name, after=after, limit=limit, view=view)

    async def page(self, *, after: int | str = 0, limit: int = 100, view: str = "final") -> Page:
        """The next `limit` positions: their messages, the cursor of the last position considered, head and state.

        Void output leaves gaps, so a page may have fewer messages although more follow: go on from its cursor until
        that is at `head`. Otherwise as read.
        """
        return await channels.page(self._client._use(), self.name, after=after, limit=limit, view=view)

    def tail(self, *, after: int | str = 0, view: str = "final") -> AsyncTail:
        """The messages behind `after` and those to come, for `async for`; ends when the channel is closed and all read.

        A lost connection is not seen: the tail reconnects and goes on exactly behind the last message it gave.
        Raises InvalidInput, HistoryLost, Trimmed, UnsafeDeployment.
        """
        return AsyncTail(self._client, Tail(self._client._db, self.name, after=after, view=view))

    async def info(self) -> ChannelInfo:
        """The channel's state. Raises ChannelNotFound."""
        return await channels.info(self._client._use(), self.name)

    async def create(self, content_type: str = "application/json", ttl: float | None = None) -> None:
        """Create the channel, unless it exists. ttl: seconds after which workers remove it, with all messages.

        The channel of a run stays until that has ended.
        Raises InvalidInput if it exists with another content type.
        """
        await channels.create(self._client._use(), self.name, content_type, ttl)

    async def close(self) -> None:
        """Let the channel take no more messages; its readers end when they have read all. Closing again does nothing.

        Raises ChannelNotFound; InvalidInput on the channel of a run that has not ended.
        """
        await channels.close(self._client._use(), self.name)

    async def trim(self, before: int) -> None:
        """Remove the messages before a position. Raises ChannelNotFound, InvalidInput past the head plus one."""
        await channels.trim(self._client._use(), self.name, before)

    async def compact(self) -> int:
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
        return await channels.compact(self._client._use(), self.name)

    async def set_retention(self, *, messages: int | None = None, seconds: float | None = None) -> None:
        """Keep only the last `messages`, and none that is older than `seconds`; None: no such bound, as at first.

        Workers trim the channel now and then, so for a while it may hold more. A reader that stands before what is
        kept is told Trimmed. Signals that nobody has consumed stay, and what a run that has not ended says on it.
        Raises ChannelNotFound, InvalidInput.
        """
        await channels.set_retention(self._client._use(), self.name, messages, seconds)

    async def delete(self) -> None:
        """Delete the channel with its messages; its readers are told HistoryLost. Raises ChannelNotFound."""
        await channels.delete(self._client._use(), self.name)


class AsyncTail:
    """An endless reader, for `async for`; `async with` or unfollow() ends it early. pages() gives all there is."""

    def __init__(self, client: AsyncClient, tail: Tail) -> None:
        self._client = client
        self._tail = tail
        self._page: list[Message] = []

    @property
    def cursor(self) -> str | None:
        """Where this reader stands: pass it as `after=` to go on later."""
        return self._tail.cursor

    def __aiter__(self) -> AsyncTail:
        return self

    async def __anext__(self) -> Message:
        while not self._page:
            found = await self.next_page()
            if found is None:
                raise StopAsyncIteration
            self._page = found[::-1]
        return self._page.pop()

    async def next_page(self, wait: float = channels.WAIT_SECONDS) -> list[Message] | None:
        """All that has come, at least one message unless `wait` seconds are over; None at the channel's end."""
        self._client._use()
        try:
            found = await self._tail.next(wait)
        except errors.Reset:
            self.unfollow()
            raise
        if found is None:
            self.unfollow()
        return found

    async def pages(self) -> AsyncIterator[list[Message]]:
        """Page by page, until the channel's end."""
        while (found := await self.next_page()) is not None:
            if found:
                yield found

    def unfollow(self) -> None:
        """Stop hearing of the channel."""
        self._tail.unfollow()

    async def __aenter__(self) -> AsyncTail:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.unfollow()

    def __del__(self) -> None:
        loop = self._client._loop
        if loop is not None and not loop.is_closed():  # the collector may run in any thread
            loop.call_soon_threadsafe(self._tail.unfollow)


class AsyncRunHandle:
    """A run seen from outside. Made by `client.start(…)` and `client.run(id)`.

    channel: what the run says and is told. created: whether this start began it (False: it had been started before).
    """

    def __init__(self, client: AsyncClient, id: str, *, created: bool = False) -> None:
        self._client = client
        self.id = id
        self.created = created
        self.channel = AsyncChannel(client, id)

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    async def status(self) -> RunStatus:
        """The run's state now. Raises RunNotFound."""
        return await runs.status(self._client._use(), self.id)

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the run's end and return its result. timeout: seconds to wait.

        Raises RunFailed, RunCancelled, RunNotFound, TimeoutError (the run goes on).
        """
        return await runs.result(self._client._use(), self.id, timeout)

    @overload
    async def signal(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: Literal[False] = False
    ) -> Message: ...

    @overload
    async def signal(
        self, body: Any, *, key: str | None = None, connection: Any = None, defer: bool
    ) -> Message | None: ...

    async def signal(
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
            _defer(connection, runs.deferred_signal(self.id, raw, key), self._client._use())
            return None
        if connection is not None:
            (row,) = await callers.fetch(connection, sql.DELIVER_IN, self.id, raw, key)
        else:
            row = await self._client._use().call(sql.DELIVER, self.id, raw, key)
        return runs.signalled(self.id, raw, key, row)

    async def cancel(self) -> bool:
        """Cancel the run: from here on nothing is recorded for it. False if it had ended. Raises RunNotFound."""
        return await runs.cancel(self._client._use(), self.id)

    async def resume(self) -> None:
        """Put a failed run back into its queue; recorded steps are not executed again.

        Raises RunNotFound; InvalidInput unless it has failed.
        """
        await runs.resume(self._client._use(), self.id)

    async def fork(self, step: str, *, id: str | None = None) -> AsyncRunHandle:
        """Start another run that has this one's record up to, and without, a step; it goes on from there.

        step: a name in the journal. id: of the new run; forking to it again returns the same run.
        Raises RunNotFound, InvalidInput (no such step), RunConflict (the id was used for something else).
        """
        new, created = await runs.fork(self._client._use(), self.id, step, id)
        return AsyncRunHandle(self._client, new, created=created)

    def tail(self, *, after: int | str = 0, view: str = "final") -> AsyncTail:
        """What the run says, as channel.tail; ends when the run has ended."""
        return self.channel.tail(after=after, view=view)

    async def journal(self) -> list[Message]:
        """The recorded results in order: `.key` is the step's name, `.body` its result. Raises RunNotFound."""
        return await runs.journal(self._client._use(), self.id)

    async def delete(self) -> None:
        """Delete a run that has ended, with its channel and journal. Raises RunNotFound, InvalidInput."""
        await channels.delete(self._client._use(), self.id, run=True)


async def _start(db: AsyncpgDb, values: tuple[Any, ...], *, keyed: bool) -> Any:
    """Enqueue; the id is the key, so a lost answer is asked for again."""
    try:
        return await db.call(sql.ENQUEUE, *values)
    except errors.Indefinite:
        row = await db.call(sql.ENQUEUE, *values)
        # Without an id of the caller's own nobody else can have started this run.
        return row if keyed or row[0] != "existed" else ("started", row[1])


def _defer(session: Any, what: Any, db: AsyncpgDb) -> None:
    from pgchan.sqlalchemy import defer  # noqa: PLC0415 - most processes need no SQLAlchemy

    defer(session, what, db.announce)
