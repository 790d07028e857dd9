"""Calls that go together: starts, signals and ends of runs that come at a time share a transaction, nothing else.

Long, because each of the three has locks to meet, answers to lose, and particulars to keep apart.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from doors import query
from proxy import Proxy
from workers import Processes, Workers

import pgchan
from pgchan import asyncpg_db, errors, sql
from pgchan.db import Row
from pgchan.groups import TOGETHER_MAX, Arguments, Group


@pgchan.workflow
async def quick(run: pgchan.Run, number: int = 0) -> int:
    return number


@pgchan.workflow
async def family(run: pgchan.Run, size: int) -> list[int]:
    """Waits for children that end at about the same time."""
    children = [await run.start(quick, number) for number in range(size)]
    return [await child.result() for child in children]


@pgchan.workflow
async def paused(run: pgchan.Run, number: int) -> list[Any]:
    """Records what it got first, and a step that spoke, then waits."""
    first = await run.receive()
    assert first is not None
    await run.publish("paused")
    said = await run.step(quick.fn, run, number)
    await run.receive()
    return [first.body, said]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each statement is sent through the pool."""
    count: Counter[str] = Counter()
    run = asyncpg_db.AsyncpgDb._run

    async def counted(self: asyncpg_db.AsyncpgDb, statement: str, args: tuple[object, ...]) -> list[Row]:
        count[statement] += 1
        return await run(self, statement, args)

    monkeypatch.setattr(asyncpg_db.AsyncpgDb, "_run", counted)
    return count


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as one:
        yield one


# ------------------------------------------------------------------------------------------------ of runs


async def test_starts_that_are_made_at_a_time_go_together(
    client: pgchan.AsyncClient, dsn: str, sent: Counter[str]
) -> None:
    await client.start(quick)
    sent.clear()
    handles = await asyncio.gather(*(client.start(quick, number) for number in range(300)))
    assert len({handle.id for handle in handles}) == 300
    assert all(handle.created for handle in handles)
    assert query(dsn, "select count(*) from pgchan.runs where state = 'scheduled'") == [(301,)]
    assert (sent[sql.ENQUEUE], sent[sql.ENQUEUE_MANY]) == (1, 3)  # one, a hundred, a hundred, ninety-nine


async def test_one_alone_waits_for_nobody(client: pgchan.AsyncClient, sent: Counter[str]) -> None:
    for number in range(3):
        await client.start(quick, number)
    assert (sent[sql.ENQUEUE], sent[sql.ENQUEUE_MANY]) == (3, 0)


async def test_what_is_particular_to_a_start_stays_so_in_company(client: pgchan.AsyncClient, dsn: str) -> None:
    await client.start(quick, 0, id="there")
    closed = client.channel("closed")
    await closed.publish(1)
    await closed.close()
    many = await asyncio.gather(
        client.start(quick, 1),
        client.start(quick, 0, id="there"),
        client.start(quick, 5, id="there"),
        client.start(quick, 0, id="closed"),
        client.start("elsewhere", id="later", queue="q", priority=7, delay=60, timeout=90),
        client.start("elsewhere", id="now"),
        client.start("elsewhere", id="now"),
        return_exceptions=True,
    )
    first, existed, conflict, refused, later, *nows = many
    assert isinstance(first, pgchan.AsyncRunHandle) and first.created
    assert isinstance(existed, pgchan.AsyncRunHandle) and not existed.created
    assert isinstance(conflict, errors.RunConflict)
    assert isinstance(refused, errors.ChannelClosed)
    assert isinstance(later, pgchan.AsyncRunHandle)
    assert sorted(now.created for now in nows if isinstance(now, pgchan.AsyncRunHandle)) == [False, True]
    found = query(
        dsn,
        "select workflow, queue, priority, wake_at - r.created_at > '59 s', deadline - r.created_at > '149 s' "
        "from pgchan.runs r join pgchan.channels c on c.id = channel_id where name = 'later'",
    )
    assert found == [("elsewhere", "q", 7, True, True)]


async def test_a_start_that_meets_a_lock_holds_up_no_other(client: pgchan.AsyncClient, dsn: str) -> None:
    await client.channel("held").publish(1)
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('held', '1')")
        connection.execute("select pgchan.publish('unborn', '1')")
        stuck = [asyncio.create_task(client.start(quick, id=name)) for name in ("held", "unborn")]
        for _ in range(3):  # one of them went first, the other in a group
            began = time.monotonic()
            await asyncio.gather(*(client.start(quick) for _ in range(20)))
            assert time.monotonic() - began < 3
        assert not any(task.done() for task in stuck)
        connection.commit()
    handles = await asyncio.gather(*stuck)
    assert {handle.id for handle in handles} == {"held", "unborn"}


