"""`Db` on psycopg: everything blocks. A pool for statements, one connection that writes, and a thread that listens.

Long, because all waiting of the blocking door is here and nowhere else.

Writing needs no thread: of the callers that publish at the same time one sends a batch for all of them, and hands
over to another when its own entry is written. Listening does: `Listener` pumps the hub of wakeups.py in a daemon
thread, which starts with the first tail() or result(). All of the hub is guarded by one condition, which readers wait
on.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.rows import tuple_row

from pgchan import db, errors, sql
from pgchan.db import Entry, Known, Outcome, Row
from pgchan.model import Message
from pgchan.names import POSITION_MAX
from pgchan.points import point
from pgchan.wakeups import LISTEN_NAMES, SWEEP_SECONDS, Followed, Hub, Pace, Watch
from pgchan.writer import Batch, Queued, Waiting

CONNECT_SECONDS = 5
CALL_SECONDS = 35.0  # longer than statement_timeout: past it the connection is given up
LISTEN_SECONDS = 10.0  # the same for a statement of the listener
PROBE_SECONDS = 5.0  # for the first NOTIFY to arrive; what is silent for longer hears nothing
HEAR_SECONDS = 0.25  # how soon the listening thread sees that the client is closed
PING_SECONDS = 3.0  # how often the listener hears itself; it reconnects when it missed a ping
KNOWN_MAX = 100_000  # channels whose id and type are remembered

# What libpq says when a server, or PgBouncer, is there but not ready; the rest that it calls FATAL does not go away.
_NOT_READY = (
    "starting up", "shutting down", "too many", "connection slots", "not yet accepting", "recovery", "terminating",
    "canceling", "no more connections", "login has been failing", "query_wait_timeout", "server conn",
)  # fmt: skip

log = logging.getLogger("pgchan")

T = TypeVar("T")

DRIVER_ERRORS = (psycopg.Error, OSError)


class Connection(psycopg.Connection[Any]):
    """A connection that gives up on a server, or a network, that keeps silent. libpq itself would wait for ever."""

    seconds = CALL_SECONDS

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """See psycopg. Called with each exchange; `gen` is resumed at least every tenth of a second."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, exchange: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        until = time.monotonic() + self.seconds
        try:
            state = next(exchange)
            while True:
                ready = yield state
                if not ready and time.monotonic() > until:
                    self.pgconn.finish()
                    raise psycopg.OperationalError("no answer in time")
                state = exchange.send(ready)
        except StopIteration as done:
            result: T = done.value
            return result

    @property
    def is_cut(self) -> bool:
        """Whether the server has hung up on this connection, which is not in use: then there is something to read."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return bool(poll.poll(0))


class PsycopgDb:
    """One database over psycopg. Opens nothing until it is used; may be shared by threads."""

    def __init__(self, dsn: str, control_dsn: str | None, *, patience: float, pool_size: int, name: str) -> None:
        self.dsn = dsn
        self._control_dsn = control_dsn
        self._name = name
        self._patience = patience
        self._pool = _Pool(pool_size, lambda: self.connect("pool"))
        self._checked = False
        self._checking = threading.Lock()
        self._pooled = False
        self._server_version = 0  # known after the checks, as is the name of the database
        self._database = ""
        self._known: dict[str, Known] = {}
        self.stats: dict[str, int] = {"reads": 0, "writes": 0, "entries": 0, "pages": 0}
        self._writer = _Writer(self)
        self.listener = Listener(self)

    @property
    def patience(self) -> float:
        """Seconds for which a call is retried."""
        return self._patience

    # -- connections

    def connect(self, role: str, *, direct: bool = False) -> Connection:
        """A connection of pgchan's own for one purpose; direct: to control_dsn, past a pooler."""
        dsn = self._control_dsn if direct and self._control_dsn else self.dsn
        pooled = self._pooled and not (direct and self._control_dsn)
        settings = db.settings(role, self._server_version)
        while True:
            # Those of the DSN go first, for the last one counts; behind a pooler they are left as they are.
            options: dict[str, Any] = {} if pooled else {"options": db.session_options(settings, dsn)}
            try:
                connection = Connection.connect(
                    dsn, autocommit=True, row_factory=tuple_row, cursor_factory=psycopg.RawCursor,
                    prepare_threshold=None if pooled else 5, application_name=f"{self._name} {role}",
                    connect_timeout=CONNECT_SECONDS, keepalives_idle=2, keepalives_interval=1, keepalives_count=3,
                    tcp_user_timeout=5000, **options,
                )  # fmt: skip
            except psycopg.OperationalError as error:
                if "unsupported startup parameter" in str(error) and not pooled:
                    pooled = True  # a pooler takes only the parameters that it knows
                elif not any(name in str(error) and settings.pop(name, None) for name in db.SESSION_OPTIONAL):
                    raise _refused(error) from error
            else:
                if direct:
                    connection.seconds = LISTEN_SECONDS
                else:
                    self._pooled = pooled
                return connection

    def _check(self) -> None:
        if not self._checked:
            with self._checking:
                self._check_once()

    def _check_once(self) -> None:
        if not self._checked:  # another thread may have done it meanwhile
            with self.connect("check") as connection:
                row = connection.execute(sql.DEPLOYMENT).fetchone()
                assert row is not None
                db.check_deployment(row)
                self._server_version, self._database = row[0], row[8]
                self._pooled = self._pooled or connection.info.backend_pid != row[6]
                if self._pooled:
                    db.check_inherited(connection.execute(sql.INHERITED).fetchall(), row[9])
                version = connection.execute(sql.VERSION).fetchone()
                assert version is not None
                db.check_version(version)
            self._checked = True

    def check_control(self) -> None:
        """Refuse to listen where that would hear nothing: a transaction pooler, another database."""
        self.open()
        self._persist(self._check_control, writing=False)

    def _check_control(self) -> None:
        with self.connect("probe", direct=True) as probe:
            row = probe.execute(sql.DEPLOYMENT).fetchone()
            assert row is not None
            if self._control_dsn is not None:
                db.check_control(row, self._database)
            is_fit = probe.info.backend_pid == row[6] or self._holds_sessions(probe)
            if not is_fit or not self._hears(probe):
                raise errors.UnsafeDeployment(db.POOLER if self._control_dsn is None else db.CONTROL_POOLER)

    def _hears(self, probe: Connection) -> bool:
        """Whether a NOTIFY over the DSN arrives, which it does in the same database only, and past no pooler."""
        name = f"pgchan_ping_{uuid.uuid4().hex[:16]}"
        probe.execute(f"listen {name}")
        try:
            self._run(sql.PING, (name,))
        except psycopg.errors.ProgramLimitExceeded:  # the queue is full: nothing is heard now, and nothing is proved
            return True
        heard = any(True for _ in probe.notifies(timeout=PROBE_SECONDS, stop_after=1))
        probe.execute(f"unlisten {name}")  # a pooler would keep it
        return heard

    def _holds_sessions(self, first: Connection) -> bool:
        # Two connections, one lock: behind a session pooler the second cannot get it.
        key = uuid.uuid4().int % (1 << 24)
        with self.connect("probe", direct=True) as second:
            first.execute(sql.PROBE_LOCK, (key,))
            got = second.execute(sql.PROBE_LOCK, (key,)).fetchone()
            first.execute(sql.PROBE_UNLOCK, (key,))
            return got is not None and not got[0]

    def open(self) -> None:
        """Connect and check; retried while the server cannot be reached."""
        self._persist(self._check, writing=False)

    def close(self) -> None:
        """End the thread and all connections."""
        self.listener.close()
        self._writer.close()
        self._pool.close()

    # -- Db

    async def fetch(self, statement: str, *args: object) -> list[Row]:
        """See Db."""
        rows: list[Row] = self._persist(lambda: self._run(statement, args), writing=False)
        return rows

    async def call(self, statement: str, *args: object) -> Row:
        """See Db."""
        rows: list[Row] = self._persist(lambda: self._run(statement, args), writing=True)
        return rows[0]

    def _run(self, statement: str, args: tuple[object, ...], *, seconds: float | None = None) -> list[Row]:
        self._check()
        with self._pool.connection(self._patience if seconds is None else seconds) as connection:
            self.stats["pages"] += 1
            try:
                return list(connection.execute(statement, args).fetchall())
            except psycopg.errors.ReadOnlySqlTransaction:  # not the primary any more: connect anew, perhaps elsewhere
                connection.close()
                raise

    def _persist(self, action: Callable[[], Any], *, writing: bool) -> Any:
        """Do it, and do it again while it is known not to be done, until the patience is over."""
        until = time.monotonic() + self._patience
        tries = 0
        while True:
            try:
                return action()
            except errors.Unavailable as error:
                failed: errors.Error = error
            except errors.Error:
                raise
            except DRIVER_ERRORS as error:
                failed = translate(error, writing=writing and self._checked)
                if not isinstance(failed, errors.Unavailable):
                    raise failed from error
            tries += 1
            if tries == 1:
                log.warning("%s; trying for %g s", failed, self._patience)
            pause = db.backoff(tries)
            if time.monotonic() + pause > until:
                raise failed
            time.sleep(pause)

    async def append(self, entry: Entry) -> Outcome:
        """See Db."""
        self.open()
        outcome = self._writer.append(entry)
        if outcome.word == "locked":  # wait for it in this thread, so that the other threads need not
            alone = Batch()
            alone.add(Queued(entry, None, 0.0))
            (outcome,) = await self.append_together([alone])
        if outcome.word != "type" and outcome.channel_id is not None:
            self.learn(entry.name, Known(outcome.channel_id, entry.content_type))
        return outcome

    async def append_together(self, batches: Sequence[Batch]) -> list[Outcome]:
        """See Db."""
        if len(batches) == 1:
            statement, arguments = batches[0].call(db.lock_wait(self._patience))
            written = await self.call(statement, *arguments)
            return batches[0].outcomes(written)
        self.open()
        outcomes: list[Outcome] = []
        moved: dict[int, int] = {}
        created = committing = False
        try:
            with self._pool.connection(self._patience) as connection, connection.transaction() as transaction:
                for batch in batches:
                    row = connection.execute(sql.APPEND_MESSAGES_QUIETLY, batch.messages()).fetchone()
                    assert row is not None
                    outcomes += batch.outcomes(row)
                    moved.update({i: head for i, head in zip(row[0], row[1], strict=True) if head is not None})
                    created = created or row[7]
                if any(outcome.word not in db.STORED for outcome in outcomes):
                    raise psycopg.Rollback(transaction)
                committing = True
        except DRIVER_ERRORS as error:
            raise translate(error, writing=committing) from error
        if committing:
            self.announce(list(moved), list(moved.values()), created, [])
        return outcomes

    def announce(self, ids: list[int], heads: list[int], created: bool, queues: list[str]) -> None:
        """See Db."""
        with contextlib.suppress(errors.Error, *DRIVER_ERRORS):  # a hint; the sweeps find what it would have told
            self._run(sql.WAKE, (ids, heads, created, queues), seconds=SWEEP_SECONDS)

    async def follow(self, name: str) -> BlockingFollow:
        """See Db."""
        followed, fresh = self.listener.follow(name)
        follow = BlockingFollow(self.listener, followed)
        if fresh:
            try:
                rows = await self.fetch(sql.FOLLOW, [name])
            except BaseException:
                follow.unfollow()
                with self.listener.changed:
                    self.listener.hub.looked_up((), fresh=True)
                raise
            with self.listener.changed:
                self.listener.hub.looked_up(rows, fresh=True)
        return follow

    async def wait(self, follow: db.Follow, after: int, seconds: float) -> None:
        """See Db."""
        assert isinstance(follow, BlockingFollow)
        follow.wait(seconds)

    def mark(self) -> int:
        """See Db."""
        return self.listener.hub.mark

    async def watch_end(self, channel_id: int, mark: int) -> BlockingEnding:
        """See Db."""
        self.listener.start()
        return BlockingEnding(self.listener, channel_id, mark)

    async def wait_end(self, ending: db.Ending, seconds: float) -> None:
        """See Db."""
        assert isinstance(ending, BlockingEnding)
        ending.wait(seconds)
        self.listener.check_open()

    def known(self, name: str) -> Known | None:
        """See Db."""
        return self._known.get(name)

    def learn(self, name: str, known: Known | None) -> None:
        """See Db."""
        if known is None:
            self._known.pop(name, None)
            return
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[name] = known

    def monotonic(self) -> float:
        """See Db."""
        return time.monotonic()


