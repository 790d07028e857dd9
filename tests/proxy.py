"""A TCP proxy between a client and the server that can swallow answers, fall silent, or cut."""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import Any, Self

from psycopg import conninfo


class Proxy:
    """`dsn` leads through it. It forwards until it is told otherwise."""

    def __init__(self, dsn: str) -> None:
        self._target = conninfo.conninfo_to_dict(dsn)
        self._marker: bytes | None = None
        self._silent = False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.swallowed = 0
        self.dsn = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        target = self._target
        self.dsn = f"postgresql://{target.get('user', 'postgres')}@127.0.0.1:{port}/{target['dbname']}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def swallow(self, marker: bytes) -> None:
        """Let the next statement with these bytes, or their hexadecimal, through but not its answer: hang up on it."""
        self._marker = marker

    def silence(self, silent: bool = True) -> None:
        """Forward nothing any more, and hang up on nobody; the kernels at both ends notice nothing."""
        self._silent = silent

    def cut(self) -> None:
        """Hang up on everybody."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = str(self._target.get("host", "127.0.0.1")), int(self._target.get("port", 5432))
        try:
            if re.match(r"[/@]", host):
                upstream = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                upstream = await asyncio.open_connection(host, port)
        except OSError:  # the server is away
            writer.close()
            return
        self._writers |= {writer, upstream[1]}
        doomed = asyncio.Event()
        for source, target, is_answer in ((reader, upstream[1], False), (upstream[0], writer, True)):
            task = asyncio.create_task(self._forward(source, target, is_answer, doomed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _is_marked(self, data: bytes) -> bool:
        return self._marker is not None and (self._marker in data or self._marker.hex().encode() in data)

    async def _forward(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_answer: bool, doomed: asyncio.Event
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                if not is_answer and self._is_marked(data):
                    self._marker = None
                    doomed.set()
                elif is_answer and doomed.is_set():
                    self.swallowed += 1
                    return
                if not self._silent:
                    target.write(data)
                    await target.drain()
        except ConnectionError:
            pass
        finally:
            if not self._silent:
                target.close()
