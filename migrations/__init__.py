"""pgchan's Alembic revisions, and two functions that run them inside an application's own revision.

Three ways to the same tables, all of which keep their place in `pgchan.alembic_version`, so that each finds the
database up to date after another one ran:

    pgchan migrate                      the command
    alembic -n pgchan upgrade head      a section `[pgchan]` with `script_location = pgchan.migrations:` in the
                                        application's alembic.ini; its own revisions are untouched
    pgchan.migrations.upgrade(op, to="pgchan_0001")      in `upgrade()` of one of the application's revisions

In the last form pin `to` (and `start`, which offline mode needs): "head" moves with the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import text

__all__ = ["downgrade", "include_name", "upgrade"]

SCHEMA = "pgchan"
VERSION_TABLE = "alembic_version"

# Migrators wait for each other on this lock, until their transaction ends. Its class is the one of all pgchan locks.
LOCK = "select pg_advisory_xact_lock(1885823848, 0)"
CREATE_SCHEMA = "create schema if not exists pgchan"
DROP_VERSION_TABLE = "drop table if exists pgchan.alembic_version"
# A migrator waits this long, for another one or for a table in use, then gives up; nothing has changed then.
LIMIT_WAITING = "set local lock_timeout = '60s'"  # of a session it would stay in a pooler, for others
HOLDS_DATA = "select exists (select from pgchan.channels)"
# Tables of others may have been put into the schema: then it stays, and so do they.
DROP_SCHEMA = """do $$ begin
  drop schema if exists pgchan restrict;
exception when dependent_objects_still_exist then
  raise notice 'schema pgchan was kept: it holds objects that are not pgchan''s';
end $$"""


def upgrade(op: Any, to: str = "head", start: str | None = None) -> None:
    """Bring pgchan's tables up to revision `to` inside the revision of another application.

    op: `alembic.op`. Everything happens on its connection and in its transaction; in offline mode the SQL is written
    to its output, beginning after revision `start` (None: at the empty database), since there is no database to ask.
    A database that is at `to` already, or beyond, is left as it is.
    """
    context = _context(op, start)
    op.execute(text(LOCK))
    op.execute(text(CREATE_SCHEMA))
    script = _script()
    current = context.get_current_heads()
    target = _one(script, to)
    if target is None or target.revision in _ancestry(script, current):
        return
    if not current:
        _create_version_table(context)
    for revision in reversed(list(script.iterate_revisions(target.revision, current or "base"))):
        revision.module.upgrade()
    context.stamp(script, target.revision)


def downgrade(op: Any, to: str = "base", start: str | None = None) -> None:
    """Take pgchan's tables down to revision `to`, "base" for none, inside the revision of another application.

    Nothing is asked: what the removed tables held is gone. op and start are as in `upgrade`; offline, `start` None
    begins at the newest revision.
    """
    context = _context(op, start or "head")
    op.execute(text(LOCK))
    script = _script()
    current = context.get_current_heads()
    target = _one(script, to)
    if current and (target is None or target.revision not in current):
        for revision in script.iterate_revisions(current, "base" if target is None else target.revision):
            revision.module.downgrade()
        context.stamp(script, "base" if target is None else target.revision)
    if target is None:
        op.execute(text(DROP_VERSION_TABLE))
        op.execute(text(DROP_SCHEMA))


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """Keep an application's autogenerate away from schema pgchan: pass it to `context.configure(include_name=…)`."""
    if type_ == "schema":
        return name != SCHEMA
    return bool(parent_names.get("schema_name") != SCHEMA)


def _script() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent))


def _context(op: Operations, start: str | None) -> MigrationContext:
    """A second migration context on the connection of `op`, whose place is pgchan's own version table."""
    outer = op.get_context()
    options: dict[str, Any] = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    if not outer.as_sql:
        return MigrationContext.configure(connection=outer.connection, opts=options)
    options |= {"as_sql": True, "output_buffer": outer.output_buffer, "literal_binds": True}
    options |= {"script": _script(), "starting_rev": start}
    return MigrationContext.configure(dialect=outer.dialect, opts=options)


def _create_version_table(context: MigrationContext) -> None:
    """Offline nobody else does it; online `stamp` does."""
    if context.as_sql:
        context.execute(
            "create table pgchan.alembic_version "
            "(version_num character varying(32) not null constraint alembic_version_pkc primary key)"
        )


def _one(script: ScriptDirectory, revision: str) -> Script | None:
    """The revision of this name; None for "base"."""
    if revision == "base":
        return None
    found = script.get_revision(revision)
    if found is None:
        raise CommandError(f"no pgchan revision {revision!r}")
    return found


def _ancestry(script: ScriptDirectory, current: tuple[str, ...]) -> set[str]:
    """The revisions that a database at `current` has been through."""
    return {revision.revision for revision in script.iterate_revisions(current, "base")} if current else set()
