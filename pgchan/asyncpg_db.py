"""`Db` on asyncpg: a pool for statements, one connection that writes, one that listens.

Long, because all waiting of the async door is here and nowhere else.

The tasks here are the only ones that pgchan runs on its own account in a client's event loop: `Writer` pumps the
batches of writer.py, `Listener` the hub of wakeups.py. Both reconnect for ever, with backoff; what they owe to
callers has deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import asyncpg

from pgchan import db, errors, points, sql
from pgchan.db import Entry, Known, Outcome, Row
from pgchan.groups import Arguments, Group
from pgchan.names import POSITION_MAX
from pgchan.points import point, point_soon
from pgchan.wakeups import LISTEN_NAMES, SWEEP_SECONDS, Followed, Hub, Pace, Watch
from pgchan.writer import LOCK_WAIT_MS, Batch, Queued, Settle, Waiting

CONNECT_SECONDS = 5.0  # for one try
LEASE_SECONDS = 30.0  # how long a connection stays outside of the pool without being given back to it
CALL_SECONDS = 35.0  # longer than statement_timeout: past it the connection is given up
LISTEN_SECONDS = 10.0  # for one statement of the listener
PING_SECONDS = 3.0  # how often the listener hears itself; it reconnects when it missed a ping
HEAR_SECONDS = 5.0  # for the first NOTIFY to arrive; what is silent for longer hears nothing
KNOWN_MAX = 100_000  # channels whose id and type are remembered

NO_LOGIN = ("no such", "does not exist", "password")  # what PgBouncer says, whose one SQLSTATE is that for everything
GIVEN_UP = frozenset({"25006", "57P01", "57P02", "57P05"})  # read-only, and three ways in which a server says farewell

# Points, by the statement that is on its way.
SENT = {sql.CLAIM: "claim_sent", sql.FINISH: "finish_sent", sql.FINISH_MANY: "finish_sent"}
# Calls that go together when several are made at a time.
TOGETHER = {sql.ENQUEUE: sql.ENQUEUE_MANY, sql.FINISH: sql.FINISH_MANY, sql.DELIVER: sql.DELIVER_MANY}
# What is read together: by statements over arrays, of which the first column is an element of the first array. So many
# at once, for a journal or a result may be large.
READS = (sql.JOURNALS, sql.SPOKEN, sql.INBOX, sql.RUN_RESULTS)
READ_TOGETHER = 20

log = logging.getLogger("pgchan")

Connection = Any  # asyncpg's connections, and the proxies of its pool, share no public base class
DRIVER_ERRORS = (
    asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, EOFError
)  # fmt: skip


class AsyncpgDb:
    """One database over asyncpg. Opens nothing until it is used."""

    def __init__(self, dsn: str, control_dsn: str | None, *, patience: float, pool_size: int, name: str) -> None:
        self.dsn = dsn
        self._control_dsn = control_dsn
        self._pool_size = pool_size
        self._name = name
        self._patience = patience
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._pooled = False  # whether the DSN leads through a pooler
        self._server_version = 0  # known after the checks, as is the name of the database
        self._database = ""
        self._known: dict[str, Known] = {}
        self.loop: asyncio.AbstractEventLoop | None = None  # of the client's first use
        self._announcing: set[asyncio.Future[None]] = set()
        # Asked over each new connection before anything else is sent on it: the owners that must not write any more.
        self.look_backs: list[Callable[[Connection], Awaitable[set[int]]]] = []
        self.stats: dict[str, int] = {"reads": 0, "writes": 0, "entries": 0, "pages": 0}
        self.writer = Writer(self)
        self.listener = Listener(self)
        self._groups = {
            statement: Group(
                partial(self._call, statement), partial(self._call_many, many), mixed=statement is sql.DELIVER
            )
            for statement, many in TOGETHER.items()
        }
        self._reads = {
            each: Group(partial(self._fetch_one, each), partial(self._fetch_many, each), most=READ_TOGETHER, alike=True)
            for each in READS
        }

    @property
    def patience(self) -> float:
        """Seconds for which a call is retried."""
        return self._patience

    # -- connections

    async def connect(self, role: str, *, direct: bool = False) -> Connection:
        """A connection of pgchan's own for one purpose; direct: to control_dsn, past a pooler."""
        dsn = self._control_dsn if direct and self._control_dsn else self.dsn
        application = {"application_name": f"{self._name} {role}"}
        settings = db.settings(role, self._server_version)
        pooled = self._pooled and not (direct and self._control_dsn)
        while True:
            try:
                connection = await asyncpg.connect(
                    dsn, timeout=CONNECT_SECONDS, server_settings=application if pooled else settings | application,
                    statement_cache_size=0 if pooled else 100,
                )  # fmt: skip
            except asyncpg.ProtocolViolationError:  # a pooler takes only the parameters that it knows
                if pooled:
                    raise
                pooled = True
            except asyncpg.InvalidParameterValueError:
                if not any(settings.pop(name, None) for name in db.SESSION_OPTIONAL):
                    raise
            else:
                _keep_alive(connection)
                if not direct:
                    self._pooled = pooled
                return connection

    def libpq_options(self) -> dict[str, Any]:
        """What makes a connection of psycopg, for the transaction of a workflow in a thread, like one of the pool."""
        if self._pooled:
            return {"prepare_threshold": None}
        return {"options": db.session_options(db.settings("pool", self._server_version), self.dsn)}

    async def _open(self) -> Pool:
        if self._pool is not None:
            return self._pool
        async with self._opening:
            if self._pool is None:
                first = await self.connect("check")
                try:
                    await self._check(first)
                finally:
                    await _close(first)
                self._pool = await self._make_pool()
        return self._pool

    async def _make_pool(self) -> Pool:
        async def connect(*_: Any, **__: Any) -> Connection:
            connection = await self.connect("pool")
            await self.look_back(connection)
            return connection

        async def keep(_: Connection) -> None:
            """Nothing to reset: transactions are ended, and pgchan changes no setting of a session."""

        return Pool(await asyncpg.create_pool(connect=connect, reset=keep, min_size=0, max_size=self._pool_size))

    async def _check(self, connection: Connection) -> None:
        row = await connection.fetchrow(sql.DEPLOYMENT)
        db.check_deployment(row)
        self._server_version, self._database = row[0], row[8]
        # A pooler invents the backend pid that it tells its clients.
        self._pooled = self._pooled or connection.get_server_pid() != row[6]
        if self._pooled:
            db.check_inherited(await connection.fetch(sql.INHERITED), row[9])
        db.check_version(await connection.fetchrow(sql.VERSION))

    async def look_back(self, connection: Connection) -> None:
        """Let workers see whether the server behind a new connection has what they wrote over earlier ones."""
        try:
            for look_back in self.look_backs:
                self.writer.refused |= await look_back(connection)
        except BaseException:
            connection.terminate()
            raise

    async def check_control(self) -> None:
        """Refuse to listen or lock where that would hear or hold nothing: a transaction pooler, another database."""
        await self.open()
        await self._persist(self._check_control, writing=False)

    async def _check_control(self) -> None:
        probe = await self.connect("probe", direct=True)
        try:
            row = await probe.fetchrow(sql.DEPLOYMENT)
            if self._control_dsn is not None:
                db.check_control(row, self._database)
            is_fit = probe.get_server_pid() == row[6] or await self._holds_sessions(probe)
            if not is_fit or not await self._hears(probe):
                raise errors.UnsafeDeployment(db.POOLER if self._control_dsn is None else db.CONTROL_POOLER)
        finally:
            await _close(probe)

    async def _hears(self, probe: Connection) -> bool:
        """Whether a NOTIFY over the DSN arrives, which it does in the same database only, and past no pooler."""
        heard = asyncio.Event()

        def hear(*_: object) -> None:
            heard.set()

        name = f"pgchan_ping_{uuid.uuid4().hex[:16]}"
        await probe.add_listener(name, hear)
        try:
            await self._run(sql.PING, (name,))
        except asyncpg.ProgramLimitExceededError:  # the queue is full: nothing is heard now, and nothing is proved
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEAR_SECONDS):
                await heard.wait()
        await probe.remove_listener(name, hear)  # a pooler would keep it
        return heard.is_set()

    async def _holds_sessions(self, first: Connection) -> bool:
        # Two connections, one lock: behind a session pooler the second cannot get it.
        key = int.from_bytes(os.urandom(3), "big")
        second = await self.connect("probe", direct=True)
        try:
            await first.fetchval(sql.PROBE_LOCK, key)
            got = await second.fetchval(sql.PROBE_LOCK, key)
            await first.fetchval(sql.PROBE_UNLOCK, key)
            if got:
                await second.fetchval(sql.PROBE_UNLOCK, key)
            return not got
        finally:
            await _close(second)

    async def open(self) -> None:
        """Connect and check; retried while the server cannot be reached."""
        self.loop = asyncio.get_running_loop()
        await self._persist(self._open, writing=False)

    async def close(self) -> None:
        """Send what waits, then end tasks and connections."""
        await self.writer.close()
        groups: list[Group[Any]] = [*self._groups.values(), *self._reads.values()]
        for group in groups:
            await group.close()
        if self._announcing:
            await asyncio.wait(self._announcing, timeout=CONNECT_SECONDS)
        for task in self._announcing:
            task.cancel()
        await self.listener.close()
        if self._pool is not None:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._pool.close()
            except (TimeoutError, *DRIVER_ERRORS):
                self._pool.terminate()

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """A connection of the pool, for a transaction of several statements."""
        pool = await self._persist(self._open, writing=False)
        try:
            connection = await pool.acquire(timeout=self._patience)
        except TimeoutError:
            raise errors.Unavailable(f"all {self._pool_size} connections of the pool are in use") from None
        except DRIVER_ERRORS as error:
            raise translate(error, writing=False) from error
        try:
            yield connection
        finally:
            await pool.release(connection)

    # -- Db

    async def fetch(self, statement: str, *args: object) -> list[Row]:
        """See Db."""
        if statement is sql.RUN_RESULT:  # many may wait for runs that end at a time
            return [row[1:] for row in await self.fetch_of(sql.RUN_RESULTS, *args)]
        rows: list[Row] = await self._persist(partial(self._run, statement, args), writing=False)
        return rows

    async def call(self, statement: str, *args: object) -> Row:
        """See Db."""
        group = self._groups.get(statement)
        return await (self._call(statement, *args) if group is None else group.call(*args))

    async def _call(self, statement: str, *args: object) -> Row:
        rows: list[Row] = await self._persist(partial(self._run, statement, args), writing=True)
        return rows[0]

    async def _call_many(self, statement: str, calls: list[Arguments]) -> list[Row | None]:
        words, *others = await self._call(statement, *map(list, zip(*calls, strict=True)), LOCK_WAIT_MS)
        if words[0] == "locked":
            return [None] * len(calls)
        # The queues that had to be woken, the last column of the answer to one call, are woken.
        return [(*row, None) for row in zip_longest(words, *(column or () for column in others))]

    async def fetch_of(self, statement: str, *args: object) -> list[Row]:
        """The rows for the first argument, by one of READS. What is asked for at the same time goes together."""
        return await self._reads[statement].call(*args)

    async def _fetch_one(self, statement: str, *args: object) -> list[Row]:
        return await self.fetch(statement, *([value] for value in args))

    async def _fetch_many(self, statement: str, calls: list[Arguments]) -> list[list[Row] | None]:
        different = {args[0]: args for args in calls}.values()
        found: dict[object, list[Row]] = {args[0]: [] for args in different}
        for row in await self.fetch(statement, *map(list, zip(*different, strict=True))):
            found[row[0]].append(row)
        return [found[args[0]] for args in calls]

    async def fetch_claims(self, statement: str, *args: object) -> list[Row]:
        """Run a statement that writes and returns any number of rows; see call."""
        rows: list[Row] = await self._persist(partial(self._run, statement, args), writing=True)
        return rows

    async def _run(self, statement: str, args: tuple[object, ...]) -> list[Row]:
        pool = await self._open()
        try:
            connection = await pool.acquire(timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise errors.Unavailable(f"all {self._pool_size} connections of the pool are in use") from None
        except DRIVER_ERRORS as error:
            raise translate(error, writing=False) from error
        in_order = False
        try:
            if await _is_cut(connection):
                raise errors.Unavailable("the database cannot be reached")
            self.stats["pages"] += 1
            if points.reached is not None and (name := SENT.get(statement)) is not None:
                point_soon(name, asyncio.get_running_loop().call_soon)
            rows: list[Row] = await connection.fetch(statement, *args, timeout=CALL_SECONDS)
            in_order = True
            return rows
        except DRIVER_ERRORS as error:
            # Lost, or not the primary's any more: the pool must not hand it out again.
            if not isinstance(error, asyncpg.PostgresError) or error.sqlstate in GIVEN_UP:
                connection.terminate()
            raise
        finally:
            await pool.release(connection, keep=in_order)

    async def _persist(self, action: Callable[[], Any], *, writing: bool) -> Any:
        """Do it, and do it again while it is known not to be done, until the patience is over."""
        until = time.monotonic() + self._patience
        tries = 0
        while True:
            try:
                return await action()
            except errors.Unavailable as error:
                failed: errors.Error = error
            except errors.Error:
                raise
            except DRIVER_ERRORS as error:
                failed = translate(error, writing=writing and self._pool is not None)
                if not isinstance(failed, errors.Unavailable):
                    raise failed from error
            tries += 1
            if tries == 1:
                log.warning("%s; trying for %g s", failed, self._patience)
            pause = db.backoff(tries)
            if time.monotonic() + pause > until:
                raise failed
            await asyncio.sleep(pause)

    async def append(self, entry: Entry) -> Outcome:
        """See Db."""
        if self._pool is None:
            await self.open()
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        await self.writer.room()
        self.writer.put(entry, partial(_settle, future))
        outcome = await future
        if outcome.channel_id not in (None, entry.channel_id) and outcome.word != "type" and entry.owner is None:
            assert outcome.channel_id is not None
            self.learn(entry.name, Known(outcome.channel_id, entry.content_type))
        return outcome

    async def append_together(self, batches: Sequence[Batch]) -> list[Outcome]:
        """See Db."""
        if len(batches) == 1:
            statement, arguments = batches[0].call(db.lock_wait(self._patience))
            row = await self.call(statement, *arguments)
            return batches[0].outcomes(row)
        outcomes: list[Outcome] = []
        moved: dict[int, int] = {}
        created = False
        async with self.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                for batch in batches:
                    row = await connection.fetchrow(sql.APPEND_MESSAGES_QUIETLY, *batch.messages())
                    outcomes += batch.outcomes(row)
                    moved.update({i: head for i, head in zip(row[0], row[1], strict=True) if head is not None})
                    created = created or row[7]
                if any(outcome.word not in db.STORED for outcome in outcomes):
                    await transaction.rollback()
                    return outcomes
            except DRIVER_ERRORS as error:
                with contextlib.suppress(*DRIVER_ERRORS):
                    await transaction.rollback()
                raise translate(error, writing=False) from error
            try:
                await transaction.commit()
            except DRIVER_ERRORS as error:
                raise translate(error, writing=True) from error
        self.announce(list(moved), list(moved.values()), created, [])
        return outcomes

    async def follow(self, name: str) -> AsyncFollow:
        """See Db."""
        return await self.listener.follow(name)

    async def wait(self, follow: db.Follow, after: int, seconds: float) -> None:
        """See Db."""
        assert isinstance(follow, AsyncFollow)
        await follow.wait(seconds)

    def mark(self) -> int:
        """See Db."""
        return self.listener.hub.mark

    async def watch_end(self, channel_id: int, mark: int) -> AsyncEnding:
        """See Db."""
        await self.listener.start()
        return AsyncEnding(self.listener, channel_id, mark)

    async def wait_end(self, ending: db.Ending, seconds: float) -> None:
        """See Db."""
        assert isinstance(ending, AsyncEnding)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ending.wait()
        self.listener.check_open()

    def announce(self, ids: list[int], heads: list[int], created: bool, queues: list[str]) -> None:
        """Send wakeups for what a caller's transaction has committed; if that fails, the sweeps find it."""
        loop = self.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._announce_soon, ids, heads, created, queues)

    def _announce_soon(self, *announcement: Any) -> None:
        task = asyncio.ensure_future(self._announce(*announcement))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    async def _announce(self, *announcement: Any) -> None:
        with contextlib.suppress(errors.Error):
            await self.fetch(sql.WAKE, *announcement)

    def known(self, name: str) -> Known | None:
        """See Db."""
        return self._known.get(name)

    def learn(self, name: str, known: Known | None) -> None:
        """See Db."""
        if known is None:
            self._known.pop(name, None)
            return
        if len(self._known) >= KNOWN_MAX:
            self._known.pop(next(iter(self._known)))
        self._known[name] = known

    def monotonic(self) -> float:
        """See Db."""
        return time.monotonic()


