"""Hearing that the process is about to end, where the server that runs it does not say so.

uvicorn waits for open connections, without a limit, before it tells an application that it ends. So the first request
that may last puts a function before uvicorn's own handling of the signal, which ends the streams of this process. Where
signals go to another server or another thread nothing is done: set a limit on its graceful shutdown there.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import uvicorn


class Drained(Protocol):
    """What has streams to end."""

    def drain(self) -> None:
        """End them soon. From any thread."""


_drained: weakref.WeakSet[Drained] = weakref.WeakSet()


def hear_signals(site: Drained) -> None:
    """Drain it when uvicorn is told to end, as long as it is referred to elsewhere."""
    _drained.add(site)
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        previous: Any = signal.getsignal(number)
        if isinstance(getattr(previous, "__self__", None), uvicorn.Server):
            signal.signal(number, _draining_before(previous))


def _draining_before(previous: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
    def drain_all(number: int, frame: Any) -> Any:
        for site in tuple(_drained):
            site.drain()
        return previous(number, frame)

    return drain_all
