"""Server-sent events: one event per message, resumable at each.

    retry: 2417
    id: 0000000000000042_1795190400123456          where this reader stands; no data, so nothing is dispatched

    id: 0000000000000043_1795190400131002
    event: message
    data: {"channel":"chat/42","position":43,…}

The first block, which has an id and nothing else, lets a reader that is cut before its first message come back to the
same place. `event: reset` says that this place is lost and where reading goes on, `event: end` that the channel is
closed and all was read. A body that just ends means "to be continued".

The frame of a message is made once and kept with the message, which all readers of the process share. What is sent is
always whole frames, many at a time where many are there.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.types import Receive, Scope, Send

from pgchan import AsyncChannel, HistoryLost, Message, Reset, Unavailable, names
from pgchan.server.endpoint import LOOK_SECONDS, Call
from pgchan.server.fanout import WIRE, WRITE_BYTES_MAX, Rider, Wire

HEARTBEAT_SECONDS = 15.0  # of silence; proxies close what is silent for a minute
STALL_SECONDS = 15.0  # for a client to take what was sent
FIRST_SECONDS = 1.0  # for the database to answer, before the client is told that it has to wait
WAIT_SECONDS = 60.0  # for news, before a stream that is alone tries to get on a fanout again
AWAY_SECONDS = 1.0  # before a database that is away is asked again
RETRY_MS = (1_000, 3_000)  # drawn for each connection, so that readers do not come back all at once

HEARTBEAT = b": hb\n\n"
WAITING = b": waiting\n\n"

_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
_LINE_END = re.compile(rb"\r\n|\r|\n")
_EXPIRED = b"event: auth_expired\ndata: {}\n\n"


class EventStream:
    """The ASGI application that answers with a channel's messages behind `after`, until it is closed.

    resumed: whether the client says that it has been here before. It is then told by 204 that nothing is left, which
    ends an EventSource; a first request always gets a stream.
    """

    def __init__(self, call: Call, channel: AsyncChannel, after: int | str, view: str, *, resumed: bool) -> None:
        self._call = call
        self._channel = channel
        self._view = view
        self._resumed = resumed
        self._after = after
        self._tail = channel.tail(after=after, view=view)
        # Where this reader stood before its first message; None until the database was asked.
        self._cursor = names.format_cursor(0, 0) if after == 0 else self._tail.cursor
        self._span = call.span(self._look)
        self._is_open = False
        self._sent_at = 0.0
        self._wire: Wire | None = None
        self._rider: Rider | None = None
        self._sending_since: float | None = None
        self._beat: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._wire = scope.get("extensions", {}).get(WIRE)
        last = b""
        try:
            async with self._span:
                last = await self._stream()
            if self._span.ended in ("gone", "stalled"):
                return
            async with asyncio.timeout(STALL_SECONDS):
                if not self._is_open:
                    await self._open(200)
                await self._write(_EXPIRED if self._span.ended == "expired" else last, more=False)
        except TimeoutError:
            self._span.ended = "stalled"
        finally:
            self._tail.unfollow()
            if self._beat is not None:
                self._beat.cancel()
            if self._span.ended == "stalled" and self._wire is not None:
                # To return without the last chunk closes the connection once the client has taken what it was sent.
                self._wire.abort()

    def _look(self, now: float) -> None:
        """Cut a client that takes nothing, give a sign of life to one that was sent nothing. Called every second."""
        if self._sending_since is not None:
            if now - self._sending_since > STALL_SECONDS:
                self._span.end("stalled")
        elif self._is_open and now - self._last_sent() > HEARTBEAT_SECONDS - LOOK_SECONDS:
            self._beat = asyncio.create_task(self._write(self._sign(HEARTBEAT)))

    def _last_sent(self) -> float:
        return max(self._sent_at, self._rider.sent_at if self._rider is not None else 0.0)

    async def _stream(self) -> bytes:
        """Send all there is and all that comes; returns the frame for the end."""
        # A task, so that a database that is slow or away is still being asked while the client is told to wait.
        first = asyncio.create_task(self._first())
        try:
            await asyncio.wait({first}, timeout=FIRST_SECONDS)
            is_late = not first.done()
            if not is_late and first.result() is None and self._resumed:
                await self._open(204)
                return b""
            await self._open(200)
            place = self._cursor
            block = f"retry: {random.randint(*RETRY_MS)}\n".encode()  # noqa: S311
            await self._write(block + _id(place) + b"\n" + (WAITING if is_late else self._sign(b"")))
            found = await first
        finally:
            first.cancel()
        if place is None and self._cursor is not None:
            await self._write(_id(self._cursor) + b"\n")
        while found is not None:
            if found:
                for chunk in in_chunks(frame(message) for message in found):
                    await self._write(chunk)
                found = await self._next(0.0)
            else:
                await self._ride()
                found = await self._next(WAIT_SECONDS)
        cursor = self._tail.cursor or self._cursor
        return _event("end", {"cursor": cursor}, cursor)

    async def _first(self) -> list[Message] | None:
        """What is there already."""
        try:
            await self._place()
            return await self._tail.next_page(0.0)
        except (Unavailable, Reset):
            return []  # met again by _next, and told

    async def _place(self) -> str | None:
        """Find the cursor of a bare position, or of "now", so that a reader that is cut at once can name its place."""
        if self._cursor is not None:
            return self._cursor
        if self._after == "now":
            self._cursor = (await self._channel.page(after="now")).cursor
        else:
            before = int(self._after) - 1
            try:
                found = (await self._channel.page(after=before, limit=1, view="raw")).messages
            except Reset as reset:
                if int(reset.cursor[:16]) != self._after:
                    raise
                self._cursor = reset.cursor  # of a position that is the trim boundary
            else:
                if not found:
                    return None  # past the head: the tail says so
                self._cursor = found[0].cursor
        self._tail.unfollow()
        self._tail = self._channel.tail(after=self._cursor, view=self._view)
        return self._cursor

    async def _ride(self) -> None:
        """With everything sent that there was, let the site's fanout send what comes, while it can."""
        cursor = self._tail.cursor
        if self._wire is None or not self._wire.is_bare or cursor is None:
            return
        self._rider = Rider(self._wire, cursor)
        try:
            await self._call.site.fanouts.ride(self._channel, self._view, self._rider, _frames)
        finally:
            self._sent_at, rider, self._rider = self._last_sent(), self._rider, None
        if rider.cursor != cursor:
            self._tail.unfollow()
            self._tail = self._channel.tail(after=rider.cursor, view=self._view)

    async def _next(self, wait: float) -> list[Message] | None:
        """The next page, empty if none comes in `wait` seconds; None at the channel's end."""
        try:
            if self._cursor is None and (cursor := await self._place()) is not None:
                await self._write(_id(cursor) + b"\n")
            return await self._tail.next_page(wait)
        except Unavailable:
            await asyncio.sleep(AWAY_SECONDS)
        except Reset as reset:
            await self._write(_reset_event(reset))
            self._cursor = reset.cursor
            self._tail.unfollow()
            self._tail = self._channel.tail(after=reset.cursor, view=self._view)
        return []

    def _sign(self, alive: bytes) -> bytes:
        """A sign of life: `alive`, or that the database cannot be heard just now."""
        return alive if self._call.client.health == "listening" else WAITING

    async def _open(self, status: int) -> None:
        self._is_open = True
        headers = list(_HEADERS) if status == 200 else []
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        self._sending_since = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sent_at, self._sending_since = self._sending_since, None


