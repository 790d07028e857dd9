"""Those who use pgchan in a soak, each a process of its own: `python actors.py ROLE NAME JSON`.

  publisher   publishes through one of the doors: keyed and unkeyed, one and many, old keys again, in transactions of
              its own, some of which it rolls back
  reader      follows the channels and what the runs say; resumes from the cursors in its own log, also after a SIGKILL;
              and asks for cursors that are old, made up, or past the end
  stream      the same over the endpoint, as server-sent events
  endpoint    serves them, on a port of its own
  caller      starts runs, signals and cancels them, waits for their results
  worker      executes them; see agents.py

SIGTERM ends each in good order: what it has begun is brought to its end and logged. Every operation is in the log with
how it ended: `ok`, `fail` (pgchan said that it was not done) or `info` (that it does not know).

Long, for these are six small programs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import sys
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psycopg

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from doors import Door
from faults import agents
from faults.history import Log, Operation
from serving import follow as open_stream

import pgchan
from pgchan import errors, names
from pgchan.model import Message, microseconds

DRIVER_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, psycopg.Error)
PAUSE_SECONDS = 0.2  # before the next try, when the database is away
KEPT_MAX = 200  # old keys, old cursors

log: Log
stopping: asyncio.Event


def position_of(after: int | str) -> int:
    return after if isinstance(after, int) else int(after[:16])


async def pause(longest: float) -> None:
    """A random time, shorter when this process is told to stop."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), random.uniform(0, longest))


# ------------------------------------------------------------------------------------------------ publisher


class Publisher:
    """One publisher: it waits for each acknowledgement before it goes on."""

    def __init__(self, dsn: str, door: Door, client: Any, options: dict[str, Any]) -> None:
        self.dsn = dsn
        self.door = door
        self.client = client
        self.channels: list[str] = options["channels"]
        self.pace: float = options.get("pace", 0.03)
        self.old: list[tuple[str, str, str]] = []

    async def run(self) -> None:
        while not stopping.is_set():
            channel = random.choice(self.channels)
            does = random.choices(
                [self.one, self.keyed, self.again, self.many, self.in_transaction, self.trim], [50, 25, 5, 8, 10, 2]
            )[0]
            await does(channel)
            await pause(self.pace)

    async def _publish(self, channel: str, values: list[str], call: Callable[[], Awaitable[Any]], **facts: Any) -> str:
        """Log, call, log how it ended: ok, fail or info."""
        for value in values:
            log.write("publish", type="invoke", channel=channel, value=value, **facts)
        try:
            found = await call()
        except errors.Indefinite:
            ended = "info"
        except errors.Unavailable:
            ended = "fail"
        except errors.Error as error:
            ended = "fail"
            log.write("surprise", what=f"publish raised {error!r}")
        else:
            stored = found if isinstance(found, list) else [found]
            for value, message in zip(values, stored, strict=True):
                self._acknowledged(channel, value, message, **facts)
            return "ok"
        for value in values:
            log.write("publish", type=ended, channel=channel, value=value, **facts)
        return ended

    def _acknowledged(self, channel: str, value: str, message: Message, **facts: Any) -> None:
        at = microseconds(message.at)
        log.write("publish", type="ok", channel=channel, value=value, position=message.position, at=at, **facts)

    async def one(self, channel: str) -> None:
        value = _value()
        await self._publish(channel, [value], lambda: self.client.channel(channel).publish(value))

    async def keyed(self, channel: str) -> None:
        """As often as it takes, for its key makes that safe."""
        value, key = _value(), _value()
        call = lambda: self.client.channel(channel).publish(value, key=key)  # noqa: E731
        while await self._publish(channel, [value], call, key=key) != "ok" and not stopping.is_set():
            await pause(PAUSE_SECONDS)
        self.old = [*self.old[-KEPT_MAX:], (channel, value, key)]

    async def again(self, _: str) -> None:
        if self.old:
            channel, value, key = random.choice(self.old)
            call = lambda: self.client.channel(channel).publish(value, key=key)  # noqa: E731
            await self._publish(channel, [value], call, key=key, repeat=True)

    async def many(self, channel: str) -> None:
        values = [_value() for _ in range(random.randint(2, 8))]
        keys = [_value() for _ in values] if random.random() < 0.5 else None
        await self._publish(channel, values, lambda: self.client.channel(channel).publish_many(values, keys=keys))

    async def trim(self, _: str) -> None:
        """The first channel is trimmed; that it is moves `trimmed`, which readers may be told."""
        channel = self.client.channel(self.channels[0])
        with suppress(errors.Unavailable, errors.Indefinite, errors.ChannelNotFound):
            info = await channel.info()
            await channel.trim(max(info.trimmed, info.head - KEPT_MAX))

    async def in_transaction(self, channel: str) -> None:
        """A few messages in a transaction of the caller's own, which may be rolled back."""
        values = [_value() for _ in range(random.randint(1, 3))]
        stored: list[Message] = []
        for value in values:
            log.write("publish", type="invoke", channel=channel, value=value)
        ended = "fail"
        try:
            async with _transaction(self.door.kind, self.dsn) as transaction:
                for value in values:
                    to = self.client.channel(channel)
                    stored.append(await to.publish(value, connection=transaction.connection))
                if random.random() < 0.7:
                    ended = "info"  # from here on nobody knows, until the answer is here
                    await transaction.commit()
                    ended = "ok"
        except DRIVER_ERRORS as error:
            if getattr(error, "sqlstate", None) in ("40001", "40P01"):
                ended = "fail"
        except (errors.Unavailable, errors.Indefinite):
            pass
        for value, message in zip(values, stored + [None] * len(values), strict=False):
            if ended == "ok":
                assert message is not None
                self._acknowledged(channel, value, message)
            else:
                log.write("publish", type=ended, channel=channel, value=value)


