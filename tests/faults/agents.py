"""The worker of a soak, and the workflow that it executes: a plan of steps that speak, write rows, take signals, fail,
sleep, start children. Each tells the log what it does, so that the checker can hold the record against it.

What a step publishes and what it returns names the epoch under which it ran. The result of a step lists the ids of its
output and the positions of the signals that it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy
from faults.history import Log
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import pgchan
from pgchan import errors
from pgchan.attempt import Attempt, Claimed
from pgchan.model import microseconds

RETRY = pgchan.Retry(attempts=6, delay=0.05, backoff=2.0, max_delay=0.5)
FAILURE = 0.15  # how often a step that may fail does
START_AGAIN_SECONDS = 0.5
INSERT = "insert into public.rows_of_steps (run, step, epoch) values"

log: Log  # of this process


def tell(the_log: Log) -> None:
    """Log there from now on."""
    global log
    log = the_log


class Stumble(Exception):
    """What a step raises on purpose."""


# ------------------------------------------------------------------------------------------------ plans


def plan_of(id: str, seed: int) -> dict[str, Any]:
    """What the run of this id is to do; the same whoever asks."""
    chance = random.Random(f"{seed}/{id}")
    kinds = [
        "say", "stream", "say_slowly", "carry_on", "write", "session", "receive", "take", "interrupt", "sleep",
        "announce", "child", "parallel", "thread",
    ]  # fmt: skip
    count = chance.randint(3, 7)
    actions = [{"do": chance.choice(kinds), "seconds": round(chance.uniform(0, 0.6), 3)} for _ in range(count)]
    signals = chance.randint(0, 3) if {"receive", "take", "interrupt"} & {a["do"] for a in actions} else 0
    return {"actions": actions, "signals": signals, "cancel": chance.random() < 0.12}


# ------------------------------------------------------------------------------------------------ the workflow


class Speaker:
    """One try of a step: speaks under the epoch of its attempt, and keeps what it must account for."""

    def __init__(self, run: Any, step: str) -> None:
        self.run = run
        self.epoch: int = _attempt_of(run).claimed.epoch
        self.facts = {"run": run.id, "step": step, "epoch": self.epoch}
        self.output: list[str] = []
        self.signals: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.kept = False
        log.write("effect", **self.facts)

    async def say(self, *, wait: bool) -> None:
        body = {"id": _name(), "epoch": self.epoch}
        if self.kept:
            body["kept"] = True
        facts = {"channel": self.run.id, "value": body, **self.facts}
        log.write("publish", type="invoke", **facts)
        try:
            message = await self.run.publish(body, wait=wait)
        except (errors.Fenced, errors.Unavailable):
            log.write("publish", type="fail", **facts)
            raise
        if message is not None:
            log.write("publish", type="ok", position=message.position, at=microseconds(message.at), **facts)
        self.bodies.append(body)
        self.output.append(str(body["id"]))

    def take_back(self) -> None:
        """What was said in a transaction that was rolled back."""
        for body in self.bodies:
            log.write("publish", type="fail", channel=self.run.id, value=body, **self.facts)

    def keep(self) -> None:
        """Carry on from what earlier tries said."""
        self.output += [message.body["id"] for message in self.run.previous()]
        self.kept = True

    async def take(self, seconds: float) -> None:
        signal = await self.run.receive(timeout=seconds)
        if signal is not None:
            self.signals.append(signal.position)

    def result(self, **more: Any) -> dict[str, Any]:
        found = {"epoch": self.epoch, "output": self.output, "signals": self.signals, "try": _name(), **more}
        log.write("effected", value=found, **self.facts)
        return found


def _name() -> str:
    return uuid.uuid4().hex[:12]


def _attempt_of(run: Any) -> Attempt:
    attempt: Attempt = getattr(run, "_run", run)._attempt  # `def` code holds a front of the Run
    return attempt


async def _say(run: pgchan.Run, step: str, seconds: float, words: int, *, keeps: bool = False) -> dict[str, Any]:
    speaker = Speaker(run, step)
    if keeps:
        speaker.keep()
    for _ in range(words):
        await speaker.say(wait=words < 10 and random.random() < 0.4)
        await asyncio.sleep(seconds / words)
    if random.random() < FAILURE:
        raise Stumble(step)
    return speaker.result()


async def _take(run: pgchan.Run, step: str, seconds: float) -> dict[str, Any]:
    speaker = Speaker(run, step)
    await speaker.say(wait=False)
    await speaker.take(0.5 + seconds)
    await speaker.say(wait=False)
    await speaker.take(0.1)
    if random.random() < FAILURE:
        raise Stumble(step)
    return speaker.result()


def _in_thread(step: str, seconds: float) -> dict[str, Any]:
    run = pgchan.current_run()
    epoch = _attempt_of(run).claimed.epoch
    facts = {"run": run.id, "step": step, "epoch": epoch}
    log.write("effect", **facts)
    time.sleep(seconds)
    found = {"epoch": epoch, "output": [], "signals": [], "try": _name()}
    log.write("effected", value=found, **facts)
    return found


class _Actor:
    """Executes a plan, action by action."""

    def __init__(self, run: pgchan.Run) -> None:
        self.run = run

    async def step(self, name: str, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
        value = await self.run.step(fn, *args, name=name, retry=RETRY, **options)
        self.returned(name, value)

    def returned(self, name: str, value: Any) -> None:
        epoch = _attempt_of(self.run).claimed.epoch
        log.write("recorded", run=self.run.id, step=name, epoch=epoch, value=value)

    async def act(self, number: int, do: str, seconds: float) -> None:
        name = f"{do}-{number}"
        run = self.run
        match do:
            case "say":
                await self.step(name, _say, run, name, seconds / 4, 3)
            case "stream":  # as tokens come: when it is frozen, the next one is due at once
                await self.step(name, _say, run, name, 0.5 + seconds, 25)
            case "say_slowly":
                await self.step(name, _say, run, name, seconds * 4, 6)
            case "carry_on":
                await self.step(name, lambda: _say(run, name, seconds, 3, keeps=True))
            case "take":
                await self.step(name, _take, run, name, seconds)
            case "thread":
                await self.step(name, _in_thread, name, seconds)
            case "interrupt":
                with contextlib.suppress(pgchan.Interrupted):
                    await self.step(name, _say, run, name, 1 + seconds, 3, interruptible=True)
            case "parallel":
                await asyncio.gather(
                    self.step(f"{name}-a", _say, run, f"{name}-a", seconds, 2),
                    self.step(f"{name}-b", _say, run, f"{name}-b", seconds, 2),
                )
            case "receive":
                await run.receive(timeout=0.3 + seconds * 3)
            case "sleep":
                await run.sleep(seconds * 3)
            case "announce":
                await self.announce(number)
            case "child":
                plan = {"actions": [{"do": "say", "seconds": seconds}]}
                child = await run.start("agent", plan, id=f"{run.id}/{name}")
                with contextlib.suppress(pgchan.RunFailed):
                    await child.result()
            case "write":
                await self.write(name, run.transaction(name), seconds)
            case "session":
                assert engine is not None
                await self.write(name, run.session(name, engine), seconds)

    async def announce(self, number: int) -> None:
        """Said outside of steps: the same at each replay, stored once."""
        body = {"id": f"{self.run.id}/announce-{number}"}
        facts = {"channel": self.run.id, "value": body}
        log.write("publish", type="invoke", **facts)
        await self.run.publish(body)

    async def write(self, name: str, transaction: Any, seconds: float) -> None:
        epoch = _attempt_of(self.run).claimed.epoch
        speaker: Speaker | None = None
        try:
            async with transaction as connection:
                await _insert(connection, self.run.id, name, epoch)  # first: here a block that is recorded is left
                speaker = Speaker(self.run, name)
                await speaker.say(wait=False)
                await asyncio.sleep(seconds)
                if random.random() < FAILURE:
                    raise Stumble(name)
                transaction.result = speaker.result(rows=True)
        except Stumble:
            assert speaker is not None
            speaker.take_back()  # rolled back, and not tried again, unless the run is
            return
        self.returned(name, transaction.result)


async def _insert(connection: Any, *values: Any) -> None:
    if isinstance(connection, AsyncSession):
        named = dict(zip(("run", "step", "epoch"), values, strict=True))
        await connection.execute(sqlalchemy.text(f"{INSERT} (:run, :step, :epoch)"), named)
    else:
        await connection.execute(f"{INSERT} ($1, $2, $3)", *values)


@pgchan.workflow
async def agent(run: pgchan.Run, plan: dict[str, Any]) -> int:
    """Execute a plan."""
    actor = _Actor(run)
    for number, action in enumerate(plan["actions"]):
        await actor.act(number, action["do"], action["seconds"])
    return len(plan["actions"])


# ------------------------------------------------------------------------------------------------ the worker

engine: Any = None


class LoggedWorker(pgchan.Worker):
    """A worker that tells the log who it is, what it claims, what it has reaped, and how its attempts end."""

    def _on_held(self, id: int, again: bool) -> None:
        log.write("worker", worker=id, again=again)
        super()._on_held(id, again)

    def _on_superseded(self, id: int) -> None:
        log.write("worker", worker=id, superseded=True)
        super()._on_superseded(id)

    def _on_reaped(self, id: int, runs: int) -> None:
        log.write("reaped", worker=id, runs=runs)
        super()._on_reaped(id, runs)

    def _begin(self, claimed: Claimed) -> None:
        log.write("claim", run=claimed.run, epoch=claimed.epoch, worker=self.id)
        super()._begin(claimed)

    async def _execute(self, attempt: Attempt) -> None:
        await super()._execute(attempt)
        log.write("over", run=attempt.claimed.run, epoch=attempt.claimed.epoch, why=attempt.over)


async def work(dsn: str, name: str, options: dict[str, Any]) -> None:
    """Be a worker until SIGTERM."""
    global engine
    logging.getLogger("pgchan").setLevel(logging.INFO)
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://", 1), pool_pre_ping=True)
    while True:
        async with pgchan.AsyncClient(dsn, name=name, timeout=options.pop("patience", 30.0)) as client:
            worker = LoggedWorker(client, [agent], name=name, concurrency=30, **options)
            try:
                await worker.run()
                break
            except errors.Unavailable:  # the server is away as this worker starts
                await asyncio.sleep(START_AGAIN_SECONDS)
    await engine.dispose()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        log.write("left_behind", what=f"task {task.get_name()} of {name}: {task.get_coro()!r:.200}")
