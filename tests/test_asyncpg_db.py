"""What only the async door does: the writer's batches, cancelled tasks, event loops, forks, bounds of memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
from doors import query
from proxy import Proxy

import pgchan
from pgchan import asyncpg_db, db, errors, writer
from pgchan.db import Entry

WaitUntil = Callable[..., Awaitable[None]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


async def channel_id(client: pgchan.AsyncClient, name: str, dsn: str | None = None) -> int:
    await client.channel(name).create()
    ((found,),) = query(dsn or client.dsn, "select id from pgchan.channels where name = %s", name)
    return int(found)


async def words(client: pgchan.AsyncClient, *entries: Entry) -> list[str]:
    """What becomes of entries that are appended at the same time."""
    before = client.stats["writes"]
    outcomes = await asyncio.gather(*(client._db.append(entry) for entry in entries))
    assert client.stats["writes"] == before + 1, "they went in one batch"
    return [outcome.word for outcome in outcomes]


# ------------------------------------------------------------------------------------------------ group commit


async def test_publishes_at_the_same_time_share_a_commit(client: pgchan.AsyncClient) -> None:
    await client.channel("warm").publish(0)
    before = dict(client.stats)
    await asyncio.gather(*(client.channel(f"c{n % 10}").publish(n) for n in range(500)))
    assert client.stats["entries"] - before["entries"] == 500
    assert client.stats["writes"] - before["writes"] <= 10


async def test_each_entry_of_a_batch_has_an_outcome_of_its_own(client: pgchan.AsyncClient) -> None:
    good, closed, owned = [await channel_id(client, name) for name in ("good", "closed", "owned")]
    await client.channel("good").publish("first", key="k")
    await client.channel("closed").close()
    await client.channel("text").create("text/plain")
    assert await words(
        client,
        Entry("good", b"1", channel_id=good), Entry("closed", b"1", channel_id=closed),
        Entry("owned", b"1", channel_id=owned, fence=7), Entry("gone", b"1", channel_id=10**9),
        Entry("good", b"2", channel_id=good, key="k"), Entry("new", b"1"), Entry("text", b"1"),
    ) == ["appended", "closed", "fenced", "missing", "conflict", "appended", "type"]  # fmt: skip
    assert [message.body for message in await client.channel("good").read()] == ["first", 1]


async def test_entries_of_one_owner_are_written_together_or_not_at_all(client: pgchan.AsyncClient) -> None:
    one, two, other = [await channel_id(client, name) for name in ("one", "two", "other")]

    def trio(body: bytes) -> list[Entry]:
        own = [Entry(n, body, channel_id=i, owner=1, fence=0) for n, i in (("one", one), ("two", two))]
        return [*own, Entry("other", body, channel_id=other)]

    assert await words(client, *trio(b"1")) == ["appended"] * 3
    await client.channel("two").close()
    assert await words(client, *trio(b"2")) == ["blocked", "closed", "appended"]
    stale = Entry("one", b"3", channel_id=one, owner=2, fence=9)
    assert await words(client, stale, Entry("other", b"3", channel_id=other)) == ["fenced", "appended"]
    assert [m.body for m in await client.channel("one").read()] == [1]
    assert [m.body for m in await client.channel("other").read()] == [1, 2, 3]


async def test_an_owners_inbox_moves_with_its_entries_only(client: pgchan.AsyncClient, dsn: str) -> None:
    one = await channel_id(client, "one")
    await client._db.append(Entry("one", b"1", channel_id=one, owner=1, fence=0, inbox=5))
    await client._db.append(Entry("one", b"1", channel_id=one, owner=1, fence=3, inbox=9))
    await client._db.append(Entry("one", b"1", channel_id=one, owner=1, fence=0, inbox=2))
    assert query(dsn, "select inbox, head from pgchan.channels where name = 'one'") == [(5, 2)]


async def test_a_lost_answer_never_repeats_what_stood_beside_a_superseded_owner(dsn: str) -> None:
    """That nothing of the owner is there does not tell whether the batch was committed: it may have been fenced."""
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as client:
        owned = await channel_id(client, "owned", dsn)
        await client.channel("free").publish("warm")
        client._db.writer.heads[owned] = 0
        proxy.swallow(b'"beside"')
        fenced, unkeyed, keyed = await asyncio.gather(
            client._db.append(Entry("owned", b"1", channel_id=owned, owner=1, fence=9, step="s", attempt=1)),
            client.channel("free").publish("beside"),
            client.channel("free").publish("keyed", key="k"),
            return_exceptions=True,
        )
        assert isinstance(fenced, errors.Indefinite)
        assert isinstance(unkeyed, errors.Indefinite)
        assert isinstance(keyed, pgchan.Message) and keyed.position == 3
        assert [m.body for m in await client.channel("free").read()] == ["warm", "beside", "keyed"]


async def test_a_lost_answer_is_found_by_what_an_owner_wrote(dsn: str) -> None:
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as client:
        owned = await channel_id(client, "owned", dsn)
        client._db.writer.heads[owned] = 0
        await client.channel("free").publish("warm")
        proxy.swallow(b'"output"')
        outcomes = await asyncio.gather(
            *(client._db.append(Entry("owned", b'"output"', channel_id=owned, owner=1, fence=0, step="s", attempt=1))
              for _ in range(3))
        )  # fmt: skip
        assert [(outcome.word, outcome.position) for outcome in outcomes] == [("appended", n) for n in (1, 2, 3)]
        assert len(await client.channel("owned").read()) == 3


async def test_an_owner_that_ends_while_a_lost_answer_is_looked_for_takes_nobody_along(dsn: str) -> None:
    async with Proxy(dsn) as proxy, pgchan.AsyncClient(proxy.dsn) as client:
        owned = await channel_id(client, "owned", dsn)
        await client.channel("free").publish("warm")
        client._db.writer.heads[owned] = 0

        async def owner_ends(_: object) -> set[int]:
            del client._db.writer.heads[owned]
            return set()

        client._db.look_backs.append(owner_ends)
        proxy.swallow(b'"output"')
        ours, keyed = await asyncio.gather(
            client._db.append(Entry("owned", b'"output"', channel_id=owned, owner=1, fence=0, step="s", attempt=1)),
            client.channel("free").publish("keyed", key="k"),
        )
        assert (ours.word, ours.position) == ("appended", 1)
        assert keyed.position == 2


async def test_an_owner_whose_history_is_lost_writes_no_more_and_the_others_do(
    direct_dsn: str, wait_until: WaitUntil
) -> None:
    async with pgchan.AsyncClient(direct_dsn) as client:
        owned = await channel_id(client, "owned")
        await client.channel("free").publish("warm")

        async def history_is_lost(_: object) -> set[int]:
            return {1}

        client._db.look_backs.append(history_is_lost)
        writers = "from pg_stat_activity where application_name = 'pgchan writer' and datname = current_database()"
        query(direct_dsn, f"select pg_terminate_backend(pid) {writers}")
        await wait_until(lambda: not query(direct_dsn, f"select 1 {writers}"))
        refused, free = await asyncio.gather(
            client._db.append(Entry("owned", b"1", channel_id=owned, owner=1, fence=0, step="s", attempt=1)),
            client.channel("free").publish("goes on"),
            return_exceptions=True,
        )
        assert isinstance(refused, errors.Fenced)
        assert isinstance(free, pgchan.Message) and free.position == 2
        assert await client.channel("owned").read() == []


# ------------------------------------------------------------------------------------------------ tasks


async def test_a_cancelled_publish_is_stored_once_or_not_and_the_others_go_on(client: pgchan.AsyncClient) -> None:
    channel = client.channel("c")
    await channel.publish("warm")
    tasks = [asyncio.create_task(channel.publish(n)) for n in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in done[::2])
    stored = [message.body for message in await channel.read(after=1, limit=1000)]
    assert set(range(1, 50, 2)) <= set(stored)
    assert len(stored) == len(set(stored))


async def test_a_cancelled_batch_leaves_no_transaction_open(client: pgchan.AsyncClient, wait_until: WaitUntil) -> None:
    await client.channel("c").publish("warm")
    with psycopg.connect(client.dsn) as connection:
        connection.execute("select pgchan.publish('c', '1')")
        task = asyncio.create_task(client.channel("c").publish_many(list(range(2000))))
        ours = "select 1 from pg_stat_activity where datname = current_database() and application_name = 'pgchan pool'"
        await wait_until(lambda: query(client.dsn, f"{ours} and wait_event_type = 'Lock'"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        connection.rollback()
    await wait_until(lambda: not query(client.dsn, f"{ours} and xact_start is not null"))
    assert (await client.channel("c").publish("next")).position == 2


async def test_closing_writes_what_waits(dsn: str) -> None:
    client = pgchan.AsyncClient(dsn)
    await client.channel("c").publish("warm")
    tasks = [asyncio.create_task(client.channel("c").publish(n)) for n in range(300)]
    await asyncio.sleep(0)
    await client.close()
    assert [message.position for message in await asyncio.gather(*tasks)] == list(range(2, 302))


async def test_a_client_leaves_no_task_and_no_connection_behind(direct_dsn: str, wait_until: WaitUntil) -> None:
    dsn = direct_dsn  # a pooler keeps its connections
    before = asyncio.all_tasks()
    async with pgchan.AsyncClient(dsn) as client:
        tail = client.channel("c").tail()
        await client.channel("c").publish(1)
        await anext(tail)
    assert asyncio.all_tasks() == before
    ours = "select 1 from pg_stat_activity where datname = current_database() and application_name like 'pgchan %'"
    await wait_until(lambda: not query(dsn, ours))


async def test_many_first_readers_cost_one_check_and_one_listening_connection(
    direct_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles: list[str] = []
    connect = asyncpg_db.AsyncpgDb.connect

    async def counted(self: asyncpg_db.AsyncpgDb, role: str, *, direct: bool = False) -> asyncpg_db.Connection:
        roles.append(role)
        return await connect(self, role, direct=direct)

    monkeypatch.setattr(asyncpg_db.AsyncpgDb, "connect", counted)
    async with pgchan.AsyncClient(direct_dsn) as client:
        tails = [client.channel(f"c/{number}").tail() for number in range(200)]
        await asyncio.gather(*(tail.next_page(0) for tail in tails))
    assert (roles.count("probe"), roles.count("listen")) == (1, 1)


async def test_a_reader_waits_as_long_as_it_says_whatever_ended_the_wait_before(
    client: pgchan.AsyncClient, wait_until: WaitUntil
) -> None:
    channel = client.channel("waits")
    await channel.publish("first")
    follow = await client._db.follow(channel.name)
    for before, seconds in ((60.0, 0.2), (1.0, 1.4)):  # its timer is set for later, and for sooner
        waiting = asyncio.create_task(follow.wait(before))
        await wait_until(lambda: client._db.listener._waiters)
        await channel.publish("news")
        await waiting
        began = time.monotonic()
        await follow.wait(seconds)
        assert seconds <= time.monotonic() - began < 10
    follow.unfollow()
    assert not client._db.listener._waiters


async def test_what_waits_in_memory_is_bounded(
    client: pgchan.AsyncClient, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    monkeypatch.setattr(writer, "WAITING_ENTRIES_MAX", 50)
    await client.channel("c").publish("warm")
    most = 0
    waiting = client._db.writer._waiting

    async def publish(n: int) -> None:
        nonlocal most
        await client.channel("c").publish(n)
        most = max(most, len(waiting))

    with psycopg.connect(client.dsn) as connection:
        connection.execute("select pgchan.publish('c', '1')")
        tasks = [asyncio.create_task(publish(n)) for n in range(500)]
        await wait_until(lambda: waiting.is_full)
        most = len(waiting)
        connection.commit()
        await asyncio.gather(*tasks)
    assert most <= 102
    assert (await client.channel("c").info()).head == 502


# ------------------------------------------------------------------------------------------------ where it may be used


async def test_a_full_pool_is_named(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncpg_db, "CONNECT_SECONDS", 0.2)
    async with pgchan.AsyncClient(dsn, pool_size=1, timeout=0.5) as client:
        await client.channel("c").publish(1)
        async with client._db.acquire():
            with pytest.raises(errors.Unavailable, match="all 1 connections of the pool"):
                await client.channel("c").read()
            assert (await client.channel("c").publish(2)).position == 2
        assert len(await client.channel("c").read()) == 2

async def test_connections_stay_out_of_the_pool_while_they_are_used_and_nobody_queues(
    direct_dsn: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncpg_db, "LEASE_SECONDS", 0.3)
    async with pgchan.AsyncClient(direct_dsn, pool_size=2) as client:
        await client._db.fetch("select 1")
        pool = client._db._pool
        assert pool is not None
        for _ in range(5):
            await client._db.fetch("select 1")
        assert (pool._pool.get_size(), pool._pool.get_idle_size()) == (1, 0)
        # More than there are connections: who queues is served in turn.
        await asyncio.gather(*(client._db.fetch("select pg_sleep(0.01)") for _ in range(20)))
        # What a caller has broken off goes through the pool, which waits until the server has given up as well.
        slow = asyncio.create_task(client._db.fetch("select pg_sleep(10)"))
        await asyncio.sleep(0.1)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert [tuple(row) for row in await client._db.fetch("select 2")] == [(2,)]
        await wait_until(lambda: pool._pool.get_idle_size() == pool._pool.get_size())
        # One that the server has ended meanwhile is found out.
        await client._db.fetch("select 1")
        query(
            direct_dsn,
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name = 'pgchan pool'",
        )
        assert [tuple(row) for row in await client._db.fetch("select 3")] == [(3,)]


def test_a_client_belongs_to_its_event_loop(dsn: str) -> None:
    client = pgchan.AsyncClient(dsn)

    async def publish() -> pgchan.Message:
        return await client.channel("c").publish(1)

    with asyncio.Runner() as first, asyncio.Runner() as second:
        assert first.run(publish()).position == 1
        with pytest.raises(errors.InvalidInput, match="event loop"):
            second.run(publish())
        first.run(client.close())


def test_a_client_does_not_survive_a_fork(dsn: str) -> None:
    client = pgchan.AsyncClient(dsn)

    async def publish() -> str:
        try:
            await client.channel("c").publish(1)
        except errors.InvalidInput as error:
            return str(error)
        return "published"

    client._pid = os.getpid() + 1  # as it looks from a child
    assert "before a fork" in asyncio.run(publish())


# ------------------------------------------------------------------------------------------------ what errors mean


@pytest.mark.parametrize("code", sorted(errors.NOT_DONE))
def test_errors_that_cannot_follow_a_commit_are_not_done(code: str) -> None:
    assert isinstance(db.translate(code, "", None, writing=True), errors.Unavailable)


@pytest.mark.parametrize(
    "code", [None, "08003", "08006", "57014", "57P01", "57P02", "57P05", "54000", "55P03", "P0001", "XX000", "58030"]
)
def test_errors_that_can_follow_a_commit_are_indefinite(code: str | None) -> None:
    assert isinstance(db.translate(code, "", None, writing=True), errors.Indefinite)
    assert not isinstance(db.translate(code, "", None, writing=False), errors.Indefinite)


@pytest.mark.parametrize("code", ["22021", "23514", "42804"])
def test_what_the_server_refuses_is_an_error_and_shows_no_text_of_it(code: str) -> None:
    error = db.translate(code, "secret", "hint", writing=True)
    assert type(error) is errors.Error and "secret" not in str(error)
