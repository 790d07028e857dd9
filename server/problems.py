"""Errors as `application/problem+json` (RFC 9457): which status, which word, and what may be said.

An answer never holds SQL, a host name, a path or a stack trace. Only errors that are about the caller's own input carry
their message; what went wrong on our side goes to the log, under the request's id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from pgchan import errors

RETRY_AFTER_SECONDS = 1

# By class, the most special first. What is missing here is a defect of ours: 500.
_STATUS: tuple[tuple[type[errors.Error], int], ...] = (
    (errors.InvalidInput, 400),
    (errors.ChannelNotFound, 404),
    (errors.RunNotFound, 404),
    (errors.ChannelClosed, 409),
    (errors.IdempotencyConflict, 409),
    (errors.RunConflict, 409),
    (errors.Fenced, 409),
    (errors.Reset, 410),
    (errors.SchemaMismatch, 503),
    (errors.UnsafeDeployment, 503),
    (errors.Unavailable, 503),
    (errors.Indefinite, 503),
)


class Problem(Exception):
    """An answer that is an error. `facts` are further members of the JSON object."""

    def __init__(
        self, status: int, code: str, detail: str | None = None, *, headers: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> None:  # fmt: skip
        super().__init__(detail or code)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.facts = facts

    def response(self, request_id: str | None) -> Response:
        """The answer; request_id is null where two answers must not differ in a byte."""
        document = {"type": f"urn:pgchan:{self.code}", "title": HTTPStatus(self.status).phrase, "status": self.status}
        document |= {"code": self.code, "request_id": request_id}
        if self.detail is not None:
            document["detail"] = self.detail
        return Response(
            json.dumps(document | self.facts, ensure_ascii=False).encode(errors="replace"),
            status_code=self.status, headers=self.headers, media_type="application/problem+json",
        )  # fmt: skip


def unauthorized() -> Problem:
    """Nobody is known to have sent this request."""
    return Problem(401, "unauthorized", headers={"WWW-Authenticate": "Bearer"})


def forbidden() -> Problem:
    """The right is missing. The same bytes whether or not the channel exists."""
    return Problem(403, "forbidden")


def bad_request(detail: str) -> Problem:
    """The request itself is wrong, before anything in it is looked at."""
    return Problem(400, errors.InvalidInput.code, detail)


def unavailable() -> Problem:
    """Not now: the same request may work in a moment."""
    return Problem(503, errors.Unavailable.code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def problem(error: Exception) -> Problem:
    """What to answer for an exception. Anything but a `pgchan.Error` is ours to mend: 500, and no more is said."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, errors.Unavailable | TimeoutError):
        return unavailable()
    for kind, status in _STATUS:
        if isinstance(error, kind):
            facts = {name: getattr(error, name) for name in _FACTS if hasattr(error, name)}
            return Problem(status, error.code, str(error) if status < 500 else None, **facts)
    return Problem(500, "internal")


_FACTS = ("first", "last", "cursor", "position")
