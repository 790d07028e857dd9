"""What is a legal name, key, number or duration, and every limit of the public surface.

Each `check_…` returns the value in its one form or raises InvalidInput that names the field, the shape and the limit.
"""

from __future__ import annotations

import re
import uuid
from datetime import timedelta

from pgchan.errors import InvalidInput

NAME_LENGTH_MAX = 200  # fits into a URL segment, an index entry and a log line
KEY_BYTES_MAX = 200  # index entries must stay far below the 2,700 bytes that a btree takes
BODY_BYTES_MAX = 1 << 20  # one message; larger things belong in object storage, with their address in the message
BODY_DEPTH_MAX = 64  # nesting that every JSON reader takes
PAGE_MESSAGES_MAX = 1_000  # messages in one page or batch …
PAGE_BYTES_MAX = 4 << 20  # … and the bytes of their bodies
JOIN_SECONDS_MAX = 1.0  # that text waits for more; its readers wait as long, so past this it is a mistake in the unit
DURATION_SECONDS_MAX = 10 * 366 * 86_400.0  # ten years; beyond it is a mistake in the unit
CURSOR_LENGTH_MAX = 64
POSITION_MAX = 10**16 - 1  # what sixteen digits of a cursor hold
STEP_LENGTH_MAX = 180  # leaves room for "#n" within KEY_BYTES_MAX

RESERVED_PREFIX = "pgchan:"  # names and keys that pgchan makes for itself
RESERVED_RUN_SEGMENTS = frozenset({"signals", "cancel", "resume", "fork", "journal", "result"})  # HTTP paths

_NAME = re.compile(r"[A-Za-z0-9._:/@~+=-]+")
_CURSOR = re.compile(r"([0-9]{16})_([0-9]{16})")


def check_name(name: object, what: str = "channel") -> str:
    """A channel's name: 1–200 of A–Z a–z 0–9 . _ : / @ ~ + = -, without an empty, "." or ".." segment."""
    if not isinstance(name, str):
        raise InvalidInput(f"{what} must be a str, not {type(name).__name__}")
    if not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise InvalidInput(f"{what} must have 1 to {NAME_LENGTH_MAX} characters, not {len(name)}")
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{what} {name!r} may hold only A-Z a-z 0-9 and . _ : / @ ~ + = -")
    if name.startswith(RESERVED_PREFIX):
        raise InvalidInput(f"{what} {name!r} may not begin with {RESERVED_PREFIX!r}; pgchan keeps it for itself")
    if any(segment in ("", ".", "..") for segment in name.split("/")):
        raise InvalidInput(f"{what} {name!r} may not have an empty, '.' or '..' segment between slashes")
    return name


def check_beginning(value: object, what: str) -> str:
    """The beginning of channel names, also ""."""
    if not isinstance(value, str):
        raise InvalidInput(f"{what} must be a str, not {type(value).__name__}")
    if len(value) > NAME_LENGTH_MAX or (value and not _NAME.fullmatch(value)):
        raise InvalidInput(f"{what} may hold only what channel names may, at most {NAME_LENGTH_MAX} characters")
    return value


def check_run(run: object) -> str:
    """A run's id: a channel name whose last segment is not one of the run's HTTP paths."""
    name = check_name(run, "run id")
    if (last := name.rsplit("/", 1)[-1]) in RESERVED_RUN_SEGMENTS:
        raise InvalidInput(f"run id {name!r} may not end in {last!r}; it is a path of the HTTP interface")
    return name


def new_run_id() -> str:
    """A fresh run id that nobody can guess."""
    return str(uuid.uuid4())


def check_label(label: object, what: str) -> str:
    """The name of a workflow, queue, step or worker: printable text of 1–180 characters."""
    if not isinstance(label, str):
        raise InvalidInput(f"{what} must be a str, not {type(label).__name__}")
    if not 1 <= len(label) <= STEP_LENGTH_MAX or not label.isprintable():
        raise InvalidInput(f"{what} must be 1 to {STEP_LENGTH_MAX} printable characters, not {label!r:.60}")
    if label.startswith(RESERVED_PREFIX):
        raise InvalidInput(f"{what} {label!r} may not begin with {RESERVED_PREFIX!r}; pgchan keeps it for itself")
    if len(label.encode()) > STEP_LENGTH_MAX:
        raise InvalidInput(f"{what} must be at most {STEP_LENGTH_MAX} bytes in UTF-8")
    return label


