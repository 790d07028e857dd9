"""Calls of one statement that come while another is on its way make up the next, as one: group commit, group reading.

How it works. The first call goes out alone, by the statement that was meant. What comes until its answer waits, and
then goes together: one round trip, one transaction, one commit, by the statement for many. No timers, as in writer.py:
who is alone waits for nobody, and under load the groups grow by themselves.

A call that somebody's open transaction keeps waiting must not hold up the others. After SLOW_SECONDS the next group
goes out beside it; a group of which one met such a lock comes back as a whole, and each of its calls goes alone. So
does each of a group that the server refuses, for what is wrong with one must not take the others along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from pgchan import errors
from pgchan.names import PAGE_BYTES_MAX
from pgchan.writer import LOCK_WAIT_MS

TOGETHER_MAX = 100  # calls; as many as a worker claims at once
SLOW_SECONDS = LOCK_WAIT_MS / 1000

Arguments = tuple[Any, ...]
T = TypeVar("T")


class Group(Generic[T]):
    """Calls of one statement. alone: make one call. together: make several, and return the answer of each, or None for
    those that were not made because of a lock. most: calls that go together. Two with the same first argument do not,
    unless they are the same and alike is true, or mixed is."""

    def __init__(
        self, alone: Callable[..., Awaitable[T]], together: Callable[[list[Arguments]], Awaitable[list[T | None]]],
        *, most: int = TOGETHER_MAX, alike: bool = False, mixed: bool = False,
    ) -> None:  # fmt: skip
        self._alone = alone
        self._together = together
        self._most = most
        self._alike = alike
        self._mixed = mixed
        self._waiting: list[tuple[Arguments, asyncio.Future[T]]] = []
        self._slow: asyncio.TimerHandle | None = None  # set while a call is on its way that others wait for
        self._sending: set[asyncio.Task[None]] = set()

    async def call(self, *args: Any) -> T:
        """Make this call. Raises what the call raises; if the caller is cancelled it may be made all the same."""
        if self._slow is not None:
            future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._waiting.append((args, future))
            return await future
        mine = self._slow = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._next)
        try:
            return await self._alone(*args)
        finally:
            self._answered(mine)

    async def close(self) -> None:
        """Until nothing is on its way."""
        while self._sending:
            await asyncio.wait(self._sending)

    def _answered(self, mine: asyncio.TimerHandle) -> None:
        if self._slow is mine:  # else it was slow, and the next is under way already
            mine.cancel()
            self._next()

    def _next(self) -> None:
        self._slow = None
        if not self._waiting:
            return
        group = self._take()
        self._slow = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._next)
        self._spawn(self._send(group, self._slow))

    def _take(self) -> list[tuple[Arguments, asyncio.Future[T]]]:
        """The calls that go next, in the order in which they came."""
        firsts: dict[Any, Arguments] = {}
        size = count = 0
        for args, _ in self._waiting[: self._most]:
            size += sum(len(value) for value in args if isinstance(value, bytes))
            if count and size > PAGE_BYTES_MAX:
                break
            if args[0] in firsts and not (self._mixed or (self._alike and firsts[args[0]] == args)):
                break
            firsts[args[0]] = args
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _send(self, group: list[tuple[Arguments, asyncio.Future[T]]], mine: asyncio.TimerHandle) -> None:
        try:
            if len(group) == 1:
                await self._send_alone(*group[0])
                return
            try:
                answers = await self._together([args for args, _ in group])
            except (errors.Unavailable, errors.Indefinite) as error:
                for _, future in group:
                    _fail(future, error)
                return
            except errors.Error:
                answers = [None] * len(group)
            for answer, (args, future) in zip(answers, group, strict=True):
                if answer is None:
                    self._spawn(self._send_alone(args, future))
                elif not future.done():
                    future.set_result(answer)
        except BaseException as error:  # a bug of ours, or the end of the loop, must not leave callers waiting
            for _, future in group:
                _fail(future, errors.Indefinite(f"the call was given up: {error!r:.200}"))
            raise
        finally:
            self._answered(mine)

    async def _send_alone(self, args: Arguments, future: asyncio.Future[T]) -> None:
        try:
            answer = await self._alone(*args)
        except errors.Error as error:
            _fail(future, error)
        else:
            if not future.done():
                future.set_result(answer)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine, name="pgchan group")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


def _fail(future: asyncio.Future[Any], error: errors.Error) -> None:
    if not future.done():
        future.set_exception(error)
