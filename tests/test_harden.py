"""`pgchan harden`: locks and wakeups through pgchan only, for everybody whom it concerns, and back again exactly."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import binary
from doors import Door, Reading, query
from logins import Logins
from workers import Processes, everything

import pgchan
from pgchan import doctor, errors, harden, migrate

FUNCTIONS = 22  # for advisory locks, 21, and pg_notify

# Who may call what of PostgreSQL's own functions, in effect: no list means the default one.
RIGHTS = """
select p.oid::regprocedure::text, a.grantee::text, a.privilege_type, a.is_grantable
from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
where p.pronamespace = 'pg_catalog'::regnamespace order by 1, 2, 3
"""
LOCKS = """
select p.proname, oidvectortypes(p.proargtypes) from pg_proc p
where p.pronamespace = 'pg_catalog'::regnamespace and p.proname ~ 'advisory' and p.proname !~ 'lock_all'
"""


@pytest.fixture
def logins(admin: psycopg.Connection[Any], dsn: str) -> Iterator[Logins]:
    logins = Logins(admin, dsn)
    yield logins
    logins.close()


@pytest.fixture
def owned(admin: psycopg.Connection[Any], empty_dsn: str) -> Iterator[tuple[str, str, Logins]]:
    """A database whose pgchan belongs to a role of its own, no superuser: DSNs of a superuser and of that role."""
    logins = Logins(admin, empty_dsn)
    owner = logins.of()
    database = psycopg.conninfo.conninfo_to_dict(empty_dsn)["dbname"]
    admin.execute(f"grant create on database {database} to {logins.names[0]}".encode())
    migrate.upgrade(owner)
    yield empty_dsn, owner, logins
    logins.close()


def dump(dsn: str) -> str:
    done = subprocess.run([binary("pg_dump"), "--schema-only", "-d", dsn], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


def test_it_is_undone_exactly(owned: tuple[str, str, Logins]) -> None:
    dsn, _, logins = owned
    before, text = query(dsn, RIGHTS), dump(dsn)
    planned = harden.harden(dsn, dry_run=True)
    assert query(dsn, RIGHTS) == before, "a dry run changes nothing"
    assert sum(statement.startswith("revoke") for statement in planned) == FUNCTIONS
    assert harden.harden(dsn) == planned
    hardened = query(dsn, RIGHTS)
    gone = {row[0] for row in before if row[1] == "0"} - {row[0] for row in hardened if row[1] == "0"}
    assert len(gone) == FUNCTIONS
    ((owner,),) = query(dsn, f"select '{logins.names[0]}'::regrole::oid::text")
    assert {row[0] for row in hardened if row[1] == owner} == gone
    assert harden.harden(dsn) == [], "and again"
    assert harden.harden(dsn, undo=True, dry_run=True) == harden.harden(dsn, undo=True) != []
    assert query(dsn, RIGHTS) == before
    assert dump(dsn) == text
    assert harden.harden(dsn, undo=True) == []
    left = "select 1 from pg_shdepend where classid = 'pg_proc'::regclass and objid < 16384 and dbid = d.oid"
    assert query(dsn, f"select 1 from pg_database d where datname = current_database() and exists ({left})") == []


def test_another_database_of_the_server_is_not_concerned(dsn: str, make_database: Callable[[str], str]) -> None:
    other = make_database("template0")
    before = query(other, RIGHTS)
    harden.harden(dsn)
    assert query(other, RIGHTS) == before


def test_a_right_that_somebody_granted_by_hand_stays(dsn: str, logins: Logins) -> None:
    login = logins.of()
    query(dsn, f"grant execute on function pg_advisory_lock(bigint) to {logins.names[0]}")
    harden.harden(dsn)
    query(login, "select pg_advisory_lock(1)")
    harden.harden(dsn, undo=True)
    query(dsn, "revoke execute on function pg_advisory_lock(bigint) from public")
    query(login, "select pg_advisory_lock(1)")


def test_two_at_once_both_succeed(dsn: str) -> None:
    done: list[list[str]] = []
    threads = [threading.Thread(target=lambda: done.append(harden.harden(dsn))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, done)) == [0, 0, 0, FUNCTIONS]


def test_others_may_then_not_lock_and_not_call_pg_notify(dsn: str, logins: Logins) -> None:
    harden.harden(dsn)
    with psycopg.connect(logins.of(), autocommit=True) as stranger:
        for name, arguments in query(dsn, LOCKS):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute(f"select {name}({', '.join('1::' + one for one in arguments.split(', '))})".encode())
        for statement in ("select pg_advisory_unlock_all()", "select pg_notify('pgchan_0', '1:2')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute(statement.encode())
        for routine in ("take_lock(1)", "await_lock(1, 1)", "free_lock(1)", "free_locks()", "ping('')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute(f"select pgchan.{routine}".encode())
        stranger.execute("notify pgchan_0, '1:2'")  # a command: nothing can be revoked
        stranger.execute("listen pgchan_0")


def test_a_publisher_may_then_not_lock_either_and_a_worker_only_workers(dsn: str, logins: Logins) -> None:
    harden.harden(dsn)
    for group, routine in (("pgchan_publisher", "take_lock(1)"), ("pgchan_subscriber", "take_lock(1)")):
        with psycopg.connect(logins.of(group)) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"select pgchan.{routine}".encode())
    with psycopg.connect(logins.of("pgchan_worker"), autocommit=True) as connection:
        assert connection.execute("select pgchan.take_lock(7)").fetchall() == [(True,)]
        held = query(dsn, "select pid from pg_locks where locktype = 'advisory' and classid = 1885823848 and objid = 7")
        mine = connection.execute("select pg_backend_pid()").fetchall()
        assert held == mine, "the lock is this session's, whoever owns the function"
        assert connection.execute("select pgchan.take_lock(0)").fetchall() == [(None,)], "that is the migrators'"


async def test_a_publisher_a_subscriber_and_workers_go_on_as_before(
    owned: tuple[str, str, Logins], reading: Callable[[Any], Reading]
) -> None:
    dsn, _, logins = owned
    harden.harden(dsn)
    processes = Processes(logins.of("pgchan_worker"))
    try:
        async with (
            pgchan.AsyncClient(logins.of("pgchan_publisher")) as publisher,
            pgchan.AsyncClient(logins.of("pgchan_subscriber")) as subscriber,
        ):
            first = await processes.start("first", at="output_published")
            heard = reading(subscriber.run("talk").tail())
            handle = await publisher.start(everything, id="talk")
            await first.tells("point", "output_published")
            await processes.start("second")
            first.kill()
            await handle.signal("one")
            await handle.signal("two")
            assert await subscriber.run("talk").result(20) == ["one", "two"]
            await heard.end()
            assert heard.bodies[-1] == {"type": "ended", "state": "succeeded"}
    finally:
        processes.close()


async def test_wakeups_still_arrive_at_once(door: Door, logins: Logins, reading: Callable[[Any], Reading]) -> None:
    harden.harden(door.dsn)
    reader = reading(door.client(logins.of("pgchan_subscriber")).channel("c").tail())
    publisher = door.client(logins.of("pgchan_publisher"))
    await publisher.channel("c").publish(0)
    await reader.has(1)
    for n in range(1, 20):  # a sweep each would take twenty seconds
        await publisher.channel("c").publish(n)
        await reader.has(n + 1, 5)
    assert reader.bodies == list(range(20))


@pytest.mark.parametrize("group", ["pgchan_publisher", "pgchan_subscriber", "pgchan_worker", "pgchan_admin"])
async def test_the_doctor_finds_all_well(dsn: str, logins: Logins, group: str) -> None:
    harden.harden(dsn)
    assert [finding for finding in await doctor.check(logins.of(group)) if not finding.is_fine] == []


def test_the_owner_still_migrates(owned: tuple[str, str, Logins]) -> None:
    dsn, owner, _ = owned
    harden.harden(dsn)
    assert migrate.downgrade(owner) is None
    assert migrate.upgrade(owner) is not None


# ------------------------------------------------------------------------------------------------ the command


def command(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pgchan.cli", "harden", "--dsn", dsn, *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_what_a_dry_run_prints_does_the_same_in_psql(owned: tuple[str, str, Logins]) -> None:
    dsn, owner, _ = owned
    script = command(owner, "--dry-run")
    assert script.returncode == 0
    assert "the commands LISTEN and NOTIFY cannot be revoked" in script.stdout
    psql = [binary("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn]
    subprocess.run(psql, input=script.stdout, text=True, check=True, timeout=60)
    assert harden.harden(dsn) == []


def test_the_command_says_what_it_did(dsn: str) -> None:
    done = [json.loads(line) for line in command(dsn, "--json").stdout.splitlines()]
    assert len(done) == FUNCTIONS
    assert all(one["done"] and one["statement"].startswith("revoke execute on function pg_catalog.pg_") for one in done)
    assert command(dsn).stdout.startswith("-- nothing to change\n")
    undone = command(dsn, "--undo")
    assert undone.returncode == 0
    assert undone.stdout.count("grant execute on function pg_catalog.pg_") == FUNCTIONS


def test_who_is_no_superuser_is_told_so_and_nothing_changes(owned: tuple[str, str, Logins]) -> None:
    dsn, owner, _ = owned
    before = query(dsn, RIGHTS)
    for arguments in ([], ["--undo"]):
        refused = command(owner, *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "not a superuser" in refused.stderr and refused.stderr.count("\n") == 1
    assert query(dsn, RIGHTS) == before


def test_a_database_without_pgchan_is_refused(empty_dsn: str) -> None:
    with pytest.raises(errors.SchemaMismatch, match="pgchan migrate"):
        harden.harden(empty_dsn)
    assert command(empty_dsn).returncode == 2