class _Transaction:
    def __init__(self, connection: Any, commit: Callable[[], Awaitable[None]]) -> None:
        self.connection = connection
        self.commit = commit


@asynccontextmanager
async def _transaction(kind: str, dsn: str) -> AsyncIterator[_Transaction]:
    """A connection of the caller's own with an open transaction, which is rolled back unless it commits."""
    if kind == "async":
        opened = await asyncpg.connect(dsn, timeout=5)
        try:
            transaction = opened.transaction()
            await transaction.start()
            yield _Transaction(opened, transaction.commit)
        finally:
            opened.terminate()
    else:
        connection: Any = await asyncio.to_thread(lambda: psycopg.connect(dsn, connect_timeout=5))
        try:
            yield _Transaction(connection, lambda: asyncio.to_thread(connection.commit))
        finally:
            connection.close()


def _value() -> str:
    return uuid.uuid4().hex[:16]


async def publish(dsn: str, name: str, options: dict[str, Any]) -> None:
    door = Door(options.get("door", "async"), dsn)
    client = door.client(name=name, timeout=options.get("patience", 5.0))
    try:
        await Publisher(dsn, door, client, options).run()
    finally:
        await door.close()


# ------------------------------------------------------------------------------------------------ readers


class Kept:
    """What a reader knows from its own log: where it stands, and which reading was its last."""

    def __init__(self, path: Path) -> None:
        self.cursors: dict[tuple[str, str], int | str] = {}
        self.left: set[tuple[str, str]] = set()
        self.reading = 0
        for o in own_log(path):
            if o["op"] == "read":
                self.cursors[o["reader"], o["channel"]] = names.format_cursor(o["position"], o["at"])
            elif o["op"] == "reset":
                self.cursors[o["reader"], o["channel"]] = names.format_cursor(o["first"] - 1, 0)
            elif o["op"] == "left":
                self.left.add((o["reader"], o["channel"]))
            elif o["op"] == "reading":
                self.reading = max(self.reading, o["reading"])


def own_log(path: Path) -> Iterator[Operation]:
    """The lines of a log; not a last one that was cut short."""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)


