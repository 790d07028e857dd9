"""An ASGI server, uvicorn, that ends within two seconds of SIGTERM, whoever is still reading.

What happens then: the listeners close, so that readers come back to another process; streams and long polls end, each
at a moment of its own within DRAIN_SECONDS; what else is under way has until GRACE_SECONDS.
"""

from __future__ import annotations

import signal
import socket
from asyncio import TimerHandle, Transport
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE_SECONDS = 1
HEAD_SECONDS = 10.0  # for the head of a request to arrive, and for what is left of one that was answered already
HEAD_BYTES_MAX = 96 << 10  # of a request; a URL that is too long is told so, not just cut


class Server(uvicorn.Server):
    """uvicorn's server, which drains the application before it waits for connections to end.

    After a signal `serve` returns, where uvicorn would raise the signal once more: a drain is a success.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners and end what is open."""
        drain = getattr(self.config.app, "drain", None)
        if drain is not None:
            drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first one ends the server in good order, a second SIGINT at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class Protocol(H11Protocol):
    """uvicorn's side of a connection, which it leaves open for as long as a client that never finishes its request."""

    _cutting: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Take in what came; one byte now and then is no reason to wait for longer."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the rest of a body that nobody reads. Where there is none uvicorn's own keep-alive counts."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._wait_no_more()

    def _look(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete  # the application has limits itself
        if is_answering or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._wait_no_more()
        elif self._cutting is None:
            self._cutting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._cutting is not None:
            self._cutting.cancel()
            self._cutting = None


async def serve(app: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve an application until SIGTERM or SIGINT. options: further ones of uvicorn.Config.

    There is no access log: a URL may hold what should not be kept.
    """
    await Server(config(app, host, port, **options)).serve()


def config(app: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> uvicorn.Config:
    """The settings of `serve`, for a Server of one's own."""
    settings: dict[str, Any] = {
        "timeout_graceful_shutdown": GRACE_SECONDS, "access_log": False, "log_level": "warning",
        "http": Protocol, "h11_max_incomplete_event_size": HEAD_BYTES_MAX, "server_header": False,
    }  # fmt: skip
    return uvicorn.Config(app, host=host, port=port, **settings | options)
