"""Bad input through Python: each case is a row of a table. Long, because a table of bad input has many rows.

Three tables. What is refused before anything is sent is tried on clients without a server. What the database must judge
is tried on one that is compared, row by row, before and after. Limits are tried at, below and above. A last table names
the tests of other files for what needs a fixture of its own.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import on_database
from doors import Door, rows

import pgchan
from pgchan import errors, names
from pgchan.dsn import DSN_LENGTH_MAX
from pgchan.names import format_cursor

SECRET = "correct horse battery staple"  # in bodies; no error may show it
YEARS = names.DURATION_SECONDS_MAX
HUGE = 10**5_000  # Python refuses to write it out
TEXT_LENGTH_MAX = 500  # of an error: it names the place and the limit, not the input

Call = Callable[[Any], Any]


@pgchan.workflow
async def add(run: pgchan.Run, a: int, b: int = 0) -> int:
    return a + b


async def attempt(call: Call, client: Any) -> Any:
    """Make a call of either kind: some raise at once, some when they are awaited."""
    found = call(client)
    return await found if inspect.isawaitable(found) else found


async def refused(call: Call, client: Any, error: type[errors.Error], says: str) -> Any:
    """Make the call, which must raise exactly this error; it says what is wrong, and shows neither body nor DSN."""
    with pytest.raises(error) as caught:
        await attempt(call, client)
    text = str(caught.value)
    assert type(caught.value) is error
    assert re.search(says, text), text
    assert len(text) < TEXT_LENGTH_MAX
    assert not [word for word in (SECRET, "postgresql://", "select ", "nobody@", "127.0.0.1") if word in text], text
    assert (error is errors.InvalidInput) == isinstance(caught.value, ValueError)
    return caught.value


def nested(levels: int) -> Any:
    body: Any = []
    for _ in range(levels - 1):
        body = [body]
    return body


def circular() -> Any:
    body: dict[str, Any] = {}
    body["self"] = [body]
    return body


# ------------------------------------------------------------------------------------------------ before it is sent


@pytest.fixture(params=["async", "blocking"])
async def nowhere(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A client without a server: what it refuses with InvalidInput was never sent."""
    door = Door(request.param, "postgresql://nobody@127.0.0.1:1/nowhere")
    yield door.client()
    await door.close()


