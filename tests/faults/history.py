"""What the processes under test did, and whether it can be true: the operation log, the final tables, the checker.

Each process writes one line of JSON per operation to a file of its own (`Log`). When all is over, `check` compares the
merged logs with what the database holds (`Tables.read`). It is a pure function, linear in the number of operations, so
it judges a run of a minute in a test and one of an hour in a soak alike; what it can tell is in README.md.

A line has `m` (CLOCK_MONOTONIC, one clock for all processes of a host), `t` (wall clock), `process`, `op`, and:

  publish   type invoke|ok|fail|info, channel, value; ok: position, at. key, repeat (an old key again, on purpose),
            probe (sent to idle readers after the faults). By a run also run, step, epoch. fail: not done, it must never
            appear. info: unknown, it may or may not appear, once. A rolled-back transaction is a fail.
  reading   reader, reading, channel, after (position; null for "now"), view raw|final, expect (the reason of the reset
            that must come, for cursors made up on purpose). Begins each reading; every reconnect is a new one.
  read      reader, reading, channel, position, at, kind, value
  reset     reader, reading, channel, reason history_lost|trimmed, first, last
  left      reader, channel: it stops following on purpose
  worker    worker (its id): the process is this worker now · reaped worker, runs: took the runs of a dead one back
  claim     run, epoch, worker · over run, epoch, why: this attempt has ended
  effect    run, step, epoch: the step's function begins · effected run, step, epoch, value: it is about to return this
  recorded  run, step, epoch, value: run.step has returned this, executed or replayed
  start     type, run · signal type, run, value, key; ok: position · cancelled run, type
  ended     run, state, value: what somebody who waited for its result was told
  fault     kind, target (a process), edge begin|end, deadly (it may cost the target its runs), within (seconds, in
            which another must have gone on); lossy (a failover that loses committed data); long, with its end: the
            server was away for longer than the grace
  quiet     the last fault is over
  up        the process has begun, and takes SIGTERM
  memory    of, mark before|after, bytes · left_behind what · surprise what: an error that is none of pgchan's, or a lie

`at` is in µs since 1970. A body of a run that is a dict with `epoch` is held against the claims; the result of a step
that is a dict with `output` (list of the `id`s that its messages carry) and `signals` (positions it took) is held
against what is stored.

Long, because the invariants stand side by side: each is one function, in the order of the table in README.md.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

Operation = dict[str, Any]
Finding = tuple[str, list[Operation]]
Check: TypeAlias = "Callable[[History], Iterable[Finding]]"

ENDED = frozenset({"succeeded", "failed", "cancelled"})
KINDS = ("message", "signal", "control")
LOCK_CLASS = 1885823848

HEAD_SECONDS = 5.0  # after the faults a reader has what is there
WAKE_SECONDS = 1.5  # and an idle one hears of news
MEMORY_GROWTH = 1.2
AFTERMATH_SECONDS = 20.0  # how long a fault may be the cause of something

ROWS = "create table if not exists public.rows_of_steps (run text not null, step text not null, epoch bigint not null)"


# ------------------------------------------------------------------------------------------------ the log


class Log:
    """One process's operations. A line is one write, so what was logged before a SIGKILL is there afterwards."""

    def __init__(self, directory: Path | str, process: str) -> None:
        self.process = process
        path = Path(directory) / f"{process}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, op: str, **facts: Any) -> float:
        """Log an operation; its time `m`."""
        now = time.monotonic()
        line = {"m": now, "t": time.time(), "process": self.process, "op": op, **facts}
        os.write(self._file, (json.dumps(line, separators=(",", ":")) + "\n").encode())
        return now

    def close(self) -> None:
        os.close(self._file)


def read_logs(directory: Path | str) -> list[Operation]:
    """All operations of all processes, by time. A last line that a killed process did not finish is left out."""
    operations: list[Operation] = []
    for path in sorted(Path(directory).glob("*.jsonl")):
        *lines, rest = path.read_bytes().split(b"\n")
        operations += [json.loads(line) for line in lines]
        if rest and rest.endswith(b"}"):
            operations.append(json.loads(rest))
    operations.sort(key=lambda operation: operation["m"])
    return operations


def text(body: Any) -> str:
    """A body as something to compare and to look up, however it was formatted."""
    return body if isinstance(body, str) else json.dumps(body, separators=(",", ":"), sort_keys=True)


# ------------------------------------------------------------------------------------------------ the final tables


@dataclass(frozen=True, slots=True)
class ChannelRow:
    id: int
    name: str
    head: int = 0
    trimmed: int = 0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class MessageRow:
    channel_id: int
    position: int
    at: int
    body: Any
    kind: str = "message"
    key: str | None = None
    step: str | None = None
    attempt: int | None = None
    void_from: int | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    channel_id: int
    journal_id: int
    state: str = "succeeded"
    result: Any = None


