"""Group commit: what waits to be written, what goes into the next batch, what became of each entry. No I/O.

How it works. A door has one connection for writing. Whatever has accumulated while a batch was on its way makes up
the next one, which is sent as soon as the last is acknowledged: no timers, and under load the batches grow by
themselves. A batch is one `call pgchan.write(…)`, or `write_messages` where it is what a publisher may write: atomic,
one commit, one round trip, however many channels it touches. A lone entry to a known channel goes by `write_entry` or
`write_message`, which take plain values: with nobody else at work most of the time would go into arrays.

Order is strictly that of arrival. Where an entry cannot go along (its channel is in the batch under another fence,
its key is there already, a limit is reached) the batch ends before it. So a step's output never overtakes, nor is
overtaken by, its result.

A channel that somebody's open transaction has locked must not delay the others. The routine waits LOCK_WAIT_MS for
it; then its entries come back, are set aside for a moment and tried again, now without waiting, while everything else
goes on.

A lost connection leaves one batch in doubt. It is all there or not at all, so one message that can be recognised
tells: entries of an owner (the current attempt of a run; nobody else writes messages with a step there) are looked
for behind the last position known, entries with a key are sent again and found, and only what has neither goes to its
caller as Indefinite.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pgchan import sql
from pgchan.db import Entry, Outcome, Row
from pgchan.errors import Error, Indefinite, SchemaMismatch, Unavailable
from pgchan.model import MESSAGE
from pgchan.names import PAGE_BYTES_MAX, PAGE_MESSAGES_MAX

BATCH_ENTRIES_MAX = PAGE_MESSAGES_MAX  # a batch takes milliseconds; more gains nothing [benchmarks/floors.py]
BATCH_BYTES_MAX = PAGE_BYTES_MAX
WAITING_BYTES_MAX = 16 << 20  # what may wait in memory; publishers wait for room past it
WAITING_ENTRIES_MAX = 50_000
LOCK_WAIT_MS = 50  # longer than any transaction of pgchan's own; a caller's may last for seconds
LOCK_RETRY_SECONDS = 0.05  # how long entries of a locked channel are set aside

NOTHING_ELSE = (None,) * 5  # of what only the attempt of a run says: fence, inbox, step, attempt, void_from
ONE_COLUMNS = 3  # of the answer to a call for one entry: outcome, position, at

Settle = Callable[["Entry", "Outcome | Error"], None]


@dataclass(slots=True, eq=False)
class Queued:
    """An entry, who is told what became of it, and until when it is tried."""

    entry: Entry
    settle: Settle | None
    deadline: float
    more: bool = False  # the next one must be in the same batch: a step's result and the signals that it consumed


@dataclass(slots=True, eq=False)
class _Group:
    slot: int
    entry: Entry  # the first: its channel, fence and owner are those of the group
    count: int = 0
    inbox: int | None = None
    keys: set[str] = field(default_factory=set)


class Batch:
    """Entries that go to the database in one call, grouped by channel."""

    def __init__(self, entries_max: int = BATCH_ENTRIES_MAX, bytes_max: int = BATCH_BYTES_MAX) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self.queued: list[Queued] = []
        self._groups: dict[str, _Group] = {}
        self._slots: list[int] = []
        self._nths: list[int] = []
        self._size = 0
        self.lock_wait = LOCK_WAIT_MS
        self.in_values = False  # whether a lone entry goes by the call that takes plain values, not arrays

    def add(self, queued: Queued) -> bool:
        """Take an entry along; False if this batch cannot. An empty one takes any."""
        if self.queued and not (self._has_room(1, len(queued.entry.body)) and self._fits(queued.entry)):
            return False
        self._add(queued)
        return True

    def add_together(self, together: list[Queued]) -> bool:
        """Take entries along that must not be parted; False if this batch cannot. An empty one takes any number."""
        if len(together) == 1:  # most go alone; what sums up several costs each of them
            return self.add(together[0])
        if self.queued:
            if not self._has_room(len(together), sum(len(queued.entry.body) for queued in together)):
                return False
            if not all(self._fits(queued.entry) for queued in together):
                return False
        for queued in together:
            self._add(queued)
        return True

    def _has_room(self, count: int, size: int) -> bool:
        return len(self.queued) + count <= self._entries_max and self._size + size <= self._bytes_max

    def _fits(self, entry: Entry) -> bool:
        group = self._groups.get(entry.name)
        return group is None or (
            group.entry.fence == entry.fence
            and group.entry.channel_id == entry.channel_id
            and group.entry.content_type == entry.content_type
            and (entry.key is None or entry.key not in group.keys)
        )

    def _add(self, queued: Queued) -> None:
        entry = queued.entry
        group = self._groups.get(entry.name)
        if group is None:
            group = self._groups[entry.name] = _Group(len(self._groups) + 1, entry)
        if entry.key is not None:
            group.keys.add(entry.key)
        if entry.inbox is not None:
            group.inbox = entry.inbox if group.inbox is None else max(group.inbox, entry.inbox)
        group.count += 1
        self._slots.append(group.slot)
        self._nths.append(group.count)
        self._size += len(entry.body)
        self.queued.append(queued)

    def may_go_singly(self, error: Error) -> bool:
        """Whether entries that the server has refused should be tried again, each in a batch of its own: what is wrong
        with one must not take the others along. A schema that was downgraded since has no call for one entry."""
        if isinstance(error, Unavailable | Indefinite):
            return False
        return len(self.queued) > 1 or (self.in_values and isinstance(error, SchemaMismatch))

    @property
    def holds_record(self) -> bool:
        """Whether it records a step: an entry with a key in a journal, the channel that is its own owner."""
        entries = [queued.entry for queued in self.queued]
        return any(e.key is not None and e.owner is not None and e.owner == e.channel_id for e in entries)

    def refused_for_now(self, outcomes: list[Outcome]) -> list[Queued]:
        """The entries whose channel was locked, and those that must go with them."""
        both = list(zip(self.queued, outcomes, strict=True))
        owners = {queued.entry.owner for queued, outcome in both if outcome.word == "locked"}
        if not owners:
            return []
        return [
            queued
            for queued, outcome in both
            if outcome.word == "locked" or (outcome.word == "blocked" and queued.entry.owner in owners)
        ]

    def arguments(self) -> tuple[list[Any] | None, ...]:
        """The 15 arrays of `pgchan.append`, null where they would say nothing: neither side has to spell them out."""
        groups = [group.entry for group in self._groups.values()]
        entries = [queued.entry for queued in self.queued]
        ids = [g.channel_id for g in groups]
        is_new = None in ids
        is_one = len(entries) == 1
        return (
            ids, [g.name for g in groups] if is_new else None, [g.content_type for g in groups] if is_new else None,
            _or_null([g.fence for g in groups]), _or_null([g.owner for g in groups]),
            None if is_one else [g.count for g in self._groups.values()],
            _or_null([g.inbox for g in self._groups.values()]),
            None if is_one else self._slots, None if is_one else self._nths, _or_null([e.kind for e in entries], 0),
            _or_null([e.key for e in entries]), _or_null([e.step for e in entries]),
            _or_null([e.attempt for e in entries]), _or_null([e.void_from for e in entries]), [e.body for e in entries],
        )  # fmt: skip

    def call(self, lock_wait: int) -> tuple[str, tuple[object, ...]]:
        """The call that writes this batch, in a transaction of its own, and its arguments."""
        if self.in_values and len(self.queued) == 1 and self.queued[0].entry.channel_id is not None:
            return _call_one(self.queued[0].entry, lock_wait)
        arguments = self.arguments()
        messages = _messages(arguments)
        if messages is None:
            return sql.WRITE, (*arguments, lock_wait)
        return sql.WRITE_MESSAGES, (*messages, lock_wait)

    def messages(self) -> tuple[list[Any] | None, ...]:
        """The 9 arrays of `pgchan.append_messages`, for a batch that holds nothing else."""
        found = _messages(self.arguments())
        assert found is not None, "an entry of a run's attempt needs the rights of a worker"
        return found

    def outcomes(self, row: Row) -> list[Outcome]:
        """One outcome per entry, from the row that the call or `pgchan.append` returned."""
        if len(row) == ONE_COLUMNS:
            word, position, at = row
            return [Outcome(word, self.queued[0].entry.channel_id, position, at)]
        channel_ids, _heads, bases, words, at, positions, ats = row[:7]
        if bases is None:  # the batch held a key that is stored: the answer is per entry
            return [
                Outcome(word, channel_ids[slot - 1], position, stored_at)
                for word, slot, position, stored_at in zip(words, self._slots, positions, ats, strict=True)
            ]
        return [
            Outcome(words[slot - 1], channel_ids[slot - 1], bases[slot - 1] + nth, at)
            if bases[slot - 1] is not None
            else Outcome(words[slot - 1], channel_ids[slot - 1], None, None)
            for slot, nth in zip(self._slots, self._nths, strict=True)
        ]

    def heads(self, row: Row) -> list[tuple[Entry, int, int]]:
        """The channels that were written by an owner: how many entries, and the head that each has now."""
        if len(row) == ONE_COLUMNS:
            entry = self.queued[0].entry
            return [(entry, 1, row[1])] if row[0] == "appended" and entry.owner is not None else []
        return [
            (group.entry, group.count, head)
            for group, head in zip(self._groups.values(), row[1], strict=True)
            if head is not None and group.entry.owner is not None
        ]

    def owned(self) -> list[tuple[Entry, list[int]]]:
        """The groups that have an owner: the channel, and the indices of its entries in this batch."""
        found: dict[str, tuple[Entry, list[int]]] = {}
        for index, queued in enumerate(self.queued):
            if queued.entry.owner is not None:
                found.setdefault(queued.entry.name, (queued.entry, []))[1].append(index)
        return list(found.values())


def _call_one(entry: Entry, lock_wait: int) -> tuple[str, tuple[object, ...]]:
    """The call that writes one entry to a channel that is known."""
    others = (entry.fence, entry.inbox, entry.step, entry.attempt, entry.void_from)
    if entry.kind == MESSAGE and others == NOTHING_ELSE:
        return sql.WRITE_MESSAGE, (entry.channel_id, entry.key, entry.body, lock_wait)
    return sql.WRITE_ENTRY, (
        entry.channel_id, entry.fence, entry.owner, entry.inbox, entry.kind, entry.key, entry.step, entry.attempt,
        entry.void_from, entry.body, lock_wait,
    )  # fmt: skip


def _messages(arguments: tuple[list[Any] | None, ...]) -> tuple[list[Any] | None, ...] | None:
    """Of the arrays of `pgchan.append`, those of `pgchan.append_messages`; None if others say something too."""
    ids, names, types, fences, owners, counts, inboxes, slots, nths, kinds, keys, *others, bodies = arguments
    if any(array is not None for array in (fences, inboxes, kinds, *others)):
        return None
    return ids, names, types, owners, counts, slots, nths, keys, bodies


class Waiting:
    """What has not been sent yet, in order of arrival."""

    def __init__(self) -> None:
        self._queued: deque[Queued] = deque()
        self._size = 0
        self._aside: dict[int | str, float] = {}  # owners and channels that found a lock, and until when they wait

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def is_full(self) -> bool:
        """Whether publishers should wait for room."""
        return self._size > WAITING_BYTES_MAX or len(self._queued) > WAITING_ENTRIES_MAX

    def put(self, queued: Queued) -> None:
        """Add an entry."""
        self._queued.append(queued)
        self._size += len(queued.entry.body)

    def put_back(self, queued: list[Queued]) -> None:
        """Return entries of a batch that was not written, to the front and in their order."""
        self._queued.extendleft(reversed(queued))
        self._size += sum(len(q.entry.body) for q in queued)

    def set_aside(self, queued: list[Queued], now: float) -> None:
        """Return entries that found their channel locked; they, and what follows them there, wait a moment."""
        self.put_back(queued)
        for one in queued:
            self._aside[_lane(one.entry)] = now + LOCK_RETRY_SECONDS

    def seconds_aside(self, now: float) -> float | None:
        """Until the next entry that was set aside may be tried; None if none was."""
        return max(0.0, min(self._aside.values()) - now) if self._aside else None

    def take(self, now: float = 0.0) -> Batch | None:
        """The next batch; None if nothing waits, or all that does is set aside."""
        batch = Batch()
        batch.in_values = True
        if not self._aside:
            while self._queued and batch.add_together(together := self._first()):
                self._remove(together)
            return batch if batch.queued else None
        due = {lane for lane, until in self._aside.items() if until <= now}
        left: deque[Queued] = deque()
        while self._queued:
            together = self._first()
            lane = _lane(together[0].entry)
            if lane in self._aside and lane not in due:
                left.extend(self._queued.popleft() for _ in together)
                continue
            if not batch.add_together(together):
                break
            self._remove(together)
            if lane in due:
                batch.lock_wait = 0
        self._queued.extendleft(reversed(left))
        for lane in due:
            del self._aside[lane]
        return batch if batch.queued else None

    def _first(self) -> list[Queued]:
        """The next entry, and those that must go with it."""
        together = []
        for queued in self._queued:
            together.append(queued)
            if not queued.more:
                break
        return together

    def _remove(self, together: list[Queued]) -> None:
        for _ in together:
            self._size -= len(self._queued.popleft().entry.body)

    def take_expired(self, now: float) -> list[Queued]:
        """Remove and return what should have been written by now, and with an owner's entry all that it has here: a
        result must not be written when output before it was given up."""
        owners = {q.entry.owner for q in self._queued if q.deadline <= now} - {None}
        expired = [q for q in self._queued if q.deadline <= now or q.entry.owner in owners]
        if expired:
            self._queued = deque(q for q in self._queued if q.deadline > now and q.entry.owner not in owners)
            self._size = sum(len(q.entry.body) for q in self._queued)
        return expired

    def take_all(self) -> list[Queued]:
        """Remove and return everything."""
        everything = list(self._queued)
        self._queued.clear()
        self._size = 0
        return everything


def _or_null(values: list[Any], nothing: Any = None) -> list[Any] | None:
    """The values, unless all of them are `nothing`."""
    for value in values:
        if value != nothing:
            return values
    return None


def _lane(entry: Entry) -> int | str:
    """What must stay in order: the entries of an owner, or of a channel that nobody owns."""
    return entry.name if entry.owner is None else entry.owner