class Reader:
    """Follows channels by name. Each (re)connect is a new reading, from the cursor that is kept."""

    def __init__(self, name: str, kept: Kept) -> None:
        self.name = name
        self.kept = kept
        self.seen: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)  # position and time, to resume from

    def begin(self, channel: str, after: int | str, **facts: Any) -> dict[str, Any]:
        """Log a new reading; what each of its operations names."""
        self.kept.reading += 1
        reading = {"reader": facts.pop("reader", self.name), "reading": self.kept.reading, "channel": channel}
        log.write("reading", after=position_of(after), **reading, **facts)
        return reading

    def got(self, reading: dict[str, Any], position: int, at: int, kind: str, value: Any, view: str) -> None:
        more = {} if view == "raw" else {"view": view}
        log.write("read", position=position, at=at, kind=kind, value=value, **reading, **more)
        self.kept.cursors[reading["reader"], reading["channel"]] = names.format_cursor(position, at)
        seen = self.seen[reading["channel"]]
        seen.append((position, at))
        if len(seen) > KEPT_MAX:
            del seen[:: 2]

    def reset(self, reading: dict[str, Any], reason: str, first: int, last: int, cursor: str) -> None:
        log.write("reset", reason=reason, first=first, last=last, **reading)
        self.kept.cursors[reading["reader"], reading["channel"]] = cursor

    def leave(self, channel: str, reader: str | None = None) -> None:
        log.write("left", reader=reader or self.name, channel=channel)


class Tailer(Reader):
    """A reader through the library."""

    def __init__(self, name: str, kept: Kept, client: Any) -> None:
        super().__init__(name, kept)
        self.client = client

    async def follow(self, channel: str, view: str) -> None:
        """Until the channel is closed and all was read; now and then from the kept cursor anew."""
        if (self.name, channel) in self.kept.left:
            return
        while not stopping.is_set():
            after = self.kept.cursors.get((self.name, channel), 0)
            reading = self.begin(channel, after, view=view)
            tail = self.client.channel(channel).tail(after=after, view=view)
            try:
                while (page := await tail.next_page(5.0)) is not None:
                    for message in page:
                        at = microseconds(message.at)
                        self.got(reading, message.position, at, message.kind, message.body, view)
                    if stopping.is_set() or random.random() < 0.02:
                        break
                else:
                    self.leave(channel)
                    return
            except pgchan.Reset as reset:
                self.reset(reading, reset.code, reset.first, reset.last, reset.cursor)
            except (errors.Unavailable, errors.Indefinite):
                await pause(PAUSE_SECONDS)
            finally:
                tail.unfollow()

    async def follow_runs(self, prefix: str) -> None:
        """One run after the other, each from its beginning to its end."""
        number = 0
        while not stopping.is_set():
            await self.follow(f"{prefix}/{number}", random.choice(["raw", "final"]))
            number += 1

    async def probe(self, channels: list[str]) -> None:
        """Begin at places where it is easy to be wrong: 0, 1, in the middle, the head, past it, at what never was."""
        while not stopping.is_set():
            await pause(1.0)
            channel = random.choice(channels)
            with suppress(errors.Unavailable, errors.Indefinite, errors.ChannelNotFound):
                info = await self.client.channel(channel).info()
                for after, expect in self._places(channel, channels[0], info):
                    await self._look(channel, after, expect)

    def _places(self, channel: str, trimmed: str, info: pgchan.ChannelInfo) -> list[tuple[int | str, str | None]]:
        places: list[tuple[int | str, str | None]] = [(0, None), (min(1, info.head), None), (info.head, None)]
        places.append((info.head + 1_000_000, "history_lost"))
        if self.seen[channel]:
            position, at = random.choice(self.seen[channel])
            places.append((names.format_cursor(position, at), None))
            if channel != trimmed:  # there it may be trimmed before it is asked for
                places.append((names.format_cursor(position, at + 1), "history_lost"))
        return random.sample(places, 2)

    async def _look(self, channel: str, after: int | str, expect: str | None) -> None:
        reader = f"{self.name}/probe"
        reading = self.begin(channel, after, reader=reader, **({"expect": expect} if expect else {}))
        try:
            for message in await self.client.channel(channel).read(after=after, limit=20, view="raw"):
                at = microseconds(message.at)
                log.write("read", position=message.position, at=at, kind=message.kind, value=message.body, **reading)
        except pgchan.Reset as reset:
            log.write("reset", reason=reset.code, first=reset.first, last=reset.last, **reading)
        finally:
            self.leave(channel, reader)


async def read(dsn: str, name: str, options: dict[str, Any]) -> None:
    kept = Kept(Path(options["directory"]) / f"{name}.jsonl")
    async with _client(dsn, name, options) as client:
        tailer = Tailer(name, kept, client)
        tasks = [asyncio.create_task(tailer.follow(channel, "raw")) for channel in options["channels"]]
        tasks += [asyncio.create_task(tailer.follow_runs(prefix)) for prefix in options.get("runs", [])]
        tasks.append(asyncio.create_task(tailer.probe(options["channels"])))
        await _until_stopped(tasks)