@dataclass(frozen=True, slots=True)
class Tables:
    """What the database holds. void: (channel_id, position) of messages that the view `final_messages` leaves out.
    rows: (run, step, epoch) of the users' own table. locks: ids of class LOCK_CLASS that are held."""

    channels: list[ChannelRow] = field(default_factory=list)
    messages: list[MessageRow] = field(default_factory=list)
    void: frozenset[tuple[int, int]] = frozenset()
    runs: list[RunRow] = field(default_factory=list)
    rows: list[tuple[str, str, int]] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    locks: list[int] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)  # application names of connections idle in a transaction

    @classmethod
    def read(cls, dsn: str) -> Tables:
        """All of it, in one snapshot."""
        with psycopg.connect(dsn, application_name="checker") as connection:
            connection.execute("set transaction isolation level repeatable read read only")

            def rows(query: str) -> list[tuple[Any, ...]]:
                return connection.execute(query).fetchall()

            own = rows("select to_regclass('public.rows_of_steps')") != [(None,)]
            return cls(
                channels=[ChannelRow(*row) for row in rows(
                    "select id, name, head, trimmed, closed_at is not null from pgchan.channels order by id")],
                messages=[_message(*row) for row in rows(
                    """select channel_id, "position", (extract(epoch from at) * 1000000)::bigint, body, kind, key, step,
                              attempt, void_from from pgchan.messages order by channel_id, "position" """)],
                void=frozenset(rows(
                    """select channel_id, "position" from pgchan.messages where step is not null and kind = 0
                       except select channel_id, "position" from pgchan.final_messages""")),
                runs=[RunRow(a, b, c, _decoded(d)) for a, b, c, d in rows(
                    "select channel_id, journal_id, state, result from pgchan.runs order by channel_id")],
                rows=[(a, b, c) for a, b, c in (
                    rows("select run, step, epoch from public.rows_of_steps") if own else [])],
                workers=[row[0] for row in rows("select id from pgchan.workers order by id")],
                locks=[row[0] for row in rows(
                    f"""select l.objid::bigint from pg_locks l where l.locktype = 'advisory' and l.granted
                        and l.classid = {LOCK_CLASS} and l.objsubid = 2
                        and l.database = (select oid from pg_database where datname = current_database())""")],
                idle=[row[0] for row in rows(
                    """select application_name from pg_stat_activity where datname = current_database()
                       and state like 'idle in transaction%' and pid <> pg_backend_pid()""")],
            )  # fmt: skip


def _message(channel_id: int, position: int, at: int, body: bytes, kind: int, *rest: Any) -> MessageRow:
    return MessageRow(channel_id, position, at, _decoded(body), KINDS[kind], *rest)


def _decoded(raw: bytes | None) -> Any:
    if raw is None:
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return raw.hex()


# ------------------------------------------------------------------------------------------------ the checker


@dataclass(frozen=True, slots=True)
class Violation:
    """A sentence of README.md that is not true of this history."""

    invariant: str
    name: str
    what: str
    operations: tuple[Operation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.invariant} {self.name}: {self.what}", *(f"    {text(o)[:400]}" for o in self.operations[:4])]
        return "\n".join(lines)


_CHECKS: dict[str, Check] = {}
FINDINGS_MAX = 20  # of one invariant; the first ones tell


def check(operations: list[Operation], final: Tables) -> list[Violation]:
    """What is wrong with this history; empty if nothing is."""
    history = History(operations, final)
    found: list[Violation] = []
    for invariant, function in _CHECKS.items():
        name = function.__name__.strip("_")
        for count, (what, blamed) in enumerate(function(history)):
            found.append(Violation(invariant, name, what, tuple(blamed)))
            if count + 1 == FINDINGS_MAX:
                break
    return found


def _invariant(number: str) -> Callable[[Check], Check]:
    def enter(function: Check) -> Check:
        _CHECKS[number] = function
        return function

    return enter


