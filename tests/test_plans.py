"""The hot statements on full tables: each finds its rows by an index and touches few, however many there are.

Those that clients send are explained; of the routines the rows are counted that their transaction has read, table by
table. Both with plans made for the arguments and with generic ones, for a session comes to send either.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from cluster import on_database
from doors import query
from workers import Workers

import pgchan
from pgchan import db, sql

Connection = psycopg.Connection[Any]

CHANNELS = 20_000  # that belong to no run, with a time to live that is not over
ENDED = 20_000  # runs; no more is to be read of them by anybody but who asks for one
SLEEPING = 20_000
WAITING = 2_000  # for a signal, without a timer
READY = 5_000
RUNNING = 200
MESSAGES = 5  # in each of some channels
STEPS = 1_000  # in the journal of one run
OUTPUT = 20_000  # messages of one channel
WORKER = 7
TABLES = ("channels", "messages", "runs")
MODES = ("force_custom_plan", "force_generic_plan")
NOBODY = 10**15  # an id, and a position, that nothing has

FILL = f"""
create temporary table filled as
  select k.prefix || n as name, k.*, n, nextval('pgchan.channel_numbers') << 20 as id,
         nextval('pgchan.channel_numbers') << 20 as journal
  from (values ('ended/', 'succeeded', 'w', 'default', {ENDED}), ('sleeping/', 'scheduled', 'w', 'default', {SLEEPING}),
               ('waiting/', 'waiting', 'w', 'default', {WAITING}), ('ready/', 'scheduled', 'w', 'default', {READY}),
               ('running/', 'running', 'w', 'default', {RUNNING}))
       k (prefix, state, workflow, queue, count), generate_series(1, k.count) n;
insert into pgchan.channels (id, name, head, closed_at)
  select f.id, f.name, {MESSAGES}, case when f.state = 'succeeded' then clock_timestamp() end from filled f;
insert into pgchan.channels (id, name, head)
  select f.journal, 'pgchan:journal:' || f.id, case f.state when 'scheduled' then 0 else 1 end from filled f;
insert into pgchan.workers (id, name, host, pid, backend_pid) overriding system value
  select n, 'w' || n, 'host', n, n from generate_series(1, 10) n;
insert into pgchan.runs (channel_id, journal_id, workflow, queue, state, wake_at, worker, input, result, created_at,
                         started_at, ended_at)
  select f.id, f.journal, f.workflow, f.queue, f.state,
         case when f.prefix = 'sleeping/' then clock_timestamp() + make_interval(hours => 1 + f.n % 100) end,
         case when f.state = 'running' then {WORKER} end, '{{"args":[],"kwargs":{{}}}}',
         case when f.state = 'succeeded' then '1'::bytea end, clock_timestamp() - make_interval(secs => 100000 - f.n),
         case when f.state in ('succeeded', 'running', 'waiting') then clock_timestamp() end,
         case when f.state = 'succeeded' then clock_timestamp() end
  from filled f;
insert into pgchan.channels (name, head, expires_at, ttl, keep_messages)
  select 'zone/' || n, {MESSAGES}, clock_timestamp() + make_interval(days => 1 + n % 30), 86400,
         case when n % 10 = 0 then 100 end
  from generate_series(1, {CHANNELS}) n;
insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, body)
  select c.id, n, clock_timestamp(), case when n = 3 then 1 when n = 4 then 2 else 0 end,
         case when n = 5 then 'k' || n end, case when n = 2 then 'step' end, case when n = 2 then 1 end, '"some words"'
  from pgchan.channels c, generate_series(1, {MESSAGES}) n
  where c.name like 'zone/%5' or c.name like 'running/%' or c.name like 'waiting/%';
insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, body)
  select f.journal, 1, clock_timestamp(), 0, 'step', 'step', 1, '1' from filled f where f.state <> 'scheduled';
insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, body)
  select f.journal, g.n, clock_timestamp(), 0, 'step#' || g.n, 'step', 1, '"a result"'
  from filled f, generate_series(2, {STEPS}) g (n) where f.name = 'running/1';
update pgchan.channels set head = {STEPS} where id = (select journal from filled where name = 'running/1');
insert into pgchan.channels (name, head) values ('long', {OUTPUT});
insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, body)
  select c.id, n, clock_timestamp(), 0, null, null, '"some words"'
  from pgchan.channels c, generate_series(1, {OUTPUT}) n where c.name = 'long';
