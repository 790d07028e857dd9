"""The checker can fail: a history in which all is right, and each way of breaking it that it must notice.

Long, for each way is a function of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import history
from faults.history import ChannelRow, Log, MessageRow, Operation, RunRow, Tables, check, read_logs, takeovers
from faults.nemesis import FAULTS

import pgchan
from pgchan.model import microseconds

CHAT, RUN, JOURNAL, CANCELLED, CANCELLED_JOURNAL = range(1, 6)
QUIET = 50.0  # when the faults are over, in the valid history


class Story:
    """A history to break: operations, and the final tables as lists."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.channels = {
            CHAT: ChannelRow(CHAT, "chat", head=5, trimmed=1),
            RUN: ChannelRow(RUN, "run", head=7),
            JOURNAL: ChannelRow(JOURNAL, "pgchan:journal:2", head=2),
            CANCELLED: ChannelRow(CANCELLED, "cancelled", head=2),
            CANCELLED_JOURNAL: ChannelRow(CANCELLED_JOURNAL, "pgchan:journal:4", head=1),
        }
        self.messages: dict[tuple[int, int], MessageRow] = {}
        self.void = {(RUN, 1)}
        self.runs = {
            RUN: RunRow(RUN, JOURNAL, "succeeded", "done"),
            CANCELLED: RunRow(CANCELLED, CANCELLED_JOURNAL, "cancelled"),
        }
        self.rows = [("run", "write", 2)]
        self.workers = [8]
        self.locks = [8]
        self.idle: list[str] = []
        self._tell()

    def log(self, m: float, process: str, op: str, **facts: Any) -> None:
        self.operations.append({"m": m, "t": 1000.0 + m, "process": process, "op": op, **facts})

    def store(self, channel_id: int, position: int, m: float, body: Any, **facts: Any) -> None:
        self.messages[channel_id, position] = MessageRow(channel_id, position, int((1000 + m) * 1e6), body, **facts)

    def publish(self, m: float, position: int, value: str, *, end: str = "ok", **facts: Any) -> None:
        self.log(m, "p", "publish", type="invoke", channel="chat", value=value, **facts)
        first = int(m) if facts.get("repeat") else m
        more = {"position": position, "at": int((1000 + first) * 1e6)} if end == "ok" else {}
        self.log(m + 0.01, "p", "publish", type=end, channel="chat", value=value, **more, **facts)

    def read(self, m: float, reader: str, reading: int, position: int) -> None:
        row = self.messages[CHAT, position] if position > 1 else MessageRow(CHAT, 1, int(1001 * 1e6), "one")
        self.log(
            m, "r", "read", reader=reader, reading=reading, channel="chat", position=position, at=row.at,
            kind=row.kind, value=row.body,
        )  # fmt: skip

    def open(self, m: float, reader: str, reading: int, after: int | None, **facts: Any) -> None:
        self.log(m, "r", "reading", reader=reader, reading=reading, channel="chat", after=after, **facts)

    def _tell(self) -> None:
        """What happened, in order of time. Long, for it is one story."""
        # A channel: two acknowledged, one unknown and there, one refused and not; then trimmed to 1, then a probe.
        self.publish(1, 1, "one")
        self.publish(2, 2, "two", key="k")
        self.publish(2.5, 2, "two", key="k", repeat=True)
        self.publish(3, 3, "three", end="info")
        self.publish(4, 0, "four", end="fail")
        self.publish(5, 4, "five")
        self.publish(QUIET + 1, 5, "probe", probe=True)
        for position, m, value in ((2, 2, "two"), (3, 3, "three"), (4, 5, "five"), (5, QUIET + 1, "probe")):
            self.store(CHAT, position, m, value, key="k" if value == "two" else None)
        self.open(1, "reader", 1, 0)
        self.read(1.1, "reader", 1, 1)
        self.read(2.1, "reader", 1, 2)
        self.open(3.5, "reader", 2, 2)
        for position, m in ((3, 3.6), (4, 5.1), (5, QUIET + 1.5)):
            self.read(m, "reader", 2, position)
        self.open(6, "late", 1, 0)
        for position in (2, 3, 4):
            self.read(6.1, "late", 1, position)
        self.log(6.2, "r", "left", reader="late", channel="chat")
        self.open(7, "behind", 1, 0)
        self.log(7.1, "r", "reset", reader="behind", reading=1, channel="chat", reason="trimmed", first=2, last=4)
        self.read(7.2, "behind", 1, 2)
        self.log(7.3, "r", "left", reader="behind", channel="chat")
        self.open(8, "liar", 1, 3, expect="history_lost")
        self.log(8.1, "r", "reset", reader="liar", reading=1, channel="chat", reason="history_lost", first=2, last=4)
        self.log(8.2, "r", "left", reader="liar", channel="chat")
        # A run: its worker is killed after it has spoken; another goes on.
        self.log(9, "c", "start", type="ok", run="run")
        self.log(9, "w1", "worker", worker=7)
        self.log(9, "w2", "worker", worker=8)
        self.log(10, "w1", "claim", run="run", epoch=1, worker=7)
        self.log(10.1, "w1", "effect", run="run", step="say", epoch=1)
        self.log(10.2, "w1", "fault", kind="kill", target="w1", edge="begin", deadly=True, within=3.0)
        self.log(11.2, "w2", "reaped", worker=7, runs=1)
        self.log(11.3, "w2", "claim", run="run", epoch=2, worker=8)
        self.log(11.4, "w2", "effect", run="run", step="say", epoch=2)
        self.log(11.5, "s", "signal", type="invoke", run="run", value="go")
        self.log(11.6, "s", "signal", type="ok", run="run", value="go", position=4)
        self.log(11.9, "w2", "effected", run="run", step="say", epoch=2, value=SAID)
        self.log(12.1, "w2", "recorded", run="run", step="say", epoch=2, value=SAID)
        self.log(12.3, "w2", "recorded", run="run", step="write", epoch=2, value=WRITTEN)
        self.log(13.1, "c", "ended", run="run", state="succeeded", value="done")
        self.store(RUN, 1, 10.1, {"id": "a", "epoch": 1}, step="say", attempt=1)
        self.store(RUN, 2, 11.4, {"type": "reset"}, kind="control", step="say", attempt=2, void_from=1)
        self.store(RUN, 3, 11.4, {"id": "b", "epoch": 2}, step="say", attempt=2)
        self.store(RUN, 4, 11.5, "go", kind="signal")
        self.store(RUN, 5, 11.8, {"id": "c", "epoch": 2}, step="say", attempt=2)
        consumed = {"type": "consumed", "signal": 4, "step": "say"}
        self.store(RUN, 6, 12, consumed, kind="control", key="pgchan:consumed:4")
        self.store(RUN, 7, 13, {"type": "ended", "state": "succeeded"}, kind="control")
        self.store(JOURNAL, 1, 12, SAID, key="say", step="say", attempt=2)
        self.store(JOURNAL, 2, 12.2, WRITTEN, key="write", step="write", attempt=1)
        # A run that is cancelled with a signal that nobody took.
        self.log(19, "c", "start", type="ok", run="cancelled")
        self.log(20, "s", "signal", type="invoke", run="cancelled", value="no")
        self.log(20.1, "s", "signal", type="ok", run="cancelled", value="no", position=1)
        self.log(21.1, "c", "cancelled", type="ok", run="cancelled")
        self.store(CANCELLED, 1, 20, "no", kind="signal")
        ended = {"type": "ended", "state": "cancelled", "missed": [1]}
        self.store(CANCELLED, 2, 21, ended, kind="control")
        self.store(CANCELLED_JOURNAL, 1, 20.5, {"epoch": 1}, key="first", step="first", attempt=1)
        self.log(QUIET, "nemesis", "quiet")
        self.log(0.5, "nemesis", "memory", of="endpoint", mark="before", bytes=100)
        self.log(QUIET + 3, "nemesis", "memory", of="endpoint", mark="after", bytes=110)

    def check(self) -> list[history.Violation]:
        tables = Tables(
            list(self.channels.values()), list(self.messages.values()), frozenset(self.void), list(self.runs.values()),
            self.rows, self.workers, self.locks, self.idle,
        )  # fmt: skip
        return check(sorted(self.operations, key=lambda operation: operation["m"]), tables)

    def the(self, op: str, **facts: Any) -> Operation:
        """The one operation that has these facts."""
        (found,) = [o for o in self.operations if o["op"] == op and facts.items() <= o.items()]
        return found

    def alter(self, channel_id: int, position: int, **columns: Any) -> None:
        self.messages[channel_id, position] = replace(self.messages[channel_id, position], **columns)