class _Pool:
    """At most so many connections; a thread that finds none waits."""

    def __init__(self, size: int, connect: Callable[[], Connection]) -> None:
        self._size = size
        self._connect = connect
        self._idle: deque[Connection] = deque()
        self._count = 0
        self._free = threading.Condition()

    @contextlib.contextmanager
    def connection(self, seconds: float) -> Iterator[Connection]:
        connection = self._take(seconds)
        try:
            yield connection
        finally:
            self._give(connection)

    def _take(self, seconds: float) -> Connection:
        with self._free:
            if not self._free.wait_for(lambda: self._idle or self._count < self._size, seconds):
                raise errors.Unavailable(f"all {self._size} connections of the pool are in use")
            while self._idle:
                connection = self._idle.pop()
                if not connection.is_cut:
                    return connection
                connection.close()
                self._count -= 1
            self._count += 1
        try:
            return self._connect()
        except BaseException:
            with self._free:
                self._count -= 1
                self._free.notify()
            raise

    def _give(self, connection: Connection) -> None:
        if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            connection.close()
        with self._free:
            if connection.closed:
                self._count -= 1
            else:
                self._idle.append(connection)
            self._free.notify()

    def close(self) -> None:
        with self._free:
            while self._idle:
                self._idle.pop().close()
                self._count -= 1


