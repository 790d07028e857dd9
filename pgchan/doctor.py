"""Is this server, pooler and role fit to run on; what to change if not.

What must hold at every start is checked there too (db.check_deployment). Here each check is a line of its own, and
those that only a person can weigh are added: an old snapshot that holds back vacuum, a NOTIFY queue that fills up,
runs that wait for a worker, workers whose lock somebody else holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from pgchan import db, errors, sql
from pgchan.asyncpg_db import AsyncpgDb, translate
from pgchan.dsn import resolve, resolve_control
from pgchan.wakeups import LISTEN_NAMES

SNAPSHOT_SECONDS = 60.0  # a snapshot that is held longer makes hot channels slow
NOTIFY_USAGE = 0.1  # of the queue; at 0.5 pgchan stops announcing and relies on its sweeps
HEAR_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. is_fine: nothing to do; otherwise detail names the fix."""

    check: str
    is_fine: bool
    detail: str


async def check(dsn: str | None = None, control_dsn: str | None = None) -> list[Finding]:
    """Check the database that the DSN leads to. Stops at the first thing without which the rest cannot be asked.

    Raises InvalidInput for a DSN that cannot be read; everything else is a finding.
    """
    main, direct = resolve(dsn), resolve_control(control_dsn, dsn)
    database = AsyncpgDb(main, direct if direct != main else None, patience=2.0, pool_size=2, name="pgchan doctor")
    findings: list[Finding] = []
    try:
        began = time.monotonic()
        await database.open()
        milliseconds = (time.monotonic() - began) * 1000
        findings.append(Finding("connection", True, f"reached, and fit to write to ({milliseconds:.0f} ms)"))
        findings.append(Finding("schema", True, db.SCHEMA_VERSION))
        findings.append(await _rights(database))
        findings.append(await _listening(database))
        findings += await _weather(database)
    except errors.Error as error:
        findings.append(Finding(_WHAT.get(type(error), "connection"), False, str(error)))
    finally:
        await database.close()
    return findings


_WHAT: dict[type[errors.Error], str] = {
    errors.SchemaMismatch: "schema",
    errors.UnsafeDeployment: "deployment",
    errors.Unavailable: "connection",
}


async def _rights(database: AsyncpgDb) -> Finding:
    rows = await database.fetch(sql.MISSING_RIGHTS)
    if not rows:
        return Finding("rights", True, "this role may read, publish and work")
    names = ", ".join(row[0] for row in rows)
    return Finding("rights", False, f"this role lacks rights on {names}; grant EXECUTE on routines, SELECT on tables")


async def _listening(database: AsyncpgDb) -> Finding:
    """A NOTIFY from one session must reach another, or every reader waits for the sweep."""
    await database.check_control()
    try:
        listener = await database.connect("doctor", direct=True)
        heard = asyncio.Event()
        try:
            await listener.add_listener(LISTEN_NAMES[0], lambda *_: heard.set())
            await database.fetch(sql.PING, LISTEN_NAMES[0])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), HEAR_SECONDS)
        finally:
            await listener.close(timeout=1.0)
    except (OSError, TimeoutError) as error:
        raise translate(error, writing=False) from error
    if heard.is_set():
        return Finding("wakeups", True, "a NOTIFY is heard")
    return Finding("wakeups", False, "no NOTIFY is heard; give control_dsn, a direct connection past any pooler")


async def _weather(database: AsyncpgDb) -> list[Finding]:
    """What changes from hour to hour."""
    ((usage, oldest, pid, seconds, unknown, strangers),) = await database.fetch(sql.WEATHER)
    findings = []
    if usage >= NOTIFY_USAGE:
        who = f"session {oldest} has the oldest" if oldest else "which one, only a role with pg_read_all_stats can see"
        detail = f"{usage:.0%} full; a session that LISTENs is stuck in a transaction, end it: {who}"
        findings.append(Finding("queue of notifies", False, detail))
    else:
        findings.append(Finding("queue of notifies", True, f"{usage:.0%} full"))
    if seconds is not None and seconds > SNAPSHOT_SECONDS:
        detail = f"session {pid} has held a snapshot for {seconds:.0f} s, which slows hot channels; end its transaction"
        findings.append(Finding("old snapshot", False, detail))
    else:
        findings.append(Finding("old snapshot", True, "none"))
    findings.append(
        Finding("workers", not strangers, "each holds its own lock")
        if not strangers
        else Finding("workers", False, f"the lock of worker {strangers} is held by a session that is not its own")
    )
    if unknown:
        detail = f"{unknown} run(s) have been ready for over a minute; is a worker with their workflow and queue up?"
        findings.append(Finding("queues", False, detail))
    else:
        findings.append(Finding("queues", True, "no run waits for a worker"))
    return findings
