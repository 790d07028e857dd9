"""Many streams of one channel, written by one task.

A stream that has caught up has nothing of its own to do: what comes next is the same bytes for all. So it gets on a
`Fanout`, which reads the channel once and writes each page to every connection that can take it, without waking a task
for each of them. Whoever is special gets off and goes on alone from its cursor: a client that takes nothing, a reader
whose history is another one, a page that is too large for one write, the channel's end. Alone it finds out what there
is to find out; see sse.py.

That needs a connection to write to, beneath ASGI: a `Wire`, which `App` finds under uvicorn. Without one, and behind
middleware that may change what is sent, streams go on one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

from starlette.types import Scope, Send

from pgchan import AsyncChannel, Message, Reset, errors

WIRE = "pgchan.wire"  # extension of the ASGI scope
WRITE_BYTES_MAX = 64 << 10  # of a page that is written to all at once; what a stalled client holds beside its socket
WRITES = 100  # connections in a row, before other tasks of the process have a turn

Encode: TypeAlias = Callable[[list[Message]], bytes]


class Wire:
    """The connection of one request, under uvicorn.

    is_bare: nothing on the way changes what is sent. is_chunked: the answer's body is; HTTP/1.0 does not know it.
    """

    __slots__ = ("_flow", "_transport", "is_bare", "is_chunked")

    def __init__(self, transport: asyncio.Transport, flow: Any, is_bare: bool, is_chunked: bool) -> None:
        self._transport = transport
        self._flow = flow
        self.is_bare = is_bare
        self.is_chunked = is_chunked

    @classmethod
    def of(cls, scope: Scope, send: Send, is_bare: bool) -> Wire | None:
        """The connection behind `send`; None if the server is another one."""
        cycle = getattr(send, "__self__", None)
        transport, flow = getattr(cycle, "transport", None), getattr(cycle, "flow", None)
        if scope["type"] != "http" or not isinstance(transport, asyncio.Transport) or not hasattr(flow, "write_paused"):
            return None
        return cls(transport, flow, is_bare, scope["http_version"] == "1.1")

    def write(self, chunk: bytes) -> bool:
        """Send it, or send nothing and return False, if the client has not yet taken what it was sent before."""
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self._transport.write(chunk)
        return True

    def abort(self) -> None:
        """Close the connection without waiting for the client."""
        self._transport.abort()


class Rider:
    """A stream on a fanout. cursor: behind what it was sent. sent_at: when that was, by the loop's clock."""

    __slots__ = ("cursor", "left", "sent_at", "wire")

    def __init__(self, wire: Wire, cursor: str) -> None:
        self.wire = wire
        self.cursor = cursor
        self.sent_at = 0.0
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def get_off(self) -> None:
        """Let the stream go on alone."""
        if not self.left.done():
            self.left.set_result(None)


class Fanout:
    """One tail of a channel, and the streams that it is written to."""

    def __init__(self, channel: AsyncChannel, view: str, cursor: str, encode: Encode) -> None:
        self.cursor = cursor  # behind what the riders were sent, unless they were ahead
        self._encode = encode
        self._riders: dict[Rider, None] = {}
        self._tail = channel.tail(after=cursor, view=view)
        self._task = asyncio.create_task(self._run(), name=f"pgchan fanout {channel.name}")

    def get_on(self, rider: Rider) -> bool:
        """Take it along, unless it is behind or has read another history."""
        is_fit = rider.cursor == self.cursor or rider.cursor[:16] > self.cursor[:16]
        if is_fit and not self._task.done():
            self._riders[rider] = None
            return True
        return False

    def get_off(self, rider: Rider) -> bool:
        """Leave it; True if it was the last."""
        self._riders.pop(rider, None)
        return not self._riders

    def end(self) -> None:
        """Stop reading. Whoever is on goes on alone."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            while (page := await self._tail.next_page()) is not None:
                if page:
                    await self._write(page)
        except (Reset, errors.Error):
            pass  # each of them meets it alone, and tells its client
        except asyncio.CancelledError:
            pass  # by `end`; a task that keeps it keeps the last page, until the collector comes by
        finally:
            self._tail.unfollow()
            for rider in self._riders:
                rider.get_off()

    async def _write(self, page: list[Message]) -> None:
        before, self.cursor = self.cursor, self._tail.cursor or self.cursor
        plain = self._encode(page)
        chunk = chunked(plain)
        now = asyncio.get_running_loop().time()
        for count, rider in enumerate(tuple(self._riders), 1):
            if rider.left.done():
                continue  # it got off while others had their turn
            if len(plain) > WRITE_BYTES_MAX:
                rider.get_off()
            elif rider.cursor == before and rider.wire.write(chunk if rider.wire.is_chunked else plain):
                rider.cursor, rider.sent_at = self.cursor, now
            elif rider.cursor != self.cursor and rider.cursor[:16] <= self.cursor[:16]:
                rider.get_off()  # it takes nothing, or it got on in the middle of this page
            if count % WRITES == 0:
                await asyncio.sleep(0)


class Fanouts:
    """The fanouts of a site, by channel and view."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Fanout] = {}

    async def ride(self, channel: AsyncChannel, view: str, rider: Rider, encode: Encode) -> None:
        """Have the channel written to this stream for as long as that goes well. `rider.cursor` is then where it is."""
        key = channel.name, view
        fanout = self._open.get(key)
        if fanout is None:
            fanout = self._open[key] = Fanout(channel, view, rider.cursor, encode)
        try:
            if fanout.get_on(rider):
                await rider.left
        finally:
            if fanout.get_off(rider):
                fanout.end()
                if self._open.get(key) is fanout:
                    del self._open[key]


def chunked(data: bytes) -> bytes:
    """One chunk of a body in HTTP/1.1's chunked transfer coding (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)
