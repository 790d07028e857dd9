"""/runs: start, look, wait for the result, signal, cancel, resume, fork.

A run's id may have slashes, so its last segment decides: `/runs/a/b/cancel` cancels `a/b`. No id may end in one of
these words.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from pgchan import AsyncClient, AsyncRunHandle, RunCancelled, RunError, RunFailed, RunStatus, names
from pgchan.server.auth import EVERY_NAME
from pgchan.server.channels import check_size, message_answer, parse_after
from pgchan.server.endpoint import JSON, Call, Endpoint, Site
from pgchan.server.problems import bad_request, forbidden

RUNS = 100  # in a list, where the caller does not say

_OPTIONS = ("queue", "priority", "delay", "timeout")
# The arguments of start itself: what a workflow's own keyword arguments cannot be called.
_START = frozenset(AsyncClient.start.__kwdefaults__ or ())


def runs_endpoint(site: Site) -> Endpoint:
    """/runs"""
    return Endpoint(site, {"GET": listing, "POST": start})


def run_endpoint(site: Site) -> Endpoint:
    """/runs/{id}"""
    return Endpoint(site, {"GET": status})


def run_endpoints(site: Site) -> dict[str, Endpoint]:
    """/runs/{id}/…, by the last segment."""
    return {
        "journal": Endpoint(site, {"GET": journal}),
        "result": Endpoint(site, {"GET": result}),
        "signals": Endpoint(site, {"POST": signal}),
        "cancel": Endpoint(site, {"POST": cancel}),
        "resume": Endpoint(site, {"POST": resume}),
        "fork": Endpoint(site, {"POST": fork}),
    }


async def start(call: Call) -> Response:
    """Start a run: 201, or 200 if this id was started before."""
    given = await call.json(("workflow",), ("args", "kwargs", "id", *_OPTIONS))
    workflow = names.check_label(given["workflow"], "workflow")
    # The id is chosen here if the caller has none, so that the right to start is asked for the very name.
    run = names.check_run(given["id"]) if given.get("id") is not None else names.new_run_id()
    args, kwargs = given.get("args", []), given.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise bad_request("args must be an array and kwargs an object")
    if taken := _START & kwargs.keys():
        raise bad_request(f"kwargs may not have {min(taken)!r}, which is an argument of start")
    await call.require("start", run)
    allowed = getattr(call.principal, "workflows", None)
    if allowed is not None and workflow not in allowed:
        raise forbidden()
    options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    handle = await call.client.start(workflow, *args, id=run, **options, **kwargs)
    return _started(call, handle)


def _started(call: Call, handle: AsyncRunHandle) -> Response:
    answer = {"id": handle.id, "channel": handle.channel.name, "created": handle.created}
    location = f"{call.request.scope.get('root_path', '')}/runs/{handle.id}"
    return json_answer(answer, 201 if handle.created else 200, {"Location": location})


async def listing(call: Call) -> Response:
    """Runs, newest first. `next` is the `after` of the page that follows, null at the end."""
    limit = call.integer("limit", RUNS, 1, names.PAGE_MESSAGES_MAX)
    await call.require("manage", EVERY_NAME)
    wanted = {name: call.parameters.get(name) for name in ("state", "workflow", "queue", "after")}
    found = await call.client.runs(limit=limit, **wanted)
    return json_answer({"runs": [as_json(run) for run in found], "next": found[-1].id if len(found) == limit else None})


async def status(call: Call) -> Response:
    """The run's state now."""
    handle = call.client.run(call.name)
    await call.require("read", handle.id)
    return json_answer(as_json(await handle.status()))


async def result(call: Call) -> Response:
    """The run's state and result: 200 when it has ended, 202 while it has not, after `wait=` seconds at most."""
    handle = call.client.run(call.name)
    wait = call.seconds("wait")
    await call.require("read", handle.id)
    value: Any = None
    state, error = None, None
    try:
        async with call.span():
            value = await handle.result(timeout=wait)
            state = "succeeded"
    except RunFailed as failed:
        state, error = "failed", {"type": failed.type, "message": failed.message}
    except RunCancelled:
        state = "cancelled"
    except TimeoutError:
        pass
    is_ended = state is not None
    if not is_ended:
        state = (await handle.status()).state
    return json_answer({"id": handle.id, "state": state, "result": value, "error": error}, 200 if is_ended else 202)


async def journal(call: Call) -> Response:
    """The recorded results behind `after`."""
    handle = call.client.run(call.name)
    limit = call.integer("limit", names.PAGE_MESSAGES_MAX, 1, names.PAGE_MESSAGES_MAX)
    asked = parse_after(call.parameters.get("after", "0"))
    start = names.parse_after(asked)
    if start is None:
        raise bad_request("after must be a position or a cursor")
    await call.require("manage", handle.id)
    found = [message for message in await handle.journal() if message.position > start[0]][:limit]
    cursor = found[-1].cursor if found else asked if isinstance(asked, str) else names.format_cursor(start[0], 0)
    body = b'{"messages":[' + b",".join(message.to_json() for message in found) + f'],"cursor":"{cursor}"}}'.encode()
    return Response(body, media_type=JSON)


async def signal(call: Call) -> Response:
    """Send the run a message; durable before it is answered."""
    handle = call.client.run(call.name)
    key = names.check_key(call.header("idempotency-key"))
    given = await call.json(("body",))
    await call.require("signal", handle.id)
    check_size(call, given["body"])
    return message_answer(await handle.signal(given["body"], key=key))


async def cancel(call: Call) -> Response:
    """Cancel the run; `cancelled` is false if it had ended."""
    handle = call.client.run(call.name)
    await call.json(())
    await call.require("cancel", handle.id)
    return json_answer({"id": handle.id, "cancelled": await handle.cancel()})


async def resume(call: Call) -> Response:
    """Put a failed run back into its queue."""
    handle = call.client.run(call.name)
    await call.json(())
    await call.require("manage", handle.id)
    await handle.resume()
    return json_answer({"id": handle.id, "resumed": True})


async def fork(call: Call) -> Response:
    """Start another run that has this one's record up to a step: 201, or 200 if it was started before."""
    handle = call.client.run(call.name)
    given = await call.json(("step",), ("id",))
    step = names.check_step(given["step"])
    run = names.check_run(given["id"]) if given.get("id") is not None else names.new_run_id()
    await call.require("manage", handle.id)
    await call.require("start", run)
    return _started(call, await handle.fork(step, id=run))


def as_json(status: RunStatus) -> dict[str, Any]:
    """A run's state as it is shown."""
    return {field.name: _plain(getattr(status, field.name)) for field in dataclasses.fields(status)}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if isinstance(value, RunError):
        return {"type": value.type, "message": value.message}
    return value


def json_answer(document: dict[str, Any], status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON object."""
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return Response(body, status_code, headers, JSON)
