"""The whole system to look at, from one command: PostgreSQL, server, worker processes and a page with buttons.

What ends when: Ctrl-C or SIGTERM ends the server, then the workers, then PostgreSQL. If this process dies without a
word, so do they: each child has the other end of a pipe as its standard input, and ends when that closes. Children
get a session of their own, so that a Ctrl-C in the terminal reaches this process alone.

The page is for one person on one machine. It may kill processes, so it is served on 127.0.0.1 only, answers to that
host name only, and acts on JSON requests only, which pages of other sites cannot send here.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib import resources
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pgchan
from pgchan import console, migrate
from pgchan import dsn as dsns
from pgchan.embedded import Embedded
from pgchan.server import Insecure, Server, create_app
from pgchan.server.serve import config

HOST = "127.0.0.1"
DRAIN_SECONDS = 1.0  # the next start goes on where this one stopped, so there is nothing to wait for
WORKER_STOP_SECONDS = 4.0
RESTART_SECONDS = 1.0  # before a worker that ended by itself is started again; one that was killed is at once
PAGE = {"": "text/html", "demo.js": "text/javascript", "demo.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def main(port: int = 8000, dsn: str | None = None, workers: int = 2, data: str | None = None) -> int:
    """Run the demo until Ctrl-C or SIGTERM; the exit status.

    dsn: the database to use and migrate. Without one an embedded PostgreSQL is started, whatever the environment says:
    a demo must not migrate a database that nobody named. data: where that keeps its files. port: 0 for any free one.
    Raises InvalidInput (the port is taken, the DSN or the directory is unfit), Unavailable, UnsafeDeployment.
    """
    with _listen(port) as listener, ExitStack() as stack:
        if dsn is None:
            os.environ.pop("PGCHAN_CONTROL_DSN", None)
            embedded = stack.enter_context(Embedded(data))
            dsn, prefix = embedded.dsn, "worker"
            _say("PostgreSQL", f"embedded; it keeps its data in {embedded.data}")
        else:
            dsn, prefix = dsns.resolve(dsn), f"demo-{os.getpid()}"
            _say("PostgreSQL", "the one of the given DSN")
        migrate.upgrade(dsn)
        console.spare_collector()
        asyncio.run(_serve(listener, dsn, workers, prefix))
    return 0


def work(name: str) -> None:
    """Be a worker of the demo named `name` on $PGCHAN_DSN, until SIGTERM or until standard input ends."""
    from pgchan.examples.research import research

    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()

    async def run() -> None:
        async with pgchan.AsyncClient() as client:
            await pgchan.Worker(client, [research], name=name, drain=DRAIN_SECONDS).run()

    console.spare_collector()
    asyncio.run(run())


def _end_with_parent() -> None:
    # A thread of its own and no clean-up: it must work whatever the event loop is doing, and a worker may die any time.
    with suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(1)


def _listen(port: int) -> socket.socket:
    # Before anything is started, so that a port in use costs one line.
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise pgchan.InvalidInput(f"port {port} cannot be used: {error.strerror}; choose another with --port") from None
    return listener


def _say(what: str, text: str) -> None:
    print(f"{what:<12}{text}", flush=True)


async def _serve(listener: socket.socket, dsn: str, count: int, prefix: str) -> None:
    port = listener.getsockname()[1]
    async with pgchan.AsyncClient(dsn) as client, _Workers(dsn, prefix, count) as workers:
        app = create_app(client, auth=Insecure())
        app.router.routes[:0] = _routes(client, workers)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        _say("Workers", ", ".join(f"{name} (pid {pid})" for name, pid in workers.alive()) or "none")
        _say("Insecure", f"whoever can reach {HOST} may read, write and kill here; for looking at only")
        await _DemoServer(config(app, HOST, port)).serve(sockets=[listener])
        # The rest takes a moment, and an impatient second Ctrl-C must not keep it from being done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


class _DemoServer(Server):
    """A server that says its address once it can answer."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _say("Open", f"http://{HOST}:{self.config.port}/demo   (Ctrl-C ends everything)")


class _Workers:
    """Worker processes, each replaced when it ends. Names are never used twice, so one can see who took over."""

    def __init__(self, dsn: str, prefix: str, count: int) -> None:
        self._environment = os.environ | {"PGCHAN_DSN": dsn}
        self._names = (f"{prefix}-{number}" for number in itertools.count(1))
        self._count = count
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> _Workers:
        for _ in range(self._count):
            await self._start()
        return self

    async def __aexit__(self, *error: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        processes = list(self._processes.values())
        for process in processes:
            with suppress(ProcessLookupError):
                process.terminate()
        if processes:
            ends = [asyncio.create_task(process.wait()) for process in processes]
            _, late = await asyncio.wait(ends, timeout=WORKER_STOP_SECONDS)
            for process in processes if late else ():
                with suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(*ends)

    def alive(self) -> Iterator[tuple[str, int]]:
        """Names and process ids."""
        return ((name, process.pid) for name, process in self._processes.items() if process.returncode is None)

    async def kill(self, name: str) -> int | None:
        """SIGKILL the worker of that name and wait until it is gone; its process id, None if it is not one of ours."""
        process = self._processes.get(name)
        if process is None or process.returncode is not None:
            return None
        process.kill()
        await process.wait()
        return process.pid

    async def _start(self) -> None:
        name = next(self._names)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pgchan.demo", name,
            stdin=asyncio.subprocess.PIPE, env=self._environment, start_new_session=True,
        )  # fmt: skip
        self._processes[name] = process
        self._keepers.append(asyncio.create_task(self._keep(name, process)))

    async def _keep(self, name: str, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        if status != -signal.SIGKILL:
            print(f"{name} ended with status {status}; another one takes its place", file=sys.stderr, flush=True)
            await asyncio.sleep(RESTART_SECONDS)
        del self._processes[name]
        await self._start()


def _routes(client: pgchan.AsyncClient, workers: _Workers) -> list[Route]:
    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "")
        if name not in PAGE:
            return _problem(404, "there is no such page")
        text = resources.files("pgchan.server").joinpath("static", name or "demo.html").read_bytes()
        return Response(text, headers={"Content-Type": f"{PAGE[name]}; charset=utf-8", **HEADERS})

    async def list_workers(request: Request) -> Response:
        return JSONResponse({"workers": [{"name": name, "pid": pid} for name, pid in workers.alive()]}, headers=HEADERS)

    async def kill(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _problem(415, "send application/json")
        run: Any = (await request.json()).get("run")
        try:
            status = await client.run(run).status()
        except (pgchan.InvalidInput, pgchan.RunNotFound) as error:
            return _problem(404, str(error))
        pid = await workers.kill(status.worker) if status.worker else None
        if pid is None:
            return _problem(409, "no worker of this demo owns the run just now")
        # Told on the run's own channel, so that every page that follows the run shows it, now and after a reload.
        told = {"type": "killed", "worker": status.worker, "pid": pid}
        with suppress(pgchan.ChannelClosed):
            await client.channel(run).publish(told)
        return JSONResponse(told, headers=HEADERS)

    return [
        Route("/demo", page),
        Route("/demo/workers", list_workers),
        Route("/demo/kill", kill, methods=["POST"]),
        Route("/demo/{name}", page),
    ]


def _problem(status: int, title: str) -> Response:
    body = {"type": "about:blank", "title": title, "status": status}
    return JSONResponse(body, status, headers=HEADERS, media_type="application/problem+json")


if __name__ == "__main__":
    work(sys.argv[1])
