"""Runs at the level of the routines: what happens in the gaps between two transactions, and any sequence of calls
against a model of it. Long, because the model is here as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from generated import effort, patience
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pgchan import sql
from pgchan.db import Entry
from pgchan.model import CONTROL, MESSAGE
from pgchan.writer import Batch, Queued

WORKFLOWS, QUEUES = ["flow"], ["default"]
EXAMPLES, STEPS = 200, 20


class Session:
    """A connection on which the statements of sql.py can be executed."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.pid = self.connection.info.backend_pid

    def rows(self, statement: str, *args: Any) -> list[tuple[Any, ...]]:
        with psycopg.RawCursor(self.connection) as cursor:
            cursor.execute(statement.encode(), args)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *args: Any) -> Any:
        ((value,),) = self.rows(statement, *args)
        return value

    def worker(self) -> int:
        """Register a worker on this session, with its lock."""
        worker = int(self.one(sql.NEW_WORKER))
        self.rows(sql.TRY_LOCK, worker)
        self.rows(sql.REGISTER, worker, "w", "here", 1)
        return worker

    def start(self, run: str, parent: int | None = None, timeout: float | None = None) -> int:
        """Start a run; the id of its channel."""
        self.rows(sql.ENQUEUE, run, "flow", None, "default", 0, None, timeout, b"{}", parent)
        return int(self.one("select id from pgchan.channels where name = $1::text", run))

    def claim(self, worker: int, most: int = 10) -> list[tuple[Any, ...]]:
        return self.rows(sql.CLAIM, worker, QUEUES, WORKFLOWS, most)

    def state(self, run: int) -> str:
        return str(self.one("select state from pgchan.runs where channel_id = $1::bigint", run))


@pytest.fixture
def session(direct_dsn: str) -> Iterator[Callable[[], Session]]:
    """Makes sessions, past any pooler: a test waits until one of them waits."""
    made: list[Session] = []

    def make() -> Session:
        made.append(Session(direct_dsn))
        return made[-1]

    yield make
    for one in made:
        one.connection.close()


class Meanwhile:
    """A statement in a thread of its own, which is waiting for a lock when this has been made."""

    def __init__(
        self, on: Session, seen_by: Session, block_until: Callable[..., None], statement: str, *args: Any
    ) -> None:  # fmt: skip
        self._found: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._found.append(on.rows(statement, *args)))
        self._thread.start()
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1::integer"
        block_until(lambda: seen_by.one(waits, on.pid))

    def rows(self) -> list[tuple[Any, ...]]:
        self._thread.join(10)
        found: list[tuple[Any, ...]] = self._found[0]
        return found


# ------------------------------------------------------------------------------------------------ the gaps


