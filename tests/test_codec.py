"""Bodies to bytes and back: what is JSON comes back equal, what is not is refused with its place."""

from __future__ import annotations

import enum
import json
import math
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from doors import query
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgchan
from pgchan import codec, names
from pgchan.errors import InvalidInput

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def nested(levels: int) -> Any:
    body: Any = []
    for _ in range(levels - 1):
        body = [body]
    return body


@given(body=JSON)
def test_json_comes_back_as_it_went(body: Any) -> None:
    raw = codec.encode(body)
    assert codec.decode(raw) == body
    assert codec.parse(raw) == body
    assert codec.encode(codec.decode(raw)) == raw


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(JSON, min_size=5, max_size=25))
def test_postgres_reads_every_body_as_json(dsn: str, bodies: list[Any]) -> None:
    with pgchan.Client(dsn) as client:
        name = f"c/{uuid4()}"
        client.channel(name).publish_many(bodies)
        assert [message.body for message in client.channel(name).read()] == bodies
        shown = [body for (body,) in query(dsn, "select body from pgchan.read(%s)", name)]
    seen = json.loads(json.dumps(bodies).replace("\\u0000", "\\ufffd"))
    assert json.loads(json.dumps(shown)) == pytest.approx(seen) if _is_flat_float(bodies) else len(shown) == len(seen)


def _is_flat_float(bodies: list[Any]) -> bool:
    return all(isinstance(body, float) for body in bodies)


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({1}, "$"), (object(), "$"), (b"bytes", "$"), ({"a": [1, {2}]}, "$.a[1]"), (uuid4(), "$"), (Decimal(1), "$"),
        ({"at": datetime.now()}, "$.at"), ({"x": {1: 2}}, "$.x"), ({None: 1}, "$"), ((1, {True: 1}), "$[1]"),  # noqa: DTZ005
        (math.nan, "$"), ([math.inf], "$[0]"), ({"a": -math.inf}, "$.a"), (Colour.RED, "$"), (1j, "$"), (iter([]), "$"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_not_json_is_refused_with_its_place(body: Any, place: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        codec.encode(body)
    assert f"at {place}" in str(caught.value)


@pytest.mark.parametrize("body", ["\ud800", ["a", "\udfff"], {"k": {"\ud8ff": 1}}], ids=ascii)
def test_a_lone_surrogate_is_refused_with_its_place(body: Any) -> None:
    with pytest.raises(InvalidInput, match=r"lone surrogate at \$"):
        codec.encode(body)


def test_nesting_goes_64_levels_deep_and_no_further() -> None:
    assert codec.decode(codec.encode(nested(64))) == nested(64)
    for body in (nested(65), nested(100_000), {"a": nested(64)}):
        with pytest.raises(InvalidInput, match="64 levels"):
            codec.encode(body)
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(InvalidInput, match="64 levels"):
        codec.encode(circular)


def test_the_size_is_that_of_the_bytes() -> None:
    assert len(codec.encode("x" * (names.BODY_BYTES_MAX - 2))) == names.BODY_BYTES_MAX
    for body in ("x" * (names.BODY_BYTES_MAX - 1), "é" * (names.BODY_BYTES_MAX // 2)):
        with pytest.raises(InvalidInput, match=str(names.BODY_BYTES_MAX)):
            codec.encode(body)
    with pytest.raises(InvalidInput, match="bytes"):
        codec.encode_as("image/png", b"x" * (names.BODY_BYTES_MAX + 1))


def test_numbers_are_exact_or_refused() -> None:
    assert codec.encode(2**60 + 1) == b"1152921504606846977"
    with pytest.raises(InvalidInput, match="digits"):
        codec.encode(10**5000)
    for raw in ("1e400000", "-1e999", "NaN", "Infinity", "-Infinity", "1" * 5000):
        with pytest.raises(InvalidInput):
            codec.parse(raw)


def test_subclasses_are_stored_as_what_they_are() -> None:
    assert codec.encode([Level.HIGH, Pair(1, 2), True]) == b"[3,[1,2],true]"


@pytest.mark.parametrize(
    "raw",
    ["", "{", "[1,]", "{'a':1}", "nul", b"\xff", b'"\xed\xa0\x80"', '"a"'.encode("utf-16"), '{"a":1} 2', "\ufeff1"],
    ids=ascii,
)
def test_json_text_from_outside_is_checked(raw: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        codec.parse(raw)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("raw", [r'"\ud800"', rb'{"a":["\udc00"]}', r'{"\ud800":1}', '"\ud800"', nested])
def test_json_text_with_what_encode_would_refuse_is_refused(raw: Any) -> None:
    with pytest.raises(InvalidInput):
        codec.parse(json.dumps(nested(65)) if raw is nested else raw)


def test_json_text_that_is_nested_too_deeply_is_refused() -> None:
    for levels in (65, 100_000):
        with pytest.raises(InvalidInput, match="64 levels"):
            codec.parse("[" * levels + "]" * levels)


def test_pairs_of_surrogates_are_one_character() -> None:
    assert codec.parse(r'"\ud83d\ude00"') == "😀"


def test_of_a_key_that_occurs_twice_readers_see_the_last() -> None:
    assert codec.parse('{"a":1,"a":2}') == {"a": 2}


def test_an_error_never_holds_the_body() -> None:
    secret = "correct horse battery staple"
    for body in ([secret, {1}], {"a": secret, "b": math.nan}, secret * 100_000, [secret + "\ud800"]):
        with pytest.raises(InvalidInput) as caught:
            codec.encode(body)
        assert secret not in str(caught.value)
    with pytest.raises(InvalidInput) as caught:
        codec.encode({"k" * 1_000_000: {1}})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True), ("application/json; charset=utf-8", True), ("Application/JSON", True),
        ("application/jsonl", False), ("application/json-seq", False), ("text/json", False),
    ],
)  # fmt: skip
def test_python_and_sql_agree_on_what_holds_json(dsn: str, content_type: str, is_json: bool) -> None:
    assert codec.is_json(content_type) == is_json
    ((shown,),) = query(dsn, "select pgchan.as_json('[1]', %s)", content_type)
    assert (shown == [1]) == is_json


@pytest.mark.parametrize(
    ("content_type", "body", "raw"),
    [
        ("text/plain", "grün", "grün".encode()), ("text/plain", b"\xff", b"\xff"), ("image/png", bytearray(b"a"), b"a"),
        ("image/png", memoryview(b"a"), b"a"), ("application/json", "a", b'"a"'),
    ],
)  # fmt: skip
def test_a_body_is_encoded_for_the_type_of_its_channel(content_type: str, body: Any, raw: bytes) -> None:
    assert codec.encode_as(content_type, body) == raw


@pytest.mark.parametrize(("content_type", "body"), [("text/plain", 1), ("text/plain", "\ud800"), ("image/png", "text")])
def test_a_body_of_another_type_is_refused(content_type: str, body: Any) -> None:
    with pytest.raises(InvalidInput, match="body"):
        codec.encode_as(content_type, body)
