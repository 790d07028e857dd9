"""What becomes of publishers and readers, of both doors, when connections and servers fail. Nothing is lost.

Long, because each fault is a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import psycopg
import pytest
from cluster import SMALL_QUEUE, Cluster, full_queue, on_database
from doors import Door, Reading, direct, pretend, query
from proxy import Proxy
from storm import Storm, bodies, terminate

from pgchan import asyncpg_db, db, errors, psycopg_db, wakeups

WaitUntil = Callable[..., Awaitable[None]]


@pytest.fixture(params=["async", "blocking"])
async def own(request: pytest.FixtureRequest, server: Cluster) -> AsyncIterator[Door]:
    """A door on a server of this test's own."""
    door = Door(request.param, server.dsn)
    yield door
    await door.close()


# ------------------------------------------------------------------------------------------------ connections cut


@pytest.mark.parametrize("role", ["writer", "listen", "pool", "writer listen pool"])
async def test_nothing_is_lost_or_repeated_when_connections_are_cut(
    door: Door, reading: Callable[[Any], Reading], wait_until: WaitUntil, role: str
) -> None:
    client = door.client()
    reader = reading(client.channel("storm").tail())
    storm = Storm(client, "storm")
    for _ in range(5):
        reached = len(storm.acknowledged) + 40
        await wait_until(lambda reached=reached: len(storm.acknowledged) >= reached)
        for one in role.split():
            terminate(door.dsn, one)
    await storm.stop()
    stored = bodies(door.dsn, "storm")
    await reader.has(len(stored))
    storm.check(stored, reader)
    assert not storm.not_done


async def test_a_connection_that_was_cut_while_idle_costs_no_doubt(door: Door, wait_until: WaitUntil) -> None:
    client = door.client(direct(door.dsn))  # those of a pooler are not idle for us
    channel = client.channel("idle")
    await channel.publish("before")
    await channel.read()
    for role in ("writer", "pool"):
        assert terminate(door.dsn, role) >= 1

    def is_gone() -> bool:
        ours = "application_name in ('pgchan writer', 'pgchan pool') and datname = current_database()"
        return not query(door.dsn, f"select 1 from pg_stat_activity where {ours}")

    await wait_until(is_gone)
    await channel.publish("after")
    await channel.trim(1)
    assert bodies(door.dsn, "idle") == ["before", "after"]


