"""The endpoint: pages, posts, what is refused and how. Long: a table of bad input has many rows.

Most requests go straight to the application; what depends on a socket goes through one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from cluster import Cluster, free_port
from serving import Running, calling, follow, problem, raw

from pgchan import AsyncClient, InvalidInput
from pgchan.server import Insecure, create_app, endpoint, routes

ZERO = "0000000000000000_0000000000000000"

Wait = Callable[..., Awaitable[None]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(dsn, timeout=5) as client:
        yield client


@pytest.fixture
async def http(client: AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(create_app(client, auth=Insecure())) as http:
        yield http


@pytest.fixture
async def nowhere() -> AsyncIterator[httpx.AsyncClient]:
    """Calls an application whose database cannot be reached: what is refused here was refused before it was asked."""
    client = AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.01)
    async with calling(create_app(client, auth=Insecure())) as http:
        yield http
    await client.close()


async def publish(client: AsyncClient, name: str, *bodies: Any) -> list[str]:
    return [(await client.channel(name).publish(body)).cursor for body in bodies]


# ---- pages


async def test_a_page_has_messages_cursor_head_and_state(client: AsyncClient, http: httpx.AsyncClient) -> None:
    cursors = await publish(client, "chat/42", "a", "b", "c")
    response = await http.get("/channels/chat/42", params={"limit": 2})
    page = response.json()
    assert [message["body"] for message in page["messages"]] == ["a", "b"]
    assert page["messages"][0].keys() == {
        "channel", "position", "cursor", "kind", "body", "key", "step", "attempt", "at"
    }  # fmt: skip
    assert (page["cursor"], page["head"], page["closed"]) == (cursors[1], 3, False)
    assert response.headers["stream-next-offset"] == cursors[1]
    assert "stream-up-to-date" not in response.headers
    await client.channel("chat/42").close()
    response = await http.get("/channels/chat/42", params={"after": page["cursor"]})
    assert [message["position"] for message in response.json()["messages"]] == [3]
    assert response.json()["closed"] is True
    assert response.headers["stream-up-to-date"] == response.headers["stream-closed"] == "true"


async def test_an_empty_page_repeats_the_place(client: AsyncClient, http: httpx.AsyncClient) -> None:
    empty = {"messages": [], "cursor": ZERO, "head": 0, "closed": False}
    assert (await http.get("/channels/new")).json() == empty
    assert (await http.get("/channels/new", params={"after": "now"})).json() == empty
    (cursor,) = await publish(client, "c", 1)
    for after in (cursor, "1", "now"):
        page = (await http.get("/channels/c", params={"after": after})).json()
        assert (page["messages"], page["cursor"]) == ([], cursor)


async def test_a_page_takes_a_place_from_the_header_too(client: AsyncClient, http: httpx.AsyncClient) -> None:
    cursors = await publish(client, "c", 1, 2)
    headers = {"Last-Event-ID": cursors[0]}
    assert [m["position"] for m in (await http.get("/channels/c", headers=headers)).json()["messages"]] == [2]
    response = await http.get("/channels/c", headers=headers, params={"after": cursors[0]})
    assert response.status_code == 200
    problem(await http.get("/channels/c", headers=headers, params={"after": cursors[1]}), 400, "invalid_input")


async def test_a_page_behind_a_lost_place_says_where_to_go_on(client: AsyncClient, http: httpx.AsyncClient) -> None:
    cursors = await publish(client, "c", *range(1, 6))
    await client.channel("c").trim(before=4)
    found = problem(await http.get("/channels/c", params={"after": cursors[0]}), 410, "trimmed")
    assert (found["first"], found["last"], found["cursor"]) == (4, 5, "0000000000000003_0000000000000000")
    page = (await http.get("/channels/c", params={"after": found["cursor"]})).json()
    assert [message["position"] for message in page["messages"]] == [4, 5]
    lost = "0000000000000005_0000000000000001"
    found = problem(await http.get("/channels/c", params={"after": lost}), 410, "history_lost")
    assert (found["first"], found["last"]) == (4, 5)
    problem(await http.get("/channels/c", params={"after": "6"}), 410, "history_lost")


async def test_a_long_poll_answers_with_the_first_message(
    client: AsyncClient, http: httpx.AsyncClient, wait_until: Wait
) -> None:
    (cursor,) = await publish(client, "c", 1)
    polling = asyncio.create_task(http.get("/channels/c", params={"after": cursor, "wait": "20"}))
    await wait_until(lambda: bool(client._db.listener.hub._by_name))
    await publish(client, "c", 2)
    page = (await asyncio.wait_for(polling, 5)).json()
    assert [message["position"] for message in page["messages"]] == [2]
    await wait_until(lambda: not client._db.listener.hub._by_name)


async def test_a_long_poll_waits_for_a_channel_that_does_not_exist_yet(
    client: AsyncClient, http: httpx.AsyncClient, wait_until: Wait
) -> None:
    polling = asyncio.create_task(http.get("/channels/new", params={"after": "now", "wait": "20"}))
    await wait_until(lambda: bool(client._db.listener.hub._by_name))
    await publish(client, "new", 1)
    assert len((await asyncio.wait_for(polling, 5)).json()["messages"]) == 1


async def test_a_long_poll_does_not_wait_where_there_is_an_answer(client: AsyncClient, http: httpx.AsyncClient) -> None:
    (cursor,) = await publish(client, "c", 1)
    async with asyncio.timeout(5):
        assert len((await http.get("/channels/c", params={"wait": 30})).json()["messages"]) == 1
        await client.channel("c").close()
        page = (await http.get("/channels/c", params={"after": cursor, "wait": 30})).json()
    assert (page["messages"], page["closed"]) == ([], True)


async def test_a_long_poll_ends_with_an_empty_page(client: AsyncClient, http: httpx.AsyncClient) -> None:
    (cursor,) = await publish(client, "c", 1)
    response = await http.get("/channels/c", params={"after": cursor, "wait": "0.05"})
    assert response.status_code == 200
    assert response.json() == {"messages": [], "cursor": cursor, "head": 1, "closed": False}


async def test_a_long_poll_ends_when_the_process_is_to_end(client: AsyncClient, wait_until: Wait) -> None:
    async with Running(create_app(client, auth=Insecure())) as served, httpx.AsyncClient(base_url=served.url) as http:
        polling = asyncio.create_task(http.get("/channels/c", params={"wait": 30}))
        await wait_until(lambda: bool(client._db.listener.hub._by_name))
        await served.stop()
        assert (await asyncio.wait_for(polling, 2)).json()["messages"] == []


async def test_a_text_is_a_string_and_bytes_are_base64(client: AsyncClient, http: httpx.AsyncClient) -> None:
    await client.channel("t").create("text/plain")
    await client.channel("b").create("application/octet-stream")
    assert (await http.post("/channels/t", json={"body": "zwölf\r\n\0"})).status_code == 201
    await publish(client, "b", b"\0\xff")
    assert (await http.get("/channels/t")).json()["messages"][0]["body"] == "zwölf\r\n\0"
    message = (await http.get("/channels/b")).json()["messages"][0]
    assert (message["body"], message["encoding"]) == ("AP8=", "base64")
    problem(await http.post("/channels/b", json={"body": "text"}), 400, "invalid_input")


async def test_head_tells_where_a_channel_ends(client: AsyncClient, http: httpx.AsyncClient) -> None:
    (cursor,) = await publish(client, "c", 1)
    headers = {"Accept": "text/event-stream"}  # must not start a stream
    response = await asyncio.wait_for(http.head("/channels/c", headers=headers), 5)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["stream-next-offset"] == cursor
    assert response.headers["cache-control"] == "no-store"
    assert "stream-closed" not in response.headers
    await client.channel("c").close()
    assert (await http.head("/channels/c")).headers["stream-closed"] == "true"
    assert (await http.head("/channels/new")).status_code == 404


# ---- posts


async def test_a_post_stores_a_message_and_returns_it(client: AsyncClient, http: httpx.AsyncClient) -> None:
    response = await http.post("/channels/a/b", json={"body": {"z": 1, "a": [None, 2**63, "\0"]}})
    (stored,) = await client.channel("a/b").read()
    assert response.status_code == 201
    assert response.content == stored.to_json()
    assert stored.raw == b'{"z":1,"a":[null,9223372036854775808,"\\u0000"]}'


async def test_a_post_is_repeated_safely_with_a_key(client: AsyncClient, http: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "order-42"}
    first = await http.post("/channels/c", json={"body": 1}, headers=headers)
    again = await http.post("/channels/c", json={"body": 1}, headers=headers)
    assert first.content == again.content
    assert again.status_code == 201
    assert len(await client.channel("c").read()) == 1
    response = await http.post("/channels/c", json={"body": 2}, headers=headers)
    assert problem(response, 409, "idempotency_conflict")["position"] == 1


async def test_a_post_can_close_the_channel(client: AsyncClient, http: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "last"}
    for _ in range(2):  # also when the answer was lost
        response = await http.post("/channels/c", json={"body": "bye", "close": True}, headers=headers)
        assert response.status_code == 201
    assert (await client.channel("c").info()).closed
    problem(await http.post("/channels/c", json={"body": 1}), 409, "channel_closed")


async def test_delete_removes_a_channel(client: AsyncClient, http: httpx.AsyncClient) -> None:
    await publish(client, "c", 1)
    assert (await http.delete("/channels/c")).status_code == 204
    assert await client.channel("c").read() == []
    problem(await http.delete("/channels/c"), 404, "channel_not_found")


# ---- what is offered; what is refused is in test_bad_input_http.py


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("", "application/json"), ("*/*", "application/json"), ("application/*", "application/json"),
        ("text/event-stream", "text/event-stream"), ("text/event-stream, */*;q=0.1", "text/event-stream"),
        ("*/*, text/event-stream", "text/event-stream"), ("text/*", "text/event-stream"),
        ("text/event-stream;q=0.5, application/json", "application/json"), ("TEXT/EVENT-STREAM", "text/event-stream"),
        ("text/event-stream;q=0, */*", "application/json"), ("text/html", None), ("image/*, text/html;q=0.9", None),
        ("application/json;q=0", None), ("nonsense", None), (",;,", "application/json"), ("*/*;q=x", None),
    ],
)  # fmt: skip
def test_who_asks_gets_the_type_that_is_liked_best(accept: str, answer: str | None) -> None:
    assert endpoint.choose(accept, ("application/json", "text/event-stream")) == answer


async def test_what_is_not_there_is_not_found(http: httpx.AsyncClient) -> None:
    for path in ("/", "/nothing", "/channels", "/healthz/", "/static/app.py"):
        problem(await http.get(path), 404, "not_found")
    problem(await http.get("/runs/unknown"), 404, "run_not_found")


# ---- what every answer has


async def test_every_answer_has_headers_that_keep_browsers_safe(http: httpx.AsyncClient) -> None:
    for response in [
        await http.get("/channels/c"), await http.get("/channels/*"), await http.get("/nothing"),
        await http.put("/channels/c"), await http.get("/pgchan.js"), await http.get("/healthz"),
        await http.options("/channels/c"),
    ]:  # fmt: skip
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["x-request-id"]
    assert (await http.get("/channels/c")).headers["cache-control"] == "no-store"


async def test_a_request_id_is_taken_over_if_it_is_harmless(nowhere: httpx.AsyncClient) -> None:
    response = await nowhere.get("/nothing", headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "abc-1"
    response = await nowhere.get("/nothing", headers={"X-Request-Id": "<b>"})
    assert "<" not in response.headers["x-request-id"] + response.text


async def test_the_browser_client_and_health_are_served(http: httpx.AsyncClient) -> None:
    script = await http.get("/pgchan.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert "export function connect" in script.text
    assert (await http.head("/pgchan.js")).content == b""
    health = await http.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "ok")


# ---- other sites


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://testserver.evil.example", "http://[", "x"])
async def test_a_foreign_page_is_refused(nowhere: httpx.AsyncClient, origin: str) -> None:
    for method, path in [("GET", "/channels/c"), ("POST", "/runs/r/cancel"), ("DELETE", "/channels/c")]:
        problem(await nowhere.request(method, path, headers={"Origin": origin}), 403, "foreign_origin")


async def test_a_page_of_this_host_is_not_foreign(http: httpx.AsyncClient) -> None:
    assert (await http.get("/channels/c", headers={"Origin": "http://testserver"})).status_code == 200
    behind_a_proxy = {"Origin": "https://app.example", "Sec-Fetch-Site": "same-origin"}
    assert (await http.get("/channels/c", headers=behind_a_proxy)).status_code == 200


async def test_origins_can_be_allowed(client: AsyncClient) -> None:
    origin = "https://app.example"
    app = create_app(client, auth=Insecure(), allow_origins=[origin])
    async with calling(app) as http:
        response = await http.get("/channels/c", headers={"Origin": origin})
        assert response.headers["access-control-allow-origin"] == origin
        assert "Stream-Next-Offset" in response.headers["access-control-expose-headers"]
        assert response.headers["cross-origin-resource-policy"] == "cross-origin"
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization, idempotency-key, last-event-id"
        response = await http.options("/channels/c", headers=asked)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
        response = await http.options("/channels/c", headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
        problem(await http.get("/channels/c", headers={"Origin": "https://evil.example"}), 403, "foreign_origin")
        problem(await http.get("/channels/*", headers={"Origin": origin}), 400, "invalid_input")


@pytest.mark.parametrize("origins", ["*", ["*"], "https://app.example"])
async def test_every_origin_cannot_be_allowed(client: AsyncClient, origins: Any) -> None:
    with pytest.raises(InvalidInput, match="allow_origins"):
        create_app(client, auth=Insecure(), allow_origins=origins)


# ---- the database and the process


async def test_without_a_database_it_is_unavailable_for_now(server: Cluster) -> None:
    async with AsyncClient(server.dsn, timeout=0.3) as client, calling(create_app(client, auth=Insecure())) as http:
        await publish(client, "c", 1)
        server.stop("immediate")
        for response in [
            await http.get("/channels/c"), await http.post("/channels/c", json={"body": 1}),
            await http.post("/runs", json={"workflow": "w"}), await http.get("/runs/r"),
            await http.delete("/channels/c"),
        ]:  # fmt: skip
            problem(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        server.start()
        assert len((await http.get("/channels/c")).json()["messages"]) == 1


async def test_a_database_without_the_schema_is_unfit(empty_dsn: str) -> None:
    client = AsyncClient(empty_dsn, timeout=1)
    async with calling(create_app(client, auth=Insecure())) as http:
        problem(await http.get("/channels/c"), 503, "schema_mismatch")
        problem(await http.get("/channels/c", headers={"Accept": "text/event-stream"}), 503, "schema_mismatch")
    await client.close()


async def test_a_defect_says_nothing_about_itself(client: AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(client, auth=Insecure())

    def fail(name: str) -> None:
        raise ZeroDivisionError("select secret from 127.0.0.1")

    client.channel = fail  # type: ignore[method-assign,assignment]
    async with calling(app) as http:
        found = problem(await http.get("/channels/c"), 500, "internal")
    assert found["request_id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


OWN_SERVER = """
import asyncio, sys
from pgchan import AsyncClient
from pgchan.server import Insecure, create_app, serve

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        await serve(create_app(client, auth=Insecure()), port=int(sys.argv[2]))

