"""Old code and new code on one database, while it is migrated.

The old code is that of the last release, as its wheel has it, in processes of its own: see release.py and traffic.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import release
import traffic
from cluster import Cluster
from doors import query
from freeze import RELEASED, REVISION
from traffic import Traffic

import pgchan
from pgchan import db, errors, migrate
from pgchan.migrations import statements

LAST = max(RELEASED)
VERSIONS = Path(__file__).parent.parent / "migrations" / "versions"
STALL_SECONDS = 2.0  # what a migration may cost somebody who publishes

pytestmark = pytest.mark.timeout(240)  # many processes start, on whatever machine


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the code of the last release is."""
    return release.unpack(RELEASED[LAST], tmp_path_factory.mktemp("released"))


@pytest.fixture
def old_dsn(empty_dsn: str) -> str:
    """A database of this test's own as the last release made it, and a table of the user's."""
    migrate.upgrade(empty_dsn, LAST)
    query(empty_dsn, "create table marks (run text)")
    return empty_dsn


Begin = Callable[..., Traffic]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start a process: `begin(code, role, dsn, name, …)`; what is left of them ends with the test."""
    begun: list[Traffic] = []

    def start(*arguments: Any) -> Traffic:
        begun.append(Traffic(*arguments))
        return begun[-1]

    yield start
    for process in begun:
        process.close()


def migrator(dsn: str, *arguments: str, code: Path | None = None) -> subprocess.Popen[str]:
    """`pgchan migrate` in a process of its own."""
    environment = os.environ | {"PGCHAN_DSN": dsn} | ({"PYTHONPATH": str(code)} if code is not None else {})
    return subprocess.Popen(
        [sys.executable, "-m", "pgchan.cli", "migrate", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


async def ended(process: subprocess.Popen[str], seconds: float = 60.0) -> tuple[str, str]:
    """Wait for a command that must succeed; what it printed and what it complained of."""
    out, complaints = await asyncio.to_thread(process.communicate, timeout=seconds)
    assert process.returncode == 0, complaints
    return out, complaints


async def all_ended(dsn: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while left := query(dsn, "select count(*) from pgchan.runs where ended_at is null")[0][0]:
        assert time.monotonic() < deadline, f"{left} runs have not ended"
        await asyncio.sleep(0.05)


def test_a_migration_leaves_all_that_a_call_under_way_may_still_call() -> None:
    """Who is in the middle of a routine goes on with its old text, once the tables are free again."""
    up = (VERSIONS / f"{REVISION}.sql").read_text()
    assert not re.findall(r"(?m)^drop (?:routine|function|procedure|view|table)\b.*", up)


def check_nothing_was_lost(dsn: str, publishers: list[Traffic]) -> None:
    """Each acknowledged message is where it was said to be, and each run did everything once."""
    for publisher in publishers:
        said = {(channel, position): body for channel, position, body, _ in publisher.told("published")}
        stored = query(
            dsn,
            "select c.name, m.position, convert_from(m.body, 'UTF8')::integer from pgchan.messages m "
            "join pgchan.channels c on c.id = m.channel_id where starts_with(c.name, %s)",
            f"{publisher.name}/",
        )
        assert said
        assert said.items() <= {(channel, position): body for channel, position, body in stored}.items()
        assert len({body for _, _, body in stored}) == len(stored), "a message was stored twice"
    assert query(dsn, "select distinct state, convert_from(result, 'UTF8') from pgchan.runs "
                      "where workflow = 'squares'") == [("succeeded", "5")]  # fmt: skip
    runs = query(dsn, "select count(*) from pgchan.runs where workflow = 'squares'")[0][0]
    assert query(dsn, "select count(*), count(distinct run) from marks") == [(runs, runs)]
    steps = query(dsn, "select count(*), count(distinct (m.channel_id, m.key)) from pgchan.messages m "
                       "join pgchan.runs r on r.journal_id = m.channel_id "
                       "where r.workflow = 'squares' and m.kind = 0")  # fmt: skip
    assert steps == [(4 * runs, 4 * runs)]


async def test_a_deploy_under_traffic_loses_nothing_and_stalls_nobody(old: Path, old_dsn: str, begin: Begin) -> None:
    names = ["old", "blocking", "transactions", "new", "new-blocking"]
    channels = [f"{name}/{n}" for name in names for n in range(traffic.CHANNELS)]
    workers = [begin(old, traffic.work, old_dsn, f"old-{n}") for n in range(2)]
    readers = [begin(old, traffic.read, old_dsn, "old-reader", *channels)]
    publishers = [
        begin(old, traffic.publish, old_dsn, "old"),
        begin(old, traffic.publish_blocking, old_dsn, "blocking"),
        begin(old, traffic.publish_in_transactions, old_dsn, "transactions"),
    ]
    await asyncio.gather(*(process.started() for process in [*workers, *readers, *publishers]))
    for publisher in publishers:
        await publisher.tells("published", times=20)

    for out, told in await asyncio.gather(ended(migrator(old_dsn)), ended(migrator(old_dsn))):
        assert out == f"{REVISION}\n", "one migrates; the other waits, then finds nothing to do"
        assert all(line.endswith("trying again") for line in told.splitlines()), "on a busy machine it may have to"
    for publisher in publishers:
        await publisher.tells("published", times=len(publisher.told("published")) + 20)

    fresh = [begin(None, traffic.work, old_dsn, f"new-{n}") for n in range(2)]
    readers.append(begin(None, traffic.read, old_dsn, "new-reader", *channels))
    publishers += [
        begin(None, traffic.publish, old_dsn, "new"),
        begin(None, traffic.publish_blocking, old_dsn, "new-blocking"),
    ]
    await asyncio.gather(*(process.started() for process in [*fresh, *readers, *publishers]))
    workers[0].kill()
    for publisher in publishers:
        await publisher.tells("published", times=len(publisher.told("published")) + 20)
    fresh[0].kill()
    for publisher in publishers:
        await publisher.tells("published", times=len(publisher.told("published")) + 20)
        await publisher.stop()

    await all_ended(old_dsn)
    heads = {name: head for name, head in query(old_dsn, "select name, head from pgchan.channels") if name in channels}
    for reader in readers:
        await reader.tells("read", times=sum(heads.values()))
        await reader.stop()
    await asyncio.gather(workers[1].stop(), fresh[1].stop())
    check_nothing_was_lost(old_dsn, publishers)
    stalls = {publisher.name: round(publisher.longest(), 3) for publisher in publishers}
    print(f"longest calls, in seconds: {stalls}")
    assert max(stalls.values()) < STALL_SECONDS


async def test_a_run_goes_from_an_old_worker_to_a_new_one_and_back(old: Path, old_dsn: str, begin: Begin) -> None:
    before = await begin(old, traffic.work, old_dsn, "before").started()
    query(old_dsn, "select pgchan.start('relay', id => 'up')")
    await before.tells("hanging")
    await ended(migrator(old_dsn))
    after = await begin(None, traffic.work, old_dsn, "after").started()
    before.kill()
    await all_ended(old_dsn)

    query(old_dsn, "select pgchan.start('relay', id => 'down')")
    await after.tells("hanging")
    again = await begin(old, traffic.work, old_dsn, "again").started()  # an old process that starts during the deploy
    after.kill()
    await all_ended(old_dsn)
    await again.stop()
    results = dict(query(old_dsn, "select id, pgchan.status(id) -> 'result' from pgchan.run_status"))
    assert results == {"up": [LAST, REVISION], "down": [REVISION, LAST]}


async def test_a_transaction_that_stays_open_holds_up_the_migration_and_nobody_else(
    old: Path, old_dsn: str, begin: Begin
) -> None:
    publisher = await begin(old, traffic.publish, old_dsn, "old").started()
    with psycopg.connect(old_dsn) as holder:
        holder.execute("select pgchan.publish('held', '1')")
        began = time.monotonic()
        waiting = migrator(old_dsn)
        assert waiting.stderr is not None
        reports = [await asyncio.to_thread(waiting.stderr.readline) for _ in range(5)]
        seconds = time.monotonic() - began
        assert waiting.poll() is None
        assert query(old_dsn, "select pgchan.version()") == [(LAST,)]
        pid = holder.info.backend_pid
        holder.commit()
    out, _ = await ended(waiting)
    assert out == f"{REVISION}\n"
    for report in reports:
        assert re.fullmatch(rf"pgchan: table pgchan\.\w+ is in use by session {pid}, .*; trying again\n", report)
    published = len(publisher.told("published"))
    await publisher.tells("published", times=published + 10)
    await publisher.stop()
    print(f"{published} messages in {seconds:.1f} s of waiting, the longest took {publisher.longest():.3f} s")
    assert publisher.longest() < STALL_SECONDS


def test_a_migration_that_cannot_get_a_table_gives_up_and_has_changed_nothing(old_dsn: str) -> None:
    text = (VERSIONS / f"{REVISION}.sql").read_text("utf-8")
    impatient = text.replace("interval '60 seconds'", "interval '0 seconds'")
    assert impatient != text
    with psycopg.connect(old_dsn) as holder, psycopg.connect(old_dsn) as migrating:
        holder.execute("select from pgchan.messages")
        with pytest.raises(psycopg.errors.LockNotAvailable, match=f"in use by session {holder.info.backend_pid}"):
            migrating.execute(impatient.encode())
        migrating.rollback()
        assert migrating.execute("select pgchan.version()").fetchone() == (LAST,)


@pytest.mark.parametrize("server", [{
    "autovacuum_naptime": "1s", "autovacuum_vacuum_cost_delay": "100ms", "autovacuum_vacuum_cost_limit": "1",
}], indirect=True)  # fmt: skip
async def test_an_autovacuum_is_sent_out_of_the_way(server: Cluster, wait_until: Any) -> None:
    migrate.downgrade(server.dsn, LAST)
    query(server.dsn, "insert into pgchan.messages (channel_id, position, at, kind, body) "
                      "select 0, n, now(), 0, '1' from generate_series(1, 10000) n")  # fmt: skip
    query(server.dsn, "delete from pgchan.messages")
    vacuuming = "select pid from pg_stat_activity where query like 'autovacuum: VACUUM%pgchan.messages%'"
    await wait_until(lambda: query(server.dsn, vacuuming), seconds=30)
    ((pid,),) = query(server.dsn, vacuuming)
    _, complaints = await ended(migrator(server.dsn))
    assert f"session {pid}, " in complaints
    assert query(server.dsn, "select pgchan.version()") == [(REVISION,)]


async def test_a_new_process_on_an_old_schema_is_told_to_migrate(old_dsn: str) -> None:
    assert LAST < db.SCHEMA_OLDEST, "this code could work on the old schema; then test that it does"
    client = pgchan.AsyncClient(old_dsn)
    with pytest.raises(errors.SchemaMismatch) as caught:
        await pgchan.Worker(client, [traffic.squares]).run(signals=False)
    await client.close()
    assert str(caught.value) == f"the database is at {LAST}, this code needs {db.SCHEMA_OLDEST}; run: pgchan migrate"
    assert (caught.value.found, caught.value.wanted) == (LAST, db.SCHEMA_OLDEST)


def test_a_new_client_that_blocks_is_told_so_too(old_dsn: str) -> None:
    with pytest.raises(errors.SchemaMismatch, match="run: pgchan migrate"), pgchan.Client(old_dsn):
        pass


async def test_an_old_process_that_migrates_as_it_starts_leaves_a_new_schema_alone(old: Path, dsn: str) -> None:
    assert (await ended(migrator(dsn, code=old)))[0] == f"{REVISION}\n"
    assert query(dsn, "select pgchan.version()") == [(REVISION,)]


def old_statements(old: Path) -> dict[str, str]:
    """What the old code sends, by name."""
    spec = importlib.util.spec_from_file_location("old_sql", old / "pgchan" / "sql.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: text for name, text in vars(module).items() if name.isupper() and isinstance(text, str)}


def test_the_new_schema_answers_every_statement_of_old_code_in_the_same_form(
    old: Path, old_dsn: str, dsn: str
) -> None:
    found = old_statements(old)
    assert len(found) > 50
    with psycopg.connect(old_dsn) as before, psycopg.connect(dsn) as after:
        for name, text in found.items():
            assert form(after, text) == form(before, text), name


def form(connection: psycopg.Connection[Any], statement: str) -> list[tuple[bytes | None, int]]:
    """The columns that a statement returns: names and types."""
    parsed = connection.pgconn.prepare(b"", statement.encode())
    assert parsed.status == psycopg.pq.ExecStatus.COMMAND_OK, parsed.error_message.decode()
    described = connection.pgconn.describe_prepared(b"")
    assert described.status == psycopg.pq.ExecStatus.COMMAND_OK, described.error_message.decode()
    return [(described.fname(n), described.ftype(n)) for n in range(described.nfields)]


# Calls of workers, in the form of both releases: of a run and its journal.
CALLS_OF_WORKERS = {
    "an end": "call pgchan.call_finish({run}, 0, 'succeeded', null, null, null, null)",
    "a record": "call pgchan.write('{{{journal}}}', null, null, '{{0}}', '{{{journal}}}', '{{1}}', null, '{{1}}', "
                "'{{1}}', '{{0}}', '{{step}}', '{{step}}', '{{1}}', null, array['1'::bytea], 50, "
                "null, null, null, null, null, null, null)",
    "a signal": "call pgchan.call_deliver('r', '1', 'k', null, null, null, null, null, null)",
    "a start": "call pgchan.call_enqueue('r2', 'w', null, 'q', 0, null, null, '{{}}', null, null, null)",
}  # fmt: skip
# What a newer worker says, by the batch and by itself, and how it hears that this was not done. A routine that was
# dropped while it ran cannot return: to the client that is a doubt, and it looks for what it wrote.
WRITES_OF_WORKERS: dict[str, tuple[str, str]] = {
    "output": ("call pgchan.write('{{{run},{journal}}}', null, null, '{{0,0}}', '{{{journal},{journal}}}', '{{1,1}}', "
              "null, '{{1,2}}', '{{1,1}}', '{{0,0}}', null, '{{step,step}}', '{{1,1}}', null, "
               "array['1','2']::bytea[], 50, null, null, null, null, null, null, null)", "42883"),
    "lone output": ("call pgchan.write_entry({run}, 0, {journal}, null, 0::smallint, null, 'step', 1, null, '1', 50, "
                    "null, null, null)", "XX000"),
}  # fmt: skip


async def under_a_downgrade(dsn: str, wait_until: Any, call: str, *, parting: bool) -> tuple[BaseException | None, int]:
    """What became of a call that a run's worker has sent while a downgrade had the tables, and how many messages there
    are then. Without parting: the migrating role may not end other roles' sessions."""
    down = statements.split((VERSIONS / f"{REVISION}.down.sql").read_text("utf-8"))
    assert "pg_terminate_backend" in down[-1]

    def send() -> BaseException | None:
        with psycopg.connect(dsn, autocommit=True) as other:
            try:
                other.execute(call.encode())
            except psycopg.Error as error:
                return error
        return None

    with psycopg.connect(dsn, autocommit=True) as connection, connection.transaction():
        connection.execute(down[0].encode())  # the locks
        sending = asyncio.create_task(asyncio.to_thread(send))
        await wait_until(lambda: query(
            dsn, "select 1 from pg_locks l join pg_database d on d.oid = l.database "
                 "where d.datname = current_database() and not l.granted"))  # fmt: skip
        for statement in down[1:] if parting else down[1:-1]:
            connection.execute(statement.encode())
    error = await sending
    return error, int(query(dsn, "select count(*) from pgchan.messages")[0][0])


