"""What the commands read, print and set: bodies and lines in; text, tables and JSON out; the process they run in.

A person at a terminal gets tables, a pipe gets lines with tabs, a program that asks for JSON gets one object a line.
Nothing that a terminal would obey is ever printed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from pgchan import names
from pgchan.errors import InvalidInput

# New objects, and rounds over the young ones, before Python looks for cycles in the older. With its own 700, 10, 10 it
# goes through thousands of readers or runs that wait, each time they are told of something: half of the time.
COLLECTOR_THRESHOLDS = (10_000, 20, 50)
CELL_LENGTH_MAX = 60  # of a result or error in a table; --json has all of it


def spare_collector() -> None:
    """Let the collector look less often, in a process that is pgchan's own; in others it is not ours to set.

    Call it when everything is imported: what is there then is not looked at again.
    """
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def load(target: str) -> Any:
    """What `module:attribute` names, with the current directory importable."""
    module, _, attribute = target.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not re.fullmatch(r"\w+(\.\w+)*", attribute):
        raise InvalidInput(f"{target!r} is not of the form module:attribute")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except Exception as error:
        # The user's own module, so its own words are shown.
        raise InvalidInput(f"cannot import {module!r}: {type(error).__name__}: {error}") from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise InvalidInput(f"module {module!r} has no {attribute!r}")
        found = getattr(found, name)
    return found


def load_extra(module: str, extra: str) -> Any:
    """A module whose needs are not installed with the core."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "pgchan":
            raise
        raise InvalidInput(f"{error.name} is not installed; pip install 'pgchan[{extra}]'") from None


def parse_after(after: str) -> int | str:
    """What `after=` takes: digits are a position, the rest a cursor or "now"."""
    return int(after) if re.fullmatch(r"-?[0-9]{1,18}", after) else after


def parse_body(given: str, text: bool) -> Any:
    """The body that was given as JSON, or as it is if it is text."""
    if text:
        return given
    try:
        return json.loads(given, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidInput("BODY is not JSON; quote it as '\"…\"', or say --text") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def read_bodies(stream: BinaryIO, text: bool) -> Iterator[Any]:
    """A body for each line that is not empty, read with bounded memory."""
    number = 0
    while line := stream.readline(names.BODY_BYTES_MAX + 2):
        number += 1
        if len(line.rstrip(b"\r\n")) > names.BODY_BYTES_MAX:
            raise InvalidInput(f"line {number} of the input has more than {names.BODY_BYTES_MAX} bytes")
        try:
            decoded = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise InvalidInput(f"line {number} of the input is not UTF-8") from None
        if decoded:
            yield parse_body(decoded, text)


def print_rows(rows: Iterable[Any], as_json: bool, columns: Sequence[str] = ()) -> None:
    """A table for a person, lines with tabs for a pipe, JSON for a program."""
    if as_json:
        for row in rows:
            print(to_json(row))
        return
    table = [fields_of(row) for row in rows]
    shown = list(columns) or list(table[0] if table else ())
    cells = [[cell(row[name]) for name in shown] for row in table]
    if not sys.stdout.isatty():
        for row in cells:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(*shown, box=None, pad_edge=False, header_style="bold")
    for row in cells:
        view.add_row(*map(Text, row))
    Console().print(view)


def fields_of(row: Any) -> dict[str, Any]:
    """A row as a dict: a dict or a dataclass, whose fields may hold more of them."""
    if isinstance(row, dict):
        return row
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def to_json(value: Any) -> str:
    """One line of JSON, times in RFC 3339."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    return str(value)


def cell(value: Any) -> str:
    """A value in a table, cut to CELL_LENGTH_MAX."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "milliseconds")
    if isinstance(value, dict | list):
        value = one_line(value)
    text = printable(str(value))
    return text if len(text) <= CELL_LENGTH_MAX else text[: CELL_LENGTH_MAX - 1] + "…"


def one_line(body: Any) -> str:
    """A body on one line, with nothing in it that a terminal would obey."""
    return printable(body if isinstance(body, str) and "\n" not in body else to_json(body))


def printable(text: str) -> str:
    """The text with everything escaped that is not meant to be seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