def test_a_claim_returns_every_run_that_it_takes_also_one_that_was_started_since_it_began(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    holder, claimer, other = session(), session(), session()
    worker = claimer.worker()
    early = other.start("early")  # without any it would return at once
    holder.rows("begin")
    holder.rows("select from pgchan.workers for update")
    claiming = Meanwhile(claimer, other, block_until, sql.CLAIM, worker, QUEUES, WORKFLOWS, 10)
    late = other.start("late")
    holder.rows("commit")
    assert sorted(row[0] for row in claiming.rows()) == [early, late]
    assert other.state(late) == "running"


def test_a_claim_tells_what_was_recorded_since_it_began(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    """Else the new owner would load no journal, and execute again what it holds."""
    holder, claimer, other = session(), session(), session()
    run = other.start("r")
    ((_, _, journal, *_, epoch, _, _, _, _, _),) = other.claim(worker := other.worker())
    other.start("another")  # without one that is ready the claim would return at once
    holder.rows("begin")
    holder.rows("select from pgchan.workers for update")
    claiming = Meanwhile(claimer, holder, block_until, sql.CLAIM, worker, QUEUES, WORKFLOWS, 10)
    batch = Batch()
    entry = Entry("j", b"1", channel_id=journal, key="step", step="step", fence=epoch, owner=journal)
    batch.add(Queued(entry, None, 0))
    other.rows(sql.APPEND_QUIETLY, *batch.arguments())
    other.rows(sql.RELEASE, worker, [run])
    holder.rows("commit")
    assert [row[9:11] for row in claiming.rows() if row[0] == run] == [(0, 1)]


def test_a_parent_that_suspends_while_its_child_ends_is_not_left_behind(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    one, two, three = session(), session(), session()
    worker = three.worker()
    parent = one.start("parent")
    child = one.start("child", parent=parent)
    epochs = {row[0]: row[6] for row in one.claim(worker)}
    one.rows("begin")
    assert one.rows("select outcome from pgchan.finish($1, $2, 'succeeded', '1', null)", child, epochs[child])
    suspending = Meanwhile(two, three, block_until, sql.SUSPEND, parent, epochs[parent], None, 0, ["child"])
    one.rows("commit")
    assert suspending.rows() == [("ready",)]


def test_a_child_that_ends_waits_for_its_parents_row_before_it_holds_its_own(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    """Who releases all runs of a worker locks their rows in the same order, so neither can wait for the other."""
    one, two, three = session(), session(), session()
    worker = three.worker()
    parent = one.start("parent")
    child = one.start("child", parent=parent)
    epochs = {row[0]: row[6] for row in one.claim(worker)}
    one.rows("begin")
    one.rows("select from pgchan.runs where channel_id = $1 for update", parent)
    finishing = Meanwhile(two, three, block_until, sql.FINISH, child, epochs[child], "succeeded", b"1", None)
    one.rows("select from pgchan.runs where channel_id = $1 for update nowait", child)
    one.rows("commit")
    assert finishing.rows()[0][0] == "finished"


def test_a_claim_takes_a_parent_whose_child_is_just_ending(session: Callable[[], Session]) -> None:
    one, two = session(), session()
    worker = two.worker()
    parent = one.start("parent")
    child = one.start("child", parent=parent)
    epochs = {row[0]: row[6] for row in one.claim(worker)}
    one.rows(sql.RELEASE, worker, [parent])
    one.rows("begin")
    one.rows("select outcome from pgchan.finish($1, $2, 'succeeded', '1', null)", child, epochs[child])
    assert [row[0] for row in two.claim(worker)] == [parent]
    one.rows("commit")


def test_a_signal_that_comes_while_a_run_suspends_makes_it_ready(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    one, two, three = session(), session(), session()
    worker = three.worker()
    run = one.start("r")
    ((*_, epoch, _, _, _, _, _),) = one.claim(worker)
    one.rows("begin")
    assert one.one(sql.SUSPEND, run, epoch, None, 0, []) == "waiting"
    delivering = Meanwhile(two, three, block_until, sql.DELIVER, "r", b"1", None)
    one.rows("commit")
    delivering.rows()
    assert three.state(run) == "scheduled"


def test_a_signal_to_a_run_that_is_ready_announces_it_again(session: Callable[[], Session]) -> None:
    """A claim passes over a run whose row is locked, as this locks it."""
    one = session()
    one.start("r")
    assert one.rows(sql.DELIVER, "r", b"1", None)[0][-1] == "default"


def test_a_fork_of_a_run_that_continues_with_a_fresh_journal_has_all_of_the_old_one_or_none(
    session: Callable[[], Session], block_until: Callable[..., None]
) -> None:
    """It looks for the step first and copies then; what lies between must not be taken away meanwhile."""
    one, two, three = session(), session(), session()
    run = one.start("r")
    ((_, _, journal, *_, epoch, _, _, _, _, _),) = one.claim(three.worker())
    batch = Batch()
    for step in ("a", "b"):
        entry = Entry("j", b"1", channel_id=journal, key=step, step=step, attempt=1, fence=epoch, owner=journal)
        batch.add(Queued(entry, None, 0))
    one.rows(sql.APPEND_QUIETLY, *batch.arguments())
    one.rows("begin")
    assert one.one(sql.CONTINUE, run, epoch, b"{}") == "continued"
    forking = Meanwhile(two, three, block_until, sql.FORK, "r", "b", "forked")
    one.rows("commit")
    assert forking.rows() == [("unrecorded", None)]


def test_a_run_that_waits_wakes_at_its_deadline(session: Callable[[], Session]) -> None:
    one = session()
    run = one.start("r", timeout=100)
    ((*_, epoch, _, _, _, _, _),) = one.claim(one.worker())
    assert one.one(sql.SUSPEND, run, epoch, None, 0, []) == "waiting"
    assert one.one("select wake_at = deadline from pgchan.runs where channel_id = $1", run)


# ------------------------------------------------------------------------------------------------ a model


@dataclass
class Model:
    """What should be stored of one run."""

    id: int
    name: str
    state: str = "scheduled"
    owner: int | None = None
    epoch: int = 0
    journal_epoch: int = 0
    journal: list[str] = field(default_factory=list)  # the keys of its messages; "" is a control message
    keys: dict[str, int] = field(default_factory=dict)
    signals: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    said: int = 0
    head: int = 0

    @property
    def is_ended(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def open(self) -> list[int]:
        return [position for position in self.signals if position not in self.consumed]


class Machine(RuleBasedStateMachine):
    """Two workers, some runs, and attempts of which some were superseded long ago. One session: one order of events."""

    session: Session  # of all examples: a new one would plan every statement anew
    examples = 0

    def __init__(self) -> None:
        super().__init__()
        Machine.examples += 1
        self.session.rows("select pg_advisory_unlock_all()")
        for table in ("messages", "runs", "channels", "workers"):  # of the last example; few rows, so no truncate
            self.session.rows(f"delete from pgchan.{table}")
        self.workers = [self.session.worker(), self.session.worker()]
        self.runs: list[Model] = []
        self.attempts: list[tuple[Model, int, int]] = []  # each claim there was, with its epoch and journal

    def _move(self, run: Model, state: str, owner: int | None = None) -> None:
        """Into this state, which fences out whoever owned it: both epochs are then one number above all before."""
        epoch: int = self.session.one("select epoch from pgchan.channels where id = $1", run.id)
        assert epoch > run.epoch
        run.state, run.owner, run.epoch, run.journal_epoch = state, owner, epoch, epoch

    def _end(self, run: Model, state: str) -> None:
        self._move(run, state)
        run.head += 1

    # Without the conditions most calls would find nothing to do.

    @precondition(lambda self: len(self.runs) < 6 and sum(not run.is_ended for run in self.runs) < 2)
    @rule()
    def start(self) -> None:
        name = f"{Machine.examples}/r{len(self.runs)}"
        self.runs.append(Model(self.session.start(name), name))
        assert self.session.rows(sql.ENQUEUE, name, "flow", None, "default", 0, None, None, b"{}", None)[0] == (
            "existed", None,
        )  # fmt: skip

    @precondition(lambda self: any(run.state == "scheduled" for run in self.runs))
    @rule(which=st.integers(0, 1), most=st.integers(1, 3))
    def claim(self, which: int, most: int) -> None:
        claimed = {row[0]: row for row in self.session.claim(self.workers[which], most)}
        ready = [run for run in self.runs if run.state == "scheduled"]
        assert sorted(claimed) == sorted(run.id for run in ready[:most])
        for run in ready[:most]:
            self._move(run, "running", self.workers[which])
            assert claimed[run.id][6] == run.epoch
            assert claimed[run.id][9:11] == (run.head, len(run.journal))
            self.attempts.append((run, run.epoch, claimed[run.id][2]))

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(), step=st.sampled_from("abc"), consume=st.booleans(), outputs=st.integers(0, 2),
        fails=st.booleans(),
    )  # fmt: skip
    def record(self, data: st.DataObject, step: str, consume: bool, outputs: int, fails: bool) -> None:
        """A step's output and how it ended, in one commit: a result with the signals it consumed, or a failure."""
        run, epoch, journal = data.draw(st.sampled_from(self.attempts[:-4:-1]))
        taken = run.open[:1] if consume and not fails else []
        batch = Batch()

        def add(name: str, channel: int, **more: Any) -> None:
            entry = Entry(name, b"1", channel_id=channel, step=step, attempt=1, fence=epoch, owner=journal, **more)
            batch.add(Queued(entry, None, 0))

        for _ in range(outputs):
            add("run", run.id, kind=MESSAGE)
        for position in taken:
            inbox = min([position, *(p - 1 for p in run.open[1:])])
            add("run", run.id, kind=CONTROL, key=f"pgchan:consumed:{position}", inbox=inbox)
        if fails:
            add("journal", journal, kind=CONTROL)
        else:
            add("journal", journal, kind=MESSAGE, key=step)
        (row,) = self.session.rows(sql.APPEND_QUIETLY, *batch.arguments())
        words = {outcome.word for outcome in batch.outcomes(row)}
        if epoch != run.epoch or run.is_ended:
            assert words <= {"fenced", "blocked", "closed", "missing"}, words
            return
        run.head += outputs + len(taken)
        run.said += outputs
        run.consumed += taken
        if step in run.journal and not fails:
            assert words <= {"repeated", "appended"}
        else:
            assert words == {"appended"}
            run.journal.append("" if fails else step)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), up_to_date=st.booleans(), timer=st.booleans())
    def suspend(self, data: st.DataObject, up_to_date: bool, timer: bool) -> None:
        run, epoch, _ = data.draw(st.sampled_from(self.attempts[:-4:-1]))
        seen = run.signals[-1] if up_to_date and run.signals else 0
        wake_at = self.session.one("select now() + interval '1 hour'") if timer else None
        word = self.session.one(sql.SUSPEND, run.id, epoch, wake_at, seen, [])
        if epoch != run.epoch or run.state != "running":
            assert word == "fenced"
        elif any(position > seen for position in run.signals):
            assert word == "ready"
        else:
            assert word == "waiting"
            self._move(run, "waiting")

    @precondition(lambda self: any(run.state == "waiting" for run in self.runs))
    @rule(which=st.integers(0, 1))
    def ring(self, which: int) -> None:
        """All timers of runs that wait are due; a claim for nothing makes them ready."""
        self.session.rows(
            "update pgchan.runs set wake_at = now() - interval '1 s' where state = 'waiting' and channel_id = any ($1)",
            [run.id for run in self.runs],
        )
        self.session.rows(sql.CLAIM, self.workers[which], QUEUES, ["no such workflow"], 1)
        for run in self.runs:
            if run.state == "waiting":
                run.state = "scheduled"

    @precondition(lambda self: any(len(run.signals) < 3 and not run.is_ended for run in self.runs))
    @rule(data=st.data(), key=st.none() | st.sampled_from("kl"), body=st.sampled_from([b"1", b"2"]))
    def deliver(self, data: st.DataObject, key: str | None, body: bytes) -> None:
        run = data.draw(st.sampled_from(self.runs))
        outcome, _, position, *_ = self.session.rows(sql.DELIVER, run.name, body, key)[0]
        if key is not None and key in run.keys:
            first = self.session.one(
                "select body from pgchan.messages where channel_id = $1 and position = $2", run.id, run.keys[key]
            )
            assert (outcome, position) == ("repeated" if bytes(first) == body else "conflict", run.keys[key])
            return
        if run.is_ended:
            assert outcome == "closed"
            return
        run.head += 1
        run.signals.append(run.head)
        if key is not None:
            run.keys[key] = run.head
        assert (outcome, position) == ("appended", run.head)
        if run.state == "waiting":
            run.state = "scheduled"

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), state=st.sampled_from(["succeeded", "failed"]))
    def finish(self, data: st.DataObject, state: str) -> None:
        latest = st.sampled_from(self.attempts[:-5:-1])
        chosen = data.draw(st.lists(latest, min_size=1, max_size=3, unique_by=lambda attempt: attempt[0].id))
        if len(chosen) == 1:
            run, epoch, _ = chosen[0]
            outcomes = [self.session.rows(sql.FINISH, run.id, epoch, state, b"1", None)[0][0]]
        else:
            arrays = zip(*((run.id, epoch, state, b"1", None) for run, epoch, _ in chosen), strict=True)
            outcomes = self.session.one(sql.FINISH_MANY, *map(list, arrays), 1000)
        for (run, epoch, _), outcome in zip(chosen, outcomes, strict=True):
            if epoch != run.epoch or run.state != "running":
                assert outcome == "fenced"
            else:
                assert outcome == "finished"
                self._end(run, state)

    @precondition(lambda self: len(self.attempts) > 2)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs))
        assert self.session.one(sql.CANCEL, run.name) is (not run.is_ended)
        if not run.is_ended:
            self._end(run, "cancelled")

    @precondition(lambda self: any(run.is_ended for run in self.runs))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs))
        word = self.session.one(sql.RESUME, run.name)
        if run.state != "failed":
            assert word == run.state
            return
        assert word == "resumed"
        self._move(run, "scheduled")
        run.head += 1
        run.journal.append("")

    @precondition(lambda self: any(run.journal for run in self.runs))
    @rule(data=st.data(), step=st.sampled_from("abc"))
    def fork(self, data: st.DataObject, step: str) -> None:
        run = data.draw(st.sampled_from(self.runs))
        name = f"{run.name}/{step}"
        known = [other for other in self.runs if other.name == name]
        word, _ = self.session.rows(sql.FORK, run.name, step, name)[0]
        if step not in run.journal:
            assert word == "unrecorded"
        elif known:
            assert word == "existed"
        else:
            assert word == "started"
            id = self.session.one("select id from pgchan.channels where name = $1", name)
            self.runs.append(Model(id, name, journal=run.journal[: run.journal.index(step)]))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def continue_as(self, data: st.DataObject) -> None:
        run, epoch, _ = data.draw(st.sampled_from(self.attempts[:-4:-1]))
        word = self.session.one(sql.CONTINUE, run.id, epoch, b"{}")
        if epoch != run.epoch or run.state != "running":
            assert word == "fenced"
            return
        assert word == "continued"
        self._move(run, "scheduled")
        run.journal, run.journal_epoch = [], 0  # a new channel; the next claim raises both to one number

    @precondition(lambda self: any(run.owner for run in self.runs))
    @rule(which=st.integers(0, 1), data=st.data())
    def hand_back(self, which: int, data: st.DataObject) -> None:
        """A worker that is stopped gives back what it holds; it names others in vain."""
        named = data.draw(st.lists(st.sampled_from(self.runs), unique_by=id))
        self.session.rows(sql.RELEASE, self.workers[which], [run.id for run in named])
        for run in named:
            if run.owner == self.workers[which]:
                self._move(run, "scheduled")

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Somebody else says something on the channel of a run."""
        run = data.draw(st.sampled_from(self.runs))
        batch = Batch()
        batch.add(Queued(Entry(run.name, b"1", channel_id=run.id), None, 0))
        (row,) = self.session.rows(sql.APPEND_QUIETLY, *batch.arguments())
        (outcome,) = batch.outcomes(row)
        assert outcome.word == ("closed" if run.is_ended else "appended")
        if not run.is_ended:
            run.head += 1
            run.said += 1
            assert outcome.position == run.head

    @precondition(lambda self: any(run.owner for run in self.runs))
    @rule(which=st.integers(0, 1))
    def reap(self, which: int) -> None:
        """The worker has died; another takes its place."""
        worker = self.workers[which]
        self.session.rows(sql.UNLOCK, worker)
        held = [run for run in self.runs if run.owner == worker]
        assert self.session.one(sql.REAP, worker) == len(held)
        for run in held:
            self._move(run, "scheduled")
        assert self.session.claim(worker) == [], "who was reaped claims nothing"
        self.workers[which] = self.session.worker()

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        rows = self.session.rows(
            """select c.id, r.state, r.worker, c.epoch, j.epoch, c.head, j.head, c.closed_at is not null,
                      (select array_agg(m.position order by m.position)
                       from pgchan.messages m where m.channel_id = c.id),
                      (select array_agg(s.position) from pgchan.open_signals(c.id) s),
                      (select count(*) from pgchan.messages m where m.channel_id = c.id and m.kind = 0)
               from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
               join pgchan.channels j on j.id = r.journal_id where c.id = any ($1::bigint[])""",
            [run.id for run in self.runs],
        )
        found = {row[0]: row[1:] for row in rows}
        for run in self.runs:
            assert found[run.id] == (
                run.state, run.owner, run.epoch, run.journal_epoch, run.head, len(run.journal), run.is_ended,
                list(range(1, run.head + 1)) or None, run.open or None, run.said,
            )  # fmt: skip


@patience(600)
def test_any_sequence_of_calls_leaves_what_the_model_says(session: Callable[[], Session]) -> None:
    Machine.session = session()
    run_state_machine_as_test(Machine, settings=effort(EXAMPLES, stateful_step_count=STEPS))