SAID = {"epoch": 2, "output": ["b", "c"], "signals": [4]}
WRITTEN = {"epoch": 2, "rows": True}


def test_a_history_in_which_all_is_right_passes() -> None:
    assert Story().check() == []


BREAKS: list[tuple[str, str, Callable[[Story], Any]]] = []


def breaks(invariant: str, how: str) -> Callable[[Callable[[Story], Any]], Callable[[Story], Any]]:
    def enter(change: Callable[[Story], Any]) -> Callable[[Story], Any]:
        BREAKS.append((invariant, how, change))
        return change

    return enter


@breaks("I1", "two readers are given different bodies")
def _(story: Story) -> None:
    story.the("read", reader="late", position=3)["value"] = "other"


@breaks("I1", "an acknowledgement and the table differ in their time")
def _(story: Story) -> None:
    story.the("publish", type="ok", value="five")["at"] += 1


@breaks("I2", "a position is missing")
def _(story: Story) -> None:
    del story.messages[CHAT, 3]


@breaks("I2", "the head is behind the last message")
def _(story: Story) -> None:
    story.channels[CHAT] = replace(story.channels[CHAT], head=4)


@breaks("I2", "what was trimmed is still there")
def _(story: Story) -> None:
    story.store(CHAT, 1, 1, "one")


