"""Bad input over HTTP: each case is a row of a table. Long, because a table of bad input has many rows.

What is refused before the database is asked is tried on an application without one. What depends on a socket goes
through one, to `pgchan serve` as a process. No answer is 5xx but 503, and none holds SQL, a driver's name or a host.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from cluster import free_port, on_database
from doors import query, rows
from serving import WORDS_OF_OURS, Running, calling, follow, message_of, problem, raw

import pgchan
from pgchan import AsyncClient, names
from pgchan.server import Insecure, TokenAuth, create_app, endpoint
from pgchan.server.auth import TOKEN_BYTES_MAX

ZERO = "0000000000000000_0000000000000000"
SECRET = "correct horse battery staple"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def nowhere() -> AsyncIterator[httpx.AsyncClient]:
    """Calls an application whose database cannot be reached: what is refused here was refused before it was asked."""
    client = AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.01)
    async with calling(create_app(client, auth=Insecure())) as http:
        yield http
    await client.close()


# ---- the URL

PATHS: dict[str, str] = {
    "no name": "/channels/", "%00": "/channels/a%00", "%0d%0a": "/channels/a%0d%0ab", "%0a last": "/channels/a%0a",
    "%0a": "/channels/a%0ab", "..%2f": "/channels/..%2fa", "%2f..%2f": "/channels/a%2f..%2fb", "//": "/channels/a//b",
    "%252f, decoded once": "/channels/%252f", "over-long UTF-8": "/channels/%c0%af", "%ff": "/channels/%ff",
    "zero-width": "/channels/%e2%80%8b", "homoglyph": "/channels/ch%d0%b0t", "reserved": "/channels/pgchan:x",
    "%20": "/channels/a%20b", "*": "/channels/a*", "201 characters": "/channels/" + "n" * 201, "%7f": "/channels/%7f",
    "%0a in a run": "/runs/a/%0a/cancel", "dots in a run": "/runs/..%2fa", "no run": "/runs/",
    "a run named like a path": "/runs/a/cancel/result",
    "after twice": "/channels/c?after=1&after=2", "limit twice": "/channels/c?limit=1&limit=1",
    "x twice": "/channels/c?x=1&x=1", "limit 0": "/channels/c?limit=0", "limit 1,001": "/channels/c?limit=1001",
    "limit -1": "/channels/c?limit=-1", "limit 1e2": "/channels/c?limit=1e2", "limit 1.0": "/channels/c?limit=1.0",
    "limit in other digits": "/channels/c?limit=%D9%A3", "limit empty": "/channels/c?limit=",
    "limit of 17 digits": "/channels/c?limit=00000000000000001", "view": "/channels/c?view=void",
    "view empty": "/channels/c?view=", "after empty": "/channels/c?after=", "after -1": "/channels/c?after=-1",
    "after with a blank": "/channels/c?after=%201", "after 1e3": "/channels/c?after=1e3",
    "after true": "/channels/c?after=true", "after in other digits": "/channels/c?after=%D9%A3",
    "after with NUL": "/channels/c?after=1%00", "after of 17 digits": "/channels/c?after=99999999999999999",
    "after of 65 digits": "/channels/c?after=" + "1" * 65, "after 1_2": "/channels/c?after=1_2",
    "after of 34": f"/channels/c?after={ZERO}0", "after of 32": f"/channels/c?after={ZERO[1:]}",
    "wait 31": "/channels/c?wait=31", "wait 30.001": "/channels/c?wait=30.001", "wait -1": "/channels/c?wait=-1",
    "wait inf": "/channels/c?wait=inf", "wait nan": "/channels/c?wait=nan", "wait 1e1": "/channels/c?wait=1e1",
    "wait empty": "/channels/c?wait=", "runs, limit 0": "/runs?limit=0", "runs, limit 1,001": "/runs?limit=1001",
    "runs, state": "/runs?state=lost", "runs, after": "/runs?after=*", "runs, workflow with NUL": "/runs?workflow=%00",
    "runs, workflow empty": "/runs?workflow=", "runs, workflow too long": "/runs?workflow=" + "w" * 181,
    "runs, queue with NUL": "/runs?queue=a%00", "runs, queue with a line end": "/runs?queue=a%0a",
    "result, wait": "/runs/a/result?wait=x", "result, wait 31": "/runs/a/result?wait=31",
    "journal, now": "/runs/a/journal?after=now", "journal, after": "/runs/a/journal?after=x",
    "journal, limit 0": "/runs/a/journal?limit=0", "journal, limit 1,001": "/runs/a/journal?limit=1001",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_a_bad_url_is_refused(nowhere: httpx.AsyncClient, path: str) -> None:
    found = problem(await nowhere.get(raw(path)), 400, "invalid_input")
    assert len(found["detail"]) < 300
    if path.startswith("/channels/") and "wait" not in path:
        response = await nowhere.get(raw(path), headers={"Accept": "text/event-stream"})
        problem(response, 400, "invalid_input")
    if path.startswith("/channels/") and "?" not in path:
        problem(await nowhere.post(raw(path), json={"body": SECRET}), 400, "invalid_input")
        problem(await nowhere.delete(raw(path)), 400, "invalid_input")


SEEN: dict[str, str] = {
    "1e3": "1e3", "-1": "-1", "65 characters": "x" * 65, "10 kB": "0" * 10_000, "a tab": f"{ZERO}\t1", "blank": "1 1",
    "34 characters": f"{ZERO}0", "a dash": ZERO.replace("_", "-"), "not ASCII": "\xb2",
}  # fmt: skip


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
async def test_a_bad_last_event_id_is_refused(nowhere: httpx.AsyncClient, seen: str) -> None:
    for accept in ("text/event-stream", "application/json"):
        headers = {"Last-Event-ID": seen.encode("latin-1"), "Accept": accept.encode()}
        problem(await nowhere.get("/channels/c", headers=headers), 400, "invalid_input")


async def test_a_page_is_told_when_its_two_cursors_differ(nowhere: httpx.AsyncClient) -> None:
    headers = {"Last-Event-ID": "0000000000000001_0000000000000001"}
    problem(await nowhere.get("/channels/c?after=2", headers=headers), 400, "invalid_input")


# ---- the body


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


BODIES: dict[str, bytes] = {
    "empty": b"", "cut off": b"{", "an array": b"[]", "null": b"null", "a number": b"1", "a string": b'"x"',
    "no body": b"{}", "NaN": b'{"body":NaN}', "Infinity": b'{"body":[Infinity]}', "1e400000": b'{"body":1e400000}',
    "not UTF-8": b'{"body":"\xff"}', "lone surrogate": b'{"body":"\\ud800"}',
    "surrogate in UTF-8": b'{"body":"\xed\xa0\x80"}', "surrogate as a key": b'{"body":{"\\udfff":1}}',
    "UTF-16": '{"body":1}'.encode("utf-16"), "a byte order mark": '{"body":1}'.encode("utf-8-sig"),
    "an unknown field": b'{"body":1,"key":"k"}', "an unknown surrogate": b'{"body":1,"\\ud800":1}',
    "an unknown field of 100 kB": b'{"body":1,"' + b"k" * 100_000 + b'":1}',
    "65 levels": b'{"body":' + nested(65) + b"}", "100,000 levels": b'{"body":' + b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000, "5,000 digits": b'{"body":' + b"9" * 5_000 + b"}",
    "something behind it": b'{"body":1} x', "single quotes": b"{'body':1}", "a comment": b'{"body":1/**/}',
    "NUL": b"\0", "raw control characters": b'{"body":"a\nb"}',
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_bad_body_is_refused(nowhere: httpx.AsyncClient, body: bytes) -> None:
    for path in ("/channels/c", "/runs/r/signals"):
        found = problem(await nowhere.post(path, content=body, headers=JSON), 400, "invalid_input")
        assert len(found["detail"]) < 300


CHANNEL: dict[str, Any] = {
    "close a number": {"body": SECRET, "close": 1}, "close null": {"body": 1, "close": None},
    "close alone": {"close": True},
}  # fmt: skip
START: dict[str, Any] = {
    "no workflow": {}, "workflow empty": {"workflow": ""}, "workflow a number": {"workflow": 7},
    "workflow with NUL": {"workflow": "\0"}, "args an object": {"args": {}}, "args a number": {"args": 1},
    "args a string": {"args": SECRET}, "args null": {"args": None}, "kwargs an array": {"kwargs": []},
    "kwargs named id": {"kwargs": {"id": "x"}}, "kwargs named defer": {"kwargs": {"defer": 1}}, "id empty": {"id": ""},
    "id reserved": {"id": "a/cancel"}, "id with dots": {"id": "a/../b"}, "id a number": {"id": 7},
    "id false": {"id": False}, "queue empty": {"queue": ""}, "queue with NUL": {"queue": "\0"},
    "priority a string": {"priority": "high"}, "priority true": {"priority": True},
    "priority of 4,000 digits": {"priority": 10**4_000},
    "delay -1": {"delay": -1}, "delay a string": {"delay": "1"}, "delay over ten years": {"delay": 1e10},
    "delay of 400 digits": {"delay": 10**400}, "timeout 0": {"timeout": 0}, "timeout a string": {"timeout": "1"},
    "timeout of 400 digits": {"timeout": 10**400}, "a connection": {"connection": 1},
}  # fmt: skip
FORK: dict[str, Any] = {
    "no step": {}, "step empty": {"step": ""}, "step with NUL": {"step": "\0"}, "step of 201": {"step": "s" * 201},
    "step a number": {"step": 1}, "step null": {"step": None}, "fork to a reserved id": {"step": "s", "id": "result"},
}  # fmt: skip
FIELDS: dict[str, tuple[str, Any]] = {
    **{id: ("/channels/c", body) for id, body in CHANNEL.items()},
    **{id: ("/runs", body if "workflow" in id else {"workflow": "w"} | body) for id, body in START.items()},
    **{id: ("/runs/r/fork", body) for id, body in FORK.items()},
    "a signal that closes": ("/runs/r/signals", {"body": 1, "close": True}),
    "cancel with a body": ("/runs/r/cancel", {"why": SECRET}), "resume with a body": ("/runs/r/resume", {"x": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), FIELDS.values(), ids=FIELDS)
async def test_a_bad_field_is_refused(nowhere: httpx.AsyncClient, path: str, body: Any) -> None:
    found = problem(await nowhere.post(path, json=body), 400, "invalid_input")
    assert len(found["detail"]) < 300
    assert SECRET not in found["detail"]


KEYS: dict[str, bytes] = {
    "empty": b"", "201 bytes": b"k" * 201, "201 bytes in UTF-8": b"\xe9" * 101, "reserved": b"pgchan:k"
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
async def test_a_bad_key_is_refused(nowhere: httpx.AsyncClient, key: bytes) -> None:
    for path in ("/channels/c", "/runs/r/signals"):
        headers = {"Idempotency-Key": key}
        problem(await nowhere.post(path, json={"body": 1}, headers=headers), 400, "invalid_input")


@pytest.mark.parametrize("name", ["Idempotency-Key", "Last-Event-ID"])
async def test_a_repeated_header_is_refused(nowhere: httpx.AsyncClient, name: str) -> None:
    headers = [(name, "1"), (name, "1"), *JSON.items()]
    method = "GET" if name == "Last-Event-ID" else "POST"
    response = await nowhere.request(method, "/channels/c", content=b'{"body":1}', headers=headers)
    problem(response, 400, "invalid_input")


TYPES = {"text": "text/plain", "a form": "application/x-www-form-urlencoded", "x/json": "x/json", "none": None}


@pytest.mark.parametrize("content_type", TYPES.values(), ids=TYPES)
async def test_only_json_is_taken(nowhere: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    for path in ("/channels/c", "/runs", "/runs/r/signals", "/runs/r/fork", "/runs/r/cancel"):
        response = await nowhere.post(path, content=b'{"body":1}', headers=headers)
        problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP", "x"])
async def test_an_encoded_body_is_not_taken(nowhere: httpx.AsyncClient, encoding: str) -> None:
    response = await nowhere.post("/channels/c", content=b"\x1f\x8b", headers=JSON | {"Content-Encoding": encoding})
    problem(response, 415, "unsupported_media_type")


# ---- methods and types

ALLOWED: dict[str, str] = {
    "/channels/c": "DELETE, GET, HEAD, OPTIONS, POST", "/runs": "GET, HEAD, OPTIONS, POST",
    "/runs/r": "GET, HEAD, OPTIONS", "/runs/r/signals": "OPTIONS, POST", "/runs/r/cancel": "OPTIONS, POST",
    "/runs/r/resume": "OPTIONS, POST", "/runs/r/fork": "OPTIONS, POST", "/runs/r/journal": "GET, HEAD, OPTIONS",
    "/runs/r/result": "GET, HEAD, OPTIONS", "/healthz": "GET, HEAD, OPTIONS", "/pgchan.js": "GET, HEAD, OPTIONS",
}  # fmt: skip


@pytest.mark.parametrize(("path", "allow"), ALLOWED.items(), ids=ALLOWED)
async def test_a_method_that_is_not_offered_is_told_what_is(nowhere: httpx.AsyncClient, path: str, allow: str) -> None:
    for method in ("PUT", "PATCH", "TRACE", "BREW"):
        response = await nowhere.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allow
    response = await nowhere.options(path)
    assert (response.status_code, response.headers["allow"]) == (204, allow)


@pytest.mark.parametrize("path", ["/channels/c", "/runs", "/runs/r", "/healthz", "/pgchan.js", "/nothing"])
async def test_a_type_that_is_not_offered_is_not_acceptable(nowhere: httpx.AsyncClient, path: str) -> None:
    for accept in ("text/html", "image/*", "application/json;q=0, text/javascript;q=0", "nonsense"):
        problem(await nowhere.get(path, headers={"Accept": accept}), 406, "not_acceptable")


# ---- what the database must judge


@pytest.fixture(scope="module")
def shared(admin: psycopg.Connection[Any], template: str, shared_server: tuple[str, str]) -> Iterator[str]:
    """One database for these tests, with what their cases are about."""
    dsn, prefix = shared_server
    name = f"{prefix}_{os.getpid()}_bad_input_http"
    admin.execute(f"create database {name} template {template}".encode())
    dsn = on_database(dsn, name)
    with pgchan.Client(dsn) as client:
        client.channel("chat").publish_many([1, 2, 3, 4, 5], keys=[None, None, None, "k", None])
        client.channel("chat").trim(before=3)
        client.channel("closed").publish(1)
        client.channel("closed").close()
        client.channel("image").create("image/png")
        client.start("w", 1, id="run").signal(1, key="k")
        client.start("w", 1, id="ended").cancel()
    yield dsn
    admin.execute(f"drop database {name} with (force)".encode())


@pytest.fixture
async def http(shared: str) -> AsyncIterator[httpx.AsyncClient]:
    async with AsyncClient(shared, timeout=5) as client, calling(create_app(client, auth=Insecure())) as http:
        yield http


K = {"Idempotency-Key": "k"}
LOST = "0000000000000005_0000000000000001"
JUDGED: dict[str, tuple[str, str, Any, dict[str, str], int, str]] = {
    "closed": ("POST", "/channels/closed", {"body": SECRET}, {}, 409, "channel_closed"),
    "closed, and close": ("POST", "/channels/closed", {"body": SECRET, "close": True}, {}, 409, "channel_closed"),
    "same key": ("POST", "/channels/chat", {"body": SECRET}, K, 409, "idempotency_conflict"),
    "same key of a signal": ("POST", "/runs/run/signals", {"body": SECRET}, K, 409, "idempotency_conflict"),
    "another content type": ("POST", "/channels/image", {"body": SECRET}, {}, 400, "invalid_input"),
    "close a run's channel": ("POST", "/channels/run", {"body": SECRET, "close": True}, {}, 400, "invalid_input"),
    "delete a run's channel": ("DELETE", "/channels/run", None, {}, 400, "invalid_input"),
    "delete of nothing": ("DELETE", "/channels/no", None, {}, 404, "channel_not_found"),
    "run with other arguments": ("POST", "/runs", {"workflow": "w", "args": [2], "id": "run"}, {}, 409, "run_conflict"),
    "run of another workflow": ("POST", "/runs", {"workflow": "v", "args": [1], "id": "run"}, {}, 409, "run_conflict"),
    "run on a closed channel": ("POST", "/runs", {"workflow": "w", "id": "closed"}, {}, 409, "channel_closed"),
    "status of nobody": ("GET", "/runs/no", None, {}, 404, "run_not_found"),
    "result of nobody": ("GET", "/runs/no/result?wait=5", None, {}, 404, "run_not_found"),
    "journal of nobody": ("GET", "/runs/no/journal", None, {}, 404, "run_not_found"),
    "signal to nobody": ("POST", "/runs/no/signals", {"body": SECRET}, {}, 404, "run_not_found"),
    "cancel of nobody": ("POST", "/runs/no/cancel", None, {}, 404, "run_not_found"),
    "resume of nobody": ("POST", "/runs/no/resume", None, {}, 404, "run_not_found"),
    "fork of nobody": ("POST", "/runs/no/fork", {"step": "s"}, {}, 404, "run_not_found"),
    "fork at no step": ("POST", "/runs/run/fork", {"step": "s"}, {}, 400, "invalid_input"),
    "resume of a scheduled run": ("POST", "/runs/run/resume", None, {}, 400, "invalid_input"),
    "signal after the end": ("POST", "/runs/ended/signals", {"body": SECRET}, {}, 409, "channel_closed"),
    "page behind the trim": ("GET", "/channels/chat?after=1", None, {}, 410, "trimmed"),
    "page past the head": ("GET", "/channels/chat?after=6", None, {}, 410, "history_lost"),
    "page of another row": ("GET", f"/channels/chat?after={LOST}", None, {}, 410, "history_lost"),
    "page by header of another row": ("GET", "/channels/chat", None, {"Last-Event-ID": LOST}, 410, "history_lost"),
    "long poll past the head": ("GET", "/channels/chat?after=6&wait=9", None, {}, 410, "history_lost"),
    "page of a journal": ("GET", "/channels/pgchan:journal:run", None, {}, 400, "invalid_input"),
}


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "code"), JUDGED.values(), ids=JUDGED)
async def test_what_the_database_refuses_changes_nothing(
    http: httpx.AsyncClient, shared: str, method: str, path: str, body: Any, headers: dict[str, str], status: int,
    code: str,
) -> None:  # fmt: skip
    before = rows(shared)
    response = await http.request(method, path, json=body, headers=headers)
    found = problem(response, status, code)
    assert SECRET not in response.text
    if status == 410:
        assert (found["first"], found["last"], found["cursor"]) == (3, 5, "0000000000000002_0000000000000000")
    if code == "idempotency_conflict":
        assert found["position"] == (4 if "chat" in path else 1)
    assert rows(shared) == before


async def test_head_of_nothing_is_not_found(http: httpx.AsyncClient) -> None:
    response = await http.head("/channels/no")
    assert (response.status_code, response.content) == (404, b"")


async def test_of_a_key_that_occurs_twice_the_last_is_stored(http: httpx.AsyncClient, shared: str) -> None:
    """Not the bytes as they were sent: readers that take the first would see another message."""
    response = await http.post("/channels/twice", content=b'{"body": {"a": 1, "a": {"b": 2}}}', headers=JSON)
    assert response.json()["body"] == {"a": {"b": 2}}
    of = "select body from pgchan.messages join pgchan.channels on id = channel_id where name = 'twice'"
    assert query(shared, of) == [(b'{"a":{"b":2}}',)]


# ---- limits: one below, at, one above


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_message_may_have_one_mebibyte(http: httpx.AsyncClient, shared: str, extra: int) -> None:
    text = "x" * (names.BODY_BYTES_MAX - 2 + extra)  # two quotes
    for path in ("/channels/large", "/runs/run/signals"):
        before = rows(shared)
        response = await http.post(path, json={"body": text})
        if extra <= 0:
            assert response.status_code == 201
        else:
            problem(response, 413, "too_large")
            assert rows(shared) == before


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_body_has_sixty_four_levels(http: httpx.AsyncClient, extra: int) -> None:
    response = await http.post("/channels/deep", content=b'{"body":' + nested(64 + extra) + b"}", headers=JSON)
    assert response.status_code == (400 if extra > 0 else 201)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_page_has_a_thousand_messages(http: httpx.AsyncClient, extra: int) -> None:
    for path in ("/channels/chat", "/runs", "/runs/run/journal"):
        response = await http.get(path, params={"limit": 1000 + extra})
        assert response.status_code == (400 if extra > 0 else 200)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_key_has_two_hundred_bytes(http: httpx.AsyncClient, extra: int) -> None:
    response = await http.post("/channels/keys", json={"body": 1}, headers={"Idempotency-Key": "k" * (200 + extra)})
    assert response.status_code == (400 if extra > 0 else 201)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_name_has_two_hundred_characters(http: httpx.AsyncClient, extra: int) -> None:
    response = await http.get("/channels/" + "n" * (200 + extra))
    assert response.status_code == (400 if extra > 0 else 200)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_token_has_eight_kibibytes(nowhere: httpx.AsyncClient, extra: int) -> None:
    """The claims of a longer one are not looked at; a request without a valid token is always the same 401."""
    import jwt

    secret, claims = "s" * 32, {"sub": "u", "aud": "pgchan", "exp": int(time.time()) + 60, "pgchan": {"channels": {}}}

    def token(padding: int) -> str:
        return jwt.encode(claims, secret, headers={"x": "x" * padding})

    wanted = TOKEN_BYTES_MAX + extra
    made = next(token(n) for n in range(5_500, 6_200) if len(token(n)) >= wanted)
    made += "=" * (wanted - len(made))  # four characters hold three bytes; the padding of base64 fills up
    client = AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.01)
    async with calling(create_app(client, auth=TokenAuth(keys=secret))) as http:
        response = await http.get("/channels/c", headers={"Authorization": f"Bearer {made}"})
        problem(response, *((401, "unauthorized") if extra > 0 else (403, "forbidden")))
    await client.close()


# ---- pgchan serve, by the byte

APP = """
import pgchan
from pgchan.server import Insecure, create_app

