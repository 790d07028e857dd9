"""Processes that run the code of any release: workers, publishers, readers. For tests of upgrades.

Run as a program this file is such a process; it uses only what every release has. `Traffic` is the other end. A process
tells what it does in lines of JSON on its output and ends in good order at "stop" on its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

import pgchan
from pgchan.db import SCHEMA_VERSION

T = TypeVar("T")

PACE_SECONDS = 0.005  # between two publishes
CHANNELS = 4  # of each publisher

# ------------------------------------------------------------------------------------------------ the process's side

_stopping = asyncio.Event()


def tell(event: str, *facts: Any) -> None:
    """One line, written at once: what was told before a SIGKILL arrives."""
    os.write(1, (json.dumps([time.monotonic(), event, *facts]) + "\n").encode())


async def square(n: int) -> int:
    run = pgchan.current_run()
    await run.publish(f"square of {n}", wait=False)
    return n * n


@pgchan.workflow
async def squares(run: pgchan.Run, count: int) -> int:
    """Steps, output, and a row of the user's own."""
    total = 0
    for n in range(count):
        total += await run.step(square, n)
    async with run.transaction("mark") as connection:
        await connection.execute("insert into marks values ($1)", run.id)
    return total


@pgchan.workflow
async def relay(run: pgchan.Run) -> list[str]:
    """Which code executed the first half, and which the second: the first attempt hangs in between."""

    async def who() -> str:
        return SCHEMA_VERSION

    async def hang() -> str:
        if run.attempt == 1:
            tell("hanging", run.id)
            await asyncio.Event().wait()
        return SCHEMA_VERSION

    return [await run.step(who), await run.step(hang)]


async def work(dsn: str, name: str) -> None:
    async with pgchan.AsyncClient(dsn, name=name) as client:
        worker = pgchan.Worker(client, [squares, relay], name=name, lease=3.0, takeover_grace=0.3, concurrency=20)
        working = asyncio.create_task(worker.run(signals=False))
        await worker.wait_started()
        tell("started")
        await _stopping.wait()
        worker.stop()
        await working


async def publish(dsn: str, name: str) -> None:
    """Publish to a few channels, one message after the other, and start a run now and then."""
    async with pgchan.AsyncClient(dsn, name=name) as client:
        await _publish(name, lambda channel, n, key: client.channel(channel).publish(n, key=key),
                       lambda id: client.start("squares", 3, id=id))  # fmt: skip


async def publish_blocking(dsn: str, name: str) -> None:
    """The same through the blocking door."""
    client = pgchan.Client(dsn, name=name)
    await _publish(name,
        lambda channel, n, key: asyncio.to_thread(lambda: client.channel(channel).publish(n, key=key)),
        lambda id: asyncio.to_thread(client.start, "squares", 3, id=id))  # fmt: skip
    await asyncio.to_thread(client.close)


async def publish_in_transactions(dsn: str, name: str) -> None:
    """The same in transactions of the user's own, each of which also starts a run."""
    connection = await asyncpg.connect(dsn)
    async with pgchan.AsyncClient(dsn, name=name) as client:

        async def both(channel: str, n: int, key: str) -> pgchan.Message:
            async with connection.transaction():
                message = await client.channel(channel).publish(n, key=key, connection=connection)
                await client.start("squares", 3, id=f"{name}-run-{n}", connection=connection)
                return message

        await _publish(name, both, None)
    await connection.close()


async def _publish(
    name: str, one: Callable[[str, int, str], Awaitable[pgchan.Message]], start: Callable[[str], Awaitable[Any]] | None
) -> None:
    n = 0
    while not _stopping.is_set():
        began = time.monotonic()
        message = await one(f"{name}/{n % CHANNELS}", n, f"key-{n}")
        tell("published", message.channel, message.position, message.body, time.monotonic() - began)
        if start is not None and n % 5 == 0:
            began = time.monotonic()
            await start(f"{name}-run-{n}")
            tell("called", time.monotonic() - began)
        if n == 0:
            tell("started")
        n += 1
        await asyncio.sleep(PACE_SECONDS)


async def read(dsn: str, name: str, *channels: str) -> None:
    """Tail channels from their beginning; each message must follow the one before."""
    async with pgchan.AsyncClient(dsn, name=name) as client:

        async def follow(channel: str) -> None:
            expected = 1
            async for message in client.channel(channel).tail():
                assert message.position == expected, f"{channel}: {message.position} after {expected - 1}"
                expected += 1
                tell("read", channel, message.position, message.body)

        following = [asyncio.create_task(follow(channel)) for channel in channels]
        tell("started")
        stopped = asyncio.create_task(_stopping.wait())
        done, _ = await asyncio.wait([stopped, *following], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


ROLES = {role.__name__: role for role in (work, publish, publish_blocking, publish_in_transactions, read)}


async def _main(role: str, *arguments: str) -> None:
    tell("code", pgchan.__file__, SCHEMA_VERSION)

    def obey(loop: asyncio.AbstractEventLoop) -> None:
        sys.stdin.readline()
        loop.call_soon_threadsafe(_stopping.set)

    threading.Thread(target=obey, args=[asyncio.get_running_loop()], daemon=True).start()
    await ROLES[role](*arguments)


# ------------------------------------------------------------------------------------------------ the test's side


class Traffic:
    """One process. Everything that it told is in `events`, as [time, event, facts…]; `errors` is its stderr."""

    def __init__(self, code: Path | None, role: Callable[..., Any], dsn: str, name: str, *arguments: str) -> None:
        """code: where a release was unpacked; None: the code of this checkout."""
        self.name = name
        self.code = code
        self.events: list[list[Any]] = []
        self.errors = ""
        environment = os.environ | ({"PYTHONPATH": str(code)} if code is not None else {})
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, role.__name__, dsn, name, *arguments],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._threads = [threading.Thread(target=self._listen), threading.Thread(target=self._complain)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _complain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def told(self, event: str) -> list[list[Any]]:
        """The facts of each such event so far."""
        return [entry[2:] for entry in list(self.events) if entry[1] == event]

    async def tells(self, event: str, *, times: int = 1, seconds: float = 30.0) -> list[Any]:
        """Wait until it has told of it for so many times; the facts of the last of them."""
        deadline = time.monotonic() + seconds
        while len(found := self.told(event)) < times:
            assert time.monotonic() < deadline, f"{self.name}: {len(found)} of {times} {event}: {self.errors}"
            assert self.process.poll() is None, f"{self.name} has ended: {self.errors}"
            await asyncio.sleep(0.005)
        return found[times - 1]

    async def started(self) -> Traffic:
        """Wait until it is at work, with the code that it should have."""
        file, _ = await self.tells("code")
        assert Path(file).is_relative_to(self.code or Path(__file__).parent.parent), file
        await self.tells("started")
        return self

    def longest(self) -> float:
        """The longest that one of its calls took, in seconds."""
        return max(facts[-1] for facts in [*self.told("published"), *self.told("called")])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def stop(self) -> None:
        """End it in good order; it must not have complained."""
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        status = await asyncio.to_thread(self.process.wait, 30)
        assert status == 0, f"{self.name}: {self.errors}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
