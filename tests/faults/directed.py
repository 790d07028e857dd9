"""Directed faults: for each promise a short history that only its keeping survives. `python directed.py SCENARIO DSN`.

A scenario runs in a process of its own, on whatever copy of pgchan is first on its path: test_mutants.py breaks copies.
It ends in the checker of history.py, or in a fact that only the scenario can see, which it files under the invariant
that is closest. The last line that it prints is its verdict, as JSON.

SCENARIO: a function below. DSN: of an empty database; those that need a server of their own make it.

Long, because each promise has a history.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import psycopg
from cluster import Cluster
from doors import query
from faults.ground import LONG, Ground, prepare, wait_until
from proxy import Proxy

import pgchan

SLEPT_SECONDS = 2.5  # a reader that has nothing by then was not woken

Scenario = Callable[[Ground], Awaitable[None]]
SCENARIOS: dict[str, tuple[Scenario, dict[str, str] | None, dict[str, float]]] = {}


def scenario(server: dict[str, str] | None = None, **patience: float) -> Callable[[Scenario], Scenario]:
    """server: it needs one of its own, with these settings. patience: lease and takeover_grace of its workers."""

    def enter(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = function, server, patience
        return function

    return enter


# ------------------------------------------------------------------------------------------------ runs


async def talking(ground: Ground, at: str | None = None) -> Any:
    """A worker in the middle of a run, stopped at a point of its step "speak", or waiting at that step's gate."""
    first = await ground.start("first")
    if at is not None:
        await first.stop_at(at)
        first.open("speak")
    await ground.start_run("talk")
    if at is not None:
        await first.tells("point", at.partition("#")[0])
    else:
        await first.tells("gate", "speak")
    return first


@scenario()
async def frozen_before_its_record(ground: Ground) -> None:
    """A worker wakes up, its step's result in its hand, while another executes that step."""
    first = await talking(ground, "effect_done#2")
    ground.freeze(first)
    second = await ground.start("second")
    await second.tells("gate", "speak")
    ground.wake(first)
    await first.does("worker", times=2)
    second.open("speak")
    await ground.signal("why")
    await ground.result()


@scenario()
async def killed_as_its_record_was_written(ground: Ground) -> None:
    """A worker dies when the result of a step is stored: all that the step has said must be stored as well."""
    first = await talking(ground, "checkpoint_sent#2")
    await wait_until(lambda: query(ground.dsn, "select 1 from pgchan.messages where key = 'speak'"))
    ground.kill(first)
    await ground.start("second")
    await ground.signal("why")
    await ground.result()


@scenario()
async def killed_in_the_middle_of_its_output(ground: Ground) -> None:
    """A step is tried again that had said something: that is void."""
    first = await talking(ground)
    ground.kill(first)
    second = await ground.start("second")
    second.open("speak")
    await ground.signal("why")
    await ground.result()


@scenario()
async def killed_before_its_record(ground: Ground) -> None:
    """A step that took a signal is tried again: it finds that signal again."""
    first = await ground.start("first")
    await first.stop_at("effect_done#3")  # of think, speak, answer
    first.open("speak")
    await ground.start_run("talk")
    await ground.signal("why")
    await first.tells("point", "effect_done")
    ground.kill(first)
    second = await ground.start("second")
    second.open("speak")
    await ground.result(seconds=5.0)


@scenario()
async def fenced_beside_others(ground: Ground) -> None:
    """A superseded worker's record goes in one batch with a message of its process that nobody owns."""
    first = await ground.start("first")
    await first.stop_at("checkpoint_queued")
    await ground.start_run("beside")
    await first.tells("point", "checkpoint_queued")
    ground.freeze(first)
    second = await ground.start("second")
    await ground.result()
    ground.wake(first)
    for process in first, second:
        await wait_until(lambda process=process: process.of("publish", type="ok") or process.of("publish", type="fail"))
        if not process.of("publish", type="ok"):
            told = [o.get("error") for o in process.of("publish", type="fail")]
            ground.blame("P14", "outcome_of_its_own", f"a message of {process.name} was refused with others: {told}")


# ------------------------------------------------------------------------------------------------ who is alive


@scenario()
async def two_at_peace(ground: Ground) -> None:
    """Nothing happens to a worker, for as long as a neighbour needs to look twice."""
    first = await talking(ground)
    second = await ground.start("second")
    if await wait_until(lambda: second.of("reaped"), 1.5):
        return
    second.open("speak")
    first.open("speak")
    await ground.signal("why")
    await ground.result()


@scenario()
async def its_clock_jumps(ground: Ground) -> None:
    """The wall clock of a worker's machine is set, an hour ahead and back: that is not time that has passed."""
    first = await ground.start("first")
    await ground.start_run("endless")
    await first.does("effect")
    for seconds in 3600, 0:
        first.order(f"clock {seconds}")
        await first.tells("clock", str(seconds))
        if await wait_until(lambda: first.told("cancelled"), 0.4 * ground.patience["lease"]):
            ground.blame("L6", "takeovers_have_a_cause", f"a worker stopped its run when its clock jumped to {seconds}")
            break
    await ground.client.run("r").cancel()
    await wait_until(lambda: first.told("cancelled"))


