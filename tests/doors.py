"""Both doors behind one face: tests are written once, as coroutines, and run against AsyncClient and Client.

`Threaded` gives the blocking classes awaitable methods, each call in a thread of its own. It adds nothing else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

import pgchan
from pgchan import Message

THREADS = 100  # of one test; each blocking reader occupies one
_BLOCKING = (pgchan.Client, pgchan.Channel, pgchan.ChannelTail, pgchan.RunHandle)
_NO_IO = {"channel", "run", "tail", "unfollow"}
_END = object()


class Threaded:
    """A blocking client, channel, tail or run handle whose methods can be awaited."""

    def __init__(self, inner: Any, threads: ThreadPoolExecutor) -> None:
        self._inner = inner
        self._threads = threads

    def _wrap(self, value: Any) -> Any:
        return Threaded(value, self._threads) if isinstance(value, _BLOCKING) else value

    async def _call(self, method: Any, *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        return self._wrap(await loop.run_in_executor(self._threads, lambda: method(*args, **options)))

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._inner, name)
        if not callable(member):
            return self._wrap(member)
        if name in _NO_IO:
            return lambda *args, **options: self._wrap(member(*args, **options))
        return lambda *args, **options: self._call(member, *args, **options)

    def __aiter__(self) -> Threaded:
        return self

    async def __anext__(self) -> Message:
        found = await self._call(next, self._inner, _END)
        if found is _END:
            raise StopAsyncIteration
        message: Message = found
        return message

    async def pages(self) -> AsyncIterator[list[Message]]:
        while (page := await self._call(self._inner.next_page)) is not None:
            if page:
                yield page


class Door:
    """Makes clients of one kind ("async" or "blocking") on one database, and closes them."""

    def __init__(self, kind: str, dsn: str) -> None:
        self.kind = kind
        self.dsn = dsn
        self._threads = ThreadPoolExecutor(THREADS)
        self._clients: list[Any] = []

    def client(self, dsn: str | None = None, **options: Any) -> Any:
        client: Any
        if self.kind == "async":
            client = pgchan.AsyncClient(dsn or self.dsn, **options)
        else:
            client = Threaded(pgchan.Client(dsn or self.dsn, **options), self._threads)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        self._threads.shutdown()


class Reading:
    """What a tail gives, collected by a task from now on."""

    def __init__(self, tail: Any) -> None:
        self.messages: list[Message] = []
        self.tail = tail
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.tail:
            self.messages.append(message)

    @property
    def bodies(self) -> list[Any]:
        return [message.body for message in self.messages]

    @property
    def positions(self) -> list[int]:
        return [message.position for message in self.messages]

    async def has(self, count: int, seconds: float = 10.0) -> None:
        """Wait until so many messages have come."""
        async with asyncio.timeout(seconds):
            while len(self.messages) < count:
                if self.task.done():
                    self.task.result()
                    raise AssertionError(f"the tail ended after {len(self.messages)} of {count} messages")
                await asyncio.sleep(0.002)

    async def end(self, seconds: float = 10.0) -> None:
        """Wait until the tail ends; raises what it raised."""
        async with asyncio.timeout(seconds):
            await asyncio.shield(self.task)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def direct(dsn: str) -> str:
    """The same database past the pooler of this run, if it has one: for what looks at sessions, or ends them."""
    return os.environ.get("PGCHAN_CONTROL_DSN", dsn)


def query(dsn: str, statement: str, *args: object) -> list[tuple[Any, ...]]:
    """Run one statement with `%s` parameters in a transaction of its own; its rows. Goes past the pooler of this run:
    it looks at sessions, and those of a pooler may have been ended by the test."""
    if dsn == os.environ.get("PGCHAN_TEST_POOLED_DSN"):
        dsn = direct(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), args or None)
        return cursor.fetchall() if cursor.description else []


def pretend(dsn: str, found: str, serves: str) -> None:
    """Let a database say that it is at another revision, and which code it serves."""
    for routine, revision in (("version", found), ("serves", serves)):
        query(
            dsn,
            f"create or replace function pgchan.{routine}() returns text language sql immutable security definer "
            f"set search_path = pg_catalog, pg_temp as $$ select '{revision}' $$",
        )


def rows(dsn: str) -> list[tuple[Any, ...]]:
    """All that is stored: of large bodies only that they are there."""
    return query(
        dsn,
        "select (select json_agg(c order by c.id) from pgchan.channels c)::text,"
        " (select json_agg(json_build_array(channel_id, position, at, kind, key, step, attempt, body)"
        "  order by channel_id, position) from pgchan.messages where length(body) < 1000)::text,"
        " (select count(*) from pgchan.messages),"
        " (select json_agg(r order by r.channel_id) from pgchan.runs r)::text",
    )