async def test_readers_hear_again_after_the_listener_was_cut(
    door: Door, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    client, other = door.client(), door.client()
    waiting, unborn = reading(client.channel("c").tail()), reading(client.channel("unborn").tail())
    await other.channel("c").publish(1)
    await waiting.has(1)
    for n in range(3):
        await wait_until(lambda: client.health == "listening")
        terminate(door.dsn, "listen")
        await other.channel("c").publish(n + 2)
        await waiting.has(n + 2, 1.5)
    await other.channel("unborn").publish(1)
    await unborn.has(1, 1.5)
    assert waiting.bodies == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------ a lost answer


async def test_a_lost_answer_is_indefinite_and_the_key_finds_the_message(door: Door) -> None:
    async with Proxy(door.dsn) as proxy:
        client = door.client(proxy.dsn)
        await client.channel("c").publish("warm")
        proxy.swallow(b"precious")
        with pytest.raises(errors.Indefinite):
            await client.channel("c").publish("precious")
        assert proxy.swallowed == 1
        assert bodies(door.dsn, "c") == ["warm", "precious"]
        proxy.swallow(b"keyed")
        message = await client.channel("c").publish("keyed", key="k")
        assert proxy.swallowed == 2
        assert (message.position, await client.channel("c").publish("keyed", key="k")) == (3, message)
        assert bodies(door.dsn, "c") == ["warm", "precious", "keyed"]
        await client.close()


async def test_a_lost_answer_to_a_batch_is_indefinite_and_its_keys_find_it(door: Door) -> None:
    async with Proxy(door.dsn) as proxy:
        client = door.client(proxy.dsn)
        await client.channel("c").publish_many(["warm"])
        proxy.swallow(b"precious")
        with pytest.raises(errors.Indefinite):
            await client.channel("c").publish_many(["precious", "second"], keys=["1", "2"])
        stored = await client.channel("c").publish_many(["precious", "second"], keys=["1", "2"])
        assert [message.position for message in stored] == [2, 3]
        proxy.swallow(b"twice")
        handle = await client.start("work", "twice", id="run/1")
        assert handle.created in (True, False)
        assert query(door.dsn, "select count(*) from pgchan.runs") == [(1,)]
        await client.close()


async def test_a_network_that_falls_silent_is_given_up(
    door: Door, monkeypatch: pytest.MonkeyPatch, reading: Callable[[Any], Reading]
) -> None:
    """Keepalives do not notice: the kernel at the other end still answers."""
    monkeypatch.setattr(asyncpg_db, "CALL_SECONDS", 0.8)
    monkeypatch.setattr(asyncpg_db, "LISTEN_SECONDS", 0.8)
    monkeypatch.setattr(psycopg_db, "LISTEN_SECONDS", 0.8)
    monkeypatch.setattr(psycopg_db.Connection, "seconds", 0.8)
    monkeypatch.setattr(asyncpg_db, "CONNECT_SECONDS", 1.0)
    async with Proxy(door.dsn) as proxy:
        client = door.client(proxy.dsn, timeout=4.0)
        reader = reading(client.channel("c").tail())
        await client.channel("c").publish("first")
        await reader.has(1)
        proxy.silence()
        unkeyed = asyncio.create_task(client.channel("c").publish("unkeyed"))
        read = asyncio.create_task(client.channel("c").read())
        with pytest.raises(errors.Indefinite):
            await unkeyed
        proxy.silence(False)
        proxy.cut()
        assert (await client.channel("c").publish("again", key="k")).position == 2
        await reader.has(2, 5)
        assert len(await read) >= 1
        await client.close()


# ------------------------------------------------------------------------------------------------ wakeups


async def test_an_error_after_the_commit_is_never_not_done(door: Door) -> None:
    client = door.client(timeout=1.0)
    await client.channel("c").publish("before")
    query(
        door.dsn,
        "create or replace function pgchan.wake(ids bigint[], heads bigint[], created boolean default false,"
        " queues text[] default null) returns void language plpgsql as $$ begin raise 'no wakeup'; end $$",
    )
    told = await asyncio.gather(
        *(client.channel("c").publish(n, key=f"k{n}" if n % 2 else None) for n in range(20)), return_exceptions=True
    )
    assert {type(error) for error in told} == {errors.Indefinite}
    assert sorted(bodies(door.dsn, "c")[1:]) == list(range(20))
    with pytest.raises(errors.Indefinite):
        await client.channel("c").publish_many(["together"])
    assert Counter(map(str, bodies(door.dsn, "c")))["together"] == 1


async def test_lost_wakeups_cost_a_second_and_no_message(door: Door, reading: Callable[[Any], Reading]) -> None:
    client = door.client()
    reader, unborn = reading(client.channel("c").tail()), reading(client.channel("unborn").tail())
    await client.channel("c").publish(0)
    await reader.has(1)
    query(
        door.dsn,
        "create or replace function pgchan.wake(ids bigint[], heads bigint[], created boolean default false,"
        " queues text[] default null) returns void language sql as ''",
    )
    for n in range(1, 3):
        await client.channel("c").publish(n)
        await reader.has(n + 1, 1.5)
    await client.channel("unborn").publish(1)
    await unborn.has(1, 1.5)
    await client.channel("c").close()
    await reader.end(1.5)
    assert reader.bodies == [0, 1, 2]


async def test_invented_wakeups_cost_few_reads_and_do_no_harm(
    door: Door, reading: Callable[[Any], Reading], wait_until: WaitUntil
) -> None:
    client = door.client()
    reader, unborn = reading(client.channel("c").tail()), reading(client.channel("unborn").tail())
    await client.channel("c").publish(0)
    await reader.has(1)
    ((channel_id,),) = query(door.dsn, "select id from pgchan.channels where name = 'c'")
    hints = [f"{channel_id}:999999", "x", "", ":", "1:2:3,,", f"{channel_id}:-1", "9" * 5000, f"-1:{2**70}", "\u0663:1"]
    reads, started = client.stats["reads"], time.monotonic()
    with psycopg.connect(door.dsn, autocommit=True) as other:
        for turn in range(300):
            for name in (f"pgchan_{channel_id % 16}", "pgchan_new", "pgchan_queue", "pgchan_99"):
                other.execute("select pg_notify(%s, %s)", [name, hints[turn % len(hints)]])
            await asyncio.sleep(0)
    seconds = time.monotonic() - started
    await client.channel("c").publish(1)
    await reader.has(2, 0.8)
    assert client.stats["reads"] - reads <= 10 + 20 * (seconds + 0.2)
    await client.channel("unborn").publish(1)
    await unborn.has(1, 0.8)


@pytest.mark.parametrize("server", [SMALL_QUEUE], indirect=True)
async def test_a_full_notify_queue_fails_no_publish(own: Door, reading: Callable[[Any], Reading]) -> None:
    client = own.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish(0)
    await reader.has(1)
    with full_queue(own.dsn):
        for n in range(1, 30):
            await client.channel("c").publish(n)
        await client.channel("c").publish_many([30])
        await client.channel("d").create()
        await reader.has(31, 3)
    assert reader.bodies == list(range(31))


# ------------------------------------------------------------------------------------------------ servers


@pytest.mark.parametrize("mode", ["fast", "immediate", "killed"])
async def test_a_restart_loses_nothing_that_was_acknowledged(
    own: Door, server: Cluster, reading: Callable[[Any], Reading], wait_until: WaitUntil, mode: str
) -> None:
    query(own.dsn, "alter database postgres set synchronous_commit = off")
    query(own.dsn, "alter role postgres set synchronous_commit = off")
    client = own.client()
    reader = reading(client.channel("storm").tail())
    storm = Storm(client, "storm")
    for _ in range(2):
        reached = len(storm.acknowledged) + 30
        await wait_until(lambda reached=reached: len(storm.acknowledged) >= reached)
        await asyncio.to_thread(server.kill if mode == "killed" else lambda: server.stop(mode))
        await asyncio.to_thread(server.start)
    reached = len(storm.acknowledged) + 30
    await wait_until(lambda: len(storm.acknowledged) >= reached)
    await storm.stop()
    stored = bodies(own.dsn, "storm")
    await reader.has(len(stored))
    storm.check(stored, reader)
    assert not storm.not_done


async def test_a_tail_outlasts_an_outage_that_is_longer_than_the_patience_of_its_client(
    own: Door, server: Cluster, reading: Callable[[Any], Reading]
) -> None:
    client = own.client(timeout=0.3)
    behind = client.channel("c").tail()
    await client.channel("c").publish_many(list(range(1200)))
    assert len(await behind.next_page()) == 500
    caught_up = reading(client.channel("c").tail(after=1100))
    await caught_up.has(100)
    await asyncio.to_thread(server.stop)
    late = reading(behind)
    for call in (client.channel("c").read(), client.channel("c").publish(0), client.channel("c").close()):
        with pytest.raises(errors.Unavailable):
            await call
    await asyncio.to_thread(server.start)
    other = own.client()
    await other.channel("c").publish("back")
    await asyncio.gather(caught_up.has(101), late.has(701))
    assert late.positions == list(range(501, 1202))


def _read_only_is(dsn: str, setting: str) -> bool:
    return query(dsn, "show default_transaction_read_only") == [(setting,)]


async def test_a_primary_that_becomes_read_only_is_unavailable_until_there_is_one_again(
    own: Door, wait_until: WaitUntil
) -> None:
    client = own.client(timeout=0.4)
    await client.channel("c").publish(1)
    await client.channel("c").read()
    for setting in ("on", "off"):
        query(own.dsn, f"alter system set default_transaction_read_only = {setting}")
        query(own.dsn, "select pg_reload_conf()")
        # What the postmaster gives to a new connection it has told all the others.
        await wait_until(partial(_read_only_is, own.dsn, setting))
        if setting == "on":
            with pytest.raises(errors.Unavailable):
                await client.channel("c").publish(2, key="k")
            with pytest.raises(errors.Unavailable):
                await client.channel("c").trim(1)
    assert (await client.channel("c").publish(2, key="k")).position == 2
    await client.channel("c").trim(1)


async def test_what_every_write_commits_is_durable_whatever_the_database_says(door: Door) -> None:
    for statement in (
        "create table seen (value text)",
        "create function note() returns trigger language plpgsql as $$ begin"
        " insert into public.seen values (current_setting('synchronous_commit')); return null; end $$",
        "create trigger note after insert or update or delete on pgchan.channels execute function note()",
        "create trigger note after insert or update or delete on pgchan.messages execute function note()",
        f"alter database {psycopg.conninfo.conninfo_to_dict(door.dsn)['dbname']} set synchronous_commit = off",
    ):
        query(door.dsn, statement)
    client = door.client()
    channel = client.channel("c")
    await channel.create()
    await channel.publish(1)
    await channel.publish(1, key="k")
    await channel.publish_many(list(range(1100)))
    await channel.trim(3)
    await client.start("work", id="run/1")
    await client.run("run/1").signal(1)
    await client.run("run/1").cancel()
    await channel.close()
    await channel.delete()
    query(door.dsn, "select pgchan.publish('c', '1')")
    assert query(door.dsn, "select distinct value from seen") == [("on",)]


# ------------------------------------------------------------------------------------------------ deployments


@pytest.fixture
def role(admin: psycopg.Connection[Any], direct_dsn: str) -> Any:
    """A role that may use pgchan in this test's database and nothing else; its DSN, past any pooler, which would keep
    connections and settings of the role for longer than the test has them."""
    dsn = direct_dsn
    name = f"role_{psycopg.conninfo.conninfo_to_dict(dsn)['dbname']}"
    admin.execute(f"create role {name} login".encode())
    query(dsn, f"grant usage on schema pgchan to {name}")
    query(dsn, f"grant execute on all routines in schema pgchan to {name}")
    query(dsn, f"grant select on all tables in schema pgchan to {name}")
    yield dsn.replace("postgres@", f"{name}@"), name
    query(dsn, f"drop owned by {name}")
    with contextlib.suppress(psycopg.errors.DependentObjectsStillExist):
        admin.execute(f"drop role {name}".encode())


async def test_settings_of_a_role_do_not_reach_pgchans_connections(
    door: Door, role: tuple[str, str], reading: Callable[[Any], Reading]
) -> None:
    for setting in (
        "default_transaction_isolation = 'serializable'", "statement_timeout = '1ms'", "lock_timeout = '1ms'",
        "idle_session_timeout = '300ms'", "idle_in_transaction_session_timeout = '1ms'", "search_path = 'nowhere'",
        "synchronous_commit = 'off'", "timezone = 'Asia/Kathmandu'", "datestyle = 'German'", "bytea_output = 'escape'",
        "client_encoding = 'LATIN1'", "default_transaction_deferrable = on", "array_nulls = off",
    ):  # fmt: skip
        query(door.dsn, f"alter role {role[1]} set {setting}")
    client = door.client(role[0])
    reader = reading(client.channel("c").tail())
    message = await client.channel("c").publish("grün ☃")
    await reader.has(1)
    gone = time.monotonic() + 0.6
    while time.monotonic() < gone:
        await asyncio.gather(*(client.channel(f"c{n}").publish(n) for n in range(5)))
    await client.channel("c").publish_many(["second"])
    await reader.has(2, 0.8)
    await client.channel("c").trim(2)
    assert reader.messages[0] == message
    assert [found.key for found in reader.messages] == [None, None]
    assert (await client.channel("c").info()).created_at.utcoffset().total_seconds() == 0


async def test_a_role_without_rights_is_told_what_it_lacks(door: Door, role: tuple[str, str]) -> None:
    query(door.dsn, f"revoke execute on all routines in schema pgchan from {role[1]}")
    query(door.dsn, f"grant execute on function pgchan.version(), pgchan.serves() to {role[1]}")
    client = door.client(role[0])
    for call in (client.channel("c").publish(1), client.channel("c").close(), client.channel("c").publish_many([1])):
        with pytest.raises(errors.UnsafeDeployment, match="grant"):
            await call


async def test_a_server_without_free_connections_is_unavailable(door: Door, role: tuple[str, str]) -> None:
    query(door.dsn, f"alter role {role[1]} connection limit 0")
    client = door.client(role[0], timeout=0.5)
    for call in (client.channel("c").publish(1), client.channel("c").read(), client.channel("c").close()):
        with pytest.raises(errors.Unavailable):
            await call
    query(door.dsn, f"alter role {role[1]} connection limit -1")
    assert (await client.channel("c").publish(1)).position == 1


async def test_a_database_that_is_not_fit_is_refused_with_the_fix(
    door: Door, empty_dsn: str, make_database: Callable[[str], str], template: str
) -> None:
    with pytest.raises(errors.SchemaMismatch, match="pgchan migrate") as caught:
        await door.client(empty_dsn).channel("c").publish(1)
    assert (caught.value.found, caught.value.wanted) == (None, db.SCHEMA_VERSION)
    for version, fix in (("pgchan_9999", "install"), ("pgchan_0000", "pgchan migrate")):
        other = make_database(template)
        pretend(other, version, version)
        with pytest.raises(errors.SchemaMismatch, match=fix) as caught:
            await door.client(other).channel("c").read()
        assert caught.value.found == version
    other = make_database(template)
    pretend(other, "pgchan_9999", db.SCHEMA_VERSION)
    assert await door.client(other).channel("c").read() == []
    readonly = make_database(template)
    name = psycopg.conninfo.conninfo_to_dict(readonly)["dbname"]
    query(readonly, f"alter database {name} set default_transaction_read_only = on")
    with pytest.raises(errors.UnsafeDeployment, match="read-only"):
        await door.client(readonly).channel("c").publish(1)
    for wrong in (door.dsn.replace("postgres@", "nobody_of_this_name@"), on_database(door.dsn, "no_such_database")):
        with pytest.raises(errors.UnsafeDeployment, match="DSN"):
            await door.client(wrong).channel("c").publish(1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({0: 130_022}, "13 is too old"), ({1: "SQL_ASCII"}, "SQL_ASCII"), ({2: "off"}, "fsync=off"),
        ({3: "off"}, "full_page_writes=off"), ({4: "on"}, "read-only"), ({5: True}, "standby"),
    ],
)  # fmt: skip
def test_a_server_that_may_lose_commits_is_refused(dsn: str, changes: dict[int, Any], match: str) -> None:
    from pgchan import sql

    (row,) = query(dsn, sql.DEPLOYMENT)
    db.check_deployment(row)
    with pytest.raises(errors.UnsafeDeployment, match=match):
        db.check_deployment([changes.get(index, value) for index, value in enumerate(row)])


