"""The application, and the routes to mount in another one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from pgchan import AsyncClient, InvalidInput
from pgchan.server.auth import ChannelAuth, Hook
from pgchan.server.channels import channel_endpoint
from pgchan.server.endpoint import Call, Endpoint, Site
from pgchan.server.fanout import WIRE, Wire
from pgchan.server.problems import Problem
from pgchan.server.runs import json_answer, run_endpoint, run_endpoints, runs_endpoint

JAVASCRIPT = "text/javascript"
STATIC = Path(__file__).parent / "static"

_ALLOW_METHODS = ("GET", "HEAD", "POST", "DELETE")
_ALLOW_HEADERS = ("Authorization", "Content-Type", "Last-Event-ID", "Idempotency-Key", "X-Request-Id")
_EXPOSE_HEADERS = (
    "Stream-Next-Offset", "Stream-Up-To-Date", "Stream-Closed", "Location", "Retry-After", "X-Request-Id",
)  # fmt: skip


class App(Starlette):
    """What `create_app` returns: a Starlette application that can end its streams."""

    site: Site

    def drain(self) -> None:
        """End every stream and long poll within a second, for the process is about to end. From any thread."""
        self.site.drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Middleware that somebody added may change what is sent, so nothing is written behind its back.
        added: list[Any] = [middleware.cls for middleware in self.user_middleware]
        is_bare = all(kind is CORSMiddleware for kind in added)
        if (wire := Wire.of(scope, send, is_bare)) is not None:
            scope.setdefault("extensions", {})[WIRE] = wire
        await super().__call__(scope, receive, send)


def create_app(
    client: AsyncClient, *, auth: ChannelAuth | Hook | None = None, allow_origins: Sequence[str] = (),
    dashboard: bool = True,
) -> App:  # fmt: skip
    """An application with all routes; without `auth` it answers 401 to everything.

    client: opened on first use, and closed by whoever made it. auth: a ChannelAuth, or one function
    `async authorize(request, operation, channel) -> bool`. allow_origins: origins of other sites, such as
    "https://example.org", whose pages may use this. dashboard: reserved for the dashboard.
    Raises InvalidInput.
    """
    site = _site(client, auth, allow_origins)
    app = App(routes=_routes(site))
    app.site = site
    app.router.redirect_slashes = False
    app.router.default = Endpoint(site, dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), _nothing_here))
    return app


def routes(
    client: AsyncClient, *, auth: ChannelAuth | Hook | None = None, allow_origins: Sequence[str] = ()
) -> list[BaseRoute]:
    """The same routes, to mount: `Mount("/pgchan", routes=routes(client, auth=…))`.

    Nothing has to be started: a mounted application hears of no start and no end. Streams end with the process under
    uvicorn; other servers need a limit on their graceful shutdown. Raises InvalidInput.
    """
    return _routes(_site(client, auth, allow_origins))


def _site(client: AsyncClient, auth: Any, allow_origins: Sequence[str]) -> Site:
    if isinstance(allow_origins, str) or "*" in allow_origins:
        raise InvalidInput("allow_origins must name each origin, such as 'https://example.org'; '*' is not taken")
    return Site(client, auth, allow_origins)


def _routes(site: Site) -> list[BaseRoute]:
    make = partial(Route, middleware=_cors(site))
    return [
        make("/channels/{name:pgchan}", channel_endpoint(site)),
        make("/runs", runs_endpoint(site)),
        *(make(f"/runs/{{name:pgchan}}/{last}", endpoint) for last, endpoint in run_endpoints(site).items()),
        make("/runs/{name:pgchan}", run_endpoint(site)),
        make("/healthz", Endpoint(site, {"GET": _health}, is_public=True)),
        make("/pgchan.js", Endpoint(site, {"GET": _browser_client}, produces=(JAVASCRIPT,), is_public=True)),
    ]


def _cors(site: Site) -> list[Middleware]:
    if not site.allow_origins:
        return []
    return [
        Middleware(
            CORSMiddleware, allow_origins=sorted(site.allow_origins), allow_methods=_ALLOW_METHODS,
            allow_headers=_ALLOW_HEADERS, expose_headers=_EXPOSE_HEADERS, allow_credentials=True,
        )
    ]  # fmt: skip


class _Name(Convertor[str]):
    # Unlike Starlette's "path" this also matches line ends, so that a name with one is refused and not cut there.
    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("pgchan", _Name())


async def _health(call: Call) -> Response:
    """Whether this process takes requests, and how it hears of news, in words."""
    status = "draining" if call.site.is_draining else "ok"
    return json_answer({"status": status, "listener": call.client.health}, 503 if call.site.is_draining else 200)


async def _browser_client(_: Call) -> Response:
    """The browser client, an ES module."""
    try:
        text = (STATIC / "pgchan.js").read_bytes()
    except FileNotFoundError:
        raise Problem(404, "not_found") from None
    return Response(text, headers={"Cache-Control": "no-cache"}, media_type=JAVASCRIPT)


async def _nothing_here(_: Call) -> Response:
    raise Problem(404, "not_found")