app = create_app(pgchan.AsyncClient(timeout=5), auth=Insecure())
"""


@pytest.fixture(scope="module")
def serving(shared: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """`pgchan serve` with defaults, as a process: its port, and the file of what it logs."""
    home = tmp_path_factory.mktemp("serving")
    (home / "mine.py").write_text(APP)
    port, log = free_port(), home / "log"
    command = [sys.executable, "-W", "error", "-m", "pgchan.cli", "serve", "mine:app", "--port", str(port)]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=home, env={**os.environ, "PGCHAN_DSN": shared}, stderr=file) as process,
    ):
        deadline = time.monotonic() + 30
        while not _is_up(port):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield port, log
        process.terminate()
        assert process.wait(30) == 0


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def exchange(port: int, *parts: bytes, seconds: float = 10.0) -> bytes:
    """Send these bytes, and read until the server closes the connection; what it sends by then is all of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        async with asyncio.timeout(seconds):
            for part in parts:
                writer.write(part)
            while piece := await reader.read(1 << 16):
                answer += piece
            return answer
    except ConnectionResetError:  # what was on its way to a server that had closed resets the connection
        return answer
    finally:
        writer.transport.abort()


def request(head: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([head, "Host: h", "Connection: close", *headers, "", ""]).encode("latin-1") + body


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert not [word for word in WORDS_OF_OURS if word.encode() in (head + body).lower()], answer
    if b"content-length" in head.lower() and b"problem+json" in head:
        assert json.loads(body[: int(re.findall(rb"(?i)content-length: (\d+)", head)[0])])["code"]
    return int(head.split()[1])


POST = "POST /channels/raw HTTP/1.1"
TYPE = "Content-Type: application/json"
SMUGGLED = b"0\r\n\r\n" + request("GET /healthz HTTP/1.1")
URL = "/channels/chat?x="


def url(length: int) -> str:
    return URL + "y" * (length - len(URL) + 1)  # the question mark is not counted


def headers(count: int) -> list[str]:
    return [f"X-{n}: v" for n in range(count - 2)]  # beside Host and Connection


def chunked(body: bytes) -> bytes:
    pieces = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def padded(length: int) -> bytes:
    return b'{"body":1}'.ljust(length)


def sized(length: int) -> str:
    return f"Content-Length: {length}"


MOST = endpoint.REQUEST_BYTES_MAX
BYTES: dict[str, tuple[int, bytes]] = {
    "two lengths, of two kinds": (400, request(POST, TYPE, sized(5), "Transfer-Encoding: chunked", body=SMUGGLED)),
    "two lengths, the other way": (400, request(POST, TYPE, "Transfer-Encoding: chunked", sized(5), body=SMUGGLED)),
    "two lengths": (400, request(POST, TYPE, sized(5), sized(6), body=SMUGGLED)),
    "a list of lengths": (400, request(POST, TYPE, "Content-Length: 5, 6", body=SMUGGLED)),
    "a negative length": (400, request(POST, TYPE, sized(-5), body=b"hello")),
    "a length with a sign": (400, request(POST, TYPE, "Content-Length: +5", body=b"hello")),
    "a length in hexadecimal": (400, request(POST, TYPE, "Content-Length: 0x5", body=b"hello")),
    "an unknown coding": (400, request(POST, TYPE, "Transfer-Encoding: gzip, chunked", body=SMUGGLED)),
    "a chunk without a size": (400, request(POST, TYPE, "Transfer-Encoding: chunked", body=b"zz\r\nx\r\n0\r\n\r\n")),
    "a line folded": (400, request("GET /healthz HTTP/1.1", "X: a", " b\r\n\tc : d\r\nno colon")),
    "a blank before the colon": (400, request("GET /healthz HTTP/1.1", "X : a")),
    "a header with NUL": (400, request("GET /healthz HTTP/1.1", "X: a\0b")),
    "a header with a bare CR": (400, request("GET /healthz HTTP/1.1", "X: a\rY: b")),
    "no host": (400, b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n"),
    "two hosts": (400, request("GET /healthz HTTP/1.1", "Host: i")),
    "no version": (400, b"GET /healthz\r\n\r\n"),
    "HTTP/9.9": (400, request("GET /healthz HTTP/9.9x")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "a raw NUL in the path": (400, request("GET /channels/a\0b HTTP/1.1")),
    "raw UTF-8 in the path": (400, request("GET /channels/\xc3\xa4 HTTP/1.1")),
    "%00 in the path": (400, request("GET /channels/a%00 HTTP/1.1")),
    "a broken % in the path": (400, request("GET /channels/%zz HTTP/1.1")),
    "dots in the path": (400, request("GET /channels/../../etc/passwd HTTP/1.1")),
    "another host's URL": (404, request("GET http://evil.example/healthz HTTP/1.1")),
    "CONNECT": (405, request("CONNECT evil.example:443 HTTP/1.1")),
    "a URL of 8 KiB less one": (200, request(f"GET {url(8191)} HTTP/1.1")),
    "a URL of 8 KiB": (200, request(f"GET {url(8192)} HTTP/1.1")),
    "a URL of 8 KiB and one": (414, request(f"GET {url(8193)} HTTP/1.1")),
    "a URL of 70 kB": (414, request(f"GET {url(70_000)} HTTP/1.1")),
    "99 headers": (200, request("GET /channels/chat HTTP/1.1", *headers(99))),
    "100 headers": (200, request("GET /channels/chat HTTP/1.1", *headers(100))),
    "101 headers": (431, request("GET /channels/chat HTTP/1.1", *headers(101))),
    "2,000 headers": (431, request("GET /channels/chat HTTP/1.1", *headers(2000))),
    # Beside the value there are 22 bytes: "host", "h", "connection", "close", "x".
    "headers of 32 KiB less one": (200, request("GET /channels/chat HTTP/1.1", "X: " + "v" * (32_768 - 22))),
    "headers of 32 KiB": (200, request("GET /channels/chat HTTP/1.1", "X: " + "v" * (32_768 - 21))),
    "headers of 32 KiB and one": (431, request("GET /channels/chat HTTP/1.1", "X: " + "v" * (32_768 - 20))),
    "a request of the most bytes less one": (201, request(POST, TYPE, sized(MOST - 1), body=padded(MOST - 1))),
    "a request of the most bytes": (201, request(POST, TYPE, sized(MOST), body=padded(MOST))),
    "a request of one more": (413, request(POST, TYPE, sized(MOST + 1), body=padded(MOST + 1))),
    "chunks of the most bytes": (201, request(POST, TYPE, "Transfer-Encoding: chunked", body=chunked(padded(MOST)))),
    "chunks of one more": (413, request(POST, TYPE, "Transfer-Encoding: chunked", body=chunked(padded(MOST + 1)))),
    "a length of 20 digits": (413, request(POST, TYPE, sized(10**20 - 1), body=b"{")),
    "a client that waits for leave": (413, request(POST, TYPE, "Expect: 100-continue", sized(99_999_999))),
    "HTTP/1.0": (200, b"GET /healthz HTTP/1.0\r\n\r\n"),
    "a WebSocket": (403, request("GET /channels/chat HTTP/1.1").replace(b"Connection: close\r\n", b"").replace(
        b"\r\n\r\n", b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n")),
}  # fmt: skip


@pytest.mark.parametrize(("status", "sent"), BYTES.values(), ids=BYTES)
async def test_bytes_are_answered_once(serving: tuple[int, Path], shared: str, status: int, sent: bytes) -> None:
    before = rows(shared)
    answer = await exchange(serving[0], sent)
    assert status_of(answer) == status
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    if status == 201:
        assert rows(shared) != before
    else:
        assert rows(shared) == before
    assert "Traceback" not in serving[1].read_text()


async def test_a_body_that_is_cut_off_stores_nothing(serving: tuple[int, Path], shared: str) -> None:
    before = rows(shared)
    for sent in (
        request(POST, TYPE, sized(100), body=b'{"body":1}'),
        request(POST, TYPE, "Transfer-Encoding: chunked", body=b'a\r\n{"body":1}\r\n'),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", serving[0])
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(10):
            assert b" 201 " not in await reader.read()
        writer.close()
    assert rows(shared) == before


async def test_requests_in_a_row_are_answered_in_order(serving: tuple[int, Path]) -> None:
    def get(path: str, last: bool = False) -> bytes:
        return request(f"GET {path} HTTP/1.1") if last else f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()

    sent = get("/channels/chat") + get("/nothing") + get("/channels/chat?limit=0") + get("/healthz", last=True)
    answer = await exchange(serving[0], sent)
    assert [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200, 404, 400, 200]


async def drip(port: int, start: bytes, every: float, piece: bytes) -> tuple[bytes, float]:
    """Send bytes now and then until the server has had enough: its answer, and after how many seconds it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    writer.write(start)

    async def drip_on() -> None:
        while True:
            await asyncio.sleep(every)
            writer.write(piece)

    dripping = asyncio.create_task(drip_on())
    try:
        async with asyncio.timeout(40):
            try:
                answer = await reader.read()
            except ConnectionError:
                answer = b""
        return answer, time.monotonic() - began
    finally:
        dripping.cancel()
        writer.transport.abort()


async def test_a_slow_client_is_given_ten_seconds_for_a_head_and_fifteen_for_a_body(
    serving: tuple[int, Path], shared: str
) -> None:
    """All at once, because it takes as long as it says; with the defaults of `pgchan serve`."""
    port, _ = serving
    before = rows(shared)
    head = b"GET /healthz HTTP/1.1\r\nHost: h\r\n"

    async def finish(start: bytes, seconds: float, rest: bytes) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        await asyncio.sleep(seconds)
        writer.write(rest)
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        return status_of(answer)

    async def watch() -> int:
        async with follow(port, "/channels/watched?after=now") as reader, AsyncClient(shared) as client:
            await reader.next()
            await asyncio.sleep(12)
            await client.channel("watched").publish("still here")
            return len(message_of(await reader.next())["body"])

    post = request(POST, TYPE, sized(100), body=b"{")
    silent, dripped, body, refused, in_time, in_time_body, stream = await asyncio.gather(
        drip(port, b"", 60, b""),
        drip(port, head, 1, b"X: y\r\n"),
        drip(port, post, 1, b" "),
        drip(port, request(POST, TYPE, sized(10**8), body=b"{").replace(b"close", b"x"), 1, b" "),
        finish(head, 8, b"\r\n"),
        finish(request(POST, TYPE, sized(10), body=b"{"), 12, b'"body":1}'),
        watch(),
    )
    for answer, seconds in (silent, dripped):
        assert answer == b""
        assert 9.5 < seconds < 14
    assert status_of(body[0]) == 408
    assert 14.5 < body[1] < 19
    assert status_of(refused[0]) == 413
    assert 9.5 < refused[1] < 14
    assert (in_time, in_time_body, stream) == (200, 201, len("still here"))
    assert len(rows(shared)[0][1]) > len(before[0][1])


@pytest.fixture
async def quick(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """The server in this process, which waits for a tenth of a second."""
    monkeypatch.setattr(sys.modules["pgchan.server.serve"], "HEAD_SECONDS", 0.1)  # the package has a function `serve`
    client = AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.01)
    async with Running(create_app(client, auth=Insecure())) as served:
        yield served
    await client.close()


SLOW: dict[str, bytes] = {
    "nothing": b"", "a piece of a head": b"GET /healthz HTTP/1.1\r\n",
    "a piece of the next head": b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET /healthz HTT",
    "the rest of a body that was refused": b"POST /channels/c HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n{",
}  # fmt: skip


@pytest.mark.parametrize("start", SLOW.values(), ids=SLOW)
async def test_a_byte_now_and_then_is_no_reason_to_wait(quick: Running, start: bytes) -> None:
    _, seconds = await drip(quick.port, start, 0.02, b"" if not start else b" ")
    assert 0.05 < seconds < 5


async def test_an_idle_connection_is_kept_for_longer_than_a_head_may_take(quick: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", quick.port)
    for _ in range(3):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"}")
        await asyncio.sleep(0.3)
    writer.transport.abort()


# ---- in other files

ELSEWHERE = {
    "no token, or none that counts": "test_server_auth.anything_else_is_nobody",
    "no auth at all": "test_server_auth.without_auth_everything_is_denied",
    "no right, or an unknown name": "test_server_auth.forbidden_and_unknown_are_the_same_to_a_byte",
    "a stream whose cursor is trimmed": "test_server_stream.a_reader_behind_the_trim_boundary_is_told_and_goes_on",
    "a stream whose cursor is lost": "test_server_stream.a_reader_whose_history_is_gone_is_told_and_starts_again",
    "header and query of a stream differ": "test_server_stream.the_header_wins_over_the_query",
    "a stream over HTTP/1.0": "test_server_stream.an_old_client_gets_the_stream_until_the_connection_closes",
    "a client that takes nothing": "test_server_stream.a_reader_that_takes_nothing_is_cut_and_resumes_exactly",
    "a foreign origin": "test_server.a_foreign_page_is_refused",
    "the database is down": "test_server.without_a_database_it_is_unavailable_for_now",
    "the database is down, a stream": "test_server_stream.a_new_stream_waits_for_a_database_that_is_away",
    "the database has no tables": "test_server.a_database_without_the_schema_is_unfit",
    "a defect": "test_server.a_defect_says_nothing_about_itself",
}


@pytest.mark.parametrize("name", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_case_is_tested_in_its_own_file(name: str) -> None:
    module, _, test = name.partition(".")
    text = (Path(__file__).parent / f"{module}.py").read_text("utf-8")
    assert re.search(rf"^(async )?def test_{test}\(", text, re.MULTILINE)