"""


@dataclass(frozen=True)
class Full:
    """A database full of channels, messages and runs; with statistics."""

    connection: Connection
    ids: dict[str, int]  # of channels by name
    journals: dict[str, int]

    def explain(self, statement: str, *args: object) -> dict[str, Any]:
        """The plan of a statement that was executed."""
        cursor = psycopg.RawCursor(self.connection)
        cursor.execute(f"explain (analyze, buffers, format json) {statement}".encode(), args)
        (row,) = cursor.fetchall()
        plan: dict[str, Any] = row[0][0]["Plan"]
        return plan

    def rows_read(self, statement: str, *args: object) -> dict[str, int]:
        """Rows that a statement, and all that it calls, has read, by table; it is undone."""
        counted = """
            select relname, seq_tup_read + coalesce(idx_tup_fetch, 0), seq_scan from pg_stat_xact_user_tables
            where schemaname = 'pgchan'
        """
        with self.connection.transaction(force_rollback=True):
            before = {name: (rows, scans) for name, rows, scans in self.connection.execute(counted)}
            psycopg.RawCursor(self.connection).execute(statement.encode(), args)
            found = {}
            for name, rows, scans in self.connection.execute(counted).fetchall():
                found[name] = rows - before[name][0]
                assert name not in TABLES or scans == before[name][1], f"a sequential scan of {name}"
            return found


@pytest.fixture(scope="module")
def filled(admin: Connection, template: str, shared_server: tuple[str, str]) -> Iterator[Full]:
    dsn, prefix = shared_server
    name = f"{prefix}_{os.getpid()}_full"
    admin.execute(f"create database {name} template {template}".encode())
    with psycopg.connect(on_database(dsn, name), autocommit=True) as connection:
        connection.execute(FILL.encode())
        for table in TABLES:
            connection.execute(f"vacuum analyze pgchan.{table}".encode())
        known = "select name, id from pgchan.channels where name !~ '^(pgchan:|zone)'"
        ids = dict(connection.execute(known).fetchall())
        journals = dict(connection.execute("select name, journal from filled").fetchall())
        for setting in db.SESSION.items():
            connection.execute("select set_config(%s, %s, false)", setting)
        yield Full(connection, ids, journals)
    admin.execute(f"drop database {name} with (force)".encode())


@pytest.fixture(params=MODES)
def full(request: pytest.FixtureRequest, filled: Full) -> Full:
    """The database, and a session that makes plans in one way."""
    filled.connection.execute("select set_config('plan_cache_mode', %s, false)", [request.param])
    return filled


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


def check(plan: dict[str, Any], *, rows: int, pages: int) -> None:
    """No part of the plan reads a table from end to end, or looks at more rows, or touches more pages."""
    shown = json.dumps(plan, indent=1)
    for node in nodes(plan):
        whole = node["Node Type"] == "Seq Scan" and node["Relation Name"] in TABLES
        assert not (whole and node["Actual Loops"]), shown
        looked_at = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        assert looked_at * node["Actual Loops"] <= rows, shown
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= pages, shown


# ------------------------------------------------------------------------------------------------ what clients send


def test_a_page_is_read_by_its_positions(full: Full) -> None:
    for statement in (sql.PAGE_FINAL, sql.PAGE_RAW):
        for after in (0, OUTPUT // 2, OUTPUT - 5):
            check(full.explain(statement, "long", after, 100, 4 << 20), rows=220, pages=700)
        check(full.explain(statement, "zone/5", NOBODY, 100, 4 << 20), rows=10, pages=40)


def test_what_moved_is_read_from_where_the_reader_stands(full: Full) -> None:
    check(full.explain(sql.READ_ONE, full.ids["long"], OUTPUT - 5, 8), rows=10, pages=20)
    moved = [full.ids["long"], *(full.ids[f"running/{n}"] for n in range(1, 21))]
    check(full.explain(sql.READ_MOVED, moved, [OUTPUT - 50, *([2] * 20)], 500, 1 << 20), rows=200, pages=500)


def test_a_sweep_looks_each_channel_up(full: Full) -> None:
    ids = [full.ids[f"running/{n}"] for n in range(1, RUNNING + 1)]
    check(full.explain(sql.SWEEP, ids), rows=RUNNING, pages=4 * RUNNING)


def test_names_are_looked_up_by_name(full: Full) -> None:
    names = [f"running/{n}" for n in range(1, 11)]
    check(full.explain(sql.FOLLOW, names), rows=10, pages=100)
    for statement in (sql.CHANNEL_INFO, sql.CHANNEL_ID, sql.RUN_RESULT, sql.RUN_JOURNAL, sql.RUN_STATUS):
        check(full.explain(statement, "running/9"), rows=2, pages=100)


@pytest.mark.parametrize(
    ("after", "prefix"), [("", ""), ("", "zone/"), ("zone/5", ""), ("", "running/"), ("ended/", ""), ("running/", "")]
)
def test_a_list_of_channels_begins_where_it_is_asked_to(full: Full, after: str, prefix: str) -> None:
    """In the order of names the journals of all runs stand between others."""
    check(full.explain(sql.CHANNELS, after, prefix, 20), rows=100, pages=200)


def test_a_list_of_channels_passes_over_journals(full: Full) -> None:
    last = max(name for name in full.ids if name < "pgchan:")
    check(full.explain(sql.CHANNELS, last, "", 20), rows=100, pages=200)


def test_a_list_of_runs_reads_a_page_of_them(full: Full) -> None:
    """Without a filter. With one it reads from the newest on until the page is full."""
    check(full.explain(sql.RUNS, None, None, None, 20, None), rows=100, pages=1_000)
    check(full.explain(sql.RUNS, None, None, None, 20, "ended/1000"), rows=100, pages=1_000)


def test_what_a_run_has_recorded_and_said_is_loaded_by_its_channels(full: Full) -> None:
    for run, rows, pages in (("running/1", STEPS, 100), ("running/2", 10, 30)):
        check(full.explain(sql.JOURNALS, [full.journals[run]]), rows=rows, pages=pages)
        check(full.explain(sql.SPOKEN, [full.ids[run]], [1]), rows=10, pages=30)
        check(full.explain(sql.INBOX, [full.ids[run]], [0], [1000]), rows=10, pages=30)
        check(full.explain(sql.PREVIOUS, full.ids[run], 1, "step", 2, 1000), rows=10, pages=30)
        check(full.explain(sql.WRITTEN_SINCE, full.ids[run], 2), rows=10, pages=30)


def test_the_signals_of_many_runs_are_looked_up_by_run(full: Full) -> None:
    ids = [full.ids[f"running/{n}"] for n in range(1, 101)]
    check(full.explain(sql.INBOX, ids, [0] * 100, [1000] * 100), rows=200, pages=2_000)


def test_a_look_at_the_queues_reads_no_run_that_sleeps_or_has_ended(full: Full) -> None:
    check(full.explain(sql.READY, ["default"], ["w"]), rows=10, pages=30)
    check(full.explain(sql.READY, ["nothing"], ["w"]), rows=10, pages=30)


def test_a_worker_finds_what_it_holds(full: Full) -> None:
    check(full.explain(sql.HELD, WORKER), rows=RUNNING, pages=5 * RUNNING)
    check(full.explain(sql.WORKERS), rows=RUNNING, pages=5 * RUNNING)


# ------------------------------------------------------------------------------------------------ what routines do


def spent(rows: dict[str, int], **most: int) -> None:
    """No more rows were read of each table than this."""
    assert all(rows[table] <= most.get(table, 0) for table in TABLES), rows


APPEND = """
select a.* from pgchan.append(
  $1::bigint[], $2::text[], $3::text[], null, null, $4::integer[], null, $5::integer[], $6::integer[], null, $7::text[],
  null, null, null, $8::bytea[], 50) a
