"""Deployments on which a promise would break refuse to start, at every way in, with one sentence that says what to do.

The ways in: both clients, a worker, and the commands `worker`, `serve` and `doctor`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster, on_database
from doors import pretend, query
from pooler import Pooler
from psycopg import sql
from workers import Workers

import pgchan
from pgchan import doctor, errors

PROGRAM = """
import pgchan
from pgchan.server import Insecure, create_app

@pgchan.workflow
async def nothing(run): ...

client = pgchan.AsyncClient(timeout=2)
worker = pgchan.Worker(client, [nothing])
app = create_app(client, auth=Insecure())
"""


@pgchan.workflow
async def nothing(run: pgchan.Run) -> None: ...


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run `pgchan` with these arguments on a database: its exit status, and what it printed and complained of."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(dsn: str, *arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pgchan.cli", *arguments], cwd=tmp_path, env=os.environ | {"PGCHAN_DSN": dsn},
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., Any]:
    """Check that a database is refused at every way in, with this sentence; the doctor reports it under `check`."""

    async def refused(
        dsn: str, sentence: str, *, check: str = "deployment", kind: Any = errors.UnsafeDeployment
    ) -> None:
        async def doctors() -> None:
            (found,) = [finding for finding in await doctor.check(dsn) if not finding.is_fine]
            assert (found.check, found.detail) == (check, sentence)

        status = 2 if kind is errors.SchemaMismatch else 1
        await asyncio.gather(_clients(dsn, sentence, kind), doctors(), *(
            asyncio.to_thread(_program, command, dsn, sentence, status, *arguments)
            for arguments in (["worker", "program:worker"], ["serve", "program:app", "--port", "0"])
        ))  # fmt: skip
        status, out, _ = await asyncio.to_thread(command, dsn, "doctor")
        assert (status, f"NOT FINE\t{check}: {sentence}\n" in out) == (1, True), out

    return refused


async def _clients(dsn: str, sentence: str, kind: Any) -> None:
    blocking, client = pgchan.Client(dsn, timeout=2), pgchan.AsyncClient(dsn, timeout=2)
    for call in (
        client.channel("chat").publish(1), client.channel("chat").tail().__anext__(),
        pgchan.Worker(client, [nothing]).run(signals=False),
        asyncio.to_thread(blocking.channel("chat").publish, 1),
        asyncio.to_thread(next, blocking.channel("chat").tail()),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            await call
        assert str(caught.value) == sentence
    await client.close()
    blocking.close()


def _program(command: Any, dsn: str, sentence: str, status: int, *arguments: str) -> None:
    found = command(dsn, *arguments)
    assert (found[0], found[1]) == (status, ""), found
    assert f"pgchan: {sentence}\n" in found[2]
    assert "Traceback" not in found[2]


# ---- servers


async def test_a_standby_is_refused(server: Cluster, refused: Any) -> None:
    server.stop()
    signal = server.data / "standby.signal"  # recovers for ever: what a replica does, without a primary
    signal.touch()
    os.chown(signal, server.data.stat().st_uid, server.data.stat().st_gid)
    server.start()
    await refused(server.dsn, "the DSN leads to a standby, which takes no writes; point it at the primary")


@pytest.mark.parametrize("server", [{"fsync": "off"}, {"full_page_writes": "off"}], indirect=True, ids=str)
async def test_a_server_that_may_lose_commits_is_refused(
    server: Cluster, refused: Any, request: pytest.FixtureRequest
) -> None:
    (name,) = request.node.callspec.params["server"]
    await refused(server.dsn, f"the server runs with {name}=off and may lose commits; set {name}=on")


async def test_a_read_only_primary_is_refused(direct_dsn: str, refused: Any) -> None:
    name = query(direct_dsn, "select current_database()")[0][0]
    query(direct_dsn, f"alter database {name} set default_transaction_read_only = on")
    await refused(
        direct_dsn,
        "the DSN leads to a read-only session; point it at the primary, or unset default_transaction_read_only",
    )


# ---- poolers


async def test_a_transaction_pooler_without_control_dsn_does_not_start_what_must_listen(
    direct_dsn: str, command: Any
) -> None:
    pooler = Pooler(direct_dsn, "transaction")
    try:
        dsn = pooler.dsn_of(direct_dsn)
        sentence = (
            "the DSN leads through a transaction pooler, on which LISTEN hears nothing and session locks hold nothing; "
            "give control_dsn= (or PGCHAN_CONTROL_DSN), a direct connection to the same database"
        )
        for arguments in (["worker", "program:worker"], ["serve", "program:app", "--port", "0"]):
            await asyncio.to_thread(_program, command, dsn, sentence, 1, *arguments)
        status, out, _ = await asyncio.to_thread(command, dsn, "doctor")
        assert (status, f"NOT FINE\twakeups: {sentence}\n" in out) == (1, True), out
    finally:
        pooler.close()


# ---- databases


async def test_a_database_that_is_not_in_utf8_is_refused(
    admin: psycopg.Connection[Any], shared_server: tuple[str, str], refused: Any, command: Any
) -> None:
    dsn, prefix = shared_server
    name = f"{prefix}_ascii_{os.getpid()}"
    admin.execute(
        sql.SQL(
            "create database {} template template0 encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C'"
        ).format(sql.Identifier(name))
    )  # fmt: skip
    try:
        sentence = f"database {name!r} is encoded in SQL_ASCII; pgchan needs one in UTF8"
        await refused(on_database(dsn, name), sentence)
        assert await asyncio.to_thread(command, on_database(dsn, name), "migrate") == (1, "", f"pgchan: {sentence}\n")
    finally:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


async def test_a_database_without_the_schema_is_refused(empty_dsn: str, refused: Any) -> None:
    name = query(empty_dsn, "select current_database()")[0][0]
    sentence = f"database {name!r} has no pgchan schema; run: pgchan migrate"
    await refused(empty_dsn, sentence, check="schema", kind=errors.SchemaMismatch)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("pgchan_0000", "the database is at pgchan_0000, this code needs {oldest}; run: pgchan migrate"),
        (
            "pgchan_9999",
            "the database is at pgchan_9999 and serves code of pgchan_9999 and later, this code is of {newest}; "
            "install a newer pgchan",
        ),
    ],
)
async def test_an_older_and_a_newer_schema_are_refused(
    direct_dsn: str, refused: Any, version: str, sentence: str
) -> None:
    pretend(direct_dsn, version, version)
    sentence = sentence.format(oldest=pgchan.db.SCHEMA_OLDEST, newest=pgchan.db.SCHEMA_VERSION)
    await refused(direct_dsn, sentence, check="schema", kind=errors.SchemaMismatch)


# ---- roles


@pytest.fixture
def login(admin: psycopg.Connection[Any], direct_dsn: str) -> Iterator[tuple[str, str]]:
    """A role with no rights yet, and the DSN with which it comes to this test's database."""
    name = f"login_{query(direct_dsn, 'select current_database()')[0][0]}"
    admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
    yield name, direct_dsn.replace("postgres@", f"{name}@")
    query(direct_dsn, f"drop owned by {name}")
    admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


