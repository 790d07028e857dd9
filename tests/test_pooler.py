"""Behind PgBouncer: what needs a session is refused in transaction mode, and works past it with control_dsn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster import Cluster, on_database
from doors import Door, query
from pooler import Pooler

import pgchan
from pgchan import doctor, errors, migrate


@pytest.fixture
def pooled(direct_dsn: str) -> Iterator[Callable[[str], str]]:
    """`pooled("transaction")`: the DSN of this test's database through a PgBouncer of its own."""
    with contextlib.ExitStack() as stack:

        def start(mode: str) -> str:
            pooler = Pooler(direct_dsn, mode)
            stack.callback(pooler.close)
            return pooler.dsn_of(direct_dsn)

        yield start


@pytest.fixture(params=["async", "blocking"])
async def opened(request: pytest.FixtureRequest, direct_dsn: str) -> Any:
    door = Door(request.param, direct_dsn)
    yield door
    await door.close()


async def test_behind_a_transaction_pooler_publishing_and_reading_work(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("transaction"))
    channel = client.channel("chat")
    for n in range(20):
        await channel.publish(n, key=str(n))
    assert (await channel.publish(3, key="3")).position == 4
    assert [message.body for message in await channel.read()] == list(range(20))


async def test_behind_a_transaction_pooler_what_must_listen_is_refused_with_the_fix(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("transaction"))
    await client.channel("chat").publish(1)
    with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
        await client.channel("chat").tail().__anext__()
    handle = await client.start("nobody_has_it")
    with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
        await handle.result(timeout=5)


async def test_a_worker_refuses_a_transaction_pooler(pooled: Any) -> None:
    @pgchan.workflow
    async def nothing(run: pgchan.Run) -> None: ...

    async with pgchan.AsyncClient(pooled("transaction")) as client:
        with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
            await pgchan.Worker(client, [nothing]).run(signals=False)


async def test_with_a_direct_control_dsn_tails_and_workers_work(pooled: Any, direct_dsn: str) -> None:
    @pgchan.workflow
    async def hello(run: pgchan.Run, name: str) -> str:
        async def greet() -> str:
            await run.publish(f"hello {name}")
            return name

        return await run.step(greet)

    async with pgchan.AsyncClient(pooled("transaction"), control_dsn=direct_dsn) as client:
        worker = pgchan.Worker(client, [hello])
        task = asyncio.create_task(worker.run(signals=False))
        handle = await client.start(hello, "you")
        said = [message.body async for message in handle.tail() if message.kind == "message"]
        assert (said, await handle.result(10)) == (["hello you"], "you")
        worker.stop()
        await task


async def test_a_session_pooler_is_as_good_as_no_pooler(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("session"))
    channel = client.channel("chat")
    await channel.publish(1)
    await channel.close()
    assert [message.body async for message in channel.tail()] == [1]


async def test_behind_a_session_pooler_a_worker_works(pooled: Any) -> None:
    @pgchan.workflow
    async def hello(run: pgchan.Run) -> str:
        return "hello"

    async with pgchan.AsyncClient(pooled("session")) as client:
        worker = pgchan.Worker(client, [hello])
        task = asyncio.create_task(worker.run(signals=False))
        assert await (await client.start(hello)).result(20) == "hello"
        worker.stop()
        await task


async def test_a_control_dsn_through_a_transaction_pooler_is_refused_too(pooled: Any, opened: Door) -> None:
    dsn = pooled("transaction")
    client = opened.client(dsn, control_dsn=dsn.replace("127.0.0.1", "localhost"))
    await client.channel("chat").publish(1)
    with pytest.raises(errors.UnsafeDeployment, match="let control_dsn lead to the same database, directly"):
        await client.channel("chat").tail().__anext__()


async def test_a_control_dsn_that_leads_to_another_database_is_refused(
    opened: Door, direct_dsn: str, make_database: Callable[[str], str], template: str
) -> None:
    client = opened.client(direct_dsn, control_dsn=make_database(template))
    with pytest.raises(errors.UnsafeDeployment, match=r"control_dsn leads to database .* both must lead to the same"):
        await client.channel("chat").tail().__anext__()


async def test_a_control_dsn_that_leads_to_another_server_is_refused(
    opened: Door, server: Cluster, direct_dsn: str
) -> None:
    name = direct_dsn.partition("?")[0].rpartition("/")[2]
    query(server.dsn, f"create database {name} template template0")  # so that only what is heard tells them apart
    client = opened.client(direct_dsn, control_dsn=on_database(server.dsn, name))
    with pytest.raises(errors.SchemaMismatch, match="pgchan migrate"):
        await client.channel("chat").tail().__anext__()
    migrate.upgrade(on_database(server.dsn, name))
    with pytest.raises(errors.UnsafeDeployment, match="is not heard over control_dsn"):
        await client.channel("chat").tail().__anext__()