@scenario(**LONG)
async def cut_off_for_less_than_the_grace(ground: Ground) -> None:
    """A worker's lock is free, and it takes it back within the grace."""
    first = await talking(ground)
    second = await ground.start("second")
    await second.stop_at("watch_granted")
    await ground.watched(first)
    ground.fault("cut", first)
    first.send(signal.SIGSTOP)
    assert first.cut("lock") == 1
    await second.tells("point", "watch_granted")
    second.order("go")
    await wait_until(lambda: second.of("reaped"), 0.1 * ground.patience["takeover_grace"])
    first.send(signal.SIGCONT)
    ground.fault("cut", first, "end")
    second.open("speak")
    first.open("speak")
    await ground.signal("why")
    await ground.result()


@scenario()
async def suspected_too_late(ground: Ground) -> None:
    """Somebody reaps a worker by what he saw a moment ago; it has its lock again."""
    first = await talking(ground)
    await wait_until(ground.is_settled)
    query(ground.dsn, "select pgchan.reap(id) from pgchan.workers")
    if not ground.is_settled():
        ground.blame("L6", "takeovers_have_a_cause", "a worker that holds its lock was taken for dead")
        return
    first.open("speak")
    await ground.signal("why")
    await ground.result()


@scenario()
async def frozen_as_it_watches(ground: Ground) -> None:
    """A frozen worker is dead when its lease is over, whatever it was waiting for."""
    await ground.start("lowest", queues=["none"])
    first = await talking(ground)
    second = await ground.start("second")
    lowest = ground.processes[0]
    await ground.watched(lowest)
    stopped = ground.freeze(first)
    within = ground.patience["lease"] + ground.patience["takeover_grace"] + 2.0
    if not await wait_until(lambda: second.of("effect", step="speak"), stopped + within - time.monotonic()):
        ground.blame("L6", "takeovers_have_a_cause", f"nobody took over within {within:.1f} s of a freeze")
        return
    second.open("speak")
    await ground.signal("why")
    await ground.result()
    ground.wake(first)
    await first.does("worker", times=2)


# ------------------------------------------------------------------------------------------------ publishing


@scenario({"synchronous_commit": "off", "wal_writer_delay": "10s"})
async def the_server_crashes_after_an_acknowledgement(ground: Ground) -> None:
    """Connections have synchronous_commit off, and the server dies."""
    for n in range(20):
        await ground.publish("c", n)
    await ground.read("c")
    await ground.start_run("talk")
    await ground.signal("why")
    assert ground.cluster is not None
    ground.cluster.kill()
    ground.cluster.start()
    with suppress(pgchan.RunNotFound):
        await ground.client.run("r").cancel()


@scenario()
async def an_answer_is_lost(ground: Ground) -> None:
    """A message with a key is stored, and its publisher does not hear of it."""
    async with Proxy(ground.dsn) as proxy, pgchan.AsyncClient(proxy.dsn, timeout=5.0) as client:
        await ground.publish("c", "first", client=client)
        proxy.swallow(b"precious")
        await ground.publish("c", "precious", key="k", client=client)
        assert proxy.swallowed == 1


@scenario()
async def one_publisher_is_slow_to_commit(ground: Ground) -> None:
    """Two publishers, one in a transaction that stays open: nobody reads what lies behind its message before it."""
    await ground.publish("c", "first")
    ground.follow("c")
    with psycopg.connect(ground.dsn) as connection:
        ground.log.write("publish", type="invoke", channel="c", value="held")
        connection.execute("""select pgchan.publish('c', '"held"')""")
        other = asyncio.create_task(ground.publish("c", "other"))
        await asyncio.wait({other}, timeout=0.5)
        await wait_until(lambda: [o for o in ground.operations if o.get("value") == "other" and o["op"] == "read"], 0.5)
    ground.log.write("publish", type="info", channel="c", value="held")
    await other
    await wait_until(lambda: sum(o["op"] == "read" for o in ground.operations) >= 3, 3.0)


@scenario()
async def a_wakeup_fails_after_the_commit(ground: Ground) -> None:
    """The message is stored, then the server reports an error: the publisher may not be told that nothing was done."""
    query(ground.dsn, WAKE.format(body="begin raise exception 'too many notifications' using errcode = '54000'; end"))
    async with pgchan.AsyncClient(ground.dsn, timeout=1.0) as client:
        await ground.publish("c", "unkeyed", client=client)
        await ground.publish("c", "keyed", key="k", client=client)


@scenario({"max_notify_queue_pages": "64"})
async def the_notify_queue_is_full(ground: Ground) -> None:
    """Somebody listens and never reads: publishing goes on."""
    await ground.publish("c", "first")
    with psycopg.connect(ground.dsn, autocommit=True) as stuck, psycopg.connect(ground.dsn, autocommit=True) as filler:
        stuck.execute("listen filled")
        stuck.execute("begin")
        with suppress(psycopg.errors.ProgramLimitExceeded):
            for n in range(1000):
                filler.execute("select pg_notify('filled', %s)", [f"{n}{'x' * 7000}"])
        (usage,) = filler.execute("select pg_notification_queue_usage()").fetchone()
        assert usage > 0.9
        for n in range(5):
            ended = await ground.publish("c", n)
            if ended != "ok":
                ground.blame("P12", "never_a_failed_publish", f"with a full NOTIFY queue a publish ended as {ended!r}")


