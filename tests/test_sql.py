"""pgchan from SQL: the functions for psql, triggers and other languages, their errors; plans and HOT updates."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import on_database
from doors import query

import pgchan
from pgchan import db, sql

Connection = psycopg.Connection[Any]


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def value(connection: Connection, statement: str, *args: object) -> Any:
    row = connection.execute(statement.encode(), args).fetchone()
    return row[0] if row else None


def refused(connection: Connection, statement: str, *args: object) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(statement.encode(), args)
    return caught.value


# ------------------------------------------------------------------------------------------------ channels


def test_sql_and_python_publish_to_the_same_channel(connection: Connection, dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        assert value(connection, "select pgchan.publish('c', '{\"b\": 1, \"a\": null}')") == 1
        assert client.channel("c").publish([2], key="k").position == 2
        assert value(connection, "select pgchan.publish(channel => 'c', body => '\"x\"', key => 'k2')") == 3
        assert [message.body for message in client.channel("c").read()] == [{"b": 1, "a": None}, [2], "x"]
    rows = connection.execute("select position, kind, body, key from pgchan.read('c')").fetchall()
    assert rows == [(1, "message", {"a": None, "b": 1}, None), (2, "message", [2], "k"), (3, "message", "x", "k2")]


def test_read_takes_a_position_and_a_maximum(connection: Connection) -> None:
    for n in range(5):
        connection.execute("select pgchan.publish('c', to_jsonb(%s::int))", [n])
    assert connection.execute("select body from pgchan.read('c', 2)").fetchall() == [(2,), (3,), (4,)]
    assert connection.execute("select body from pgchan.read('c', after => 1, max => 2)").fetchall() == [(1,), (2,)]
    assert connection.execute("select * from pgchan.read('nowhere')").fetchall() == []


def test_a_key_is_stored_once_from_sql_too(connection: Connection) -> None:
    first = value(connection, "select pgchan.publish('c', '1', 'k')")
    assert value(connection, "select pgchan.publish('c', '1', 'k')") == first
    error = refused(connection, "select pgchan.publish('c', '2', 'k')")
    assert (error.sqlstate, error.diag.message_hint) == ("PC005", "use another key")
    connection.execute("select pgchan.close_channel('c')")
    assert value(connection, "select pgchan.publish('c', '1', 'k')") == first


def test_a_trigger_publishes_with_the_rows_it_is_about(connection: Connection, dsn: str) -> None:
    connection.execute("create table orders (id integer primary key, total integer)")
    connection.execute(
        "create function announce() returns trigger language plpgsql as $$ begin"
        " perform pgchan.publish('orders', to_jsonb(new), 'order-' || new.id); return new; end $$"
    )
    connection.execute("create trigger announce after insert on orders for each row execute function announce()")
    with pgchan.Client(dsn) as client:
        tail = client.channel("orders").tail()
        assert tail.next_page(0.05) == []
        with connection.transaction(force_rollback=True):
            connection.execute("insert into orders values (1, 10)")
        connection.execute("insert into orders values (2, 20), (3, 30)")
        page = tail.next_page(5)
        assert page is not None
        assert [(m.position, m.body["id"], m.key) for m in page] == [(1, 2, "order-2"), (2, 3, "order-3")]


def test_bodies_that_jsonb_cannot_hold_are_shown_all_the_same(connection: Connection, dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("json").publish_many(["a\0b\0\0", "\\u0000", "\\\0", {"\0": 1}])
        client.channel("text").create("text/plain")
        client.channel("text").publish_many(["a\0ü\0", b"\xff", b"\x00\xff", ""])
        client.channel("image").create("image/png")
        client.channel("image").publish(bytes(range(256)))
    shown = [body for (body,) in connection.execute("select body from pgchan.read('json')")]
    assert shown == ["a\ufffdb\ufffd\ufffd", "\\u0000", "\\\ufffd", {"\ufffd": 1}]
    shown = [body for (body,) in connection.execute("select body from pgchan.read('text')")]
    assert shown == ["a\ufffdü\ufffd", "/w==", "AP8=", ""]
    assert len(value(connection, "select body from pgchan.read('image')")) == 344


def test_control_messages_are_json_on_a_channel_of_any_type(connection: Connection) -> None:
    connection.execute("select from pgchan.create_channel('text', 'text/plain', null)")
    channel_id = value(connection, "select id from pgchan.channels")
    connection.execute("select pgchan.append_one(%s, 2, null, null, '{\"type\":\"ended\"}')", [channel_id])
    assert value(connection, "select body from pgchan.read('text')") == {"type": "ended"}


# ------------------------------------------------------------------------------------------------ runs and views


def test_a_run_is_started_signalled_watched_and_cancelled(connection: Connection) -> None:
    run = value(connection, "select pgchan.start('research', '[\"tides\"]')")
    assert value(connection, "select pgchan.start('research', '[\"tides\"]', %s)", run) == run
    assert value(connection, "select pgchan.signal(%s, '{\"go\": true}')", run) == 1
    status = value(connection, "select pgchan.status(%s)", run)
    assert (status["id"], status["workflow"], status["queue"]) == (run, "research", "default")
    assert status["state"] == "scheduled"
    assert value(connection, "select pgchan.cancel(%s)", run) is True
    assert value(connection, "select pgchan.cancel(%s)", run) is False
    assert value(connection, "select pgchan.cancel('nobody')") is None
    assert value(connection, "select pgchan.status('nobody')") is None
    assert value(connection, "select pgchan.status(%s)", run)["state"] == "cancelled"
    assert refused(connection, "select pgchan.signal(%s, '1')", run).sqlstate == "PC004"


def test_the_views_show_what_python_shows(connection: Connection, dsn: str) -> None:
    with pgchan.Client(dsn) as client:
        client.channel("c").publish_many([1, 2])
        client.channel("c").trim(2)
        client.channel("c").close()
        info = client.channel("c").info()
    columns = "name, head, trimmed, epoch, closed, content_type, created_at, expires_at"
    rows = connection.execute(f"select {columns} from pgchan.channel_status".encode()).fetchall()
    assert rows == [tuple(getattr(info, name) for name in columns.split(", "))]
    connection.execute("select pgchan.start('w', '[]', 'r')")
    assert connection.execute("select id, state, attempt, worker from pgchan.run_status").fetchall() == [
        ("r", "scheduled", 0, None)
    ]
    assert {name for (name,) in connection.execute("select name from pgchan.channel_status")} == {"c", "r"}
    assert connection.execute("select * from pgchan.worker_status").fetchall() == []


# ------------------------------------------------------------------------------------------------ plans

MESSAGES = 200_000


@pytest.fixture(scope="module")
def large(admin: Connection, template: str, shared_server: tuple[str, str]) -> Iterator[Connection]:
    """A database with 400 channels of 500 messages each, some of them special; analysed."""
    dsn, prefix = shared_server
    name = f"{prefix}_{os.getpid()}_large"
    admin.execute(f"create database {name} template {template}".encode())
    with psycopg.connect(on_database(dsn, name), autocommit=True) as connection:
        connection.execute(
            "insert into pgchan.channels (name, head) select 'c' || n, 500 from generate_series(1, 400) n"
        )
        connection.execute(
            """
            insert into pgchan.messages (channel_id, position, at, kind, key, step, attempt, void_from, body)
            select c.id, n, clock_timestamp(), case when n % 50 = 0 then 1 when n % 250 = 1 then 2 else 0 end,
                   case when n % 10 = 0 then 'k' || n end, case when n % 3 = 0 then 's' end, 1, null, '"text"'
            from pgchan.channels c, generate_series(1, 500) n
            """
        )
        connection.execute("vacuum analyze pgchan.messages")
        connection.execute("vacuum analyze pgchan.channels")
        for setting in db.SESSION.items():
            connection.execute("select set_config(%s, %s, false)", setting)
        yield connection
    admin.execute(f"drop database {name} with (force)".encode())


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


@pytest.mark.parametrize(
    ("statement", "args"),
    [
        (sql.PAGE_FINAL, ("c7", 100, 102, 4 << 20)), (sql.PAGE_RAW, ("c7", 100, 102, 4 << 20)),
        (sql.PAGE_FINAL, ("c7", 10**15, 102, 4 << 20)), (sql.READ_MOVED, ([7, 8, 9], [490, 499, 500], 500, 1 << 20)),
        (sql.FOLLOW, (["c7", "c8"],)), (sql.SWEEP, ([7, 8, 9],)), (sql.CHANNEL_INFO, ("c7",)),
        (sql.CHANNEL_ID, ("c7",)),
    ],
    ids=["page final", "page raw", "page now", "read moved", "follow", "sweep", "info", "id"],
)  # fmt: skip
def test_hot_reads_use_their_index(large: Connection, statement: str, args: tuple[Any, ...]) -> None:
    cursor = psycopg.RawCursor(large)
    for mode in ("force_custom_plan", "force_generic_plan"):
        large.execute(f"set plan_cache_mode = {mode}".encode())
        cursor.execute(f"explain (analyze, buffers, format json) {statement}".encode(), args)
        (row,) = cursor.fetchall()
        plan = row[0][0]["Plan"]
        for node in nodes(plan):
            big = node.get("Relation Name") == "messages"
            assert not (big and node["Node Type"] == "Seq Scan"), json.dumps(node, indent=1)[:2000]
        touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        assert touched < 1500, f"{mode}: {touched} pages"


def test_a_page_of_a_long_channel_reads_no_further_than_the_page(large: Connection) -> None:
    """Although the statistics say that channels are short, and although many control messages stand in it."""
    large.execute("insert into pgchan.channels (name, head) values ('busy', 20000)")
    large.execute(
        """
        insert into pgchan.messages (channel_id, position, at, kind, step, attempt, body)
        select c.id, n, clock_timestamp(), case when n % 4 = 0 then 2 else 0 end, 's', 1, '1'
        from pgchan.channels c, generate_series(1, 20000) n where c.name = 'busy'
        """
    )
    cursor = psycopg.RawCursor(large)
    ((busy,),) = large.execute("select id from pgchan.channels where name = 'busy'").fetchall()
    for statement, args in (
        (sql.PAGE_FINAL, ("busy", 0, 1002, 4 << 20)), (sql.PAGE_RAW, ("busy", 0, 1002, 4 << 20)),
        (sql.READ_MOVED, ([busy], [0], 500, 1 << 20)),
    ):  # fmt: skip
        for mode in ("force_custom_plan", "force_generic_plan"):
            large.execute(f"set plan_cache_mode = {mode}".encode())
            cursor.execute(f"explain (analyze, buffers, format json) {statement}".encode(), args)
            (row,) = cursor.fetchall()
            plan = row[0][0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 3_000
            assert all(node["Actual Rows"] * node["Actual Loops"] <= 2_500 for node in nodes(plan))
    (row,) = large.execute("explain (analyze, buffers, format json) select * from pgchan.read('busy')").fetchall()
    assert row[0][0]["Plan"]["Shared Hit Blocks"] < 1_000


def test_an_append_to_a_large_table_touches_few_pages(large: Connection) -> None:
    for keys in ("array['new']", "array['k10']"):  # one that is new, one that is stored
        (row,) = large.execute(
            f"""
            explain (analyze, buffers, format json)
            select a.* from pgchan.append(
              array[5::bigint], array['c5'], array['application/json'], null, null, array[1], null,
              array[1], array[1], array[0::smallint], {keys}, null, null, null, array['"text"'::bytea]) a
            """.encode()
        ).fetchall()
        plan = row[0][0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300


def test_updates_of_channels_stay_hot(dsn: str, block_until: Callable[..., None]) -> None:
    with pgchan.Client(dsn) as client:
        for n in range(150):
            client.channel(f"c{n % 3}").publish(n)
        client.channel("c0").publish_many([0] * 10)
    # A session reports what it did when it ends, at the latest, and to nobody who waits for it.
    counted = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relid = 'pgchan.channels'::regclass"
    block_until(lambda: query(dsn, counted)[0][0] >= 100)
    ((updates, hot),) = query(dsn, counted)
    assert hot >= 0.95 * updates