class History:
    """Logs and tables, and the look-ups that several invariants share, each made once."""

    def __init__(self, operations: list[Operation], final: Tables) -> None:
        self.operations = operations
        self.tables = final
        self.by: defaultdict[str, list[Operation]] = defaultdict(list)
        for operation in operations:
            self.by[operation["op"]].append(operation)
        self.channels = {row.name: row for row in final.channels}
        self.names = {row.id: row.name for row in final.channels}
        self.runs = {self.names.get(row.channel_id, ""): row for row in final.runs}
        self.messages: defaultdict[str, list[MessageRow]] = defaultdict(list)
        for row in sorted(final.messages, key=lambda row: (row.channel_id, row.position)):
            self.messages[self.names.get(row.channel_id, f"id {row.channel_id}")].append(row)
        self.stored = {(name, row.position): row for name, rows in self.messages.items() for row in rows}
        self.lossy = any(operation.get("lossy") for operation in self.by["fault"])

    def journal(self, run: str) -> list[MessageRow]:
        row = self.runs.get(run)
        return self.messages.get(self.names.get(row.journal_id, ""), []) if row else []

    @cached_property
    def results(self) -> dict[tuple[str, str], MessageRow]:
        """The first record of each (run, step)."""
        found: dict[tuple[str, str], MessageRow] = {}
        for run in self.runs:
            for row in self.journal(run):
                if row.key is not None:
                    found.setdefault((run, row.key), row)
        return found

    @cached_property
    def published(self) -> dict[tuple[str, str], Counter[str]]:
        """How often each value was invoked, acknowledged, refused, left unknown."""
        found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for operation in self.by["publish"]:
            found[operation["channel"], text(operation["value"])][operation["type"]] += 1
        return dict(found)

    @cached_property
    def signalled(self) -> dict[tuple[str, str], Counter[str]]:
        found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for operation in self.by["signal"]:
            found[operation["run"], text(operation["value"])][operation["type"]] += 1
        return dict(found)

    @cached_property
    def superseded(self) -> dict[tuple[str, int], float]:
        """When the first claim of a higher epoch was known, by run and epoch."""
        claims: defaultdict[str, list[Operation]] = defaultdict(list)
        for claim in self.by["claim"]:
            claims[claim["run"]].append(claim)
        found: dict[tuple[str, int], float] = {}
        for run, all_of in claims.items():
            first = float("inf")
            for claim in sorted(all_of, key=lambda claim: -claim["epoch"]):
                found.setdefault((run, claim["epoch"]), first)
                first = min(first, claim["m"])
        return found

    @cached_property
    def claimed(self) -> dict[tuple[str, int], Operation]:
        return {(claim["run"], claim["epoch"]): claim for claim in self.by["claim"]}

    @cached_property
    def outages(self) -> list[tuple[float, float]]:
        """Begin and end of times when the server was away for longer than the grace."""
        begun: dict[str, float] = {}
        found = []
        for fault in self.by["fault"]:
            if fault["edge"] == "begin":
                begun[fault["kind"]] = fault["m"]
            elif fault.get("long"):
                found.append((begun[fault["kind"]], fault["m"]))
        return found

    @cached_property
    def deadly(self) -> dict[str, list[tuple[float, float]]]:
        """Begin and end of the faults that may cost a process its runs."""
        found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        open_since: dict[tuple[str, str], float] = {}
        for fault in self.by["fault"]:
            if fault.get("deadly") and fault.get("target"):
                where = fault["target"], fault["kind"]
                if fault["edge"] == "begin":
                    open_since[where] = fault["m"]
                elif where in open_since:
                    found[fault["target"]].append((open_since.pop(where), fault["m"]))
        for (target, _), since in open_since.items():
            found[target].append((since, float("inf")))
        return dict(found)

    def struck(self, process: str, since: float, until: float) -> bool:
        """Whether a deadly fault of this process lies in between, in part at least."""
        faults = [*self.deadly.get(process, []), *self.outages]
        return any(begin <= until and end >= since for begin, end in faults)

    @cached_property
    def reset_later(self) -> dict[tuple[str, str], float]:
        """When a reader was last told that it lost history: what it read before that is withdrawn."""
        return {(o["reader"], o["channel"]): o["m"] for o in self.by["reset"] if o["reason"] == "history_lost"}

    def counts(self, read: Operation) -> bool:
        """Whether a read still stands. It always does, unless committed data was lost and its reader was told."""
        return not self.lossy or read["m"] > self.reset_later.get((read["reader"], read["channel"]), 0.0)

    def left_out(self, channel: str, first: int, last: int) -> bool:
        """Whether all these positions may be missing in the view `final`: void, or removed since."""
        row = self.channels.get(channel)
        if row is None:
            return False
        return all(p <= row.trimmed or (row.id, p) in self.tables.void for p in range(first, last + 1))

    @cached_property
    def jumps(self) -> list[tuple[bool, Operation, int]]:
        """Reads that do not follow: whether it is the first of its reading, the read, the position that was due."""
        found: list[tuple[bool, Operation, int]] = []
        due: dict[tuple[str, Any, str], int | None] = {}
        begun: dict[tuple[str, Any, str], Operation] = {}
        for o in self.operations:
            if o["op"] not in ("reading", "reset", "read"):
                continue
            where = o["reader"], o["reading"], o["channel"]
            if o["op"] == "reading":
                due[where] = None if o["after"] is None else o["after"] + 1
                begun[where] = o
            elif o["op"] == "reset":
                due[where] = o["first"]
                begun.pop(where, None)
            else:
                beginning = begun.pop(where, None)
                expected, position = due.get(where), o["position"]
                if expected is not None and position != expected:
                    row = self.channels.get(o["channel"])
                    from_kept = beginning is not None and beginning["after"] == 0 and row is not None
                    from_kept = from_kept and row is not None and position - 1 <= row.trimmed
                    is_final = o.get("view") == "final"
                    excused = is_final and position > expected and self.left_out(o["channel"], expected, position - 1)
                    if not (from_kept or excused):
                        found.append((beginning is not None, o, expected))
                due[where] = position + 1
        return found


