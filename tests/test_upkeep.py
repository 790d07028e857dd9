"""The upkeep: what is removed and when, what must stay, in batches, by one worker at a time; and a week of it.

Long, because each rule has a test of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from doors import Door, query
from workers import Process, Processes, Workers

import pgchan
from pgchan import doctor, errors
from pgchan import worker as worker_module

DAY = 86_400.0


def upkeep(dsn: str, most: int = 2000) -> list[tuple[int, int]]:
    """Batch after batch until nothing is left to do; how many channels and messages each removed."""
    batches = []
    more = True
    while more:
        ((channels, messages, more),) = query(dsn, "select channels, messages, more from pgchan.upkeep(%s)", most)
        batches.append((channels, messages))
    return batches


def names(dsn: str) -> list[str]:
    return [name for (name,) in query(dsn, "select name from pgchan.channel_status order by name")]


def nothing_is_left_behind(dsn: str) -> bool:
    """No message without a channel, no journal without a run, and no work for later."""
    return query(
        dsn,
        "select (select count(*) from pgchan.messages m where m.channel_id not in (select id from pgchan.channels)), "
        "(select count(*) from pgchan.channels c where c.name like 'pgchan:%%' and not exists "
        "(select from pgchan.runs r where r.journal_id = c.id)), (select count(*) from pgchan.removed)",
    ) == [(0, 0, 0)]


def fill(dsn: str, channel: str, count: int) -> None:
    """A channel with so many messages, written past the routines because one by one takes long."""
    query(dsn, "select pgchan.create_channel(%s, 'application/json', null)", channel)
    query(
        dsn,
        "insert into pgchan.messages (channel_id, position, at, kind, body) "
        "select c.id, n, clock_timestamp(), 0, '1' from pgchan.channels c, generate_series(1, %s) n where c.name = %s",
        count, channel,
    )  # fmt: skip
    query(dsn, "update pgchan.channels set head = %s where name = %s", count, channel)


# ------------------------------------------------------------------------------------------------ ended runs


@pgchan.workflow
async def essay(run: pgchan.Run, topic: str) -> str:
    return await run.step(write, topic)


async def write(topic: str) -> str:
    await pgchan.current_run().publish(f"about {topic}")
    return topic


@pytest.fixture
def client(door: Door) -> Any:
    return door.client()


async def test_ended_runs_are_kept_for_ever_unless_somebody_says_otherwise(client: Any, dsn: str) -> None:
    await client.start(essay, "a", id="r")
    await client.run("r").cancel()
    query(dsn, "update pgchan.runs set ended_at = ended_at - interval '9 years'")
    assert upkeep(dsn) == [(0, 0)]
    await client.set_retention(ended_runs=timedelta(days=365))
    assert upkeep(dsn) == [(1, 1)]
    await client.start(essay, "a", id="r")
    await client.run("r").cancel()
    await client.set_retention(ended_runs=None)
    query(dsn, "update pgchan.runs set ended_at = ended_at - interval '9 years'")
    assert upkeep(dsn) == [(0, 0)]


async def test_a_run_goes_with_all_it_said_and_recorded_when_it_ended_long_enough_ago(
    client: Any, dsn: str, workers: Workers
) -> None:
    worker = await workers.start(essay)
    for id in ("old", "young"):
        assert await (await client.start(essay, "a", id=id)).result() == "a"
    await workers.stop(worker)
    await client.start(essay, "a", id="waits")
    query(dsn, "update pgchan.runs r set ended_at = ended_at - interval '31 days' "
               "from pgchan.channels c where c.id = r.channel_id and c.name = 'old'")  # fmt: skip
    await client.set_retention(ended_runs=30 * DAY)
    ((held,),) = query(
        dsn,
        "select count(*) from pgchan.messages m join pgchan.runs r on m.channel_id in (r.channel_id, r.journal_id) "
        "join pgchan.channels c on c.id = r.channel_id where c.name = 'old'",
    )
    assert held >= 3, "what it said and its end; in its journal a result, and a start if the step took a moment"
    assert upkeep(dsn) == [(1, held)]
    assert names(dsn) == ["waits", "young"]
    assert nothing_is_left_behind(dsn)
    with pytest.raises(errors.RunNotFound):
        await client.run("old").status()
    with pytest.raises(errors.RunNotFound):
        await client.run("old").signal("too late")
    assert await client.run("young").result() == "a"


async def test_after_removal_an_id_and_a_name_begin_anew(door: Door, dsn: str, workers: Workers) -> None:
    client, other = door.client(), door.client()
    await client.start(essay, "a", id="r")
    reader = other.channel("r")
    assert (await client.run("r").signal("x")).position == 1
    assert (await other.channel("r").publish("known by its id now")).position == 2
    await client.run("r").cancel()
    await client.set_retention(ended_runs=0)
    upkeep(dsn)
    assert (await other.channel("r").publish("first")).position == 1
    await workers.start(essay)
    again = await client.start(essay, "another topic", id="r")
    assert again.created
    assert await again.result() == "another topic"
    assert [message.body for message in await reader.read()][:2] == ["first", "about another topic"]


async def test_a_run_that_has_not_ended_stays_whatever_its_channel_says(client: Any, dsn: str) -> None:
    await client.channel("r").create(ttl=0.001)
    await client.set_retention(ended_runs=0)
    await client.start(essay, "a", id="r")
    for state in ("scheduled", "running", "waiting"):
        query(dsn, "update pgchan.runs set state = %s", state)
        assert upkeep(dsn) == [(0, 0)], state
    query(dsn, "update pgchan.runs set state = 'scheduled'")
    await client.run("r").cancel()
    assert upkeep(dsn) == [(1, 1)]


async def test_a_channel_with_a_ttl_goes_by_that_and_not_by_the_end_of_its_run(client: Any, dsn: str) -> None:
    await client.channel("kept").create(ttl=DAY)
    await client.set_retention(ended_runs=0)
    await client.start(essay, "a", id="kept")
    await client.run("kept").cancel()
    assert upkeep(dsn) == [(0, 0)]
    query(dsn, "update pgchan.channels set expires_at = clock_timestamp() where name = 'kept'")
    assert upkeep(dsn) == [(1, 1)]
    assert nothing_is_left_behind(dsn)


@pgchan.workflow
async def mother(run: pgchan.Run, again: bool) -> str:
    """Starts a child, is told when to ask for its result, and may begin anew first."""
    child = await run.start(essay, "child", id=f"{run.id}/child")
    await run.receive()
    if again:
        await run.continue_as(False)
    return str(await child.result())


async def test_a_child_stays_until_its_parent_cannot_ask_for_it(dsn: str, workers: Workers, wait_until: Any) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        await workers.start(essay, mother)
        handle = await client.start(mother, False, id="m")
        await wait_until(lambda: query(dsn, "select pgchan.status('m/child') ->> 'state'") == [("succeeded",)])
        await client.set_retention(ended_runs=0)
        assert upkeep(dsn) == [(0, 0)]
        await client.set_retention(ended_runs=None)
        await handle.signal("ask")
        assert await handle.result() == "child"
        await client.set_retention(ended_runs=0)
        while names(dsn):
            upkeep(dsn)
        assert nothing_is_left_behind(dsn)


async def test_a_child_of_a_parent_that_began_anew_goes(dsn: str, workers: Workers, wait_until: Any) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        await workers.start(essay, mother)
        handle = await client.start(mother, True, id="m")
        await wait_until(lambda: query(dsn, "select pgchan.status('m/child') ->> 'state'") == [("succeeded",)])
        journal = "select name from pgchan.channels where name like 'pgchan:journal:%:%'"
        before = query(dsn, journal)
        await handle.signal("again")
        await wait_until(lambda: query(dsn, journal) != before)
        await client.set_retention(ended_runs=0)
        await wait_until(lambda: upkeep(dsn) and names(dsn) == ["m"])


# ------------------------------------------------------------------------------------------------ expired channels


async def test_readers_of_a_removed_channel_are_told(client: Any, dsn: str, reading: Any) -> None:
    await client.channel("c").create(ttl=DAY)
    await client.channel("c").publish("only")
    reader = reading(client.channel("c").tail())
    await reader.has(1)
    query(dsn, "update pgchan.channels set expires_at = clock_timestamp()")
    upkeep(dsn)
    with pytest.raises(errors.HistoryLost):
        await reader.end()


async def test_what_a_caller_has_locked_is_passed_over_without_waiting(client: Any, dsn: str) -> None:
    await client.set_retention(ended_runs=0)
    for name in ("free", "locked"):
        await client.channel(name).create(ttl=0.001)
        await client.start(essay, "a", id=f"run/{name}")
        await client.run(f"run/{name}").cancel()
    with psycopg.connect(dsn) as caller:
        caller.execute("select pgchan.publish('locked', '1')")
        caller.execute("select from pgchan.channels where name = 'run/locked' for update")
        assert upkeep(dsn) == [(2, 1)]
        assert names(dsn) == ["locked", "run/locked"]
        caller.rollback()
    assert upkeep(dsn) == [(2, 1)]
    assert nothing_is_left_behind(dsn)


async def test_a_run_that_is_started_on_an_expired_channel_at_the_same_moment_stays(client: Any, dsn: str) -> None:
    await client.channel("c").create(ttl=0.001)
    with psycopg.connect(dsn) as caller:
        caller.execute("select pgchan.start('essay', id => 'c')")
        assert upkeep(dsn) == [(0, 0)]
    assert upkeep(dsn) == [(0, 0)]
    assert (await client.run("c").status()).state == "scheduled"


# ------------------------------------------------------------------------------------------------ trimming


async def test_a_channel_keeps_its_last_messages(client: Any, dsn: str) -> None:
    channel = client.channel("c")
    await channel.publish_many(list(range(1, 11)))
    await channel.set_retention(messages=4)
    info = await channel.info()
    assert (info.keep_messages, info.keep_seconds) == (4, None)
    assert upkeep(dsn) == [(0, 6)]
    assert [message.position for message in await channel.read()] == [7, 8, 9, 10]
    assert upkeep(dsn) == [(0, 0)]
    await channel.publish(11)
    await channel.set_retention()
    assert upkeep(dsn) == [(0, 0)]


async def test_a_channel_keeps_what_is_young(client: Any, dsn: str) -> None:
    channel = client.channel("c")
    await channel.publish_many(list(range(1, 11)))
    query(dsn, "update pgchan.messages set at = at - interval '2 days' where position <= 7")
    await channel.set_retention(seconds=timedelta(days=1), messages=100)
    assert upkeep(dsn) == [(0, 7)]
    assert (await channel.info()).trimmed == 7
    query(dsn, "update pgchan.messages set at = at - interval '2 days'")
    assert upkeep(dsn) == [(0, 3)]
    assert (await channel.publish("next")).position == 11


async def test_a_reader_that_stands_before_what_is_kept_is_told_trimmed(client: Any, dsn: str) -> None:
    channel = client.channel("c")
    messages = await channel.publish_many(list(range(1, 11)))
    tail = channel.tail()
    assert len(await tail.next_page()) == 10
    await channel.set_retention(messages=5)
    upkeep(dsn)
    with pytest.raises(errors.Trimmed) as caught:
        await channel.read(after=messages[2].cursor)
    assert (caught.value.first, caught.value.last) == (6, 10)
    assert [message.position for message in await channel.read(after=messages[4].cursor)] == [6, 7, 8, 9, 10]
    await channel.publish(11)
    assert [message.position for message in await tail.next_page()] == [11], "who is ahead of it notices nothing"


async def test_signals_that_nobody_consumed_and_what_a_living_run_says_are_not_trimmed(client: Any, dsn: str) -> None:
    channel = client.channel("r")
    await channel.publish_many(["before", "before"])
    await client.start(essay, "a", id="r")
    await channel.publish("said")
    await channel.set_retention(messages=1)
    assert upkeep(dsn) == [(0, 2)]
    query(dsn, "update pgchan.runs set speaks_from = 5")  # as if it had begun anew
    await client.run("r").signal("wanted")
    await channel.publish_many(["said", "said"])
    assert upkeep(dsn) == [(0, 1)]
    assert [message.body for message in await channel.read()] == ["wanted", "said", "said"]
    await client.run("r").cancel()
    assert upkeep(dsn) == [(0, 3)]


@pytest.mark.parametrize("options", [{"messages": 0}, {"messages": 1.5}, {"seconds": -1}, {"seconds": float("nan")}])
async def test_what_a_channel_can_keep_is_checked(client: Any, options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidInput, match=next(iter(options))):
        await client.channel("c").set_retention(**options)
    with pytest.raises(errors.ChannelNotFound):
        await client.channel("c").set_retention(messages=1)
    with pytest.raises(errors.InvalidInput, match="ended_runs"):
        await client.set_retention(ended_runs=-1)


@pytest.mark.parametrize("call", [
    "set_retention(-1)", "set_retention('nan')", "set_retention('infinity')", "set_channel_retention('c', 0, null)",
    "set_channel_retention('c', null, -1)", "set_channel_retention('c', null, 'nan')",
])  # fmt: skip
def test_sql_is_refused_what_cannot_be_kept(dsn: str, call: str) -> None:
    query(dsn, "select pgchan.publish('c', '1')")
    with pytest.raises(psycopg.Error) as caught:
        query(dsn, f"select pgchan.{call}")
    assert caught.value.sqlstate == "PC001"


# ------------------------------------------------------------------------------------------------ batches


async def test_a_large_channel_is_gone_at_once_and_deleted_bit_by_bit(client: Any, dsn: str) -> None:
    fill(dsn, "large", 25_000)
    await client.channel("large").delete()
    assert names(dsn) == []
    assert query(dsn, "select count(*) from pgchan.messages") == [(25_000,)]
    assert (await client.channel("large").publish("anew")).position == 1
    batches = upkeep(dsn, 1000)
    assert batches == [(0, 1000)] * 25 + [(0, 0)]
    assert [message.body for message in await client.channel("large").read()] == ["anew"]
    assert nothing_is_left_behind(dsn)


async def test_no_batch_removes_more_than_it_may(client: Any, dsn: str) -> None:
    await client.set_retention(ended_runs=0)
    for n in range(3):
        fill(dsn, f"expired/{n}", 3_000)
        fill(dsn, f"kept/{n}", 3_000)
        await client.channel(f"kept/{n}").set_retention(messages=100)
    query(dsn, "update pgchan.channels set expires_at = clock_timestamp() where name like 'expired/%%'")
    query(dsn, "select pgchan.cancel(pgchan.start('essay', id => 'run/' || n)) from generate_series(1, 1200) n")
    batches = upkeep(dsn)
    assert max(messages for _, messages in batches) == 2000
    assert max(channels for channels, _ in batches) <= 500 + 3
    assert sum(channels for channels, _ in batches) == 1203
    assert sum(messages for _, messages in batches) == 3 * 3_000 + 3 * 2_900 + 1200
    assert names(dsn) == ["kept/0", "kept/1", "kept/2"]
    assert nothing_is_left_behind(dsn)


async def test_what_must_stay_does_not_keep_the_upkeep_from_the_rest(client: Any, dsn: str) -> None:
    await client.start(essay, "a", id="parent")
    query(dsn, "select pgchan.enqueue('child/' || n, 'essay', null, 'default', 0, null, null, '{\"args\":[]}', "
               "(select channel_id from pgchan.runs)) from generate_series(1, 1200) n")  # fmt: skip
    query(dsn, "select pgchan.cancel('child/' || n) from generate_series(1, 1200) n")
    await client.start(essay, "a", id="removable")
    await client.run("removable").cancel()
    await client.set_retention(ended_runs=0)
    rounds = [upkeep(dsn) for _ in range(3)]
    assert rounds == [[(0, 0)], [(0, 0)], [(1, 1)]], "each looks at 500 candidates, and goes on where the last one was"
    assert len(names(dsn)) == 1201


# ------------------------------------------------------------------------------------------------ one at a time


def test_of_two_at_once_one_goes_on_with_its_work(direct_dsn: str) -> None:
    dsn = direct_dsn  # it ends a session, by its pid
    fill(dsn, "c", 10)
    query(dsn, "select pgchan.set_channel_retention('c', 1, null)")
    first = psycopg.connect(dsn)
    with psycopg.connect(dsn, autocommit=True) as second:
        assert first.execute("select * from pgchan.upkeep()").fetchall() == [(0, 9, False)]
        assert second.execute("select * from pgchan.upkeep()").fetchall() == [(None, None, None)]
        second.execute("select pg_terminate_backend(%s, 5000)", [first.info.backend_pid])
        assert second.execute("select count(*) from pgchan.messages").fetchone() == (10,), "all of it or nothing"
        assert second.execute("select * from pgchan.upkeep()").fetchall() == [(0, 9, False)]
    first.close()


async def test_a_worker_does_it_by_itself(
    dsn: str, workers: Workers, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "UPKEEP_SECONDS", 0.1)
    await workers.start(essay)
    fill(dsn, "c", 5_000)
    query(dsn, "select pgchan.set_channel_retention('c', 10, null)")
    query(dsn, "select pgchan.create_channel('short', 'application/json', 0.001)")
    await wait_until(lambda: query(dsn, "select name, head - trimmed from pgchan.channel_status") == [("c", 10)])


async def test_another_worker_goes_on_where_one_was_killed(dsn: str, processes: Processes, wait_until: Any) -> None:
    fill(dsn, "large", 20_000)
    query(dsn, "update pgchan.channels set expires_at = clock_timestamp()")
    first: Process = processes.begin("first", at="upkept")
    await first.tells("point", "upkept")
    left = query(dsn, "select head - trimmed from pgchan.removed")
    first.kill()
    assert left in ([(20_000,)], [(18_000,)])
    await processes.start("second")
    await wait_until(lambda: nothing_is_left_behind(dsn))
    assert names(dsn) == []
    await wait_until(lambda: query(dsn, "select name from pgchan.worker_status") == [("second",)])


async def test_who_publishes_hardly_notices(dsn: str) -> None:
    fill(dsn, "hot", 40_000)
    async with pgchan.AsyncClient(dsn) as client:
        channel = client.channel("hot")
        await channel.set_retention(messages=100)
        trimming = asyncio.create_task(asyncio.to_thread(upkeep, dsn))
        seconds = []
        while not trimming.done():
            began = time.monotonic()
            await channel.publish("x")
            seconds.append(time.monotonic() - began)
        assert len(await trimming) >= 20
    print(f"{len(seconds)} publishes beside 20 batches on one channel: the longest took {max(seconds):.3f} s")
    assert max(seconds) < 1.0


async def test_the_doctor_says_what_should_be_gone(dsn: str) -> None:
    async def verdict() -> tuple[bool, str]:
        (found,) = [finding for finding in await doctor.check(dsn) if finding.check == "upkeep"]
        return found.is_fine, found.detail

    assert await verdict() == (True, "nothing is overdue; ended runs are kept for ever")
    query(dsn, "select pgchan.set_retention(60)")
    query(dsn, "select pgchan.create_channel('c', 'application/json', 60)")
    query(dsn, "select pgchan.cancel(pgchan.start('essay', id => 'r'))")
    assert await verdict() == (True, "nothing is overdue; ended runs are kept for 60 s")
    query(dsn, "update pgchan.channels set expires_at = expires_at - interval '1 hour'")
    query(dsn, "update pgchan.runs set ended_at = ended_at - interval '1 hour'")
    is_fine, detail = await verdict()
    assert not is_fine
    assert detail.startswith("1 channel(s) and 1 ended run(s) should be gone by now; is a worker up?")


# ------------------------------------------------------------------------------------------------ a week

HOURS = 7 * 24
RUNS_PER_HOUR = 40
# To each of the channels, given as ids and whether they are journals, so many messages in one batch.
APPEND = """
    with channels as (select id, is_journal, row_number() over (order by id)::integer as slot
                      from ({channels}) c (id, is_journal)),
    entries as (select slot, nth, case when is_journal then 'step-' || nth end as key
                from channels, generate_series(1, {count}) nth)
    select pgchan.append((select array_agg(id order by slot) from channels), null, null, null, null,
                         (select array_agg({count}) from channels), null, array_agg(slot order by slot, nth),
                         array_agg(nth order by slot, nth), null, array_agg(key order by slot, nth), null, null, null,
                         array_agg(repeat('1', 100)::bytea)) from entries