class Pool:
    """asyncpg's pool, with what came back last kept at hand: going through the pool costs as much as a short statement.

    A connection is kept only while nobody waits for the pool. Every LEASE_SECONDS the pool has back what is not in use,
    and closes in its own time what nobody needs.
    """

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool
        self._kept: list[Any] = []  # the last one goes out first
        self._queueing = 0
        self._timer: asyncio.TimerHandle | None = None
        self._returning: asyncio.Task[None] | None = None

    async def acquire(self, timeout: float) -> Connection:
        """A connection, after at most so many seconds, else TimeoutError."""
        while self._kept:
            connection = self._kept.pop()
            if not connection.is_closed():
                return connection
            await self._pool.release(connection)
        self._queueing += 1
        try:
            return await self._pool.acquire(timeout=timeout)
        finally:
            self._queueing -= 1

    async def release(self, connection: Connection, *, keep: bool = False) -> None:
        """Give it back. keep: if it is known to be in good order; else the pool looks after it."""
        if self._queueing or not keep:
            await self._pool.release(connection)
            return
        self._kept.append(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LEASE_SECONDS, self._return_soon)

    def _return_soon(self) -> None:
        self._timer = None
        self._returning = asyncio.create_task(self._return_all(), name="pgchan pool")

    async def _return_all(self) -> None:
        while self._kept:
            await self._pool.release(self._kept.pop())

    async def close(self) -> None:
        """Close all connections, when they are back."""
        if self._timer is not None:
            self._timer.cancel()
        await self._return_all()
        await self._pool.close()

    def terminate(self) -> None:
        """Close all connections now."""
        self._pool.terminate()