async def test_a_worker_whose_role_lacks_rights_is_told_what_to_grant(
    direct_dsn: str, login: tuple[str, str], command: Any
) -> None:
    name, dsn = login
    query(direct_dsn, f"grant usage on schema pgchan to {name}")
    query(direct_dsn, f"grant execute on function pgchan.version(), pgchan.serves() to {name}")
    status, _, complaint = await asyncio.to_thread(command, dsn, "worker", "program:worker")
    assert status == 1
    assert "Traceback" not in complaint
    assert "grant" in complaint.splitlines()[-1]
    rights = next(finding for finding in await doctor.check(dsn) if not finding.is_fine)
    assert (rights.check, "grant" in rights.detail) == ("rights", True)


# Time enough to say what counts instead, and for nothing else.
HOSTILE = {
    "default_transaction_isolation": "serializable", "statement_timeout": "200ms", "lock_timeout": "1ms",
    "idle_session_timeout": "300ms", "idle_in_transaction_session_timeout": "1ms", "search_path": "nowhere",
    "synchronous_commit": "off", "timezone": "Asia/Kathmandu", "datestyle": "German", "bytea_output": "escape",
    "client_encoding": "LATIN1", "default_transaction_deferrable": "on", "array_nulls": "off",
    "transaction_timeout": "200ms",
}  # fmt: skip


async def test_a_worker_is_immune_to_the_settings_of_its_role(
    direct_dsn: str, login: tuple[str, str], workers: Workers
) -> None:
    name, dsn = login
    query(direct_dsn, f"grant usage on schema pgchan to {name}")
    query(direct_dsn, f"grant execute on all routines in schema pgchan to {name}")
    query(direct_dsn, f"grant select on all tables in schema pgchan to {name}")
    known = {found for (found,) in query(direct_dsn, "select lower(name) from pg_settings")}
    assert HOSTILE.keys() - known <= {"transaction_timeout"}  # new in PostgreSQL 17
    for setting in HOSTILE.keys() & known:
        query(direct_dsn, f"alter role {name} set {setting} = '{HOSTILE[setting]}'")

    @pgchan.workflow
    async def greet(run: pgchan.Run) -> str:
        said = await run.receive()
        assert said is not None
        async with run.transaction("greet") as connection:
            await connection.execute("select pg_sleep(0.25)")
            await run.publish(f"grüß dich, {said.body}")
        return str(said.body)

    async with pgchan.AsyncClient(dsn, timeout=5) as client:
        worker = await workers.start(greet, client=client)
        first = worker.id
        for turn in range(10):  # for longer than a session of this role may be idle
            handle = await client.start(greet)
            await asyncio.sleep(0.06)
            await handle.signal(f"№ {turn}")
            assert await handle.result(10) == f"№ {turn}"
        assert worker.id == first
        await workers.stop(worker)
