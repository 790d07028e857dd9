"""/channels/{name}: read as page, long poll or stream; publish, close, delete."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from pgchan import AsyncChannel, InvalidInput, Message, Page, RunNotFound, names
from pgchan.server.endpoint import EVENT_STREAM, JSON, Call, Endpoint, Site
from pgchan.server.problems import Problem, bad_request
from pgchan.server.sse import EventStream

PAGE_MESSAGES = 100


def channel_endpoint(site: Site) -> Endpoint:
    """/channels/{name}"""
    answers = {"GET": read, "HEAD": describe, "POST": publish, "DELETE": delete}
    return Endpoint(site, answers, produces=(JSON, EVENT_STREAM))


async def read(call: Call) -> ASGIApp:
    """Messages behind a cursor: a stream for who accepts event streams, else a page, for which `wait=` waits."""
    channel = call.client.channel(call.name)
    view = names.check_view(call.parameters.get("view", "final"))
    limit = call.integer("limit", PAGE_MESSAGES, 1, names.PAGE_MESSAGES_MAX)
    wait = call.seconds("wait")
    seen = call.header("last-event-id") or None
    asked = call.parameters.get("after")
    after = parse_after(asked) if asked is not None else 0
    is_stream = call.accepted == EVENT_STREAM
    if seen is not None:
        # A browser reconnects to its first URL, so for a stream the header wins. For a page there is no such reason.
        if not is_stream and asked is not None and parse_after(seen) != after:
            raise bad_request("after and Last-Event-ID differ")
        after = parse_after(seen)
    await call.require("read", channel.name)
    if is_stream:
        return EventStream(call, channel, after, view, resumed=seen is not None)
    return page_answer(await _page(call, channel, after, limit, view, wait))


async def _page(call: Call, channel: AsyncChannel, after: int | str, limit: int, view: str, wait: float) -> Page:
    page = await channel.page(after=after, limit=limit, view=view)
    if wait and not page.messages and not page.closed:
        tail = channel.tail(after=page.cursor, view=view)
        async with call.span() as span, tail:
            await tail.next_page(wait)
        if span.ended == "gone":
            return page
        page = await channel.page(after=page.cursor, limit=limit, view=view)
    return page


def page_answer(page: Page) -> Response:
    """A page as JSON, with its place in the channel in the headers too."""
    head = f'],"cursor":"{page.cursor}","head":{page.head},"closed":{str(page.closed).lower()}}}'
    body = b'{"messages":[' + b",".join(message.to_json() for message in page.messages) + head.encode()
    is_at_head = int(page.cursor.partition("_")[0]) >= page.head
    headers = {"Stream-Next-Offset": page.cursor}
    if is_at_head:
        headers["Stream-Up-To-Date"] = "true"
    if page.closed and is_at_head:
        headers["Stream-Closed"] = "true"
    return Response(body, headers=headers, media_type=JSON)


async def describe(call: Call) -> Response:
    """HEAD: where the channel ends, and whether it is closed."""
    channel = call.client.channel(call.name)
    await call.require("read", channel.name)
    info = await channel.info()
    headers = {"Stream-Next-Offset": (await channel.page(after="now")).cursor}
    if info.closed:
        headers["Stream-Closed"] = "true"
    return Response(headers=headers, media_type=JSON)


async def publish(call: Call) -> Response:
    """Append a message, and close the channel behind it if `close` is true."""
    channel = call.client.channel(call.name)
    key = names.check_key(call.header("idempotency-key"))
    given = await call.json(("body",), ("close",))
    is_last = given.get("close", False)
    if not isinstance(is_last, bool):
        raise bad_request("close must be true or false")
    await call.require("publish", channel.name)
    check_size(call, given["body"])
    if is_last:
        await _check_closable(call, channel.name)
    message = await channel.publish(given["body"], key=key)
    if is_last:
        await channel.close()
    return message_answer(message)


async def _check_closable(call: Call, name: str) -> None:
    """Refuse what cannot be closed before the message that should be its last is stored."""
    try:
        status = await call.client.run(name).status()
    except (InvalidInput, RunNotFound):  # no run has, or could have, this name
        return
    if not status.is_ended:
        raise InvalidInput(f"channel {name!r} belongs to a run that has not ended; cancel the run instead")


async def delete(call: Call) -> Response:
    """Delete the channel with its messages."""
    channel = call.client.channel(call.name)
    await call.require("manage", channel.name)
    await channel.delete()
    return Response(status_code=204)


def message_answer(message: Message) -> Response:
    """201 with the message that was stored."""
    return Response(message.to_json(), 201, {"Stream-Next-Offset": message.cursor}, JSON)


def check_size(call: Call, body: Any) -> None:
    """Refuse a message that is too large with the status that says so."""
    # Only a request that is larger than a message may be can hold such a message; the others need not be measured.
    if call.size > names.BODY_BYTES_MAX:
        encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
        if len(encoded) > names.BODY_BYTES_MAX:
            raise Problem(413, "too_large", f"a message may have at most {names.BODY_BYTES_MAX} bytes")


def parse_after(text: str) -> int | str:
    """The value of `after=` or Last-Event-ID: a position, a cursor or "now"."""
    after = int(text) if text.isascii() and text.isdecimal() and len(text) <= names.CURSOR_LENGTH_MAX else text
    names.parse_after(after)
    return after
