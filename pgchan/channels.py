"""Channels: publish, read, tail, close, trim; what a cursor proves and what a reader is told when it cannot continue.

A reader passes `after`: a bare position, a cursor (position plus the time of the message there), or "now". Each page
is read from the reader's own row on, and that row is compared with the cursor in the same statement. So a reader
continues exactly, or raises Trimmed or HistoryLost; it is never handed wrong data, whatever crash, failover, restore,
delete or trim lies between two pages.

Coroutines over `Db`; see db.py. Long, because pages and tails rest on the same check of a cursor.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any

from pgchan import callers, codec, errors, names, sql
from pgchan.db import LOCKED, STORED, Db, Entry, Follow, Known, Outcome, Row
from pgchan.model import CONTROL, KINDS, MESSAGE, ChannelInfo, Message, Page, microseconds
from pgchan.writer import Batch, Queued

TAIL_PAGE_MESSAGES = 500  # per read of a reader that is catching up
TAIL_PAGE_BYTES = 128 << 10  # … and of their bodies: an event stream whose client takes nothing holds five times that
COMPACTED_MESSAGES_MAX = 250_000  # as compact_channel says: more would be too much for one transaction
CALLERS_BYTES_MAX = 64 << 20  # of a publish_many in a caller's transaction, which is one statement
WAIT_SECONDS = 60.0  # a waiting reader looks up at least this often; the hub's sweep tells it of anything sooner


# ------------------------------------------------------------------------------------------------ publish


async def publish(db: Db, name: str, body: Any, *, key: str | None = None) -> Message:
    """Append one message; see Channel.publish."""
    names.check_key(key)
    entry = await prepare(db, name, body, key=key)
    outcome = await db.append(entry)
    if outcome.word == "missing":  # deleted since its id was learned: the name begins anew, whatever its type was
        db.learn(name, None)
        entry = await prepare(db, name, body, key=key)
        outcome = await db.append(entry)
    if outcome.word == "type":
        db.learn(name, None)
        entry = await prepare(db, name, body, key=key, look=True)
        outcome = await db.append(entry)
    return stored_message(entry, outcome)


async def prepare(db: Db, name: str, body: Any, *, key: str | None = None, look: bool = False) -> Entry:
    """The entry for a body, encoded for the channel's type. A channel that is not known yet is taken to hold JSON; the
    routine that appends says if it does not. `look`: ask first."""
    known = db.known(name)
    if known is None and (look or isinstance(body, bytes | bytearray | memoryview)):
        known = await _look_up(db, name)
    content_type = known.content_type if known else codec.JSON
    return Entry(
        name, codec.encode_as(content_type, body), key=key, content_type=content_type,
        channel_id=known.id if known else None,
    )  # fmt: skip


async def prepare_deferred(db: Db, name: str, body: Any, key: str | None) -> Entry:
    """The entry for a body that is written later: by name, for the channel may be another one by then."""
    names.check_key(key)
    entry = await prepare(db, name, body, key=key, look=True)
    entry.channel_id = None
    return entry


async def _look_up(db: Db, name: str) -> Known | None:
    rows = await db.fetch(sql.CHANNEL_ID, name)
    known = Known(rows[0][0], rows[0][1]) if rows else None
    db.learn(name, known)
    return known


async def publish_many(
    db: Db, name: str, bodies: Sequence[Any], keys: Sequence[str | None], connection: Any = None
) -> list[Message]:
    """Append several bodies, all or nothing; see Channel.publish_many."""
    look = False
    while True:
        entries = [
            await prepare(db, name, body, key=key, look=look) for body, key in zip(bodies, keys, strict=True)
        ]  # fmt: skip
        for entry in entries:
            entry.owner = 0  # one owner: what `pgchan.append` writes together or not at all
            if look and connection is not None:
                entry.channel_id = None  # in an old snapshot only the name tells a new channel from one that is gone
        if connection is None:
            outcomes = await db.append_together(in_batches(entries))
        elif not entries:
            outcomes = []
        else:  # one call, however large: what one statement stores the caller cannot commit in part
            batch = Batch(entries_max=len(entries), bytes_max=CALLERS_BYTES_MAX)
            if not all(batch.add(Queued(entry, None, 0.0)) for entry in entries):
                raise errors.InvalidInput(f"a batch in a transaction may have at most {CALLERS_BYTES_MAX} bytes")
            outcomes = batch.outcomes(await callers.append(connection, batch, db.announce))
        refused = [
            (entry, outcome)
            for entry, outcome in zip(entries, outcomes, strict=True)
            if outcome.word not in STORED and outcome.word != "blocked"
        ]
        if not look and any(outcome.word in ("missing", "type") for _, outcome in refused):
            db.learn(name, None)  # what was remembered of the channel is out of date: look, and try once more
            look = True
            continue
        if refused:
            raise refusal(*refused[0])
        return [stored_message(entry, outcome) for entry, outcome in zip(entries, outcomes, strict=True)]


def in_batches(entries: Sequence[Entry]) -> list[Batch]:
    """Entries in as many batches as the limits of one ask for."""
    batches: list[Batch] = []
    for entry in entries:
        queued = Queued(entry, None, 0.0)
        if not batches or not batches[-1].add(queued):
            batches.append(Batch())
            batches[-1].add(queued)
    return batches


def stored_message(entry: Entry, outcome: Outcome) -> Message:
    """The message that an entry became; the error of the tree if it was refused."""
    if outcome.word not in STORED:
        raise refusal(entry, outcome)
    assert outcome.position is not None and outcome.at is not None
    return Message(
        entry.name, outcome.position, outcome.at.astimezone(UTC), KINDS[entry.kind], entry.body, public_key(entry.key),
        entry.step, entry.attempt, entry.content_type, entry.void_from,
    )  # fmt: skip


def refusal(entry: Entry, outcome: Outcome) -> errors.Error:
    """Why `pgchan.append` did not store an entry."""
    match outcome.word:
        case "closed":
            return errors.channel_closed(entry.name)
        case "missing":
            return errors.channel_not_found(entry.name)
        case "fenced" | "blocked":
            return errors.fenced(entry.name)
        case "conflict":
            return errors.idempotency_conflict(entry.name, entry.key or "", outcome.position or 0)
        case "locked":
            return errors.Unavailable(f"{LOCKED} ({entry.name!r})")
    return errors.InvalidInput(f"channel {entry.name!r} has another content type than {entry.content_type!r}")


def check_batch(bodies: Sequence[Any], keys: Sequence[str | None] | None) -> list[str | None]:
    """The keys of a batch, one per body, each legal and none twice."""
    for what, given in (("bodies", bodies), ("keys", keys if keys is not None else ())):
        # A str is a sequence too, but nobody means its characters.
        if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray | memoryview):
            raise errors.InvalidInput(f"{what} must be a sequence, such as a list, not {type(given).__name__}")
    if keys is None:
        return [None] * len(bodies)
    if len(keys) != len(bodies):
        raise errors.InvalidInput(f"keys must be one per body: {len(keys)} keys, {len(bodies)} bodies")
    checked = [names.check_key(key) for key in keys]
    named = [key for key in checked if key is not None]
    if len(set(named)) != len(named):
        raise errors.InvalidInput("keys of one batch must differ from each other")
    return checked


# ------------------------------------------------------------------------------------------------ read


async def page(
    db: Db, name: str, *, after: int | str = 0, limit: int = 100, view: str = "final", size: int = names.PAGE_BYTES_MAX
) -> Page:
    """One page; see Channel.page. size: bytes of bodies at most, but for a single message that is larger."""
    names.check_limit(limit)
    statement = sql.PAGE_FINAL if names.check_view(view) == "final" else sql.PAGE_RAW
    start = names.parse_after(after)
    position, check = start if start is not None else (names.POSITION_MAX, None)
    rows = await db.fetch(statement, name, position, limit, size)
    if not rows:
        if start is not None and position > 0:
            raise _lost(name, 1, 0, 0)
        return Page([], names.format_cursor(0, 0), 0, closed=False)
    _, head, trimmed, closed, content_type, end, end_at, total = rows[0][:8]
    if start is not None:
        found = [row_message(name, content_type, row[8:]) for row in rows if row[8] is not None]
        own = found.pop(0) if found and found[0].position == position else None
        verify(name, position, check, own, head, trimmed)
    else:
        found, total = [], None
    if total is not None and total > len(rows):
        cursor = found[-1].cursor  # the bound on bytes came first
    elif end is not None:
        cursor = names.format_cursor(end, microseconds(end_at))  # all up to there was considered, also what is void
    else:
        cursor = names.format_cursor(trimmed, 0)  # nothing is kept
    return Page(found, cursor, head, closed)


async def read(db: Db, name: str, *, after: int | str = 0, limit: int = 100, view: str = "final") -> list[Message]:
    """Messages; see Channel.read. More than one page where void output lies between them."""
    names.check_limit(limit)
    found: list[Message] = []
    while True:
        part = await page(db, name, after=after, limit=limit - len(found), view=view)
        found += part.messages
        if len(found) >= limit or int(part.cursor[:16]) >= part.head:
            return found
        after = part.cursor


def verify(name: str, position: int, check: int | None, own: Message | None, head: int, trimmed: int) -> None:
    """Raise unless a reader that stands at this position can go on exactly.

    check: the time in its cursor, None for a bare position. own: the message now at that position, None if none is.
    """
    if position == 0 and (check is None or check == 0):
        return  # from what is kept
    if position < trimmed:
        raise errors.Trimmed(
            f"messages of channel {name!r} up to position {trimmed} were removed, the reader stands at {position}; "
            f"go on from .cursor",
            channel=name, first=trimmed + 1, last=head, cursor=names.format_cursor(trimmed, 0),
        )  # fmt: skip
    if position == trimmed:
        return  # nothing was lost; the row that could be compared is gone
    if position > head or (check is not None and (own is None or microseconds(own.at) != check)):
        raise _lost(name, trimmed + 1, head, trimmed)


def _lost(name: str, first: int, last: int, trimmed: int) -> errors.HistoryLost:
    return errors.HistoryLost(
        f"channel {name!r} no longer holds the message at this cursor (kept: {first} to {last}); "
        f"discard what was read and go on from .cursor",
        channel=name, first=first, last=last, cursor=names.format_cursor(trimmed, 0),
    )  # fmt: skip


def row_message(name: str, content_type: str, row: Row) -> Message:
    """A message from the columns position, at, kind, key, step, attempt, void_from, body."""
    position, at, kind, key, step, attempt, void_from, body = row
    at = at if at.tzinfo is UTC else at.astimezone(UTC)
    return Message(
        name, position, at, KINDS[kind], bytes(body), public_key(key), step, attempt, content_type, void_from
    )


def public_key(key: str | None) -> str | None:
    """The key that a reader is shown: keys that pgchan makes for itself are its own affair."""
    return None if key is None or key.startswith(names.RESERVED_PREFIX) else key


class Tail:
    """A reader that goes on: pages of what is there, then what comes, until the channel is closed and all was read.

    An endless reader is this one coroutine called again and again, which both doors can drive.
    """

    def __init__(self, db: Db, name: str, *, after: int | str = 0, view: str = "final") -> None:
        self._db = db
        self._name = name
        self._view = names.check_view(view)
        start = names.parse_after(after)
        self._position, self._check = start if start is not None else (-1, None)  # -1: "now" is not decided yet
        self._follow: Follow | None = None

    @property
    def cursor(self) -> str | None:
        """Where this reader stands, as a token that can be verified; None while it has only a bare position."""
        return None if self._check is None else names.format_cursor(self._position, self._check)

    async def next(self, wait: float = WAIT_SECONDS) -> list[Message] | None:
        """What comes next, never an empty page unless `wait` seconds are over; None at the channel's end.

        Raises HistoryLost and Trimmed.
        """
        names.check_seconds(wait, "wait")
        if self._follow is None:
            # Follow first, read then: what is published in between is announced to us already.
            self._follow = await self._db.follow(self._name)
            if self._position < 0:
                page_ = await page(self._db, self._name, after="now")
                self._stand_at(page_)
        until = self._db.monotonic() + wait
        while True:
            found = self._follow.recent(self._position, self._check)
            if found is None:
                try:
                    page_ = await page(
                        self._db, self._name, after=self.cursor or self._position, limit=TAIL_PAGE_MESSAGES,
                        view=self._view, size=TAIL_PAGE_BYTES,
                    )  # fmt: skip
                except errors.Unavailable:  # a tail that has begun outlasts any outage
                    if self._db.monotonic() >= until:
                        return []
                    continue
                self._stand_at(page_)
                if page_.messages:
                    return page_.messages
                if page_.closed and self._position == page_.head:
                    return None
                if self._follow.recent(self._position, self._check) is None:  # the hub is behind, or this reader lost
                    await self._db.wait(self._follow, self._position, min(1.0, max(0.0, until - self._db.monotonic())))
            elif found:
                self._position, self._check = found[-1].position, microseconds(found[-1].at)
                return without_void(found) if self._view == "final" else found
            elif self._follow.is_closed:
                return None
            else:
                await self._db.wait(self._follow, self._position, max(0.0, until - self._db.monotonic()))
            if self._db.monotonic() >= until:
                return []

    def _stand_at(self, page: Page) -> None:
        start = names.parse_after(page.cursor)
        assert start is not None
        self._position, self._check = start

    def unfollow(self) -> None:
        """Stop hearing of the channel."""
        if self._follow is not None:
            self._follow.unfollow()
            self._follow = None


# ------------------------------------------------------------------------------------------------ the rest


async def info(db: Db, name: str) -> ChannelInfo:
    """The channel's state; see Channel.info."""
    rows = await db.fetch(sql.CHANNEL_INFO, name)
    if not rows:
        raise errors.channel_not_found(name)
    return ChannelInfo(*rows[0])


