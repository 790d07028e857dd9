"""What does it cost to send a channel to many SSE readers, and how late is the last of them?

One server process (pgchan.server on uvicorn) and many connections that read the same channel. A batch is published, and
each connection notes at its socket how long ago the message was due. Its floor is a server written by hand on
asyncio's bare protocols: it listens, reads back, and writes the same bytes to every connection.
The reads are counted by the server itself: one batch must be read once, however many connections there are.

Then connections come that read nothing, while messages are so large that these cannot be served from the buffers of
the kernel. Their floor is the same server without them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import statistics
import time
from typing import Any

import asyncpg
import uvicorn

import pgchan
from pgchan.benchmarks._common import FLOOR_READ, Pipe, Process, Report, due_times, interleave, main, percentile
from pgchan.server import Insecure, create_app

READERS = 200
MANY_READERS = 1_000  # of which each takes more than what the first brings with it
BATCHES = 25  # per round
INTERVAL_SECONDS = 0.06
BATCH = 10  # messages that are published together, unless --batch says otherwise
CPU_RATIO_MAX = 2.0
LAST_SECONDS_MAX = 0.15
CHANNEL_ID = 6  # of the floor's channel
NAME = "sse/room"
LARGE = "sse/large"  # the channel beside a reader that stalls
LARGE_READERS = 50
LARGE_PAD = "x" * 8_192
LARGE_BATCHES = 15  # per round, more than a megabyte: the kernel does not keep that for who does not read
STALLED = 10  # several, for the allocator has moods
STALLED_ROUNDS = 4  # before, beside and after them
STALLED_LATE_MAX = 1.1
STALLED_BYTES_MAX = 1 << 20

MEMORY_BYTES_MAX = 50_000  # of the server, for each connection
FLOOR_BATCH = """
with moved as (
  update floor.channels c set head = c.head + cardinality($2::bytea[]) where c.id = $1::bigint returning c.head
), stored as (
  insert into floor.messages (channel_id, "position", at, kind, body)
  select $1::bigint, m.head - cardinality($2::bytea[]) + e.nth, clock_timestamp(), 0, e.body
  from moved m, unnest($2::bytea[]) with ordinality e (body, nth)
)
select pg_notify('floor', m.head::text) from moved m
"""

_DUE = re.compile(rb'"due":(\d+)')


async def serve_ours(pipe: Pipe, dsn: str, port: int) -> None:
    """The server process."""
    async with pgchan.AsyncClient(dsn, name="sse") as client:
        app = create_app(client, auth=Insecure())
        config = uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off")
        server = asyncio.create_task(uvicorn.Server(config).serve())
        await _until_open(port)
        pipe.send("ready")
        while True:
            await pipe.receive()
            pipe.send(client.stats["reads"])
        await server


class Bare(asyncio.Protocol):
    """A connection of the floor: whatever is asked, the answer is the stream."""

    everybody: set[asyncio.Transport]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: here\n\n")
        Bare.everybody.add(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        Bare.everybody.discard(self._transport)


async def serve_floor(pipe: Pipe, dsn: str, port: int) -> None:
    """The server process, by hand."""
    Bare.everybody = set()
    connection = await asyncpg.connect(dsn)
    heard = asyncio.Event()
    reads = 0

    async def pump() -> None:
        nonlocal reads
        last = 0
        while True:
            await heard.wait()
            heard.clear()
            rows = await connection.fetch(FLOOR_READ, CHANNEL_ID, last)
            reads += 1
            last = rows[-1][0] if rows else last
            block = b"".join(b"id: %d\nevent: message\ndata: %s\n\n" % (row[0], row[1]) for row in rows)
            for transport in Bare.everybody:
                transport.write(block)

    await connection.add_listener("floor", lambda *_: heard.set())
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", port)
    pumping = asyncio.create_task(pump())
    pipe.send("ready")
    while True:
        await pipe.receive()
        pipe.send(reads)
    await pumping
    server.close()


async def _until_open(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.02)


class Reader(asyncio.Protocol):
    """One connection: notes for each message how late it was at this socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rest = b""
        self.open = asyncio.get_running_loop().create_future()
        self.late: list[float] = []

    def connection_made(self, transport: Any) -> None:
        transport.write(f"GET {self._path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if not self.open.done():
            if not data.startswith(b"HTTP/1.1 200"):
                self.open.set_exception(ConnectionError(data[:200].decode(errors="replace")))
                return
            self.open.set_result(None)
        block, _, self._rest = (self._rest + data).rpartition(b"\n")
        self.late += [(now - int(due)) / 1e9 for due in _DUE.findall(block)]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.open.done():
            self.open.set_exception(ConnectionError("closed before it was open"))


async def _connect(port: int, path: str, count: int) -> list[Reader]:
    loop = asyncio.get_running_loop()
    readers: list[Reader] = []
    for _ in range(count):
        _, reader = await loop.create_connection(lambda: Reader(path), "127.0.0.1", port)
        await reader.open
        readers.append(reader)
    return readers


class Contestant:
    """A server process, its readers, and how one batch is published to them."""

    def __init__(
        self, process: Process, readers: list[Reader], publish: Any, *, batches: int = BATCHES, batch: int = BATCH
    ) -> None:  # fmt: skip
        self._process = process
        self._readers = readers
        self._publish = publish
        self._batches = batches
        self._batch = batch

    async def round(self) -> dict[str, Any]:
        """Publish batches; what became of them."""
        for reader in self._readers:
            reader.late.clear()
        reads, cpu = await self._process.ask("reads"), self._process.cpu()
        async for due in due_times(self._batches, INTERVAL_SECONDS):
            await self._publish(due)
        wanted = self._batches * self._batch
        async with asyncio.timeout(20):
            while any(len(reader.late) < wanted for reader in self._readers):  # noqa: ASYNC110 - beside what is measured
                await asyncio.sleep(0.01)
        used = self._process.cpu() - cpu
        late = [[reader.late[number] for reader in self._readers] for number in range(0, wanted, self._batch)]
        return {
            "cpu": used / (wanted * len(self._readers)) * 1e6,
            "reads": (await self._process.ask("reads") - reads) / self._batches,
            "all": [value * 1e6 for values in late for value in values],
            "last": [max(values) for values in late],
            "extra": sum(len(reader.late) - wanted for reader in self._readers),
        }


async def measure(report: Report) -> None:
    """Both servers in turns."""
    count, batch = report.arguments.readers, report.arguments.batch
    writing = await asyncpg.connect(report.dsn)
    await writing.execute("insert into floor.channels (id) values ($1::bigint)", CHANNEL_ID)
    async with pgchan.AsyncClient(report.dsn) as client:
        channel = client.channel(NAME)
        await channel.create()

        async def publish(due: int) -> None:
            if batch == 1:
                await channel.publish({"due": due})
            else:
                await channel.publish_many([{"due": due}] * batch)

        async def by_hand(due: int) -> None:
            await writing.execute(FLOOR_BATCH, CHANNEL_ID, [b'{"due":%d}' % due] * batch)

        ports = [_free_port(), _free_port()]
        servers = [Process(serve_ours, report.dsn, ports[0]), Process(serve_floor, report.dsn, ports[1])]
        for server in servers:
            await server.answer()
        empty = [server.memory() for server in servers]
        ours = Contestant(servers[0], await _connect(ports[0], f"/channels/{NAME}", count), publish, batch=batch)
        floor = Contestant(servers[1], await _connect(ports[1], "/", count), by_hand, batch=batch)
        rounds = max(3, report.arguments.rounds // 2)
        found = await interleave(rounds, ours=ours.round, floor=floor.round)
        _report(report, count, found)
        each = [(server.memory() - before) / count for server, before in zip(servers, empty, strict=True)]
        if count >= MANY_READERS:
            report.figure(f"{count} readers: memory of the server for each", "B", each[0], floor=each[1],
                          at_most=MEMORY_BYTES_MAX)  # fmt: skip
        await beside_a_stalled_reader(report, client, servers[0], ports[0])
        for server in servers:
            server.kill()
    await writing.close()


async def beside_a_stalled_reader(report: Report, client: pgchan.AsyncClient, server: Process, port: int) -> None:
    """The readers of a channel, before, beside and after some that read nothing."""
    channel = client.channel(LARGE)
    await channel.create()

    async def publish(due: int) -> None:
        await channel.publish_many([{"due": due, "pad": LARGE_PAD}] * BATCH)

    readers = await _connect(port, f"/channels/{LARGE}", LARGE_READERS)
    others = Contestant(server, readers, publish, batches=LARGE_BATCHES)
    alone = [await others.round() for _ in range(STALLED_ROUNDS)][1:]
    before = server.memory()
    stalled = [await _stall(port, f"/channels/{LARGE}") for _ in range(STALLED)]
    beside = [await others.round() for _ in range(STALLED_ROUNDS)][1:]
    more = (server.memory() - before) / STALLED
    for connection in stalled:
        connection.close()
    alone += [await others.round() for _ in range(STALLED_ROUNDS)][1:]
    name = f"{LARGE_READERS} readers of large messages beside {STALLED} that stall"
    late, floor = ([value for one in rounds for value in one["all"]] for rounds in (beside, alone))
    report.times(f"{name}: publish → socket", [late], [floor], at_most={50: None, 99: STALLED_LATE_MAX})
    report.figure(f"{name}: memory of the server for each of these", "B", more, at_most=STALLED_BYTES_MAX)
    report.figure(f"{name}: deliveries too many", "", sum(one["extra"] for one in beside), at_most=0)


async def _stall(port: int, path: str) -> socket.socket:
    """A connection that asks, and reads nothing."""
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.setblocking(False)
    await asyncio.get_running_loop().sock_connect(stalled, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(
        stalled, f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode()
    )
    return stalled


def _report(report: Report, count: int, found: dict[str, list[dict[str, Any]]]) -> None:
    ours, floor = found["ours"], found["floor"]
    name = f"{count} readers"
    report.figure(
        f"{name}: database reads per batch", "reads", statistics.mean(one["reads"] for one in ours),
        floor=statistics.mean(one["reads"] for one in floor), at_most=1.0,
    )  # fmt: skip
    report.figure(
        f"{name}: server processor per delivery", "µs", statistics.median(one["cpu"] for one in ours),
        floor=statistics.median(one["cpu"] for one in floor), ratio_at_most=CPU_RATIO_MAX,
    )  # fmt: skip
    report.times(
        f"{name}: publish → socket", [one["all"] for one in ours], [one["all"] for one in floor],
        at_most={50: 1.25, 99: 1.75},
    )  # fmt: skip
    last = [value for one in ours for value in one["last"]]
    beside = [value for one in floor for value in one["last"]]
    report.figure(
        f"{name}: last reader, p50", "s", percentile(last, 50), floor=percentile(beside, 50), at_most=LAST_SECONDS_MAX
    )
    report.figure(f"{name}: deliveries too many", "", sum(one["extra"] for one in ours), at_most=0)
    report.note(
        f"batches of {report.arguments.batch} messages, {1 / INTERVAL_SECONDS:.0f} a second; "
        "counted when a socket is read here"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def options(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--batch", type=int, default=BATCH, help="messages that are published together")


if __name__ == "__main__":
    main(__doc__, measure, seconds=30, options=options)
