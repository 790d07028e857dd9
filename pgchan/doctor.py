"""Is this server, pooler and role fit to run on; what to change if not.

What must hold at every start is checked there too (db.check_deployment). Here each check is a line of its own, and
those that only a person can weigh are added: an old snapshot that holds back vacuum, a NOTIFY queue that fills up,
runs that wait for a worker, workers whose lock somebody else holds.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from pgchan import db, errors, sql
from pgchan.asyncpg_db import AsyncpgDb
from pgchan.dsn import resolve, resolve_control

SNAPSHOT_SECONDS = 60.0  # a snapshot that is held longer makes hot channels slow
NOTIFY_USAGE = 0.1  # of the queue; at 0.5 pgchan stops announcing and relies on its sweeps
STRANGER_SECONDS = 0.5  # for which a lock is held by one that is not its worker, before that is worth a line


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
        findings.append(await _schema(database))
        rights, roles = await _rights(database)
        findings += [rights, await _roles(database)]
        if "pgchan_subscriber" in roles:
            findings.append(await _listening(database))
        findings += await _weather(database)
        if "pgchan_subscriber" in roles:
            findings += [await _strangers(database), await _late_runs(database), await _upkeep(database)]
        else:
            findings.append(Finding("not looked at", True, "wakeups, workers and queues: this role may not read"))
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


async def _schema(database: AsyncpgDb) -> Finding:
    ((found, _serves),) = await database.fetch(sql.VERSION)
    if found > db.SCHEMA_VERSION:
        return Finding("schema", True, f"{found}; it still serves this code, which is of {db.SCHEMA_VERSION}")
    if found < db.SCHEMA_VERSION:
        return Finding("schema", True, f"{found}; this code knows {db.SCHEMA_VERSION}, to get it run: pgchan migrate")
    return Finding("schema", True, str(found))


MAY = {
    "pgchan_publisher": "publish", "pgchan_subscriber": "read", "pgchan_worker": "work", "pgchan_admin": "administer",
}  # fmt: skip


async def _rights(database: AsyncpgDb) -> tuple[Finding, set[str]]:
    """What this role is fit for, and the group roles whose rights it has."""
    lacking: dict[str, list[str]] = {}
    for role, what, held in await database.fetch(sql.RIGHTS):
        lacking.setdefault(role, []).extend([] if held else [what])
    if lacking["pgchan_publisher"] or lacking["pgchan_subscriber"]:  # of no use without them
        lacking["pgchan_worker"] += lacking["pgchan_publisher"] + lacking["pgchan_subscriber"]
        lacking["pgchan_admin"] += lacking["pgchan_publisher"] + lacking["pgchan_subscriber"]
    has = {role for role, missing in lacking.items() if not missing}
    if has:
        return Finding("rights", True, "this role may " + ", ".join(MAY[role] for role in MAY if role in has)), has
    names = ", ".join(dict.fromkeys(lacking["pgchan_publisher"] + lacking["pgchan_subscriber"]))
    fix = "grant one of pgchan_publisher, pgchan_subscriber, pgchan_worker and pgchan_admin to it"
    return Finding("rights", False, f"this role lacks rights on {names}; {fix}"), has


async def _roles(database: AsyncpgDb) -> Finding:
    found = await database.fetch(sql.ROLES)
    if missing := [statement for statement, exists, _ in found if not exists]:
        detail = "some are missing, so only the owner of the schema may use it; as one who may create roles: "
        return Finding("roles", True, f"{detail}{'; '.join(missing)}; then as the owner: {sql.GRANT_ROLES}")
    if not all(granted for _, _, granted in found):
        return Finding("roles", False, f"they have no rights in this database; as its owner: {sql.GRANT_ROLES}")
    return Finding("roles", True, ", ".join(MAY))


async def _listening(database: AsyncpgDb) -> Finding:
    """A NOTIFY from one session must reach another, and a lock be held; else there are no tails and no workers."""
    try:
        await database.check_control()
    except errors.UnsafeDeployment as error:
        return Finding("wakeups", False, str(error))
    return Finding("wakeups", True, "a NOTIFY is heard")


async def _weather(database: AsyncpgDb) -> list[Finding]:
    """What changes from hour to hour."""
    ((usage, oldest, pid, seconds),) = await database.fetch(sql.WEATHER)
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
    return findings


async def _strangers(database: AsyncpgDb) -> Finding:
    """Who holds a lock that is not its own, at two looks: a watcher, or a worker that starts, does for a moment."""
    first = await database.fetch(sql.STRANGERS)
    if first:
        await asyncio.sleep(STRANGER_SECONDS)
    found = sorted({tuple(row) for row in first} & {tuple(row) for row in await database.fetch(sql.STRANGERS)})
    if not found:
        return Finding("workers", True, "each holds its own lock")
    worker, pid, role = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    detail = f"the lock of worker {worker} is held by session {pid} of role {role!r}, which is not its own{more}"
    return Finding("workers", False, f"{detail}; end it with pg_terminate_backend, and see: pgchan harden")


async def _late_runs(database: AsyncpgDb) -> Finding:
    ((late,),) = await database.fetch(sql.LATE_RUNS)
    if not late:
        return Finding("queues", True, "no run waits for a worker")
    detail = f"{late} run(s) have been ready for over a minute; is a worker with their workflow and queue up?"
    return Finding("queues", False, detail)


async def _upkeep(database: AsyncpgDb) -> Finding:
    """Whether what is over gets removed; only workers do that."""
    ((ended_runs, channels, runs, messages),) = await database.fetch(sql.UPKEEP_BACKLOG)
    kept = "for ever" if ended_runs is None else f"for {ended_runs:g} s"
    if channels or runs:
        detail = (
            f"{channels} channel(s) and {runs} ended run(s) should be gone by now; "
            "is a worker up? without any, call pgchan.upkeep() from time to time"
        )
        return Finding("upkeep", False, detail)
    left = f"; {messages} messages of removed channels are left to delete" if messages else ""
    return Finding("upkeep", True, f"nothing is overdue; ended runs are kept {kept}{left}")
