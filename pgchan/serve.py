"""A server process with worker processes beside it, all of which end together.

The server is that of pgchan.server.serve. Workers are processes of their own, so that a busy one slows nobody else; one
that ends by itself is started again. SIGTERM or SIGINT stops the server, then the workers, which drain.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
from contextlib import suppress
from typing import Any

from pgchan import console
from pgchan.errors import InvalidInput, Unavailable

CHECK_SECONDS = 5.0  # for the database's answer before the start; one that is not up yet does not keep the server down
WORKER_STOP_SECONDS = 20  # a worker's own drain is 10 s; what still runs then is killed, and taken over elsewhere
RESTART_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before a worker that ended by itself is started again

logger = logging.getLogger("pgchan.serve")


def main(found: Any, target: str, *, host: str, port: int, workers: int, insecure: bool = False) -> int:
    """Serve until a signal; the exit status.

    found: an ASGI app, or a pgchan.Worker, whose client the server then uses. target: its `module:attribute`, which
    worker processes load again. insecure: serve a worker's database to everybody, on a loopback address only.
    Raises InvalidInput; UnsafeDeployment and SchemaMismatch for a database that is not fit.
    """
    app = _app(found, target, host=host, workers=workers, insecure=insecure)
    return asyncio.run(_run(app, target, host, port, workers))


def _app(found: Any, target: str, *, host: str, workers: int, insecure: bool) -> Any:
    from pgchan import Worker
    from pgchan.server import Insecure, create_app

    if not isinstance(found, Worker):
        if not callable(found):
            raise InvalidInput(f"{target!r} is a {type(found).__name__}; name an ASGI app or a pgchan.Worker")
        if workers:
            raise InvalidInput(f"{target!r} is an ASGI app; run its workers with `pgchan worker`, and say --workers 0")
        return found
    if not insecure:
        raise InvalidInput(
            "a worker says nothing about who may do what; name an app made by create_app(client, auth=…), "
            "or say --insecure on this machine alone"
        )
    if not _is_loopback(host):
        raise InvalidInput(f"--insecure is for a loopback address, not {host!r}")
    logger.warning("everybody on this machine may read and write every channel: --insecure")
    return create_app(found.client, auth=Insecure())


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


async def _run(app: Any, target: str, host: str, port: int, workers: int) -> int:
    from pgchan.server.serve import Server, config

    console.spare_collector()
    await _refuse_unfit(app)
    server = Server(config(app, host, port, log_level="info"))
    keepers = [asyncio.create_task(_keep_worker(target, server)) for _ in range(workers)]
    try:
        await server.serve()
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
    return 0 if server.started else 1


async def _refuse_unfit(app: Any) -> None:
    """Check the database of an app made by create_app, as its first request would."""
    site = getattr(app, "site", None)
    if site is None:
        return
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await site.client._use().check_control()
    except (TimeoutError, Unavailable):
        logger.warning("the database cannot be reached yet; requests are answered with 503 until it can")


async def _keep_worker(target: str, server: Any) -> None:
    """Keep one worker process running until cancelled, or until the server is told to stop."""
    failures = 0
    while not server.should_exit:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "pgchan.cli", "worker", target)
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            await _stop(process)
            raise
        if server.should_exit:
            return
        seconds = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
        failures += 1
        logger.error("worker process %d ended with status %d; another one starts in %g s", process.pid, status, seconds)
        await asyncio.sleep(seconds)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), WORKER_STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
