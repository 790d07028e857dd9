"""What a role without any right can still do, as PostgreSQL is: invent wakeups, and sit on the locks of workers.

It costs latency, and is reported. What it takes to forbid it is in test_harden.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from doors import Door, Reading, query
from logins import Logins
from workers import Processes, Workers

import pgchan
from pgchan import doctor, errors

READS = 20  # a second, that hints which lead to nothing may cost a process: of messages, of ends, of claims
SECONDS = 3.0
RATE = 10_000
BURST = 50

# BURST hints, some without any sense, the others that something has happened to one of these channels, at a position
# that is higher each time; that there are new channels; that a queue has work. Payloads must differ, or the server
# sends them once.
HINTS = """
select pg_notify(case n %% 10 when 0 then 'pgchan_new' when 1 then 'pgchan_queue' when 2 then 'pgchan_99'
                              else 'pgchan_' || i %% 16 end,
                 case n %% 10 when 0 then n::text when 1 then repeat(' ', n / 10) || hashtext('default')
                              when 2 then md5(n::text) when 3 then i || ':' || -1 || ',x:' || n
                              when 4 then md5(n::text) || ',::,' || i || ':' || n
                              else i || ':' || 1000000 + %s + n end)
from generate_series(0, %s - 1) n, unnest(array[(%s::bigint[])[1 + n %% cardinality(%s::bigint[])]]) i
"""


class Spoofer:
    """A thread that sends HINTS about these channels through its own connection, RATE a second."""

    def __init__(self, dsn: str, ids: list[int]) -> None:
        self.sent = 0
        self._dsn = dsn
        self._ids = ids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                due += BURST / RATE
                connection.execute(HINTS.encode(), [self.sent, BURST, self._ids, self._ids])
                self.sent += BURST

    def __enter__(self) -> Spoofer:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self.began
        assert self.sent >= RATE * self.seconds / 4, "too few were sent to prove anything"


@pytest.fixture
def dsn(direct_dsn: str) -> str:
    """Strangers hold locks and LISTEN; behind a pooler that would be anybody's."""
    return direct_dsn


@pytest.fixture
def logins(admin: psycopg.Connection[Any], dsn: str) -> Iterator[Logins]:
    logins = Logins(admin, dsn)
    yield logins
    logins.close()


@pgchan.workflow
async def receive(run: pgchan.Run) -> Any:
    """Ends with the first signal, in memory until then."""
    signal = await run.receive()
    assert signal is not None
    return signal.body