# ------------------------------------------------------------------------------------------------ safety


@_invariant("I1")
def one_message_per_position(history: History) -> Iterator[Finding]:
    """A channel and a position stand for one time and one body, in every acknowledgement, every read and the table."""
    seen: dict[tuple[str, int], tuple[int, str, Operation | None]] = {
        where: (row.at, text(row.body), None) for where, row in history.stored.items()
    }
    for o in history.operations:
        if o["op"] == "read":
            if not history.counts(o):
                continue
        elif o["op"] != "publish" or o["type"] != "ok" or history.lossy:
            continue
        where = o["channel"], o["position"]
        given = text(o["value"])
        at, value, other = seen.setdefault(where, (o["at"], given, o))
        if (at, value) != (o["at"], given):
            blamed = [o, other] if other else [o]
            yield f"{where} was {o['at']} {given[:100]}, and is {at} {value[:100]}", blamed


@_invariant("I2")
def positions_are_dense(history: History) -> Iterator[Finding]:
    """A channel holds every position from `trimmed` + 1 to `head`, once, and none beyond."""
    for name, row in history.channels.items():
        positions = [message.position for message in history.messages.get(name, [])]
        if positions != list(range(row.trimmed + 1, row.head + 1)):
            gaps = sorted(set(range(row.trimmed + 1, row.head + 1)).symmetric_difference(positions))[:10]
            twice = [p for p, n in Counter(positions).items() if n > 1][:10]
            yield f"{name!r}: trimmed {row.trimmed}, head {row.head}; missing or beyond: {gaps}, twice: {twice}", []


@_invariant("I3")
def acknowledged_is_durable(history: History) -> Iterator[Finding]:
    """A message, run or signal that was acknowledged is there in the end."""
    if history.lossy:
        return
    for o in history.by["publish"]:
        row = history.channels.get(o["channel"])
        if o["type"] != "ok" or (o["channel"], o["position"]) in history.stored:
            continue
        if row is None or o["position"] > row.trimmed:
            yield f"{o['channel']!r} no longer holds position {o['position']}", [o]
    for o in history.by["signal"]:
        if o["type"] == "ok" and (o["run"], o["position"]) not in history.stored:
            yield f"the signal at {o['position']} of {o['run']!r} is gone", [o]
    for o in history.by["start"]:
        if o["type"] == "ok" and o["run"] not in history.runs:
            yield f"run {o['run']!r} is gone", [o]


@_invariant("I4")
def stored_once(history: History) -> Iterator[Finding]:
    """What was published once, or under one key, lies at one position for as long as it is kept."""
    keys: dict[tuple[str, str], int] = {}
    values: dict[tuple[str, str], int] = {}
    for name, rows in history.messages.items():
        for row in rows:
            if row.key is not None and keys.setdefault((name, row.key), row.position) != row.position:
                yield f"{name!r} has key {row.key!r} at {keys[name, row.key]} and at {row.position}", []
            where = name, text(row.body)
            if row.kind != "message" or where not in history.published:
                continue
            if values.setdefault(where, row.position) != row.position:
                yield f"{name!r} has {where[1][:100]} at {values[where]} and at {row.position}", []
    told: dict[tuple[str, str], Operation] = {}
    for o in history.by["publish"]:
        if o["type"] == "ok" and o.get("key") is not None:
            where = o["channel"], o["key"]
            first = told.setdefault(where, o)
            channel = history.channels.get(o["channel"])
            if channel is not None and first["position"] <= channel.trimmed:
                told[where] = o  # a key counts for as long as its message is kept
            elif first["position"] != o["position"]:
                yield f"key {o['key']!r} was acknowledged at two positions", [first, o]