async def create(db: Db, name: str, content_type: str, ttl: float | None) -> None:
    """Create the channel; see Channel.create."""
    names.check_content_type(content_type)
    ttl = names.check_optional_seconds(ttl, "ttl", 0.001)
    found = await db.call(sql.CREATE_CHANNEL, name, content_type, ttl)
    if found[0] != content_type:
        raise errors.InvalidInput(f"channel {name!r} exists with content type {found[0]!r}, not {content_type!r}")


async def close(db: Db, name: str) -> None:
    """Let the channel take no more messages; see Channel.close."""
    found = await db.call(sql.CLOSE_CHANNEL, name)
    if found[0] is None:
        raise errors.channel_not_found(name)
    if not found[0]:
        raise errors.InvalidInput(f"channel {name!r} belongs to a run that has not ended; cancel the run instead")


async def trim(db: Db, name: str, before: int) -> None:
    """Remove the messages before a position; see Channel.trim."""
    names.check_integer(before, "before", 0, names.POSITION_MAX)
    while True:
        found = await db.call(sql.TRIM_CHANNEL, name, before)
        if found[0] is None:
            raise errors.channel_not_found(name)
        if found[0] >= before - 1:
            return


async def compact(db: Db, name: str) -> int:
    """Rewrite the closed channel as its final text; see Channel.compact."""
    outcome, removed = await db.call(sql.COMPACT_CHANNEL, name)
    match outcome:
        case "missing":
            raise errors.channel_not_found(name)
        case "open":
            raise errors.InvalidInput(f"channel {name!r} is open; close it first, or wait until its run has ended")
        case "failed":
            raise errors.InvalidInput(f"channel {name!r} is that of a failed run, which may be resumed")
        case "type":
            raise errors.InvalidInput(f"channel {name!r} does not hold JSON, so it has no text to join")
        case "long":
            raise errors.InvalidInput(f"channel {name!r} holds over {COMPACTED_MESSAGES_MAX:,} messages; trim it first")
    return int(removed)