NAMES: dict[str, Any] = {
    "empty": "", "too long": "x" * 201, "none": None, "int": 1, "bytes": b"chat", "line feed": "a\n", "NUL": "a\0b",
    "space": "a b", "star": "a*", "percent": "a%41", "hash": "a#b", "question mark": "a?b", "leading slash": "/a",
    "trailing slash": "a/", "empty segment": "a//b", "dot": "a/./b", "two dots": "a/../b", "only dots": "..",
    "reserved prefix": "pgchan:x", "zero-width space": "a\u200bb", "homoglyph": "ch\u0430t", "not NFC": "e\u0301",
    "NFC": "é", "emoji": "😀", "lone surrogate": "\ud800", "right-to-left mark": "a\u202eb", "full-width": "\uff41",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_a_name_is_plain_ascii(nowhere: Any, name: Any) -> None:
    await refused(lambda client: client.channel(name), nowhere, errors.InvalidInput, "channel")
    if name is not None:  # a new id is made up
        await refused(lambda client: client.start("w", id=name), nowhere, errors.InvalidInput, "run id")
        await refused(lambda client: client.run("r").fork("s", id=name), nowhere, errors.InvalidInput, "run id")
    await refused(lambda client: client.run(name), nowhere, errors.InvalidInput, "run id")


@pytest.mark.parametrize("last", sorted(names.RESERVED_RUN_SEGMENTS))
async def test_a_run_id_does_not_end_in_a_reserved_segment(nowhere: Any, last: str) -> None:
    for id in (last, f"a/{last}"):
        await refused(lambda client, id=id: client.run(id), nowhere, errors.InvalidInput, last)
        await refused(lambda client, id=id: client.start("w", id=id), nowhere, errors.InvalidInput, last)


BODIES: dict[str, tuple[Any, str]] = {
    "lone surrogate": ("\ud800", r"surrogate at \$"),
    "lone surrogate within": ([SECRET, {"a": "\udfff"}], r"surrogate at \$\[1\]\.a"),
    "lone surrogate in a key": ({"a": {"\ud8ff": 1}}, r"surrogate at \$\.a"),
    "NaN": (math.nan, r"nan at \$"),
    "Infinity": ([SECRET, math.inf], r"inf at \$\[1\]"),
    "minus Infinity": ({"a": -math.inf}, r"-inf at \$\.a"),
    "1e400000": (float("1e400000"), r"inf at \$"),
    "1e400000 as a Decimal": (Decimal("1e400000"), r"Decimal at \$"),
    "int of 5,001 digits": ([HUGE], "digits"),
    "65 levels": (nested(65), "64 levels"),
    "100,000 levels": (nested(100_000), "64 levels"),
    "circular": (circular(), "64 levels"),
    "over 1 MiB": (SECRET * 40_000, str(names.BODY_BYTES_MAX)),
    "over 1 MiB in UTF-8": ("é" * (1 << 19), str(names.BODY_BYTES_MAX)),
    "set": ({"a": {1}}, r"set at \$\.a"),
    "object": (object(), r"object at \$"),
    "generator": ((n for n in "ab"), r"generator at \$"),
    "complex": (1j, r"complex at \$"),
    "int key": ({"x": {1: 2}}, r"key of type int at \$\.x"),
    "None key": ({None: 1}, r"key of type NoneType at \$"),
    "bool key": ([{True: 1}], r"key of type bool at \$\[0\]"),
    "bytes within": ([b"x"], r"bytes at \$\[0\]"),
    "datetime": ({"at": datetime(2024, 5, 6)}, r"datetime at \$\.at"),  # noqa: DTZ001
    "UUID": (uuid.uuid4(), r"UUID at \$"),
    "Decimal": ([Decimal(1)], r"Decimal at \$\[0\]"),
    "behind a long path": ({"k" * 10_000: {1}}, r"set at \$\.k+"),
    "behind a path of no character": ({"\ud800\n\x1b": {1}}, r"set at \$\.\\ud800\\n\\x1b;"),
}


@pytest.mark.parametrize(("body", "says"), BODIES.values(), ids=BODIES)
async def test_a_body_is_json(nowhere: Any, body: Any, says: str) -> None:
    calls: list[Call] = [
        lambda client: client.channel("c").publish(body),
        lambda client: client.channel("c").publish_many([1, body]),
        lambda client: client.channel("c").publish(body, connection=object()),
        lambda client: client.run("r").signal(body),
    ]
    for call in calls:
        await refused(call, nowhere, errors.InvalidInput, f"body.*{says}")
    await refused(lambda client: client.start("w", body), nowhere, errors.InvalidInput, "arguments")
    await refused(lambda client: client.start("w", x=body), nowhere, errors.InvalidInput, "arguments")


KEYS: dict[str, tuple[Any, str]] = {
    "empty": ("", "1 to 200 bytes, not 0"), "over 200 bytes": ("x" * 201, "not 201"), "9 kB": ("x" * 9_000, "not 9000"),
    "over 200 bytes in UTF-8": ("é" * 101, "not 202"), "NUL": ("a\0", "NUL"), "lone surrogate": ("\ud800", "surrogate"),
    "reserved prefix": ("pgchan:x", "pgchan:"), "int": (1, "int"), "bytes": (b"k", "bytes"), "bool": (True, "bool"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "says"), KEYS.values(), ids=KEYS)
async def test_a_key_is_short_text(nowhere: Any, key: Any, says: str) -> None:
    for call in (
        lambda client: client.channel("c").publish(SECRET, key=key),
        lambda client: client.channel("c").publish_many([SECRET, 2], keys=[None, key]),
        lambda client: client.run("r").signal(SECRET, key=key),
    ):
        await refused(call, nowhere, errors.InvalidInput, f"key.*{says}")
    await refused(lambda client: client.run("r").fork(key), nowhere, errors.InvalidInput, f"step.*{says}")


CURSORS: dict[str, Any] = {
    "empty": "", "blanks": " 1 ", "position as text": "1", "exponent": "1e3", "other digits": "٣",
    "other digits within": "٣" * 16 + "_" + "0" * 16, "2^63": 2**63, "2^63 as text": str(2**63), "negative": -1,
    "negative as text": "-1", "true": True, "float": 1.0, "none": None, "bytes": b"now", "NOW": "NOW",
    "65 characters": "9" * 65, "a megabyte": "9" * (1 << 20), "line feed": format_cursor(1, 2) + "\n", "HUGE": HUGE,
    "32 characters": format_cursor(1, 2)[1:], "34 characters": "0" + format_cursor(1, 2), "dash": "1-2",
    "other separator": format_cursor(1, 2).replace("_", "-"), "a letter": "000000000000000x_0000000000000001",
    "sign": "+00000000000000_0000000000000001", "17 digits": 10**16, "list": [1],
}  # fmt: skip


@pytest.mark.parametrize("after", CURSORS.values(), ids=CURSORS)
async def test_a_cursor_is_one_that_was_handed_out(nowhere: Any, after: Any) -> None:
    for call in (
        lambda client: client.channel("c").read(after=after),
        lambda client: client.channel("c").page(after=after),
        lambda client: client.channel("c").tail(after=after),
        lambda client: client.run("r").tail(after=after),
    ):
        await refused(call, nowhere, errors.InvalidInput, "after must be")


SECONDS: dict[str, Any] = {
    "negative": -1, "a little negative": -1e-9, "NaN": math.nan, "inf": math.inf, "minus inf": -math.inf,
    "over ten years": YEARS + 1, "10^400": 10**400, "HUGE": HUGE, "true": True, "text": "1", "list": [1],
    "negative timedelta": timedelta(days=-1), "timedelta over ten years": timedelta(days=3661),
}  # fmt: skip


@pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
async def test_a_duration_is_at_most_ten_years(nowhere: Any, seconds: Any) -> None:
    calls: dict[str, Call] = {
        "ttl": lambda client: client.channel("c").create(ttl=seconds),
        "delay": lambda client: client.start("w", delay=seconds),
        "timeout": lambda client: client.start("w", timeout=seconds),
        "timeout ": lambda client: client.run("r").result(timeout=seconds),
        "wait": lambda client: client.channel("c").tail().next_page(seconds),
        "Retry.delay": lambda client: pgchan.Retry(delay=seconds),
        "Retry.max_delay": lambda client: pgchan.Retry(max_delay=seconds),
        "lease": lambda client: worker(lease=seconds),
        "takeover_grace": lambda client: worker(takeover_grace=seconds),
        "drain": lambda client: worker(drain=seconds),
        "timeout  ": lambda client: pgchan.workflow(timeout=seconds)(add.fn),
        "timeout   ": lambda client: pgchan.step(timeout=seconds)(add.fn),
        "timeout    ": lambda client: pgchan.Client("postgresql://nobody@127.0.0.1:1/x", timeout=seconds),
    }
    for what, call in calls.items():
        await refused(call, nowhere, errors.InvalidInput, f"^{what.strip()} must be ")


def worker(**options: Any) -> pgchan.Worker:
    return pgchan.Worker(pgchan.AsyncClient("postgresql://nobody@127.0.0.1:1/nowhere"), [], **options)


INTEGERS: dict[str, Any] = {
    "true": True, "float": 1.0, "text": "10", "bytes": b"1", "list": [1], "HUGE": HUGE, "minus HUGE": -HUGE
}  # fmt: skip


@pytest.mark.parametrize("number", INTEGERS.values(), ids=INTEGERS)
async def test_a_number_is_an_int_in_its_range(nowhere: Any, number: Any) -> None:
    calls: dict[str, Call] = {
        "limit": lambda client: client.channel("c").read(limit=number),
        "limit ": lambda client: client.channel("c").page(limit=number),
        "limit  ": lambda client: client.channels(limit=number),
        "limit   ": lambda client: client.runs(limit=number),
        "before": lambda client: client.channel("c").trim(number),
        "priority": lambda client: client.start("w", priority=number),
        "concurrency": lambda client: worker(concurrency=number),
        "Retry.attempts": lambda client: pgchan.Retry(attempts=number),
        "pool_size": lambda client: pgchan.AsyncClient("postgresql://nobody@127.0.0.1:1/x", pool_size=number),
    }
    for what, call in calls.items():
        await refused(call, nowhere, errors.InvalidInput, f"^{what.strip()} must be ")


LABELS: dict[str, Any] = {
    "empty": "", "181 characters": "x" * 181, "over 180 bytes": "é" * 91, "line feed": "a\nb", "NUL": "a\0",
    "lone surrogate": "\ud800", "reserved prefix": "pgchan:x", "int": 1, "bytes": b"x",
}  # fmt: skip


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
async def test_the_name_of_a_queue_workflow_or_worker_is_printable(nowhere: Any, label: Any) -> None:
    calls: dict[str, Call] = {
        "workflow": lambda client: client.start(label),
        "queue": lambda client: client.start("w", queue=label),
        "workflow ": lambda client: client.runs(workflow=label),
        "queue ": lambda client: client.runs(queue=label),
        "queue  ": lambda client: worker(queues=[label]),
        "name": lambda client: worker(name=label),
        "name ": lambda client: pgchan.Client("postgresql://nobody@127.0.0.1:1/x", name=label),
        "workflow name": lambda client: pgchan.workflow(name=label)(add.fn),
        "workflow version": lambda client: pgchan.workflow(version=label)(add.fn),
        "queue   ": lambda client: pgchan.workflow(queue=label)(add.fn),
        "step name": lambda client: pgchan.step(name=label)(add.fn),
    }
    for what, call in calls.items():
        if what.startswith("workflow") and what.strip() == "workflow" and not isinstance(label, str):
            continue  # what is no name may be a function: in the table below
        await refused(call, nowhere, errors.InvalidInput, f"^{what.strip()} ")


def case(id: str, says: str, call: Call) -> Any:
    return pytest.param(call, says, id=id)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        case("limit 0", "from 1 to 1000, not 0", lambda c: c.channel("c").read(limit=0)),
        case("limit -1", "from 1 to 1000, not -1", lambda c: c.channel("c").read(limit=-1)),
        case("limit 1,001", "from 1 to 1000, not 1001", lambda c: c.channel("c").page(limit=1001)),
        case("trim before -1", "before must be from 0", lambda c: c.channel("c").trim(-1)),
        case("view", "view must be", lambda c: c.channel("c").read(view="all")),
        case("view of a tail", "view must be", lambda c: c.channel("c").tail(view=None)),
        case("view that is long", "view must be", lambda c: c.channel("c").page(view="x" * 10_000)),
        case("ttl 0", "ttl must be from 0.001", lambda c: c.channel("c").create(ttl=0)),
        case("content type empty", "content_type", lambda c: c.channel("c").create("")),
        case("content type without a slash", "content_type", lambda c: c.channel("c").create("json")),
        case("content type with a line end", "content_type", lambda c: c.channel("c").create("a/b\n")),
        case("content type that splits a header", "content_type", lambda c: c.channel("c").create("a/b\r\nX: y")),
        case("content type too long", "at most 200", lambda c: c.channel("c").create("a/" + "b" * 199)),
        case("content type of another kind", "content_type", lambda c: c.channel("c").create(b"a/b")),
        case("bodies none", "bodies must be a sequence.*NoneType", lambda c: c.channel("c").publish_many(None)),
        case("bodies a str", "bodies must be a sequence.*str", lambda c: c.channel("c").publish_many(SECRET)),
        case("bodies bytes", "bodies must be a sequence.*bytes", lambda c: c.channel("c").publish_many(b"ab")),
        case("bodies a dict", "bodies must be a sequence.*dict", lambda c: c.channel("c").publish_many({"a": 1})),
        case("bodies a generator", "bodies.*generator", lambda c: c.channel("c").publish_many(n for n in "ab")),
        case("keys a str", "keys must be a sequence", lambda c: c.channel("c").publish_many([1, 2], keys="ab")),
        case("keys too few", "1 keys, 2 bodies", lambda c: c.channel("c").publish_many([1, 2], keys=["a"])),
        case("keys twice", "differ", lambda c: c.channel("c").publish_many([1, 2], keys=["a", "a"])),
        case("prefix", "prefix", lambda c: c.channels(prefix="a b")),
        case("prefix none", "prefix must be a str", lambda c: c.channels(prefix=None)),
        case("prefix too long", "200 characters", lambda c: c.channels(prefix="x" * 201)),
        case("after of a list", "after", lambda c: c.channels(after="\0")),
        case("state", "state must be one of", lambda c: c.runs(state="sleeping")),
        case("state that is long", "state must be one of", lambda c: c.runs(state="x" * 10_000)),
        case("after of a list of runs", "after", lambda c: c.runs(after="*")),
        case("workflow a function", "decorated", lambda c: c.start(test_a_name_is_plain_ascii)),
        case("workflow none", "decorated", lambda c: c.start(None)),
        case("arguments that do not fit", "argument 'a' of workflow 'add'", lambda c: c.start(add, "two")),
        case("argument missing", "arguments of workflow 'add'", lambda c: c.start(add)),
        case("argument too many", "arguments of workflow 'add'", lambda c: c.start(add, 1, 2, 3)),
        case("argument unknown", "arguments of workflow 'add'", lambda c: c.start(add, 1, c=3)),
        case("argument unknown and long", "unexpected", lambda c: c.start(add, 1, **{"\n" + "k" * 10_000: 3})),
        case("priority too high", "priority must be from", lambda c: c.start("w", priority=1_000_001)),
        case("priority too low", "priority must be from", lambda c: c.start("w", priority=-1_000_001)),
        case("run timeout 0", "timeout must be from 0.001", lambda c: c.start("w", timeout=0)),
        case("step none", "step must be a str", lambda c: c.run("r").fork(None)),
        case("attempts 0", "Retry.attempts", lambda c: pgchan.Retry(attempts=0)),
        case("attempts over a million", "Retry.attempts", lambda c: pgchan.Retry(attempts=1_000_001)),
        case("backoff 0.5", "Retry.backoff", lambda c: pgchan.Retry(backoff=0.5)),
        case("backoff 1,001", "Retry.backoff", lambda c: pgchan.Retry(backoff=1001)),
        case("backoff NaN", "Retry.backoff", lambda c: pgchan.Retry(backoff=math.nan)),
        case("backoff HUGE", "Retry.backoff", lambda c: pgchan.Retry(backoff=HUGE)),
        case("backoff text", "Retry.backoff", lambda c: pgchan.Retry(backoff="2")),  # type: ignore[arg-type]
        case("retry a number", "retry must be", lambda c: pgchan.workflow(retry=3)(add.fn)),  # type: ignore[call-overload]
        case("concurrency 0", "concurrency", lambda c: worker(concurrency=0)),
        case("concurrency 10,001", "concurrency", lambda c: worker(concurrency=10_001)),
        case("lease 0.999", "lease must be from 1 s", lambda c: worker(lease=0.999)),
        case("grace too long", "takeover_grace", lambda c: worker(takeover_grace=YEARS + 1)),
        case("queues a str", "queues", lambda c: worker(queues="default")),
        case("queues none", "at least one queue", lambda c: worker(queues=[])),
        case("pool size 0", "pool_size", lambda c: pgchan.Client("postgresql://nobody@x/x", pool_size=0)),
        case("pool size 1,001", "pool_size", lambda c: pgchan.Client("postgresql://nobody@x/x", pool_size=1001)),
        case("client timeout 0", "timeout", lambda c: pgchan.AsyncClient("postgresql://nobody@x/x", timeout=0)),
        case("DSN too long", "8192", lambda c: pgchan.Client("postgresql://x/" + "x" * DSN_LENGTH_MAX)),
        case("DSN of another kind", "must be a str", lambda c: pgchan.Client(7)),  # type: ignore[arg-type]
    ],
)
async def test_an_argument_is_refused_before_anything_is_sent(nowhere: Any, call: Call, says: str) -> None:
    await refused(call, nowhere, errors.InvalidInput, says)