@_invariant("I5")
def nothing_from_nowhere(history: History) -> Iterator[Finding]:
    """What is read or stored was invoked, and was neither rolled back nor reported as not done."""
    ours = {channel for channel, _ in history.published}
    signalled = {run for run, _ in history.signalled}

    def judge(channel: str, kind: str, body: Any) -> str | None:
        if kind == "message" and channel in ours:
            counts = history.published.get((channel, text(body)))
        elif kind == "signal" and channel in signalled:
            counts = history.signalled.get((channel, text(body)))
        else:
            return None
        if counts is None:
            return "nobody invoked"
        return "was not done" if counts["invoke"] == counts["fail"] else None

    for (name, position), row in history.stored.items():
        if (why := judge(name, row.kind, row.body)) is not None:
            yield f"{name!r} holds at {position} what {why}: {text(row.body)[:100]}", []
    for o in history.by["read"]:
        if (why := judge(o["channel"], o["kind"], o["value"])) is not None:
            yield f"a reader of {o['channel']!r} was given what {why}", [o]
    starts: defaultdict[str, set[str]] = defaultdict(set)
    for o in history.by["start"]:
        starts[o["run"]].add(o["type"])
    for run in history.runs.keys() & starts.keys():
        if starts[run] == {"invoke", "fail"}:
            yield f"run {run!r} exists, and its start was rolled back", []


@_invariant("I6")
def read_without_gaps(history: History) -> Iterator[Finding]:
    """Within one reading each position follows the one before, but straight after a reset."""
    for first, o, expected in history.jumps:
        if not first:
            yield f"reader {o['reader']!r} got {o['position']} of {o['channel']!r}, {expected} was next", [o]


@_invariant("I7")
def resumed_exactly(history: History) -> Iterator[Finding]:
    """A reading begins right behind its cursor, or is told why it cannot."""
    for first, o, expected in history.jumps:
        if first:
            yield f"reader {o['reader']!r} resumed {o['channel']!r} at {o['position']}, {expected} was next", [o]
    waiting: dict[tuple[str, Any, str], Operation] = {}
    for o in history.operations:
        if o["op"] not in ("reading", "reset", "read"):
            continue
        where = o["reader"], o["reading"], o["channel"]
        if o["op"] == "reading" and o.get("expect"):
            waiting[where] = o
        elif o["op"] == "reset":
            row = history.channels.get(o["channel"])
            begun = waiting.pop(where, None)
            if begun is not None and begun["expect"] != o["reason"]:
                yield f"{o['reason']} was told, {begun['expect']} was due", [begun, o]
            if begun is None and o["reason"] == "history_lost" and not history.lossy:
                yield f"reader {o['reader']!r} was told that {o['channel']!r} lost history; it did not", [o]
            if o["reason"] == "trimmed" and row is not None and row.trimmed < o["first"] - 1:
                yield f"{o['channel']!r} is trimmed to {row.trimmed}, but a reader was told {o['first'] - 1}", [o]
        elif o["op"] == "read" and where in waiting:
            yield "a reader went on from a cursor that is none", [waiting.pop(where), o]


@_invariant("I8")
def positions_rise(history: History) -> Iterator[Finding]:
    """Who waits for each acknowledgement before the next publish sees positions rise."""
    last: dict[tuple[str, str], Operation] = {}
    for o in history.by["publish"]:
        if o["type"] != "ok" or o.get("repeat") or history.lossy:
            continue
        where = str(o.get("publisher", o["process"])), str(o["channel"])
        if where in last and o["position"] <= last[where]["position"]:
            yield f"{where[0]!r} was given {o['position']} after {last[where]['position']}", [last[where], o]
        last[where] = o


@_invariant("I9")
def what_was_read_stays(history: History) -> Iterator[Finding]:
    """What a reader was given is there in the end, unless it was trimmed or the reader was told that it is lost."""
    for o in history.by["read"]:
        if (o["channel"], o["position"]) in history.stored or not history.counts(o):
            continue
        row = history.channels.get(o["channel"])
        if row is None or o["position"] > row.trimmed:
            yield f"{o['channel']!r} no longer holds position {o['position']}, which was read", [o]


@_invariant("I10")
def recorded_once(history: History) -> Iterator[Finding]:
    """A step of a run is recorded once; whoever asks for it is given that; its own rows are there once, with it."""
    for run in history.runs:
        for key, n in Counter(row.key for row in history.journal(run) if row.key is not None).items():
            if n > 1:
                yield f"run {run!r} recorded step {key!r} {n} times", []
    for o in history.by["recorded"]:
        found = history.results.get((o["run"], o["step"]))
        if found is None and o["run"] in history.runs:
            yield f"run {o['run']!r} has no record of step {o['step']!r}, which returned", [o]
        elif found is not None and found.kind == "message" and text(found.body) != text(o["value"]):
            yield f"step {o['step']!r} of {o['run']!r} returned what is not its record {text(found.body)[:100]}", [o]
    rows = Counter((run, step) for run, step, _ in history.tables.rows)
    for run, step, epoch in history.tables.rows:
        record = history.results.get((run, step))
        if rows[run, step] > 1:
            yield f"the rows of step {step!r} of {run!r} were written {rows[run, step]} times", []
        elif record is None:
            yield f"step {step!r} of {run!r} wrote its rows and left no record", []
        elif isinstance(record.body, dict) and record.body.get("epoch", epoch) != epoch:
            yield f"step {step!r} of {run!r}: rows of epoch {epoch}, record of {record.body['epoch']}", []
    for (run, step), record in history.results.items():
        if isinstance(record.body, dict) and record.body.get("rows") and not rows[run, step]:
            yield f"step {step!r} of {run!r} is recorded, and its rows are missing", []