async def test_a_lost_answer_to_a_group_of_starts_starts_each_once(dsn: str) -> None:
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as client:
        await client.start(quick)
        proxy.swallow(b"call_enqueue_many")
        handles = await asyncio.gather(*(client.start(quick, number) for number in range(30)))
        assert proxy.swallowed == 1
        assert all(handle.created for handle in handles)
    assert query(dsn, "select count(*) from pgchan.runs") == [(31,)]


async def test_ends_of_runs_go_together_and_wake_their_parents(
    client: pgchan.AsyncClient, dsn: str, sent: Counter[str], workers: Workers
) -> None:
    await workers.start(family, quick, client=client)
    handles = await asyncio.gather(*(client.start(family, 8) for _ in range(6)))
    assert await asyncio.gather(*(handle.result(timeout=20) for handle in handles)) == [list(range(8))] * 6
    assert sent[sql.FINISH_MANY] > 0
    assert query(dsn, "select state, count(*) from pgchan.runs group by 1") == [("succeeded", 54)]
    assert query(dsn, "select count(*) from pgchan.channels where closed_at is null") == [(0,)]


async def test_a_lost_answer_to_a_group_of_ends_ends_each_once(dsn: str, workers: Workers) -> None:
    async with pgchan.AsyncClient(dsn) as client, Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as between:
        await workers.start(quick, client=between)
        proxy.swallow(b"call_finish_many")
        handles = await asyncio.gather(*(client.start(quick, number) for number in range(60)))
        assert await asyncio.gather(*(handle.result(timeout=20) for handle in handles)) == list(range(60))
        assert proxy.swallowed == 1
    assert query(dsn, "select count(*) from pgchan.messages where convert_from(body, 'UTF8') ~ '\"ended\"'") == [(60,)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_dies_or_freezes_with_a_group_of_ends_on_its_way_ends_each_once(
    client: pgchan.AsyncClient, dsn: str, processes: Processes, wait_until: Callable[..., Any], how: signal.Signals
) -> None:
    first = await processes.start("first")
    handles = await asyncio.gather(*(client.start("nap", 1.0) for _ in range(30)))
    asleep = "select 1 from pgchan.messages m join pgchan.runs r on r.journal_id = m.channel_id having count(*) = 60"
    await wait_until(lambda: query(dsn, asleep))  # the step and the timer of each
    await first.stop_at("claimed")
    handles.append(await client.start("nap", 1.0))
    await first.tells("point", "claimed")
    await asyncio.sleep(1.1)  # meanwhile nobody wakes up, then all at a time
    await first.stop_at("finish_sent#2")  # the first goes alone, the others together
    first.order("go")
    await first.tells("point", "finish_sent")
    sent = "select 1 from pg_stat_activity where query like '%call_finish_many%' and pid <> pg_backend_pid() "
    await wait_until(lambda: query(dsn, sent + "and datname = current_database()"))
    await processes.start("second")
    first.send(how)
    results = await asyncio.gather(*(handle.result(timeout=20) for handle in handles))
    assert results == [None] * 31
    if how is signal.SIGSTOP:  # a zombie that wakes up finds all of it done
        first.send(signal.SIGCONT)
        first.order("go")
        fresh = await client.start("nap", 0.1)
        assert await fresh.result(timeout=20) is None
        await fresh.delete()
    ended = "select count(*) from pgchan.messages where convert_from(body, 'UTF8') ~ '\"ended\"'"
    assert query(dsn, ended) == [(31,)]
    assert query(dsn, "select state, count(*) from pgchan.runs group by 1") == [("succeeded", 31)]


async def test_signals_that_are_sent_at_a_time_go_together_in_order(
    client: pgchan.AsyncClient, dsn: str, sent: Counter[str]
) -> None:
    handles = [await client.start(quick, number) for number in range(50)]
    sent.clear()
    messages = await asyncio.gather(*(handles[number % 50].signal(number) for number in range(300)))
    assert (sent[sql.DELIVER], sent[sql.DELIVER_MANY]) == (1, 3)  # one, a hundred, a hundred, ninety-nine
    assert [message.body for message in messages] == list(range(300))
    for number, handle in enumerate(handles):
        stored = await handle.channel.read()
        assert [message.body for message in stored] == list(range(number, 300, 50))
        assert stored == messages[number::50]


async def test_what_is_particular_to_a_signal_stays_so_in_company(
    client: pgchan.AsyncClient, dsn: str, sent: Counter[str], workers: Workers
) -> None:
    worker = await workers.start(quick)
    ended = await client.start(quick)
    await ended.result(timeout=20)
    await workers.stop(worker)
    handle, other = await client.start(quick, id="there"), await client.start(quick, id="other")
    await handle.signal(1, key="once")
    sent.clear()
    found = await asyncio.gather(
        other.signal(0),  # goes alone
        client.run("absent").signal(1),
        handle.signal(1, key="once"),
        handle.signal(2, key="once"),
        ended.signal(3),
        other.signal(4, key="once"),
        handle.signal(5),
        client.run("absent").signal(6),
        return_exceptions=True,
    )
    alone, absent, repeated, conflict, late, keyed, plain, absent_too = found
    assert (sent[sql.DELIVER], sent[sql.DELIVER_MANY]) == (1, 1)
    assert isinstance(absent, errors.RunNotFound)
    assert isinstance(absent_too, errors.RunNotFound)
    assert isinstance(conflict, errors.IdempotencyConflict)
    assert isinstance(late, errors.ChannelClosed)
    stored = await handle.channel.read()
    assert [(message.body, message.key) for message in stored] == [(1, "once"), (5, None)]
    assert [repeated, plain] == stored
    assert [alone, keyed] == await other.channel.read()
    assert keyed.key == "once"  # type: ignore[union-attr]


async def test_two_signals_of_one_key_at_a_time_are_one(client: pgchan.AsyncClient) -> None:
    handle = await client.start(quick)
    _, one, two, other = await asyncio.gather(
        handle.signal(0), handle.signal(1, key="twice"), handle.signal(1, key="twice"), handle.signal(2)
    )
    assert one == two
    assert {message.body for message in await handle.channel.read()} == {0, 1, 2}
    assert other.body == 2


async def test_a_signal_that_meets_a_lock_holds_up_no_other(client: pgchan.AsyncClient, dsn: str) -> None:
    held, *others = [await client.start(quick, id=f"run{number}") for number in range(21)]
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.signal('run0', '1')")
        stuck = [asyncio.create_task(held.signal(number)) for number in (2, 3)]
        for _ in range(3):  # one of them went first, the other in a group
            began = time.monotonic()
            await asyncio.gather(*(handle.signal(1) for handle in others))
            assert time.monotonic() - began < 3
        assert not any(task.done() for task in stuck)
        connection.commit()
    await asyncio.gather(*stuck)
    assert sorted(message.body for message in await held.channel.read()) == [1, 2, 3]


async def test_a_lost_answer_to_a_group_of_signals_stores_each_once(dsn: str) -> None:
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as client:
        handle = await client.start(quick)
        proxy.swallow(b"call_deliver_many")
        found = await asyncio.gather(
            *(handle.signal(number, key=f"key{number}") for number in range(30)), return_exceptions=True
        )
        assert proxy.swallowed == 1
        assert [isinstance(one, errors.Indefinite) for one in found] == [False] + [True] * 29  # the first went alone
        again = await asyncio.gather(*(handle.signal(number, key=f"key{number}") for number in range(30)))
        assert [message.body for message in again] == list(range(30))
        assert again == await handle.channel.read()


async def test_a_run_that_is_started_while_a_group_of_signals_waits_for_a_lock_is_not_in_it(
    client: pgchan.AsyncClient, dsn: str, wait_until: Callable[..., Any]
) -> None:
    """It is not locked, so it could go to sleep beside its signal and never hear of it."""
    await client.start(quick, id="there")
    many = "select d.outcomes from pgchan.deliver_many('{there,late}', array['1', '2']::bytea[], '{null,null}') d"
    with psycopg.connect(dsn) as connection:
        connection.execute("select 1 from pgchan.runs for update")
        waiting = asyncio.create_task(asyncio.to_thread(query, dsn, many))
        stuck = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        await wait_until(lambda: query(dsn, stuck))
        await client.start(quick, id="late")
        connection.rollback()
    assert await waiting == [(["appended", "missing"],)]
    assert await client.channel("late").read() == []


async def test_runs_that_wait_are_woken_by_signals_that_go_together(
    client: pgchan.AsyncClient, sent: Counter[str], workers: Workers, dsn: str, wait_until: Callable[..., Any]
) -> None:
    await workers.start(paused, linger=0.0)
    handles = await asyncio.gather(*(client.start(paused, number) for number in range(40)))
    waiting = "select count(*) from pgchan.runs where state = 'waiting'"
    for word in ("first", "second"):
        await wait_until(lambda: query(dsn, waiting) == [(40,)])
        await asyncio.gather(*(handle.signal(word) for handle in handles))
    results = await asyncio.gather(*(handle.result(timeout=20) for handle in handles))
    assert results == [["first", number] for number in range(40)]
    assert sent[sql.DELIVER_MANY] > 0


async def test_runs_that_are_taken_over_together_are_loaded_together(
    client: pgchan.AsyncClient, dsn: str, sent: Counter[str], workers: Workers, wait_until: Callable[..., Any]
) -> None:
    first = await workers.start(paused, linger=60.0)
    handles = await asyncio.gather(*(client.start(paused, number) for number in range(60)))
    for number, handle in enumerate(handles):
        await handle.signal(number)
    recorded = "select count(*) from pgchan.messages where step = 'quick' and kind = 0"
    await wait_until(lambda: query(dsn, recorded) == [(60,)])
    await workers.stop(first)
    sent.clear()
    await workers.start(paused)
    for handle in handles:
        await handle.signal("go on")
    assert await asyncio.gather(*(handle.result(timeout=20) for handle in handles)) == [[n, n] for n in range(60)]
    assert sent[sql.JOURNALS] <= 8
    assert sent[sql.SPOKEN] <= 8


async def test_results_of_runs_are_read_together(
    client: pgchan.AsyncClient, sent: Counter[str], workers: Workers
) -> None:
    handles = await asyncio.gather(*(client.start(quick, number) for number in range(40)))
    waiting = asyncio.gather(*(handle.result(timeout=20) for handle in handles for _ in range(3)))
    absent = asyncio.create_task(client.run("absent").result(timeout=20))
    await workers.start(quick)
    assert await waiting == [number for number in range(40) for _ in range(3)]
    with pytest.raises(errors.RunNotFound):
        await absent
    assert sent[sql.RUN_RESULTS] <= 60  # one by one it would be 360


# ------------------------------------------------------------------------------------------------ of anything


class Recorder:
    """Stands where a database would be: what was called, alone or together, and how that ends."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.error: errors.Error | None = None
        self.locked = False
        self.gate: asyncio.Event | None = None

    async def alone(self, *args: Any) -> Row:
        self.calls.append([args[0]])
        if self.gate is not None and args[0] == "slow":
            await self.gate.wait()
        await asyncio.sleep(0)
        return ("alone", None)

    async def together(self, calls: list[Arguments]) -> list[Row | None]:
        self.calls.append([args[0] for args in calls])
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return [None if self.locked else ("together", None)] * len(calls)


async def test_all_get_the_error_of_a_group_whose_fate_is_not_known() -> None:
    made = Recorder()
    made.error = errors.Indefinite("lost")
    group = Group(made.alone, made.together)
    first, *others = await asyncio.gather(*(group.call(n) for n in range(4)), return_exceptions=True)
    assert first == ("alone", None)
    assert others == [made.error] * 3
    assert made.calls == [[0], [1, 2, 3]]


@pytest.mark.parametrize("why", ["refused", "locked"])
async def test_each_goes_alone_when_a_group_was_not_done(why: str) -> None:
    made = Recorder()
    made.error, made.locked = (errors.InvalidInput("one of them"), False) if why == "refused" else (None, True)
    group = Group(made.alone, made.together)
    assert await asyncio.gather(*(group.call(n) for n in range(4))) == [("alone", None)] * 4
    assert made.calls == [[0], [1, 2, 3], [1], [2], [3]]


async def test_a_call_that_waits_for_long_is_overtaken() -> None:
    made = Recorder()
    made.gate = asyncio.Event()
    group = Group(made.alone, made.together)
    slow = asyncio.create_task(group.call("slow"))
    await asyncio.sleep(0)
    assert await asyncio.gather(group.call(1), group.call(2)) == [("together", None)] * 2
    assert not slow.done()
    assert await group.call(3) == ("alone", None)
    made.gate.set()
    assert await slow == ("alone", None)
    assert made.calls == [["slow"], [1, 2], [3]]


async def test_a_caller_that_is_cancelled_leaves_the_others_alone() -> None:
    made = Recorder()
    made.gate = asyncio.Event()
    group = Group(made.alone, made.together)
    tasks = [asyncio.create_task(group.call(name)) for name in ("slow", 1, 2)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    assert await tasks[2] == ("together", None)
    await group.close()
    assert await group.call(3) == ("alone", None)


async def test_groups_are_bounded_and_hold_no_first_argument_twice() -> None:
    made = Recorder()
    group = Group(made.alone, made.together)
    await asyncio.gather(*(group.call(n) for n in [0, "a", "b", "a", "c", *range(1, 2 * TOGETHER_MAX)]))
    assert [len(call) for call in made.calls] == [1, 2, TOGETHER_MAX, TOGETHER_MAX, 1]
    made.calls.clear()
    alike = Group(made.alone, made.together, alike=True)
    await asyncio.gather(*(alike.call(*args) for args in [(0,), ("a", 1), ("a", 1), ("b", 1), ("a", 2)]))
    assert made.calls == [[0], ["a", "a", "b"], ["a"]]
    made.calls.clear()
    await asyncio.gather(*(group.call(n, b"x" * 1_500_000) for n in range(8)))
    assert max(map(len, made.calls)) == 2
    assert sorted(n for call in made.calls for n in call) == list(range(8))