"""


@pytest.mark.parametrize("key", [None, "new", "k5"])
def test_an_append_reads_its_channel(full: Full, key: str | None) -> None:
    known = ([full.ids["waiting/1"]], ["waiting/1"], ["application/json"], [1], [1], [1], [key], [b"1"])
    by_name = ([None], ["waiting/1"], ["application/json"], [1], [1], [1], [key], [b"1"])
    fresh = ([None], ["new"], ["application/json"], [1], [1], [1], [key], [b"1"])
    for args in (known, by_name, fresh):
        spent(full.rows_read(APPEND, *args), channels=20, messages=4)


def test_a_batch_over_many_channels_reads_each_of_them(full: Full) -> None:
    names = [f"waiting/{n}" for n in range(1, 101)]
    ones = [1] * 100
    args = ([full.ids[name] for name in names], names, ["application/json"] * 100, ones, list(range(1, 101)), ones)
    spent(full.rows_read(APPEND, *args, [None] * 100, [b"1"] * 100), channels=1_000)
    spent(full.rows_read(APPEND, *args, ["k5"] * 100, [b"1"] * 100), channels=1_000, messages=400)


ENQUEUE = "select pgchan.enqueue($1::text, 'w', null, 'default', 0, null, null, '1', null)"
CLAIM = f"select c.* from pgchan.claim({WORKER}, array['default'], array['w'], $1::integer) c"


def test_a_start_reads_what_has_its_name(full: Full) -> None:
    spent(full.rows_read(ENQUEUE, "new"), channels=10, runs=4)
    spent(full.rows_read(ENQUEUE, "ready/1"), channels=10, runs=4)


def test_a_claim_reads_the_runs_that_it_takes(full: Full) -> None:
    spent(full.rows_read(CLAIM, 1), channels=20, runs=20)
    spent(full.rows_read(CLAIM, 100), channels=2_000, runs=2_000)


def test_a_claim_reads_no_more_although_the_statistics_say_that_nothing_is_ready(full: Full) -> None:
    """As after an hour without work, until the next ANALYZE."""
    with full.connection.transaction(force_rollback=True):
        full.connection.execute(
            "update pgchan.runs set state = 'waiting' where state = 'scheduled' and wake_at is null"
        )
        full.connection.execute("analyze pgchan.runs")
        full.connection.execute(
            "update pgchan.runs r set state = 'scheduled' where state = 'waiting' and started_at is null"
        )
        spent(full.rows_read(CLAIM, 1), channels=20, runs=20)


def test_a_claim_that_finds_nothing_reads_nothing(full: Full) -> None:
    claim = f"select c.* from pgchan.claim({WORKER}, array['nothing'], array['w'], 10) c"
    spent(full.rows_read(claim), channels=10, runs=10)


def test_a_run_ends_suspends_and_begins_anew_by_its_id(full: Full) -> None:
    run = full.ids["running/3"]
    finish = "select pgchan.finish($1::bigint, 0, 'succeeded', '1', null)"
    spent(full.rows_read(finish, run), channels=40, runs=10, messages=10)
    suspend = "select pgchan.suspend($1::bigint, 0, null, 10, array['ended/7', 'waiting/7'])"
    spent(full.rows_read(suspend, run), channels=20, runs=10, messages=5)
    spent(full.rows_read("select pgchan.continue_run($1::bigint, 0, '1')", run), channels=20, runs=10, messages=5)


def test_a_signal_and_a_cancellation_reach_their_run(full: Full) -> None:
    for name in ("waiting/1", "running/4", "ready/1"):
        spent(full.rows_read("select pgchan.deliver($1::text, '1', 'new')", name), channels=20, runs=10, messages=10)
        spent(full.rows_read("select pgchan.cancel($1::text)", name), channels=40, runs=20, messages=10)


def test_a_worker_gives_back_what_it_holds(full: Full) -> None:
    some = [full.ids[f"running/{n}"] for n in range(1, 11)]
    release = "select pgchan.release($1::integer, $2::bigint[])"
    spent(full.rows_read(release, WORKER, some), channels=200, runs=RUNNING + 100)
    spent(full.rows_read(release, WORKER, None), channels=20 * RUNNING, runs=10 * RUNNING)
    spent(full.rows_read(release, 3, None))


def test_the_upkeep_that_has_nothing_to_do_reads_little(full: Full) -> None:
    """Nothing is over, however many channels have a time to live and however many runs have ended."""
    spent(full.rows_read("select pgchan.upkeep()"), channels=500, messages=100, runs=10)
    full.connection.execute("select pgchan.set_retention(1e6)")
    try:
        spent(full.rows_read("select pgchan.upkeep()"), channels=500, messages=100, runs=10)
    finally:
        full.connection.execute("select pgchan.set_retention(null)")


# ------------------------------------------------------------------------------------------------ tables that grow


async def say(run: pgchan.Run) -> None:
    await run.publish("hello")


@pgchan.workflow
async def talk(run: pgchan.Run) -> int:
    """Says something, is told something, and records it."""
    await run.step(say, run)
    message = await run.receive()
    assert message is not None
    return await run.step(lambda: message.position, name="note")


async def test_sessions_that_began_with_empty_tables_read_by_keys_when_they_are_full(
    dsn: str, workers: Workers
) -> None:
    count = 800

    async def one(client: pgchan.AsyncClient) -> None:
        handle = await client.start(talk)
        await handle.signal("x")
        assert [message.body async for message in handle.tail() if message.kind == "message"] == ["hello"]
        await handle.result(30)
        assert await handle.cancel() is False

    worker = await workers.start(talk)
    async with pgchan.AsyncClient(dsn) as client:
        for _ in range(count // 20):
            await asyncio.gather(*(one(client) for _ in range(20)))
    await workers.stop(worker)  # a session that ends reports what it has read
    counted = (
        "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables "
        "where schemaname = 'pgchan' and relname = any (%s)"
    )
    before = 0
    while (found := query(dsn, counted, list(TABLES))[0][0]) != before:
        before = found
        await asyncio.sleep(1)
    assert 20 * count < found < 200 * count
