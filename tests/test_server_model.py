"""A channel over HTTP against a list: whatever is asked of the application, in whatever order, it answers alike."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

import httpx
from fuzzing import EventSource
from generated import effort, patience
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)  # fmt: skip
from serving import calling, problem

from pgchan import AsyncClient
from pgchan.names import format_cursor
from pgchan.server import Insecure, create_app

EXAMPLES, STEPS = 200, 12
BODIES = st.text(st.sampled_from("a\0\r\n\u2028é😀\"\\"), max_size=4) | st.integers(-1, 1) | st.none()
KEYS = st.none() | st.sampled_from(["k1", "k2"])
CLOSES = st.sampled_from([False, False, False, True, None])
BAD = st.sampled_from([b"", b"{", b'{"body":NaN}', b'{"body":"\\ud800"}', b'{"body":1,"x":2}', b"\xff"])
ZERO = format_cursor(0, 0)
T = TypeVar("T")
_numbers = itertools.count()


class Kept(NamedTuple):
    """A message of the list, as the endpoint showed it when it was stored."""

    shown: dict[str, Any]
    body: Any
    key: str | None


class EndpointModel(RuleBasedStateMachine):
    """The list `kept` has the messages after position `trimmed`."""

    runner: asyncio.Runner
    http: httpx.AsyncClient
    client: AsyncClient
    cursors = Bundle("cursors")

    def __init__(self) -> None:
        super().__init__()
        self.name = f"model/{next(_numbers)}"
        self.begin_anew()

    def begin_anew(self) -> None:
        self.exists = False
        self.closed = False
        self.trimmed = 0
        self.kept: list[Kept] = []

    @property
    def head(self) -> int:
        return self.trimmed + len(self.kept)

    @property
    def path(self) -> str:
        return f"/channels/{self.name}"

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def get(self, **options: Any) -> httpx.Response:
        return self.wait(self.http.get(self.path, **options))

    def refused(self, response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        return problem(response, status, code)

    def behind(self, position: int) -> list[dict[str, Any]]:
        return [kept.shown for kept in self.kept[max(0, position - self.trimmed) :]]

    def check_page(self, response: httpx.Response, position: int, limit: int = 1000) -> dict[str, Any]:
        """That the answer is the page behind a position, and says where the channel stands."""
        assert response.status_code == 200, response.text
        page: dict[str, Any] = response.json()
        assert page["messages"] == self.behind(position)[:limit]
        assert (page["head"], page["closed"]) == (self.head, self.closed)
        is_at_head = int(page["cursor"][:16]) == self.head
        assert response.headers["stream-next-offset"] == page["cursor"]
        assert ("stream-up-to-date" in response.headers) == is_at_head
        assert ("stream-closed" in response.headers) == (is_at_head and self.closed)
        assert page["messages"] == [] or page["cursor"] == page["messages"][-1]["cursor"]
        return page

    # -- writing

    @rule(target=cursors, entries=st.lists(st.tuples(BODIES, KEYS), min_size=1, max_size=3), close=CLOSES)
    def post(self, entries: list[tuple[Any, str | None]], close: bool | None) -> Any:
        *before, last = entries
        return multiple(*[self.post_one(*entry, None) for entry in before], self.post_one(*last, close))

    def post_one(self, body: Any, key: str | None, close: bool | None) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        given = {"body": body} | ({"close": close} if close is not None else {})
        response = self.wait(self.http.post(self.path, json=given, headers=headers))
        stored = [kept for kept in self.kept if key is not None and kept.key == key]
        if stored and (type(stored[0].body), stored[0].body) != (type(body), body):
            found = self.refused(response, 409, "idempotency_conflict")
            assert found["position"] == stored[0].shown["position"]
            return ZERO
        if self.closed and not stored:
            self.refused(response, 409, "channel_closed")
            return ZERO
        assert response.status_code == 201
        shown: dict[str, Any] = response.json()
        if stored:
            assert shown == stored[0].shown
        else:
            assert (shown["position"], shown["body"], shown["key"]) == (self.head + 1, body, key)
            self.kept.append(Kept(shown, body, key))
        self.exists, self.closed = True, self.closed or bool(close)
        cursor: str = shown["cursor"]
        return cursor

    @precondition(lambda self: self.exists)
    @rule(content=BAD)
    def post_what_is_bad(self, content: bytes) -> None:
        response = self.wait(self.http.post(self.path, content=content, headers={"Content-Type": "application/json"}))
        self.refused(response, 400, "invalid_input")

    @precondition(lambda self: self.closed or self.head > 5)  # or it would mostly be empty
    @rule()
    def delete(self) -> None:
        assert self.wait(self.http.delete(self.path)).status_code == 204
        self.begin_anew()
        self.refused(self.wait(self.http.delete(self.path)), 404, "channel_not_found")

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        """There is no route for it; somebody else does."""
        before = data.draw(st.integers(self.trimmed + 1, self.head + 1))
        self.wait(self.client.channel(self.name).trim(before))
        self.kept = self.kept[before - 1 - self.trimmed :]
        self.trimmed = before - 1

    # -- reading

    @precondition(lambda self: self.exists)
    @rule(after=st.integers(0, 8), limit=st.integers(1, 3))
    def read_behind_a_position(self, after: int, limit: int) -> None:
        response = self.get(params={"after": after, "limit": limit})
        if after > self.head:
            self.refused(response, 410, "history_lost")
        elif 0 < after < self.trimmed:
            self.refused(response, 410, "trimmed")
        else:
            self.check_page(response, after, limit)

    def outcome(self, cursor: str) -> str | None:
        """What a reader with this cursor is told; None if it goes on exactly."""
        position = int(cursor[:16])
        if cursor == ZERO or position == self.trimmed:
            return None
        if position < self.trimmed:
            return "trimmed"
        is_kept = position <= self.head and self.kept[position - self.trimmed - 1].shown["cursor"] == cursor
        return None if is_kept else "history_lost"

    @rule(cursor=cursors, by_header=st.booleans())
    def resume(self, cursor: str, by_header: bool) -> None:
        given: dict[str, Any] = {"headers": {"Last-Event-ID": cursor}} if by_header else {"params": {"after": cursor}}
        response = self.get(**given)
        code = self.outcome(cursor)
        if code is None:
            self.check_page(response, int(cursor[:16]))
            return
        found = self.refused(response, 410, code)
        assert (found["first"], found["last"]) == (self.trimmed + 1, self.head)
        self.check_page(self.get(params={"after": found["cursor"]}), 0)

    @rule(limit=st.integers(1, 3))
    def page_through(self, limit: int) -> None:
        found: list[dict[str, Any]] = []
        after = ZERO
        while True:
            page = self.get(params={"after": after, "limit": limit}).json()
            found += page["messages"]
            if not page["messages"]:
                break
            after = page["cursor"]
        assert found == self.behind(0)
        page = self.check_page(self.get(params={"after": "now"}), self.head)
        assert int(page["cursor"][:16]) == self.head
        if found or self.closed:  # a long poll waits only where there is nothing to say
            self.check_page(self.get(params={"after": self.trimmed, "wait": 20}), self.trimmed)

    @rule(cursor=cursors, is_return=st.booleans())
    def stream(self, cursor: str, is_return: bool) -> None:
        """All of it, as an EventSource sees it. The channel is closed first, for the answer must have an end."""
        self.wait(self.client.channel(self.name).create())
        self.wait(self.client.channel(self.name).close())
        self.exists = self.closed = True
        where: dict[str, Any] = {"params": {"after": cursor}}
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if is_return else {})
        response = self.get(headers=headers, **where)
        code = self.outcome(cursor)
        position = int(cursor[:16]) if code is None else 0
        if is_return and code is None and not self.behind(position):
            assert (response.status_code, response.content) == (204, b"")
            return
        assert response.headers["content-type"] == "text/event-stream"
        reader = EventSource()
        reader.feed(response.content)
        assert reader.retry is not None and 1_000 <= reader.retry <= 3_000
        events = reader.events
        if code is not None:
            kind, data, last_id = events.pop(0)
            found = json.loads(data)
            assert (kind, found["reason"], found["cursor"]) == ("reset", code, last_id)
            assert (found["first"], found["last"]) == (self.trimmed + 1, self.head)
        kind, data, last_id = events.pop()
        assert (kind, json.loads(data)["cursor"]) == ("end", last_id)
        assert [json.loads(data) for _, data, _ in events] == self.behind(position)
        assert [(kind, last_id) for kind, _, last_id in events] == [
            ("message", shown["cursor"]) for shown in self.behind(position)
        ]

    @invariant()
    def head_tells_where_it_ends(self) -> None:
        response = self.wait(self.http.head(self.path))
        assert (response.status_code, response.content) == (200 if self.exists else 404, b"")
        if self.exists:
            assert int(response.headers["stream-next-offset"][:16]) == self.head
            assert ("stream-closed" in response.headers) == self.closed


@patience(600)
def test_the_endpoint_answers_as_a_list_would(dsn: str) -> None:
    with asyncio.Runner() as runner:
        client = AsyncClient(dsn, timeout=10)
        http = calling(create_app(client, auth=Insecure()))
        machine = type("Machine", (EndpointModel,), {"runner": runner, "http": http, "client": client})
        try:
            run_state_machine_as_test(machine, settings=effort(EXAMPLES, stateful_step_count=STEPS))
        finally:
            runner.run(http.aclose())
            runner.run(client.close())