@_invariant("I11")
def superseded_is_silent(history: History) -> Iterator[Finding]:
    """Nothing is written under an epoch after something of a higher one, or begun after a claim, unless by a frozen
    worker; nothing is written to a run that has ended."""
    for run in history.runs:
        for rows in (history.messages.get(run, []), history.journal(run)):
            highest = 0
            for row in rows:
                if row.kind == "message" and isinstance(row.body, dict) and isinstance(row.body.get("epoch"), int):
                    if row.body["epoch"] < highest:
                        yield f"run {run!r}: at {row.position} epoch {row.body['epoch']} wrote after {highest}", []
                    highest = max(highest, row.body["epoch"])
    invoked: dict[tuple[str, str], Operation] = {}
    for o in history.operations:
        if o.get("epoch") is None or o["op"] not in ("effect", "effected", "publish"):
            continue
        run = o["run"]
        after = history.superseded.get((run, o["epoch"]), float("inf"))
        if o["op"] == "effect" and o["m"] > after:
            claim = history.claimed[run, o["epoch"]]
            if not history.struck(o["process"], claim["m"], o["m"]):
                yield f"epoch {o['epoch']} of {run!r} began step {o['step']!r} after a later claim", [claim, o]
        elif o["op"] == "effected" and o["m"] > after:
            found = history.results.get((run, o["step"]))
            if found is not None and text(found.body) == text(o["value"]):
                yield f"epoch {o['epoch']} of {run!r} recorded step {o['step']!r} after a later claim", [o]
        elif o["op"] == "publish" and o["type"] == "invoke":
            invoked[o["channel"], text(o["value"])] = o
        elif o["op"] == "publish" and o["type"] == "ok":
            begun = invoked.get((o["channel"], text(o["value"])), o)
            if begun["m"] > after:
                yield f"epoch {o['epoch']} of {run!r} published after a later claim", [begun, o]


@_invariant("I12")
def output_once(history: History) -> Iterator[Finding]:
    """The view `final` has the output of each recorded step once, whole; a later try speaks after its reset."""
    for run, row in history.runs.items():
        said: defaultdict[str, list[Any]] = defaultdict(list)
        highest: dict[str, int] = {}
        reset: dict[str, int] = {}
        for message in history.messages.get(run, []):
            step = message.step
            if step is None or message.attempt is None:
                continue
            if message.kind == "control" and message.void_from is not None:
                reset[step] = max(reset.get(step, 0), message.attempt)
            elif message.kind == "message":
                body = message.body if isinstance(message.body, dict) else {}
                before = highest.get(step, message.attempt)
                spoke = f"run {run!r}: try {message.attempt} of {step!r} spoke at {message.position}"
                if message.attempt < max(before, reset.get(step, 0)):
                    yield f"{spoke} after a later one", []
                elif message.attempt > before and reset.get(step, 0) < message.attempt and not body.get("kept"):
                    yield f"{spoke} without a reset", []
                highest[step] = max(before, message.attempt)
                if (row.channel_id, message.position) not in history.tables.void:
                    said[step].append(body.get("id"))
        for record in history.journal(run):
            if record.key is None or not isinstance(record.body, dict) or "output" not in record.body:
                continue
            if said.get(record.key, []) != record.body["output"]:
                yield (
                    f"run {run!r}: step {record.key!r} is recorded with output {record.body['output']}, "
                    f"readers see {said.get(record.key, [])}", [],
                )  # fmt: skip


@_invariant("I13")
def signals_once(history: History) -> Iterator[Finding]:
    """A signal is consumed at most once, in order, by a step that is recorded; once the run has ended, each one was
    consumed or is named as missed."""
    for run, row in history.runs.items():
        signals: list[int] = []
        consumed: list[int] = []
        by_step: defaultdict[str, list[int]] = defaultdict(list)
        missed: list[int] = []
        for message in history.messages.get(run, []):
            if message.kind == "signal":
                signals.append(message.position)
            elif message.kind == "control" and message.body.get("type") == "consumed":
                consumed.append(message.body["signal"])
                by_step[message.body["step"]].append(message.body["signal"])
            elif message.kind == "control" and message.body.get("type") == "ended":
                missed = message.body.get("missed", [])
        if len(set(consumed)) != len(consumed):
            yield f"run {run!r} consumed a signal twice: {consumed}", []
        elif consumed != sorted(consumed):
            yield f"run {run!r} consumed signals out of order: {consumed}", []
        if not set(consumed) <= set(signals):
            yield f"run {run!r} consumed what is no signal: {sorted(set(consumed) - set(signals))}", []
        if row.state in ENDED and sorted(consumed + missed) != signals:
            yield f"run {run!r} has ended; signals {signals}, consumed {consumed}, missed {missed}", []
        for step, positions in by_step.items():
            record = history.results.get((run, step))
            if record is None:
                yield f"run {run!r}: step {step!r} consumed {positions} and is not recorded", []
            elif isinstance(record.body, dict) and record.body.get("signals", positions) != positions:
                yield f"run {run!r}: step {step!r} took {record.body['signals']}, consumed are {positions}", []
        for record in history.journal(run):
            taken = record.body.get("signals") if isinstance(record.body, dict) and record.key is not None else None
            if taken and record.key not in by_step:
                yield f"run {run!r}: step {record.key!r} took signals {taken}, none is consumed", []


