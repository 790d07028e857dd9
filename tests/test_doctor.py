"""The doctor: a line per check, and the fix where one is needed."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from doors import pretend

from pgchan import db, doctor
from pgchan.errors import InvalidInput


async def verdicts(dsn: str) -> dict[str, tuple[bool, str]]:
    return {finding.check: (finding.is_fine, finding.detail) for finding in await doctor.check(dsn)}


async def test_a_healthy_database_is_fine_in_every_respect(dsn: str) -> None:
    found = await verdicts(dsn)
    assert all(is_fine for is_fine, _ in found.values()), found
    assert {"connection", "schema", "rights", "wakeups"} < set(found)
    assert {"queue of notifies", "old snapshot", "workers", "queues", "upkeep"} < set(found)


async def test_a_database_that_was_not_migrated_is_told_the_command(empty_dsn: str) -> None:
    is_fine, detail = (await verdicts(empty_dsn))["schema"]
    assert not is_fine
    assert "pgchan migrate" in detail


async def test_a_newer_schema_is_told_apart_from_an_older_one(dsn: str) -> None:
    pretend(dsn, "pgchan_9999", "pgchan_9998")
    is_fine, detail = (await verdicts(dsn))["schema"]
    assert not is_fine
    assert "install a newer pgchan" in detail


async def test_a_newer_schema_that_serves_this_code_is_fine_and_named(dsn: str) -> None:
    pretend(dsn, "pgchan_9999", db.SCHEMA_VERSION)
    is_fine, detail = (await verdicts(dsn))["schema"]
    assert is_fine
    assert detail == f"pgchan_9999; it still serves this code, which is of {db.SCHEMA_VERSION}"


async def test_a_lock_that_a_stranger_holds_is_reported(dsn: str, direct_dsn: str) -> None:
    connect = partial(psycopg.connect, direct_dsn, autocommit=True)  # a lock of a session needs one
    with connect() as owner, connect() as stranger:
        owner.execute("select pgchan.register(pgchan.new_worker(), 'w', 'host', 1)")
        stranger.execute("select pg_advisory_lock(1885823848, (select id from pgchan.workers))")
        is_fine, detail = (await verdicts(dsn))["workers"]
    assert not is_fine
    assert "not its own" in detail


async def test_runs_that_nobody_takes_are_reported(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pgchan.start('nobody_has_it')")
        connection.execute("update pgchan.runs set created_at = created_at - interval '2 minutes'")
    is_fine, detail = (await verdicts(dsn))["queues"]
    assert not is_fine
    assert "1 run" in detail


async def test_a_role_without_rights_is_told_which(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create role pgchan_test_nobody login; grant usage on schema pgchan to pgchan_test_nobody;"
                           "grant execute on function pgchan.version(), pgchan.serves() "
                           "to pgchan_test_nobody")  # fmt: skip
        try:
            user = connection.info.user
            other = dsn.replace(f"{user}@", "pgchan_test_nobody@").replace(f"{user}:", "pgchan_test_nobody:")
            found = await verdicts(other)
        finally:
            connection.execute("drop owned by pgchan_test_nobody; drop role pgchan_test_nobody")
    is_fine, detail = found["rights"]
    assert not is_fine
    assert "messages" in detail


async def test_a_dsn_that_cannot_be_read_is_invalid_input() -> None:
    with pytest.raises(InvalidInput):
        await doctor.check("mysql://nowhere")
