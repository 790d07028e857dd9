"""Workers as processes of their own, to kill, freeze and stop at named points; and the workflows that they execute.

Run as a program this file is such a worker. It tells what happens in lines of JSON on its output, each with the time
(CLOCK_MONOTONIC, one clock for all processes), and takes orders on its input: "at NAME" lets it stop when it comes to
this point, "at NAME#2" the second time from now; "go" lets it go on from there; "open NAME" opens a gate at which a
step waits; "clock SECONDS" moves its wall clock. `Process` is the other end. Long, for it holds all
workflows that a worker process may have to execute.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import psycopg
from doors import direct

import pgchan
from pgchan import points

# ------------------------------------------------------------------------------------------------ the worker's side

_orders: queue.SimpleQueue[str] = queue.SimpleQueue()
_gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)


def tell(event: str, *facts: Any) -> None:
    """One line, written at once: what was told before a SIGKILL arrives."""
    os.write(1, (json.dumps([time.monotonic(), event, *facts]) + "\n").encode())


async def gate(name: str) -> None:
    """Wait until the test opens the gate of this name."""
    tell("gate", name)
    await _gates[name].wait()


async def speak(run: pgchan.Run, words: list[str]) -> int:
    """Executed, publishes, and waits at the gate "speak" in the middle of it."""
    tell("executed", run.id, "speak")
    for word in words[:-1]:
        await run.publish(word, wait=False)
    await gate("speak")
    await run.publish(words[-1])
    return len(words)


async def count(run: pgchan.Run, step: str) -> str:
    tell("executed", run.id, step)
    return step


@pgchan.workflow
async def talk(run: pgchan.Run) -> int:
    """A quick step, a long one that speaks, a quick one."""
    await run.step(count, run, "before", name="before")
    said = await run.step(speak, run, ["a", "b", "c"])
    await run.step(count, run, "after", name="after")
    return said


async def answer(run: pgchan.Run) -> str:
    tell("executed", run.id, "answer")
    await run.publish("thinking", wait=False)
    question = await run.receive()
    assert question is not None
    await run.publish(f"answer to {question.body}")
    return str(question.body)


@pgchan.workflow
async def everything(run: pgchan.Run) -> list[str]:
    """Output, a signal in the workflow and one in a step: what must be right whatever happens in between."""
    await run.publish("begin")
    first = await run.receive()
    assert first is not None
    await run.step(count, run, "middle", name="middle")
    second = await run.step(answer, run)
    await run.publish("end", wait=False)
    return [str(first.body), second]


@pgchan.workflow
async def reserve(run: pgchan.Run) -> None:
    """Rows of the user's own, in a transaction that waits at the gate "reserve"."""
    async with run.transaction("reserve") as connection:
        await connection.execute("insert into rows_of_users values ($1)", run.id)
        await run.publish("reserved")
        await gate("reserve")


@pgchan.workflow
async def stream(run: pgchan.Run, text: str) -> str:
    """A step that says half of a text, waits until that is durable, holds more of it and waits at the gate "stream"."""

    async def say() -> str:
        half = len(text) // 2
        for character in text[:half]:
            await run.publish(character, wait=False, join=0.001)
        await run._attempt.flushed()
        for character in text[half:]:
            await run.publish(character, wait=False, join=1.0)
        await gate("stream")
        return text

    return await run.step(say)


@pgchan.workflow
async def receive(run: pgchan.Run) -> str:
    """Takes a signal and waits at the gate "receive" before it is recorded."""

    async def take() -> str:
        taken = await run.receive()
        assert taken is not None
        await gate("receive")
        return str(taken.body)

    return await run.step(take)


@pgchan.workflow
async def ping(run: pgchan.Run) -> int:
    """Tells when each signal arrives, until "stop"."""

    async def listen() -> int:
        seen = 0
        tell("listening", run.id)
        async for message in run.signals():
            tell("signal", message.body)
            if message.body == "stop":
                break
            seen += 1
        return seen

    return await run.step(listen)


@pgchan.workflow
async def endless(run: pgchan.Run) -> None:
    """A step that notices when it is cancelled."""

    async def hang() -> None:
        tell("hanging", run.id)
        try:
            await asyncio.Event().wait()
        finally:
            tell("cancelled", run.id)

    await run.step(hang)