"""
RUNS = "select channel_id, false from claimed union all select journal_id, true from claimed"
CHATS = "select id, false from pgchan.channels where name like 'chat/%'"
SIZES = """
    select c.relname, pg_relation_size(c.oid) / current_setting('block_size')::integer, c.relkind = 'r'
    from pg_class c where c.relnamespace = 'pgchan'::regnamespace and c.relkind in ('r', 'i')
      and c.relname not like 'alembic%' order by c.relname
"""


class Week:
    """A week of traffic in which an hour lasts for as long as its statements take.

    The clock is not touched. What a rule of 24 hours means is told in the seconds that the last 24 of these hours took.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.began: list[float] = []
        self.execute("create temp table claimed as select * from pgchan.claim(0, '{}', '{}', 0)")
        for n in range(5):
            self.execute("select pgchan.create_channel('chat/' || %s, 'application/json', null)", n)

    def execute(self, statement: str, *arguments: Any) -> Any:
        return self.connection.execute(statement.encode(), arguments or None)

    def seconds(self, hours: int) -> float:
        """How long ago it was so many hours ago; a day at first."""
        return time.monotonic() - self.began[-1 - hours] if hours < len(self.began) else DAY

    def hour(self) -> None:
        """Runs from start to end, chats, channels that live for six hours, a worker that comes and goes."""
        n = len(self.began)
        self.began.append(time.monotonic())
        ((worker,),) = self.execute("select pgchan.new_worker()").fetchall()
        self.execute("select pgchan.register(%s, 'w', 'here', 1)", worker)
        self.execute("select pgchan.start('w', id => 'run-' || %s || '-' || n) from generate_series(1, %s) n",
                     n, RUNS_PER_HOUR)  # fmt: skip
        self.execute("truncate claimed")
        self.execute("insert into claimed select * from pgchan.claim(%s, '{default}', '{w}', 1000)", worker)
        self.execute(APPEND.format(channels=RUNS, count=2))
        self.execute("select pgchan.finish(channel_id, epoch, 'succeeded', '1', null) from claimed")
        self.execute("select pgchan.leave(%s)", worker)
        self.execute(APPEND.format(channels=CHATS, count=20))
        short = "generate_series(1, 10) n, cast('short-' || %s || '-' || n as text) name"
        self.execute(f"select pgchan.create_channel(name, 'application/json', 1e6) from {short}", n)
        self.execute(f"select pgchan.publish(name, '1') from {short}", n)

    def sizes(self) -> dict[str, tuple[int, int | None]]:
        """Of each table and index the pages, and of tables the rows."""
        return {
            name: (pages, self.execute(f"select count(*) from pgchan.{name}").fetchone()[0] if is_table else None)
            for name, pages, is_table in self.execute(SIZES).fetchall()
        }

    def tidy(self) -> None:
        """What the workers and the autovacuum do in that hour."""
        n = len(self.began) - 1
        self.execute("update pgchan.channels set expires_at = clock_timestamp() "
                     "where name like 'short-' || %s || '-%%'", n - 6)  # fmt: skip
        self.execute("select pgchan.set_retention(%s)", self.seconds(24))
        self.execute("select pgchan.set_channel_retention('chat/' || n, 300, %s) "
                     "from generate_series(0, 4) n", self.seconds(12))  # fmt: skip
        more = True
        while more:
            ((_, _, more),) = self.execute("select * from pgchan.upkeep()").fetchall()
        # It comes each minute to tables of which enough has changed: 2 % here, 20 % of the messages, which takes hours.
        self.execute("vacuum analyze pgchan.channels, pgchan.runs, pgchan.workers, pgchan.retention, pgchan.removed")
        if n % 6 == 5:
            self.execute("vacuum analyze pgchan.messages")