@breaks("I3", "an acknowledged message is gone")
def _(story: Story) -> None:
    del story.messages[CHAT, 4]


@breaks("I3", "an acknowledged run is gone")
def _(story: Story) -> None:
    story.log(30, "c", "start", type="ok", run="another")


@breaks("I3", "an acknowledged signal is gone")
def _(story: Story) -> None:
    story.log(11.7, "s", "signal", type="invoke", run="run", value="more")
    story.log(11.8, "s", "signal", type="ok", run="run", value="more", position=9)


@breaks("I4", "one body lies at two positions")
def _(story: Story) -> None:
    story.alter(CHAT, 3, body="five")


@breaks("I4", "one key lies at two positions")
def _(story: Story) -> None:
    story.alter(CHAT, 3, key="k")


@breaks("I4", "a repeated key is answered with another position")
def _(story: Story) -> None:
    story.the("publish", type="ok", value="two", repeat=True)["position"] = 3


@breaks("I5", "a body is stored that nobody published")
def _(story: Story) -> None:
    story.alter(CHAT, 3, body="nobody's")


@breaks("I5", "what was reported as not done is stored")
def _(story: Story) -> None:
    story.alter(CHAT, 3, body="four")


@breaks("I5", "what was rolled back is read")
def _(story: Story) -> None:
    story.the("read", reader="late", position=3)["value"] = "four"


@breaks("I5", "a signal is stored that nobody sent")
def _(story: Story) -> None:
    story.alter(RUN, 4, body="other")


@breaks("I6", "a reader is given a later position first")
def _(story: Story) -> None:
    story.operations.remove(story.the("read", reader="late", position=3))