def begun(dsn: str, call: str) -> str:
    """A call, of a run that has just been started."""
    query(dsn, "select pgchan.start('squares', '[]', 'r')")
    ((run, journal),) = query(dsn, "select channel_id, journal_id from pgchan.runs")
    return call.format(run=run, journal=journal)


@pytest.mark.parametrize("what", CALLS_OF_WORKERS)
async def test_what_a_worker_writes_while_a_downgrade_has_the_tables_is_cut_off_and_can_be_repeated(
    old_dsn: str, wait_until: Any, what: str
) -> None:
    migrate.upgrade(old_dsn)
    call = begun(old_dsn, CALLS_OF_WORKERS[what])
    error, _ = await under_a_downgrade(old_dsn, wait_until, call, parting=True)
    assert isinstance(error, psycopg.errors.AdminShutdown)
    query(old_dsn, call)
    ((stored,),) = query(old_dsn, "select count(*) from pgchan.messages")
    assert stored == (what in ("a record", "a signal")), "nobody has claimed the run, so nobody may end it"


@pytest.mark.parametrize("what", WRITES_OF_WORKERS)
async def test_what_a_downgrade_leaves_a_worker_without_is_missed_before_anything_is_stored(
    old_dsn: str, wait_until: Any, what: str
) -> None:
    migrate.upgrade(old_dsn)
    call, sqlstate = WRITES_OF_WORKERS[what]
    error, stored = await under_a_downgrade(old_dsn, wait_until, begun(old_dsn, call), parting=False)
    assert isinstance(error, psycopg.Error)
    assert error.sqlstate == sqlstate
    assert stored == 0, "the worker writes again"


async def test_a_downgrade_while_workers_of_both_run_loses_nothing(old: Path, old_dsn: str, begin: Begin) -> None:
    migrate.upgrade(old_dsn)
    workers = [begin(old, traffic.work, old_dsn, "old-worker"), begin(None, traffic.work, old_dsn, "new-worker")]
    publishers = [begin(old, traffic.publish, old_dsn, "old"), begin(None, traffic.publish, old_dsn, "new")]
    await asyncio.gather(*(process.started() for process in [*workers, *publishers]))
    out, _ = await ended(migrator(old_dsn, LAST, "--yes"))
    assert out == f"{LAST}\n"
    for publisher in publishers:
        await publisher.tells("published", times=len(publisher.told("published")) + 20)
    await asyncio.gather(*(publisher.stop() for publisher in publishers))
    await all_ended(old_dsn)
    await asyncio.gather(*(worker.stop() for worker in workers))
    check_nothing_was_lost(old_dsn, publishers)
    assert max(publisher.longest() for publisher in publishers) < STALL_SECONDS
    assert migrate.upgrade(old_dsn) == REVISION