# ------------------------------------------------------------------------------------------------ writing


class _Receipt:
    """What a caller of append() waits for: its outcome, or to be the one who sends the next batch."""

    __slots__ = ("event", "is_given_up", "leads", "outcome")

    def __init__(self) -> None:
        self.event = threading.Event()
        self.outcome: Outcome | errors.Error | None = None
        self.leads = False
        self.is_given_up = False  # its thread was interrupted

    def settle(self, _entry: Entry, outcome: Outcome | errors.Error) -> None:
        self.outcome = outcome
        self.event.set()


class _Writer:
    """Group commit among threads. Theory in writer.py."""

    def __init__(self, owner: PsycopgDb) -> None:
        self._db = owner
        self._lock = threading.Lock()
        self._waiting = Waiting()
        self._receipts: deque[_Receipt] = deque()
        self._led = False
        self._connection: Connection | None = None

    def append(self, entry: Entry) -> Outcome:
        receipt = _Receipt()
        with self._lock:
            self._waiting.put(Queued(entry, receipt.settle, time.monotonic() + self._db.patience))
            self._receipts.append(receipt)
            receipt.leads, self._led = not self._led, True
        try:
            while receipt.outcome is None:
                if receipt.leads:
                    self._send_next()
                else:
                    receipt.event.wait()
                    receipt.event.clear()
        finally:
            with self._lock:
                receipt.is_given_up = receipt.outcome is None
                leads = receipt.leads
            if leads:
                self._hand_over()
        if isinstance(receipt.outcome, errors.Error):
            raise receipt.outcome
        return receipt.outcome

    def _hand_over(self) -> None:
        with self._lock:
            while self._receipts and (self._receipts[0].outcome is not None or self._receipts[0].is_given_up):
                self._receipts.popleft()
            if self._receipts:
                self._receipts[0].leads = True
                self._receipts[0].event.set()
            else:
                self._led = False

    def _send_next(self) -> None:
        with self._lock:
            batch = self._waiting.take()
        if batch is None:
            return
        try:
            connection = self._connected()
            row = connection.execute(*batch.call(batch.lock_wait)).fetchone()
        except errors.Error as error:
            self._failed(batch, error)
        except DRIVER_ERRORS as error:
            self._failed(batch, translate(error, writing=True))
        except BaseException:  # Ctrl-C in the middle of it
            self._drop()
            self._failed(batch, errors.Indefinite("interrupted while this was being written; perhaps it was"))
            raise
        else:
            assert row is not None
            self._db.stats["writes"] += 1
            self._db.stats["entries"] += len(batch.queued)
            for queued, outcome in zip(batch.queued, batch.outcomes(row), strict=True):
                assert queued.settle is not None
                queued.settle(queued.entry, outcome)

    def _connected(self) -> Connection:
        if self._connection is not None and self._connection.is_cut:
            self._drop()
        if self._connection is None:
            self._connection = self._db.connect("writer")
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _failed(self, batch: Batch, error: errors.Error) -> None:
        if isinstance(error, errors.Unavailable | errors.Indefinite):
            self._drop()  # whatever is wrong with it, e.g. it is not the primary any more
        if batch.may_go_singly(error):
            for queued in batch.queued:
                alone = Batch()
                alone.add(queued)
                self._send_alone(alone)
            return
        again: list[Queued] = []
        now = time.monotonic()
        for queued in batch.queued:
            assert queued.settle is not None
            retry = isinstance(error, errors.Unavailable) or (
                isinstance(error, errors.Indefinite) and queued.entry.key is not None
            )
            if retry and queued.deadline > now:
                again.append(queued)
            else:
                queued.settle(queued.entry, error)
        with self._lock:
            self._waiting.put_back(again)
        if again:
            time.sleep(db.backoff(2))

    def _send_alone(self, batch: Batch) -> None:
        (queued,) = batch.queued
        assert queued.settle is not None
        try:
            row = self._connected().execute(*batch.call(batch.lock_wait)).fetchone()
            assert row is not None
            queued.settle(queued.entry, batch.outcomes(row)[0])
        except errors.Error as error:
            queued.settle(queued.entry, error)
        except DRIVER_ERRORS as error:
            queued.settle(queued.entry, translate(error, writing=True))

    def close(self) -> None:
        """Let the threads that are publishing finish, then hang up."""
        until = time.monotonic() + self._db.patience
        while self._led and time.monotonic() < until:
            time.sleep(0.005)
        self._drop()


