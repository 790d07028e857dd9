"""The browser client, in a browser, against a server that says exactly what each test wants it to say."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from selenium.webdriver import Chrome

STATIC = Path(__file__).parent.parent / "server" / "static"
Answer = Callable[["Request"], None]


def cursor(position: int) -> str:
    return f"{position:016d}_{1_795_190_400_000_000 + position if position else 0:016d}"


def message(position: int, body: Any = None, **more: Any) -> dict[str, Any]:
    return {"position": position, "cursor": cursor(position), "kind": "message", "body": body, **more}


def event(data: Any, kind: str = "message", ends: str = "\n") -> bytes:
    id_line = f"id: {data['cursor']}{ends}" if kind != "end" else ""
    return f"{id_line}event: {kind}{ends}data: {json.dumps(data, ensure_ascii=False)}{ends}{ends}".encode()


END = event({"cursor": cursor(0)}, "end")


class Request(BaseHTTPRequestHandler):
    """One request; the server's next answer is played to it."""

    server: Server

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path)
        if path.path == "/":
            return self.say(200, "text/html", b"<!doctype html><title>client</title>")
        if path.path == "/pgchan.js":
            return self.say(200, "text/javascript", (STATIC / "pgchan.js").read_bytes())
        if path.path == "/favicon.ico":
            return self.say(404, "text/plain", b"")
        self.play({"after": urllib.parse.parse_qs(path.query)["after"][0], "accept": self.headers["Accept"]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.play({"path": self.path, "body": json.loads(body), "key": self.headers["Idempotency-Key"]})

    def play(self, seen: dict[str, Any]) -> None:
        self.server.seen.append(seen | {"id": self.headers["Last-Event-ID"], "token": self.headers["Authorization"]})
        self.server.answers.pop(0)(self)

    def say(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *parts: bytes) -> None:
        """Server-sent events, a write for each part, then the end of the body."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for part in (b"retry: 20\n\n", *parts):
            self.wfile.write(part)
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: list[Answer] = []
        self.seen: list[dict[str, Any]] = []


def streaming(*parts: bytes) -> Answer:
    return lambda request: request.stream(*parts)


def refusing(status: int, problem: dict[str, Any] | None = None, **headers: str) -> Answer:
    body = json.dumps(problem or {}).encode()
    return lambda request: request.say(status, "application/problem+json", body, **headers)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as found:
        yield found


@pytest.fixture
def server(browser: Chrome) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    browser.get(f"http://127.0.0.1:{made.server_port}/")
    yield made
    browser.get("about:blank")
    made.shutdown()
    thread.join()
    made.server_close()


def run(browser: Chrome, script: str) -> Any:
    """What the body of an async function returns that has the client's exports, or {"error": …} of what it throws."""
    return browser.execute_async_script(
        "const done = arguments[0]; import('/pgchan.js').then(async ({connect, fold, parse}) => {"
        + script
        + "}).then(done, (e) => done({error: e.name, status: e.status, code: e.code, message: e.message}))"
    )


READ_ALL = "const got = []; for await (const m of connect('/channels/a', OPTIONS)) got.push(m); "


def read_all(browser: Chrome, options: str = "{}") -> Any:
    return run(browser, READ_ALL.replace("OPTIONS", options) + "return got")


def test_a_body_that_just_ends_is_continued_at_the_cursor(browser: Chrome, server: Server) -> None:
    server.answers = [
        streaming(event(message(1, "a")), event(message(2, "b"))),
        streaming(event(message(3, "c")), END),
    ]
    assert [m["body"] for m in read_all(browser)] == ["a", "b", "c"]
    assert [(seen["after"], seen["id"]) for seen in server.seen] == [("0", None), (cursor(2), cursor(2))]


def test_a_message_that_was_seen_is_not_given_out_again(browser: Chrome, server: Server) -> None:
    server.answers = [
        streaming(event(message(1)), event(message(2))),
        streaming(event(message(2)), event(message(3)), event(message(3)), END),
    ]
    assert [m["position"] for m in read_all(browser)] == [1, 2, 3]


def test_the_place_where_a_reader_stands_is_known_before_its_first_message(browser: Chrome, server: Server) -> None:
    server.answers = [streaming(f"id: {cursor(41)}\n\n".encode()), streaming(event(message(42)), END)]
    assert [m["position"] for m in read_all(browser, "{after: 'now'}")] == [42]
    assert [seen["after"] for seen in server.seen] == ["now", cursor(41)]


def test_characters_and_lines_may_be_cut_anywhere(browser: Chrome, server: Server) -> None:
    whole = event(message(1, "é€😀"), ends="\r\n") + b": hb\r\r" + event(message(2, "ok"), ends="\r") + END
    server.answers = [streaming(*(whole[n : n + 1] for n in range(len(whole))))]
    assert [m["body"] for m in read_all(browser)] == ["é€😀", "ok"]


def test_an_overloaded_server_is_asked_again(browser: Chrome, server: Server) -> None:
    server.answers = [refusing(503, Retry_After="0.01"), refusing(429), streaming(event(message(1)), END)]
    assert len(read_all(browser)) == 1


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_for_good_is_thrown(browser: Chrome, server: Server, status: int) -> None:
    server.answers = [refusing(status, {"title": "no", "code": "why"})]
    assert read_all(browser) == {"error": "ChannelError", "status": status, "code": "why", "message": "no"}


def test_a_token_that_is_not_taken_is_renewed_once(browser: Chrome, server: Server) -> None:
    server.answers = [refusing(401), streaming(event(message(1)), END)]
    read = READ_ALL.replace("OPTIONS", "{token: async () => tokens.shift()}")
    got = run(browser, f"const tokens = ['old', 'new']; {read} return got.length")
    assert got == 1
    assert [seen["token"] for seen in server.seen] == ["Bearer old", "Bearer new"]
    server.answers = [refusing(401), refusing(401, {"title": "no"})]
    assert read_all(browser, "{token: () => 'bad'}")["status"] == 401


def test_a_closed_channel_with_nothing_left_ends_the_iteration(browser: Chrome, server: Server) -> None:
    server.answers = [streaming(event(message(1))), lambda request: request.say(204, "text/plain", b"")]
    assert len(read_all(browser)) == 1


def test_a_lost_position_is_told_and_reading_goes_on_from_the_new_one(browser: Chrome, server: Server) -> None:
    reset = {"reason": "history_lost", "first": 1, "last": 2, "cursor": cursor(0)}
    server.answers = [
        streaming(event(message(8)), event(reset, "reset"), event(message(1))),
        streaming(event(message(2)), END),
    ]
    assert [(m["kind"], m["position"]) for m in read_all(browser)] == [
        ("message", 8), ("reset", 0), ("message", 1), ("message", 2),
    ]  # fmt: skip
    assert server.seen[1]["after"] == cursor(1)


def test_a_connection_that_is_dropped_resumes_exactly(browser: Chrome, server: Server) -> None:
    hold = threading.Event()

    def first(request: Request) -> None:
        request.stream(event(message(1)), event(message(2)))
        hold.wait(10)

    server.answers = [first, streaming(event(message(3)), END)]
    got = run(browser, """
        const states = [], positions = []
        const channel = connect('/channels/a', {onstate: (state) => states.push(state)})
        for await (const m of channel) { positions.push(m.position); if (m.position === 2) channel.reconnect(30) }
        return [positions, states]""")  # fmt: skip
    hold.set()
    assert got == [[1, 2, 3], ["connecting", "live", "waiting", "connecting", "live", "ended"]]
    assert server.seen[1]["after"] == cursor(2)


def test_leaving_the_loop_closes_the_connection(browser: Chrome, server: Server) -> None:
    server.answers = [streaming(event(message(1)), event(message(2)))]
    got = run(browser, "const c = connect('/channels/a'); for await (const m of c) break; return [c.state, c.position]")
    assert got == ["closed", 1]


def test_publish_and_signal_post_their_body(browser: Chrome, server: Server) -> None:
    server.answers = [lambda request: request.say(201, "application/json", b'{"position": 5}')] * 2
    got = run(browser, """
        const channel = connect('/channels/chat/42')
        return [await channel.publish({a: 1}, {key: 'k'}), await channel.signal('stop')]""")  # fmt: skip
    assert got == [{"position": 5}] * 2
    assert [(seen["path"], seen["body"], seen["key"]) for seen in server.seen] == [
        ("/channels/chat/42", {"body": {"a": 1}}, "k"), ("/runs/chat/42/signals", {"body": "stop"}, None),
    ]  # fmt: skip


def test_fold_drops_what_a_reset_voids_and_nothing_else(browser: Chrome, server: Server) -> None:
    def of(position: int, step: str | None, attempt: int | None) -> dict[str, Any]:
        return message(position, step=step, attempt=attempt)

    reset = message(6, {"type": "reset", "step": "write", "attempt": 3, "from": 3}, kind="control")
    told = [
        of(1, None, None), of(2, "write", 1), of(3, "write", 2), of(4, "other", 1), of(5, "write", 2), reset,
        of(7, "write", 3),
    ]  # fmt: skip
    got = run(browser, f"""
        const standing = [], fallen = []
        for (const m of {json.dumps(told)}) fallen.push(...fold(standing, m))
        return [standing.map((m) => m.position), fallen.map((m) => m.position)]""")  # fmt: skip
    assert got == [[1, 2, 4, 6, 7], [3, 5]]


def test_fold_drops_everything_where_a_channel_was_compacted(browser: Chrome, server: Server) -> None:
    told = [
        message(2), message(3, step="write", attempt=1), message(4, "stop", kind="signal"),
        message(5, {"type": "ended"}, kind="control"), message(6, {"type": "reset", "from": 3}, kind="control"),
        message(7, step="write", attempt=1),
    ]  # fmt: skip
    got = run(browser, f"""
        const standing = [], fallen = []
        for (const m of {json.dumps(told)}) fallen.push(...fold(standing, m))
        return [standing.map((m) => m.position), fallen.map((m) => m.position)]""")  # fmt: skip
    assert got == [[2, 6, 7], [3, 4, 5]]