# ------------------------------------------------------------------------------------------------ reading


@scenario()
async def history_is_rewritten(ground: Ground) -> None:
    """What a reader has read is replaced, as by a failover that lost it: the reader is told."""
    for n in range(5):
        await ground.publish("c", n)
    cursor = await ground.read("c")
    tail = ground.client.channel("c").tail(after=cursor)
    ground.log.write("fault", kind="rewrite", edge="begin", lossy=True)
    query(ground.dsn, "delete from pgchan.messages where position > 3")
    query(ground.dsn, "update pgchan.channels set head = 3")
    ground.log.write("fault", kind="rewrite", edge="end", lossy=True)
    for n in range(5, 9):
        await ground.publish("c", n)
    await ground.read("c", after=cursor, expect="history_lost")
    where = {"reader": "test tail", "reading": 1, "channel": "c"}
    ground.log.write("reading", **where, after=5, view="raw", expect="history_lost")
    try:
        async with asyncio.timeout(5):
            message = await anext(tail)
        ground.log.write("read", **where, position=message.position, at=0, kind="message", value=message.body)
    except pgchan.HistoryLost as lost:
        ground.log.write("reset", **where, reason="history_lost", first=lost.first, last=lost.last)


@scenario()
async def messages_are_trimmed(ground: Ground) -> None:
    """A reader comes back to a place that was removed, and is told."""
    for n in range(10):
        await ground.publish("c", n)
    cursor = await ground.read("c", limit=3)
    await ground.client.channel("c").trim(8)
    after = await ground.read("c", after=cursor, expect="trimmed")
    await ground.read("c", after=after)
    await ground.read("c")


async def all_read_the_probe(ground: Ground) -> None:
    """Give each reader time to get what was published last; the checker tells who slept through it."""
    for reader in ground.processes:
        await wait_until(lambda reader=reader: reader.of("read", value="probe"), SLEPT_SECONDS)


@scenario()
async def the_listener_is_deaf_for_a_moment(ground: Ground) -> None:
    """A message is announced while the listening connection is away."""
    await ground.publish("c", "first")
    for door in "async", "blocking":
        reader = await ground.start_reader(door, "c")
        await reader.does("read", value="first")
        reader.send(signal.SIGSTOP)
        assert reader.cut("listen") == 1
    listening = (
        "select 1 from pg_stat_activity where datname = current_database() and application_name like '% listen'"
    )
    await wait_until(lambda: not query(ground.dsn, listening))
    ground.log.write("quiet")
    await ground.publish("c", "probe", probe=True)
    for reader in ground.processes:
        reader.send(signal.SIGCONT)
    await all_read_the_probe(ground)


@scenario()
async def a_message_comes_as_the_listener_returns(ground: Ground) -> None:
    """A message is announced between the LISTEN and the first read."""
    await ground.publish("c", "first")
    for door in "async", "blocking":
        reader = await ground.start_reader(door, "c")
        await reader.does("read", value="first")
        await reader.stop_at("listening")
        assert reader.cut("listen") == 1
        await reader.tells("point", "listening")
    ground.log.write("quiet")
    await ground.publish("c", "probe", probe=True)
    for reader in ground.processes:
        reader.order("go")
    await all_read_the_probe(ground)


@scenario()
async def nothing_is_announced(ground: Ground) -> None:
    """All wakeups are lost."""
    query(ground.dsn, WAKE.format(body="begin end"))
    await ground.publish("c", "first")
    for door in "async", "blocking":
        reader = await ground.start_reader(door, "c")
        await reader.does("read", value="first")
    ground.log.write("quiet")
    await ground.publish("c", "probe", probe=True)
    await all_read_the_probe(ground)


WAKE = """
    create or replace function pgchan.wake(
      ids bigint[], heads bigint[], created boolean default false, queues text[] default null)
    returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$ {body} $$
"""


# ------------------------------------------------------------------------------------------------ the program


async def judge(name: str, dsn: str, directory: Path) -> dict[str, Any]:
    """Let a scenario happen; what was found: pairs of an invariant and what is wrong."""
    function, settings, patience = SCENARIOS[name]
    cluster = None
    if settings is not None:
        cluster = Cluster(settings, guarded=True)
        cluster.start()
        dsn = cluster.dsn
    try:
        prepare(dsn)
        ground = Ground(dsn, directory, cluster=cluster, **patience)
        try:
            await function(ground)
            found = await ground.end()
        finally:
            await ground.close()
    finally:
        if cluster is not None:
            cluster.remove()
    return {"package": pgchan.__file__, "found": [[v.invariant, str(v)] for v in found]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asyncio.run(judge(sys.argv[1], sys.argv[2], Path(temporary)))))