# ------------------------------------------------------------------------------------------------ writing


class Writer:
    """Sends batch after batch on a connection of its own. Theory in writer.py."""

    def __init__(self, owner: AsyncpgDb) -> None:
        self._db = owner
        self._waiting = Waiting()
        self._connection: Connection | None = None
        self._backend: Row | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._busy = False
        # Of channels that a run in this process owns: the last position that it wrote or saw.
        self.heads: dict[int, int] = {}
        self.on_written: Callable[[int, int, int], None] | None = None  # channel, head before, head after
        self.refused: set[int] = set()  # owners whose history was lost: what they still have here is not sent

    async def room(self) -> None:
        """Until less than the most that may wait in memory waits."""
        while self._waiting.is_full:
            self._room.clear()
            await self._room.wait()

    def put(self, entry: Entry, settle: Settle | None, *, more: bool = False) -> None:
        """Add an entry to the next batch; `settle` is called once with what became of it. more: the next entry that is
        put must be in the same batch."""
        self._waiting.put(Queued(entry, settle, time.monotonic() + self._db.patience, more))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="pgchan writer")
        elif not self._busy:
            self._wake.set()

    async def close(self) -> None:
        """Send what waits; what cannot be sent in time is reported to its callers."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(self._db.patience):
                while (len(self._waiting) or self._busy) and not self._task.done():  # noqa: ASYNC110 - only at the end
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pass
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        _settle_all(self._waiting.take_all(), errors.Unavailable("the client was closed before this was written"))
        if self._connection is not None:
            await _close(self._connection)

    async def _run(self) -> None:
        while True:
            batch = self._waiting.take(time.monotonic())
            if batch is None:
                self._busy = False
                self._wake.clear()
                if (aside := self._waiting.seconds_aside(time.monotonic())) is None:
                    await self._wake.wait()
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(aside):
                            await self._wake.wait()
                continue
            self._busy = True
            if not self._waiting.is_full:
                self._room.set()
            try:
                await self._send(batch)
            except asyncio.CancelledError:
                _settle_all(batch.queued, errors.Indefinite("the client was closed while this was being written"))
                raise
            except Exception as error:  # a bug of ours must not leave callers waiting
                log.exception("writing a batch failed")
                _settle_all(batch.queued, errors.Error(f"writing failed: {error}"))

    async def _send(self, batch: Batch) -> None:
        tries = 0
        while (connection := await self._connected()) is None:
            tries += 1
            _settle_all(self._drop_expired(batch), errors.Unavailable("the database cannot be reached"))
            if not batch.queued:
                return
            await asyncio.sleep(db.backoff(tries))
        if self.refused and (gone := [one for one in batch.queued if one.entry.owner in self.refused]):
            _settle_all(gone, errors.Fenced("a failover lost what this attempt had written", run=gone[0].entry.name))
            self._waiting.put_back([one for one in batch.queued if one not in gone])
            return
        if points.reached is not None and batch.holds_record:
            point_soon("checkpoint_sent", asyncio.get_running_loop().call_soon)
        try:
            statement, arguments = batch.call(batch.lock_wait)
            row = await connection.fetchrow(statement, *arguments, timeout=CALL_SECONDS)
        except DRIVER_ERRORS as error:
            await self._failed(batch, translate(error, writing=True))
            return
        self._done(batch, row)

    def _done(self, batch: Batch, row: Row) -> None:
        stats = self._db.stats
        stats["writes"] += 1
        stats["entries"] += len(batch.queued)
        for entry, written, head in batch.heads(row):
            assert entry.channel_id is not None
            self.heads[entry.channel_id] = head
            if self.on_written is not None:
                self.on_written(entry.channel_id, head - written, head)
        outcomes = batch.outcomes(row)
        locked = batch.refused_for_now(outcomes)
        for queued, outcome in zip(batch.queued, outcomes, strict=True):
            if queued.settle is not None and queued not in locked:
                queued.settle(queued.entry, outcome)
        if locked:
            now = time.monotonic()
            self._waiting.set_aside([queued for queued in locked if queued.deadline > now], now)
            _settle_all([queued for queued in locked if queued.deadline <= now], errors.Unavailable(db.LOCKED))

    def _drop_expired(self, batch: Batch) -> list[Queued]:
        now = time.monotonic()
        if any(queued.deadline <= now for queued in batch.queued):
            self._waiting.put_back(batch.queued)
            batch.queued = []
        return self._waiting.take_expired(now)

    async def _connected(self) -> Connection | None:
        if self._connection is not None and not await _is_cut(self._connection):
            return self._connection
        connection = None
        try:
            connection = await self._db.connect("writer")
            self._backend = await connection.fetchrow(sql.WHO_AM_I, timeout=CONNECT_SECONDS)
            await self._db.look_back(connection)
        except DRIVER_ERRORS:
            if connection is not None:
                connection.terminate()
            connection = None
        self._connection = connection
        return connection

    async def _failed(self, batch: Batch, error: errors.Error) -> None:
        if isinstance(error, errors.Unavailable):  # known not to be done
            if self._connection is not None:  # whatever is wrong with it, e.g. it is not the primary any more
                self._connection.terminate()
            self._waiting.put_back(batch.queued)
            _settle_all(self._waiting.take_expired(time.monotonic()), error)
            await asyncio.sleep(db.backoff(1))
        elif isinstance(error, errors.Indefinite):
            await self._resolve(batch)
        elif not batch.may_go_singly(error):
            _settle_all(batch.queued, error)
        else:
            for queued in batch.queued:
                alone = Batch()
                alone.add(queued)
                await self._send(alone)

    async def _resolve(self, batch: Batch) -> None:
        """Find out what became of a batch whose answer was lost."""
        lost, self._connection = self._connection, None
        backend, self._backend = self._backend, None
        if lost is not None:
            lost.terminate()
        doubt = errors.Indefinite(
            "the connection was lost before the answer came; perhaps it was written: retry with the same key"
        )
        # Nothing that can be found out is of use to these: they are told now, not when the server is back.
        _settle_all([one for one in batch.queued if one.entry.key is None and one.entry.owner is None], doubt)
        tries = 0
        until = max(queued.deadline for queued in batch.queued)
        while True:
            try:
                found = await self._look_for(batch, backend)
                break
            except DRIVER_ERRORS:
                tries += 1
                if time.monotonic() > until:
                    _settle_all(batch.queued, doubt)
                    return
                await asyncio.sleep(db.backoff(tries))
        if found is None:  # nobody's entries can tell: only those with a key can be sent again
            again = [queued for queued in batch.queued if queued.entry.key is not None]
            _settle_all([queued for queued in batch.queued if queued.entry.key is None], doubt)
            self._try_again(again, doubt)
        elif not found:
            # What an owner wrote is not there: the batch did not commit, or the owner was superseded and only its own
            # entries were refused. Of the others only those with a key can be sent again without a doubt.
            safe = [queued for queued in batch.queued if queued.entry.owner is not None or queued.entry.key is not None]
            _settle_all([queued for queued in batch.queued if queued not in safe], doubt)
            self._try_again(safe, doubt)
        else:
            rest = []
            for index, queued in enumerate(batch.queued):
                if (outcome := found.get(index)) is not None:
                    if queued.settle is not None:
                        queued.settle(queued.entry, outcome)
                elif queued.entry.key is not None:
                    rest.append(queued)
                else:
                    _settle_all([queued], doubt)
            self._try_again(rest, doubt)
        await asyncio.sleep(db.backoff(1))

    def _try_again(self, queued: list[Queued], doubt: errors.Error) -> None:
        now = time.monotonic()
        _settle_all([one for one in queued if one.deadline <= now], doubt)
        self._waiting.put_back([one for one in queued if one.deadline > now])

    async def _look_for(self, batch: Batch, backend: Row | None) -> dict[int, Outcome] | None:
        """What of the batch is stored, by index; empty: nothing; None: it cannot be told."""
        owned = [
            (entry, indices, self.heads[id])  # its owner may end, and take this along, while the rest here waits
            for entry, indices in batch.owned()
            if (id := entry.channel_id) in self.heads
        ]
        if not owned and not any(queued.entry.key for queued in batch.queued):
            return None
        connection = await self._connected()
        if connection is None:
            raise OSError("not connected")
        if backend is not None and not self._db._pooled:
            await connection.fetch(sql.END_BACKEND, backend[0], backend[1])
        if not owned:
            return None
        found: dict[int, Outcome] = {}
        heads: dict[int, int] = {}
        for entry, indices, before in owned:
            assert entry.channel_id is not None
            rows = await connection.fetch(sql.WRITTEN_SINCE, entry.channel_id, before)
            if not rows or rows[0][0] != entry.fence:
                continue  # another owner may have written there since; if the batch did not commit, it is refused now
            heads[entry.channel_id] = before
            for index, (_, position, at) in zip(indices, rows, strict=False):
                if position is not None:
                    found[index] = Outcome(db.APPENDED, entry.channel_id, position, at)
                    heads[entry.channel_id] = position
        # Only now: this is done again if the connection is lost in between.
        self.heads.update({id: head for id, head in heads.items() if id in self.heads})
        return found if heads else None


# ------------------------------------------------------------------------------------------------ listening


class Listener:
    """Pumps the hub: hears hints and reads what they point at, on one connection. Theory in wakeups.py.

    state: "idle" (not used yet), "connecting", "listening" (and hearing its own pings), "closed".
    """

    def __init__(self, owner: AsyncpgDb) -> None:
        self._db = owner
        self._waiters: dict[Followed, list[asyncio.Future[bool]]] = {}  # the result: whether there is news
        self.hub = Hub(self._announce)
        self.ends = Pace()  # of all who wait for a channel's end
        self.state = "idle"
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._sweep_due = False
        self._starting = asyncio.Lock()
        self._listening = asyncio.Event()
        self._ping_name = f"pgchan_ping_{uuid.uuid4().hex[:16]}"
        self._ping_heard = True

    async def start(self) -> None:
        """Listen; returns when it does. Raises UnsafeDeployment behind a transaction pooler."""
        async with self._starting:  # one check, however many readers come at once
            if self._task is None:
                await self._db.check_control()
                self.check_open()
                self.state = "connecting"
                self._task = asyncio.create_task(self._run(), name="pgchan listener")
        await self._listening.wait()
        self.check_open()

    def check_open(self) -> None:
        """Raise InvalidInput once the client is closed."""
        if self.state == "closed":
            raise errors.InvalidInput("this client is closed; make a new one")

    async def close(self) -> None:
        """Stop listening; readers that wait are told that the client is closed."""
        self.state = "closed"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._listening.set()
        self.hub.everything_moved()
        for followed in list(self._waiters):
            self._announce(followed)

    async def follow(self, name: str) -> AsyncFollow:
        """Start hearing of a channel."""
        await self.start()
        followed, fresh = self.hub.follow(name)
        follow = AsyncFollow(self, followed)
        if fresh:
            try:
                rows = await self._db.fetch(sql.FOLLOW, [name])
            except BaseException:
                follow.unfollow()
                self.hub.looked_up((), fresh=True)
                raise
            if self.hub.looked_up(rows, fresh=True):
                self._wake.set()
        return follow

    def poke(self) -> None:
        """Let the pump look at once."""
        self._wake.set()

    def _announce(self, followed: Followed) -> None:
        for future in self._waiters.pop(followed, ()):
            _resolve(future, True)

    async def changed(self, followed: Followed, told: asyncio.Future[bool]) -> None:
        """Until the hub has news of the channel, which makes `told` true, or `told` is false or cancelled."""
        self._waiters.setdefault(followed, []).append(told)
        try:
            await told
        finally:
            if told.cancelled() or not told.result():
                waiters = self._waiters.get(followed, [])
                if told in waiters:
                    waiters.remove(told)
                if not waiters:
                    self._waiters.pop(followed, None)

    async def _run(self) -> None:
        tries = 0
        while True:
            connection = None
            try:
                connection = await self._db.connect("listen", direct=True)
                await self._listen(connection)
                tries = 0
                await self._pump(connection)
            except DRIVER_ERRORS as error:
                log.info("the listening connection was lost (%s); reconnecting", type(error).__name__)
            except Exception:
                log.exception("the listener failed; reconnecting")
            finally:
                if connection is not None:
                    connection.terminate()
            self.state = "connecting"
            tries += 1
            await asyncio.sleep(db.backoff(tries))

    async def _listen(self, connection: Connection) -> None:
        connection.add_termination_listener(lambda _: self._wake.set())
        for name in (*LISTEN_NAMES, self._ping_name):
            await connection.add_listener(name, self._heard)
        point("listening")
        self._ping_heard = True
        self.hub.everything_moved()  # only now: what is read from here on was announced to us or is there already
        self.state = "listening"
        self._listening.set()
        self._wake.set()

    def _heard(self, _connection: Any, _pid: int, name: str, payload: Any) -> None:
        if name == self._ping_name:
            self._ping_heard = True
        elif self.hub.heard(name, payload):
            self._wake.set()

    async def _pump(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        next_ping = time.monotonic() + SWEEP_SECONDS
        # One timer per sweep, however many hints come in between.
        timer = loop.call_later(SWEEP_SECONDS, self._let_sweep)
        try:
            while True:
                if self.hub.fruitless >= 3:
                    await asyncio.sleep(0.05)  # hints that lead to nothing are read at 20 a second at most
                await self._wake.wait()
                self._wake.clear()
                if connection.is_closed():
                    raise ConnectionError("closed")
                if self.hub.look_up and (unknown := self.hub.unknown_names()):
                    self.hub.looked_up(await self._fetch(connection, sql.FOLLOW, unknown))
                await self._read(connection)
                if not self._sweep_due:
                    continue
                self._sweep_due = False
                timer = loop.call_later(SWEEP_SECONDS, self._let_sweep)
                await self._sweep(connection)
                if (now := time.monotonic()) >= next_ping:
                    next_ping = now + PING_SECONDS
                    if not self._ping_heard:
                        raise ConnectionError("the listener does not hear itself")
                    self._ping_heard = False
                    await self._fetch(connection, sql.PING, self._ping_name)
        finally:
            timer.cancel()

    def _let_sweep(self) -> None:
        self._sweep_due = True
        self._wake.set()

    async def _sweep(self, connection: Connection) -> None:
        if unknown := self.hub.unknown_names():
            self.hub.looked_up(await self._fetch(connection, sql.FOLLOW, unknown))
        if ids := self.hub.swept_ids():
            self.hub.swept(await self._fetch(connection, sql.SWEEP, ids))
        await self._read(connection)

    async def _read(self, connection: Connection) -> None:
        while (read := self.hub.next_read()) is not None:
            self._db.stats["reads"] += 1
            self.hub.read(await self._fetch(connection, read[0], *read[1]))
            if self.hub.fruitless:
                return

    async def _fetch(self, connection: Connection, statement: str, *args: object) -> list[Row]:
        rows: list[Row] = await connection.fetch(statement, *args, timeout=LISTEN_SECONDS)
        return rows


class AsyncFollow:
    """One reader's interest in a channel. It waits once at a time.

    A reader waits for a minute, and is told of news after milliseconds, thousands of times. So it has one timer, which
    stays when there is news, and which looks when it strikes whether the wait of that moment is over.
    """

    __slots__ = ("_done", "_listener", "_timer", "_told", "_until", "followed")

    def __init__(self, listener: Listener, followed: Followed) -> None:
        self._listener = listener
        self.followed = followed
        self._done = False
        self._timer: asyncio.TimerHandle | None = None
        self._told: asyncio.Future[bool] | None = None
        self._until = 0.0

    @property
    def is_closed(self) -> bool:
        """See Follow."""
        return self.followed.is_closed

    def recent(self, after: int, after_us: int | None) -> list[Any] | None:
        """See Follow."""
        return self.followed.recent(after, after_us)

    async def wait(self, seconds: float) -> None:
        """Until there is news, or the time is over."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        if self._timer is None or self._timer.when() > self._until:
            self._strike_at(loop, self._until)
        self._told = loop.create_future()
        await self._listener.changed(self.followed, self._told)
        self._listener.check_open()

    def _strike_at(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._strike, loop)

    def _strike(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._told is None or self._told.done():
            return  # nobody waits; who does next has a new one
        if self._until > loop.time():
            self._strike_at(loop, self._until)
        else:
            _resolve(self._told, False)

    def unfollow(self) -> None:
        """See Follow."""
        if not self._done:
            self._done = True
            self._listener.hub.unfollow(self.followed)
            if self._timer is not None and (self._told is None or self._told.done()):
                self._timer.cancel()


class AsyncEnding:
    """One caller's interest in a channel's end."""

    __slots__ = ("_listener", "_looked", "_told", "_watch", "missed")

    def __init__(self, listener: Listener, channel_id: int, mark: int) -> None:
        self._told = asyncio.Event()
        self._looked = False
        self._listener = listener
        self._watch = Watch(channel_id, POSITION_MAX, self._told.set)
        listener.hub.watch(self._watch)
        self.missed = listener.hub.has_changed(channel_id, mark)

    async def wait(self) -> None:
        """Until the channel may have ended. Who waits again was told so, looked, and found that it had not."""
        pace = self._listener.ends
        if self._looked:
            pace.looked(False, time.monotonic())
            if pause := pace.pause(time.monotonic()):
                await asyncio.sleep(pause)
        await self._told.wait()
        self._told.clear()
        self._looked = True

    def unfollow(self) -> None:
        """See Ending."""
        self._listener.hub.unwatch(self._watch)


# ------------------------------------------------------------------------------------------------ small things


def translate(error: BaseException, *, writing: bool) -> errors.Error:
    """The error of the tree for an error of asyncpg or of the network."""
    if isinstance(error, errors.Error):
        return error
    if isinstance(error, asyncpg.ProtocolViolationError) and any(words in str(error) for words in NO_LOGIN):
        return errors.UnsafeDeployment(db.LOGIN)
    if isinstance(error, asyncpg.PostgresError):
        return db.translate(
            error.sqlstate, getattr(error, "message", None) or str(error), getattr(error, "hint", None), writing=writing
        )  # fmt: skip
    # Both are raised before anything was sent; the second by a connection that has read the server's farewell.
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return db.translate(None, "", None, writing=False)
    if not writing:
        return db.unreachable("timeout" if isinstance(error, TimeoutError) else str(error))
    return db.translate(None, "", None, writing=writing)


def _resolve(future: asyncio.Future[bool], news: bool) -> None:
    if not future.done():
        future.set_result(news)


def _settle(future: asyncio.Future[Outcome], _entry: Entry, outcome: Outcome | errors.Error) -> None:
    if future.done():
        return
    if isinstance(outcome, errors.Error):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _settle_all(queued: list[Queued], error: errors.Error) -> None:
    for one in queued:
        if one.settle is not None:
            one.settle(one.entry, error)


async def _is_cut(connection: Connection) -> bool:
    """Whether the server has hung up on this connection, which is not in use; also if the loop has not seen it yet."""
    transport = getattr(connection, "_transport", None)
    raw = transport.get_extra_info("socket") if transport is not None else None
    if raw is not None and raw.fileno() >= 0:
        poll = select.poll()
        poll.register(raw.fileno(), select.POLLIN)
        if poll.poll(0):
            await asyncio.sleep(0.001)  # let it read what is there, and perhaps that there will be no more
    return bool(connection.is_closed())


async def _close(connection: Connection) -> None:
    try:
        await connection.close(timeout=1.0)
    except DRIVER_ERRORS:
        connection.terminate()


def _keep_alive(connection: Connection) -> None:
    """Notice a dead network in about five seconds. asyncpg has no option for it, so this takes its socket; without
    one (another version, a Unix socket) the timeouts above remain."""
    transport = getattr(connection, "_transport", None)
    raw = transport.get_extra_info("socket") if transport is not None else None
    if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            with contextlib.suppress(OSError):
                raw.setsockopt(level, option, value)
