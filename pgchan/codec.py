"""Bodies: Python values to bytes and back.

A JSON body is checked before it is encoded, so that an error can name the place (`$.items[3].price`) and nothing
that JSON readers disagree about is ever stored: no NaN, no keys that are not strings, no lone surrogates, no
nesting past BODY_DEPTH_MAX. Bytes are stored as they are encoded here and never parsed on the way to a reader.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pgchan.errors import InvalidInput
from pgchan.names import BODY_BYTES_MAX, BODY_DEPTH_MAX

JSON = "application/json"
PATH_LENGTH_MAX = 200  # of the place that an error names: keys in it may be of any length

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def is_json(content_type: str) -> bool:
    """Whether bodies of this type are JSON values."""
    return content_type == JSON or content_type.partition(";")[0].strip().lower() == JSON


def encode(body: Any, what: str = "body") -> bytes:
    """The UTF-8 bytes of a JSON value; InvalidInput with the path of what is not JSON."""
    _check(body, "$", 0, what)
    try:
        raw = _encoder.encode(body).encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{what} holds a lone surrogate at {_surrogate(body, '$')}; UTF-8 has none") from None
    except ValueError:  # Python's limit for the digits of an int
        raise InvalidInput(f"{what} holds an int with too many digits") from None
    return _checked_size(raw, what)


def encode_record(value: Any) -> bytes:
    """The bytes of what pgchan records of a JSON value that was stored before: wrapped, so perhaps somewhat larger."""
    return _encoder.encode(value).encode()


def encode_as(content_type: str, body: Any) -> bytes:
    """The bytes of a body for a channel of this type: JSON, text (str or bytes) or bytes."""
    if is_json(content_type):
        return encode(body)
    if isinstance(body, str) and content_type.startswith("text/"):
        try:
            return _checked_size(body.encode(), "body")
        except UnicodeEncodeError:
            raise InvalidInput("body holds a lone surrogate; UTF-8 has none") from None
    if isinstance(body, bytes | bytearray | memoryview):
        return _checked_size(bytes(body), "body")
    wanted = "str or bytes" if content_type.startswith("text/") else "bytes"
    raise InvalidInput(f"body of a channel of type {content_type!r} must be {wanted}, not {type(body).__name__}")


def decode(raw: bytes) -> Any:
    """The value of JSON bytes that pgchan stored."""
    return json.loads(raw.decode())  # which else looks first what encoding it may be


def parse(raw: bytes | str, what: str = "body") -> Any:
    """The value of JSON text from outside; InvalidInput where it is not what `encode` would take."""
    try:
        # Not left to json.loads, which guesses UTF-16 and lets surrogates pass.
        text = raw if isinstance(raw, str) else raw.decode()
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except InvalidInput as error:
        raise InvalidInput(f"{what}: {error}") from None
    except RecursionError:
        raise InvalidInput(f"{what} is nested deeper than {BODY_DEPTH_MAX} levels") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{what} is not UTF-8") from None
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from None
    _check(value, "$", 0, what)
    if (isinstance(raw, str) or "\\u" in text) and (found := _surrogate(value, "$")):
        raise InvalidInput(f"{what} holds a lone surrogate at {found}; UTF-8 has none")
    return value


def place(path: str) -> str:
    """A path as errors show it. Keys in it may be of any length and hold what no terminal or log should be given."""
    shown = path[:PATH_LENGTH_MAX]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)[:PATH_LENGTH_MAX]


def _refuse_constant(name: str) -> Any:
    raise InvalidInput(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidInput("a number is too large for a float")
    return value


def _checked_size(raw: bytes, what: str) -> bytes:
    if len(raw) > BODY_BYTES_MAX:
        raise InvalidInput(f"{what} has {len(raw)} bytes encoded; at most {BODY_BYTES_MAX}")
    return raw


def _check(value: Any, path: str, depth: int, what: str) -> None:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return
    if kind is float:
        if not math.isfinite(value):
            raise InvalidInput(f"{what} holds {value!r} at {place(path)}; JSON has no such number")
        return
    if depth >= BODY_DEPTH_MAX:
        raise InvalidInput(f"{what} is nested deeper than {BODY_DEPTH_MAX} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidInput(
                    f"{what} has a key of type {type(key).__name__} at {place(path)}; JSON keys are strings"
                )
            _check(inner, f"{path}.{key}", depth + 1, what)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, f"{path}[{index}]", depth + 1, what)
    elif isinstance(value, str | int):
        return  # an Enum or another subclass: encoded as its base
    elif isinstance(value, float):
        _check(float(value), path, depth, what)
    else:
        raise InvalidInput(f"{what} holds a {kind.__name__} at {place(path)}; only JSON values can be stored")


def _surrogate(value: Any, path: str) -> str:
    if isinstance(value, str):
        return place(path) if not _is_utf8(value) else ""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not _is_utf8(key):
                return f"{place(path)} (a key)"
            if found := _surrogate(inner, f"{path}.{key}"):
                return found
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            if found := _surrogate(inner, f"{path}[{index}]"):
                return found
    return ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
