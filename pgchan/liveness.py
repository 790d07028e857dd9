"""Who is alive: a worker's own presence, and the deaths of others.

Theory of operation ------------------- A worker is alive while its session holds the advisory lock (1885823848, its
id). It takes the lock first and enters its row in pgchan.workers afterwards, so a row whose lock nobody holds means a
death, or a connection that was cut. Two threads, so that a blocked event loop does not look dead, with a connection
each:

lock    holds the lock and sends a heartbeat every 0.3 of the lease. The server ends the session if it hears nothing
        for a lease (idle_session_timeout): a frozen process, or one behind a black hole, loses its lock by that.
        Between heartbeats the thread waits on the socket, so it knows of a cut at once, not at the next heartbeat.
watch   waits for the lock of another worker; being granted it is the death notice. It waits in slices, for a waiting
        statement holds back vacuum. It holds no lock while it waits, so watchers cannot deadlock; and it is not the
        lock's connection, because a lease does not run while a statement does.

The ring. Each worker watches the nearest live worker below it by id, from the lowest on to the highest. Dead ones in
between are its own to reap, so each death has one reaper, and a ring that is broken (the watcher died as well) is
closed by the next one above. Whatever is still there a slice later is reaped by whoever sees it.

The grace. A free lock is a suspicion, not yet a death: a live worker whose connection was cut, or whose server was
restarted (all locks go at once), takes its lock back at once and carries on under the same id. So a suspect is given
the grace, counted from the first look that saw its lock free, on a connection that has not been cut since. Suspicions
age side by side: several deaths cost one grace. A suspect that came back and was lost again is a new suspicion; the
backend_pid in its row, renewed with each return, tells. Then `pgchan.reap` decides in the database: the session that
the row names has the lock, or the worker is dead. Who returns takes the lock first and enters its new session into the
row second: if that is gone it was superseded, drops everything and enters anew under another id.

Strangers. Advisory locks are free for all, so another role may take the lock of a worker, now or when it dies. That
delays nothing by more than a slice: the lock counts only in the hands of the session that the row names. A worker whose
own lock was taken from it in a cut waits for it until its deadline and then enters anew. Both are said in the log.

Self-fencing. `deadline` is the send time of the last acknowledged heartbeat plus 0.7 of the lease, by the monotonic
clock; past it the engine stops its runs. The time of sending counts, because a heartbeat can hang for as long as a
black hole lasts. This spares work and outside effects; what protects the data is the epoch of each run.

What each fault does: SIGKILL frees the lock in milliseconds and the runs after the grace. SIGSTOP, or a proxy that
forwards nothing: after the lease and the grace. Packets that are dropped: at 0.6 of the lease, when TCP gives up on the
server's side, and the grace, which must be 0.1 of the lease or more to end behind the deadline. A cut connection, a
restarted server: nothing, if the worker is back within the grace. A path that dies under the connection while others
work: the worker ends its own forgotten session, which may hold the lock for a lease yet, and takes the lock back. A
watcher that dies as it is granted: its session ends, the lock is free again, the next one looks.

Every wait has a time limit of the client's own and ends when `stop` is called: see session.py.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable

from pgchan import sql
from pgchan.errors import Error, Unavailable, UnsafeDeployment
from pgchan.points import point
from pgchan.session import REPLY_SECONDS, STOP_SECONDS, Cut, Refused, Session, Stop, milliseconds

# ------------------------------------------------------------------------------------------------ limits

# Shares of the lease.
HEARTBEAT = 0.3
STATEMENT = 0.3  # statement_timeout of the lock connection
REPLY = 0.35  # a heartbeat without an answer for this long is given up: time to return by another path before DEADLINE
DEADLINE = 0.7
SLICE = 0.2

SLICE_SECONDS_MAX = 2.0  # how long a waiting statement may hold back vacuum
STATEMENT_SECONDS_MIN = 1.0
REAP_SECONDS = 60.0  # a worker may have held thousands of runs
REAP_AGAIN_SECONDS = 0.1  # its lock is taken: by itself, which is about to register, or by another watcher
RETRY_SECONDS = 0.02  # the first pause after a failure, doubled with each; between attempts to take the lock back
PAUSE_SECONDS_MAX = 2.0
SETTLED_SECONDS = 1.0  # a connection that lasted this long did not fail at once
LEAVE_SECONDS = 0.65
IDS_MAX = 100  # a failover forgets at most 32 ids that a sequence has handed out

LOCK_NOT_AVAILABLE = "55P03"
_STRANGER = "the lock of worker %d is held by %s that is not worker %d; see pgchan doctor and pgchan harden"
TRY_AGAIN = frozenset({LOCK_NOT_AVAILABLE, "40001", "40P01", "57014"})

_log = logging.getLogger(__name__)


class Liveness:
    """A worker's lock and its watch over others. `start` once, `stop` once, from any thread.

    Callbacks come from threads of this object and must not block:
    on_held(id, again)     the lock is held; again: after a cut, under the same id. Runs may have been lost meanwhile if
                           the server lost transactions: read again which are still owned.
    on_lost(reason)        the lock connection is gone; it is being replaced, and `deadline` is no longer extended.
    on_superseded(id)      this worker was taken for dead; its runs belong to others, and it now has this new id.
    on_reaped(id, runs)    that worker was dead, and this many of its runs are back in their queues.
    """

    def __init__(
        self, dsn: str, *, name: str, lease: float = 10.0, grace: float = 1.0,
        on_held: Callable[[int, bool], None], on_lost: Callable[[str], None],
        on_superseded: Callable[[int], None], on_reaped: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.id = 0  # 0 before `start`
        self.deadline = -math.inf  # time.monotonic() until which this worker may act
        self._dsn = dsn
        self._lease = lease
        self._grace = grace
        self._slice = min(SLICE * lease, SLICE_SECONDS_MAX)
        self._who = (name, socket.gethostname(), os.getpid())
        self._on_held = on_held
        self._on_lost = on_lost
        self._on_superseded = on_superseded
        self._on_reaped = on_reaped
        self._stop = Stop()
        self._first: Session | None = None
        self._strangers: set[tuple[int, int]] = set()  # workers and foreign sessions with their locks, at the last look
        self._reported: set[tuple[int, int]] = set()  # those that were warned of
        self._pids: set[int] = set()  # sessions that may hold the lock, the current one among them
        self._threads: list[threading.Thread] = []

    @property
    def alive(self) -> bool:
        """Whether this worker may act: its last acknowledged heartbeat is recent enough."""
        return time.monotonic() < self.deadline

    def start(self) -> int:
        """Take an id and its lock, enter the worker's row, and start the threads; the id. Blocks.

        Raises InvalidInput (a DSN that cannot be read), UnsafeDeployment (a missing privilege), Unavailable.
        """
        try:
            self._first = self._connect()
            self._enter(self._first)
        except (Cut, Refused) as error:
            if self._first is not None:
                self._first.close()
                self._first = None
            raise _named(error) from None
        for run, name in (self._hold, "pgchan lock"), (self._watch, "pgchan watch"):
            self._threads.append(threading.Thread(target=self._forever, args=[run], name=name, daemon=True))
        self._on_held(self.id, False)
        for thread in self._threads:
            thread.start()
        return self.id

    def stop(self) -> None:
        """Leave: give back what the worker still holds, remove its row, free its lock, end the threads.

        Returns within about a second, also if the server does not answer; then others reap this worker. A thread that
        is in the middle of connecting is left to end by itself.
        """
        self._stop.set()
        until = time.monotonic() + STOP_SECONDS + LEAVE_SECONDS + 0.1
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self.deadline = -math.inf

    # -------------------------------------------------------------------------------------------- the lock thread

    def _hold(self) -> None:
        """Keep the lock until `stop`, or until the connection is cut."""
        first, self._first = self._first, None
        with first or self._connect() as session:
            if first is None:
                self._return(session)
            try:
                self._beat(session)
            except Cut as cut:
                if not self._stop.is_set():
                    self._on_lost(str(cut))
                raise

    def _beat(self, session: Session) -> None:
        due = self.deadline + (HEARTBEAT - DEADLINE) * self._lease
        while not session.wait(due - time.monotonic()):
            sent = time.monotonic()
            due = sent + HEARTBEAT * self._lease
            try:
                ours = session.fetch(sql.IS_OURS, self.id, *self._who, seconds=REPLY * self._lease) == [("t",)]
            except Refused as refused:  # an answer, so the lock is held; but nothing is known of the row
                _log.warning("a heartbeat was refused with SQLSTATE %s; trying again", refused.sqlstate)
                continue
            if not ours:
                self.deadline = -math.inf
                raise Cut("the worker's row is gone")
            self.deadline = sent + DEADLINE * self._lease
        session.fetch(sql.LEAVE, self.id, seconds=LEAVE_SECONDS)

    def _return(self, session: Session) -> None:
        """Take the lock back after a cut; under a new id if the row is gone."""
        self._pids.add(session.backend_pid)
        while True:
            sent = time.monotonic()
            taken = session.fetch(sql.TRY_LOCK, self.id) == [("t",)]
            if taken and session.fetch(sql.COME_BACK, self.id, *self._who) == [("t",)]:
                self._is_held(session, self.id, sent)
                self._on_held(self.id, True)
                return
            if session.fetch(sql.IS_OURS, self.id, *self._who) != [("t",)]:
                self.deadline = -math.inf
                session.fetch(sql.UNLOCK_ALL)
                self._enter(session)
                self._on_superseded(self.id)
                return
            # A watcher has it for a moment, or a session of ours that does not know yet that it is cut off.
            session.fetch(sql.END_FORGOTTEN, self.id, "{" + ",".join(map(str, self._pids)) + "}")
            if not self.alive and session.fetch(sql.REAP, self.id, seconds=REAP_SECONDS) != [(None,)]:
                # Or a stranger, who may have it for ever. What this worker had to save is past its deadline.
                _log.warning("%s; going on under another id", _STRANGER % (self.id, "a session", self.id))
            if session.wait(RETRY_SECONDS * random.uniform(0.5, 1.5)):  # noqa: S311
                return

    def _enter(self, session: Session) -> None:
        """Take the next id whose lock is free and which has no row."""
        for _ in range(IDS_MAX):
            sent = time.monotonic()
            ((found,),) = session.fetch(sql.NEW_WORKER)
            worker = int(found or 0)
            taken = session.fetch(sql.TRY_LOCK, worker) == [("t",)]
            if taken and not session.fetch(sql.IS_OURS, worker, *self._who):
                self._register(session, worker, sent)
                return
            session.fetch(sql.UNLOCK_ALL)
        raise Cut(f"{IDS_MAX} ids in a row are locked by other sessions; see pgchan doctor and pgchan harden")

    def _register(self, session: Session, worker: int, sent: float) -> None:
        session.fetch(sql.REGISTER, worker, *self._who)
        self._is_held(session, worker, sent)

    def _is_held(self, session: Session, worker: int, sent: float) -> None:
        session.configure({"application_name": f"pgchan lock {worker}"})
        self._pids = {session.backend_pid}
        self.id = worker
        self.deadline = sent + DEADLINE * self._lease

    # -------------------------------------------------------------------------------------------- the watch thread

    def _watch(self) -> None:
        """Watch the others until `stop`, until this worker gets a new id, or until the connection is cut."""
        with self._connect(watch=True) as session:
            worker = self.id
            session.configure({"application_name": f"pgchan watch {worker}"})
            suspects: dict[tuple[int, int], tuple[float, float]] = {}
            while self.id == worker and not self._stop.is_set():
                suspects = self._look(session, worker, suspects)

    def _look(
        self, session: Session, worker: int, suspects: dict[tuple[int, int], tuple[float, float]]
    ) -> dict[tuple[int, int], tuple[float, float]]:
        """Reap who has been suspect for long enough, then wait for a slice or the next death; who is suspect now.

        suspects: when each was first seen without its lock, and when it is due here; the key is its id and the session
        that held it. It stays due then, although a newcomer may stand nearer to it by now: that one saw it later.
        """
        looked = session.fetch(sql.LOOK)
        self._report({(int(found or 0), int(other)) for found, _, _, other in looked if other is not None})
        rows = [(int(found or 0), int(pid or 0), held == "t") for found, pid, held, _ in looked]
        now = time.monotonic()
        until = now + self._slice
        watched: int | None = None
        seen: dict[tuple[int, int], tuple[float, float]] = {}
        for other, pid, held in sorted(rows, key=lambda row: (row[0] > worker, -row[0])):  # down the ring
            if other == worker:
                continue
            if held:
                watched = other if watched is None else watched
                continue
            since, due = suspects.get((other, pid), (now, math.inf))
            due = min(due, since + self._grace + (0.0 if watched is None else self._slice))  # beyond: another's to reap
            seen[other, pid] = since, due
            if due <= now and not self._reap(session, other):
                due = now + REAP_AGAIN_SECONDS
            until = min(until, due) if due > now else until
        self._wait(session, watched, max(0.001, until - time.monotonic()))
        return seen

    def _report(self, strangers: set[tuple[int, int]]) -> None:
        """Warn once of each session that has a lock which is not its own, at two looks: a watcher soon lets go."""
        for worker, pid in strangers & self._strangers:
            if (worker, pid) not in self._reported:
                self._reported.add((worker, pid))
                _log.warning("%s", _STRANGER % (worker, f"session {pid}", worker))
        self._strangers = strangers
        self._reported &= strangers

    def _reap(self, session: Session, other: int) -> bool:
        try:
            ((runs,),) = session.fetch(sql.REAP, other, seconds=REAP_SECONDS)
        except Refused as refused:
            if refused.sqlstate not in TRY_AGAIN:
                raise
            return False
        if runs is None:
            return False
        self._on_reaped(other, int(runs))
        return True

    def _wait(self, session: Session, watched: int | None, seconds: float) -> None:
        if watched is None:
            session.wait(seconds)
            return
        try:
            session.fetch(sql.WAIT_FOR_LOCK, watched, math.ceil(seconds * 1000), seconds=seconds + REPLY_SECONDS)
        except Refused as refused:
            if refused.sqlstate != LOCK_NOT_AVAILABLE:
                raise
        else:
            point("watch_granted")
            session.fetch(sql.UNLOCK, watched)

    # -------------------------------------------------------------------------------------------- both threads

    def _forever(self, run: Callable[[], None]) -> None:
        """Run it again whenever it ends: at once if it lasted, else after a pause, until `stop`."""
        failures = 0
        pause = 0.0
        while not self._stop.wait(pause):
            began = time.monotonic()
            least = 0.0
            try:
                run()
            except Cut as cut:
                if not self._stop.is_set():
                    _log.info("%s: %s; connecting again", threading.current_thread().name, cut)
            except Refused as refused:
                least = 0.0 if refused.sqlstate in TRY_AGAIN else PAUSE_SECONDS_MAX
                _log.warning("%s: refused with SQLSTATE %s", threading.current_thread().name, refused.sqlstate)
            except Exception:
                _log.exception("%s failed; connecting again", threading.current_thread().name)
            failures = 0 if time.monotonic() - began > SETTLED_SECONDS else failures + 1
            # While there is something to save the pauses stay well below the grace of the others.
            most = self._grace / 4 if self.alive else PAUSE_SECONDS_MAX
            pause = min(RETRY_SECONDS * 2 ** min(failures - 1, 10), most) if failures else 0.0
            pause = max(least, pause * random.uniform(0.5, 1.0))  # noqa: S311

    def _connect(self, *, watch: bool = False) -> Session:
        lease = self._lease
        settings = {
            "idle_session_timeout": milliseconds(lease),
            "client_connection_check_interval": milliseconds(min(0.5, lease / 4)),
            # Where packets are dropped the server gives the session up at 0.6 of the lease after the last heartbeat.
            # A grace of 0.1 or more then ends after DEADLINE: nobody takes over from a worker that still acts.
            "tcp_keepalives_idle": str(math.ceil(0.3 * lease)),
            "tcp_keepalives_interval": str(math.ceil(0.1 * lease)),
            "tcp_keepalives_count": "3",
            "tcp_user_timeout": milliseconds(0.6 * lease),
            "statement_timeout": "0" if watch else milliseconds(max(STATEMENT * lease, STATEMENT_SECONDS_MIN)),
            "lock_timeout": milliseconds(self._slice) if watch else "0",
            "transaction_timeout": "0",  # a role's default would end a session that waits for a lock
            "default_transaction_isolation": "read committed",
        }
        session = Session(self._dsn, lease, self._stop)
        try:
            try:
                session.configure(settings)
            except Refused:  # the one setting that some platforms refuse to have
                del settings["client_connection_check_interval"]
                session.configure(settings)
        except BaseException:
            session.close()
            raise
        return session


def _named(error: Cut | Refused) -> Error:
    if isinstance(error, Cut):
        return Unavailable(f"a worker cannot connect to the database: {error}")
    if error.sqlstate == "42501":
        return UnsafeDeployment(
            "the database role may not be a worker; run: grant pgchan_worker to <the role>; or see: pgchan doctor"
        )
    return Unavailable(f"a worker cannot register: the database refused with SQLSTATE {error.sqlstate}")
