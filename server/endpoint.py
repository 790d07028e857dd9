"""One request: who is let in, within which limits, and what can end it early.

Every route is an `Endpoint`, a plain ASGI application. It refuses, in this order: what is too long or malformed, a
foreign origin, who is not known (401), a method or a media type that is not offered. Then it calls the route's function
for the method, which states the right that it needs before it touches the database. Whatever that raises becomes a
problem document here and nowhere else.

There is no middleware: one that wraps `receive` hides the client's leaving from a stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgchan import AsyncClient, names
from pgchan.server import auth as auths
from pgchan.server import draining
from pgchan.server.fanout import Fanouts
from pgchan.server.problems import Problem, bad_request, forbidden, problem, unauthorized

URL_BYTES_MAX = 8 << 10  # what browsers and proxies agree on
HEADERS_MAX = 100  # browsers and proxies send some thirty
HEADER_BYTES_MAX = 32 << 10  # of all of them: a token of the greatest size, cookies, what proxies add
REQUEST_BYTES_MAX = names.BODY_BYTES_MAX + (64 << 10)  # a message of the greatest size, and what stands around it
REQUEST_SECONDS_MAX = 15.0  # for the body to arrive
WAIT_SECONDS_MAX = 30.0  # of a long poll
LOOK_SECONDS = 1.0  # between two looks at all streams
DRAIN_SECONDS = 0.7  # over which streams end, so that their readers do not come back all at once

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

logger = logging.getLogger("pgchan.server")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBER = re.compile(r"[0-9]{1,16}")
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")


class Site:
    """What the routes of one `create_app` or `routes` share: the client, who may do what, and who is waiting."""

    def __init__(self, client: AsyncClient, auth: Any, allow_origins: Sequence[str]) -> None:
        self.client = client
        self.auth = auths.as_auth(auth)
        self.is_denied = auth is None
        self.allow_origins = frozenset(allow_origins)
        self.is_draining = False
        self.fanouts = Fanouts()
        self._spans: set[Span] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self, span: Span) -> None:
        """Count a request that may last; end it soon if the process is about to."""
        self._spans.add(span)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            draining.hear_signals(self)
        if self._looking is None:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)
        if self.is_draining:
            span.end_soon("draining")

    def leave(self, span: Span) -> None:
        """Count it no more."""
        self._spans.discard(span)

    def _look(self) -> None:
        # One timer for all streams: two for each message would cost more than sending it.
        loop = asyncio.get_running_loop()
        for span in tuple(self._spans):
            if span.look is not None:
                span.look(loop.time())
        self._looking = loop.call_later(LOOK_SECONDS, self._look) if self._spans else None

    def drain(self) -> None:
        """End every stream and long poll within a second. From any thread."""
        if self._loop is None or self._loop.is_closed():
            self.is_draining = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self.is_draining = True
        for span in tuple(self._spans):
            span.end_soon("draining")


class Span:
    """`async with`: a block that ends early, and quietly, when the client leaves, the server drains or a right expires.

    ended: why, which is "gone", "draining", "expired" or what end() was told; None where the block came to its own end.
    look: called with the loop's time every LOOK_SECONDS.
    """

    def __init__(
        self, site: Site, receive: Receive, expires_at: float | None, look: Callable[[float], None] | None
    ) -> None:
        self.ended: str | None = None
        self.look = look
        self._site = site
        self._receive = receive
        self._expires_at = expires_at
        self._timeout = asyncio.timeout(None)
        self._timers: list[asyncio.TimerHandle] = []

    async def __aenter__(self) -> Span:
        await self._timeout.__aenter__()
        self._watcher = asyncio.create_task(self._watch())
        if self._expires_at is not None:
            self._end_in(max(0.0, self._expires_at - time.time()), "expired")
        self._site.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._site.leave(self)
        self._watcher.cancel()
        for timer in self._timers:
            timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            return True
        return False

    def end_soon(self, reason: str) -> None:
        """End it at a moment of its own within DRAIN_SECONDS."""
        self._end_in(random.uniform(0.0, DRAIN_SECONDS), reason)  # noqa: S311

    def _end_in(self, seconds: float, reason: str) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, self.end, reason))

    def end(self, reason: str) -> None:
        """End it now."""
        if self.ended is None:
            self.ended = reason
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end("gone")


class Call:
    """One request that was let in, and what its route may ask of it."""

    def __init__(self, site: Site, request: Request, principal: Any, accepted: str) -> None:
        self.site = site
        self.client = site.client
        self.request = request
        self.principal = principal
        self.accepted = accepted
        self.size = 0  # of the request's body, once it was read
        self.parameters = _once(request.query_params.multi_items(), "query parameter")

    @property
    def name(self) -> str:
        """The channel or the run in the path, as it was decoded once."""
        found: str = self.request.path_params["name"]
        return found

    async def require(self, operation: str, channel: str) -> None:
        """Refuse, with the same bytes whether or not there is such a channel, unless the caller may do this."""
        if not await auths.is_allowed(self.site.auth, self.principal, operation, channel):
            raise forbidden()

    def header(self, name: str) -> str | None:
        """The value of a header that may come once."""
        values = self.request.headers.getlist(name)
        if len(values) > 1:
            raise bad_request(f"header {name} is repeated")
        return values[0] if values else None

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """A query parameter that is a whole number."""
        text = self.parameters.get(name)
        if text is None:
            return default
        if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
            raise bad_request(f"{name} must be a number from {least} to {most}")
        return int(text)

    def seconds(self, name: str) -> float:
        """A query parameter that says how long to wait."""
        text = self.parameters.get(name, "0")
        if not _SECONDS.fullmatch(text) or float(text) > WAIT_SECONDS_MAX:
            raise bad_request(f"{name} must be a number of seconds from 0 to {WAIT_SECONDS_MAX:g}")
        return float(text)

    async def json(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
        """The request's JSON object, with no other fields than these. Where none is required it may be left out."""
        raw = await self._body()
        if not raw and not required:
            return {}
        if self.request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise Problem(415, "unsupported_media_type", f"send {JSON}")
        if self.request.headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "unsupported_media_type", "send the body without a content encoding")
        try:
            found = json.loads(raw.decode())  # decoded here, for json would also take UTF-16 and UTF-32
        except UnicodeDecodeError:
            raise bad_request("the body is not UTF-8") from None
        except (ValueError, RecursionError):
            raise bad_request("the body is not JSON") from None
        if not isinstance(found, dict):
            raise bad_request("the body must be a JSON object")
        for name in required:
            if name not in found:
                raise bad_request(f"the body must have {name!r}")
        if unknown := found.keys() - {*required, *optional}:
            raise bad_request(f"the body may not have {min(unknown)!r:.80}")
        return found

    async def _body(self) -> bytes:
        too_large = Problem(413, "too_large", f"the body may have at most {REQUEST_BYTES_MAX} bytes")
        declared = self.request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > REQUEST_BYTES_MAX:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                async for chunk in self.request.stream():
                    raw += chunk
                    if len(raw) > REQUEST_BYTES_MAX:
                        raise too_large
        except TimeoutError:
            raise Problem(408, "too_slow", headers={"Connection": "close"}) from None
        self.size = len(raw)
        return bytes(raw)

    def span(self, look: Callable[[float], None] | None = None) -> Span:
        """A block in which this request waits; see Span."""
        return Span(self.site, self.request.receive, getattr(self.principal, "expires_at", None), look)


