"""A channel against a list: whatever is done to it, in whatever order, it holds what the list holds."""

from __future__ import annotations

import itertools
import os
from typing import Any, NamedTuple

import psycopg
import pytest
from doors import query
from generated import effort, patience
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import pgchan
from pgchan import Message, errors
from pgchan.names import format_cursor

EXAMPLES, STEPS = 200, 20
BODIES = st.text(st.sampled_from("a\0\r\n\u2028é😀\"\\"), max_size=4) | st.integers(-1, 1) | st.none()
KEYS = st.sampled_from(["k1", "k2", "k3"])
BATCHES = st.lists(st.tuples(BODIES, st.none() | KEYS), min_size=1, max_size=4, unique_by=lambda e: e[1] or id(e))
UNSTORABLE = st.sampled_from([{1}, "\ud800", float("nan"), {1: 1}])
_numbers = itertools.count()


class Kept(NamedTuple):
    """A message of the list. number: no two messages have the same, whatever becomes of their positions."""

    body: Any
    key: str | None
    number: int


class Seen(NamedTuple):
    """A cursor that a reader holds, and the message it is of."""

    position: int
    number: int
    cursor: str


class ChannelModel(RuleBasedStateMachine):
    """The list `kept` has the messages after position `trimmed`; `tail` is a reader that goes on through all of it."""

    client: pgchan.Client
    connection: psycopg.Connection[Any]
    dsn = ""
    cursors = Bundle("cursors")

    def __init__(self) -> None:
        super().__init__()
        self.channel = self.client.channel(f"model/{os.getpid()}/{next(_numbers)}")
        self.tail: pgchan.ChannelTail | None = None
        self.tailed = 0  # where the tail stands
        self.begin_anew()

    def teardown(self) -> None:
        self.leave()

    def begin_anew(self) -> None:
        self.exists = False
        self.closed = False
        self.trimmed = 0
        self.kept: list[Kept] = []

    @property
    def head(self) -> int:
        return self.trimmed + len(self.kept)

    def at(self, position: int) -> Kept | None:
        """The message at a position, if it is kept."""
        return self.kept[position - self.trimmed - 1] if self.trimmed < position <= self.head else None

    def stored(self, key: str | None) -> int | None:
        """The position of the message with this key, as long as it is kept."""
        if key is None:
            return None
        return next((self.trimmed + n for n, kept in enumerate(self.kept, 1) if kept.key == key), None)

    def expect(self, body: Any, key: str | None) -> type[errors.Error] | int:
        """What publishing must lead to: an error, or a position."""
        position = self.stored(key)
        if position is not None:
            found = self.at(position)
            assert found is not None
            return position if (found.body, type(found.body)) == (body, type(body)) else errors.IdempotencyConflict
        return errors.ChannelClosed if self.closed else self.head + 1

    def put(self, body: Any, key: str | None) -> None:
        self.exists = True
        if self.stored(key) is None:
            self.kept.append(Kept(body, key, next(_numbers)))

    # -- publish

    @rule(target=cursors, body=BODIES, key=st.none() | KEYS)
    def publish(self, body: Any, key: str | None) -> Seen:
        wanted = self.expect(body, key)
        if not isinstance(wanted, int):
            with pytest.raises(wanted):
                self.channel.publish(body, key=key)
            return Seen(0, 0, format_cursor(0, 0))
        message = self.channel.publish(body, key=key)
        assert (message.position, message.body, message.key) == (wanted, body, key)
        self.put(body, key)
        found = self.at(wanted)
        assert found is not None
        return Seen(wanted, found.number, message.cursor)

    @rule(entries=BATCHES)
    def publish_many(self, entries: list[tuple[Any, str | None]]) -> None:
        self._publish_many(entries, None)

    @rule(entries=BATCHES, commits=st.booleans())
    def publish_in_a_transaction(self, entries: list[tuple[Any, str | None]], commits: bool) -> None:
        """Of the caller's own: what is refused in it stores nothing, and what it rolls back was never there."""
        kept, exists = list(self.kept), self.exists
        self._publish_many(entries, self.connection)
        if commits:
            self.connection.commit()
        else:
            self.connection.rollback()
            self.kept, self.exists = kept, exists

    def _publish_many(self, entries: list[tuple[Any, str | None]], connection: Any) -> None:
        bodies, keys = [body for body, _ in entries], [key for _, key in entries]
        bad = [one for one in (self.expect(body, key) for body, key in entries) if not isinstance(one, int)]
        if bad:
            with pytest.raises(tuple(set(bad))):
                self.channel.publish_many(bodies, keys=keys, connection=connection)
            return
        stored = self.channel.publish_many(bodies, keys=keys, connection=connection)
        for (body, key), message in zip(entries, stored, strict=True):
            position = self.stored(key) or self.head + 1
            assert (message.position, message.body, message.key) == (position, body, key)
            self.put(body, key)

    @rule(entries=BATCHES, bad=UNSTORABLE, where=st.integers(0, 4))
    def publish_many_with_one_bad_body(self, entries: list[tuple[Any, str | None]], bad: Any, where: int) -> None:
        bodies = [body for body, _ in entries]
        bodies.insert(where, bad)
        with pytest.raises(errors.InvalidInput):
            self.channel.publish_many(bodies)

    @precondition(lambda self: any(kept.key for kept in self.kept))
    @rule(body=BODIES, data=st.data())
    def publish_many_with_one_conflict(self, body: Any, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([kept.key for kept in self.kept if kept.key]))
        with pytest.raises((errors.IdempotencyConflict, errors.ChannelClosed)):
            self.channel.publish_many([body, ["another"], body], keys=[None, key, None])

    # -- read

    def expected(self, after: int) -> list[tuple[int, Any, str | None]]:
        """What lies behind a position."""
        entries = [(self.trimmed + n, kept.body, kept.key) for n, kept in enumerate(self.kept, 1)]
        return entries[max(0, after - self.trimmed) :]

    def check(self, messages: list[Message], after: int) -> None:
        assert [(m.position, m.body, m.key) for m in messages] == self.expected(after)

    @rule(after=st.integers(0, 12))
    def read_from_a_position(self, after: int) -> None:
        if after > self.head:
            with pytest.raises(errors.HistoryLost):
                self.channel.read(after=after)
        elif 0 < after < self.trimmed:
            with pytest.raises(errors.Trimmed):
                self.channel.read(after=after)
        else:
            self.check(self.channel.read(after=after, limit=1000), after)

    def is_continued_by(self, seen: Seen) -> bool:
        """Whether a reader with this cursor goes on exactly. Of the boundary nothing can be compared any more."""
        found = self.at(seen.position)
        return seen.position in (0, self.trimmed) or (found is not None and found.number == seen.number)

    @rule(seen=cursors)
    def resume(self, seen: Seen) -> None:
        if self.is_continued_by(seen):
            self.check(self.channel.read(after=seen.cursor, limit=1000), seen.position)
            return
        with pytest.raises(errors.Reset) as caught:
            self.channel.read(after=seen.cursor)
        assert type(caught.value) is (errors.Trimmed if seen.position < self.trimmed else errors.HistoryLost)
        assert (caught.value.first, caught.value.last) == (self.trimmed + 1, self.head)
        self.check(self.channel.read(after=caught.value.cursor, limit=1000), 0)

    @rule(limit=st.integers(1, 3))
    def page_through(self, limit: int) -> None:
        found: list[Message] = []
        after: int | str = 0
        while True:
            page = self.channel.page(after=after, limit=limit)
            assert (page.head, page.closed) == (self.head, self.closed)
            assert len(page.messages) <= limit
            found += page.messages
            if not page.messages:
                break
            after = page.cursor
        self.check(found, 0)

    # -- a reader that goes on

    def leave(self) -> None:
        """The reader goes: what it stood on is gone, of which it would hear within a second."""
        if self.tail is not None:
            self.tail.unfollow()
        self.tail = None

    @rule(seen=cursors)
    def follow(self, seen: Seen) -> None:
        self.leave()
        if self.is_continued_by(seen):
            self.tail, self.tailed = self.channel.tail(after=seen.cursor), max(seen.position, self.trimmed)

    @rule(anew=st.booleans())
    def hear(self, anew: bool) -> None:
        if self.tail is None or anew:
            self.leave()
            self.tail, self.tailed = self.channel.tail(), self.trimmed
        wanted, found = self.expected(self.tailed), list[Message]()
        while len(found) < len(wanted):
            page = self.tail.next_page(10)
            assert page, "nothing was heard"
            found += page
        self.check(found, self.tailed)
        self.tailed = self.head
        if self.closed:
            assert self.tail.next_page(10) is None
            self.leave()
        else:
            assert self.tail.next_page(0) == []

    # -- the rest

    @rule(before=st.integers(0, 12))
    def trim(self, before: int) -> None:
        if not self.exists:
            with pytest.raises(errors.ChannelNotFound):
                self.channel.trim(before)
        elif before > self.head + 1:
            with pytest.raises(errors.InvalidInput):
                self.channel.trim(before)
        else:
            self.channel.trim(before)
            gone = max(0, before - 1 - self.trimmed)
            self.kept = self.kept[gone:]
            self.trimmed += gone
            if self.tailed < self.trimmed:
                self.leave()

    # Without these conditions most examples would be of channels that are empty, closed or gone.

    @precondition(lambda self: not self.exists)
    @rule()
    def create(self) -> None:
        for _ in range(2):
            self.channel.create()
        with pytest.raises(errors.InvalidInput):
            self.channel.create("text/plain")
        self.exists = True

    @precondition(lambda self: len(self.kept) > 1)
    @rule()
    def close(self) -> None:
        self.channel.close()
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def compact(self) -> None:
        """Text without a key becomes one with the text before it, behind a reset; unless that would save nothing."""
        kept = [Kept({"type": "reset", "from": self.trimmed + 1}, None, next(_numbers))]
        for one in self.kept:
            joins = one.key is None and isinstance(one.body, str)
            if joins and kept[-1].key is None and isinstance(kept[-1].body, str):
                kept[-1] = kept[-1]._replace(body=kept[-1].body + one.body)
            else:
                kept.append(one._replace(number=next(_numbers)))
        saved = max(0, len(self.kept) - len(kept))
        assert self.channel.compact() == saved
        assert self.channel.compact() == 0
        if saved:
            self.leave()
            self.trimmed, self.kept = self.head, kept

    @precondition(lambda self: self.exists and not self.closed)
    @rule()
    def compact_what_is_open(self) -> None:
        with pytest.raises(errors.InvalidInput):
            self.channel.compact()

    @precondition(lambda self: self.closed or self.head > 5)
    @rule()
    def delete(self) -> None:
        self.channel.delete()
        self.begin_anew()
        self.leave()

    @precondition(lambda self: len(self.kept) > 1)
    @rule(data=st.data())
    def lose_the_end(self, data: st.DataObject) -> None:
        """What a failover to a server that lagged behind does: the last messages, and that there were any, are gone."""
        lost = data.draw(st.integers(1, len(self.kept)))
        head = self.head - lost
        query(
            self.dsn,
            "with c as (update pgchan.channels set head = %s, closed_at = null where name = %s returning id)"
            " delete from pgchan.messages m using c where m.channel_id = c.id and m.position > %s",
            head, self.channel.name, head,
        )  # fmt: skip
        self.kept, self.closed = self.kept[:-lost], False
        self.leave()

    @invariant()
    def info_is_that_of_the_list(self) -> None:
        if not self.exists:
            with pytest.raises(errors.ChannelNotFound):
                self.channel.info()
            return
        info = self.channel.info()
        assert (info.head, info.trimmed, info.closed) == (self.head, self.trimmed, self.closed)


@patience(600)
def test_a_channel_holds_what_a_list_would_hold(dsn: str) -> None:
    with pgchan.Client(dsn) as client, psycopg.connect(dsn) as connection:
        machine = type("Machine", (ChannelModel,), {"client": client, "connection": connection, "dsn": dsn})
        run_state_machine_as_test(machine, settings=effort(EXAMPLES, stateful_step_count=STEPS))