# ------------------------------------------------------------------------------------------------ listening


class Listener:
    """Pumps the hub in a thread. Theory in wakeups.py. state: "idle", "connecting", "listening" or "closed"."""

    def __init__(self, owner: PsycopgDb) -> None:
        self._db = owner
        self.changed = threading.Condition()
        self.hub = Hub(lambda _: self.changed.notify_all())
        self.ends = Pace()  # of all who wait for a channel's end
        self.state = "idle"
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._closing = threading.Event()
        self._ping_name = f"pgchan_ping_{uuid.uuid4().hex[:16]}"
        self._ping_heard = True

    def start(self) -> None:
        """Listen; returns when the thread does. Raises UnsafeDeployment behind a transaction pooler."""
        with self._starting:
            if self._thread is None:
                self._db.check_control()
                self.state = "connecting"
                self._thread = threading.Thread(target=self._run, name="pgchan listener", daemon=True)
                self._thread.start()
        while not self._listening.wait(HEAR_SECONDS):
            self.check_open()

    def close(self) -> None:
        """End the thread, and let readers that wait look up."""
        self._closing.set()
        self.state = "closed"
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * HEAR_SECONDS + 1)
        self.state = "closed"  # the thread may have had another word for it meanwhile
        with self.changed:
            self.hub.everything_moved()
            self.changed.notify_all()

    def check_open(self) -> None:
        """Raise InvalidInput once the client is closed."""
        if self._closing.is_set():
            raise errors.InvalidInput("this client is closed; make a new one")

    def follow(self, name: str) -> tuple[Followed, bool]:
        """Count one more follower; True if the channel must be looked up."""
        self.start()
        with self.changed:
            return self.hub.follow(name)

    def _run(self) -> None:
        tries = 0
        while not self._closing.is_set():
            try:
                with self._db.connect("listen", direct=True) as connection:
                    self._listen(connection)
                    tries = 0
                    self._pump(connection)
            except (errors.Error, *DRIVER_ERRORS) as error:
                log.info("the listening connection was lost (%s); reconnecting", type(error).__name__)
            except Exception:
                log.exception("the listener failed; reconnecting")
            if not self._closing.is_set():
                self.state = "connecting"
                tries += 1
                self._closing.wait(db.backoff(tries))

    def _listen(self, connection: Connection) -> None:
        for name in (*LISTEN_NAMES, self._ping_name):
            connection.execute(f"listen {name}")
        point("listening")
        self._ping_heard = True
        with self.changed:
            self.hub.everything_moved()
        self.state = "listening"
        self._listening.set()

    def _pump(self, connection: Connection) -> None:
        next_sweep = next_ping = time.monotonic() + SWEEP_SECONDS
        self._look(connection)
        while not self._closing.is_set():
            if self.hub.fruitless >= 3:
                self._closing.wait(0.05)  # hints that lead to nothing are read at 20 a second at most
            seconds = min(HEAR_SECONDS, max(0.0, min(next_sweep, next_ping) - time.monotonic()))
            for notify in connection.notifies(timeout=seconds, stop_after=1):
                if notify.channel == self._ping_name:
                    self._ping_heard = True
                else:
                    with self.changed:
                        self.hub.heard(notify.channel, notify.payload)
            self._look(connection)
            now = time.monotonic()
            if now >= next_sweep:
                next_sweep = now + SWEEP_SECONDS
                with self.changed:
                    ids = self.hub.swept_ids()
                    self.hub.look_up = True
                if ids:
                    rows = connection.execute(sql.SWEEP, (ids,)).fetchall()
                    with self.changed:
                        self.hub.swept(rows)
                self._look(connection)
            if now >= next_ping:
                next_ping = now + PING_SECONDS
                if not self._ping_heard:
                    raise OSError("the listener does not hear itself")
                self._ping_heard = False
                connection.execute(sql.PING, (self._ping_name,))

    def _look(self, connection: Connection) -> None:
        with self.changed:
            unknown = self.hub.unknown_names() if self.hub.look_up else []
        if unknown:
            rows = connection.execute(sql.FOLLOW, (unknown,)).fetchall()
            with self.changed:
                self.hub.looked_up(rows)
        while True:
            with self.changed:
                read = self.hub.next_read()
            if read is None:
                return
            self._db.stats["reads"] += 1
            rows = connection.execute(*read).fetchall()
            with self.changed:
                self.hub.read(rows)
            if self.hub.fruitless:
                return