@pgchan.workflow
async def blocks(run: pgchan.Run, seconds: float) -> str:
    """A step that blocks the event loop, which it should not."""

    async def block() -> str:
        tell("blocking", run.id)
        time.sleep(seconds)
        return "done"

    return await run.step(block)


@pgchan.workflow
def stubborn(run: Any) -> None:
    """A step in a thread, which cannot be cancelled."""

    def hang() -> None:
        tell("hanging", run.id)
        time.sleep(60)

    run.step(hang)


@pgchan.workflow
async def nap(run: pgchan.Run, seconds: float) -> None:
    """Sleeps, out of memory if it takes long."""

    async def begin() -> None:
        tell("napping", run.id)

    await run.step(begin)
    await run.sleep(seconds)
    tell("napped", run.id)


@pgchan.workflow
async def hogs(run: pgchan.Run, seconds: float) -> str:
    """A step whose first try keeps all other threads from running, as C code does that does not let go of the GIL."""

    async def hog() -> str:
        is_first = run.attempt == 1
        tell("hogging", run.id, is_first)
        if is_first:
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "done"

    return await run.step(hog)


@pgchan.workflow
async def greedy(run: pgchan.Run, size: int) -> int:
    """A step that wants so many bytes of memory."""

    async def take() -> int:
        return len(bytearray(size))

    return await run.step(take)


WORKFLOWS: list[Any] = [
    talk, everything, reserve, stream, receive, ping, endless, blocks, stubborn, nap, hogs, greedy,
]  # fmt: skip


def obey(loop: asyncio.AbstractEventLoop | None = None) -> None:
    """Take orders, in a thread of its own."""
    threading.Thread(target=_obey, args=[loop], daemon=True).start()


def _obey(loop: asyncio.AbstractEventLoop | None) -> None:
    wall = time.time
    for line in sys.stdin:
        word, _, name = line.strip().partition(" ")
        if word == "open" and loop is not None:
            loop.call_soon_threadsafe(_gates[name].set)
        elif word == "at":
            stop_at(name)
        elif word == "clock":
            time.time = lambda by=float(name): wall() + by  # type: ignore[misc]
            tell("clock", name)
        else:
            _orders.put(word)
    os._exit(1)  # the test has died and can end nobody


def stop_at(place: str) -> None:
    """Stop once at this point, "NAME" or "NAME#2", until the order to go."""
    assert place.partition("#")[0] in points.NAMES
    name, _, number = place.partition("#")
    left = int(number or 1)

    def reached(point: str) -> None:
        nonlocal left
        if point == name and points.reached is reached:
            left -= 1
            if left == 0:
                points.reached = None
                tell("point", name)
                _orders.get()

    points.reached = reached
    tell("at", place)