class Streamer(Reader):
    """A reader over the endpoint. It keeps the last id, as a browser does."""

    async def follow(self, port: int, channel: str) -> None:
        while not stopping.is_set():
            after = self.kept.cursors.get((self.name, channel), 0)
            headers = {"Last_Event_ID": str(after)} if after else {}
            path = f"/channels/{channel}?after=0&view=raw"
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with open_stream(port, path, **headers) as stream:
                    if stream.status != 200:
                        if stream.status not in (204, 429, 503):
                            log.write("surprise", what=f"the endpoint answered {stream.status}")
                        await pause(PAUSE_SECONDS)
                        continue
                    reading = self.begin(channel, after, view="raw")
                    async for block in stream.blocks():
                        self._take(reading, block)
                        if stopping.is_set() or random.random() < 0.003:
                            break
            await pause(PAUSE_SECONDS)

    def _take(self, reading: dict[str, Any], block: dict[str, str]) -> None:
        kind = block.get("event")
        if kind in ("message", "signal", "control"):
            data = json.loads(block["data"])
            position, at = (int(part) for part in block["id"].split("_"))
            if data["cursor"] != block["id"]:
                log.write("surprise", what=f"id {block['id']} stands at a message with cursor {data['cursor']}")
            self.got(reading, position, at, kind, data["body"], "raw")
        elif kind == "reset":
            data = json.loads(block["data"])
            self.reset(reading, data["reason"], data["first"], data["last"], data["cursor"])
        elif kind is not None:
            log.write("surprise", what=f"the stream of {reading['channel']} has event {kind}: {block}")


async def stream(_: str, name: str, options: dict[str, Any]) -> None:
    streamer = Streamer(name, Kept(Path(options["directory"]) / f"{name}.jsonl"))
    channels: list[str] = options["channels"]
    await _until_stopped([asyncio.create_task(streamer.follow(options["port"], channel)) for channel in channels])


