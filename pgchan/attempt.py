"""One attempt at a run by this worker: what it owns, writes, waits for, and how it ends.

How it works. A claim gave this process an epoch. Everything that the attempt writes goes through the client's writer
with that epoch as its fence and the journal as its owner, in order: output of a step, the signals it consumed, its
result, so that a result never lacks its output and they share a commit. If the epoch is no longer the newest, the
database refuses, and the attempt ends where it stands.

Output of a step that had to be tried again is void: before the new try speaks (or, if it says nothing, with its
result) one `reset` control message names what is void. A try that asked for `previous()` keeps it instead.

Text that a step publishes with `join` is held back for a moment, so that what follows becomes part of the same message.
Only one message is held at a time, and it goes to the writer before anything else of the attempt does, be that by
`_put`, `_put_soon` or `flushed`; so joining changes how text is cut up, and no order. Nothing is held while a
transaction commits, nor when the run leaves memory.

Signals that arrive are offered in order: to whoever waits in receive() or signals(), else to a running interruptible
step, else they stay pending. What a step took is consumed with its result; if it fails, the signals return to the
front.

An attempt that only waits leaves memory: `pgchan.suspend` decides under the run's row lock whether what it waits for
has come. From then on another claim, perhaps elsewhere, replays the function up to the same point.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pgchan import codec, errors, names, sql
from pgchan.channels import refusal, row_message
from pgchan.db import STORED, Entry, Outcome, Row
from pgchan.journal import Journal, Recorded, describe_error
from pgchan.model import CONTROL, MESSAGE, SIGNAL, Message
from pgchan.points import point
from pgchan.wakeups import Watch

if TYPE_CHECKING:
    from pgchan.asyncpg_db import AsyncpgDb, Writer
    from pgchan.workflows import Workflow
    from pgchan.writer import Settle

LINGER_SECONDS = 1.0  # how long a run that only waits stays in memory
STEP_SHOWN_SECONDS = 0.05  # a step that takes longer is recorded as started; shorter ones cost no extra row
PREVIOUS_MESSAGES_MAX = 100_000  # what previous() can hold
INBOX_SIGNALS_MAX = 1_000  # signals of a run that are read at once
JOINED_BYTES_MAX = 16 << 10  # of text that is joined to one message; past it another row costs nothing worth saving

log = logging.getLogger("pgchan")


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row of sql.CLAIM: the run, and what this worker owns of it."""

    channel_id: int
    run: str
    journal_id: int
    workflow: str
    input: bytes
    number: int  # which claim of the run this is
    epoch: int
    speaks_from: int
    deadline: datetime | None
    head: int
    journal_head: int
    now: datetime  # the database's clock at the claim


@dataclass(eq=False, slots=True)
class StepContext:
    """One try of a step, while its function runs. In a context variable, so that publish() knows who speaks."""

    name: str
    number: int
    taken: list[Message] = field(default_factory=list)  # signals that it consumes
    earlier: list[Message] = field(default_factory=list)  # what earlier tries published and is not void
    keeps: bool = False  # previous() was called
    said: bool = False  # the reset, if one is needed, is written
    under_way: bool = False  # its function executes
    over: bool = False  # the try has ended; a thread that lags behind is told
    buffer: list[Entry] | None = None  # in a transaction: what is published with its commit
    passed: bool = False  # a transaction that is recorded: its block is left at the first use of the run
    joined: Entry | None = None  # text that may still grow: as long as it is held, or the last of the buffer
    interrupt: Callable[[Message], bool] | None = None


@dataclass(eq=False, slots=True)
class _Parked:
    until: float | None
    child: str | None


class Passed(BaseException):
    """Leaves the block of a transaction that is recorded. Never seen outside of it."""


current_step: contextvars.ContextVar[StepContext | None] = contextvars.ContextVar("pgchan_step", default=None)