Answer: TypeAlias = Callable[[Call], Awaitable[ASGIApp]]


class Endpoint:
    """The ASGI application of one route: a function for each method, behind the same door."""

    def __init__(
        self, site: Site, answers: Mapping[str, Answer], *, produces: Sequence[str] = (JSON,), is_public: bool = False
    ) -> None:
        """produces: the media types, the first by default. is_public: what it tells is no secret; no one is asked."""
        self._site = site
        self._answers = dict(answers)
        self._produces = produces
        self._is_public = is_public and not site.is_denied
        self._allow = ", ".join(sorted({*answers, "OPTIONS"} | ({"HEAD"} if "GET" in answers else set())))
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "cross-origin" if site.allow_origins else "same-origin",
            "Referrer-Policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket, which is not spoken here: the handshake is answered with 403
            await send({"type": "websocket.close"})
            return
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        given_id = given if _REQUEST_ID.fullmatch(given) else None
        request_id = given_id or secrets.token_hex(8)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=list(message["headers"]))
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                headers["X-Request-Id"] = request_id
                message = {**message, "headers": headers.raw}
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            answer = await self._answer(request)
            await answer(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        except Exception as error:
            found = problem(error)
            if found.status >= 500:
                logger.log(
                    logging.ERROR if found.status == 500 else logging.WARNING,
                    "request %s failed: %s", request_id, found.code, exc_info=found.status == 500,
                )  # fmt: skip
            if started:
                return  # a stream that cannot go on is cut; the reader resumes from its cursor
            # A 403 carries only the id that the caller gave, so that it says nothing about whether a channel exists.
            response = found.response(given_id if found.status == 403 else request_id)
            await response(scope, receive, send_with_headers)

    async def _answer(self, request: Request) -> ASGIApp:
        _check_head(request.scope)
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            # Two lengths: what a proxy took for one request may be two.
            raise Problem(400, "invalid_input", "the body has two lengths", headers={"Connection": "close"})
        if not self._is_from_here(request):
            raise Problem(403, "foreign_origin")
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": self._allow})
        principal = None
        if not self._is_public:
            principal = await auths.authenticate(self._site.auth, request)
            if principal is None:
                raise unauthorized()
        method = "GET" if request.method == "HEAD" and "HEAD" not in self._answers else request.method
        if method not in self._answers:
            raise Problem(405, "method_not_allowed", headers={"Allow": self._allow})
        accepted = choose(", ".join(request.headers.getlist("accept")), self._produces)
        if accepted is None:
            raise Problem(406, "not_acceptable", f"this is offered as {' or '.join(self._produces)}")
        return await self._answers[method](Call(self._site, request, principal, accepted))

    def _is_from_here(self, request: Request) -> bool:
        """Whether the page that sends this, if it is one, is of this host or of an origin that is allowed."""
        origin = request.headers.get("origin")
        if origin is None or origin in self._site.allow_origins:
            return True
        # Behind a proxy that changes Host only the browser knows; pages cannot set this header.
        if request.headers.get("sec-fetch-site") == "same-origin":
            return True
        return origin.partition("://")[2] == request.headers.get("host")


def choose(accept: str, offered: Sequence[str]) -> str | None:
    """The offered media type that an Accept header likes best; None if it takes none of them."""
    liked: dict[str, float] = {}
    for item in accept.split(","):
        media, *options = (part.strip().lower() for part in item.split(";"))
        weight = next((option[2:] for option in options if option.startswith("q=")), "1")
        if media:
            liked[media] = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0
    if not liked:
        return offered[0]

    def rate(media: str) -> tuple[float, int]:
        for closeness, asked in enumerate((media, media.partition("/")[0] + "/*", "*/*")):
            if asked in liked:
                return liked[asked], -closeness
        return 0.0, 0

    best = max(offered, key=rate)
    return best if rate(best)[0] > 0 else None


def _check_head(scope: Scope) -> None:
    path = scope.get("raw_path") or scope["path"].encode()
    if len(path) + len(scope["query_string"]) > URL_BYTES_MAX:
        raise Problem(414, "url_too_long", f"a URL may have at most {URL_BYTES_MAX} bytes")
    headers = scope["headers"]
    if len(headers) > HEADERS_MAX or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES_MAX:
        at_most = f"at most {HEADERS_MAX} headers of {HEADER_BYTES_MAX} bytes in all"
        raise Problem(431, "headers_too_large", f"a request may have {at_most}")
    if not all("!" <= character <= "~" for character in scope["path"]):
        raise bad_request("the path holds characters that no name may have")


def _once(items: Sequence[tuple[str, str]], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in items:
        if name in found:
            raise bad_request(f"{what} {name!r:.80} is repeated")
        found[name] = value
    return found
