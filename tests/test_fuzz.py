"""What reads bytes from outside, against references: the checks of fuzzing.py on what hypothesis thinks of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from fuzzing import (
    ASCII,
    HEADERS,
    NASTY,
    TARGETS,
    TARGETS_BY_NAME,
    EventSource,
    Http,
    check_body,
    check_cursor,
    check_dsn,
    check_frames,
    check_json,
    check_name,
    check_notify,
    check_pattern,
    make_request,
    run,
)  # fmt: skip
from generated import effort, patience
from hypothesis import given
from hypothesis import strategies as st

from pgchan import AsyncClient
from pgchan.wakeups import LISTEN_NAMES

pytestmark = patience(120)

EVERYTHING = st.text(st.characters() | st.sampled_from(NASTY))  # lone surrogates too
DIGITS = st.text(st.sampled_from("0123456789٣_-"), min_size=30, max_size=36)
LEGAL = st.text(st.sampled_from(ASCII + "._:/@~+=-"), max_size=210)
ALMOST = st.text(st.sampled_from("ab./:" + NASTY), max_size=12)
SEGMENTS = st.text(st.sampled_from("ab*/:."), max_size=10)
WHITE = st.sampled_from(["\n", "\r", "\r\n", "\n\r\n\t"])
PIECES = st.text(st.sampled_from('[]{}",:\\u0d8eE+-.1 \t\r\n\0' + NASTY), max_size=4)
UNCLEAN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | EVERYTHING | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(EVERYTHING | st.integers(), inner, max_size=3),
    max_leaves=12,
)
CLEAN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12,
)  # fmt: skip


@given(text=EVERYTHING | DIGITS)
@effort(300)
def test_what_is_taken_for_a_cursor_is_one(text: str) -> None:
    check_cursor(text)


@given(text=EVERYTHING | LEGAL | ALMOST | LEGAL.map("pgchan:".__add__))
@effort(500)
def test_names_keys_and_labels_are_what_they_are_said_to_be(text: str) -> None:
    check_name(text)


@given(raw=st.binary() | EVERYTHING.map(lambda text: text.encode("utf-8", "surrogatepass")))
@effort(200)
def test_any_bytes_are_json_that_can_be_stored_or_refused(raw: bytes) -> None:
    check_json(raw)


@given(value=CLEAN, cut=st.integers(0, 60), piece=PIECES)
@effort(300)
def test_json_with_a_few_changes_is_taken_or_refused(value: Any, cut: int, piece: str) -> None:
    made = json.dumps(value, ensure_ascii=bool(cut % 2))
    check_json((made[:cut] + piece + made[cut:]).encode("utf-8", "surrogatepass"))
    check_json((made[:cut] + piece + made[cut + len(piece) :]).encode("utf-8", "surrogatepass"))


@given(body=UNCLEAN)
@effort(300)
def test_a_body_comes_back_equal_or_is_refused(body: Any) -> None:
    check_body(body)


@given(levels=st.integers(1, 70), is_object=st.lists(st.booleans(), min_size=70, max_size=70))
@effort(50)
def test_depth_is_counted_alike_by_both_ways_in(levels: int, is_object: list[bool]) -> None:
    opened = "".join('{"a":' if one else "[" for one in is_object[:levels])
    closed = "".join("}" if one else "]" for one in reversed(is_object[:levels]))
    check_json(f"{opened}1{closed}".encode())


@given(
    messages=st.lists(st.tuples(CLEAN, WHITE, st.none() | st.text(min_size=1, max_size=5)), min_size=1, max_size=4),
    others=st.lists(st.tuples(st.binary(), st.sampled_from(["text/plain", "image/png"])), max_size=2),
    cuts=st.lists(st.floats(0, 1), max_size=8),
)  # fmt: skip
@effort(300)
def test_a_stream_is_read_whole_wherever_it_is_cut(messages: Any, others: Any, cuts: list[float]) -> None:
    """Stored JSON may have line ends as white space; other types hold any bytes."""
    made = [
        (json.dumps(value, indent=1, ensure_ascii=False).replace("\n", white).encode(), "application/json", key)
        for value, white, key in messages
    ]
    made += [(raw, content_type, None) for raw, content_type in others]
    check_frames(made, lambda size: sorted(int(size * cut) for cut in cuts))


def test_the_reader_of_event_streams_reads_as_the_standard_has_it() -> None:
    """The reference itself, on the examples of the HTML standard and on what is easily read wrongly."""
    for stream, events in [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")]),
        (b"data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
        (b"data:test\n\ndata: test\n\n", [("message", "test", "")] * 2),
        (b"\xef\xbb\xbfevent: a\rdata: x\r\rid: 7\n\ndata: y\r\n\r\n", [("a", "x", ""), ("message", "y", "7")]),
        (b"id: 1\0\ndata: a\n\nretry: 1x\nretry: 20\nother: b\ndata: \xe2\x80\xa8\n\n",
         [("message", "a", ""), ("message", "\u2028", "")]),
    ]:  # fmt: skip
        whole, apart = EventSource(), EventSource()
        whole.feed(stream)
        for byte in stream:
            apart.feed(bytes((byte,)))
        assert whole.events == apart.events
        assert [event for event in whole.events if event[1] or b"data\n" in stream] == events


@given(pattern=SEGMENTS, name=SEGMENTS)
@effort(500)
def test_a_pattern_covers_what_a_simple_matcher_says(pattern: str, name: str) -> None:
    check_pattern(pattern, name)
    check_pattern(pattern, pattern.replace("**", name).replace("*", "a"))
    check_pattern(name.replace("a", "*"), name)


@given(name=st.sampled_from(LISTEN_NAMES), payload=EVERYTHING | st.text(st.sampled_from("0123:,-+_ ٣"), max_size=30))
@effort(300)
def test_whatever_is_announced_costs_at_most_a_read_of_what_is_followed(name: str, payload: str) -> None:
    check_notify(name, payload)


@given(text=EVERYTHING | st.text(st.sampled_from("/@:?#%[],=a1 \0"), max_size=30).map("postgresql://".__add__))
@effort(300)
def test_a_dsn_is_understood_or_refused_without_being_shown(text: str) -> None:
    check_dsn(text)


@pytest.fixture(scope="module")
def http() -> Iterator[Http]:
    """Refuses every right, after all else was looked at: no database is needed."""
    http = Http()
    yield http
    http.close()


METHODS = st.sampled_from(["GET", "POST", "DELETE", "HEAD", "OPTIONS", "X"])
URLS = st.sampled_from(TARGETS) | st.text(st.sampled_from(ASCII + "/?&=%._:@*-~")).map("/channels/".__add__)
HEADER = st.sampled_from(sorted(HEADERS)).flatmap(
    lambda name: st.tuples(st.just(name.encode()), st.sampled_from(HEADERS[name]).map(lambda v: v.encode("latin-1")))
)


@given(
    method=METHODS, url=URLS, headers=st.lists(HEADER, max_size=4),
    body=st.binary() | UNCLEAN.map(lambda body: json.dumps({"body": repr(body)}).encode()),
)  # fmt: skip
@effort(200)
def test_any_request_is_answered(http: Http, method: str, url: str, headers: Any, body: bytes) -> None:
    http.check(method, url.encode(), headers, body)


def test_any_request_is_answered_with_a_database_behind_it(dsn: str) -> None:
    """What the endpoint lets through, the database must not stumble over."""
    http, random = Http(AsyncClient(dsn, timeout=5)), Random(1)
    for _ in range(effort(500).max_examples):
        http.check(*make_request(random))
    http.close()
    assert {200, 201, 400, 404} <= http.statuses.keys(), http.statuses


@pytest.mark.parametrize("name", TARGETS_BY_NAME)
def test_the_fuzzer_finds_nothing_in_a_moment(name: str) -> None:
    *crashes, total = run(name, seed=1, seconds=60, executions=effort(200).max_examples)
    assert not crashes, crashes[0]
    assert total.startswith(name)


@pytest.mark.parametrize(
    ("target", "broken"),
    [("cursor", lambda text: (1, 1)), ("name", lambda text: text), ("json", lambda raw: None)],
    ids=["cursor", "name", "json"],
)  # fmt: skip
def test_the_fuzzer_finds_what_is_broken(
    target: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can fail."""
    places = {"cursor": "names.parse_after", "name": "names.check_name", "json": "codec.parse"}
    monkeypatch.setattr(f"pgchan.{places[target]}", broken)
    *crashes, total = run(target, seed=1, seconds=60, executions=300)
    assert crashes and not total.endswith(" 0")
