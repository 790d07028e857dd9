"""Each named point × {the process is killed, frozen past its lease, cut off, the server crashes}: the run ends right.

A run meets all that a run may do (programs.journey). Its worker stops at a point; the fault strikes; another worker is
there to take over, rightly or not. Then the checker of history.py judges what all of them told against the tables.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, on_database
from doors import query
from faults.ground import LONG, SHORT, Ground, wait_until
from faults.history import ROWS, Tables
from faults.programs import Process

from pgchan import migrate

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
numbers = itertools.count()  # of databases on the server that is crashed


@pytest.fixture(scope="module")
def crashing() -> Iterator[Cluster]:
    """A server that the tests of this file share and crash."""
    cluster = Cluster(tcp=True, guarded=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
async def ground(request: pytest.FixtureRequest, tmp_path: Path, fault: str, case: str) -> AsyncIterator[Ground]:
    cluster: Cluster | None = None
    name = f"restart_{next(numbers)}"
    if fault == "restart":
        cluster = request.getfixturevalue("crashing")
        assert cluster is not None
        query(cluster.dsn, f'create database "{name}"')
        dsn = on_database(cluster.dsn, name)
        migrate.upgrade(dsn)
    else:
        dsn = request.getfixturevalue("dsn")
    query(dsn, ROWS)
    patience = LONG if fault in ("cut", "restart") else SHORT
    if patience is LONG and case == "watch_granted":
        patience = LONG | {"takeover_grace": 2.0}  # a worker was killed before, whose death is waited for
    ground = Ground(dsn, tmp_path, cluster=cluster, **patience)
    yield ground
    await ground.close()
    if cluster is not None:
        query(cluster.dsn, f'drop database "{name}"')  # a server recovers faster that has fewer files


async def stopped_at(case: str, ground: Ground) -> Process:
    """A worker that has stopped at this place, with a journey on its way."""
    if case == "watch_granted":
        return await stopped_as_it_was_granted_a_lock(ground)
    first = await ground.start("first", concurrency=1, pool_size=1)
    if case == "listening":
        await ground.start_run("journey")
        await ground.signal("first")
        await first.does("effect", step="answer")
        await first.stop_at("listening")
        first.cut("listen")
        await first.tells("point", "listening")
        await ground.signal("second")  # nobody hears of it
        return first
    await ground.start_run("warm", "warm")
    await first.tells("gate", "warm")  # it takes no other run until this has ended
    await ground.start_run("journey")
    await ground.signal("first")
    await ground.signal("second")
    await first.stop_at(PLACES[case])
    if case == "finish_sent":
        first.open("end")
    first.open("warm")
    await first.tells("point", PLACES[case].partition("#")[0])
    if (fact := DONE.get(case)) is not None:
        assert await wait_until(lambda: query(ground.dsn, fact)), "it was not sent"
    return first


async def stopped_as_it_was_granted_a_lock(ground: Ground) -> Process:
    """A watcher of a worker that was killed in the middle of a journey."""
    victim = await ground.start("victim")
    await ground.start_run("journey")
    await ground.signal("first")
    await victim.does("effect", step="answer")
    first = await ground.start("first")
    await first.stop_at("watch_granted")
    await ground.watched(victim)
    ground.kill(victim)
    await first.tells("point", "watch_granted")
    await ground.signal("second")
    return first


async def strike(fault: str, ground: Ground, first: Process) -> None:
    """Let the fault happen to the first worker, in the presence of a second one, and let it go on as far as it can."""
    if fault == "freeze":
        stopped = ground.freeze(first)
        second = await ground.start("second")
        if (await ground.client.run("r").status()).state == "running":
            await second.tells("gate", "end")  # it has taken over, and brought the run before its end
        await asyncio.sleep(stopped + FROZEN_SECONDS - time.monotonic())
        ground.wake(first)
        await first.does("worker", times=2)  # it has noticed
        second.open("end")
        return
    first.open("end")
    second = await ground.start("second")
    second.open("end")
    if fault == "kill":
        ground.kill(first)
        return
    ground.fault(fault, first)
    began = time.monotonic()
    if fault == "cut":
        assert first.cut() >= 2
    else:
        assert ground.cluster is not None
        ground.cluster.restart("immediate")  # in this thread, whose end would be the server's
    long = time.monotonic() - began > ground.patience["takeover_grace"]
    ground.fault(fault, first, "end", long=long)
    assert not long or "victim" in [process.name for process in ground.processes], "the server was away for too long"
    first.order("go")


@pytest.mark.parametrize("fault", ["kill", "freeze", "cut", "restart"])
@pytest.mark.parametrize("case", PLACES)
async def test_a_run_ends_right_when_its_worker_is_struck_at(case: str, fault: str, ground: Ground) -> None:
    reader = ground.follow()
    first = await stopped_at(case, ground)
    await strike(fault, ground, first)
    ground.log.write("quiet")

    assert await ground.result() == ["first", 1]
    await asyncio.wait_for(reader, 5)
    handle = ground.client.run("r")
    assert sorted(message.key or "" for message in await handle.journal()) == ["answer", "receive", "reserve", "think"]
    said = [m.body for m in await handle.channel.read() if m.kind == "message"]
    assert [s if isinstance(s, str) else s["id"] for s in said] == ["begin", "t1", "t2", "r1", "a1", "a2", "end"]
    assert [run for run, *_ in Tables.read(ground.dsn).rows] == ["r"]
    effects = [o["step"] for process in ground.processes for o in process.of("effect")]
    if fault in ("cut", "restart") and case != "watch_granted":
        assert sorted(effects) == ["answer", "reserve", "think"], "the fault cost a step"
    assert [str(violation) for violation in await ground.end()] == []