@_invariant("I14")
def cancelled_is_final(history: History) -> Iterator[Finding]:
    """Once a cancel is acknowledged nothing more is recorded for the run, and it stays cancelled; every end that was
    reported is the one that is stored."""
    for run, row in history.runs.items():
        if row.state != "cancelled":
            continue
        ends = [m for m in history.messages.get(run, []) if m.kind == "control" and m.body.get("type") == "ended"]
        last = ends[-1] if ends else None
        if last is None:
            yield f"run {run!r} is cancelled, and its channel does not say so", []
            continue
        late = [m.position for m in history.messages[run] if m.position > last.position]
        late += [m.position for m in history.journal(run) if m.at > last.at]
        if late:
            yield f"run {run!r} was cancelled, and later recorded {late}", []
    for o in history.by["cancelled"]:
        if o["type"] == "ok" and o["run"] in history.runs and history.runs[o["run"]].state != "cancelled":
            yield f"run {o['run']!r} was cancelled and is {history.runs[o['run']].state}", [o]
    for o in history.by["ended"]:
        ended = history.runs.get(o["run"])
        if ended is not None and (ended.state != o["state"] or text(ended.result) != text(o.get("value"))):
            yield f"run {o['run']!r} was reported as {o['state']} and is {ended.state}, {text(ended.result)[:100]}", [o]


@_invariant("I15")
def only_known_errors(history: History) -> Iterator[Finding]:
    """Nobody is given an error that is not in pgchan's tree, or one that is a lie; no process ends by itself."""
    for o in history.by["surprise"]:
        yield str(o["what"]), [o]


# ------------------------------------------------------------------------------------------------ liveness


@_invariant("L1")
def runs_end(history: History) -> Iterator[Finding]:
    """When the tables are read, some time after the last fault, every run has ended."""
    for run, row in history.runs.items():
        if row.state not in ENDED:
            yield f"run {run!r} is still {row.state}", []


def _following(history: History) -> dict[tuple[str, str], Operation]:
    """Readers that still follow their channel in the end, and the last reading of each."""
    found: dict[tuple[str, str], Operation] = {}
    for o in history.operations:
        if o["op"] == "reading":
            found[o["reader"], o["channel"]] = o
        elif o["op"] == "left":
            found.pop((o["reader"], o["channel"]), None)
    return found


@_invariant("L2")
def readers_reach_the_head(history: History) -> Iterator[Finding]:
    """After the faults each reader has all there is within HEAD_SECONDS."""
    quiet = max((o["t"] for o in history.by["quiet"]), default=None)
    if quiet is None:
        return
    reached: dict[tuple[str, str], int] = {}
    late: dict[tuple[str, str], Operation] = {}
    for o in history.by["read"]:
        where = o["reader"], o["channel"]
        reached[where] = o["position"]
        if o["t"] - max(quiet, o["at"] / 1e6) > HEAD_SECONDS:
            late.setdefault(where, o)
    for where, begun in _following(history).items():
        row = history.channels.get(where[1])
        if row is None:
            continue
        if late.get(where) is not None:
            yield f"reader {where[0]!r} was given {where[1]!r} more than {HEAD_SECONDS} s late", [late[where]]
        at = reached.get(where, begun["after"] or 0)
        if at < row.head and not (begun.get("view") == "final" and history.left_out(where[1], at + 1, row.head)):
            yield f"reader {where[0]!r} of {where[1]!r} stands at {at}, the head is {row.head}", [begun]