# ------------------------------------------------------------------------------------------------ by the database


@pytest.fixture(scope="module")
def shared(admin: psycopg.Connection[Any], template: str, shared_server: tuple[str, str]) -> Iterator[str]:
    """One database for all of these tests: many of them create nothing."""
    dsn, prefix = shared_server
    name = f"{prefix}_{os.getpid()}_bad_input"
    admin.execute(f"create database {name} template {template}".encode())
    yield on_database(dsn, name)
    admin.execute(f"drop database {name} with (force)".encode())


@pytest.fixture(scope="module")
def kept(shared: str) -> tuple[str, dict[str, Any]]:
    """What no case may change, and cursors of messages in it."""
    with pgchan.Client(shared) as client:
        stored = client.channel("chat").publish_many([1, 2, 3, 4, 5], keys=[None, None, None, "k", None])
        client.channel("chat").trim(before=3)
        client.channel("other").publish_many([1, 2, 3, 4, 5])
        client.channel("closed").publish(1, key="k")
        client.channel("closed").close()
        client.channel("text").create("text/plain")
        client.channel("image").create("image/png")
        client.channel("mine").create()
        client.start(add, 1, id="run").signal(1, key="k")
        client.start(add, 1, id="ended").cancel()
        cursors = {str(message.position): message.cursor for message in stored}
        cursors["other"] = client.channel("other").read()[-1].cursor
    return shared, cursors


