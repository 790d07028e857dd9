"""Each named point × {the process is killed, frozen past its lease, cut off, the server crashes}: the run ends right.

A run meets all that a run may do (programs.journey). Its worker stops at a point; the fault strikes; another worker is
there to take over, rightly or not. Then the checker of history.py judges what all of them told against the tables.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, on_database
from doors import query
from faults.history import ROWS, Log, Tables, check, read_logs
from faults.programs import Process, stored

import pgchan
from pgchan import migrate

SHORT = {"lease": 2.0, "takeover_grace": 0.3}
LONG = {"lease": 10.0, "takeover_grace": 3.0}  # where nobody may take over: on a busy machine a server is away for long
FROZEN_SECONDS = 2.5 * SHORT["lease"]

# Where a journey stops at which point for the n-th time, its worker having executed `warm` up to its end before.
PLACES = {
    "claim_sent": "claim_sent",
    "claimed": "claimed",
    "journal_loaded": "journal_loaded",
    "step_started": "step_started#2",  # of think, answer
    "output_published": "output_published#3",  # of begin, think, answer
    "effect_done": "effect_done#3",  # of receive, think, answer; a transaction has none
    "checkpoint_queued": "checkpoint_queued#3",
    "checkpoint_sent": "checkpoint_sent#4",  # of receive, think, reserve, answer
    "checkpoint_sent in a transaction": "checkpoint_sent#3",
    "checkpointed": "checkpointed#4",
    "checkpointed in a transaction": "checkpointed#3",
    "finish_sent": "finish_sent#2",  # of warm, journey
    "listening": "listening",  # as it comes back from a cut
    "watch_granted": "watch_granted",
}
# What is so when the server has done what was sent. At these points the worker has not read the answer.
DONE = {
    "claim_sent": "select 1 from pgchan.run_status where id = 'r' and state = 'running'",
    "checkpoint_sent": "select 1 from pgchan.messages where key = 'answer'",
    "checkpoint_sent in a transaction": "select 1 from pgchan.messages where key = 'reserve'",
    "finish_sent": "select 1 from pgchan.run_status where id = 'r' and state = 'succeeded'",
}
OTHERS = """
    select application_name from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
"""

numbers = itertools.count()  # of databases on the server that is crashed
WaitUntil = Callable[..., Awaitable[None]]


@pytest.fixture(scope="module")
def crashing() -> Iterator[Cluster]:
    """A server that the tests of this file share and crash."""
    cluster = Cluster(tcp=True, guarded=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


class Ground:
    """One database, the processes that work on it, and a test that starts runs, signals them and reads."""

    def __init__(self, dsn: str, directory: Path, fault: str, cluster: Cluster | None) -> None:
        self.dsn = dsn
        self.directory = directory
        self.cluster = cluster  # to be crashed
        self.log = Log(directory, "test")
        self.client = pgchan.AsyncClient(dsn, name="test")
        self.processes: list[Process] = []
        self._patience = LONG if fault in ("cut", "restart") else SHORT
        self._tail: asyncio.Task[None] | None = None

    async def start(self, name: str, **options: Any) -> Process:
        """Start a worker and wait until it claims runs."""
        self.processes.append(Process(self.dsn, name, **self._patience, **options))
        await self.processes[-1].tells("started", seconds=30)
        return self.processes[-1]

    async def start_run(self, workflow: str, id: str) -> None:
        await self.client.start(workflow, id=id)
        self.log.write("start", type="ok", run=id)

    async def signal(self, body: str) -> None:
        self.log.write("signal", type="invoke", run="r", value=body)
        message = await self.client.run("r").signal(body)
        self.log.write("signal", type="ok", run="r", value=body, position=message.position)

    def follow(self) -> None:
        """Read the journey's channel from now on, whatever happens."""
        self._tail = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        where = {"reader": "test", "reading": 1, "channel": "r"}
        self.log.write("reading", **where, after=0, view="raw")
        async for message in self.client.channel("r").tail(view="raw"):
            self.log.write("read", **where, **stored(message), kind=message.kind, value=message.body)

    async def end(self) -> list[Any]:
        """Wait for the journey's end, and for the reader's; what it came to."""
        value: list[Any] = await self.client.run("r").result(20)
        self.log.write("ended", run="r", state="succeeded", value=value)
        assert self._tail is not None
        await asyncio.wait_for(self._tail, 5)
        return value

    def is_settled(self) -> bool:
        """Whether just the workers that live are registered, and each has its lock."""
        alive = [p.of("worker")[-1]["worker"] for p in self.processes if p.process.poll() is None]
        found = Tables.read(self.dsn)
        return found.workers == sorted(found.locks) == sorted(alive)

    async def close(self) -> None:
        """End all processes in good order; that must be possible."""
        await self.client.close()
        for process in self.processes:
            if process.process.poll() is None:
                process.send(signal.SIGTERM)
        for process in self.processes:
            assert await process.exits() in (0, -signal.SIGKILL)

    def kill(self) -> None:
        for process in self.processes:
            process.close()
        self.log.close()