class BlockingFollow:
    """One reader's interest in a channel."""

    def __init__(self, listener: Listener, followed: Followed) -> None:
        self._listener = listener
        self._followed = followed
        self._version = -1
        self._done = False

    @property
    def is_closed(self) -> bool:
        """See Follow."""
        return self._followed.is_closed

    def recent(self, after: int, after_us: int | None) -> list[Message] | None:
        """See Follow."""
        with self._listener.changed:
            self._version = self._followed.version
            return self._followed.recent(after, after_us)

    def wait(self, seconds: float) -> None:
        """Until there is news since recent() was asked, or the time is over."""
        with self._listener.changed:
            self._listener.changed.wait_for(
                lambda: self._followed.version != self._version or self._listener.state == "closed", seconds
            )
        self._listener.check_open()

    def unfollow(self) -> None:
        """See Follow."""
        with self._listener.changed:
            if not self._done:
                self._done = True
                self._listener.hub.unfollow(self._followed)


class BlockingEnding:
    """One caller's interest in a channel's end."""

    def __init__(self, listener: Listener, channel_id: int, mark: int) -> None:
        self._told = threading.Event()
        self._looked = False
        self._listener = listener
        self._watch = Watch(channel_id, POSITION_MAX, self._told.set)
        with listener.changed:
            listener.hub.watch(self._watch)
            self.missed = listener.hub.has_changed(channel_id, mark)

    def wait(self, seconds: float) -> None:
        """Until the channel may have ended, or the time is over. See AsyncEnding."""
        until = time.monotonic() + seconds
        if self._looked:
            with self._listener.changed:
                self._listener.ends.looked(False, time.monotonic())
                pause = self._listener.ends.pause(time.monotonic())
            time.sleep(min(pause, seconds))
        self._looked = self._told.wait(max(0.0, until - time.monotonic()))
        self._told.clear()

    def unfollow(self) -> None:
        """See Ending."""
        with self._listener.changed:
            self._listener.hub.unwatch(self._watch)


# ------------------------------------------------------------------------------------------------ small things


def translate(error: BaseException, *, writing: bool) -> errors.Error:
    """The error of the tree for an error of psycopg or of the network."""
    if isinstance(error, errors.Error):
        return error
    if isinstance(error, psycopg.Error):
        diag = error.diag
        if error.sqlstate is None and isinstance(error, psycopg.DataError):
            return db.translate("22000", "", None, writing=False)  # an argument that psycopg itself does not send
        return db.translate(error.sqlstate, diag.message_primary or "", diag.message_hint, writing=writing)
    return db.translate(None, "", None, writing=writing)


def _refused(error: psycopg.OperationalError) -> errors.Error:
    """Why there is no connection. libpq gives no SQLSTATE for it, only text."""
    text = str(error)
    timed_out = isinstance(error, psycopg.errors.ConnectionTimeout)
    if timed_out or "FATAL:" not in text or any(words in text for words in _NOT_READY):
        return db.unreachable("timeout" if timed_out else text)
    return errors.UnsafeDeployment(db.LOGIN)
