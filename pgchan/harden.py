"""Take PostgreSQL's lock functions and pg_notify from everybody but pgchan, in one database; and give them back.

Any role may take any advisory lock, a worker's too, and call pg_notify. What that can do is bounded without this (a
stranger's lock keeps no dead worker alive, an invented wakeup costs a read), but it can keep workers from starting.
After `harden` both go only through routines of pgchan, which run with its owner's rights; a lock still belongs to the
session that asked for it.

What it cannot do: LISTEN and NOTIFY are commands, not functions, and no privilege governs them.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from pgchan import db, migrate, migrations, sql
from pgchan.errors import Error, SchemaMismatch, Unavailable, UnsafeDeployment

NOTES = (
    "other roles of this database now need a grant for advisory locks and for the function pg_notify",
    "the commands LISTEN and NOTIFY cannot be revoked: wakeups carry no data, and invented ones cost latency only",
)


def harden(dsn: str | None, *, undo: bool = False, dry_run: bool = False) -> list[str]:
    """Take those functions from PUBLIC and give them to the owner of pgchan's routines; the statements that it took.

    In one transaction; nothing is returned, and nothing is done, where all is as it should be. undo: give them back to
    PUBLIC, as a new database has it. dry_run: only tell. Sessions that are open are subject to it at once.

    Raises InvalidInput, SchemaMismatch (not migrated), UnsafeDeployment (the role is no superuser), Unavailable.
    """
    wanted = text(sql.SOFTEN if undo else sql.HARDEN)
    try:
        with migrate.connect(dsn) as connection, connection.begin():
            connection.execute(text(migrations.LOCK))  # two at once would update the same rows of the catalog
            is_superuser, is_migrated, database = connection.execute(text(sql.MAY_HARDEN)).one()
            if not is_migrated:
                raise SchemaMismatch(
                    f"database {database!r} has no pgchan schema; run: pgchan migrate",
                    found=None, wanted=db.SCHEMA_VERSION,
                )  # fmt: skip
            statements = [str(statement) for (statement,) in connection.execute(wanted)]
            if dry_run:
                return statements
            if not is_superuser:  # the server would only warn, and change nothing
                raise UnsafeDeployment(
                    "the role is not a superuser, and these functions belong to one; have one run it, "
                    "or print the statements: pgchan harden --dry-run"
                )
            for statement in statements:
                connection.execute(text(statement))
            return statements
    except OperationalError as error:
        raise Unavailable(f"not hardened: {type(error.orig).__name__}; nothing was changed, try again") from None
    except DBAPIError as error:
        raise Error(f"not hardened: {type(error.orig).__name__}; nothing was changed") from error
