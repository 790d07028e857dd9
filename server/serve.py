"""An ASGI server, uvicorn, that ends within two seconds of SIGTERM, whoever is still reading.

What happens then: the listeners close, so that readers come back to another process; streams and long polls end, each
at a moment of its own within DRAIN_SECONDS; what else is under way has until GRACE_SECONDS.
"""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

GRACE_SECONDS = 1
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


async def serve(app: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve an application until SIGTERM or SIGINT. options: further ones of uvicorn.Config.

    There is no access log: a URL may hold what should not be kept.
    """
    await Server(config(app, host, port, **options)).serve()


def config(app: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> uvicorn.Config:
    """The settings of `serve`, for a Server of one's own."""
    settings: dict[str, Any] = {
        "timeout_graceful_shutdown": GRACE_SECONDS, "access_log": False, "log_level": "warning",
        "h11_max_incomplete_event_size": HEAD_BYTES_MAX, "server_header": False,
    }  # fmt: skip
    return uvicorn.Config(app, host=host, port=port, **settings | options)