@breaks("I6", "a reader is given a position twice")
def _(story: Story) -> None:
    story.read(6.15, "late", 1, 4)


@breaks("I7", "a resumed reader misses a message")
def _(story: Story) -> None:
    story.the("reading", reader="reader", reading=2)["after"] = 1


@breaks("I7", "a reader from 0 misses the first message that is kept")
def _(story: Story) -> None:
    story.operations.remove(story.the("read", reader="late", position=2))


@breaks("I7", "a reader from 2 after a reset is given another first message")
def _(story: Story) -> None:
    story.the("reset", reader="behind")["first"] = 3


@breaks("I7", "a cursor that is none is taken for one")
def _(story: Story) -> None:
    story.operations.remove(story.the("reset", reader="liar"))
    story.read(8.1, "liar", 1, 4)


@breaks("I7", "a cursor that is none is told the wrong reason")
def _(story: Story) -> None:
    story.the("reset", reader="liar")["reason"] = "trimmed"


@breaks("I7", "a reader is told that history is lost, and it is not")
def _(story: Story) -> None:
    story.the("reset", reader="behind")["reason"] = "history_lost"


@breaks("I7", "a reader is told that more was trimmed than was")
def _(story: Story) -> None:
    story.the("reset", reader="behind")["first"] = 4


@breaks("I8", "positions fall for a publisher that waits")
def _(story: Story) -> None:
    story.the("publish", type="ok", value="five")["position"] = 2


@breaks("I9", "what was read vanishes")
def _(story: Story) -> None:
    del story.messages[CHAT, 3]


@breaks("I10", "a step is recorded twice")
def _(story: Story) -> None:
    story.store(JOURNAL, 3, 12.3, SAID, key="say", step="say", attempt=3)


@breaks("I10", "a replay returns something else")
def _(story: Story) -> None:
    story.the("recorded", step="say")["value"] = {"epoch": 1}


@breaks("I10", "a step returned and left no record")
def _(story: Story) -> None:
    del story.messages[JOURNAL, 2]


@breaks("I10", "rows are written twice")
def _(story: Story) -> None:
    story.rows.append(("run", "write", 2))


@breaks("I10", "rows are written by another attempt than the record")
def _(story: Story) -> None:
    story.rows[0] = ("run", "write", 1)


@breaks("I10", "rows are missing")
def _(story: Story) -> None:
    story.rows.clear()


@breaks("I10", "rows are there without a record")
def _(story: Story) -> None:
    story.rows.append(("run", "unknown", 2))


@breaks("I11", "a lower epoch speaks after a higher one")
def _(story: Story) -> None:
    story.alter(RUN, 5, body={"id": "c", "epoch": 1})


@breaks("I11", "a lower epoch records after a higher one")
def _(story: Story) -> None:
    story.alter(JOURNAL, 2, body={"epoch": 1, "rows": True})


@breaks("I11", "a live worker begins a step after a later claim")
def _(story: Story) -> None:
    story.the("fault", edge="begin")["target"] = "w3"
    story.log(11.35, "w1", "effect", run="run", step="write", epoch=1)


@breaks("I11", "a woken worker records a step after a later claim")
def _(story: Story) -> None:
    story.the("effected", step="say").update(process="w1", epoch=1)


@breaks("I11", "a woken worker publishes after a later claim")
def _(story: Story) -> None:
    facts = {"channel": "run", "run": "run", "epoch": 1, "value": {"id": "c", "epoch": 2}}
    story.log(11.7, "w1", "publish", type="invoke", **facts)
    story.log(11.8, "w1", "publish", type="ok", position=5, at=story.messages[RUN, 5].at, **facts)


@breaks("I12", "void output is shown")
def _(story: Story) -> None:
    story.void.clear()


@breaks("I12", "a result lacks its output")
def _(story: Story) -> None:
    story.alter(RUN, 5, step=None)


