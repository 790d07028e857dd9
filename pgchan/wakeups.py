"""The listener's bookkeeping: who follows what, what is dirty, what is in memory. No I/O; a door pumps it.

How it works. A process has one LISTEN connection, whatever the number of its readers. A NOTIFY is a hint, "channel 17
has reached position 40"; it marks the channel dirty, and one statement then reads all dirty channels at once.
Messages that were read stay in a bounded buffer per followed channel, from which every reader of the process is
served: N readers cost one read. A reader that is not covered by the buffer reads pages of the table until it is.

Nothing depends on a hint. Once a second a sweep compares the heads of all followed channels, so a lost wakeup costs a
second. After a reconnect everything is dirty: LISTEN first, read then. A hint for a channel that nobody follows, or
for a head that is known, does nothing, so invented ones cost little.

A read starts at the last message that the process has, and compares it: if it is not the one that was read before,
the buffer is dropped and each reader finds out from the table what became of its own cursor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from pgchan import sql
from pgchan.channels import row_message
from pgchan.db import Row
from pgchan.model import Message, microseconds

BUCKETS = 16  # names that are listened to; as many as `wake` in schema.sql spreads over
LISTEN_NAMES = (*(f"pgchan_{bucket}" for bucket in range(BUCKETS)), "pgchan_new", "pgchan_queue")
SWEEP_SECONDS = 1.0  # what a lost wakeup costs at most
BUFFER_MESSAGES_MAX = 1_000  # per followed channel; with the bytes below it bounds a reader's memory
BUFFER_BYTES_MAX = 1 << 20
MOVED_MESSAGES_MAX = 500  # per channel and read
MOVED_BYTES_MAX = 1 << 20
CHANGES_MAX = 10_000  # channels of which the last change is remembered, to tell who looked before it that he missed it
EARLY_MAX = 10_000  # channels that are remembered while new followers are looked up; the sweep covers the rest
LOOKS_FREE = 10
LOOK_SECONDS = 0.1  # a claim is two statements, so that invented hints cause twenty a second
LOOK_PAUSE_SECONDS_MAX = 1.0  # what a lost wakeup costs; many who look share one pace
MOVED_FEW = 8  # of a single channel, without a bound on bytes: 8 MiB at most
_NO_CHANNEL = (None, None, None)
CHANGED = -1  # a hint's head: something else than messages has changed


class Pace:
    """Bounds what invented hints can cost those who look for themselves: so many looks in a row that find nothing are
    free (several workers hear of one run), then it is one each LOOK_SECONDS. A look that finds something forgives all.
    """

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = 0.0

    def looked(self, found: bool, now: float) -> None:
        """Take in what a look has found."""
        free = LOOKS_FREE * LOOK_SECONDS
        self._due = 0.0 if found else min(max(self._due, now) + LOOK_SECONDS, now + free + LOOK_PAUSE_SECONDS_MAX)

    def pause(self, now: float) -> float:
        """Seconds to wait before the next look."""
        return max(0.0, self._due - now - LOOKS_FREE * LOOK_SECONDS)


@dataclass(eq=False, slots=True)
class Followed:
    """A channel that somebody in this process follows.

    id: None until the channel exists. head, head_us: the last message read and its time, 0 if that is not known; base,
    base_us: where the buffer begins (its first message is base + 1). version: counts what happened, so that a reader
    can wait for more. hinted: the highest head that was announced; a hint, and no more.
    """

    name: str
    id: int | None = None
    content_type: str = "application/json"
    head: int = 0
    head_us: int = 0
    base: int = 0
    base_us: int = 0
    size: int = 0
    is_closed: bool = False
    followers: int = 0
    version: int = 0
    hinted: int = 0
    buffer: deque[Message] = field(default_factory=deque)

    def recent(self, after: int, after_us: int | None) -> list[Message] | None:
        """The messages behind a position, from memory; None if memory cannot tell (read the table)."""
        if not self.base <= after <= self.head or (self.id is None and after > 0):
            return None
        if after == self.head:
            return [] if after_us is None or after_us == self.head_us else None
        if after_us is not None:
            own_us = self.base_us if after == self.base else microseconds(self.buffer[after - self.base - 1].at)
            if own_us != after_us:
                return None
        newest = list(islice(reversed(self.buffer), self.head - after))  # mostly few, behind many that all have read
        newest.reverse()
        return newest

    def stand_at(self, head: int, head_us: int) -> None:
        """Forget the buffer and go on from this message."""
        self.head = self.base = head
        self.head_us = self.base_us = head_us
        self.buffer.clear()
        self.size = 0

    def extend(self, messages: list[Message]) -> None:
        """Take what was read, and drop the oldest past the bounds."""
        self.buffer.extend(messages)
        self.size += sum(len(message.raw) for message in messages)
        self.head = messages[-1].position
        self.head_us = microseconds(messages[-1].at)
        while len(self.buffer) > BUFFER_MESSAGES_MAX or (self.size > BUFFER_BYTES_MAX and len(self.buffer) > 1):
            gone = self.buffer.popleft()
            self.size -= len(gone.raw)
            self.base = gone.position
            self.base_us = microseconds(gone.at)


@dataclass(eq=False, slots=True)
class Watch:
    """Somebody who is told that a channel moved and looks for himself: a worker's run, or who waits for a run's end.

    known: hints up to this head are no news.
    """

    id: int
    known: int
    changed: Callable[[], None]


class Hub:
    """What a process follows. `announce` is called with each Followed whose state has changed."""

    def __init__(self, announce: Callable[[Followed], None]) -> None:
        self._announce = announce
        self._by_name: dict[str, Followed] = {}
        self._by_id: dict[int, Followed] = {}
        self._watches: dict[int, list[Watch]] = {}
        self._dirty: dict[int, Followed] = {}
        self._queues: dict[int, list[Callable[[], None]]] = {}
        self.look_up = False  # whether names without a channel should be looked up
        self._look_up_hinted = False  # whether a hint, not a sweep, asks for that
        self._looking = 0  # new followers whose channel is being looked up
        self._early: set[int] = set()  # channels that were heard of meanwhile, and not known yet
        self.mark = 0  # counts what was heard of changes, so that who looks can tell what came after
        self._changes: dict[int, int] = {}  # channels that have changed, and the mark of that, the latest last
        self._forgotten = 0  # up to this mark no more is known
        self._reading: dict[int, Followed] = {}  # what the read that is under way was asked for
        self._behind = False  # the last read left something over
        self.fruitless = 0  # reads in a row that found nothing: hints that were invented, or late

    # -- who is interested

    def follow(self, name: str) -> tuple[Followed, bool]:
        """Count one more follower of a channel; True if it must be looked up first."""
        followed = self._by_name.get(name)
        fresh = followed is None
        if followed is None:
            followed = self._by_name[name] = Followed(name)
            self._looking += 1
        followed.followers += 1
        return followed, fresh

    def unfollow(self, followed: Followed) -> None:
        """Count one follower less; the last one takes the buffer along."""
        followed.followers -= 1
        if followed.followers <= 0 and self._by_name.get(followed.name) is followed:
            del self._by_name[followed.name]
            if followed.id is not None:
                self._by_id.pop(followed.id, None)
                self._dirty.pop(followed.id, None)

    def watch(self, watch: Watch) -> None:
        """Tell this watcher of news on its channel."""
        self._watches.setdefault(watch.id, []).append(watch)

    def unwatch(self, watch: Watch) -> None:
        """Tell it no more."""
        watches = self._watches.get(watch.id, [])
        if watch in watches:
            watches.remove(watch)
            if not watches:
                del self._watches[watch.id]

    def has_changed(self, channel_id: int, mark: int) -> bool:
        """Whether a channel may have ended, or changed otherwise than by messages, since that mark."""
        return self._forgotten > mark or self._changes.get(channel_id, 0) > mark

    def on_queue(self, number: int, callback: Callable[[], None]) -> None:
        """Call back when a queue, by its hash, has work."""
        self._queues.setdefault(number, []).append(callback)

    def off_queue(self, number: int, callback: Callable[[], None]) -> None:
        """Call back no more."""
        callbacks = self._queues.get(number, [])
        if callback in callbacks:
            callbacks.remove(callback)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is interested in anything."""
        return not self._by_name and not self._watches

    # -- what is heard

    def heard(self, name: str, payload: str) -> bool:
        """Take in a NOTIFY; True if there is something to read now. Whatever is not a hint of ours is passed over."""
        if name == "pgchan_queue":
            for callback in self._queues.get(_number(payload), ()):
                callback()
            return False
        if name == "pgchan_new":
            self.look_up = self.look_up or any(followed.id is None for followed in self._by_name.values())
            self._look_up_hinted = self.look_up
            return self.look_up
        for hint in payload.split(","):
            channel, _, head = hint.partition(":")
            self._moved(_number(channel), _number(head))
        return bool(self._dirty)

    def _moved(self, channel_id: int, head: int) -> None:
        for watch in tuple(self._watches.get(channel_id, ())):
            if head > watch.known or head == CHANGED:
                watch.changed()
        if head == CHANGED:
            self._note_change(channel_id)
        followed = self._by_id.get(channel_id)
        if followed is None:
            if self._looking and len(self._early) < EARLY_MAX:
                self._early.add(channel_id)
        elif head > followed.head or head == CHANGED:
            followed.hinted = max(head, followed.hinted)
            self._dirty[channel_id] = followed

    def _note_change(self, channel_id: int) -> None:
        self.mark += 1
        self._changes.pop(channel_id, None)
        self._changes[channel_id] = self.mark
        if len(self._changes) > CHANGES_MAX:
            self._forgotten = self._changes.pop(next(iter(self._changes)))

    def everything_moved(self) -> None:
        """After a reconnect: whatever was announced meanwhile was missed."""
        self.mark += 1
        self._forgotten = self.mark
        self._changes.clear()
        self._dirty = dict(self._by_id)
        self.look_up = True
        for watch in [watch for watches in self._watches.values() for watch in watches]:
            watch.changed()
        for callback in [callback for callbacks in self._queues.values() for callback in callbacks]:
            callback()

    # -- what is read

    def unknown_names(self) -> list[str]:
        """Followed names that had no channel when last looked up."""
        self.look_up = False
        return [followed.name for followed in self._by_name.values() if followed.id is None]

    def looked_up(self, rows: Iterable[Row], *, fresh: bool = False) -> bool:
        """Take in rows of sql.FOLLOW; True if there is something to read now.

        fresh: the answer for a new follower, which stands nowhere yet, so the buffer starts at the head. What was heard
        of its channel between the question and this answer may be newer, so it is read at once.
        """
        found = fresh
        for name, channel_id, head, head_at, closed, content_type in rows:
            followed = self._by_name.get(name)
            if followed is None or followed.id is not None:
                continue
            found = True
            followed.id, followed.content_type, followed.is_closed = channel_id, content_type, closed
            self._by_id[channel_id] = followed
            if fresh:
                followed.stand_at(head, microseconds(head_at) if head_at is not None else 0)
                if channel_id in self._early:
                    self._dirty[channel_id] = followed
            else:
                followed.stand_at(0, 0)  # it was waited for: all of it is news
                self._dirty[channel_id] = followed
            self._tell(followed)
        if fresh:
            self._looking -= 1
            if not self._looking:
                self._early.clear()
        if found:
            self.fruitless = 0
        elif self._look_up_hinted:
            self.fruitless += 1
        self._look_up_hinted = False
        return bool(self._dirty)

    def next_read(self) -> tuple[str, tuple[object, ...]] | None:
        """The statement that reads what is dirty, and its arguments; clean from here on. None: nothing is.

        A single channel that was announced with a few messages is read in a plain way that costs half and reads no more
        than so many, because nothing bounds their bytes. If there are more, the next read has all bounds.
        """
        dirty, self._dirty = self._dirty, {}
        if not dirty:
            return None
        self._reading = dirty
        ids, heads = list(dirty), [followed.head for followed in dirty.values()]
        if len(dirty) == 1 and not self._behind and 0 < dirty[ids[0]].hinted - heads[0] <= MOVED_FEW:
            return sql.READ_ONE, (ids[0], heads[0], MOVED_FEW)
        return sql.READ_MOVED, (ids, heads, MOVED_MESSAGES_MAX, MOVED_BYTES_MAX)

    def read(self, rows: Iterable[Row]) -> None:
        """Take in what the statement returned, in order of channel and position."""
        found = False
        by_channel: dict[int, list[Row]] = {id: [] for id in self._reading}
        for row in rows:
            by_channel.setdefault(row[0], []).append(row)
        for channel_id, group in by_channel.items():
            followed = self._by_id.get(channel_id)
            if followed is None or followed is not self._reading.get(channel_id):
                continue  # nobody follows it any more; or others do since, who were looked up later than this was read
            found = self._read_one(followed, group or [_NO_CHANNEL]) or found
        self.fruitless = 0 if found else self.fruitless + 1
        self._behind = bool(self._dirty)

    def _read_one(self, followed: Followed, group: list[Row]) -> bool:
        _, head, closed = group[0][:3]
        if head is None:
            self._gone(followed)
            return True
        rows = [row for row in group if row[3] is not None]
        own_us = None  # of the message read last, which is there to be compared
        if rows and rows[0][3] == followed.head:
            own_us = microseconds(rows.pop(0)[4])
            followed.head_us = followed.head_us or own_us
        messages = [row_message(followed.name, followed.content_type, row[3:]) for row in rows]
        if head < followed.head or (own_us is not None and own_us != followed.head_us):
            # What was read before is not what is there now. Readers find the truth in the table.
            if messages:
                followed.stand_at(messages[-1].position, microseconds(messages[-1].at))
            else:
                followed.stand_at(min(head, followed.head), own_us or 0)
        elif messages and messages[0].position == followed.head + 1:
            followed.extend(messages)
        elif messages:  # trimmed past what we had
            followed.stand_at(messages[0].position - 1, 0)
            followed.extend(messages)
        news = bool(messages) or closed != followed.is_closed
        if followed.head < head:
            assert followed.id is not None
            self._dirty[followed.id] = followed
            if not messages:
                followed.stand_at(head, 0)
        else:
            followed.is_closed = closed
        self._tell(followed)
        return news

    def swept(self, rows: Iterable[Row]) -> None:
        """Take in rows of sql.SWEEP: mark what has moved without a word."""
        for channel_id, head, closed, _epoch in rows:
            followed = self._by_id.get(channel_id)
            if followed is not None:
                if head is None:
                    self._gone(followed)
                elif head != followed.head or closed != followed.is_closed:
                    self._dirty[channel_id] = followed
            for watch in tuple(self._watches.get(channel_id, ())):
                if head is None or head > watch.known or closed:
                    watch.changed()

    def swept_ids(self) -> list[int]:
        """The channels that a sweep compares."""
        return list(self._by_id.keys() | self._watches.keys())

    def _gone(self, followed: Followed) -> None:
        # Deleted. Readers that had read something learn it from the table, the others wait for the name to come back.
        assert followed.id is not None
        self._by_id.pop(followed.id, None)
        followed.id = None
        followed.hinted = 0
        followed.is_closed = False
        followed.stand_at(0, 0)
        self.look_up = True
        self._tell(followed)

    def _tell(self, followed: Followed) -> None:
        followed.version += 1
        self._announce(followed)


def _number(text: str) -> int:
    """A number of a hint; one that matches nothing where it is not a number."""
    try:
        return int(text)
    except ValueError:
        return -2
