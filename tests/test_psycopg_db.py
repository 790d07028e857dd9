"""What only the blocking door does: threads that write for each other, interrupts, its pool, where it may be used."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from doors import query

import pgchan
from pgchan import errors, psycopg_db, sql
from pgchan.db import drive

BlockUntil = Callable[..., None]


@pytest.fixture
def client(dsn: str) -> Iterator[pgchan.Client]:
    with pgchan.Client(dsn) as client:
        yield client


def slow_down(dsn: str, body: str) -> None:
    """Make the server take half a second to store this body."""
    query(
        dsn,
        "create function slow() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(0.5); return new; end $$",
    )
    query(
        dsn,
        "create trigger slow before insert on pgchan.messages for each row"
        f" when (new.body = '\"{body}\"'::bytea) execute function slow()",
    )


def test_threads_write_for_each_other(client: pgchan.Client) -> None:
    slow_down(client.dsn, "slow")
    client.channel("c").publish("warm")
    before = dict(client.stats)
    with ThreadPoolExecutor(30) as threads:
        slow = threads.submit(client.channel("c").publish, "slow")
        others = [threads.submit(client.channel(f"c{n % 3}").publish, n) for n in range(29)]
        assert slow.result().position == 2
        assert all(other.result().position >= 1 for other in others)
    assert client.stats["entries"] - before["entries"] == 30
    assert client.stats["writes"] - before["writes"] <= 8


def test_one_refused_entry_is_the_affair_of_its_own_thread(client: pgchan.Client) -> None:
    slow_down(client.dsn, "slow")
    client.channel("closed").create()
    client.channel("closed").close()
    client.channel("c").publish("first", key="k")
    with ThreadPoolExecutor(10) as threads:
        slow = threads.submit(client.channel("c").publish, "slow")
        closed = threads.submit(client.channel("closed").publish, 1)
        conflict = threads.submit(client.channel("c").publish, "other", key="k")
        fine = [threads.submit(client.channel("c").publish, n) for n in range(5)]
        slow.result()
        assert {one.result().body for one in fine} == set(range(5))
        with pytest.raises(errors.ChannelClosed):
            closed.result()
        with pytest.raises(errors.IdempotencyConflict):
            conflict.result()


def test_an_interrupted_thread_does_not_stop_the_others(client: pgchan.Client, block_until: BlockUntil) -> None:
    """Control-C reaches the main thread while it waits for another thread that writes."""
    slow_down(client.dsn, "slow")
    client.channel("c").publish("warm")
    writer = client._db._writer
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    with ThreadPoolExecutor(5) as threads:
        slow = threads.submit(client.channel("c").publish, "slow")
        block_until(lambda: writer._led and not len(writer._waiting))

        def interrupt() -> None:
            block_until(lambda: len(writer._waiting) == 1)
            signal.pthread_kill(main, signal.SIGINT)

        interrupting = threads.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.channel("c").publish("interrupted")
        interrupting.result()
        later = [threads.submit(client.channel("c").publish, n) for n in range(3)]
        assert slow.result(10).position == 2
        assert all(one.result(10).position >= 3 for one in later)
    signal.signal(signal.SIGINT, before)
    assert not writer._led


def test_closing_waits_for_threads_that_publish(direct_dsn: str, block_until: BlockUntil) -> None:
    dsn = direct_dsn  # a pooler keeps its connections
    slow_down(dsn, "slow")
    client = pgchan.Client(dsn)
    client.channel("c").publish("warm")
    with ThreadPoolExecutor(3) as threads:
        slow = threads.submit(client.channel("c").publish, "slow")
        block_until(lambda: client._db._writer._led)
        client.close()
        assert slow.result().position == 2
    gone = "select 1 from pg_stat_activity where application_name like 'pgchan %%' and datname = current_database()"
    block_until(lambda: not query(dsn, gone.replace("%%", "%")))


def test_a_full_pool_is_named(dsn: str) -> None:
    with pgchan.Client(dsn, pool_size=1, timeout=0.3) as client:
        client.channel("c").publish(1)
        with client._db._pool.connection(1), pytest.raises(errors.Unavailable, match="all 1 connections of the pool"):
            client.channel("c").read()
        assert len(client.channel("c").read()) == 1


def test_threads_share_the_pool(dsn: str) -> None:
    with pgchan.Client(dsn, pool_size=2) as client, ThreadPoolExecutor(20) as threads:
        client.channel("c").publish_many(list(range(100)))
        assert all(len(page) == 100 for page in threads.map(lambda _: client.channel("c").read(), range(100)))
        assert client._db._pool._count <= 2


def test_the_listening_thread_ends_with_the_client(dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("c").publish(1)
        assert next(client.channel("c").tail()).body == 1
        assert any(thread.name == "pgchan listener" for thread in threading.enumerate())
    assert not any(thread.name == "pgchan listener" for thread in threading.enumerate())
    assert client.health == "closed"


async def test_it_refuses_to_stop_an_event_loop(dsn: str) -> None:
    client = pgchan.Client(dsn)
    for call in (lambda: client.channel("c").publish(1), client.channels, client.channel("c").tail().next_page):
        with pytest.raises(errors.InvalidInput, match="AsyncClient"):
            call()
    message = await asyncio.to_thread(client.channel("c").publish, 1)
    assert message.position == 1
    await asyncio.to_thread(client.close)


def test_a_client_does_not_survive_a_fork(client: pgchan.Client) -> None:
    client._pid = os.getpid() + 1  # as it looks from a child
    with pytest.raises(errors.InvalidInput, match="before a fork"):
        client.channel("c").publish(1)
    client._pid = os.getpid()


def test_an_argument_that_psycopg_does_not_send_is_no_lost_connection(client: pgchan.Client) -> None:
    """It has no SQLSTATE, as a lost connection has none; but to try again would not help."""
    with pytest.raises(errors.Error, match="22000") as caught:
        drive(client._db.fetch(sql.CHANNEL_ID, "a\0b"))
    assert type(caught.value) is errors.Error
    assert client.channel("c").publish(1).position == 1


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("FATAL:  the database system is starting up", errors.Unavailable),
        ("FATAL:  sorry, too many clients already", errors.Unavailable),
        ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", errors.Unavailable),
        ("FATAL:  terminating connection due to administrator command", errors.Unavailable),
        ("connection refused", errors.Unavailable),
        ('FATAL:  password authentication failed for user "app"', errors.UnsafeDeployment),
        ('FATAL:  database "nowhere" does not exist', errors.UnsafeDeployment),
    ],
)  # fmt: skip
def test_what_libpq_says_tells_whether_waiting_helps(said: str, error: type[errors.Error]) -> None:
    found = psycopg_db._refused(psycopg_db.psycopg.OperationalError(f"connection failed: {said}"))
    assert type(found) is error
    assert "app" not in str(found) and "nowhere" not in str(found)