@pytest.fixture
async def ground(request: pytest.FixtureRequest, tmp_path: Path, fault: str) -> AsyncIterator[Ground]:
    cluster: Cluster | None = None
    if fault == "restart":
        cluster = request.getfixturevalue("crashing")
        assert cluster is not None
        name = f"restart_{next(numbers)}"
        query(cluster.dsn, f'create database "{name}"')
        dsn = on_database(cluster.dsn, name)
        migrate.upgrade(dsn)
    else:
        dsn = request.getfixturevalue("dsn")
    query(dsn, ROWS)
    ground = Ground(dsn, tmp_path, fault, cluster)
    yield ground
    ground.kill()


async def stopped_at(case: str, ground: Ground, wait_until: WaitUntil) -> Process:
    """A worker that has stopped at this place, with a journey on its way."""
    if case == "watch_granted":
        return await stopped_as_it_was_granted_a_lock(ground, wait_until)
    first = await ground.start("first", concurrency=1, pool_size=1)
    if case == "listening":
        await ground.start_run("journey", "r")
        await ground.signal("first")
        await first.does("effect", step="answer")
        await first.stop_at("listening")
        first.cut("listen")
        await first.tells("point", "listening")
        await ground.signal("second")  # nobody hears of it
        return first
    await ground.start_run("warm", "warm")
    await first.tells("gate", "warm")  # it takes no other run until this has ended
    await ground.start_run("journey", "r")
    await ground.signal("first")
    await ground.signal("second")
    await first.stop_at(PLACES[case])
    if case == "finish_sent":
        first.open("end")
    first.open("warm")
    await first.tells("point", PLACES[case].partition("#")[0])
    if (fact := DONE.get(case)) is not None:
        await wait_until(lambda: query(ground.dsn, fact))
    return first


async def stopped_as_it_was_granted_a_lock(ground: Ground, wait_until: WaitUntil) -> Process:
    """A watcher of a worker that was killed in the middle of a journey."""
    victim = await ground.start("victim")
    await ground.start_run("journey", "r")
    await ground.signal("first")
    await victim.does("effect", step="answer")
    first = await ground.start("first")
    await first.stop_at("watch_granted")
    # It waits in slices: kill at the beginning of one.
    waiting = "select 1 from pg_locks where locktype = 'advisory' and clock_timestamp() - waitstart < interval '0.1 s'"
    await wait_until(lambda: query(ground.dsn, waiting))
    victim.kill()
    ground.log.write("fault", kind="kill", target="victim", edge="begin", deadly=True)
    await first.tells("point", "watch_granted")
    await ground.signal("second")
    return first


async def strike(fault: str, ground: Ground, first: Process) -> None:
    """Let the fault happen to the first worker, in the presence of a second one, and let it go on as far as it can."""

    def log(edge: str) -> None:
        ground.log.write("fault", kind=fault, target="first", edge=edge, deadly=fault in ("kill", "freeze"))

    if fault == "freeze":
        log("begin")
        stopped = first.send(signal.SIGSTOP)
        second = await ground.start("second")
        if (await ground.client.run("r").status()).state == "running":
            await second.tells("gate", "end")  # it has taken over, and brought the run before its end
        await asyncio.sleep(stopped + FROZEN_SECONDS - time.monotonic())
        first.order("go")
        first.send(signal.SIGCONT)
        await first.does("worker", times=2)  # it has noticed
        log("end")
        second.open("end")
        return
    first.open("end")
    second = await ground.start("second")
    second.open("end")
    log("begin")
    if fault == "kill":
        first.kill()
    elif fault == "cut":
        assert first.cut() >= 2
        first.order("go")
    else:
        assert ground.cluster is not None
        ground.cluster.restart("immediate")  # in this thread, whose end would be the server's
        first.order("go")
    if fault != "kill":
        log("end")


@pytest.mark.parametrize("fault", ["kill", "freeze", "cut", "restart"])
@pytest.mark.parametrize("case", PLACES)
async def test_a_run_ends_right_when_its_worker_is_struck_at(
    case: str, fault: str, ground: Ground, wait_until: WaitUntil
) -> None:
    ground.follow()
    first = await stopped_at(case, ground, wait_until)
    await strike(fault, ground, first)
    ground.log.write("quiet")

    assert await ground.end() == ["first", 1]
    handle = ground.client.run("r")
    assert sorted(message.key or "" for message in await handle.journal()) == ["answer", "receive", "reserve", "think"]
    said = [m.body for m in await handle.channel.read() if m.kind == "message"]
    assert [s if isinstance(s, str) else s["id"] for s in said] == ["begin", "t1", "t2", "r1", "a1", "a2", "end"]
    assert [run for run, *_ in Tables.read(ground.dsn).rows] == ["r"]
    await wait_until(ground.is_settled)
    effects = [o["step"] for process in ground.processes for o in process.of("effect")]
    if fault in ("cut", "restart") and case != "watch_granted":
        assert sorted(effects) == ["answer", "reserve", "think"], "the fault cost a step"

    await ground.close()
    await wait_until(lambda: query(ground.dsn, OTHERS) == [])
    told = [operation for process in ground.processes for operation in process.operations]
    operations = sorted(read_logs(ground.directory) + told, key=lambda operation: operation["m"])
    assert [str(violation) for violation in check(operations, Tables.read(ground.dsn))] == []