@pytest.fixture(params=["async", "blocking"])
async def unchanged(
    request: pytest.FixtureRequest, kept: tuple[str, dict[str, Any]]
) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """A client of `kept`, which holds exactly the same rows when the test is over."""
    dsn, cursors = kept
    before = rows(dsn)
    door = Door(request.param, dsn)
    yield door.client(), cursors
    await door.close()
    assert rows(dsn) == before


def judged(id: str, error: type[errors.Error], says: str, call: Callable[..., Awaitable[Any]], **facts: Any) -> Any:
    return pytest.param(call, error, says, facts, id=id)


def judged_reading(id: str, error: type[errors.Error], after: Callable[[dict[str, str]], Any]) -> list[Any]:
    facts = {"first": 3, "last": 5, "cursor": format_cursor(2, 0), "channel": "chat"}
    calls: dict[str, Callable[..., Awaitable[Any]]] = {
        "read": lambda c, at: c.channel("chat").read(after=after(at)),
        "page": lambda c, at: c.channel("chat").page(after=after(at)),
        "tail": lambda c, at: c.channel("chat").tail(after=after(at)).next_page(0),
    }
    return [judged(f"{id}: {how}", error, "go on from .cursor", call, **facts) for how, call in calls.items()]


NOT_FOUND, NO_RUN, CLOSED = errors.ChannelNotFound, errors.RunNotFound, errors.ChannelClosed
CONFLICT, INVALID = errors.IdempotencyConflict, errors.InvalidInput