@_invariant("L3")
def idle_tails_wake(history: History) -> Iterator[Finding]:
    """After the faults a reader that waits is given a new message within WAKE_SECONDS."""
    probes = {}
    begun: dict[tuple[str, str], float] = {}
    for o in history.by["publish"]:
        if o.get("probe"):
            if o["type"] == "invoke":
                begun[o["channel"], text(o["value"])] = o["m"]
            elif o["type"] == "ok":
                probes[o["channel"], o["position"]] = (begun.get((o["channel"], text(o["value"])), o["m"]), o)
    got = {
        (o["reader"], o["channel"], o["position"]): o
        for o in history.by["read"] if (o["channel"], o["position"]) in probes
    }  # fmt: skip
    followers = _following(history)
    for (channel, position), (since, probe) in probes.items():
        for reader, followed in followers:
            if followed != channel:
                continue
            read = got.get((reader, channel, position))
            if read is None:
                yield f"reader {reader!r} of {channel!r} slept through {position}", [probe]
            elif read["m"] - since > WAKE_SECONDS:
                yield f"reader {reader!r} of {channel!r} woke after {read['m'] - since:.2f} s", [probe, read]


@_invariant("L4")
def nothing_is_left(history: History) -> Iterator[Finding]:
    """In the end there is no lock without a living worker, no worker without its lock, no connection idle in a
    transaction, no process or task that nobody waits for."""
    for worker in sorted(set(history.tables.locks) - set(history.tables.workers)):
        yield f"the lock of worker {worker} is held, and there is no such worker", []
    for worker in sorted(set(history.tables.workers) - set(history.tables.locks)):
        yield f"worker {worker} has no lock, and nobody took its runs back", []
    for name in history.tables.idle:
        yield f"connection {name!r} is idle in a transaction", []
    for o in history.by["left_behind"]:
        yield f"{o['what']} is left", [o]


@_invariant("L5")
def memory_is_bounded(history: History) -> Iterator[Finding]:
    """After the load a process has the memory that it had before, within MEMORY_GROWTH."""
    before = {o["of"]: o["bytes"] for o in history.by["memory"] if o["mark"] == "before"}
    for o in history.by["memory"]:
        if o["mark"] == "after" and o["of"] in before and o["bytes"] > MEMORY_GROWTH * before[o["of"]]:
            yield f"{o['of']!r} grew from {before[o['of']]:,} to {o['bytes']:,} bytes", [o]


@_invariant("L6")
def takeovers_have_a_cause(history: History) -> Iterator[Finding]:
    """Only a worker that was killed, frozen or cut off for longer than the grace loses its runs, and then another goes
    on in time."""
    process_of: dict[int, Operation] = {}
    for o in history.operations:
        if o["op"] == "worker":
            process_of.setdefault(o["worker"], o)
        elif o["op"] == "reaped":
            entered = process_of.get(o["worker"])
            since = max(entered["m"], o["m"] - AFTERMATH_SECONDS) if entered is not None else 0.0
            if entered is not None and not history.struck(entered["process"], since, o["m"]):
                yield f"worker {o['worker']} was taken for dead and had no fault", [entered, o]
    for takeover in takeovers(history.operations):
        if takeover.seconds > takeover.within:
            yield (
                f"after {takeover.kind} run {takeover.run!r} went on {takeover.seconds:.2f} s later, "
                f"{takeover.within:.1f} at most", [takeover.fault],
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Takeover:
    """A step that was under way in a worker that was struck, begun again elsewhere so many seconds later."""

    kind: str
    run: str
    seconds: float
    within: float
    fault: Operation


def takeovers(operations: list[Operation]) -> list[Takeover]:
    """From the last sign of a worker (the fault) to the first step of the next attempt, for each run whose step was
    under way."""
    found: list[Takeover] = []
    under_way: defaultdict[str, dict[tuple[str, str], int]] = defaultdict(dict)  # by process: run and step → epoch
    pending: dict[str, tuple[Operation, int]] = {}  # by run: the fault, the epoch that it ended
    for o in operations:
        op = o["op"]
        if op == "effect":
            if (waiting := pending.get(o["run"])) is not None and o["epoch"] > waiting[1]:
                fault = pending.pop(o["run"])[0]
                within = fault.get("within", float("inf"))
                found.append(Takeover(fault["kind"], o["run"], o["m"] - fault["m"], within, fault))
            under_way[o["process"]][o["run"], o["step"]] = o["epoch"]
        elif op == "effected":
            under_way[o["process"]].pop((o["run"], o["step"]), None)
            if (waiting := pending.get(o["run"])) is not None and o["epoch"] == waiting[1]:
                pending.pop(o["run"])  # the worker went on itself
        elif op == "over":
            ended = [where for where in under_way[o["process"]] if where[0] == o["run"]]
            for where in ended:
                del under_way[o["process"]][where]
        elif op == "cancelled":
            pending.pop(o["run"], None)
        elif op == "fault" and o["edge"] == "begin":
            pending.clear()  # what two faults cost together is not held against one
            if o.get("deadly"):
                for (run, _), epoch in under_way.pop(o.get("target", ""), {}).items():
                    pending[run] = o, epoch
    return found
