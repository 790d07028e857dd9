"""Streams that one task writes to: they get what they would get alone, whoever gets on, off, stalls or is cut."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from doors import query
from serving import Running, follow, message_of, parse_block
from starlette.middleware.gzip import GZipMiddleware

from pgchan import AsyncClient, Message
from pgchan.server import App, Insecure, create_app, fanout, sse

Wait = Callable[..., Awaitable[None]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(dsn) as client:
        yield client


@pytest.fixture
async def served(client: AsyncClient) -> AsyncIterator[Running]:
    async with Running(create_app(client, auth=Insecure())) as running:
        yield running


def riders(served: Running) -> int:
    app = served.app
    assert isinstance(app, App)
    return sum(len(each._riders) for each in app.site.fanouts._open.values())


async def test_readers_that_come_and_go_at_any_time_get_every_message_once(
    client: AsyncClient, served: Running, wait_until: Wait
) -> None:
    chance = random.Random(20)
    channel = client.channel("c")
    await channel.publish(0)
    most = 0

    async def read(view: str) -> list[int]:
        cursor, got = "0", list[int]()
        while True:
            patience = chance.randint(1, 60)
            async with follow(served.port, f"/channels/c?after={cursor}&view={view}") as reader:
                async for block in reader.blocks():
                    if block.get("event") == "end":
                        return got
                    if "data" in block:
                        got.append(message_of(block)["position"])
                        cursor = block["id"]
                        patience -= 1
                        if not patience:
                            break

    reading = [asyncio.create_task(read(chance.choice(["final", "raw"]))) for _ in range(25)]
    for round in range(60):
        size = chance.choice([1, 1, 3, 10, 40])
        text = "x" * chance.choice([1, 100, 100, 9_000])  # 40 of these are more than one write
        await channel.publish_many([text] * size)
        await asyncio.sleep(chance.choice([0.0, 0.0, 0.02]))
        most = max(most, riders(served))
        if round == 30:
            await wait_until(lambda: riders(served) >= 20)
    await channel.close()
    head = (await channel.info()).head
    async with asyncio.timeout(60):
        for got in await asyncio.gather(*reading):
            assert got == list(range(1, head + 1))
    assert most >= 10
    await wait_until(lambda: riders(served) == 0 and not served.app.site.fanouts._open)


@pytest.mark.parametrize("count", [1, 30])
async def test_a_message_is_read_and_encoded_once_however_many_read_it(
    client: AsyncClient, served: Running, wait_until: Wait, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    channel = client.channel("c")
    await channel.publish(0)
    encoded: list[int] = []

    def frame(message: Message) -> bytes:
        encoded.append(message.position)
        return original(message)

    original = sse.frame
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(follow(served.port, "/channels/c")) for _ in range(count)]
        await wait_until(lambda: riders(served) == count)
        monkeypatch.setattr(sse, "frame", frame)
        before = client.stats["reads"]
        for number in range(1, 6):
            await channel.publish(number)
            for reader in readers:
                while "data" not in (block := await reader.next()) or message_of(block)["body"] != number:
                    pass
        assert encoded == [2, 3, 4, 5, 6]
        assert client.stats["reads"] == before + 5


async def test_a_reader_that_takes_nothing_delays_nobody_and_misses_nothing(
    client: AsyncClient, served: Running, wait_until: Wait
) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", served.port))
    await loop.sock_sendall(slow, b"GET /channels/c HTTP/1.0\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
    channel = client.channel("c")
    await channel.publish(0)
    async with follow(served.port, "/channels/c") as quick:
        await wait_until(lambda: riders(served) == 2)
        for _ in range(300):
            await channel.publish("x" * 20_000)
        positions: list[int] = []
        while len(positions) < 301:
            block = await quick.next()
            positions += [message_of(block)["position"]] if "data" in block else []
        assert riders(served) == 1  # the other one is alone with what it has not taken
    await channel.close()
    received = b""
    async with asyncio.timeout(60):
        while part := await loop.sock_recv(slow, 1 << 20):
            received += part
    slow.close()
    _, _, stream = received.partition(b"\r\n\r\n")
    blocks = [parse_block(block) for block in stream.split(b"\n\n") if b"data:" in block]
    assert [json.loads(block["data"])["position"] for block in blocks[:-1]] == list(range(1, 302)) == positions
    assert blocks[-1]["event"] == "end"


async def test_readers_of_two_histories_are_not_written_to_by_one_task(
    client: AsyncClient, served: Running, dsn: str, wait_until: Wait
) -> None:
    channel = client.channel("c")
    await channel.publish("old")
    async with follow(served.port, "/channels/c") as before:
        assert set(await before.next()) == {"retry", "id"}
        assert message_of(await before.next())["body"] == "old"
        await wait_until(lambda: riders(served) == 1)
        query(dsn, "update pgchan.messages set at = at + interval '1 s', body = '\"new\"' returning position")
        async with follow(served.port, "/channels/c?after=now") as behind:
            assert set(await behind.next()) == {"retry", "id"}
            await channel.publish("next")
            assert message_of(await behind.next())["body"] == "next"
            lost = await before.next()
            assert (lost["event"], json.loads(lost["data"])["reason"]) == ("reset", "history_lost")
            assert [message_of(await before.next())["body"] for _ in range(2)] == ["new", "next"]


async def test_middleware_that_may_change_the_answer_sees_all_of_it(
    client: AsyncClient, wait_until: Wait
) -> None:
    app = create_app(client, auth=Insecure())
    app.add_middleware(GZipMiddleware)
    async with Running(app) as served:
        await client.channel("c").publish(1)
        async with follow(served.port, "/channels/c") as reader:
            assert set(await reader.next()) == {"retry", "id"}
            assert message_of(await reader.next())["body"] == 1
            await client.channel("c").publish(2)
            assert message_of(await reader.next())["body"] == 2
            assert riders(served) == 0


async def test_without_a_known_server_there_is_no_wire() -> None:
    async def send(_: object) -> None:
        raise AssertionError("unused")

    assert fanout.Wire.of({"type": "http", "http_version": "1.1"}, send, True) is None


class Stalled:
    """A wire that takes nothing."""

    is_chunked = False

    def write(self, _data: bytes) -> bool:
        return False


async def test_a_fanout_that_ends_leaves_no_messages_to_the_collector(client: AsyncClient) -> None:
    """The collector may be minutes away, and there is one fanout each time that the last reader falls behind."""
    channel = client.channel("collected")
    await channel.publish("first")
    fanouts = fanout.Fanouts()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            page = await channel.page(after="now")
            rider = fanout.Rider(Stalled(), page.cursor)  # type: ignore[arg-type]
            riding = asyncio.create_task(fanouts.ride(channel, "final", rider, lambda page: page[0].raw))
            await asyncio.sleep(0.05)
            await channel.publish("something")
            await asyncio.wait_for(riding, 5)
            await asyncio.sleep(0.05)  # its task ends
        left = [one for one in gc.get_objects() if isinstance(one, Message) and one.channel == "collected"]
    finally:
        gc.enable()
    assert len(left) <= 1  # the last one may still be in the hands of who was told of it