class Attempt:
    """The state of one attempt. `end` stops it; `over` says why."""

    def __init__(self, db: AsyncpgDb, claimed: Claimed, workflow: Workflow[Any, Any], linger: float) -> None:
        self.db = db
        self.claimed = claimed
        self.workflow = workflow
        self.journal = Journal()
        self.over: str | None = None
        self.task: asyncio.Task[Any] | None = None
        self.on_end: list[Callable[[], Any]] = []
        self.draining = False  # the worker is about to stop: begin nothing more
        self.busy = 0  # operations under way that are not waits
        self.journal_name = f"pgchan:journal:{claimed.channel_id}"
        self.watch: Watch | None = None
        self.seen = 0  # last signal read
        self._writer: Writer = db.writer
        self._linger = linger
        self._clock = claimed.now.timestamp() - db.monotonic()  # the database's clock minus ours
        self._pending: deque[Message] = deque()
        self._signals: list[int] = []  # positions of all signals read that are not consumed
        self._receivers: deque[asyncio.Future[Message]] = deque()
        self._interruptible: list[StepContext] = []
        self._spoken: dict[str, int] = {}  # by step: the highest attempt whose output is not void
        self._begun: deque[tuple[float, StepContext]] = deque()  # steps that began, and when they have taken long
        self._parked: set[_Parked] = set()
        self._suspending: asyncio.Task[None] | None = None
        self._unsettled = 0
        self._settle_soon = self._settled_soon  # bound once: objects that live until the commit cost the collector
        self._settled = asyncio.Event()
        self._gate: asyncio.Event | None = None  # set while a transaction commits: nobody else writes
        self._deferred: list[Entry] = []  # what could not wait for the gate
        self._owes_values = False  # whether values of record_soon may be on their way
        self._held: Entry | None = None  # text that waits for what follows it …
        self._held_until: asyncio.TimerHandle | None = None  # … and until when
        self._leaving: asyncio.TimerHandle | None = None
        self._published = 0
        self._refused: errors.Error | None = None

    # -- loading

    async def load(self) -> None:
        """Read what the run has recorded, said and been sent. A fresh run has nothing, and costs no query."""
        c = self.claimed
        if c.journal_head:
            for row in await self.db.fetch_of(sql.JOURNALS, c.journal_id):
                self.journal.load(row[1:])
        if c.head >= c.speaks_from:
            for _, step, outputs, reset in await self.db.fetch_of(sql.SPOKEN, c.channel_id, c.speaks_from):
                tries = self.journal.tries(step)
                tries.last = max(tries.last, outputs or 0, reset or 0)
                if outputs is not None and outputs >= (reset or 0):
                    self._spoken[step] = outputs
        more = c.head > 0
        while more:
            rows = await self.db.fetch_of(sql.INBOX, c.channel_id, self.seen, INBOX_SIGNALS_MAX)
            self.take_in(rows)
            more = len(rows) == INBOX_SIGNALS_MAX
        self._writer.heads[c.channel_id] = c.head
        self._writer.heads[c.journal_id] = c.journal_head
        point("journal_loaded")

    # -- the end

    def end(self, why: str) -> None:
        """Stop this attempt: it writes no more, and its task is cancelled. The first reason counts."""
        if self.over is not None:
            return
        self.over = why
        self._let_go()  # refused if this attempt was superseded; else said as surely as what was not to be joined
        for callback in list(self.on_end):  # each removes itself
            callback()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def check(self) -> None:
        """Raise Fenced if this attempt has ended."""
        if self.over is not None:
            raise errors.fenced(self.claimed.run)

    async def still_ours(self) -> None:
        """Raise Fenced if this attempt has ended.

        In the workflow's own task the cancellation is raised again: code that catches every Exception and tries again
        would else never come to an end.
        """
        if self.over is not None and self.task is not None and self.task is asyncio.current_task():
            self.task.cancel()
            await asyncio.sleep(0)
        self.check()

    def forget(self) -> None:
        """Give back what the attempt occupies in the writer."""
        self._writer.heads.pop(self.claimed.channel_id, None)
        self._writer.heads.pop(self.claimed.journal_id, None)
        self._writer.refused.discard(self.claimed.journal_id)

    def reached(self) -> dict[int, int]:
        """How far this attempt has written or read its channels; a server that has less has lost something."""
        heads, c = self._writer.heads, self.claimed
        return {c.channel_id: max(heads.get(c.channel_id, 0), self.seen), c.journal_id: heads.get(c.journal_id, 0)}

    # -- writing

    def output(self, body: bytes, *, kind: int = MESSAGE, step: StepContext | None = None, **more: Any) -> Entry:
        """An entry for the run's channel."""
        c = self.claimed
        return Entry(
            c.run, body, channel_id=c.channel_id, kind=kind, step=step.name if step else None,
            attempt=step.number if step else None, fence=c.epoch, owner=c.journal_id, **more,
        )  # fmt: skip

    def note(
        self, body: bytes, *, kind: int = CONTROL, key: str | None = None, step: str | None = None,
        number: int | None = None,
    ) -> Entry:
        """An entry for the journal."""
        c = self.claimed
        return Entry(
            self.journal_name, body, channel_id=c.journal_id, kind=kind, key=key, step=step, attempt=number,
            fence=c.epoch, owner=c.journal_id,
        )  # fmt: skip

    async def write(self, *entries: Entry) -> list[Outcome]:
        """Write entries in one commit, durable when this returns. Ends the attempt, and raises, if one is refused."""
        await self._may_write()
        return await self._put(list(entries))

    async def _put(self, entries: list[Entry], queued: str | None = None) -> list[Outcome]:
        """Hand entries to the writer, and wait for what becomes of them. queued: the point that this is."""
        self._let_go()
        receipt = _Receipt(len(entries))
        if len(entries) == 1:
            self._writer.put(entries[0], receipt.settle_only)
        else:
            for index, entry in enumerate(entries):
                self._writer.put(entry, receipt.settle(index), more=index + 1 < len(entries))
        if queued is not None:
            point(queued)
        outcomes = await receipt.future
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._judge(entry, outcome)
        return outcomes  # type: ignore[return-value]  # errors were raised

    async def write_soon(self, entry: Entry) -> None:
        """Hand an entry to the writer; refusals show at the next write. Waits only for room."""
        await self._may_write()
        self._put_soon(entry)

    async def _may_write(self) -> None:
        while True:
            while self._gate is not None:
                await self._gate.wait()
            await self._writer.room()
            if self._gate is None:  # it may have been closed while there was no room
                break
        await self.still_ours()
        if self._refused is not None:
            raise self._refused

    def _put_soon(self, entry: Entry) -> None:
        self._let_go()
        self._unsettled += 1
        self._writer.put(entry, self._settle_soon)

    def _settled_soon(self, entry: Entry, outcome: Outcome | errors.Error) -> None:
        self._unsettled -= 1
        if not self._unsettled:
            self._settled.set()
        try:
            self._judge(entry, outcome)
        except errors.Error as error:
            self._refused = self._refused or error

    async def flushed(self) -> None:
        """Until everything handed to the writer, or held, is written. Raises what was refused."""
        self._let_go()
        while self._unsettled:
            self._settled.clear()
            await self._settled.wait()
        if self._refused is not None:
            raise self._refused

    # -- text that is joined

    def _hold(self, step: StepContext, entry: Entry, join: float) -> None:
        """Keep text back for so many seconds, to which what follows is joined."""
        self._let_go()
        self._held = step.joined = entry
        self._held_until = asyncio.get_running_loop().call_later(join, self._let_go)

    def _grows(self, step: StepContext, raw: bytes, join: float) -> bool:
        """Join text to the last message of this try, if that is text which can still grow; whether it is done.

        Both are JSON strings as codec.encode writes them, so what lies between their quotation marks is whole
        characters and whole escapes.
        """
        last = self._held
        if step.buffer is not None:
            last = step.buffer[-1] if step.buffer else None
        if last is None or last is not step.joined or len(last.body) + len(raw) - 2 > JOINED_BYTES_MAX:
            return False
        last.body = last.body[:-1] + raw[1:]
        if step.buffer is None and self._held_until is not None:
            loop = asyncio.get_running_loop()
            if (due := loop.time() + join) < self._held_until.when():
                self._held_until.cancel()
                self._held_until = loop.call_at(due, self._let_go)
        return True

    def _let_go(self) -> None:
        """Hand what is held to the writer."""
        held, self._held = self._held, None
        if held is not None:
            if self._held_until is not None:
                self._held_until.cancel()
                self._held_until = None
            self._put_soon(held)

    def _judge(self, entry: Entry, outcome: Outcome | errors.Error) -> None:
        if isinstance(outcome, errors.Error):
            # The database stayed away for longer than the patience: somebody may take over, from the journal.
            self.end("unavailable")
            raise outcome
        if outcome.word in STORED:
            return
        if outcome.word == "conflict" and entry.key is not None:
            return  # replayed: what was stored first stands
        self.end("fenced")
        raise refusal(entry, outcome)

    # -- steps: what a try has said, and how it ends

    async def begin(self, name: str) -> StepContext:
        """The next try of a step. The caller counts as busy already: the run must not leave memory from here on."""
        if self.draining:
            self.end("stopped")
            await asyncio.sleep(0)  # cancelled here
            self.check()
        if self._owes_values:  # the step may act on them, so they must be the same if it is executed again
            await self.flushed()
            self._owes_values = False
        tries = self.journal.tries(name)
        tries.last += 1
        step = StepContext(name, tries.last)
        if name in self._spoken:
            await self.flushed()
            rows = await self.db.fetch(
                sql.PREVIOUS, self.claimed.channel_id, self.claimed.speaks_from, name, step.number,
                PREVIOUS_MESSAGES_MAX,
            )
            step.earlier = [row_message(self.claimed.run, codec.JSON, row) for row in rows]
        return step

    def show_if_long(self, step: StepContext) -> None:
        """Record that a step is under way, for those who watch, if it is so for a moment. Not awaited: the record goes
        with what is written next. A timer for all steps of the run, for most of them are over by then."""
        loop = asyncio.get_running_loop()
        step.under_way = True
        self._begun.append((loop.time() + STEP_SHOWN_SECONDS, step))
        if len(self._begun) == 1:
            loop.call_later(STEP_SHOWN_SECONDS, self._show_begun)

    def _show_begun(self) -> None:
        loop = asyncio.get_running_loop()
        while self._begun:
            due, step = self._begun[0]
            if not step.under_way:
                self._begun.popleft()
            elif due > loop.time():
                loop.call_at(due, self._show_begun)
                return
            else:
                self._begun.popleft()
                if self.over is None and self._gate is None and not step.over:
                    self._put_soon(self.note(b'{"type":"started"}', step=step.name, number=step.number))

    def reset_entry(self, step: StepContext) -> Entry | None:
        """The control message that voids what earlier tries said, if there is anything to void; once per try."""
        if step.said:
            return None
        step.said = True
        if step.keeps or self._spoken.pop(step.name, None) is None:
            return None
        body = {"type": "reset", "step": step.name, "attempt": step.number, "from": self.claimed.speaks_from}
        return self.output(codec.encode(body), kind=CONTROL, step=step, void_from=self.claimed.speaks_from)

    async def publish(self, body: Any, wait: bool, join: float | None) -> Message | None:
        """See Run.publish."""
        if join is not None:
            join = names.check_join(join, body, wait)
        raw = codec.encode(body)
        step = current_step.get()
        if step is None:
            if join is not None:
                raise errors.InvalidInput(
                    "join is for text that a step publishes: outside of steps each message is recorded by the order of "
                    "the calls, and a replay could not cut the text up in the same way"
                )
            # Outside of steps nothing is recorded, so the message itself is: a replay publishes it under the same key.
            self._published += 1
            entry = self.output(raw, key=f"pgchan:said:{self.claimed.journal_id}:{self._published}")
        else:
            if step.passed:
                raise Passed
            if step.over:
                raise errors.fenced(self.claimed.run)
            if join is not None and self._grows(step, raw, join):
                return None
            reset = self.reset_entry(step)
            entry = self.output(raw, step=step)
            if step.buffer is not None:
                step.buffer += [reset, entry] if reset else [entry]
                step.joined = entry if join is not None else None
                return None
            if reset is not None:
                await self.write_soon(reset)
            self._spoken[step.name] = step.number
            if join is not None:
                await self._may_write()
                self._hold(step, entry, join)
                return None
        if not wait:
            await self.write_soon(entry)
            return None
        (outcome,) = await self.write(entry)
        point("output_published")
        return row_message(
            self.claimed.run, codec.JSON,
            (outcome.position, outcome.at, MESSAGE, None, entry.step, entry.attempt, None, raw),
        )  # fmt: skip

    def result_entries(self, step: StepContext, word: str, body: bytes) -> list[Entry]:
        """What is written when a try ends the step: a reset if it is owed, the signals it consumed, the record."""
        entries: list[Entry] = []
        if word == "result" and (reset := self.reset_entry(step)) is not None:
            entries.append(reset)
        entries += self.consumed_entries(step.taken, step)
        kind = MESSAGE if word == "result" else CONTROL
        entries.append(self.note(body, kind=kind, key=step.name, step=step.name, number=step.number))
        return entries

    def consumed_entries(self, signals: list[Message], step: StepContext) -> list[Entry]:
        """One control message for each signal; its key makes a second consumption impossible."""
        entries = []
        for signal in signals:
            if signal.position in self._signals:
                self._signals.remove(signal.position)
            # Everything below the first signal that is still open is consumed: later searches start there.
            inbox = min(signal.position, self._signals[0] - 1) if self._signals else signal.position
            body = codec.encode({"type": "consumed", "signal": signal.position, "step": step.name})
            entries.append(
                self.output(
                    body, kind=CONTROL, step=step, key=f"pgchan:consumed:{signal.position}", inbox=inbox
                )
            )  # fmt: skip
        return entries

    async def record(self, step: StepContext, word: str, body: bytes) -> None:
        """Record how a step ended, in one commit with its output and the signals it consumed."""
        point("effect_done")
        await self._may_write()
        # From here on nothing can come between these entries and the writer any more.
        entries = self.result_entries(step, word, body)
        step.taken = []  # on their way: whoever is cancelled from here on does not give them back
        outcomes = await self._put(entries, "checkpoint_queued")
        step.over = True
        value = body if word == "result" else codec.decode(body)
        at = outcomes[-1].at or datetime.now(UTC)
        self.journal.record(step.name, Recorded(word, value, at))
        point("checkpointed")

    def record_soon(self, name: str, body: bytes) -> None:
        """Record a value without waiting: what is recorded later carries it along, and no step begins before."""
        self._owes_values = True
        entry = self.note(body, kind=MESSAGE, key=name, step=name, number=1)
        if self._gate is None:
            self._put_soon(entry)
        else:
            self._deferred.append(entry)
        self.journal.record(name, Recorded("result", body, self.now()))

    async def record_failure(self, step: StepContext, error: BaseException, pause: float | None) -> None:
        """Record a failed try; pause None: it was the last. The signals that it took go back."""
        step.over = True
        self.give_back(step.taken)
        body = {"type": "failed", "error": describe_error(error), "final": pause is None, "pause": pause}
        entry = self.note(codec.encode(body), step=step.name, number=step.number)
        if pause is None:
            (outcome,) = await self.write(entry)
            self.journal.record(step.name, Recorded("failed", body, outcome.at or datetime.now(UTC)))
        else:
            await self.write_soon(entry)

    # -- signals

    def take_in(self, rows: list[Row]) -> None:
        """Rows of sql.INBOX for this run: who owns it, and signals that it has not seen."""
        for _, epoch, _head, _closed, position, at, key, body in rows:
            if epoch != self.claimed.epoch:
                self.end("fenced")
                return
            if position is not None and position > self.seen:
                self.seen = position
                insort(self._signals, position)
                row = (position, at, SIGNAL, key, None, None, None, body)
                self._pending.append(row_message(self.claimed.run, codec.JSON, row))
        self.offer()

    def offer(self) -> None:
        """Hand pending signals to those who want one."""
        if self._suspending is not None:
            return
        while self._pending:
            if self._receivers:
                receiver = self._receivers.popleft()
                if not receiver.done():
                    receiver.set_result(self._pending.popleft())
            elif self._interruptible:
                step = self._interruptible.pop(0)
                assert step.interrupt is not None
                if step.interrupt(self._pending[0]):
                    self._pending.popleft()
            else:
                return

    def give_back(self, signals: list[Message]) -> None:
        """Signals that were taken but not consumed are pending again, in order."""
        if signals:
            self._pending = deque(sorted([*self._pending, *signals], key=lambda signal: signal.position))
            self._signals = sorted({*self._signals, *(signal.position for signal in signals)})
            signals.clear()
            self.offer()

    def take_pending(self) -> Message | None:
        """The next signal, if one is there."""
        return self._pending.popleft() if self._pending else None

    def interruptible(self, step: StepContext, on: bool) -> None:
        """Whether a signal may interrupt this try."""
        if on:
            self._interruptible.append(step)
            self.offer()
        elif step in self._interruptible:
            self._interruptible.remove(step)

    async def next_signal(self, seconds: float | None, *, may_leave: bool) -> Message | None:
        """The next signal; None when the time is over. may_leave: the run may leave memory meanwhile."""
        if (signal := self.take_pending()) is not None:
            return signal
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._receivers.append(future)
        try:
            if may_leave:
                await self.park(future, seconds, None)
            else:
                await asyncio.wait({future}, timeout=seconds)
            return future.result() if future.done() else None
        except BaseException:
            if future.done() and not future.cancelled():
                self.give_back([future.result()])
            raise
        finally:
            if future in self._receivers:
                self._receivers.remove(future)

    # -- waiting, and leaving memory

    def seconds_until(self, at: datetime) -> float:
        """From now to a moment of the database's clock; negative if it has passed."""
        return at.timestamp() - (self.db.monotonic() + self._clock)

    def now(self) -> datetime:
        """The database's clock, as far as this process knows it."""
        return datetime.fromtimestamp(self.db.monotonic() + self._clock, UTC)

    async def park(self, future: asyncio.Future[Any], seconds: float | None, child: str | None) -> None:
        """Until the future is done or the time is over; meanwhile the attempt may end by leaving memory."""
        self.check()
        parked = _Parked(None if seconds is None else self.db.monotonic() + seconds, child)
        self._parked.add(parked)
        self._consider_leaving()
        try:
            await asyncio.wait({future}, timeout=None if seconds is None else max(0.0, seconds))
            while self._suspending is not None:  # it is being decided right now
                await asyncio.shield(self._suspending)
            self.check()
        finally:
            self._parked.discard(parked)

    def _consider_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self._leaving = asyncio.get_running_loop().call_later(self._linger, self._leave_if_idle)

    def _leave_if_idle(self) -> None:
        if self.over or not self._parked or self._suspending is not None:
            return
        if self.busy or self._unsettled or self._held is not None:
            self._consider_leaving()  # what is under way may be all that keeps it
            return
        timers = [parked.until for parked in self._parked if parked.until is not None]
        if timers and min(timers) - self.db.monotonic() < self._linger:
            return  # it goes on in a moment
        self._suspending = asyncio.create_task(self._leave(min(timers, default=None)))

    async def _leave(self, timer: float | None) -> None:
        wake_at = None if timer is None else self.now() + timedelta(seconds=timer - self.db.monotonic())
        children = [parked.child for parked in self._parked if parked.child is not None]
        c = self.claimed
        try:
            (word,) = await self.db.call(sql.SUSPEND, c.channel_id, c.epoch, wake_at, self.seen, children)
        except errors.Error as error:
            log.warning("run %s could not leave memory: %s", c.run, error)
            word = "ready"
            if isinstance(error, errors.Indefinite):
                self.end("unavailable")
        self._suspending = None
        if word == "waiting":
            self.end("suspended")
        elif word == "fenced":
            self.end("fenced")
        elif self.over is None:
            if self.watch is not None:
                self.watch.changed()
            self.offer()
            self._consider_leaving()

    # -- transactions

    async def close_gate(self) -> None:
        """Until nothing of this attempt is on its way; then nobody writes until open_gate."""
        while self._gate is not None:
            await self._gate.wait()
        self._gate = asyncio.Event()
        try:
            await self.flushed()
        except BaseException:
            self.open_gate()
            raise

    def open_gate(self) -> None:
        """Others may write again."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()
        deferred, self._deferred = self._deferred, []
        for entry in deferred:
            self._put_soon(entry)

    def committed(self, rows: list[Row]) -> None:
        """Take in what a transaction has written past the writer, rows of sql.APPEND_QUIETLY, and announce it: the
        channel and not the journal, which nobody can follow."""
        heads = self._writer.heads
        for row in rows:
            for channel_id, head in zip(row[0], row[1], strict=True):
                if channel_id in heads:
                    heads[channel_id] = max(head, heads[channel_id])
                if channel_id != self.claimed.journal_id:
                    self.db.announce([channel_id], [head], False, [])


class _Receipt:
    """One future for several entries."""

    __slots__ = ("_left", "_outcomes", "future")

    def __init__(self, count: int) -> None:
        self.future: asyncio.Future[list[Outcome | errors.Error]] = asyncio.get_running_loop().create_future()
        self._outcomes: list[Outcome | errors.Error | None] = [None] * count
        self._left = count

    def settle_only(self, _entry: Entry, outcome: Outcome | errors.Error) -> None:
        if not self.future.done():
            self.future.set_result([outcome])

    def settle(self, index: int) -> Settle:
        def settled(_entry: Entry, outcome: Outcome | errors.Error) -> None:
            self._outcomes[index] = outcome
            self._left -= 1
            if not self._left and not self.future.done():
                self.future.set_result(self._outcomes)  # type: ignore[arg-type]  # all are filled

        return settled
