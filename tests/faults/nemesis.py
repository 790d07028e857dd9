"""A small world of actors on a server of its own, and the one who breaks things in it.

What is broken, and when, follows from a seed. `World` starts the server, the actors and a proxy for each actor that
is to be cut off; `Nemesis` has one coroutine per kind of fault, each of which heals what it broke; `calm`
lets the dust settle, asks what must be true then, and takes the final tables.

Long, for the faults stand side by side: FAULTS is the list.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
from cluster import PR_SET_PDEATHSIG, Cluster, free_port, on_database
from faults.history import ENDED, ROWS, Log, Tables
from proxy import Proxy
from psycopg import conninfo, sql

import pgchan
from pgchan import doctor, errors, migrate
from pgchan.model import microseconds

CHANNELS = [f"chat/{number}" for number in range(4)]
RUN_TASKS = 6  # runs that a caller has under way at a time

READY_SECONDS = 30.0
END_SECONDS = 30.0  # after the faults, for all runs to end
PROBE_SECONDS = 2.0  # for idle readers to be given one message
SETTLED_SECONDS = 20.0  # a process that is younger is no measure of memory
EXIT_SECONDS = 20.0  # for an actor to end after SIGTERM; a worker drains for 10 s at most
TAKEOVER_SLACK_SECONDS = 8.0  # beyond what the promise says, on a machine that does other things too
SILENT = """
create or replace function pgchan.wake(ids bigint[], heads bigint[], created boolean default false,
                                       queues text[] default null)
returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as 'begin return; end'
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a world is like. package: a directory to put before the installed pgchan, in the actors and for the schema.
    faults: the kinds that may happen; all if empty."""

    seed: int = 1
    lease: float = 10.0
    grace: float = 1.0
    workers: int = 3
    pace: float = 0.03
    package: Path | None = None
    faults: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ actors


class Actor:
    """One process of actors.py, started again under its name as often as it dies."""

    def __init__(self, world: World, role: str, name: str, dsn: str, **options: Any) -> None:
        self.world = world
        self.role = role
        self.name = name
        self.options = {"dsn": dsn, "directory": str(world.directory), **options}
        self.proxy: Proxy | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.frozen = False
        self._log = world.directory / f"{name}.jsonl"
        self._logged = 0  # bytes, before it was started

    def start(self) -> None:
        assert self.process is None
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        program = Path(__file__).with_name("actors.py")
        with (self.world.directory / f"{self.name}.out").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, program, self.role, self.name, json.dumps(self.options)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.world.environment,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it runs. One that ended by itself is told of, once, and counts as dead."""
        if self.process is None:
            return False
        if (status := self.process.poll()) is None:
            return True
        tail = (self.world.directory / f"{self.name}.out").read_text(errors="replace")[-1500:]
        self.world.log.write("surprise", what=f"{self.name} ended by itself with status {status}: {tail}")
        self.process = None
        return False

    @property
    def up(self) -> bool:
        """Whether it has begun to act: it takes SIGTERM."""
        if not self.alive or not self._log.exists() or self._log.stat().st_size == self._logged:
            return False
        return self.role != "endpoint" or _listens(self.options["port"])

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.frozen = number == signal.SIGSTOP or (self.frozen and number != signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None
            self.frozen = False

    async def end(self, seconds: float = EXIT_SECONDS) -> None:
        """SIGTERM, and wait for its end, which must come in time and be a success."""
        if self.alive:
            assert self.process is not None
            self.send(signal.SIGTERM)
            await self.exited(seconds)

    async def exited(self, seconds: float) -> None:
        assert self.process is not None
        try:
            status = await asyncio.to_thread(self.process.wait, seconds)
        except subprocess.TimeoutExpired:
            self.world.log.write("left_behind", what=f"{self.name}, {seconds:.0f} s after SIGTERM")
            self.kill()
        else:
            if status:
                self.alive  # noqa: B018 - tells what it said last
            self.process = None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ the world


class World:
    """The server's database, the actors on it, and the log of what happens to them."""

    def __init__(self, cluster: Cluster, database: str, directory: Path, settings: Settings) -> None:
        self.cluster = cluster
        self.directory = directory
        self.settings = settings
        self.dsn = on_database(cluster.dsn, database)
        self.database = database
        self.log = Log(directory, "nemesis")
        self.actors: list[Actor] = []
        self.environment = dict(os.environ)
        if settings.package is not None:
            path = [str(settings.package), os.environ.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._stack = AsyncExitStack()
        self._wake = ""

    async def __aenter__(self) -> World:
        try:
            await asyncio.to_thread(self._prepare)
            await self._cast()
            await self._ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for actor in self.actors:
            actor.kill()
        await self._stack.aclose()
        self.log.close()

    def _prepare(self) -> None:
        with psycopg.connect(self.cluster.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(self.database)))
            if not connection.execute("select from pg_roles where rolname = 'forgetful'").fetchall():
                connection.execute("create role forgetful superuser login")
                connection.execute("alter role forgetful set synchronous_commit = off")
        upgrade = [sys.executable, "-P", "-m", "pgchan.cli", "migrate"]  # -P: not what lies in the current directory
        subprocess.run(upgrade, env=self.environment | {"PGCHAN_DSN": self.dsn}, check=True, capture_output=True)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(ROWS)
            (self._wake,) = connection.execute("select pg_get_functiondef('pgchan.wake'::regproc)").fetchone() or ("",)

    async def _cast(self) -> None:
        """The actors: of each role with more than one, some are behind a proxy."""
        s = self.settings
        forgetful = conninfo.conninfo_to_dict(self.dsn) | {"user": "forgetful"}
        forgetful_dsn = f"postgresql://forgetful@{forgetful['host']}:{forgetful['port']}/{self.database}"
        port = free_port()
        runs = [f"run/{number}" for number in range(RUN_TASKS)]
        worker = {"lease": s.lease, "takeover_grace": s.grace}
        for number in range(s.workers):
            await self._add("worker", number, worker=worker, through=number % 2 == 1)
        publisher: dict[str, Any] = {"channels": CHANNELS, "pace": s.pace}
        await self._add("publisher", 0, door="async", **publisher)
        await self._add("publisher", 1, door="blocking", through=True, **publisher)
        await self._add("publisher", 2, door="async", dsn=forgetful_dsn, **publisher)
        await self._add("endpoint", 0, port=port, through=True)
        await self._add("reader", 0, channels=CHANNELS, runs=runs[:3], through=True)
        await self._add("stream", 0, channels=CHANNELS, port=port)
        await self._add("caller", 0, runs=runs, seed=s.seed)

    async def _add(self, role: str, number: int, *, dsn: str = "", through: bool = False, **options: Any) -> None:
        proxy = None
        if through:
            proxy = await self._stack.enter_async_context(Proxy(self.dsn))
            dsn = proxy.dsn
        actor = Actor(self, role, f"{role}-{number}", dsn or self.dsn, **options)
        actor.proxy = proxy
        self.actors.append(actor)
        actor.start()

    async def _ready(self) -> None:
        for actor in self.actors:
            await self.until(lambda actor=actor: actor.up, READY_SECONDS, f"{actor.name} to begin")  # type: ignore[misc]

    async def until(self, fact: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait for a fact."""
        deadline = time.monotonic() + seconds
        while not await asyncio.to_thread(fact):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            await asyncio.sleep(0.05)

    def having(self, *roles: str) -> list[Actor]:
        """Those of these roles that are there and awake."""
        return [actor for actor in self.actors if actor.role in roles and actor.alive and not actor.frozen]

    async def query(self, statement: str, *args: object) -> list[tuple[Any, ...]]:
        """One statement on a connection of its own."""
        return await asyncio.to_thread(self._query, statement, args)

    def _query(self, statement: str, args: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5, application_name="nemesis") as connection:
            cursor = connection.execute(statement.encode(), args or None)
            return cursor.fetchall() if cursor.description else []

    async def serves(self) -> bool:
        with suppress(psycopg.OperationalError):
            return await self.query("select 1") == [(1,)]
        return False

    async def speak(self, aloud: bool) -> None:
        """Whether wakeups are sent."""
        await self.query(self._wake if aloud else SILENT)

    # -- the end

    async def calm(self) -> Tables:
        """No more faults: heal all, let everybody come to an end, and see what is left. The final tables."""
        await self._heal()
        self.log.write("quiet")
        callers = self.having("publisher", "caller")
        for actor in callers:
            actor.send(signal.SIGTERM)
        for actor in callers:
            await actor.exited(END_SECONDS + EXIT_SECONDS)
        with suppress(TimeoutError):  # the checker tells which runs
            await self.until(self._all_ended, END_SECONDS, "all runs to end")
        await self._probe("with a wakeup")
        await self.speak(False)
        await self._probe("without")
        await self.speak(True)
        for actor in self.actors:
            actor.alive  # noqa: B018 - tells if one has ended by itself
        self._count_children()
        tables = await asyncio.to_thread(Tables.read, self.dsn)
        for actor in self.having("stream", "reader", "endpoint", "worker"):
            await actor.end()
        left = await asyncio.to_thread(Tables.read, self.dsn)
        return replace(
            tables, workers=tables.workers + left.workers, locks=tables.locks + left.locks, idle=tables.idle + left.idle
        )

    async def _heal(self) -> None:
        for actor in self.actors:
            if actor.process is not None and actor.frozen:
                actor.send(signal.SIGCONT)
            if actor.proxy is not None:
                actor.proxy.silence(False)
            if not actor.alive:
                actor.start()
        deadline = time.monotonic() + READY_SECONDS
        while not await self.serves():
            assert time.monotonic() < deadline, "the server does not come back"
            await asyncio.sleep(0.05)
        await self.speak(True)
        await self._ready()

    def _all_ended(self) -> bool:
        return self._query("select from pgchan.runs where state <> all (%s) limit 1", ([*ENDED],)) == []

    async def _probe(self, how: str) -> None:
        """Say something to readers that have had nothing for a while."""
        await asyncio.sleep(1.0)
        async with pgchan.AsyncClient(self.dsn, name="nemesis") as client:
            for channel in CHANNELS:
                value = f"probe {channel} {how}"
                facts = {"channel": channel, "value": value, "probe": True}
                self.log.write("publish", type="invoke", **facts)
                message = await client.channel(channel).publish(value)
                position, at = message.position, microseconds(message.at)
                self.log.write("publish", type="ok", position=position, at=at, **facts)
        await asyncio.sleep(PROBE_SECONDS)

    def _count_children(self) -> None:
        for actor in self.actors:
            if actor.process is not None:
                for child in psutil.Process(actor.process.pid).children(recursive=True):
                    self.log.write("left_behind", what=f"{child.name()}, a child of {actor.name}")

    def weigh(self, mark: str, only: Iterable[int] = ()) -> list[int]:
        """Log the memory of the processes that serve; their pids. only: those that were there before."""
        pids = []
        for actor in self.having("endpoint", "worker"):
            assert actor.process is not None
            pid = actor.process.pid
            process = psutil.Process(pid)
            if pid in only or (mark == "before" and time.time() - process.create_time() > SETTLED_SECONDS):
                size = process.memory_info().rss
                self.log.write("memory", of=f"{actor.name} ({pid})", mark=mark, bytes=size)
                pids.append(pid)
        return pids


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ------------------------------------------------------------------------------------------------ faults


class Nemesis:
    """Does harm, one fault after the other. Each coroutine is one kind of fault, and heals what it did."""

    def __init__(self, world: World, seed: str) -> None:
        self.world = world
        self.chance = random.Random(seed)
        self.lease = world.settings.lease
        self.grace = world.settings.grace

    async def harm(self, seconds: float) -> None:
        """Choose and do faults for so long."""
        kinds = self.world.settings.faults or tuple(FAULTS)
        weights = [FAULTS[kind][0] for kind in kinds]
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            (kind,) = self.chance.choices(kinds, weights)
            with suppress(psycopg.OperationalError):  # the server was away when it was asked to do itself harm
                await FAULTS[kind][1](self)
            await asyncio.sleep(min(left, self.chance.uniform(0.1, 1.0)))
            self._revive()

    def _revive(self) -> None:
        for actor in self.world.actors:
            if not actor.alive:
                actor.start()

    @asynccontextmanager
    async def _fault(self, kind: str, target: Actor | None = None, **facts: Any) -> AsyncIterator[None]:
        named = {"kind": kind, **({"target": target.name} if target else {}), **facts}
        self.world.log.write("fault", edge="begin", **named)
        try:
            yield
        finally:
            self.world.log.write("fault", edge="end", **named)

    @asynccontextmanager
    async def _outage(self, kind: str) -> AsyncIterator[None]:
        """A fault of the server. One that is over within the grace costs no worker its runs."""
        began = self.world.log.write("fault", edge="begin", kind=kind)
        try:
            yield
            await self._back()
        finally:
            long = time.monotonic() - began > 0.7 * self.grace
            self.world.log.write("fault", edge="end", kind=kind, **({"long": True} if long else {}))

    def _deadly(self, target: Actor, seconds: float) -> dict[str, Any]:
        """Facts of a fault that may cost a worker its runs, which must go on elsewhere within so many seconds."""
        return {"deadly": True, "within": seconds + TAKEOVER_SLACK_SECONDS} if target.role == "worker" else {}

    def _one(self, *roles: str, proxied: bool = False) -> Actor | None:
        found = [actor for actor in self.world.having(*roles) if actor.proxy is not None or not proxied]
        return self.chance.choice(found) if found else None

    async def _aftermath(self) -> None:
        """Mostly, time for somebody to take over before the next fault."""
        await asyncio.sleep(self.chance.choice([0.0, 1.0, 1.0]) * (self.grace + 1.5))

    # -- processes

    async def kill_worker(self) -> None:
        await self._kill("worker")
        await self._aftermath()

    async def kill_publisher(self) -> None:
        await self._kill("publisher", "caller")

    async def kill_reader(self) -> None:
        await self._kill("reader", "stream", "endpoint")

    async def _kill(self, *roles: str) -> None:
        if (target := self._one(*roles)) is not None:
            async with self._fault("kill", target, **self._deadly(target, self.grace)):
                target.kill()

    async def kill_all_but_one(self) -> None:
        """The deaths of those who watch each other, all at once."""
        workers = self.world.having("worker")
        self.chance.shuffle(workers)
        for target in workers[1:]:
            async with self._fault("kill together", target, **self._deadly(target, 2 * self.grace + 2)):
                target.kill()
        await self._aftermath()

    async def freeze_worker(self) -> None:
        if (target := self._one("worker")) is not None:
            seconds = self.lease * self.chance.uniform(1.1, 1.6) + self.grace
            async with self._fault("freeze", target, **self._deadly(target, self.lease + self.grace)):
                target.send(signal.SIGSTOP)
                await asyncio.sleep(seconds)
                target.send(signal.SIGCONT)

    async def freeze_other(self) -> None:
        if (target := self._one("publisher", "caller", "reader", "stream", "endpoint")) is not None:
            async with self._fault("freeze", target):
                target.send(signal.SIGSTOP)
                await asyncio.sleep(self.chance.uniform(0.2, 3.0))
                target.send(signal.SIGCONT)

    async def roll_worker(self) -> None:
        """A deploy: SIGTERM, and the next one at once."""
        if (target := self._one("worker")) is not None and target.up:
            async with self._fault("roll", target):
                await target.end()

    # -- connections

    async def terminate(self) -> None:
        """End all connections of one purpose of one actor, or the lock or the watch of workers."""
        role = self.chance.choice(["writer", "pool", "listen", "pgchan lock", "pgchan watch"])
        pattern = f"{role} %" if role.startswith("pgchan") else f"% {role}"
        rows = await self.world.query(
            "select pid from pg_stat_activity where application_name like %s and datname = current_database()", pattern
        )
        if rows:
            (pid,) = self.chance.choice(sorted(rows))
            async with self._fault(f"terminate {role}"):
                await self.world.query("select pg_terminate_backend(%s)", pid)

    async def cut(self) -> None:
        if (target := self._one("worker", "publisher", "reader", "endpoint", proxied=True)) is not None:
            assert target.proxy is not None
            async with self._fault("cut", target):
                target.proxy.cut()

    async def stall(self) -> None:
        """Nothing gets through for a while, and nobody is told; then the connections end."""
        if (target := self._one("worker", "publisher", "reader", "endpoint", proxied=True)) is not None:
            assert target.proxy is not None
            seconds = self.lease * self.chance.uniform(0.2, 1.5)
            async with self._fault("stall", target, **self._deadly(target, self.lease + self.grace)):
                target.proxy.silence()
                await asyncio.sleep(seconds)
                target.proxy.silence(False)
                target.proxy.cut()

    async def swallow(self) -> None:
        """The next statement of an actor is done, its answer is lost, and its connection too."""
        if (target := self._one("worker", "publisher", "endpoint", proxied=True)) is not None:
            assert target.proxy is not None
            async with self._fault("swallow", target):
                target.proxy.swallow(b"")
                await asyncio.sleep(0.3)

    # -- the server

    async def crash(self) -> None:
        """SIGKILL of one backend: the server ends all others and recovers."""
        rows = await self.world.query(
            "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        if rows:
            (pid,) = self.chance.choice(sorted(rows))
            async with self._outage("crash of a backend"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def restart_immediate(self) -> None:
        async with self._outage("immediate restart"):
            await asyncio.to_thread(self.world.cluster.restart, "immediate")

    async def restart_fast(self) -> None:
        async with self._outage("fast restart"):
            await asyncio.to_thread(self.world.cluster.restart, "fast")

    async def _back(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while not await self.world.serves():
            assert time.monotonic() < until, "the server does not come back"
            await asyncio.sleep(0.02)

    async def lose_wakeups(self) -> None:
        async with self._fault("lost wakeups"):
            try:
                await self.world.speak(False)
                await asyncio.sleep(self.chance.uniform(0.5, 4.0))
            finally:
                await self._until_done(lambda: self.world.speak(True))

    async def hold_channel(self) -> None:
        """Somebody's open transaction has the row of a channel, or of a run."""
        async with self._fault("held channel"):
            rows = await self.world.query(
                "select id from pgchan.channels where closed_at is null and name not like 'pgchan:%%' limit 50"
            )
            if rows:
                (channel,) = self.chance.choice(sorted(rows))
                await asyncio.to_thread(self._hold, channel, self.chance.uniform(0.1, 2.0))

    def _hold(self, channel: int, seconds: float) -> None:
        with psycopg.connect(self.world.dsn, connect_timeout=5, application_name="nemesis") as connection:
            connection.execute("select from pgchan.channels where id = %s for update", [channel])
            time.sleep(seconds)
            connection.rollback()

    async def look_after(self) -> None:
        """A migration that finds nothing to do, and the doctor, while everything runs."""
        async with self._fault("migrate and doctor"):
            with suppress(errors.Error):
                await asyncio.to_thread(migrate.upgrade, self.world.dsn)
                await doctor.check(self.world.dsn)

    async def _until_done(self, what: Callable[[], Awaitable[None]]) -> None:
        until = time.monotonic() + READY_SECONDS
        while True:
            try:
                return await what()
            except psycopg.OperationalError:
                assert time.monotonic() < until, "the server does not come back"
                await asyncio.sleep(0.05)


FAULTS: dict[str, tuple[float, Callable[[Nemesis], Awaitable[None]]]] = {
    "kill_worker": (6, Nemesis.kill_worker),
    "kill_publisher": (2, Nemesis.kill_publisher),
    "kill_reader": (2, Nemesis.kill_reader),
    "kill_all_but_one": (1, Nemesis.kill_all_but_one),
    "freeze_worker": (2, Nemesis.freeze_worker),
    "freeze_other": (1, Nemesis.freeze_other),
    "roll_worker": (2, Nemesis.roll_worker),
    "terminate": (8, Nemesis.terminate),
    "cut": (4, Nemesis.cut),
    "stall": (1.5, Nemesis.stall),
    "swallow": (6, Nemesis.swallow),
    "crash": (3, Nemesis.crash),
    "restart_immediate": (2, Nemesis.restart_immediate),
    "restart_fast": (1, Nemesis.restart_fast),
    "lose_wakeups": (2, Nemesis.lose_wakeups),
    "hold_channel": (3, Nemesis.hold_channel),
    "look_after": (1, Nemesis.look_after),
}
