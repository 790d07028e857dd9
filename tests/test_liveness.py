"""A worker is alive while its session holds its lock; others notice when it does not, and nobody is buried alive.

Long, because the workers, the child processes and the paths that can be made to fail are of use to this file only.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from psycopg import conninfo

from pgchan import points
from pgchan import sql as statements
from pgchan.errors import InvalidInput, Unavailable, UnsafeDeployment
from pgchan.liveness import Liveness
from pgchan.session import Session

LEASE = 3.0
SHORT_LEASE = 1.5
GRACE = 0.5
SLACK = 1.5  # what a busy machine may add

CHILD = """
import json, sys, time
from pgchan import points
from pgchan.liveness import Liveness

def tell(event, *facts):
    print(json.dumps([time.monotonic(), event, *facts]), flush=True)

def block(name):
    tell(name)
    sys.stdin.read()

dsn, lease, grace, stop_at_point = sys.argv[1:]
if stop_at_point == "yes":
    points.reached = block
liveness = Liveness(
    dsn, name="child", lease=float(lease), grace=float(grace),
    on_held=lambda id, again: tell("held", id, again), on_lost=lambda reason: tell("lost", reason),
    on_superseded=lambda id: tell("superseded", id), on_reaped=lambda id, runs: tell("reaped", id, runs))
liveness.start()
sys.stdin.read()
"""


class Told:
    """What a worker's callbacks were told, each with the time: CLOCK_MONOTONIC, one clock for all processes."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def tell(self, event: str, *facts: Any) -> None:
        self.events.append((time.monotonic(), event, *facts))

    def of(self, event: str) -> list[tuple[Any, ...]]:
        return [tuple(facts) for _, name, *facts in list(self.events) if name == event]

    def when(self, event: str, *facts: Any) -> float:
        found: float = next(at for at, *rest in list(self.events) if rest[: 1 + len(facts)] == [event, *facts])
        return found


class Worker(Told):
    """A worker of this process."""

    def __init__(self, dsn: str, lease: float, grace: float) -> None:
        super().__init__()
        self.liveness = Liveness(
            dsn, name="here", lease=lease, grace=grace,
            on_held=lambda id, again: self.tell("held", id, again),
            on_lost=lambda reason: self.tell("lost", reason),
            on_superseded=lambda id: self.tell("superseded", id),
            on_reaped=lambda id, runs: self.tell("reaped", id, runs),
        )  # fmt: skip
        self.id = self.liveness.start()

    def close(self) -> None:
        self.liveness.stop()


