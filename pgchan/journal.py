"""What a run has recorded: step results by name, how often each was tried, and which recorded names the code has
reached.

Names are the identity of steps. The first `run.step(fetch)` is "fetch", the second "fetch#2"; a name given with
`name=` counts in the same way. Nothing else is compared, so code may gain steps while a run is under way; it may not
lose one that is recorded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pgchan import codec
from pgchan.db import Row
from pgchan.errors import InvalidInput, StepMismatch
from pgchan.model import MESSAGE
from pgchan.names import check_label

ERROR_CHARACTERS_MAX = 10_000  # of an exception's text that is recorded


@dataclass(slots=True)
class Recorded:
    """How a step ended. word: result (value: its bytes), failed or interrupted (value: the control message's body)."""

    word: str
    value: Any
    at: datetime


@dataclass(slots=True)
class Tries:
    """What is known of a step that has not ended.

    last: the highest attempt. failures: how many failed. pause: seconds to wait after the last failure. failed_at: when
    that was.
    """

    last: int = 0
    failures: int = 0
    pause: float = 0.0
    failed_at: datetime | None = None


class Journal:
    """The journal of one run, in the memory of the worker that executes it."""

    def __init__(self) -> None:
        self._recorded: dict[str, Recorded] = {}
        self._tries: dict[str, Tries] = {}
        self._until: dict[str, tuple[float, datetime]] = {}
        self._reached: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._functions: dict[str, Any] = {}

    def load(self, row: Row) -> None:
        """Take in a message of the journal: kind, key, step, attempt, body, at."""
        kind, key, step, attempt, body, at = row
        if kind == MESSAGE:
            self._recorded[key] = Recorded("result", bytes(body), at)
            return
        control = codec.decode(body)
        match control.get("type"):
            case "interrupted":
                self._recorded[key] = Recorded("interrupted", control, at)
            case "failed":
                tries = self.tries(step)
                tries.last = max(tries.last, attempt)
                tries.failures += 1
                tries.pause, tries.failed_at = control.get("pause") or 0.0, at
                if control.get("final"):
                    self._recorded[step] = Recorded("failed", control, at)
            case "started":
                tries = self.tries(step)
                tries.last = max(tries.last, attempt)
            case "until":
                self._until[step] = (control["seconds"], at)
            case "resumed":  # failures before it do not count any more
                self._recorded = {name: found for name, found in self._recorded.items() if found.word != "failed"}
                for tries in self._tries.values():
                    tries.failures, tries.pause, tries.failed_at = 0, 0.0, None

    def tries(self, name: str) -> Tries:
        """What is known of the tries of a step."""
        return self._tries.setdefault(name, Tries())

    def until(self, name: str) -> tuple[float, datetime] | None:
        """The timeout that was recorded when a wait began: seconds, and since when."""
        return self._until.get(name)

    def name(self, given: str | None, function: Any, default: str) -> str:
        """The name of the next step: the given one or the function's, numbered from its second use on.

        Raises StepMismatch if a given name was used for another function.
        """
        base = check_label(given if given is not None else default, "step name")
        if "#" in base:
            raise InvalidInput(f"step name {base!r} may not hold '#'; pgchan numbers repeated names with it")
        if given is not None:
            used = self._functions.setdefault(base, function)
            if used is not function and used != function:
                raise StepMismatch(
                    f"step name {base!r} is used for {_describe(used)} and for {_describe(function)}; "
                    f"give each its own name",
                    step=base,
                )
        self._counts[base] += 1
        return base if self._counts[base] == 1 else f"{base}#{self._counts[base]}"

    def reach(self, name: str) -> Recorded | None:
        """What was recorded under this name; the code has arrived at it."""
        self._reached.add(name)
        return self._recorded.get(name)

    def record(self, name: str, recorded: Recorded) -> None:
        """Remember how a step ended."""
        self._recorded[name] = recorded

    def unreached(self) -> list[str]:
        """Recorded names that the code has not arrived at."""
        return [name for name in self._recorded if name not in self._reached]


def describe_error(error: BaseException) -> dict[str, str]:
    """An exception as it is recorded: its type's name and its text."""
    text = str(error)[:ERROR_CHARACTERS_MAX].encode("utf-8", "backslashreplace").decode()
    return {"type": type(error).__name__, "message": text}


def _describe(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)[:60]
