"""A real server on a free port of this machine, and readers that see each byte of what it says."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from pgchan.server.serve import Server, config

# What no answer may hold.
WORDS_OF_OURS = ("select", "insert", "traceback", "asyncpg", "psycopg", "127.0.0.1", "postgres", 'file "')


class Running:
    """A server in this event loop. `async with`; stop() ends it as SIGTERM would, start() begins again on its port."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self.app = app
        self.port = port
        self.server: Server | None = None

    async def __aenter__(self) -> Running:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, app: Any = None) -> None:
        self.app = app or self.app
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(512)
        self.port = listener.getsockname()[1]
        self.server = Server(config(self.app))
        self._task = asyncio.create_task(self.server.serve(sockets=[listener]))
        while not self.server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # uvicorn has nothing to wait for

    async def stop(self) -> None:
        if self.server is not None:
            self.server.should_exit = True
            await self._task
            self.server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Reader:
    """One connection that follows a channel: `blocks()` are the blocks of its event stream, as dicts."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader
        self.is_complete = False  # whether the last chunk was seen: a clean end

    async def blocks(self) -> AsyncIterator[dict[str, str]]:
        text = b""
        async for chunk in self._chunks():
            text += chunk
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                yield parse_block(block)

    async def next(self, seconds: float = 30.0) -> dict[str, str]:
        if not hasattr(self, "_blocks"):
            self._blocks = self.blocks()
        async with asyncio.timeout(seconds):
            return await anext(self._blocks)

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                chunk = await self._reader.readexactly(size + 2)
                yield chunk[:-2]
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        self.is_complete = True


def parse_block(block: bytes) -> dict[str, str]:
    """The fields of one block, by the rules of the HTML standard. A comment is under ""."""
    fields: dict[str, str] = {}
    for line in re.split(rb"\r\n|\r|\n", block):
        name, _, value = line.decode().partition(":")
        value = value.removeprefix(" ")
        fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
    return fields


def message_of(block: dict[str, str]) -> dict[str, Any]:
    """The message JSON of an event."""
    found: dict[str, Any] = json.loads(block["data"])
    assert block["id"] == found["cursor"]
    return found


@asynccontextmanager
async def follow(port: int, path: str, **headers: str) -> AsyncIterator[Reader]:
    """Open an event stream; header names are written with _ for -."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=8 << 20)
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: text/event-stream"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = head.strip().split("\r\n")
        pairs = (line.partition(": ") for line in rest)
        yield Reader(int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, reader)
    finally:
        writer.transport.abort()
        writer.close()


def calling(app: Any) -> httpx.AsyncClient:
    """A client of the application in this process; what it raises is raised here."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver")


def raw(path: str) -> httpx.URL:
    """A URL whose path is sent as it is written here."""
    return httpx.URL("http://testserver").copy_with(raw_path=path.encode())


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert {"type", "title", "status", "code", "request_id"} <= found.keys()
    assert (found["status"], found["code"]) == (status, code)
    assert not [word for word in WORDS_OF_OURS if word in response.text.lower()]
    return found