class Child(Told):
    """A worker that is a process of its own, for signals that cannot be caught."""

    def __init__(self, dsn: str, lease: float, grace: float, *, stop_at_point: bool = False) -> None:
        super().__init__()
        arguments = [dsn, str(lease), str(grace), "yes" if stop_at_point else "no"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self._take(self.process.stdout.readline())
        self.id: int = self.of("held")[0][0]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._take(line)

    def _take(self, line: str) -> None:
        self.events.append(tuple(json.loads(line)))

    def signal(self, number: signal.Signals) -> float:
        now = time.monotonic()
        self.process.send_signal(number)
        return now

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


class Path:
    """A way to the server that can be made to swallow everything, without closing anything."""

    def __init__(self, dsn: str) -> None:
        given = conninfo.conninfo_to_dict(dsn)
        host, port = str(given["host"]), int(given.get("port") or 5432)
        self._target: Any = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._family = socket.AF_UNIX if host.startswith("/") else socket.AF_INET
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = conninfo.make_conninfo(dsn, host="127.0.0.1", port=self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._swallowed: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def swallow(self) -> float:
        """Forward nothing any more on the connections that are open now."""
        self._swallowed.update(self._open)
        return time.monotonic()

    def refuse(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        self.refuse()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(self._family)
                far.connect(self._target)
                self._open += [near, far]
                for source, sink in (near, far), (far, near):
                    self._threads.append(threading.Thread(target=self._forward, args=[source, sink]))
                    self._threads[-1].start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._swallowed:
                    sink.sendall(data)
            if source not in self._swallowed:
                sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def dsn(direct_dsn: str) -> str:
    """What is tested here are sessions; a pooler has its own."""
    return direct_dsn


@pytest.fixture
def sql(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """Remember something to be closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def remember(what: Any) -> Any:
            stack.callback(what.close)
            return what

        yield remember


@pytest.fixture
def here(dsn: str, closing: Callable[[Any], Any]) -> Callable[..., Worker]:
    """Start a worker in this process."""
    return lambda lease=LEASE, grace=GRACE, path=dsn: closing(Worker(path, lease, grace))


@pytest.fixture
def child(dsn: str, closing: Callable[[Any], Any]) -> Callable[..., Child]:
    """Start a worker that is a process of its own."""
    return lambda lease=LEASE, grace=GRACE, **more: closing(Child(dsn, lease, grace, **more))


def ids(sql: psycopg.Connection[Any]) -> list[int]:
    return [worker for (worker,) in sql.execute("select id from pgchan.workers order by id")]


def holder(sql: psycopg.Connection[Any], worker: int) -> int | None:
    """The backend that holds this worker's lock."""
    found = sql.execute(
        "select pid from pg_locks where locktype = 'advisory' and classid = 1885823848 and objid = %s::int::oid"
        " and granted and database = (select oid from pg_database where datname = current_database())",
        [worker],
    ).fetchone()
    return found[0] if found else None


def is_watched(sql: psycopg.Connection[Any], worker: int, by: int | None = None) -> bool:
    """Whether somebody, or this other worker, waits for this worker's lock."""
    waiting = sql.execute(
        "select a.application_name from pg_locks l join pg_stat_activity a on a.pid = l.pid"
        " where l.locktype = 'advisory' and l.classid = 1885823848 and l.objid = %s::int::oid and not l.granted"
        " and a.datname = current_database()",
        [worker],
    ).fetchall()
    return bool(waiting) if by is None else (f"pgchan watch {by}",) in waiting


def claim_a_run(sql: psycopg.Connection[Any], worker: int, run: str) -> None:
    sql.execute("select pgchan.start('work', id => %s)", [run])
    claimed = sql.execute("select run from pgchan.claim(%s, '{default}', '{work}', 1)", [worker]).fetchall()
    assert claimed == [(run,)]


def state(sql: psycopg.Connection[Any], run: str) -> tuple[str, str | None]:
    found = sql.execute("select state, worker from pgchan.run_status where id = %s", [run]).fetchone()
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------- being alive


def test_a_worker_that_started_holds_its_lock_and_has_a_row_that_says_where(sql: Any, here: Any) -> None:
    worker = here()
    row = sql.execute("select id, name, host, pid, backend_pid from pgchan.workers").fetchall()
    assert row == [(worker.id, "here", socket.gethostname(), os.getpid(), holder(sql, worker.id))]
    assert worker.of("held") == [(worker.id, False)]
    names = sql.execute("select application_name from pg_stat_activity where application_name like 'pgchan lock%'")
    assert (f"pgchan lock {worker.id}",) in names.fetchall()


def test_heartbeats_move_the_deadline_by_less_than_the_lease(here: Any, block_until: Any) -> None:
    worker = here(lease=SHORT_LEASE)
    first = worker.liveness.deadline
    assert worker.liveness.alive
    assert first <= time.monotonic() + 0.7 * SHORT_LEASE
    block_until(lambda: worker.liveness.deadline > first + 0.3 * SHORT_LEASE)
    assert worker.liveness.deadline <= time.monotonic() + 0.7 * SHORT_LEASE


def test_a_worker_on_its_own_looks_around_once_a_slice(
    here: Any, block_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count(monkeypatch, statements.LOOK)
    worker = here(lease=SHORT_LEASE)
    block_until(lambda: len(looks) >= 4)
    assert looks[3] - looks[0] >= 3 * 0.2 * SHORT_LEASE
    assert worker.liveness.alive


def count(monkeypatch: pytest.MonkeyPatch, statement: str) -> list[float]:
    """The times at which this statement is sent from now on."""
    times: list[float] = []
    fetch = Session.fetch

    def counted(self: Session, sent: str, *values: Any, **more: Any) -> Any:
        if sent == statement:
            times.append(time.monotonic())
        return fetch(self, sent, *values, **more)

    monkeypatch.setattr(Session, "fetch", counted)
    return times


def test_starting_without_a_server_is_unavailable_and_says_nothing_of_the_dsn() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unavailable) as caught:
        Worker(f"postgresql://somebody:s3cret@127.0.0.1:{port}/somewhere", LEASE, GRACE)
    told = f"{caught.value} {caught.value.__cause__}"
    assert "Connection refused" in told
    assert not [part for part in ("somebody", "s3cret", str(port), "somewhere") if part in told]


def test_a_dsn_that_cannot_be_read_is_invalid_and_not_repeated() -> None:
    with pytest.raises(InvalidInput) as caught:
        Worker("s3cret = ", LEASE, GRACE)
    assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_role_without_the_right_to_be_a_worker_is_told_so(sql: Any, dsn: str) -> None:
    role = f"nobody_{os.getpid()}"
    sql.execute(f"create role {role} login")
    try:
        with pytest.raises(UnsafeDeployment, match="grant"):
            Worker(conninfo.make_conninfo(dsn, user=role), LEASE, GRACE)
    finally:
        sql.execute(f"drop role {role}")


def test_an_id_that_belongs_to_another_worker_is_not_taken(sql: Any, here: Any) -> None:
    first = here()
    sql.execute("select setval('pgchan.workers_id_seq', %s, false)", [first.id])  # as after a failover
    second = here()
    assert second.id == first.id + 1
    sql.execute("select pgchan.register(%s, 'dead', 'there', 1)", [second.id + 1])
    third = here()
    assert third.id == second.id + 2
    assert ids(sql)[:2] == [first.id, second.id]


# ---------------------------------------------------------------------------------------------------- deaths


def test_the_runs_of_a_killed_worker_are_back_in_their_queue_after_the_grace(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    watcher, victim = here(), child()
    claim_a_run(sql, victim.id, "r-1")
    block_until(lambda: is_watched(sql, victim.id))
    killed = victim.signal(signal.SIGKILL)
    block_until(lambda: watcher.of("reaped"))
    assert watcher.of("reaped") == [(victim.id, 1)]
    assert GRACE <= watcher.when("reaped") - killed < GRACE + SLACK
    assert state(sql, "r-1") == ("scheduled", None)
    assert ids(sql) == [watcher.id]


def test_a_frozen_worker_is_reaped_after_its_lease_and_comes_back_under_a_new_id(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    watcher, victim = here(lease=SHORT_LEASE), child(lease=SHORT_LEASE)
    claim_a_run(sql, victim.id, "r-1")
    frozen = victim.signal(signal.SIGSTOP)
    block_until(lambda: watcher.of("reaped"))
    assert watcher.of("reaped") == [(victim.id, 1)]
    assert 0.7 * SHORT_LEASE + GRACE <= watcher.when("reaped") - frozen < SHORT_LEASE + GRACE + SLACK
    victim.signal(signal.SIGCONT)
    block_until(lambda: victim.of("superseded"))
    assert [new for (new,) in victim.of("superseded")] == [victim.id + 1]
    assert ids(sql) == [watcher.id, victim.id + 1]
    assert len(victim.of("lost")) == 1
    block_until(lambda: is_watched(sql, victim.id + 1))


def test_workers_that_die_together_are_reaped_in_one_grace(sql: Any, here: Any, child: Any, block_until: Any) -> None:
    grace = 1.0
    survivor = here(grace=grace)
    victims = [child(grace=grace) for _ in range(3)]
    for victim in victims:
        claim_a_run(sql, victim.id, f"r-{victim.id}")
    block_until(lambda: all(is_watched(sql, worker.id) for worker in [survivor, *victims]))
    killed = [victim.signal(signal.SIGKILL) for victim in victims][-1]
    block_until(lambda: len(survivor.of("reaped")) == 3)
    assert sorted(survivor.of("reaped")) == [(victim.id, 1) for victim in victims]
    assert grace <= survivor.when("reaped") - killed
    assert survivor.events[-1][0] - killed < grace + 0.9  # two graces would be 2.0
    assert ids(sql) == [survivor.id]


def test_a_worker_reaps_those_who_died_before_it_started(sql: Any, here: Any, block_until: Any) -> None:
    sql.execute("select pgchan.register(w, 'gone', 'there', 1) from generate_series(pgchan.new_worker(), 3) w")
    sql.execute("select setval('pgchan.workers_id_seq', 3)")
    claim_a_run(sql, 2, "r-1")
    worker = here()
    block_until(lambda: len(worker.of("reaped")) == 3)
    assert worker.of("reaped") == [(3, 0), (2, 1), (1, 0)]
    assert worker.when("reaped") - worker.when("held") >= GRACE
    assert ids(sql) == [worker.id]


def test_a_death_is_reaped_although_its_watcher_dies_as_it_is_granted(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    third, victim, watcher = here(), child(), child(stop_at_point=True)
    block_until(lambda: is_watched(sql, victim.id, by=watcher.id))
    victim.signal(signal.SIGKILL)
    block_until(lambda: watcher.of("watch_granted"))
    assert holder(sql, victim.id) is not None
    killed = watcher.signal(signal.SIGKILL)
    block_until(lambda: len(third.of("reaped")) == 2)
    assert {dead for dead, _ in third.of("reaped")} == {victim.id, watcher.id}
    assert third.events[-1][0] - killed < 0.2 * LEASE + GRACE + SLACK


def test_a_death_whose_watcher_froze_as_it_was_granted_waits_for_the_watchers_lease(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    third, victim = here(lease=SHORT_LEASE), child(lease=SHORT_LEASE)
    watcher = child(lease=SHORT_LEASE, stop_at_point=True)
    block_until(lambda: is_watched(sql, victim.id, by=watcher.id))
    victim.signal(signal.SIGKILL)
    block_until(lambda: watcher.of("watch_granted"))
    frozen = watcher.signal(signal.SIGSTOP)
    block_until(lambda: len(third.of("reaped")) == 2)
    assert {dead for dead, _ in third.of("reaped")} == {victim.id, watcher.id}
    assert third.events[-1][0] - frozen < SHORT_LEASE + GRACE + SLACK


def test_a_suspect_that_came_back_and_was_lost_again_is_given_the_grace_again(
    sql: Any, dsn: str, here: Any, block_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted: list[float] = []
    monkeypatch.setattr(points, "reached", lambda name: granted.append(time.monotonic()))
    (worker,) = sql.execute("select pgchan.new_worker()").fetchone()
    with worker_by_hand(dsn, worker):
        watcher = here()
        block_until(lambda: is_watched(sql, worker))
    block_until(lambda: granted)
    block_until(lambda: time.monotonic() >= granted[0] + 0.8 * GRACE)
    with worker_by_hand(dsn, worker):
        lost = time.monotonic()
    block_until(lambda: watcher.of("reaped"))
    assert watcher.when("reaped") - lost >= GRACE


@contextlib.contextmanager
def worker_by_hand(dsn: str, worker: int) -> Iterator[None]:
    """A session that holds a worker's lock and has registered, but never sends a heartbeat."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        while connection.execute("select pg_try_advisory_lock(1885823848, %s)", [worker]).fetchone() != (True,):
            pass
        connection.execute("select pgchan.register(%s, 'by hand', 'here', 1)", [worker])
        yield


# ---------------------------------------------------------------------------------------------------- not deaths


def test_a_worker_whose_connection_is_cut_takes_its_lock_back_under_the_same_id(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    other, worker, watcher = child(), here(), here()
    claim_a_run(sql, worker.id, "r-1")
    block_until(lambda: is_watched(sql, worker.id, by=watcher.id))
    before = holder(sql, worker.id)
    cut = time.monotonic()
    sql.execute("select pg_terminate_backend(%s)", [before])
    block_until(lambda: worker.of("held") == [(worker.id, False), (worker.id, True)])
    assert worker.when("held", worker.id, True) - cut < GRACE
    assert len(worker.of("lost")) == 1
    assert sql.execute("select backend_pid from pgchan.workers where id = %s", [worker.id]).fetchone() != (before,)
    # Nobody takes it for dead: whoever suspected it would have acted by the time that a later, real death is reaped.
    other.signal(signal.SIGKILL)
    block_until(lambda: watcher.of("reaped") + worker.of("reaped"))
    assert watcher.of("reaped") + worker.of("reaped") == [(other.id, 0)]
    assert state(sql, "r-1") == ("running", "here")
    assert worker.liveness.alive


def test_a_watch_that_is_cut_goes_on(sql: Any, here: Any, child: Any, block_until: Any) -> None:
    watcher, victim = here(), child()
    block_until(lambda: is_watched(sql, victim.id))
    sql.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name = %s and datname = current_database()",
        [f"pgchan watch {watcher.id}"],
    )
    block_until(lambda: is_watched(sql, victim.id))
    victim.signal(signal.SIGKILL)
    block_until(lambda: watcher.of("reaped"))
    assert watcher.of("lost") == []


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_nobody_is_reaped_when_the_server_restarts(server: Cluster, mode: str, closing: Any, block_until: Any) -> None:
    first, second = (closing(Worker(server.dsn, LEASE, 1.0)) for _ in range(2))
    victim = closing(Child(server.dsn, LEASE, 1.0))
    server.restart(mode)
    back = time.monotonic()
    for worker in first, second, victim:
        block_until(lambda worker=worker: (worker.id, True) in worker.of("held"))  # type: ignore[misc]
        assert worker.when("held", worker.id, True) - back < 1.0
    victim.signal(signal.SIGKILL)
    block_until(lambda: first.of("reaped") + second.of("reaped"))
    assert first.of("reaped") + second.of("reaped") == [(victim.id, 0)]
    assert first.of("superseded") + second.of("superseded") + victim.of("superseded") == []


def test_a_worker_whose_row_is_gone_gets_a_new_id_at_its_next_heartbeat(sql: Any, here: Any, block_until: Any) -> None:
    worker = here(lease=SHORT_LEASE)
    sql.execute("delete from pgchan.workers")
    block_until(lambda: worker.of("superseded"))
    assert worker.of("superseded") == [(worker.id + 1,)]
    assert worker.of("lost") == [("the worker's row is gone",)]
    assert ids(sql) == [worker.id + 1]
    assert holder(sql, worker.id) is None
    assert holder(sql, worker.id + 1) is not None
    assert worker.liveness.id == worker.id + 1


# ---------------------------------------------------------------------------------------------------- paths that die


def test_behind_a_black_hole_a_worker_stops_before_its_lease_ends(
    sql: Any, dsn: str, here: Any, closing: Any, block_until: Any
) -> None:
    path = closing(Path(dsn))
    watcher, victim = here(), here(path=path.dsn, lease=SHORT_LEASE)
    path.refuse()
    path.swallow()
    block_until(lambda: not victim.liveness.alive)
    stopped = time.monotonic()
    assert holder(sql, victim.id) is not None
    block_until(lambda: watcher.of("reaped"))
    assert watcher.of("reaped") == [(victim.id, 0)]
    assert watcher.when("reaped") > stopped + GRACE


def test_a_worker_whose_path_dies_takes_its_lock_back_over_another_one(
    sql: Any, dsn: str, here: Any, closing: Any, block_until: Any
) -> None:
    path = closing(Path(dsn))
    watcher, worker = here(), here(path=path.dsn, lease=SHORT_LEASE)
    swallowed = path.swallow()
    block_until(lambda: worker.of("held") == [(worker.id, False), (worker.id, True)])
    assert worker.of("lost") == [("the server did not answer in time",)]
    assert worker.when("held", worker.id, True) - swallowed < SHORT_LEASE
    assert watcher.of("reaped") == []


# ---------------------------------------------------------------------------------------------------- leaving


def test_a_worker_that_stops_gives_its_runs_back_and_leaves_nothing(
    sql: Any, here: Any, child: Any, block_until: Any
) -> None:
    worker, other = here(lease=10.0), child()
    claim_a_run(sql, worker.id, "r-1")
    block_until(lambda: is_watched(sql, other.id))  # for a slice of two seconds
    started = time.monotonic()
    worker.liveness.stop()
    assert time.monotonic() - started < 1.0
    assert not worker.liveness.alive
    assert ids(sql) == [other.id]
    assert state(sql, "r-1") == ("scheduled", None)
    block_until(lambda: holder(sql, worker.id) is None and not is_watched(sql, other.id))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pgchan")]
    assert worker.of("lost") == []


def test_stopping_does_not_wait_for_a_server_that_is_gone(server: Cluster) -> None:
    worker = Worker(server.dsn, LEASE, GRACE)
    server.stop("immediate")
    started = time.monotonic()
    worker.liveness.stop()
    worker.liveness.stop()
    assert time.monotonic() - started < 1.0


def test_stopping_does_not_wait_for_a_server_that_is_silent(dsn: str, here: Any, closing: Any) -> None:
    path = closing(Path(dsn))
    worker = here(path=path.dsn)
    path.swallow()
    started = time.monotonic()
    worker.liveness.stop()
    assert time.monotonic() - started < 1.2