def check_key(key: object) -> str | None:
    """An idempotency key: None, or 1–200 bytes of UTF-8 without NUL."""
    return None if key is None else _check_key(key, "key")


def check_step(step: object) -> str:
    """The name under which a step is recorded: its label, perhaps with "#n", which is a key of the journal."""
    return _check_key(step, "step")


def _check_key(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise InvalidInput(f"{what} must be a str, not {type(key).__name__}")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidInput(f"{what} holds a lone surrogate, which UTF-8 cannot carry") from None
    if not 1 <= size <= KEY_BYTES_MAX:
        raise InvalidInput(f"{what} must have 1 to {KEY_BYTES_MAX} bytes, not {size}")
    if "\0" in key:
        raise InvalidInput(f"{what} may not hold a NUL character")
    if key.startswith(RESERVED_PREFIX):
        raise InvalidInput(f"{what} may not begin with {RESERVED_PREFIX!r}; pgchan keeps it for itself")
    return key


def check_integer(value: object, what: str, least: int, most: int) -> int:
    """An int (not a bool) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(f"{what} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise InvalidInput(f"{what} must be from {least} to {most}, not {_shown(value)}")
    return value


def check_number(value: object, what: str, least: float, most: float) -> float:
    """An int or a float (not a bool, not NaN) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{what} must be a number, not {type(value).__name__}")
    if not least <= value <= most:
        raise InvalidInput(f"{what} must be from {least:g} to {most:g}, not {_shown(value)}")
    return float(value)


def check_limit(limit: object) -> int:
    """How many messages or rows a page may have: 1–1,000."""
    return check_integer(limit, "limit", 1, PAGE_MESSAGES_MAX)


def check_seconds(value: object, what: str, least: float = 0.0) -> float:
    """A duration: seconds as int or float, or a timedelta, from `least` to ten years."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{what} must be a number of seconds, not {type(value).__name__}")
    if not least <= value <= DURATION_SECONDS_MAX:  # nor is NaN
        raise InvalidInput(f"{what} must be from {least:g} s to ten years, not {_shown(value)}")
    return float(value)


def check_optional_seconds(value: object, what: str, least: float = 0.0) -> float | None:
    """None, or a duration as `check_seconds` takes it."""
    return None if value is None else check_seconds(value, what, least)


def check_join(join: object, body: object, wait: bool) -> float:
    """How many seconds a piece of text may wait for what follows it: 0 to JOIN_SECONDS_MAX."""
    if wait:
        raise InvalidInput("join is for wait=False: who waits until a message is durable cannot let it wait for more")
    if not isinstance(body, str):
        raise InvalidInput(f"join is for text: body must be a str, not {type(body).__name__}")
    return check_number(join, "join", 0.0, JOIN_SECONDS_MAX)


def _shown(value: float) -> str:
    # Python refuses to write out an int of thousands of digits, and cannot make it a float.
    return repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of more than 20 digits"


def format_cursor(position: int, at_us: int) -> str:
    """The cursor's one text form: sorts as text, safe in URLs, headers and SSE ids."""
    return f"{position:016d}_{at_us:016d}"


def parse_after(after: object) -> tuple[int, int | None] | None:
    """What `after=` names: (position, check in µs or None for a bare int), or None for "now"."""
    if isinstance(after, str):
        if after == "now":
            return None
        if len(after) <= CURSOR_LENGTH_MAX and (found := _CURSOR.fullmatch(after)):
            return int(found[1]), int(found[2])
        raise InvalidInput(f"after must be a position, a cursor or 'now', not {after[:CURSOR_LENGTH_MAX]!r}")
    return check_integer(after, "after", 0, POSITION_MAX), None


def check_view(view: object) -> str:
    """Which messages a reader gets: "final" leaves void output out, "raw" has all."""
    if view not in ("final", "raw"):
        raise InvalidInput(f"view must be 'final' or 'raw', not {view!r:.60}")
    return str(view)


def check_content_type(content_type: object) -> str:
    """A media type, e.g. "application/json" or "text/plain; charset=utf-8"."""
    if not isinstance(content_type, str) or not re.fullmatch(
        r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+( *;[ -~]*)?", content_type
    ):
        raise InvalidInput(f"content_type must be a media type like 'application/json', not {content_type!r:.60}")
    if len(content_type) > NAME_LENGTH_MAX:
        raise InvalidInput(f"content_type must have at most {NAME_LENGTH_MAX} characters")
    return content_type