@breaks("I12", "a later try speaks without a reset")
def _(story: Story) -> None:
    story.alter(RUN, 2, void_from=None)


@breaks("I12", "an earlier try speaks after a later one")
def _(story: Story) -> None:
    story.alter(RUN, 5, attempt=1)


@breaks("I13", "a signal is consumed twice")
def _(story: Story) -> None:
    consumed = {"type": "consumed", "signal": 4, "step": "say"}
    story.alter(RUN, 2, body=consumed)


@breaks("I13", "signals are consumed out of order")
def _(story: Story) -> None:
    story.store(RUN, 3, 11.4, "earlier", kind="signal")
    story.store(RUN, 5, 11.8, {"type": "consumed", "signal": 4, "step": "say"}, kind="control")
    story.store(RUN, 6, 12, {"type": "consumed", "signal": 3, "step": "say"}, kind="control")


@breaks("I13", "something else than a signal is consumed")
def _(story: Story) -> None:
    story.alter(RUN, 6, body={"type": "consumed", "signal": 3, "step": "say"})


@breaks("I13", "a signal is neither consumed nor missed")
def _(story: Story) -> None:
    story.alter(CANCELLED, 2, body={"type": "ended", "state": "cancelled"})


@breaks("I13", "a signal is consumed and missed")
def _(story: Story) -> None:
    story.alter(RUN, 7, body={"type": "ended", "state": "succeeded", "missed": [4]})


@breaks("I13", "a signal is consumed by a step that is not recorded")
def _(story: Story) -> None:
    story.alter(RUN, 6, body={"type": "consumed", "signal": 4, "step": "unknown"})


@breaks("I13", "a step is recorded, and the signal that it took is not consumed")
def _(story: Story) -> None:
    story.alter(RUN, 6, body={"type": "resumed"})
    story.alter(RUN, 7, body={"type": "ended", "state": "succeeded", "missed": [4]})


@breaks("I14", "a step is recorded after the cancel")
def _(story: Story) -> None:
    story.store(CANCELLED_JOURNAL, 2, 22, {"epoch": 1}, key="second", step="second", attempt=1)


@breaks("I14", "a cancelled run speaks")
def _(story: Story) -> None:
    story.store(CANCELLED, 3, 22, "still here")


@breaks("I14", "a cancelled run succeeds all the same")
def _(story: Story) -> None:
    story.runs[CANCELLED] = replace(story.runs[CANCELLED], state="succeeded")


@breaks("I14", "a cancelled run does not say so")
def _(story: Story) -> None:
    story.alter(CANCELLED, 2, body={"type": "resumed"})


@breaks("I14", "a result changes after it was told")
def _(story: Story) -> None:
    story.runs[RUN] = replace(story.runs[RUN], result="other")


@breaks("I5", "a run exists whose start was rolled back")
def _(story: Story) -> None:
    story.the("start", run="run").update(type="invoke")
    story.log(9, "c", "start", type="fail", run="run")


@breaks("I15", "a call raises what no call may raise")
def _(story: Story) -> None:
    story.log(9, "p", "surprise", what="KeyError('x')")


@breaks("L1", "a run does not end")
def _(story: Story) -> None:
    story.runs[RUN] = replace(story.runs[RUN], state="waiting")


@breaks("L2", "a reader stays behind")
def _(story: Story) -> None:
    story.operations.remove(story.the("left", reader="late"))


@breaks("L2", "a reader arrives late")
def _(story: Story) -> None:
    story.the("read", reader="reader", position=4).update(m=QUIET + 0.5, t=1000 + QUIET + history.HEAD_SECONDS + 0.5)


@breaks("L3", "a tail sleeps through a message")
def _(story: Story) -> None:
    story.operations.remove(story.the("read", reader="reader", position=5))


