"""What is a legal name, key, number, duration and cursor; each illegal one is refused before anything is sent."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from doors import query
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgchan import names
from pgchan.errors import InvalidInput

LEGAL = "ABCXYZabcxyz0189._:/@~+=-"
GOOD_NAMES = [
    "a", "chat/42", "a.b", "...", "a/.../b", ".a", "a..", "A:b@c~d+e=f-g_h", "x" * 200, "pgchan", "pgchan/a", "-",
]  # fmt: skip
BAD_NAMES: list[Any] = [
    "", "x" * 201, None, 1, b"bytes", "a\n", "\na", "a\0b", "a b", "a*", "a%41", "a#b", "a?b", "/a", "a/", "a//b", "/",
    ".", "..", "a/./b", "a/../b", "./a", "a/..", "pgchan:", "pgchan:journal:1", "naïve", "a\u200bb", "\u0430",
    "e\u0301", "😀", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_legal_name_is_returned_as_it_is(name: str) -> None:
    assert names.check_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_an_illegal_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidInput, match="channel"):
        names.check_name(name)


def test_the_database_has_the_same_idea_of_a_name(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in GOOD_NAMES:
            connection.execute("select pgchan.check_name(%s)", [name])
        for name in BAD_NAMES:
            if name is None or (isinstance(name, str) and "\0" not in name and name != "\ud800"):
                with pytest.raises(psycopg.Error) as caught:
                    connection.execute("select pgchan.check_name(%s)", [name])
                assert caught.value.sqlstate == "PC001", name
                assert caught.value.diag.message_hint


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.sampled_from(LEGAL + "é\n %"), min_size=1, max_size=12))
def test_python_and_sql_agree_on_any_name(dsn: str, name: str) -> None:
    try:
        names.check_name(name)
    except InvalidInput:
        with pytest.raises(psycopg.Error):
            query(dsn, "select pgchan.check_name(%s)", name)
    else:
        query(dsn, "select pgchan.check_name(%s)", name)


@pytest.mark.parametrize("last", sorted(names.RESERVED_RUN_SEGMENTS))
def test_a_run_id_does_not_end_in_a_path_of_the_http_interface(last: str) -> None:
    for run in (last, f"a/{last}"):
        with pytest.raises(InvalidInput, match="run id"):
            names.check_run(run)
    assert names.check_run(f"{last}/a") == f"{last}/a"
    assert names.check_run(f"a:{last}") == f"a:{last}"


def test_new_run_ids_are_legal_and_differ() -> None:
    made = {names.check_run(names.new_run_id()) for _ in range(100)}
    assert len(made) == 100


@pytest.mark.parametrize("key", ["k", "x" * 200, "é" * 100, "a b\n", "order/42", None])
def test_a_legal_key_is_returned_as_it_is(key: str | None) -> None:
    assert names.check_key(key) == key


@pytest.mark.parametrize("key", ["", "x" * 201, "é" * 101, "a\0", "\ud800", "pgchan:x", 1, b"k", True], ids=repr)
def test_an_illegal_key_is_refused(key: Any) -> None:
    with pytest.raises(InvalidInput, match="key"):
        names.check_key(key)


@pytest.mark.parametrize("label", ["default", "größer 1", "x" * 180])
def test_a_legal_label_is_returned_as_it_is(label: str) -> None:
    assert names.check_label(label, "queue") == label


@pytest.mark.parametrize("label", ["", "x" * 181, "é" * 91, "a\nb", "a\0", "\ud800", "pgchan:x", None, 1], ids=repr)
def test_an_illegal_label_is_refused(label: Any) -> None:
    with pytest.raises(InvalidInput, match="queue"):
        names.check_label(label, "queue")


@pytest.mark.parametrize("value", [0.001, 1, 1.5, timedelta(days=1), names.DURATION_SECONDS_MAX])
def test_a_duration_is_seconds_or_a_timedelta(value: Any) -> None:
    assert names.check_seconds(value, "ttl", 0.001) > 0
    assert isinstance(names.check_seconds(value, "ttl"), float)


@pytest.mark.parametrize(
    "value", [-1, -0.1, float("nan"), float("inf"), 1e12, True, "1", None, timedelta(days=-1), timedelta(days=4000)],
    ids=repr,
)  # fmt: skip
def test_an_impossible_duration_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match="ttl"):
        names.check_seconds(value, "ttl")


@given(position=st.integers(0, names.POSITION_MAX), at_us=st.integers(0, 10**16 - 1))
def test_a_cursor_is_what_it_was_made_from(position: int, at_us: int) -> None:
    cursor = names.format_cursor(position, at_us)
    assert names.parse_after(cursor) == (position, at_us)
    assert re.fullmatch(r"[0-9_]{33}", cursor)


@given(first=st.integers(0, names.POSITION_MAX), second=st.integers(0, names.POSITION_MAX))
def test_cursors_sort_as_their_positions_do(first: int, second: int) -> None:
    assert (names.format_cursor(first, 5) < names.format_cursor(second, 5)) == (first < second)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain; charset=utf-8", "image/svg+xml", "a/b;c"])
def test_a_media_type_is_taken(content_type: str) -> None:
    assert names.check_content_type(content_type) == content_type


def test_the_beginning_of_names_may_be_empty_and_end_anywhere() -> None:
    for value in ("", "a/", "/", ".", "x" * 200):
        assert names.check_beginning(value, "prefix") == value
    for bad in ("a b", "x" * 201, None, 1, "\0"):
        with pytest.raises(InvalidInput, match="prefix"):
            names.check_beginning(bad, "prefix")
