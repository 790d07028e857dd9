"""Processes to do harm to: a worker and a reader, which tell all that they do as operations of history.py.

They speak with the test as tests/workers.py does, over their output and input. An operation is the event "op"; the
test's `Process` collects them, and its `operations` are for the checker.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import workers
from faults.history import Operation
from workers import gate, obey, stop_at, tell, work

import pgchan
from pgchan.attempt import current_step
from pgchan.model import Message, microseconds

# ------------------------------------------------------------------------------------------------ the process's side

READER: dict[str, Any] = {"reader": sys.argv[2] if __name__ == "__main__" else "", "reading": 1}


def operation(op: str, **facts: Any) -> None:
    tell("op", {"op": op, **facts})


def epoch_of(run: pgchan.Run) -> int:
    return run._attempt.claimed.epoch


def stored(message: Message) -> dict[str, Any]:
    """The place of a message, as history.py has it."""
    return {"position": message.position, "at": microseconds(message.at)}


async def say(run: pgchan.Run, word: str, *, wait: bool = True) -> str:
    """Publish on the run's channel. What is said in a step tells who said it; outside, each replay says the same."""
    step = current_step.get()
    facts: dict[str, Any] = {"channel": run.id, "run": run.id}
    if step is None:
        facts |= {"value": word, "repeat": True}
    else:
        facts |= {"value": {"id": word, "epoch": epoch_of(run)}, "step": step.name, "epoch": epoch_of(run)}
    operation("publish", type="invoke", **facts)
    message = await run.publish(facts["value"], wait=wait)
    if message is not None:
        operation("publish", type="ok", **facts, **stored(message))
    return word


@asynccontextmanager
async def effect(run: pgchan.Run, step: str) -> AsyncIterator[dict[str, Any]]:
    """What a step's function does, from its beginning to what it is about to return."""
    operation("effect", run=run.id, step=step, epoch=epoch_of(run))
    value: dict[str, Any] = {"epoch": epoch_of(run), "output": [], "signals": []}
    yield value
    operation("effected", run=run.id, step=step, epoch=epoch_of(run), value=value)


async def think(run: pgchan.Run) -> dict[str, Any]:
    """Says two things, one of them without waiting."""
    async with effect(run, "think") as value:
        value["output"] = [await say(run, "t1", wait=False), await say(run, "t2")]
    return value


async def speak(run: pgchan.Run) -> dict[str, Any]:
    """Says something and waits at the gate "speak" before it goes on."""
    async with effect(run, "speak") as value:
        value["output"].append(await say(run, "s1"))
        await gate("speak")
        value["output"].append(await say(run, "s2", wait=False))
    return value


async def answer(run: pgchan.Run) -> dict[str, Any]:
    """Says something, takes a signal, says something more."""
    async with effect(run, "answer") as value:
        value["output"].append(await say(run, "a1", wait=False))
        signal = await run.receive()
        assert signal is not None
        value["signals"].append(signal.position)
        value["output"].append(await say(run, "a2"))
    return value


async def recorded(run: pgchan.Run, step: Any) -> dict[str, Any]:
    value: dict[str, Any] = await run.step(step, run)
    operation("recorded", run=run.id, step=step.__name__, epoch=epoch_of(run), value=value)
    return value


def claimed(run: pgchan.Run) -> None:
    operation("claim", run=run.id, epoch=epoch_of(run), worker=worker.id)


@pgchan.workflow
async def journey(run: pgchan.Run) -> list[Any]:
    """All that a run may do: output, a signal, steps, rows of the user's own. Waits at the gate "end"."""
    claimed(run)
    await say(run, "begin")
    first = await run.receive()
    assert first is not None
    await recorded(run, think)
    async with (reserve := run.transaction("reserve")) as connection:
        await connection.execute("insert into rows_of_steps values ($1, 'reserve', $2)", run.id, epoch_of(run))
        async with effect(run, "reserve") as value:
            value |= {"rows": True, "output": [await say(run, "r1")]}
        reserve.result = value
    taken = await recorded(run, answer)
    await gate("end")
    await say(run, "end", wait=False)
    return [first.body, len(taken["signals"])]


@pgchan.workflow
async def talk(run: pgchan.Run) -> str:
    """A step, a long one, a step."""
    claimed(run)
    await recorded(run, think)
    await recorded(run, speak)
    await recorded(run, answer)
    return "said"


@pgchan.workflow
async def warm(run: pgchan.Run) -> None:
    """Executes every statement once, so that it is prepared: from then on one message sends it. Waits at "warm"."""
    await run.publish("warm")
    await gate("warm")


