"""A channel against a list: whatever is done to it, in whatever order, it holds what the list holds."""

from __future__ import annotations

import itertools
import os
from typing import Any

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import pgchan
from pgchan import Message, errors

BODIES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.integers()
KEYS = st.sampled_from(["k1", "k2", "k3"])
BATCHES = st.lists(st.tuples(BODIES, st.none() | KEYS), min_size=1, max_size=4, unique_by=lambda e: e[1] or id(e))
_numbers = itertools.count()


class ChannelModel(RuleBasedStateMachine):
    """The list `kept` has the messages after position `trimmed`; `life` counts deletions."""

    client: pgchan.Client
    connection: psycopg.Connection[Any]
    cursors = Bundle("cursors")

    def __init__(self) -> None:
        super().__init__()
        self.channel = self.client.channel(f"model/{os.getpid()}/{next(_numbers)}")
        self.life = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        self.exists = False
        self.closed = False
        self.trimmed = 0
        self.kept: list[tuple[Any, str | None]] = []

    @property
    def head(self) -> int:
        return self.trimmed + len(self.kept)

    def stored(self, key: str | None) -> int | None:
        """The position of the message with this key, as long as it is kept."""
        if key is None:
            return None
        return next((self.trimmed + n for n, (_, other) in enumerate(self.kept, 1) if other == key), None)

    def expect(self, body: Any, key: str | None) -> type[errors.Error] | int:
        """What publishing must lead to: an error, or a position."""
        position = self.stored(key)
        if position is not None:
            return position if self.kept[position - self.trimmed - 1][0] == body else errors.IdempotencyConflict
        return errors.ChannelClosed if self.closed else self.head + 1

    def put(self, body: Any, key: str | None) -> None:
        self.exists = True
        if self.stored(key) is None:
            self.kept.append((body, key))

    @rule(target=cursors, body=BODIES, key=st.none() | KEYS)
    def publish(self, body: Any, key: str | None) -> Any:
        wanted = self.expect(body, key)
        if not isinstance(wanted, int):
            with pytest.raises(wanted):
                self.channel.publish(body, key=key)
            return (self.life, 0, "0" * 16 + "_" + "0" * 16)
        message = self.channel.publish(body, key=key)
        assert (message.position, message.body, message.key) == (wanted, body, key)
        self.put(body, key)
        return (self.life, message.position, message.cursor)

    @rule(entries=BATCHES)
    def publish_many(self, entries: list[tuple[Any, str | None]]) -> None:
        bodies, keys = [body for body, _ in entries], [key for _, key in entries]
        wanted = [self.expect(body, key) for body, key in entries]
        bad = [one for one in wanted if not isinstance(one, int)]
        if bad:
            with pytest.raises(tuple(set(bad))):
                self.channel.publish_many(bodies, keys=keys)
            return
        stored = self.channel.publish_many(bodies, keys=keys)
        for (body, key), message in zip(entries, stored, strict=True):
            position = self.stored(key) or self.head + 1
            assert (message.position, message.body, message.key) == (position, body, key)
            self.put(body, key)

    @rule(body=BODIES, commits=st.booleans())
    def publish_in_a_transaction(self, body: Any, commits: bool) -> None:
        if self.closed:
            with pytest.raises(errors.ChannelClosed):
                self.channel.publish(body, connection=self.connection)
            self.connection.rollback()
            return
        assert self.channel.publish(body, connection=self.connection).position == self.head + 1
        if commits:
            self.connection.commit()
            self.put(body, None)
        else:
            self.connection.rollback()

    def check(self, messages: list[Message], after: int) -> None:
        expected = [(self.trimmed + n, *entry) for n, entry in enumerate(self.kept, 1)][max(0, after - self.trimmed) :]
        assert [(m.position, m.body, m.key) for m in messages] == expected

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

    @rule(cursor=cursors)
    def resume(self, cursor: tuple[int, int, str]) -> None:
        life, position, after = cursor
        # Of a cursor at the boundary nothing can be compared any more.
        if position in (0, self.trimmed) or (life == self.life and position > self.trimmed):
            self.check(self.channel.read(after=after, limit=1000), position)
        else:
            with pytest.raises(errors.Trimmed if position < self.trimmed else errors.HistoryLost) as caught:
                self.channel.read(after=after)
            assert (caught.value.first, caught.value.last) == (self.trimmed + 1, self.head)
            self.check(self.channel.read(after=caught.value.cursor, limit=1000), 0)

    @rule(limit=st.integers(1, 3))
    def page_through(self, limit: int) -> None:
        found: list[Message] = []
        after: int | str = 0
        while True:
            page = self.channel.page(after=after, limit=limit)
            assert (page.head, page.closed) == (self.head, self.closed)
            found += page.messages
            if not page.messages:
                break
            after = page.cursor
        self.check(found, 0)

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

    @precondition(lambda self: self.exists)
    @rule()
    def close(self) -> None:
        self.channel.close()
        self.closed = True

    @precondition(lambda self: self.exists)
    @rule()
    def delete(self) -> None:
        self.channel.delete()
        self.life += 1
        self.begin_anew()

    @invariant()
    def info_is_that_of_the_list(self) -> None:
        if not self.exists:
            with pytest.raises(errors.ChannelNotFound):
                self.channel.info()
            return
        info = self.channel.info()
        assert (info.head, info.trimmed, info.closed) == (self.head, self.trimmed, self.closed)


def test_a_channel_holds_what_a_list_would_hold(dsn: str) -> None:
    with pgchan.Client(dsn) as client, psycopg.connect(dsn) as connection:
        machine = type("Machine", (ChannelModel,), {"client": client, "connection": connection})
        run_state_machine_as_test(
            machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
        )  # fmt: skip
