"""Named points in the code at which a test may stop a process. Nothing is set outside of tests."""

from __future__ import annotations

from collections.abc import Callable

# All of them, in the order in which a run meets them; the last three are met by no run.
NAMES = (
    "claim_sent",  # the claim is on its way, its answer not read
    "claimed",  # the answer is read; the runs' tasks have not begun
    "journal_loaded",  # what the run has recorded, said and been sent is in memory
    "step_started",  # the step's function is about to be called
    "output_published",  # a message that was waited for is stored
    "effect_done",  # the step's function has returned; nothing of that is on its way
    "checkpoint_queued",  # the step's record is handed to the writer
    "checkpoint_sent",  # the record, or the commit of a transaction that holds it, is on its way; the answer not read
    "checkpointed",  # the record is stored and known to be
    "finish_sent",  # the run's end is on its way, the answer not read
    "listening",  # LISTEN is done, and nothing read since
    "watch_granted",  # the lock of another worker is held: it is dead, or cut off; it is not reaped
    "upkept",  # one batch of the upkeep is done
)

reached: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Tell whoever listens that this point was reached; one load and one comparison otherwise."""
    if reached is not None:
        reached(name)


def point_soon(name: str, call_soon: Callable[..., object]) -> None:
    """The same when the event loop comes to it: behind the sending of what is awaited next, before its answer."""
    if reached is not None:
        call_soon(point, name)