@breaks("L3", "a tail wakes late")
def _(story: Story) -> None:
    story.the("read", reader="reader", position=5)["m"] += history.WAKE_SECONDS


@breaks("L4", "a lock outlives its worker")
def _(story: Story) -> None:
    story.locks.append(7)


@breaks("L4", "a dead worker is not reaped")
def _(story: Story) -> None:
    story.workers.append(9)


@breaks("L4", "a connection is idle in a transaction")
def _(story: Story) -> None:
    story.idle.append("pgchan writer")


@breaks("L4", "a process is left")
def _(story: Story) -> None:
    story.log(QUIET + 5, "nemesis", "left_behind", what="a child of worker 8")


@breaks("L5", "a process grows")
def _(story: Story) -> None:
    story.the("memory", mark="after")["bytes"] = 121


@breaks("L6", "a worker without a fault loses its runs")
def _(story: Story) -> None:
    story.the("fault", edge="begin")["deadly"] = False


@breaks("L6", "a restart within the grace costs a worker its runs")
def _(story: Story) -> None:
    story.the("fault", edge="begin")["deadly"] = False
    story.log(10.5, "nemesis", "fault", kind="crash", edge="begin")
    story.log(10.9, "nemesis", "fault", kind="crash", edge="end")


@breaks("L6", "another takes over too late")
def _(story: Story) -> None:
    story.the("fault", edge="begin")["within"] = 1.0


@pytest.mark.parametrize(("invariant", "how", "change"), BREAKS, ids=[f"{n}: {how}" for n, how, _ in BREAKS])
def test_a_broken_history_is_caught_and_named(invariant: str, how: str, change: Callable[[Story], Any]) -> None:
    story = Story()
    change(story)
    found = story.check()
    assert invariant in {violation.invariant for violation in found}, f"{how}: {found}"
    assert all(str(violation).startswith(f"{violation.invariant} {violation.name}: ") for violation in found)


def test_every_invariant_is_broken_by_some_history() -> None:
    numbers = [f"I{n}" for n in range(1, 16)] + [f"L{n}" for n in range(1, 7)]
    assert list(history._CHECKS) == numbers
    assert {invariant for invariant, _, _ in BREAKS} == set(numbers)


def test_the_readme_names_every_invariant_and_every_fault() -> None:
    text = Path(__file__).with_name("README.md").read_text()
    assert re.findall(r"^\| ([IL]\d+) \|", text, re.MULTILINE) == list(history._CHECKS)
    assert [kind for kind in FAULTS if f"`{kind}`" not in text] == []


def test_after_a_failover_that_lost_data_only_readers_that_were_not_told_count() -> None:
    story = Story()
    story.log(40, "nemesis", "fault", kind="failover", edge="begin", lossy=True)
    story.the("read", reader="late", position=3)["value"] = "five"
    story.operations.remove(story.the("left", reader="late"))
    assert "I1" in {violation.invariant for violation in story.check()}
    story.log(41, "r", "reset", reader="late", reading=1, channel="chat", reason="history_lost", first=2, last=4)
    story.log(42, "r", "left", reader="late", channel="chat")
    assert story.check() == []


def test_a_final_view_may_pass_over_void_output_and_a_raw_one_may_not() -> None:
    story = Story()
    facts = {"reader": "final", "channel": "run", "reading": 1}
    story.log(14, "r", "reading", after=0, view="final", **facts)
    for position in range(2, 8):
        row = story.messages[RUN, position]
        more = {"position": position, "at": row.at, "kind": row.kind, "value": row.body, "view": "final"}
        story.log(14.1, "r", "read", **facts, **more)
    assert story.check() == []
    for operation in story.operations:
        operation.pop("view", None)
    assert "I7" in {violation.invariant for violation in story.check()}


def test_a_takeover_is_measured_from_the_last_sign_to_the_next_step() -> None:
    (takeover,) = takeovers(sorted(Story().operations, key=lambda operation: operation["m"]))
    assert (takeover.kind, takeover.run) == ("kill", "run")
    assert takeover.seconds == pytest.approx(1.2)