async def work(client: pgchan.AsyncClient, worker: pgchan.Worker, at: str | None) -> None:
    """Execute runs until SIGTERM."""
    async with client:
        obey(asyncio.get_running_loop())
        if at is not None:
            stop_at(at)
        working = asyncio.create_task(worker.run())
        started = asyncio.create_task(worker.wait_started())
        await asyncio.wait({working, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            tell("started", worker.id)
        await working
        started.cancel()


async def _work(dsn: str, name: str, at: str | None, options: dict[str, Any]) -> None:
    client = pgchan.AsyncClient(dsn, name=name)
    await work(client, pgchan.Worker(client, WORKFLOWS, name=name, **options), at)


# ------------------------------------------------------------------------------------------------ the test's side


class Process:
    """A worker process, or another program that speaks as this one does. Everything that it told is in `events`, as
    (time, event, facts…)."""

    def __init__(
        self, dsn: str, name: str, *, at: str | None = None, program: str = __file__,
        environment: Mapping[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.dsn = dsn
        self.name = name
        self.events: list[list[Any]] = []
        arguments = [dsn, name, at or "", json.dumps(options)]
        self.process = subprocess.Popen(
            [sys.executable, program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | dict(environment or {}),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def told(self, event: str, *facts: Any) -> list[list[Any]]:
        """What it told so far of this event and these facts."""
        return [entry for entry in list(self.events) if entry[1] == event and entry[2 : 2 + len(facts)] == [*facts]]

    async def tells(self, event: str, *facts: Any, seconds: float = 15.0, times: int = 1) -> float:
        """Wait until it tells of it for so many times; the time of the last."""
        deadline = time.monotonic() + seconds
        while len(found := self.told(event, *facts)) < times:
            assert time.monotonic() < deadline, f"{self.name} told no {event} {facts} within {seconds} s: {self.events}"
            assert self.process.poll() is None or self._reader.is_alive(), f"{self.name} has ended: {self.events}"
            await asyncio.sleep(0.002)
        at: float = found[times - 1][0]
        return at

    def order(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def open(self, gate: str) -> None:
        self.order(f"open {gate}")

    async def stop_at(self, place: str) -> None:
        """Let it stop at a point from now on; returns when it has understood."""
        before = len(self.told("at", place))
        self.order(f"at {place}")
        await self.tells("at", place, times=before + 1)

    def send(self, number: signal.Signals) -> float:
        """Send it a signal; the time."""
        now = time.monotonic()
        self.process.send_signal(number)
        return now

    def kill(self) -> float:
        now = self.send(signal.SIGKILL)
        self.process.wait()
        return now

    async def exits(self, seconds: float = 15.0) -> int:
        """Wait for its end; the exit code."""
        return await asyncio.to_thread(self.process.wait, seconds)

    def cut(self, *roles: str) -> int:
        """End its connections (writer, pool, listen, lock, watch; default all) from the server's side; how many.

        Waits a moment for the first of them: the threads of lock and watch connect on their own, so a worker may
        execute a run before it watches another. Behind a pooler their names cannot be relied on.
        """
        worker = self.told("started")[0][2] if self.told("started") else 0
        names = [f"{self.name} {role}" for role in roles or ("writer", "pool", "listen")]
        names += [f"pgchan {role} {worker}" for role in roles or ("lock", "watch") if role in ("lock", "watch")]
        until = time.monotonic() + (10.0 if direct(self.dsn) == self.dsn else 0.0)
        with psycopg.connect(direct(self.dsn), autocommit=True) as connection:
            while True:
                found = connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where datname = current_database() and application_name = any (%s)", [names],
                ).fetchall()  # fmt: skip
                if found or time.monotonic() > until:
                    return len(found)
                time.sleep(0.02)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Processes:
    """Starts worker processes on one database and ends what is left of them."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._started: list[Process] = []

    def begin(self, name: str, *, at: str | None = None, lease: float = 3.0, **options: Any) -> Process:
        """Start one without waiting for it. at: the named point at which it stops."""
        options = {"lease": lease, "takeover_grace": 0.3} | options
        self._started.append(Process(self.dsn, name, at=at, **options))
        return self._started[-1]

    async def start(self, name: str, **options: Any) -> Process:
        """Start one and wait until it claims runs."""
        process = self.begin(name, **options)
        await process.tells("started", seconds=30)
        return process

    def close(self) -> None:
        for process in self._started:
            process.close()


class Workers:
    """Workers of this process, each on a client of its own; all are stopped at the end."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._all: list[tuple[pgchan.AsyncClient, pgchan.Worker, asyncio.Task[None]]] = []

    async def start(
        self, *workflows: Any, client: pgchan.AsyncClient | None = None, lease: float = 3.0, **options: Any
    ) -> pgchan.Worker:  # fmt: skip
        client = client or pgchan.AsyncClient(self.dsn, name=options.get("name", "here"))
        options = {"lease": lease, "takeover_grace": 0.3, "drain": 1.0} | options
        worker = pgchan.Worker(client, workflows or WORKFLOWS, **options)
        task = asyncio.create_task(worker.run(signals=False))
        started = asyncio.create_task(worker.wait_started())
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            started.cancel()
            await client.close()
            task.result()
        self._all.append((client, worker, task))
        return worker

    async def stop(self, worker: pgchan.Worker) -> None:
        """Stop one and wait for its end."""
        found = next(entry for entry in self._all if entry[1] is worker)
        self._all.remove(found)
        await self._end(*found)

    async def close(self) -> None:
        await asyncio.gather(*(self._end(*entry) for entry in self._all))

    async def _end(self, client: pgchan.AsyncClient, worker: pgchan.Worker, task: asyncio.Task[None]) -> None:
        worker.stop()
        await task
        await client.close()


if __name__ == "__main__":
    level = os.environ.get("PGCHAN_TEST_LOG", "WARNING")
    logging.basicConfig(level=level, format="%(asctime)s %(process)d %(message)s")
    asyncio.run(_work(sys.argv[1], sys.argv[2], sys.argv[3] or None, json.loads(sys.argv[4])))