async def test_no_server_is_unavailable_after_the_patience(door: Door) -> None:
    client = door.client("postgresql://postgres@127.0.0.1:1/none", timeout=0.4)
    started = time.monotonic()
    for call in (client.channel("c").publish(1), client.channel("c").read(), client.channel("c").publish_many([1])):
        with pytest.raises(errors.Unavailable):
            await call
    assert time.monotonic() - started < 5
    with pytest.raises(errors.Unavailable):
        await anext(client.channel("c").tail().__aiter__())


async def test_a_client_cannot_be_used_after_close(door: Door) -> None:
    client = door.client()
    await client.channel("c").publish(1)
    await client.close()
    await client.close()
    for call in (client.channel("c").publish(1), client.channel("c").read(), client.start("w"), client.channels()):
        with pytest.raises(errors.InvalidInput, match="closed"):
            await call
    with pytest.raises(errors.InvalidInput, match="closed"):
        await client.channel("c").tail().next_page(0)


# ------------------------------------------------------------------------------------------------ locked channels


async def test_a_locked_channel_delays_nobody_else(door: Door) -> None:
    client = door.client(timeout=5)
    await client.channel("locked").publish(0)
    with psycopg.connect(door.dsn) as connection:
        connection.execute("select pgchan.publish('locked', '1')")
        connection.execute("select pgchan.publish('unborn', '1')")
        stuck = [asyncio.create_task(client.channel(name).publish(2)) for name in ("locked", "unborn")]
        started = time.monotonic()
        for n in range(20):
            await client.channel(f"free{n % 3}").publish(n)
        assert time.monotonic() - started < 3
        assert not any(task.done() for task in stuck)
        connection.commit()
        assert [(await task).position for task in stuck] == [3, 2]


async def test_a_channel_that_stays_locked_is_unavailable_and_nothing_is_written(door: Door) -> None:
    client = door.client(timeout=0.5)
    await client.channel("locked").publish(0)
    with psycopg.connect(door.dsn) as connection:
        connection.execute("select pgchan.publish('locked', '1')")
        for call in (client.channel("locked").publish(2), client.channel("locked").publish_many([3])):
            with pytest.raises(errors.Unavailable):
                await call
        connection.rollback()
    assert bodies(door.dsn, "locked") == [0]
    assert wakeups.SWEEP_SECONDS <= 1