async def _until_stopped(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for SIGTERM, or for the first task that fails; then end them all."""
    told = asyncio.create_task(stopping.wait())
    pending = {told, *tasks}
    while told in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _client(dsn: str, name: str, options: dict[str, Any]) -> AsyncIterator[pgchan.AsyncClient]:
    client = pgchan.AsyncClient(dsn, name=name, timeout=options.get("patience", 5.0))
    try:
        yield client
    finally:
        await client.close()


# ------------------------------------------------------------------------------------------------ endpoint


async def endpoint(dsn: str, name: str, options: dict[str, Any]) -> None:
    from pgchan.server import Insecure, create_app  # noqa: PLC0415 - of this role alone
    from pgchan.server.serve import Server, config  # noqa: PLC0415

    async with _client(dsn, name, options) as client:
        server = Server(config(create_app(client, auth=Insecure()), port=options["port"]))
        serving = asyncio.create_task(server.serve())
        await asyncio.wait({serving, asyncio.create_task(stopping.wait())}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving


# ------------------------------------------------------------------------------------------------ caller


class Caller:
    """Sees runs through from their start to their result, several at a time."""

    def __init__(self, dsn: str, name: str, client: pgchan.AsyncClient, options: dict[str, Any]) -> None:
        self.dsn = dsn
        self.name = name
        self.client = client
        self.seed: int = options["seed"]
        self.begun: dict[str, int] = {}
        for o in own_log(Path(options["directory"]) / f"{name}.jsonl"):
            if o["op"] == "start":
                prefix, _, number = o["run"].rpartition("/")
                self.begun[prefix] = max(self.begun.get(prefix, 0), int(number))

    async def follow(self, prefix: str) -> None:
        """Run after run. The one that was under way as this process was killed is seen through first."""
        number = self.begun.get(prefix, 0)
        while not stopping.is_set():
            await self._one(f"{prefix}/{number}")
            number += 1

    async def _one(self, id: str) -> None:
        plan = agents.plan_of(id, self.seed)
        if not await self._start(id, plan):
            return
        handle = self.client.run(id)
        tasks = [asyncio.create_task(self._signal(handle, plan["signals"]))]
        if plan["cancel"]:
            tasks.append(asyncio.create_task(self._cancel(handle)))
        try:
            await self._result(handle)
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

    async def _start(self, id: str, plan: dict[str, Any]) -> bool:
        """As often as it takes: an id is a key."""
        if random.random() < 0.1:
            await self._roll_back(f"rolled/{_value()}/0", plan)
        log.write("start", type="invoke", run=id)
        while not stopping.is_set():
            try:
                await self.client.start("agent", plan, id=id)
            except (errors.Unavailable, errors.Indefinite) as error:
                log.write("start", type="info" if isinstance(error, errors.Indefinite) else "fail", run=id)
                await pause(PAUSE_SECONDS)
                log.write("start", type="invoke", run=id)
            else:
                log.write("start", type="ok", run=id)
                return True
        return False

    async def _roll_back(self, id: str, plan: dict[str, Any]) -> None:
        """Start a run in a transaction that is rolled back."""
        log.write("start", type="invoke", run=id)
        with suppress(*DRIVER_ERRORS):
            async with _transaction("async", self.dsn) as transaction:
                await self.client.start("agent", plan, id=id, connection=transaction.connection)
        log.write("start", type="fail", run=id)

    async def _signal(self, handle: pgchan.AsyncRunHandle, count: int) -> None:
        for _ in range(count):
            await pause(1.0)
            value, key = _value(), _value() if random.random() < 0.5 else None
            while True:
                log.write("signal", type="invoke", run=handle.id, value=value, key=key)
                try:
                    message = await handle.signal(value, key=key)
                except (errors.Unavailable, errors.ChannelClosed):
                    log.write("signal", type="fail", run=handle.id, value=value)
                    break
                except errors.Indefinite:
                    log.write("signal", type="info", run=handle.id, value=value)
                    if key is None:
                        break
                else:
                    log.write("signal", type="ok", run=handle.id, value=value, position=message.position)
                    break

    async def _cancel(self, handle: pgchan.AsyncRunHandle) -> None:
        await pause(3.0)
        log.write("cancelled", type="invoke", run=handle.id)
        try:
            done = await handle.cancel()
        except errors.Unavailable:
            done = False
        except errors.Indefinite:
            log.write("cancelled", type="info", run=handle.id)
            return
        log.write("cancelled", type="ok" if done else "fail", run=handle.id)

    async def _result(self, handle: pgchan.AsyncRunHandle) -> None:
        """Wait for the end; a run that failed is resumed twice, and may then be a failure."""
        resumed = 0
        while True:
            state, value = "succeeded", None
            try:
                value = await handle.result(timeout=5.0)
            except (TimeoutError, errors.Unavailable, errors.Indefinite):
                continue
            except errors.RunCancelled:
                state = "cancelled"
            except errors.RunFailed as failed:
                log.write("failed", run=handle.id, type=failed.type, message=failed.message)
                resumed += 1
                if resumed <= 2 and await self._resume(handle):
                    continue
                state = "failed"
            log.write("ended", run=handle.id, state=state, value=value)
            return

    async def _resume(self, handle: pgchan.AsyncRunHandle) -> bool:
        while True:
            try:
                await handle.resume()
            except errors.Unavailable:
                continue
            except (errors.Indefinite, errors.InvalidInput):
                pass  # then it was resumed before, and perhaps cancelled since
            return True


async def call(dsn: str, name: str, options: dict[str, Any]) -> None:
    async with _client(dsn, name, options) as client:
        caller = Caller(dsn, name, client, options)
        await asyncio.gather(*(caller.follow(prefix) for prefix in options["runs"]))


# ------------------------------------------------------------------------------------------------ the program

ROLES: dict[str, Callable[[str, str, dict[str, Any]], Awaitable[None]]] = {
    "publisher": publish, "reader": read, "stream": stream, "endpoint": endpoint, "caller": call,
}  # fmt: skip


async def _main(role: str, name: str, options: dict[str, Any]) -> None:
    global log, stopping
    log = Log(options["directory"], name)
    agents.tell(log)
    stopping = asyncio.Event()
    if role == "worker":  # it takes SIGTERM itself
        await agents.work(options["dsn"], name, options["worker"])
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        log.write("up")
        await ROLES[role](options["dsn"], name, options)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(process)d %(name)s %(message)s")
    logging.getLogger("pgchan").setLevel(logging.INFO)
    asyncio.run(_main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