@pgchan.workflow
async def endless(run: pgchan.Run) -> None:
    """A step that never ends, and tells when it is cancelled."""

    async def hang() -> None:
        async with effect(run, "hang"):
            try:
                await asyncio.Event().wait()
            finally:
                tell("cancelled", run.id)

    claimed(run)
    await run.step(hang)


@pgchan.workflow
async def beside(run: pgchan.Run) -> None:
    """A step whose record goes in one batch with a message of somebody else in this process."""

    async def other() -> None:
        facts = {"channel": "other", "value": f"beside epoch {epoch_of(run)}"}
        operation("publish", type="invoke", **facts)
        try:
            message = await worker.client.channel("other").publish(facts["value"])
            operation("publish", type="ok", **facts, **stored(message))
        except pgchan.Error as error:
            operation("publish", type="fail", **facts, error=repr(error))

    async def last() -> None:
        async with effect(run, "last"):
            tasks.append(asyncio.create_task(other()))  # runs as the step's record is queued, and is queued behind it

    tasks: list[asyncio.Task[None]] = []
    claimed(run)
    await run.step(last)


class Worker(pgchan.Worker):
    """Tells who it is, and whom it takes the runs of."""

    def _on_held(self, id: int, again: bool) -> None:
        operation("worker", worker=id)
        super()._on_held(id, again)

    def _on_superseded(self, id: int) -> None:
        operation("worker", worker=id)
        super()._on_superseded(id)

    def _on_reaped(self, id: int, runs: int) -> None:
        operation("reaped", worker=id, runs=runs)
        super()._on_reaped(id, runs)


async def follow(client: pgchan.AsyncClient, channel: str, at: str | None) -> None:
    """Read a channel for ever, in the door that suspends."""
    async with client:
        obey()
        if at is not None:
            stop_at(at)
        tail = client.channel(channel).tail()
        operation("reading", **READER, channel=channel, after=0, view="final")
        async for message in tail:
            read(message)


def follow_blocking(client: pgchan.Client, channel: str, at: str | None) -> None:
    """The same in the door that blocks."""
    with client:
        obey()
        if at is not None:
            stop_at(at)
        tail = client.channel(channel).tail()
        operation("reading", **READER, channel=channel, after=0, view="final")
        for message in tail:
            read(message)


def read(message: Message) -> None:
    facts = {"channel": message.channel, "kind": message.kind, "value": message.body}
    operation("read", **READER, **facts, **stored(message))


# ------------------------------------------------------------------------------------------------ the test's side


class Process(workers.Process):
    """One of these processes. role: "worker", or "async" or "blocking" for a reader of `channel`."""

    def __init__(self, dsn: str, name: str, *, role: str = "worker", at: str | None = None, **options: Any) -> None:
        super().__init__(dsn, name, at=at, program=__file__, role=role, **options)

    @property
    def operations(self) -> list[Operation]:
        """What it told so far, as history.py has it."""
        found = [{"m": told[0], "process": self.name, **told[2]} for told in list(self.events) if told[1] == "op"]
        # Only the difference to other times is of interest, and nobody's clock is moved here.
        return [{"t": entry["m"] + time.time() - time.monotonic(), **entry} for entry in found]

    def of(self, op: str, **facts: Any) -> list[Operation]:
        """Its operations of this kind with these facts."""
        return [o for o in self.operations if o["op"] == op and facts.items() <= o.items()]

    async def does(self, op: str, *, seconds: float = 15.0, times: int = 1, **facts: Any) -> Operation:
        """Wait until it has done this so many times; the last of them."""
        deadline = time.monotonic() + seconds
        while len(found := self.of(op, **facts)) < times:
            assert time.monotonic() < deadline, f"{self.name} did not {op} {facts} in {seconds} s: {self.events}"
            assert self.process.poll() is None, f"{self.name} has ended: {self.events}"
            await asyncio.sleep(0.005)
        return found[times - 1]


if __name__ == "__main__":
    dsn, name, at, given = sys.argv[1:]
    options = json.loads(given)
    role = options.pop("role")
    if role == "blocking":
        follow_blocking(pgchan.Client(dsn, name=name), options["channel"], at or None)
    elif role == "async":
        asyncio.run(follow(pgchan.AsyncClient(dsn, name=name), options["channel"], at or None))
    else:
        client = pgchan.AsyncClient(dsn, name=name, pool_size=options.pop("pool_size", 10))
        worker = Worker(client, [journey, talk, warm, endless, beside], name=name, **options)
        asyncio.run(work(client, worker, at or None))