@pytest.fixture
def week(dsn: str) -> Iterator[Week]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set synchronous_commit = off")  # the routines force it where it counts
        yield Week(connection)


def test_a_week_of_traffic_leaves_tables_and_indexes_as_large_as_two_days(
    week: Week, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    days: list[dict[str, tuple[int, int | None]]] = []
    for hour in range(HOURS):
        week.hour()
        week.tidy()
        if hour % 24 == 23:
            days.append(week.sizes())
    with capsys.disabled():
        print(f"\n{HOURS} hours of {RUNS_PER_HOUR} runs in {time.monotonic() - began:.0f} s; pages/rows after each day")
        for name in days[0]:
            cells = [f"{pages}" if rows is None else f"{pages}/{rows}" for pages, rows in (day[name] for day in days)]
            print(f"  {name:<20}" + "".join(f"{cell:>12}" for cell in cells))
    for name, (pages, rows) in days[-1].items():
        before_pages, before_rows = days[1][name]
        assert pages <= 1.25 * before_pages + 4, f"{name} grows: {[day[name] for day in days]}"
        assert rows is None or rows <= 1.05 * (before_rows or 0) + 1, f"{name} grows: {[day[name] for day in days]}"
    assert days[-1]["runs"][1] == days[1]["runs"][1] == 25 * RUNS_PER_HOUR
