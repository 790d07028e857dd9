"""What reads bytes from outside, against references that were written apart, with input made at random.

    python tests/fuzzing.py --seconds 60 --seed 1 [--target json] [--executions 10000000]

prints for each target how often it was executed, how fast, and what crashed; the status is 1 if anything did. A crash
is any exception: a check that fails, or one that the code should not have raised. The same checks run in test_fuzz.py
under hypothesis, which makes what fails smaller. Long, for targets, references and generators stand beside each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import string
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from urllib.parse import unquote

from serving import WORDS_OF_OURS

from pgchan import AsyncClient, InvalidInput, Message, codec, dsn, names
from pgchan.server import create_app
from pgchan.server.auth import compile_pattern
from pgchan.server.sse import frame, in_chunks
from pgchan.wakeups import LISTEN_NAMES, Hub

ASCII = string.ascii_letters + string.digits
NASTY = "\0\t\n\r\v\f \x1b\x7f\x85\xa0é٣２²\u0430\u200b\u202e\u2028\u2029\ufeff\ufffd😀\ud800\udfff"


# ------------------------------------------------------------------------------------------------ references


class EventSource:
    """An event stream's reader, as the HTML standard has it (9.2.6), fed with bytes in any pieces."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []  # type, data, last event id
        self.retry: int | None = None
        self._last_id = ""
        self._type, self._data = "", ""
        self._line = b""
        self._after_cr = False
        self._is_first = True

    def feed(self, piece: bytes) -> None:
        if piece and self._after_cr:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if piece.endswith(b"\r"):
            self._after_cr = True
        *lines, self._line = (self._line + piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n")
        for line in lines:
            self._take(line.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        if self._is_first:
            line, self._is_first = line.removeprefix("\ufeff"), False
        if line == "":
            if self._data:
                self.events.append((self._type or "message", self._data.removesuffix("\n"), self._last_id))
            self._type, self._data = "", ""
            return
        if line.startswith(":"):
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._type = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id" and "\0" not in value:
            self._last_id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)


def is_legal_name(text: str) -> bool:
    """A channel's name, spelled out."""
    if not 0 < len(text) < 201 or text[:7] == "pgchan:":
        return False
    if not set(text) <= set(ASCII + "._:/@~+=-"):
        return False
    return not {"", ".", ".."} & set(text.split("/"))


def is_legal_pattern(pattern: str) -> bool:
    """A token's pattern: stars stand alone in a segment, two of them in the last."""
    segments = pattern.replace(":", "/").split("/")
    return all("*" not in segment or segment == "*" for segment in segments[:-1]) and (
        "*" not in segments[-1] or segments[-1] in ("*", "**")
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a legal pattern covers a legal name: segment by segment, without an expression."""
    while True:
        if pattern == "**":
            return name != ""
        both = (pattern, name)
        ends = [min((at for at in (text.find("/"), text.find(":")) if at >= 0), default=-1) for text in both]
        wanted, found = [text if end < 0 else text[:end] for text, end in zip(both, ends, strict=True)]
        if wanted != found and not (wanted == "*" and found):
            return False
        if min(ends) < 0 or pattern[ends[0]] != name[ends[1]]:
            return max(ends) < 0
        pattern, name = pattern[ends[0] + 1 :], name[ends[1] + 1 :]


def is_storable(value: Any) -> bool:
    """Whether a JSON value is one that every reader understands alike; without recursion."""
    waiting = [(value, 0)]
    while waiting:
        inner, depth = waiting.pop()
        if isinstance(inner, dict | list):
            if depth == names.BODY_DEPTH_MAX:
                return False
            waiting += [(each, depth + 1) for each in (inner.values() if isinstance(inner, dict) else inner)]
            waiting += [(key, depth + 1) for key in (inner if isinstance(inner, dict) else ())]
        elif isinstance(inner, str):
            if any("\ud800" <= character <= "\udfff" for character in inner):
                return False
        elif isinstance(inner, float) and not math.isfinite(inner):
            return False
    return True


def reference_json(raw: bytes) -> tuple[Any] | None:
    """The value of JSON text, in a tuple, if it can be stored."""
    try:
        found = json.loads(raw.decode("utf-8", "strict"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return (found,) if is_storable(found) else None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _finite(digits: str) -> float:
    if abs(found := float(digits)) > sys.float_info.max:
        raise ValueError("Infinity")  # refused wherever it stands, also where a later member of that name hides it
    return found


# ------------------------------------------------------------------------------------------------ checks


def said_in(refusal: InvalidInput, most: int) -> str:
    """The text of a refusal, which is short and can be written in UTF-8, whatever was refused."""
    text = str(refusal)
    assert len(text) < most
    text.encode()
    return text


def check_cursor(text: str) -> None:
    """What is taken for a cursor is one, to the last character."""
    legal = len(text) == 33 and text[16] == "_" and set(text[:16] + text[17:]) <= set(string.digits)
    try:
        found = names.parse_after(text)
    except InvalidInput as refusal:
        said_in(refusal, 400)
        assert not legal and text != "now"
        return
    if text == "now":
        assert found is None
        return
    assert legal and found is not None
    assert names.format_cursor(found[0], found[1] or 0) == text


def check_name(text: str) -> None:
    """A name, a run's id, a key and a label are what they are said to be."""
    legal = is_legal_name(text)
    assert _is_taken(names.check_name, text) == legal
    assert _is_taken(names.check_run, text) == (
        legal and text.split("/")[-1] not in ("signals", "cancel", "resume", "fork", "journal", "result")
    )
    in_utf8 = text.encode("utf-8", "surrogatepass")
    is_clean = not any("\ud800" <= character <= "\udfff" for character in text)
    is_ours = text.startswith("pgchan:")
    assert _is_taken(names.check_key, text) == (
        is_clean and 0 < len(in_utf8) <= 200 and "\0" not in text and not is_ours
    )
    assert _is_taken(lambda text: names.check_label(text, "queue"), text) == (
        text.isprintable() and 0 < len(in_utf8) <= 180 and not is_ours
    )
    assert _is_taken(lambda text: names.check_beginning(text, "prefix"), text) == (
        len(text) <= 200 and set(text) <= set(ASCII + "._:/@~+=-")
    )


def _is_taken(check: Callable[[str], Any], text: str) -> bool:
    try:
        found = check(text)
    except InvalidInput as refusal:
        said_in(refusal, 2_500)  # a name of 200 characters may be written out as escapes
        return False
    assert found == text
    return True


def check_json(raw: bytes) -> None:
    """JSON from outside is taken if, and only if, it can be stored and comes back equal."""
    wanted = reference_json(raw)
    try:
        found = codec.parse(raw)
    except InvalidInput as refusal:
        said_in(refusal, 500)
        assert wanted is None
        return
    assert wanted is not None
    assert repr(found) == repr(wanted[0])
    check_body(found)


def check_body(value: Any) -> None:
    """What is stored of a body comes back equal; what cannot be stored is refused."""
    try:
        raw = codec.encode(value)
    except InvalidInput as refusal:
        said_in(refusal, 500)
        return
    assert len(raw) <= names.BODY_BYTES_MAX
    assert repr(codec.decode(raw)) == repr(value)
    assert codec.encode(codec.decode(raw)) == raw


def check_frames(messages: list[tuple[bytes, str, str | None]], cut: Callable[[int], list[int]]) -> None:
    """Each message is one event, whole and unchanged, wherever the network cuts the stream.

    messages: body, content type and key. cut: where to cut so many bytes.
    """
    at = datetime(2024, 5, 6, tzinfo=UTC)
    made = [
        Message("chat/42", n, at + timedelta(microseconds=n), "message", raw, key, None, None, content_type)
        for n, (raw, content_type, key) in enumerate(messages, 1)
    ]
    sent = b"".join(in_chunks(frame(message) for message in made))
    reader = EventSource()
    start = 0
    for end in [*cut(len(sent)), len(sent)]:
        reader.feed(sent[start:end])
        start = end
    assert [(type, last_id) for type, _, last_id in reader.events] == [("message", message.cursor) for message in made]
    for message, (_, data, _) in zip(made, reader.events, strict=True):
        shown = json.loads(data)
        assert repr(shown) == repr(json.loads(message.to_json()))
        if not isinstance(message.body, bytes):
            assert repr(shown["body"]) == repr(message.body)
        assert shown["key"] == message.key


def check_pattern(pattern: str, name: str) -> None:
    """A token's pattern covers what a simple matcher says, and nothing else."""
    try:
        found = bool(compile_pattern(pattern).fullmatch(name))
    except InvalidInput:
        assert not is_legal_pattern(pattern)
        return
    assert is_legal_pattern(pattern)
    if is_legal_name(name):
        assert found == matches(pattern, name)


def check_notify(name: str, payload: str) -> None:
    """Whatever is announced, by anybody: at most a read of what is followed."""
    hub = Hub(lambda followed: None)
    heard: list[int] = []
    hub.on_queue(7, lambda: heard.append(7))
    for number, channel in enumerate(("a", "b", "new")):
        hub.follow(channel)
        if channel != "new":
            hub.looked_up([(channel, number + 1, 10, None, False, "application/json")], fresh=True)
    news = hub.heard(name, payload)
    found = hub.next_read()
    if name == "pgchan_new":
        assert (news, hub.unknown_names(), found) == (True, ["new"], None)
    elif name == "pgchan_queue":
        assert not news and found is None
    else:
        assert news == (found is not None)
        ids = found[1][0] if found is not None else []
        assert set(ids if isinstance(ids, list) else [ids]) <= {1, 2}
        if payload in ("1:11", "1:-1"):
            assert news
    assert hub.next_read() is None


def check_dsn(text: str) -> None:
    """A DSN is made one that both drivers take, or refused without a part of it being shown."""
    try:
        found = dsn.resolve(text)
    except InvalidInput as refusal:
        said = said_in(refusal, 200).replace(dsn.WANTED, "")
        assert not [part for part in re.split("[/@:?#%]", text) if len(part) > 8 and part in said]
        return
    assert found.startswith("postgresql://")
    assert dsn.resolve(found) == found


class Http:
    """The application in this process, asked through its ASGI interface and nothing in between."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        """client: of a database in which everything is allowed; without it every right is refused, after all else was
        looked at."""
        self._loop = asyncio.new_event_loop()
        self._client = client or AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.001)
        self._is_allowed = client is not None
        self._app = create_app(self._client, auth=self._may)
        self.statuses: dict[int, int] = {}

    async def _may(self, request: Any, operation: str, channel: str) -> bool:
        return self._is_allowed

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    def check(self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """An answer is never 5xx but 503, is a problem document if it refuses, and tells nothing of what is behind."""
        status, kind, answer = self._loop.run_until_complete(self._ask(method, target, headers, body))
        self.statuses[status] = self.statuses.get(status, 0) + 1
        assert status < 500 or (status == 503 and self._is_allowed), (status, answer)
        if status >= 400 and method != "HEAD":
            assert kind == b"application/problem+json"
            found = json.loads(answer)
            assert found["status"] == status and found["code"]
            assert len(answer) < 2_000
            # Of what the caller sent some may be named again, so only what no caller has sent tells.
            sent = (target + body + b"".join(value for _, value in headers)).decode("latin-1").lower()
            for word in WORDS_OF_OURS:
                assert word not in answer.decode().lower() or word in unquote(sent), answer

    async def _ask(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes, bytes]:
        path, _, query = target.partition(b"?")
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        said: list[dict[str, Any]] = []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote(path.decode("ascii")), "raw_path": path, "query_string": query, "root_path": "",
            "headers": [(b"host", b"h"), *headers], "server": ("h", 80), "client": ("c", 1),
        }  # fmt: skip

        async def receive() -> Any:
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            said.append(message)

        await asyncio.wait_for(self._app(scope, receive, send), 20)
        kinds = [value for name, value in said[0]["headers"] if name == b"content-type"]
        return said[0]["status"], b"".join(kinds), b"".join(message.get("body", b"") for message in said[1:])


# ------------------------------------------------------------------------------------------------ generators


@dataclass
class Target:
    """What is executed: `make` draws an input, `check` raises where something is wrong with it."""

    make: Callable[[Random], tuple[Any, ...]]
    check: Callable[..., None]
    close: Callable[[], None] = field(default=lambda: None)


def text(random: Random, alphabet: str, most: int = 40) -> str:
    """A few characters of the alphabet, seldom many."""
    length = min(int(random.expovariate(0.15)), most) if random.random() < 0.98 else random.randrange(8 * most)
    return "".join(random.choices(alphabet, k=length))


def mutate(random: Random, seeds: Iterable[str], alphabet: str) -> str:
    """A seed with a few changes, or something of its own."""
    if random.random() < 0.1:
        return text(random, alphabet)
    found = random.choice(list(seeds))
    for _ in range(random.randrange(4)):
        start = random.randrange(len(found) + 1)
        end = min(len(found), start + random.randrange(4))
        piece = random.choice((
            "", text(random, alphabet, 3), found[start:end] * 2, random.choice(list(seeds)), found[end : end + 5],
        ))  # fmt: skip
        found = found[:start] + piece + found[end:]
    return found


CURSORS = ("0" * 16 + "_" + "0" * 16, "0000000000000042_1795190400123456", "9" * 16 + "_" + "9" * 16, "now", "1")
NAMES = ("chat/42", "a.b:c@d~e+f=g-h_i", "pgchan:x", "runs/x/cancel", "../x", "a//b", ".", "x" * 199, "a:fork")
PATTERNS = ("chat/42", "chat/*", "chat/**", "a:*:c", "**", "*", "a/*/b:**", "a.b", "a/**/b", "", "*a", "a::b")
HINTS = ("1:11", "1:11,2:12", "3:1", "-1", "1:-1", "7", "1:" + "9" * 30, ",,", "1", ":", "2:11," * 500, "1_0:1_1")
DSNS = (
    "postgresql://user:s3cret-w0rd@host:5432/database", "postgres://u@[::1]:1/d?sslmode=require", "mysql://x", "",
    "postgresql+asyncpg://a:1,b:2/d?target_session_attrs=read-write", "postgresql:///d?host=/run/postgresql",
    "host=localhost password=s3cret-w0rd", "postgresql://u:s3cret%40w0rd@h/d#x",
)  # fmt: skip
DOCUMENTS = (
    '{"a":[1,2.5,-0.0,1e308,true,null],"b":{"c":"é\\u0000\\ud83d\\ude00"}}', '"\\ud800"', "NaN", "[Infinity]", "1e400",
    "[" * 64 + "]" * 64, "[" * 65 + "]" * 65, '{"a":' * 70 + "1" + "}" * 70, "9" * 4_301, "1" + "0" * 400, '" \\n"',
    ' {\r\n"a" :\t1 }\n', "[1,]", "{'a':1}", '{"a":1,"a":2}', "\ufeff1", "", '"\u2028\x7f"', "-0", "01", "1.", '"\t"',
)  # fmt: skip
METHODS = ("GET", "GET", "GET", "POST", "POST", "POST", "DELETE", "HEAD", "PUT", "OPTIONS", "BREW")
TARGETS = (
    "/channels/chat/42", "/channels/c?after=1&limit=2&view=raw", "/channels/c?wait=0.1&after=now", "/runs", "/runs/r",
    f"/channels/c?after={CURSORS[1]}", "/runs/r/journal?after=1", "/runs/r/signals", "/runs/r/result?wait=0",
    "/runs/r/fork", "/runs/r/cancel", "/runs/r/resume", "/runs?state=failed&workflow=w&queue=q&after=r&limit=3",
    "/channels/%2e%2e%2fx", "/channels/a%00b", "/channels/a%0d%0ab", "/healthz", "/pgchan.js", "/nothing", "//", "*",
    "/channels/" + "n" * 201, "/channels/c?x=" + "y" * 8_200, "/channels/%c0%af", "/runs?workflow=%00&queue=%ff",
)  # fmt: skip
HEADERS: dict[str, tuple[str, ...]] = {
    "content-type": ("application/json", "application/json; charset=utf-8", "text/plain", "", "APPLICATION/JSON"),
    "accept": ("application/json", "text/event-stream", "*/*;q=0.1", "text/html", "a;q=x, ,;", "text/*;q=0.00000"),
    "last-event-id": CURSORS, "idempotency-key": ("k", "", "pgchan:k", "k" * 201, "\xff"), "x-request-id": ("a", "<"),
    "origin": ("http://h", "https://evil.example", "null", "x"), "sec-fetch-site": ("same-origin", "cross-site"),
    "content-length": ("5", "99999999", "x", "-1", "1" * 5_000), "transfer-encoding": ("chunked",),
    "content-encoding": ("gzip", "identity"), "authorization": ("Bearer x", "Basic eDp5"), "x": ("y" * 40_000,),
}  # fmt: skip
BODIES = (
    '{"body":1}', '{"body":"x","close":true}', '{"workflow":"w","args":[1],"kwargs":{"a":2},"id":"r/1"}',
    '{"workflow":"w","queue":"q","priority":1,"delay":0.5,"timeout":9}', '{"step":"s","id":"f"}', "{}", "",
    '{"workflow":"w","delay":' + "9" * 400 + "}", '{"body":{"\\ud800":1}}', '{"body":' + "[" * 65 + "]" * 65 + "}",
)  # fmt: skip


GOOD = (
    ("POST", "/channels/chat/42", '{"body":1}'), ("POST", "/runs", BODIES[2]), ("POST", "/runs", BODIES[3]),
    ("POST", "/runs/r/1/signals", '{"body":1}'), ("POST", "/runs/r/1/fork", BODIES[4]), ("GET", "/runs/r/1", ""),
    ("POST", "/runs/r/1/cancel", ""), ("GET", "/runs/r/1/result", ""), ("DELETE", "/channels/chat/42", ""),
)  # fmt: skip


def make_json(random: Random) -> tuple[bytes]:
    raw = mutate(random, DOCUMENTS, '{}[]:,"\\0123456789eE+-. \ttruefalsn\\u' + NASTY)
    return (raw.encode("utf-8", random.choice(("surrogatepass", "replace"))),)


def make_value(random: Random, depth: int = 0) -> Any:
    kind = random.randrange(8 if depth < 6 else 6)
    if kind == 6:
        return [make_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {text(random, ASCII + NASTY, 4): make_value(random, depth + 1) for _ in range(random.randrange(4))}
    return (
        None, random.random() < 0.5, random.randrange(-(2**70), 2**70),
        random.choice((0.1, -0.0, 1e308, 5e-324, math.nan)), text(random, ASCII + '"\\' + NASTY), random.randrange(10),
    )[kind]  # fmt: skip


def make_frames(random: Random) -> tuple[Any, ...]:
    messages = []
    for _ in range(random.randrange(1, 4)):
        key = text(random, ASCII + NASTY[:-2], 10) if random.random() < 0.3 else None
        if random.random() < 0.5:
            value = json.dumps(make_body(random), ensure_ascii=random.random() < 0.5, indent=random.choice((None, 1)))
            white = random.choice(("\n", "\r", "\r\n", "\r\r\n \t"))
            messages.append((value.replace("\n", white).encode(), "application/json", key))
        else:
            raw = text(random, ASCII + ":" + NASTY[:-2]).encode() + random.randbytes(random.randrange(4))
            messages.append((raw, random.choice(("text/plain", "image/png")), key))
    return messages, lambda size: sorted(random.randrange(size + 1) for _ in range(random.randrange(6)))


def make_body(random: Random) -> Any:
    """A value that can be stored."""
    while not is_storable(found := make_value(random)):
        pass
    return found


def make_pattern(random: Random) -> tuple[str, str]:
    pattern = mutate(random, PATTERNS, "ab*/:.A+")
    if random.random() < 0.5:  # a name that is like the pattern
        return pattern, re.sub(r"\*+", lambda _: random.choice(("a", "b/a", "x:y", "")), pattern)
    return pattern, mutate(random, NAMES, "ab/:.A+")


def make_request(random: Random) -> tuple[Any, ...]:
    method, target, body = random.choice(GOOD)
    if random.random() < 0.6:
        method = random.choice(METHODS)
        target = mutate(random, TARGETS, ASCII + "/?&=%%%.:@*_-~+;")
        body = random.choice(BODIES)
    if random.random() < 0.5:
        body = mutate(random, (body, *BODIES), '{}[]:,"\\0123456789eE+-. truefalsn' + NASTY)
    headers = [] if random.random() < 0.2 else [(b"content-type", b"application/json")]
    for name in random.sample(list(HEADERS), min(len(HEADERS), int(random.expovariate(0.8)))):
        value = random.choice(HEADERS[name])
        if random.random() < 0.3:
            value = mutate(random, HEADERS[name], ASCII + "/;=,*\xe9")
        headers.append((name.encode(), value.encode("latin-1", "replace")))
    raw = target.encode("ascii", "replace").replace(b" ", b"%20")
    return method, raw, headers, body.encode("utf-8", "surrogatepass")


def _http() -> Target:
    http = Http()
    return Target(make_request, http.check, http.close)


TARGETS_BY_NAME: dict[str, Callable[[], Target]] = {
    "cursor": lambda: Target(lambda random: (mutate(random, CURSORS, "0123456789_" + NASTY),), check_cursor),
    "name": lambda: Target(lambda random: (mutate(random, NAMES, ASCII + "._:/@~+=-%" + NASTY),), check_name),
    "json": lambda: Target(make_json, check_json),
    "body": lambda: Target(lambda random: (make_value(random),), check_body),
    "frames": lambda: Target(make_frames, check_frames),
    "pattern": lambda: Target(make_pattern, check_pattern),
    "notify": lambda: Target(
        lambda random: (random.choice(LISTEN_NAMES), mutate(random, HINTS, "0123456789:,-+_ x" + NASTY)), check_notify
    ),
    "dsn": lambda: Target(lambda random: (mutate(random, DSNS, ASCII + "/@:?#%[],=" + NASTY),), check_dsn),
    "http": _http,
}

CRASHES_SHOWN = 3  # of a target


def run(name: str, seed: int, seconds: float, executions: int) -> Iterator[str]:
    """Execute a target for so long, or so often; yields what to print. The last line is the sum."""
    random = Random(f"{name} {seed}")
    target = TARGETS_BY_NAME[name]()
    done, crashes, began = 0, 0, time.perf_counter()
    while done < executions and time.perf_counter() - began < seconds:
        given = target.make(random)
        done += 1
        try:
            target.check(*given)
        except Exception:
            crashes += 1
            if crashes <= CRASHES_SHOWN:
                yield f"{name}: {given!a}\n{ascii_lines(traceback.format_exc(limit=-3))}"
    took = time.perf_counter() - began
    target.close()
    yield f"{name:<10}{done:>12,}{done / took:>14,.0f}{crashes:>10,}"


def ascii_lines(text: str) -> str:
    """The text, so that any terminal shows it."""
    return text.encode("ascii", "backslashreplace").decode()


def main() -> int:
    """Run the targets that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target")
    parser.add_argument("--executions", type=int, default=sys.maxsize, help="of each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS_BY_NAME), help="all by default")
    given = parser.parse_args()
    print(f"seed {given.seed}, Python {sys.version.split()[0]}")
    print(f"{'target':<10}{'executions':>12}{'a second':>14}{'crashes':>10}")
    failed = False
    for name in given.target or TARGETS_BY_NAME:
        for line in run(name, given.seed, given.seconds, given.executions):
            print(line, flush=True)
        failed = failed or not line.endswith(" 0")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