async def test_a_control_dsn_that_leads_to_a_read_only_session_is_refused(opened: Door, direct_dsn: str) -> None:
    separator = "&" if "?" in direct_dsn else "?"
    read_only = f"{direct_dsn}{separator}options=-c%20default_transaction_read_only%3Don"
    client = opened.client(direct_dsn, control_dsn=read_only)
    with pytest.raises(errors.UnsafeDeployment, match="control_dsn leads to a read-only session"):
        await client.channel("chat").tail().__anext__()


async def test_the_doctor_explains_a_transaction_pooler_and_is_content_with_control_dsn(
    pooled: Any, direct_dsn: str
) -> None:
    dsn = pooled("transaction")
    alone = {finding.check: finding for finding in await doctor.check(dsn)}
    assert not alone["wakeups"].is_fine
    assert "give control_dsn= (or PGCHAN_CONTROL_DSN)" in alone["wakeups"].detail
    helped = await doctor.check(dsn, control_dsn=direct_dsn)
    assert all(finding.is_fine for finding in helped), helped


async def test_behind_a_transaction_pooler_a_workflow_in_a_thread_has_its_transactions(
    pooled: Any, direct_dsn: str
) -> None:
    query(direct_dsn, "create table rows_of_users (n integer)")

    @pgchan.workflow
    def insert(run: Any) -> None:
        for name in "abc":  # often enough for a driver to want to prepare the statement
            with run.transaction(name) as connection:
                for n in range(8):
                    connection.execute("insert into rows_of_users values (%s)", [n])

    async with pgchan.AsyncClient(pooled("transaction"), control_dsn=direct_dsn) as client:
        worker = pgchan.Worker(client, [insert])
        task = asyncio.create_task(worker.run(signals=False))
        await asyncio.gather(*[(await client.start(insert)).result(20) for _ in range(3)])
        worker.stop()
        await task
    assert query(direct_dsn, "select count(*) from rows_of_users") == [(72,)]


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("default_transaction_isolation", "repeatable read", "read committed"), ("lock_timeout", "50ms", "0"),
        ("statement_timeout", "200ms", "0"), ("array_nulls", "off", "on"), ("DateStyle", "German, DMY", "ISO"),
    ],
)  # fmt: skip
async def test_settings_of_a_role_that_a_pooler_passes_on_are_refused_with_the_fix(
    opened: Door, admin: Any, direct_dsn: str, setting: str, value: str, wanted: str
) -> None:
    name = f"app_{query(direct_dsn, 'select current_database()')[0][0]}"
    admin.execute(f"create role {name} login")
    query(direct_dsn, f"grant usage on schema pgchan to {name}")
    query(direct_dsn, f"grant execute on all routines in schema pgchan to {name}")
    query(direct_dsn, f"grant select on all tables in schema pgchan to {name}")
    pooler = Pooler(direct_dsn, "transaction")
    try:
        query(direct_dsn, f"alter role {name} set {setting} = '{value}'")
        dsn = pooler.dsn_of(direct_dsn).replace("postgres@", f"{name}@")
        with pytest.raises(errors.UnsafeDeployment, match=f"^{setting}=.* reaches pgchan through the pooler") as caught:
            await opened.client(dsn).channel("c").publish(1)
        fix = str(caught.value).partition("run: ")[2]
        assert fix == f"alter role {name} set {setting} = '{wanted}'"
        query(direct_dsn, fix)
        pooler.close()
        pooler = Pooler(direct_dsn, "transaction")  # the old one goes on with the sessions that it has
        dsn = pooler.dsn_of(direct_dsn).replace("postgres@", f"{name}@")
        assert (await opened.client(dsn).channel("c").publish(1)).position == 1
    finally:
        pooler.close()
        query(direct_dsn, f"drop owned by {name}")
        admin.execute(f"drop role {name}")


async def test_a_login_that_the_pooler_refuses_is_told_from_one_that_is_not_ready(pooled: Any, opened: Door) -> None:
    dsn = pooled("transaction")
    with pytest.raises(errors.UnsafeDeployment, match="refused this user, password or database"):
        await opened.client(dsn.replace("postgres@", "nobody_of_this_name@")).channel("c").publish(1)