@pytest.mark.parametrize(
    ("call", "error", "says", "facts"),
    [
        *judged_reading("cursor of another row", errors.HistoryLost, lambda at: format_cursor(5, 1)),
        *judged_reading("cursor of another channel", errors.HistoryLost, lambda at: at["other"]),
        *judged_reading("cursor past the head", errors.HistoryLost, lambda at: format_cursor(6, 1)),
        *judged_reading("position past the head", errors.HistoryLost, lambda at: 6),
        *judged_reading("the last position there is", errors.HistoryLost, lambda at: names.POSITION_MAX),
        *judged_reading("cursor that was trimmed", errors.Trimmed, lambda at: at["1"]),
        *judged_reading("position that was trimmed", errors.Trimmed, lambda at: 1),
        judged("same key", CONFLICT, "'k'", lambda c, _: c.channel("chat").publish(SECRET, key="k"), position=4),
        judged("same key in a batch", CONFLICT, "'k'",
               lambda c, _: c.channel("chat").publish_many([SECRET, 2], keys=[None, "k"]), position=4),
        judged("same key of a signal", CONFLICT, "'k'", lambda c, _: c.run("run").signal(SECRET, key="k"), position=1),
        judged("same key on a closed channel", CONFLICT, "'k'", lambda c, _: c.channel("closed").publish(2, key="k")),
        judged("batch with one bad body", INVALID, r"set at \$",
               lambda c, _: c.channel("chat").publish_many([1, 2, {3}])),
        judged("defer without a session", INVALID, "defer=True", lambda c, _: c.channel("chat").publish(1, defer=True)),
        judged("closed", CLOSED, "'closed' is closed", lambda c, _: c.channel("closed").publish(SECRET)),
        judged("closed, a batch", CLOSED, "'closed'", lambda c, _: c.channel("closed").publish_many([1, SECRET])),
        judged("bytes in JSON", INVALID, "bytes", lambda c, _: c.channel("chat").publish(b"x")),
        judged("bytes in JSON, new", INVALID, "bytes", lambda c, _: c.channel("new").publish(b"x")),
        judged("JSON in text", INVALID, "text/plain.*str or bytes", lambda c, _: c.channel("text").publish([SECRET])),
        judged("text in bytes", INVALID, "image/png.*bytes", lambda c, _: c.channel("image").publish(SECRET)),
        judged("surrogate in text", INVALID, "surrogate", lambda c, _: c.channel("text").publish("\ud800")),
        judged("bytes over 1 MiB", INVALID, "1048576", lambda c, _: c.channel("image").publish(b"x" * 1_048_577)),
        judged("another content type", INVALID, "text/plain", lambda c, _: c.channel("chat").create("text/plain")),
        judged("trim past the head plus one", INVALID, "head|past|position", lambda c, _: c.channel("chat").trim(7)),
        judged("trim far past", INVALID, "head|past|position", lambda c, _: c.channel("chat").trim(names.POSITION_MAX)),
        judged("info of nothing", NOT_FOUND, "'no'", lambda c, _: c.channel("no").info(), channel="no"),
        judged("trim of nothing", NOT_FOUND, "'no'", lambda c, _: c.channel("no").trim(1), channel="no"),
        judged("delete of nothing", NOT_FOUND, "'no'", lambda c, _: c.channel("no").delete(), channel="no"),
        judged("close of nothing", NOT_FOUND, "'no'", lambda c, _: c.channel("no").close(), channel="no"),
        judged("close of a run", INVALID, "cancel the run", lambda c, _: c.channel("run").close()),
        judged("delete of the channel of a run", INVALID, "cancel it", lambda c, _: c.channel("run").delete()),
        judged("delete of a run", INVALID, "cancel it", lambda c, _: c.run("run").delete()),
        judged("run with other arguments", errors.RunConflict, "'run'", lambda c, _: c.start(add, 2, id="run")),
        judged("run of another workflow", errors.RunConflict, "'run'", lambda c, _: c.start("other", 1, id="run")),
        judged("run on a closed channel", CLOSED, "'closed'", lambda c, _: c.start(add, 1, id="closed")),
        judged("signal to nobody", NO_RUN, "'no'", lambda c, _: c.run("no").signal(SECRET), run="no"),
        judged("signal to a channel", NO_RUN, "'chat'", lambda c, _: c.run("chat").signal(SECRET), run="chat"),
        judged("cancel of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").cancel(), run="no"),
        judged("resume of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").resume(), run="no"),
        judged("fork of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").fork("s"), run="no"),
        judged("status of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").status(), run="no"),
        judged("result of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").result(timeout=5), run="no"),
        judged("journal of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").journal(), run="no"),
        judged("delete of nobody", NO_RUN, "'no'", lambda c, _: c.run("no").delete(), run="no"),
        judged("signal after the end", CLOSED, "has ended", lambda c, _: c.run("ended").signal(SECRET)),
        judged("resume of a cancelled run", INVALID, "cancelled", lambda c, _: c.run("ended").resume()),
        judged("resume of a scheduled run", INVALID, "scheduled", lambda c, _: c.run("run").resume()),
        judged("fork at no step", INVALID, "no step 's'", lambda c, _: c.run("run").fork("s")),
        judged("start of a run with the name of another's channel", CLOSED, "'ended'",
               lambda c, _: c.channel("ended").publish(1)),
    ],
)  # fmt: skip
async def test_what_the_database_refuses_changes_nothing(
    unchanged: tuple[Any, dict[str, Any]], call: Callable[..., Awaitable[Any]], error: type[errors.Error], says: str,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    client, cursors = unchanged
    found = await refused(lambda client: call(client, cursors), client, error, says)
    assert {name: getattr(found, name) for name in facts} == facts


NOTHING_TO_DO: dict[str, tuple[Callable[..., Awaitable[Any]], Any]] = {
    "close a closed channel": (lambda c, _: c.channel("closed").close(), None),
    "create what there is": (lambda c, _: c.channel("chat").create(), None),
    "the same key and body": (lambda c, _: position(c.channel("chat").publish(4, key="k")), 4),
    "the same on a closed channel": (lambda c, _: position(c.channel("closed").publish(1, key="k")), 1),
    "read nothing": (lambda c, _: c.channel("no").read(), []),
    "read nothing from now": (lambda c, _: c.channel("no").read(after="now"), []),
    "a tail of nothing": (lambda c, _: c.channel("no").tail().next_page(0), []),
    "zero on a trimmed channel": (lambda c, _: bodies(c.channel("chat").read(after=0)), [3, 4, 5]),
    "the zero cursor": (lambda c, _: bodies(c.channel("chat").read(after=format_cursor(0, 0))), [3, 4, 5]),
    "a cursor at the boundary": (lambda c, at: bodies(c.channel("chat").read(after=at["2"])), [3, 4, 5]),
    "trim what is gone": (lambda c, _: c.channel("chat").trim(2), None),
    "trim before 0": (lambda c, _: c.channel("chat").trim(0), None),
    "an empty batch": (lambda c, _: c.channel("chat").publish_many([]), []),
    "start a run again": (lambda c, _: created(c.start(add, 1, id="run")), False),
    "signal it again": (lambda c, _: position(c.run("run").signal(1, key="k")), 1),
    "cancel what has ended": (lambda c, _: c.run("ended").cancel(), False),
    "list behind nobody": (lambda c, _: c.runs(after="no"), []),
}


async def bodies(reading: Awaitable[list[pgchan.Message]]) -> list[Any]:
    return [message.body for message in await reading]


async def position(publishing: Awaitable[pgchan.Message]) -> int:
    return (await publishing).position


async def created(starting: Awaitable[pgchan.AsyncRunHandle]) -> bool:
    return (await starting).created


@pytest.mark.parametrize(("call", "answer"), NOTHING_TO_DO.values(), ids=NOTHING_TO_DO)
async def test_what_is_there_already_is_no_error(
    unchanged: tuple[Any, dict[str, Any]], call: Callable[..., Awaitable[Any]], answer: Any
) -> None:
    assert await call(*unchanged) == answer


# ------------------------------------------------------------------------------------------------ limits


@pytest.fixture(params=["async", "blocking"])
async def sharing(request: pytest.FixtureRequest, shared: str) -> AsyncIterator[Any]:
    """A client of the database that these tests share."""
    door = Door(request.param, shared)
    yield door.client()
    await door.close()


def _ended(size: int, last: str) -> str:
    return "x" * (size - len(last)) + last


LIMITS: dict[str, tuple[int, Callable[[Any, int], Awaitable[Any]]]] = {
    "a name of 200": (200, lambda c, n: c.channel("x" * n).publish(1)),
    "a run id of 200": (200, lambda c, n: c.start("w", id="x" * n)),
    "a key of 200 bytes": (200, lambda c, n: c.channel("c").publish(1, key=_ended(n - 1, "é"))),
    "a body of 1 MiB": (1 << 20, lambda c, n: c.channel("c").publish("x" * (n - 2))),
    "a body of 1 MiB in UTF-8": (1 << 20, lambda c, n: c.channel("c").publish(_ended(n - 3, "é"))),
    "a signal of 1 MiB": (1 << 20, lambda c, n: c.run("r").signal("x" * (n - 2))),
    "64 levels": (64, lambda c, n: c.channel("c").publish(nested(n))),
    "a page of 1,000": (1000, lambda c, n: c.channel("c").read(limit=n)),
    "channels, 1,000": (1000, lambda c, n: c.channels(limit=n)),
    "runs, 1,000": (1000, lambda c, n: c.runs(limit=n)),
    "a prefix of 200": (200, lambda c, n: c.channels(prefix="x" * n)),
    "trim before head + 1": (4, lambda c, n: c.channel("three").trim(n)),
    "a media type of 200": (200, lambda c, n: c.channel(f"t{n}").create("a/" + "b" * (n - 2))),
    "a ttl of ten years": (int(YEARS), lambda c, n: c.channel(f"l{n}").create(ttl=n)),
    "a delay of ten years": (int(YEARS), lambda c, n: c.start("w", delay=n)),
    "a run's timeout of ten years": (int(YEARS), lambda c, n: c.start("w", timeout=n)),
    "a queue of 180": (180, lambda c, n: c.start("w", queue="x" * n)),
    "a workflow of 180": (180, lambda c, n: c.start("x" * n)),
    "a priority of a million": (1_000_000, lambda c, n: c.start("w", priority=n)),
    "a priority of minus a million": (1_000_000, lambda c, n: c.start("w", priority=-n)),
}


@pytest.mark.parametrize(("most", "call"), LIMITS.values(), ids=LIMITS)
async def test_a_limit_is_where_it_says(
    sharing: Any, shared: str, most: int, call: Callable[[Any, int], Awaitable[Any]]
) -> None:
    await sharing.channel("three").create()
    await sharing.channel("three").delete()
    await sharing.channel("three").publish_many([1, 2, 3])
    await sharing.start("w", id="r")
    before = rows(shared)
    await refused(lambda client: call(client, most + 1), sharing, errors.InvalidInput, "")
    assert rows(shared) == before
    await call(sharing, most - 1)
    await call(sharing, most)


PLAIN_LIMITS: dict[str, tuple[float, float, Call]] = {
    "a lease of one second": (1.0, 0.999, lambda n: worker(lease=n)),
    "one run at a time": (1, 0, lambda n: worker(concurrency=n)),
    "ten thousand runs at a time": (10_000, 10_001, lambda n: worker(concurrency=n)),
    "one connection": (1, 0, lambda n: pgchan.Client("postgresql://nobody@x/x", pool_size=n)),
    "a thousand connections": (1_000, 1_001, lambda n: pgchan.AsyncClient("postgresql://nobody@x/x", pool_size=n)),
    "one try": (1, 0, lambda n: pgchan.Retry(attempts=n)),
    "a million tries": (1_000_000, 1_000_001, lambda n: pgchan.Retry(attempts=n)),
    "a constant delay": (1, 0.999, lambda n: pgchan.Retry(backoff=n)),
    "a thousandfold delay": (1_000, 1_000.1, lambda n: pgchan.Retry(backoff=n)),
    "no delay": (0, -0.001, lambda n: pgchan.Retry(delay=n)),
    "a delay of ten years": (YEARS, math.nextafter(YEARS, math.inf), lambda n: pgchan.Retry(max_delay=n)),
    "a DSN of 8,192": (8_192, 8_193, lambda n: pgchan.Client("postgresql://x/".ljust(int(n), "x"))),
}


@pytest.mark.parametrize(("good", "bad", "make"), PLAIN_LIMITS.values(), ids=PLAIN_LIMITS)
def test_an_option_is_taken_up_to_its_limit(good: float, bad: float, make: Call) -> None:
    assert make(good) is not None
    with pytest.raises(errors.InvalidInput):
        make(bad)


# ------------------------------------------------------------------------------------------------ what is legal


LEGAL: dict[str, Any] = {
    "NUL": "a\0b", "NUL in a key": {"\0": 1}, "CR and LF": "a\r\nb\rc\n", "line separators": "\u2028\u2029\x85\v\f",
    "beyond 2^53": 2**53 + 1, "beyond 2^64": -(2**80), "4,300 digits": 10**4_299, "a pair of surrogates": "😀",
    "minus zero": -0.0, "the least float": 5e-324, "the greatest float": 1.7976931348623157e308, "empty key": {"": 1},
    "an empty body": "", "None": None, "false": False, "an int that is a float": 1e15, "64 levels": nested(64),
}  # fmt: skip


@pytest.mark.parametrize("body", LEGAL.values(), ids=LEGAL)
async def test_what_json_can_hold_comes_back_as_it_went(sharing: Any, body: Any) -> None:
    channel = sharing.channel(f"legal/{uuid.uuid4()}")
    message = await channel.publish(body)
    (found,) = await channel.read()
    assert found.raw == message.raw == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    assert repr(found.body) == repr(body)


async def test_a_batch_has_more_entries_than_a_driver_has_parameters(sharing: Any) -> None:
    """65,536 bind parameters fail in the driver; arrays do not, and a batch is cut into calls of one transaction."""
    count, channel = 66_000, sharing.channel(f"large/{uuid.uuid4()}")
    stored = await channel.publish_many(range(count))
    assert [stored[0].position, stored[-1].position] == [1, count]
    assert (await channel.info()).head == count
    assert [message.body for message in await channel.read(after=count - 2)] == [count - 2, count - 1]


# ------------------------------------------------------------------------------------------------ in other files


# What needs a fixture of its own: a worker, a second process, a server to stop. The test of each is named here, so that
# this table and those files cannot part unnoticed.
ELSEWHERE = {
    "one step name for two functions": "test_steps.one_name_for_two_functions_is_a_mismatch_that_names_both",
    "one step name twice at once": "test_steps.one_name_twice_at_once_is_a_mismatch",
    "a step within a step": "test_steps.a_step_within_a_step_is_refused",
    "a step result that is not JSON": "test_steps.a_step_whose_result_cannot_be_stored_has_failed",
    "a step that raises CancelledError": "test_steps.a_step_that_cancels_itself_is_not_recorded_and_the_run_goes_back",
    "a Run that is used after its attempt": "test_steps.a_run_that_is_used_after_it_has_ended_is_fenced",
    "an unknown workflow": "test_runs.a_run_without_code_stays_in_its_queue_and_the_worker_says_so",
    "arguments that do not fit, by name": "test_runs.arguments_that_do_not_fit_fail_a_run_that_was_started_by_name",
    "signals that are missed": "test_runs.a_waiting_run_is_cancelled_and_its_signals_are_missed",
    "an aborted transaction of the caller": "test_callers.errors_of_the_driver_pass_through",
    "a connection that is closed or another's": "test_callers.a_connection_that_cannot_be_used_is_invalid_input",
    "a connection for the other door": "test_callers.the_blocking_door_refuses_what_needs_an_event_loop",
    "used after a fork": "test_asyncpg_db.a_client_does_not_survive_a_fork",
    "used after a fork, blocking": "test_psycopg_db.a_client_does_not_survive_a_fork",
    "used on another loop": "test_asyncpg_db.a_client_belongs_to_its_event_loop",
    "a blocking client within a loop": "test_psycopg_db.it_refuses_to_stop_an_event_loop",
    "used after close": "test_outages.a_client_cannot_be_used_after_close",
    "a malformed DSN": "test_dsn.a_malformed_dsn_is_refused_and_never_shown",
    "a standby": "test_deployment.a_standby_is_refused",
    "fsync=off": "test_deployment.a_server_that_may_lose_commits_is_refused",
    "read-only, old, not UTF-8": "test_outages.a_server_that_may_lose_commits_is_refused",
    "not migrated, older, newer": "test_outages.a_database_that_is_not_fit_is_refused_with_the_fix",
    "a transaction pooler": "test_pooler.behind_a_transaction_pooler_what_must_listen_is_refused_with_the_fix",
    "missing grants": "test_outages.a_role_without_rights_is_told_what_it_lacks",
    "two workflows of one name": "test_workflows.two_workflows_of_a_worker_cannot_share_a_name",
}


@pytest.mark.parametrize("name", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_case_is_tested_in_its_own_file(name: str) -> None:
    module, _, test = name.partition(".")
    text = (Path(__file__).parent / f"{module}.py").read_text("utf-8")
    assert re.search(rf"^(async )?def test_{test}\(", text, re.MULTILINE)
