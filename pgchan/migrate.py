"""Bring a database to a revision.

A program above Alembic: everything here runs the revisions of `pgchan.migrations` in one transaction, alone on its
database (a second migrator waits, then finds nothing to do). Nothing is asked; only the command line asks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, StaticPool, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from pgchan import db, migrations, sql
from pgchan import dsn as dsns
from pgchan.errors import Error, InvalidInput, SchemaMismatch, Unavailable, UnsafeDeployment

CONNECT_SECONDS = 10  # libpq would wait for as long as the kernel retries, about two minutes

log = logging.getLogger("pgchan")

_alembic_is_not_thread_safe = threading.Lock()


def upgrade(dsn: str | None, revision: str = "head") -> str | None:
    """Bring the database up to `revision` and return the revision that it has then.

    A database that is there already, or beyond, is left as it is; so is one that a newer pgchan made, if it serves this
    code. Raises InvalidInput, SchemaMismatch (it does not), UnsafeDeployment (the role may not, the server or database
    is not fit), Unavailable.
    """
    with _alembic_is_not_thread_safe, _reported(), connect(dsn) as connection:
        db.check_server(connection.execute(text(sql.DEPLOYMENT)).one())
        target, found = _check_revision(revision), _current(connection)
        if found is not None and not _is_known(found):
            db.check_version(connection.execute(text(sql.VERSION)).one())
        elif _is_below(found, target):
            command.upgrade(_config(connection), revision)
        return _current(connection)


def downgrade(dsn: str | None, revision: str = "base") -> str | None:
    """Take the database down to `revision`, "base" for none of pgchan's tables, and return the revision it has then.

    What the removed tables held is gone. Raises as `upgrade` does.
    """
    with _alembic_is_not_thread_safe, _reported(), connect(dsn) as connection:
        target = _check_revision(revision)
        found = _current(connection)
        if found != target and not _is_below(found, target):
            command.downgrade(_config(connection), revision)
        return _current(connection)


def current(dsn: str | None) -> str | None:
    """The revision that the database has; None without pgchan's tables. Raises InvalidInput, Unavailable."""
    with _reported(), connect(dsn) as connection:
        return _current(connection)


def holds_data(dsn: str | None) -> bool:
    """Whether a downgrade to "base" would lose anything. Raises as `current` does."""
    with _reported(), connect(dsn) as connection:
        if _current(connection) is None:
            return False
        return bool(connection.scalar(text(migrations.HOLDS_DATA)))


def leads_down(dsn: str | None, revision: str) -> bool:
    """Whether `revision` is below the one that the database has. Raises as `upgrade` does."""
    with _reported(), connect(dsn) as connection:
        target, found = _check_revision(revision), _current(connection)
        if not _is_known(found):  # made by a newer pgchan
            return target != _check_revision("head")
        return found != target and not _is_below(found, target)


def print_sql(out: TextIO, revision: str = "head", *, start: str = "base") -> None:
    """Write the SQL that leads from revision `start` up or down to `revision`, for somebody else to run.

    Needs no database. Raises InvalidInput.
    """
    target, first = _check_revision(revision), _check_revision(start)
    config = _config(None)
    config.output_buffer = out
    run = command.upgrade if _is_below(first, target) else command.downgrade
    if first != target:
        with _alembic_is_not_thread_safe:
            run(config, f"{first or 'base'}:{target or 'base'}", sql=True)


@contextlib.contextmanager
def connect(dsn: str | None) -> Iterator[Connection]:
    """A SQLAlchemy connection to the database of this DSN, else of the environment, closed at the end.

    Raises InvalidInput and Unavailable, neither of which shows the DSN.
    """
    address = dsns.resolve(dsn)
    try:
        given = conninfo_to_dict(address)
        connection = psycopg.connect(
            address, connect_timeout=given.get("connect_timeout") or CONNECT_SECONDS, client_encoding="utf8"
        )
    except psycopg.ProgrammingError:
        raise InvalidInput(f"the DSN has an option that libpq does not know; {dsns.WANTED}") from None
    except psycopg.OperationalError as error:
        raise Unavailable(f"cannot connect to the database: {_last_line(error)}") from None
    # The address went to libpq as it was: SQLAlchemy's own URL knows fewer forms of it.
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=StaticPool)
    connection.add_notice_handler(_report)
    try:
        event.listen(engine, "begin", lambda begun: begun.exec_driver_sql(migrations.LIMIT_WAITING))
        with engine.connect() as wrapped:
            yield wrapped
    finally:
        engine.dispose()
        connection.close()


def _report(diagnostic: psycopg.errors.Diagnostic) -> None:
    """A migration that waits for a table says so; what the server merely notes is nobody's concern."""
    if diagnostic.severity_nonlocalized == "WARNING":
        log.warning("%s", diagnostic.message_primary)


def _config(connection: Connection | None) -> Config:
    """An Alembic configuration without an ini file."""
    config = Config()
    config.set_main_option("script_location", str(_directory()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _directory() -> Path:
    return Path(migrations.__file__).parent


def _current(connection: Connection) -> str | None:
    options = {"version_table": migrations.VERSION_TABLE, "version_table_schema": migrations.SCHEMA}
    found = MigrationContext.configure(connection, opts=options).get_current_revision()
    connection.rollback()  # so that the migration begins, and commits, a transaction of its own
    return found


def _check_revision(revision: str) -> str | None:
    """The full name of a revision that this code has; None for "base"."""
    if revision == "base":
        return None
    try:
        script = ScriptDirectory(str(_directory())).get_revision(revision) if revision else None
    except CommandError:
        script = None
    if script is None:
        raise InvalidInput(f"there is no revision {revision!r}; name one like 'pgchan_0001', or 'head' or 'base'")
    return script.revision


def _is_known(revision: str | None) -> bool:
    """Whether this code has the migrations that led to a revision."""
    try:
        ScriptDirectory(str(_directory())).get_revision(revision or "base")
    except CommandError:
        return False
    return True


def _is_below(found: str | None, target: str | None) -> bool:
    """Whether a database at `found` has not been through `target`."""
    directory = ScriptDirectory(str(_directory()))
    if not _is_known(found):
        wanted = directory.get_current_head() or "base"
        raise SchemaMismatch(
            f"the database has revision {found!r}, this code knows none after {wanted!r}; install a newer pgchan",
            found=found, wanted=wanted,
        )  # fmt: skip
    been = {script.revision for script in directory.iterate_revisions(found, "base")} if found else set()
    return target is not None and target not in been


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Name what the server answered in our own errors."""
    try:
        yield
    except DBAPIError as error:
        cause = error.orig
        assert isinstance(cause, psycopg.Error)
        message = _last_line(cause)
        if cause.sqlstate == "42501":
            raise UnsafeDeployment(
                f"the role may not migrate: {message}; grant create on the database to it, or use its owner"
            ) from None
        if isinstance(cause, psycopg.OperationalError):
            raise Unavailable(f"not migrated: {message}; nothing was changed, try again") from None
        raise Error(f"not migrated: {message}; nothing was changed") from error
    except CommandError as error:
        raise Error(f"not migrated: {error}") from None


def _last_line(error: psycopg.Error) -> str:
    message = error.diag.message_primary or str(error)
    return message.strip().rsplit("\n", 1)[-1].strip() or "no reason was given"