asyncio.run(main())
"""
PLAIN_UVICORN = """
import sys, uvicorn
from pgchan import AsyncClient
from pgchan.server import Insecure, routes
from starlette.applications import Starlette
from starlette.routing import Mount

app = Starlette(routes=[Mount("/", routes=routes(AsyncClient(sys.argv[1]), auth=Insecure()))])
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@pytest.mark.parametrize(("program", "status"), [(OWN_SERVER, 0), (PLAIN_UVICORN, -signal.SIGTERM)])
async def test_a_process_with_open_streams_ends_within_two_seconds_of_sigterm(
    dsn: str, program: str, status: int, wait_until: Wait
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, dsn, str(port))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until(is_up, 30)
            opened = asyncio.Barrier(21)
            clean: list[bool] = []

            async def read() -> None:
                async with follow(port, "/channels/c") as reader:
                    await reader.next()
                    await opened.wait()
                    async for _ in reader.blocks():
                        pass
                    clean.append(reader.is_complete)

            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(read())
                await asyncio.wait_for(opened.wait(), 20)
                os.kill(process.pid, signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 2) == status
            assert clean == [True] * 20
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_routes_answer_under_the_path_that_they_are_mounted_at(client: AsyncClient) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/pgchan", routes=routes(client, auth=Insecure()))])
    async with calling(app) as http:
        assert (await http.post("/pgchan/channels/a/b", json={"body": 1})).status_code == 201
        assert json.loads((await http.get("/pgchan/channels/a%2Fb")).content)["head"] == 1
        response = await http.post("/pgchan/runs", json={"workflow": "w", "id": "r/1"})
        assert response.headers["location"] == "/pgchan/runs/r/1"
        problem(await http.get(raw("/pgchan/channels/a%00b")), 400, "invalid_input")
