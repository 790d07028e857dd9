"""Alembic's entry: runs pgchan's revisions on a connection that was handed over, on a DSN, or into printed SQL.

The database is, in this order: `config.attributes["connection"]` (an open SQLAlchemy connection; its transaction, if
one is open, is the caller's), `sqlalchemy.url` of the section in use, $PGCHAN_DSN, $DATABASE_URL. Whatever driver a
URL names, psycopg is the one that is used.
"""

from __future__ import annotations

from logging.config import fileConfig
from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from pgchan import migrate, migrations

config = context.config
OPTIONS: dict[str, Any] = {
    "version_table": migrations.VERSION_TABLE,
    "version_table_schema": migrations.SCHEMA,
    "include_schemas": True,
    "include_name": lambda name, type_, parents: not migrations.include_name(name, type_, parents),
}


def run() -> None:
    """Run the command that Alembic was given, alone on its database, in one transaction."""
    with context.begin_transaction():
        context.execute(text(migrations.LOCK))
        context.execute(text(migrations.CREATE_SCHEMA))
        context.run_migrations()
        if _is_at_base():
            context.execute(text(migrations.DROP_VERSION_TABLE))
            context.execute(text(migrations.DROP_SCHEMA))


def _is_at_base() -> bool:
    """Whether nothing of pgchan is left, so that its schema, made above or long ago, has to go too."""
    if context.is_offline_mode():
        return context.get_revision_argument() in (None, "base", ())
    return not context.get_context().get_current_heads()


def run_offline() -> None:
    """Print the SQL instead of running it."""
    # paramstyle: psycopg's would double each % in the printed SQL.
    context.configure(
        dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS
    )
    run()


def run_on(connection: Connection) -> None:
    """Run on this connection, in its open transaction if it has one."""
    context.configure(connection=connection, **OPTIONS)
    run()


def run_online() -> None:
    """Run on the connection that was handed over, else on one of our own."""
    given = config.attributes.get("connection")
    if given is not None:
        run_on(given)
        return
    with migrate.connect(config.get_main_option("sqlalchemy.url")) as connection:
        run_on(connection)


if config.config_file_name is not None and config.file_config.has_section("loggers"):
    fileConfig(config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    run_offline()
else:
    run_online()