async def set_retention(db: Db, name: str, messages: int | None, seconds: float | None) -> None:
    """Bound what the channel keeps; see Channel.set_retention."""
    checked = None if messages is None else names.check_integer(messages, "messages", 1, names.POSITION_MAX)
    seconds = names.check_optional_seconds(seconds, "seconds")
    if not (await db.call(sql.SET_CHANNEL_RETENTION, name, checked, seconds))[0]:
        raise errors.channel_not_found(name)


async def delete(db: Db, name: str, *, run: bool = False) -> None:
    """Delete the channel, and the run it belongs to; see Channel.delete and RunHandle.delete."""
    found = await db.call(sql.DELETE_CHANNEL, name)
    db.learn(name, None)
    if found[0] == "missing":
        raise errors.run_not_found(name) if run else errors.channel_not_found(name)
    if found[0] == "running":
        raise errors.InvalidInput(f"run {name!r} has not ended; cancel it before it is deleted")


async def listing(db: Db, *, after: str = "", prefix: str = "", limit: int = 100) -> list[ChannelInfo]:
    """Channels in order of name; see AsyncClient.channels."""
    names.check_limit(limit)
    names.check_beginning(prefix, "prefix")
    names.check_beginning(after, "after")
    return [ChannelInfo(*row) for row in await db.fetch(sql.CHANNELS, after, prefix, limit)]


def without_void(messages: list[Message]) -> list[Message]:
    """What the view `final` has of messages that reach to the head, as sql.PAGE_FINAL would say."""
    resets = [message for message in messages if is_reset(message)]
    if not resets:
        return messages
    return [message for message in messages if not any(_voids(reset, message) for reset in resets)]


def _voids(reset: Message, message: Message) -> bool:
    if reset.step is None:  # the channel was compacted: all that was there before
        return reset.void_from is not None and reset.void_from <= message.position < reset.position
    if message.step is None or message.step != reset.step or message.kind != KINDS[MESSAGE]:
        return False
    assert reset.void_from is not None and reset.attempt is not None and message.attempt is not None
    return reset.void_from <= message.position < reset.position and message.attempt < reset.attempt


def is_reset(message: Message) -> bool:
    """Whether a control message voids earlier output: of a step that started over, or all there was before it."""
    return message.kind == KINDS[CONTROL] and message.void_from is not None