def frame(message: Message) -> bytes:
    """The event of a message, made once."""
    data = message.to_json()
    assert message.cache is not None
    if (found := message.cache.get("sse")) is None:
        found = message.cache["sse"] = (
            f"id: {message.cursor}\nevent: {message.kind}\n".encode() + _data_lines(data) + b"\n"
        )
    return found


def _frames(messages: list[Message]) -> bytes:
    return b"".join(map(frame, messages))


def in_chunks(frames: Iterable[bytes]) -> Iterator[bytes]:
    """Whole frames, joined up to WRITE_BYTES_MAX."""
    waiting: list[bytes] = []
    size = 0
    for each in frames:
        if waiting and size + len(each) > WRITE_BYTES_MAX:
            yield b"".join(waiting)
            waiting, size = [], 0
        waiting.append(each)
        size += len(each)
    if waiting:
        yield b"".join(waiting)


def _data_lines(data: bytes) -> bytes:
    # A stored JSON body may have line ends as white space.
    if b"\n" not in data and b"\r" not in data:
        return b"data: " + data + b"\n"
    return b"".join(b"data: " + line + b"\n" for line in _LINE_END.split(data))


def _id(cursor: str | None) -> bytes:
    return b"" if cursor is None else f"id: {cursor}\n".encode()


def _event(name: str, data: dict[str, Any], cursor: str | None) -> bytes:
    return _id(cursor) + f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _reset_event(reset: Reset) -> bytes:
    reason = "history_lost" if isinstance(reset, HistoryLost) else "trimmed"
    data = {"reason": reason, "first": reset.first, "last": reset.last, "cursor": reset.cursor}
    return _event("reset", data, reset.cursor)
