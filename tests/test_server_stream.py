"""Event streams, over real sockets. One file, and long, because all of it is about one response."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from cluster import Cluster
from serving import Running, follow, message_of, parse_block
from starlette.applications import Starlette
from starlette.routing import Mount

from pgchan import AsyncClient
from pgchan.server import App, Insecure, create_app, endpoint, routes, sse

ZERO = "0000000000000000_0000000000000000"

Wait = Callable[..., Awaitable[None]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(dsn) as client:
        yield client


@pytest.fixture
async def served(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(sse, "FIRST_SECONDS", 60.0)  # a busy machine must not show as a database that is away
    async with Running(create_app(client, auth=Insecure())) as running:
        yield running


async def publish(client: AsyncClient, name: str, *bodies: Any) -> list[str]:
    return [(await client.channel(name).publish(body)).cursor for body in bodies]


def open_spans(served: Running) -> int:
    app = served.app
    assert isinstance(app, App)
    return len(app.site._spans)


# ---- what is sent


async def test_a_stream_begins_with_where_the_reader_stands(client: AsyncClient, served: Running) -> None:
    cursors = await publish(client, "chat/42", "a", "b")
    for path, headers, cursor in [
        ("/channels/chat/42", {}, ZERO),
        ("/channels/chat/42?after=now", {}, cursors[1]),
        (f"/channels/chat/42?after={cursors[0]}", {}, cursors[0]),
        ("/channels/chat/42?after=now", {"Last_Event_ID": cursors[0]}, cursors[0]),
        ("/channels/chat/42?after=2", {}, cursors[1]),
        ("/channels/new", {}, ZERO),
        ("/channels/new?after=now", {}, ZERO),
    ]:
        async with follow(served.port, path, **headers) as reader:
            first = await reader.next()
            assert set(first) == {"retry", "id"}, path
            assert 1000 <= int(first["retry"]) <= 3000
            assert first["id"] == cursor, path


async def test_the_head_of_a_stream_keeps_proxies_and_caches_away(client: AsyncClient, served: Running) -> None:
    async with follow(served.port, "/channels/c") as reader:
        assert reader.status == 200
        assert reader.headers["content-type"] == "text/event-stream"
        assert reader.headers["cache-control"] == "no-cache, no-transform"
        assert reader.headers["x-accel-buffering"] == "no"
        assert reader.headers["x-content-type-options"] == "nosniff"
        assert reader.headers["cross-origin-resource-policy"] == "same-origin"
        assert "content-length" not in reader.headers


async def test_an_event_is_the_message_as_json_under_its_kind(client: AsyncClient, served: Running) -> None:
    message = await client.channel("c").publish({"text": "grüße"}, key="k")
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        event = await reader.next()
    assert event["event"] == "message"
    assert message_of(event) == {
        "channel": "c", "position": 1, "cursor": message.cursor, "kind": "message", "body": {"text": "grüße"},
        "key": "k", "step": None, "attempt": None, "at": message.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    }  # fmt: skip


async def test_a_reader_gets_what_is_there_and_then_what_comes(client: AsyncClient, served: Running) -> None:
    await publish(client, "c", 1, 2)
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        assert [message_of(await reader.next())["body"] for _ in range(2)] == [1, 2]
        await publish(client, "c", 3)
        assert message_of(await reader.next())["body"] == 3


async def test_a_signal_is_an_event_of_its_own_kind(client: AsyncClient, served: Running) -> None:
    run = await client.start("work", id="run/1")
    await run.signal({"stop": True})
    async with follow(served.port, "/channels/run/1") as reader:
        await reader.next()
        event = await reader.next()
        assert (event["event"], message_of(event)["body"]) == ("signal", {"stop": True})


async def test_line_ends_in_a_body_break_no_frame(client: AsyncClient, served: Running, dsn: str) -> None:
    text = "a\r\n\r\nevent: end\ndata: {}\n\nid: x\r\ru2028\u2028\u0085\v\f\0"
    await publish(client, "c", text, {text: [text]})
    # Stored bytes may have raw line ends between the tokens; nothing in pgchan writes such, other writers may.
    raw = b'{\r\n "a":\r [1,\n\n 2]\r\r}\n'
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "update pgchan.messages set body = $1 where position = 2 and channel_id = "
        "(select id from pgchan.channels where name = 'c')", raw,
    )  # fmt: skip
    await connection.close()
    await client.channel("t").create("text/plain")
    await publish(client, "t", text)
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        assert [message_of(await reader.next())["body"] for _ in range(2)] == [text, {"a": [1, 2]}]
        await publish(client, "c", "next")
        assert message_of(await reader.next())["body"] == "next"
    async with follow(served.port, "/channels/t") as reader:
        await reader.next()
        assert message_of(await reader.next())["body"] == text


async def test_silence_is_broken_by_heartbeats(
    client: AsyncClient, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT_SECONDS", sse.LOOK_SECONDS)
    monkeypatch.setattr(endpoint, "LOOK_SECONDS", 0.02)
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        assert await reader.next() == {"": "hb"}
        assert await reader.next() == {"": "hb"}
        await publish(client, "c", 1)
        while (event := await reader.next()) == {"": "hb"}:
            pass
        assert message_of(event)["position"] == 1


def test_frames_are_sent_whole_and_many_at_once() -> None:
    frames = [b"x" * 30_000 + b"\n\n"] * 5 + [b"y" * 200_000 + b"\n\n", b"z\n\n"]
    chunks = list(sse.in_chunks(frames))
    assert b"".join(chunks) == b"".join(frames)
    assert [len(chunk) for chunk in chunks] == [60_004, 60_004, 30_002, 200_002, 3]


async def test_the_frame_of_a_message_is_made_once(client: AsyncClient) -> None:
    message = await client.channel("c").publish("a")
    assert sse.frame(message) is sse.frame(message)
    assert parse_block(sse.frame(message).removesuffix(b"\n\n"))["id"] == message.cursor


# ---- how it ends


async def test_a_closed_channel_ends_the_stream_and_then_the_client(client: AsyncClient, served: Running) -> None:
    (cursor,) = await publish(client, "c", "only")
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        await reader.next()
        await client.channel("c").close()
        end = await reader.next()
        assert (end["event"], json.loads(end["data"]), end["id"]) == ("end", {"cursor": cursor}, cursor)
        with pytest.raises(StopAsyncIteration):
            await reader.next()
        assert reader.is_complete
    async with follow(served.port, "/channels/c", Last_Event_ID=cursor) as again:
        assert again.status == 204
        assert "content-type" not in again.headers


async def test_a_first_request_to_a_closed_channel_is_told_the_end(client: AsyncClient, served: Running) -> None:
    (cursor,) = await publish(client, "c", "only")
    await client.channel("c").close()
    async with follow(served.port, f"/channels/c?after={cursor}") as reader:
        assert reader.status == 200
        assert (await reader.next())["id"] == cursor
        assert (await reader.next())["event"] == "end"


async def test_a_reader_that_lacks_the_last_message_gets_it_before_the_end(
    client: AsyncClient, served: Running
) -> None:
    first, _ = await publish(client, "c", 1, 2)
    await client.channel("c").close()
    async with follow(served.port, "/channels/c", Last_Event_ID=first) as reader:
        assert [block.get("event") async for block in reader.blocks()] == [None, "message", "end"]


async def test_an_old_client_gets_the_stream_until_the_connection_closes(client: AsyncClient, served: Running) -> None:
    await publish(client, "c", 1)
    await client.channel("c").close()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /channels/c HTTP/1.0\r\nAccept: text/event-stream\r\n\r\n")
    _, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    blocks = [parse_block(block) for block in body.removesuffix(b"\n\n").split(b"\n\n")]
    assert [block.get("event") for block in blocks] == [None, "message", "end"]
    writer.close()


async def test_a_client_that_leaves_is_forgotten(client: AsyncClient, served: Running, wait_until: Wait) -> None:
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        assert open_spans(served) == 1
        assert len(client._db.listener.hub._by_name) == 1
    await wait_until(lambda: open_spans(served) == 0 and not client._db.listener.hub._by_name)


# ---- resuming


async def test_a_reader_resumes_exactly_through_restarts_of_the_server(
    client: AsyncClient, served: Running, wait_until: Wait
) -> None:
    channel, seen, cursors = client.channel("long"), [], [ZERO]

    async def read() -> None:
        while True:
            try:
                async with follow(served.port, "/channels/long", Last_Event_ID=cursors[-1]) as reader:
                    if reader.status == 204:
                        return
                    async for block in reader.blocks():
                        cursors.append(block.get("id", cursors[-1]))
                        if block.get("event") == "message":
                            seen.append(message_of(block)["body"])
            except (ConnectionError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.005)

    reading = asyncio.create_task(read())
    for number in range(1, 301):
        await channel.publish(number)
        if number % 50 == 0:
            await wait_until(lambda number=number: len(seen) > number - 50)
            await served.stop()
            await served.start(create_app(client, auth=Insecure()))
    await channel.close()
    await asyncio.wait_for(reading, 10)
    assert seen == list(range(1, 301))


async def test_the_header_wins_over_the_query(client: AsyncClient, served: Running) -> None:
    cursors = await publish(client, "c", 1, 2, 3)
    async with follow(served.port, "/channels/c?after=0", Last_Event_ID=cursors[1]) as reader:
        assert (await reader.next())["id"] == cursors[1]
        assert message_of(await reader.next())["position"] == 3


async def test_a_reader_behind_the_trim_boundary_is_told_and_goes_on(client: AsyncClient, served: Running) -> None:
    cursors = await publish(client, "c", *range(1, 11))
    await client.channel("c").trim(before=6)
    async with follow(served.port, "/channels/c", Last_Event_ID=cursors[1]) as reader:
        assert (await reader.next())["id"] == cursors[1]
        reset = await reader.next()
        boundary = "0000000000000005_0000000000000000"
        assert (reset["event"], reset["id"]) == ("reset", boundary)
        assert json.loads(reset["data"]) == {"reason": "trimmed", "first": 6, "last": 10, "cursor": boundary}
        assert [message_of(await reader.next())["position"] for _ in range(5)] == [6, 7, 8, 9, 10]
        await publish(client, "c", 11)
        assert message_of(await reader.next())["position"] == 11
    async with follow(served.port, "/channels/c", Last_Event_ID=boundary) as reader:
        assert (await reader.next())["id"] == boundary
        assert message_of(await reader.next())["position"] == 6


async def test_a_reader_whose_history_is_gone_is_told_and_starts_again(client: AsyncClient, served: Running) -> None:
    cursors = await publish(client, "c", 1, 2)
    await client.channel("c").delete()
    again = await publish(client, "c", "new 1", "new 2", "new 3")
    assert again[1] != cursors[1]
    async with follow(served.port, "/channels/c", Last_Event_ID=cursors[1]) as reader:
        await reader.next()
        reset = await reader.next()
        assert (reset["event"], reset["id"]) == ("reset", ZERO)
        assert json.loads(reset["data"]) == {"reason": "history_lost", "first": 1, "last": 3, "cursor": ZERO}
        assert [message_of(await reader.next())["body"] for _ in range(3)] == ["new 1", "new 2", "new 3"]


async def test_a_channel_that_is_deleted_while_it_is_read_resets_its_reader(
    client: AsyncClient, served: Running
) -> None:
    await publish(client, "c", 1, 2)
    async with follow(served.port, "/channels/c") as reader:
        for _ in range(3):
            await reader.next()
        await client.channel("c").delete()
        reset = await reader.next()
        assert json.loads(reset["data"]) == {"reason": "history_lost", "first": 1, "last": 0, "cursor": ZERO}
        await publish(client, "c", "reborn")
        assert message_of(await reader.next())["body"] == "reborn"


# ---- many and slow readers


async def test_two_hundred_readers_cost_one_read_for_each_batch(client: AsyncClient, served: Running) -> None:
    await publish(client, "c", 0)
    async with asyncio.TaskGroup() as group:
        ready = asyncio.Barrier(201)

        async def read() -> None:
            async with follow(served.port, "/channels/c?after=1") as reader:
                await reader.next()
                await ready.wait()
                assert [message_of(await reader.next())["position"] for _ in range(20)] == list(range(2, 22))

        for _ in range(200):
            group.create_task(read())
        await ready.wait()
        before = dict(client.stats)
        for number in range(20):
            await client.channel("c").publish(number)
    reads = client.stats["reads"] - before["reads"]
    assert 1 <= reads <= 20
    assert client.stats["pages"] - before["pages"] <= 1  # at most the publisher's look at the channel's type


async def test_a_reader_that_takes_nothing_is_cut_and_resumes_exactly(
    client: AsyncClient, served: Running, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(endpoint, "LOOK_SECONDS", 0.02)
    await client.channel("c").publish_many(["x" * 60_000 for _ in range(200)])
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stalled, ("127.0.0.1", served.port))
        stalled.send(b"GET /channels/c HTTP/1.1\r\nHost: h\r\nAccept: text/event-stream\r\n\r\n")
        await wait_until(lambda: open_spans(served) == 1)
        assert served.server is not None
        connections = served.server.server_state.connections
        await wait_until(lambda: open_spans(served) == 0 and not connections)
    seen = 0
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        for _ in range(200):
            seen += 1
            assert message_of(await reader.next())["position"] == seen


# ---- the database and the process


async def test_a_new_stream_waits_for_a_database_that_is_away(server: Cluster) -> None:
    async with (
        AsyncClient(server.dsn, timeout=0.5) as client,
        Running(create_app(client, auth=Insecure())) as served,
        follow(served.port, "/channels/c") as open_before,
    ):
        (cursor,) = await publish(client, "c", 1)
        assert (await open_before.next()).keys() == {"retry", "id"}
        assert message_of(await open_before.next())["position"] == 1
        server.stop("immediate")
        async with (
            follow(served.port, "/channels/c", Last_Event_ID=cursor) as followed,
            follow(served.port, "/channels/new?after=now") as fresh,
        ):
            assert (await followed.next())["id"] == cursor
            assert (await fresh.next()).keys() == {"retry"}  # nobody knows yet where it stands
            assert await followed.next() == await fresh.next() == {"": "waiting"}
            server.start()
            await publish(client, "c", 2)
            for each in (open_before, followed):
                while "data" not in (event := await each.next(20)):
                    pass
                assert message_of(event)["position"] == 2
            while "id" not in (block := await fresh.next(20)):
                pass
            assert block == {"id": ZERO}
            await publish(client, "new", 1)
            assert message_of(await fresh.next())["position"] == 1


async def test_streams_end_in_good_order_when_the_process_is_to_end(client: AsyncClient, served: Running) -> None:
    await publish(client, "c", 1)
    async with follow(served.port, "/channels/c") as reader:
        await reader.next()
        await reader.next()
        started = asyncio.get_running_loop().time()
        await served.stop()
        assert asyncio.get_running_loop().time() - started < 2
        with pytest.raises(StopAsyncIteration):
            await reader.next()
        assert reader.is_complete


async def test_routes_can_be_mounted_where_no_lifespan_runs(dsn: str) -> None:
    client = AsyncClient(dsn)
    app = Starlette(routes=[Mount("/pgchan", routes=routes(client, auth=Insecure()))])
    async with Running(app) as served, follow(served.port, "/pgchan/channels/a/b") as reader:
        assert (await reader.next())["id"] == ZERO
        await publish(client, "a/b", 1)
        assert message_of(await reader.next())["channel"] == "a/b"
        await client.channel("a/b").close()
        assert (await reader.next())["event"] == "end"
    await client.close()