class Counted:
    """What a client sends in SECONDS: `reads` of what it follows, `pages`, which are all other statements."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def __call__(self) -> Counted:
        before, began = dict(self._client.stats), time.monotonic()
        await asyncio.sleep(SECONDS)
        self.seconds = time.monotonic() - began
        self.reads, self.pages = (self._client.stats[name] - before[name] for name in ("reads", "pages"))
        return self


def ids_of(dsn: str) -> list[int]:
    return [id for (id,) in query(dsn, "select id from pgchan.channels where name not like 'pgchan:%'")]


async def test_readers_and_who_waits_for_results(
    door: Door, logins: Logins, reading: Callable[[Any], Reading], wait_until: Callable[..., Any]
) -> None:
    client, other = door.client(), pgchan.AsyncClient(door.dsn)
    async with other:
        reader, unborn = reading(client.channel("c").tail()), reading(client.channel("unborn").tail())
        await other.channel("c").publish(0)
        await reader.has(1)
        await other.start("work", id="r")
        result = asyncio.ensure_future(client.run("r").result(60))
        await wait_until(lambda: client.stats["pages"] > 0)
        with Spoofer(logins.of(), ids_of(door.dsn)):
            sends = await Counted(client)()
            sent = time.monotonic()
            await other.channel("c").publish(1)
            await other.channel("unborn").publish(1)
            await reader.has(2)
            await unborn.has(1)
            await other.run("r").cancel()
            with pytest.raises(pgchan.RunCancelled):
                await result
            late = time.monotonic() - sent
        assert sends.reads <= 10 + READS * sends.seconds
        assert sends.pages <= 10 + READS * sends.seconds
        assert late < 3.0
        assert reader.bodies == [0, 1]


async def test_a_worker(dsn: str, logins: Logins, wait_until: Callable[..., Any]) -> None:
    workers = Workers(dsn)
    client = pgchan.AsyncClient(dsn)
    try:
        await workers.start(receive, client=client)
        async with pgchan.AsyncClient(dsn) as other:
            handles = [await other.start(receive, id=f"r{n}") for n in range(4)]
            await wait_until(lambda: query(dsn, "select count(*) from pgchan.runs where state = 'running'") == [(4,)])
            with Spoofer(logins.of(), ids_of(dsn)):
                sends = await Counted(client)()
                sent = time.monotonic()
                for handle in handles:
                    await handle.signal("now")
                assert await asyncio.gather(*(handle.result(10) for handle in handles)) == ["now"] * 4
                assert await (await other.start(receive, id="late")).signal(1)
                assert await other.run("late").result(10) == 1
                late = time.monotonic() - sent
        assert sends.reads <= 10 + READS * sends.seconds
        assert sends.pages <= 40 + 2 * READS * sends.seconds  # claims, and inboxes of what it executes
        assert late < 3.0
    finally:
        await workers.close()


# ------------------------------------------------------------------------------------------------ squatted locks


class Squatter:
    """A session of a role without rights that takes the lock of a worker, as soon as that is free, and keeps it."""

    def __init__(self, dsn: str, worker: int) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        self.pid = self._connection.info.backend_pid
        self.got = threading.Event()
        self._thread = threading.Thread(target=self._take, args=[worker])
        self._thread.start()

    def _take(self, worker: int) -> None:
        with contextlib.suppress(psycopg.Error):
            self._connection.execute("select pg_advisory_lock(1885823848, %s)", [worker])
            self.got.set()

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self._connection.cancel()
        self._thread.join()
        self._connection.close()


@pytest.fixture
def squat(dsn: str, logins: Logins) -> Iterator[Callable[[int], Squatter]]:
    """Take the lock of this worker, or wait for it."""
    started: list[Squatter] = []

    def begin(worker: int) -> Squatter:
        started.append(Squatter(logins.of(), worker))
        return started[-1]

    yield begin
    for one in started:
        one.close()


def is_queued(dsn: str, squatter: Squatter) -> bool:
    waiting = "select 1 from pg_locks where pid = %s and locktype = 'advisory' and not granted"
    return query(dsn, waiting, squatter.pid) != []


async def reported(dsn: str) -> str:
    findings = {finding.check: finding for finding in await doctor.check(dsn)}
    return "" if findings["workers"].is_fine else findings["workers"].detail


async def test_a_squatted_lock_does_not_keep_a_dead_worker_alive_and_is_reported(
    dsn: str, squat: Callable[[int], Squatter], processes: Processes, workers: Workers, wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING, "pgchan")
    first = await processes.start("first")
    async with pgchan.AsyncClient(dsn) as client:
        handle = await client.start("everything", id="r")
        await wait_until(lambda: query(dsn, "select worker from pgchan.run_status") == [("first",)])
        (id,) = first.told("started")[0][2:]
        await workers.start(name="second")
        squatter = squat(id)
        await wait_until(lambda: is_queued(dsn, squatter))
        assert await reported(dsn) == "", "who waits for a lock does not hold it"
        killed = first.kill()
        await asyncio.to_thread(squatter.got.wait, 10)
        await wait_until(lambda: query(dsn, "select worker from pgchan.run_status") == [("second",)])
        # A grace of 0.3 s, and the slice of 0.6 s for which the watcher waits behind the squatter.
        assert time.monotonic() - killed < 5
        assert squatter.got.is_set() and not is_queued(dsn, squatter)
        await handle.signal("one")
        await handle.signal("two")
        assert await handle.result(10) == ["one", "two"]
        detail = await reported(dsn)
    assert re.search(rf"worker {id} is held by session {squatter.pid} of role '.+_0', which is not its own", detail)
    assert f"the lock of worker {id} is held by session {squatter.pid} that is not worker {id}" in caplog.text


async def test_a_worker_whose_lock_was_taken_in_a_cut_goes_on_under_another_id(
    dsn: str, squat: Callable[[int], Squatter], workers: Workers, wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING, "pgchan")
    worker = await workers.start(name="alone", lease=2.0)
    before = worker.id
    async with pgchan.AsyncClient(dsn) as client:
        handle = await client.start("everything", id="r")
        await wait_until(lambda: query(dsn, "select state from pgchan.run_status") == [("running",)])
        squatter = squat(before)
        await wait_until(lambda: is_queued(dsn, squatter))
        query(dsn, "select pg_terminate_backend(backend_pid) from pgchan.workers")
        await wait_until(lambda: worker.id != before)
        assert squatter.got.is_set()
        assert query(dsn, "select id from pgchan.workers") == [(worker.id,)]
        await handle.signal("one")
        await handle.signal("two")
        assert await handle.result(10) == ["one", "two"]
    assert f"the lock of worker {before} is held by a session that is not worker {before}" in caplog.text


async def test_a_worker_starts_past_ids_whose_locks_are_taken(
    dsn: str, squat: Callable[[int], Squatter], workers: Workers
) -> None:
    ((last,),) = query(dsn, "select pgchan.new_worker()")
    for id in range(last + 1, last + 4):
        assert squat(id).got.wait(10)
    assert (await workers.start()).id == last + 4
    assert "(and 2 more)" in await reported(dsn)


async def test_a_worker_that_finds_every_id_taken_says_what_to_do(dsn: str, logins: Logins, workers: Workers) -> None:
    with psycopg.connect(logins.of(), autocommit=True) as stranger:
        stranger.execute("select count(pg_advisory_lock(1885823848, n)) from generate_series(1, 1000) n")
        with pytest.raises(errors.Unavailable, match="pgchan harden"):
            await workers.start()
