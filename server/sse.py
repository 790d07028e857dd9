"""Server-sent events: one event per message, resumable at each.

    retry: 2417
    id: 0000000000000042_1795190400123456          where this reader stands; no data, so nothing is dispatched

    id: 0000000000000043_1795190400131002
    event: message
    data: {"channel":"chat/42","position":43,…}

The first block, which has an id and nothing else, lets a reader that is cut before its first message come back to the
same place. `event: reset` says that this place is lost and where reading goes on; `event: end` that the channel is closed
and all was read. A body that just ends means "to be continued".

The frame of a message is made once and kept with the message, which all readers of the process share. What is sent is
always whole frames, many at a time where many are there.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from pgchan import AsyncChannel, Message, Reset, Unavailable
from pgchan.server.endpoint import EVENT_STREAM, Call, Span

HEARTBEAT_SECONDS = 15.0  # of silence; proxies close what is silent for a minute
STALL_SECONDS = 15.0  # for a client to take what was sent
FIRST_SECONDS = 1.0  # for the database to answer, before the client is told that it has to wait
AWAY_SECONDS = 1.0  # before a database that is away is asked again
CHUNK_BYTES = 64 << 10  # of frames in one send; a stalled client holds no more than this and what its socket took
RETRY_MS = (1_000, 3_000)  # drawn anew for each connection, so that readers do not come back all at once

HEARTBEAT = b": hb\n\n"
WAITING = b": waiting\n\n"

_LINE_END = re.compile(rb"\r\n|\r|\n")


class EventStream:
    """The ASGI application that answers with a channel's messages from `after` on, until it is closed.

    resumed: whether the client has been here before. It is then told by 204 that there is nothing left, which ends an
    EventSource; a first request always gets a stream.
    """

    def __init__(self, call: Call, channel: AsyncChannel, after: int | str, view: str, *, resumed: bool) -> None:
        self._call = call
        self._channel = channel
        self._view = view
        self._resumed = resumed
        self._tail = channel.tail(after=after, view=view)
        self._cursor = _known_cursor(after)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        last = b""
        try:
            async with self._call.span() as span:
                if await self._open():
                    last = await self._run()
            if span.ended != "gone":
                await self._write(_last_frame(span, last), more=False)
        except _Stalled:
            _abort(scope)
        finally:
            self._tail.unfollow()

    async def _open(self) -> bool:
        """Send the head and what is there; False if that was all there ever will be."""
        is_late, found = False, None
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                found = await self._first()
        except (TimeoutError, Unavailable):
            is_late, found = True, []
        except Reset:
            found = []  # told by _run, which meets it again
        is_over = found is None and self._resumed
        await self._start(204 if is_over else 200)
        if is_over:
            return False
        block = f"retry: {random.randint(*RETRY_MS)}\n".encode()  # noqa: S311
        cursor = self._cursor or (None if found else self._tail.cursor)
        if cursor is not None:
            block += f"id: {cursor}\n".encode()
        await self._write(block + b"\n" + (WAITING if is_late else b""))
        self._found = found
        return True

    async def _first(self) -> list[Message] | None:
        if self._cursor is None and self._is_from_now:
            pass
        return await self._tail.next_page(0.0)

    async def _run(self) -> bytes:
        """Send what comes; returns the frame that tells the end."""
        return b""

    async def _start(self, status: int) -> None:
        raise NotImplementedError

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        raise NotImplementedError