def test_a_server_that_is_away_for_longer_than_the_grace_may_cost_a_worker_its_runs() -> None:
    story = Story()
    story.the("fault", edge="begin")["deadly"] = False
    story.log(10.3, "nemesis", "fault", kind="crash", edge="begin")
    story.log(11.1, "nemesis", "fault", kind="crash", edge="end", long=True)
    assert story.check() == []


def test_a_worker_that_goes_on_itself_is_no_takeover() -> None:
    story = Story()
    story.the("fault", edge="begin")["kind"] = "freeze"
    story.log(10.5, "w1", "effected", run="run", step="say", epoch=1, value=None)
    assert takeovers(sorted(story.operations, key=lambda operation: operation["m"])) == []


def test_logs_of_several_processes_are_merged_by_time(tmp_path: Path) -> None:
    one, other = Log(tmp_path, "one"), Log(tmp_path, "other")
    times = [one.write("quiet"), other.write("quiet"), one.write("publish", value={"ä": 1})]
    one.close()
    other.close()
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write('{"m": 1, "op": "publ')  # its process was killed
    found = read_logs(tmp_path)
    assert [operation["m"] for operation in found] == times
    assert [operation["process"] for operation in found] == ["one", "other", "one"]
    assert found[-1]["value"] == {"ä": 1}


def test_what_was_logged_before_a_kill_is_there(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from faults.nemesis import FAULTS
from faults.history import Log
Log(sys.argv[1], "p").write("quiet")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}, check=False,
    )  # fmt: skip
    assert [operation["op"] for operation in read_logs(tmp_path)] == ["quiet"]


@pytest.fixture
async def client(dsn: str) -> Any:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


async def test_the_tables_are_read_as_they_are(client: Any, dsn: str) -> None:
    channel = client.channel("chat")
    sent = [await channel.publish({"n": n}, key=f"k{n}") for n in range(3)]
    await channel.trim(2)
    await client.start("nobody_executes", id="run")
    await client.run("run").signal("hello")
    await client.run("run").cancel()
    found = Tables.read(dsn)
    by_name = {row.name: row for row in found.channels}
    assert (by_name["chat"].head, by_name["chat"].trimmed) == (3, 1)
    rows = {(row.channel_id, row.position): row for row in found.messages}
    third = rows[by_name["chat"].id, 3]
    assert (third.body, third.key, third.kind) == ({"n": 2}, "k2", "message")
    assert third.at == microseconds(sent[2].at)
    assert rows[by_name["run"].id, 1].kind == "signal"
    assert rows[by_name["run"].id, 2].body == {"type": "ended", "state": "cancelled", "missed": [1]}
    assert [row.state for row in found.runs] == ["cancelled"]
    assert (found.workers, found.locks, found.idle, found.rows) == ([], [], [], [])
    assert check([], found) == []


def test_a_hundred_thousand_operations_take_seconds() -> None:
    story = Story()
    story.channels[6] = ChannelRow(6, "long", head=30_000)
    story.log(0.1, "r", "reading", reader="long", reading=1, channel="long", after=0)
    for position in range(1, 30_001):
        m = 1 + position / 1000
        facts = {"channel": "long", "value": f"v{position}"}
        row = {"position": position, "at": int((1000 + m) * 1e6)}
        story.log(m, "q", "publish", type="invoke", **facts)
        story.log(m, "q", "publish", type="ok", **facts, **row)
        story.log(m, "r", "read", reader="long", reading=1, kind="message", **facts, **row)
        story.store(6, position, m, facts["value"])
    story.log(40, "r", "left", reader="long", channel="long")
    began = time.monotonic()
    assert story.check() == []
    assert time.monotonic() - began < 15  # about 0.5 s; quadratic would be an hour
