"""Every way to pgchan's tables leads to the same tables, and back. Long, because there are seven ways."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import release
import sqlalchemy
from catalog import describe
from cluster import binary
from doors import pretend
from freeze import RELEASED

from pgchan import db, migrate, migrations
from pgchan.errors import Error, InvalidInput, SchemaMismatch, Unavailable, UnsafeDeployment
from pgchan.migrations import statements

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "pgchan" / "schema.sql"
HEAD = db.SCHEMA_VERSION


def alembic(*arguments: str, cwd: Path, dsn: str | None = None) -> str:
    """Run the alembic command and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGCHAN_")}
    if dsn is not None:
        environment["PGCHAN_DSN"] = dsn
    command = [sys.executable, "-W", "error", "-m", "alembic", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def catalog(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        return describe(connection)


def revision(dsn: str) -> str | None:
    return migrate.current(dsn)


@pytest.fixture
def wanted(make_database: Any) -> list[str]:
    """The catalog of a database in which schema.sql was run as it is."""
    dsn = make_database("template0")
    with psycopg.connect(dsn) as connection:
        connection.execute(SCHEMA.read_bytes())
    return catalog(dsn)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An application of somebody else, with Alembic revisions of its own and a section for pgchan's."""
    (tmp_path / "alembic.ini").write_text(
        textwrap.dedent("""
        [alembic]
        script_location = %(here)s/app

        [pgchan]
        script_location = pgchan.migrations:
        """)
    )
    versions = tmp_path / "app" / "versions"
    versions.mkdir(parents=True)
    (tmp_path / "app" / "script.py.mako").write_text(APP_TEMPLATE)
    (tmp_path / "app" / "env.py").write_text(APP_ENV)
    (versions / "app_1.py").write_text(APP_REVISION)
    return tmp_path


APP_TEMPLATE = """
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
def upgrade():
    ${upgrades if upgrades else "pass"}
def downgrade():
    ${downgrades if downgrades else "pass"}
"""

APP_ENV = """
import os
import sqlalchemy as sa
from alembic import context
from pgchan import dsn, migrations

metadata = sa.MetaData()
sa.Table("orders", metadata, sa.Column("id", sa.BigInteger, primary_key=True))
url = dsn.resolve(None).replace("postgresql:", "postgresql+psycopg:") if "PGCHAN_DSN" in os.environ else None
options = {"target_metadata": metadata, "include_schemas": True}
if "UNFILTERED" not in os.environ:
    options["include_name"] = migrations.include_name
if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""

APP_REVISION = """
import pgchan.migrations
import sqlalchemy as sa
from alembic import op

revision, down_revision = "app_1", None

def upgrade():
    op.create_table("orders", sa.Column("id", sa.BigInteger, primary_key=True))

def downgrade():
    op.drop_table("orders")
"""

# The mode in which pgchan's tables come with a revision of the application.
APP_REVISION_WITH_PGCHAN = """
import pgchan.migrations
import sqlalchemy as sa
from alembic import op

revision, down_revision = "app_2", "app_1"

def upgrade():
    pgchan.migrations.upgrade(op, to="HEAD")
    op.execute("select pgchan.publish('orders', '{}')")
    op.add_column("orders", sa.Column("note", sa.Text))

def downgrade():
    op.drop_column("orders", "note")
    pgchan.migrations.downgrade(op, to="base", start="HEAD")
""".replace("HEAD", HEAD)


# ---- the same tables


def test_upgrade_equals_schema_sql(empty_dsn: str, wanted: list[str]) -> None:
    assert migrate.upgrade(empty_dsn) == HEAD
    assert catalog(empty_dsn) == wanted, "schema.sql was edited: run `make freeze` while the revision is unreleased"


def test_the_database_says_which_revision_it_has(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select pgchan.version()").fetchone() == (HEAD,)


def test_alembic_in_this_checkout_gives_the_same_tables(empty_dsn: str, wanted: list[str]) -> None:
    alembic("upgrade", "head", cwd=ROOT, dsn=empty_dsn)
    assert catalog(empty_dsn) == wanted
    assert HEAD in alembic("current", cwd=ROOT, dsn=empty_dsn)
    assert HEAD in alembic("-n", "pgchan", "current", cwd=ROOT, dsn=empty_dsn)


def test_a_section_in_an_applications_ini_gives_the_same_tables(
    empty_dsn: str, wanted: list[str], foreign: Path
) -> None:
    alembic("upgrade", "head", cwd=foreign, dsn=empty_dsn)
    alembic("-n", "pgchan", "upgrade", "head", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == wanted
    assert "app_1" in alembic("current", cwd=foreign, dsn=empty_dsn)
    alembic("-n", "pgchan", "downgrade", "base", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == []
    assert "app_1" in alembic("current", cwd=foreign, dsn=empty_dsn)


def test_the_url_of_the_section_wins_over_the_environment(empty_dsn: str, foreign: Path) -> None:
    url = empty_dsn.replace("postgresql:", "postgresql+asyncpg:").replace("%", "%%")
    with (foreign / "alembic.ini").open("a") as ini:
        ini.write(f"sqlalchemy.url = {url}\n")
    alembic("-n", "pgchan", "upgrade", "head", cwd=foreign, dsn="postgresql://127.0.0.1:1/nowhere")
    assert revision(empty_dsn) == HEAD


def test_an_applications_own_revision_brings_the_same_tables_up_and_down(
    empty_dsn: str, wanted: list[str], foreign: Path
) -> None:
    (foreign / "app" / "versions" / "app_2.py").write_text(APP_REVISION_WITH_PGCHAN)
    alembic("upgrade", "head", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == wanted
    assert migrate.upgrade(empty_dsn) == HEAD, "the command finds nothing to do"
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select body from pgchan.read('orders')").fetchall() == [({},)]
        assert connection.execute("select note from orders").fetchall() == []

    alembic("downgrade", "app_1", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == []
    alembic("upgrade", "head", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == wanted


def test_an_applications_own_revision_finds_the_tables_of_the_command(dsn: str, foreign: Path) -> None:
    (foreign / "app" / "versions" / "app_2.py").write_text(APP_REVISION_WITH_PGCHAN)
    alembic("upgrade", "head", cwd=foreign, dsn=dsn)
    assert revision(dsn) == HEAD


def test_a_failure_after_it_in_the_applications_revision_leaves_nothing(empty_dsn: str, foreign: Path) -> None:
    broken = APP_REVISION_WITH_PGCHAN.replace("select pgchan.publish('orders', '{}')", "select 1/0")
    (foreign / "app" / "versions" / "app_2.py").write_text(broken)
    with pytest.raises(AssertionError, match="division by zero"):
        alembic("upgrade", "head", cwd=foreign, dsn=empty_dsn)
    assert catalog(empty_dsn) == []


def run_sql(dsn: str, script: str) -> None:
    psql = [binary("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn]
    done = subprocess.run(psql, input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_printed_sql_gives_the_same_tables_and_removes_them(empty_dsn: str, wanted: list[str]) -> None:
    up, down = io.StringIO(), io.StringIO()
    migrate.print_sql(up)
    migrate.print_sql(down, "base", start="head")
    run_sql(empty_dsn, up.getvalue())
    assert catalog(empty_dsn) == wanted
    assert migrate.upgrade(empty_dsn) == HEAD
    run_sql(empty_dsn, down.getvalue())
    assert catalog(empty_dsn) == []
    assert revision(empty_dsn) is None


def test_sql_printed_by_alembic_is_the_same(empty_dsn: str, wanted: list[str], foreign: Path) -> None:
    run_sql(empty_dsn, alembic("-n", "pgchan", "upgrade", "head", "--sql", cwd=foreign))
    assert catalog(empty_dsn) == wanted
    run_sql(empty_dsn, alembic("-n", "pgchan", "downgrade", "head:base", "--sql", cwd=foreign))
    assert catalog(empty_dsn) == []


def test_sql_printed_by_an_applications_own_revisions_is_the_same(
    empty_dsn: str, wanted: list[str], foreign: Path
) -> None:
    (foreign / "app" / "versions" / "app_2.py").write_text(APP_REVISION_WITH_PGCHAN)
    run_sql(empty_dsn, alembic("upgrade", "head", "--sql", cwd=foreign))
    assert catalog(empty_dsn) == wanted
    assert revision(empty_dsn) == HEAD
    run_sql(empty_dsn, alembic("downgrade", "app_2:app_1", "--sql", cwd=foreign))
    assert catalog(empty_dsn) == []


def test_an_open_connection_and_its_transaction_are_the_callers(empty_dsn: str) -> None:
    with migrate.connect(empty_dsn) as connection:
        with connection.begin():
            from alembic import command

            command.upgrade(migrate._config(connection), "head")
            connection.rollback()
        assert migrate._current(connection) is None
    assert catalog(empty_dsn) == []


# ---- from one revision to the next


@pytest.mark.parametrize("released", RELEASED, ids=str)
def test_a_released_revision_has_the_text_that_it_was_released_with(released: str) -> None:
    directory = ROOT / "migrations" / "versions"
    for suffix in (".py", ".sql", ".down.sql"):
        text = release.text(RELEASED[released], f"pgchan/migrations/versions/{released}{suffix}")
        assert (directory / f"{released}{suffix}").read_text("utf-8") == text, "write a new revision instead"


def test_up_from_the_last_release_equals_schema_sql_and_down_its_own(
    empty_dsn: str, make_database: Any, wanted: list[str]
) -> None:
    last = max(RELEASED)
    as_released = make_database("template0")
    with psycopg.connect(as_released) as connection:
        connection.execute(release.text(RELEASED[last], "pgchan/schema.sql").encode())
    migrate.upgrade(empty_dsn, last)
    assert catalog(empty_dsn) == catalog(as_released)
    with psycopg.connect(empty_dsn) as connection:  # columns that are added must suit rows that exist
        connection.execute("select pgchan.publish('chat/1', '1'), pgchan.start('essay', id => 'r')")
    for _ in range(2):
        assert migrate.upgrade(empty_dsn) == HEAD
        assert catalog(empty_dsn) == wanted, "run `make freeze`; a new column stands last in its table"
        assert migrate.downgrade(empty_dsn, last) == last
        assert catalog(empty_dsn) == catalog(as_released)
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select body from pgchan.read('chat/1')").fetchall() == [(1,)]
        assert connection.execute("select state from pgchan.run_status").fetchall() == [("scheduled",)]


# ---- down


def test_down_and_up_again_is_a_round_trip(empty_dsn: str, wanted: list[str]) -> None:
    migrate.upgrade(empty_dsn)
    assert migrate.downgrade(empty_dsn) is None
    assert catalog(empty_dsn) == []
    assert migrate.downgrade(empty_dsn) is None
    assert migrate.upgrade(empty_dsn) == HEAD
    assert catalog(empty_dsn) == wanted


def test_down_removes_nothing_that_is_not_pgchans(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("create table public.channels (id integer)")
        connection.execute("create function public.publish() returns integer language sql return 1")
        connection.execute("create table pgchan.theirs (id integer)")
    migrate.downgrade(dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute("select from public.channels, pgchan.theirs")
        connection.execute("select public.publish()")
        left = connection.execute("select relname from pg_class where relnamespace = 'pgchan'::regnamespace").fetchall()
        assert left == [("theirs",)]
        assert connection.execute("select from pg_proc where pronamespace = 'pgchan'::regnamespace").fetchall() == []
    assert migrate.upgrade(dsn) == HEAD


def test_down_is_refused_while_something_of_the_users_hangs_on_it(dsn: str) -> None:
    before = catalog(dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute("create view public.mine as select count(*) from pgchan.messages")
    with pytest.raises(Error, match="other objects depend on"):
        migrate.downgrade(dsn)
    assert catalog(dsn) == before
    assert revision(dsn) == HEAD


def test_whether_a_downgrade_would_lose_something_is_known(empty_dsn: str) -> None:
    assert not migrate.holds_data(empty_dsn)
    migrate.upgrade(empty_dsn)
    assert not migrate.holds_data(empty_dsn)
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("select pgchan.publish('chat/1', '1')")
    assert migrate.holds_data(empty_dsn)


# ---- several at once, and what is refused


WAITING = """
    select from pg_locks l join pg_database d on d.oid = l.database
    where d.datname = current_database() and l.locktype = 'advisory' and not l.granted
"""


def migrator(dsn: str) -> list[str]:
    """A process of its own that migrates the database."""
    return [sys.executable, "-c", "import sys; from pgchan import migrate; print(migrate.upgrade(sys.argv[1]))", dsn]


def test_six_migrators_at_once_all_succeed(empty_dsn: str, wanted: list[str]) -> None:
    started = [
        subprocess.Popen(migrator(empty_dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in started]
    assert ended == [(f"{HEAD}\n", "", 0)] * 6
    assert catalog(empty_dsn) == wanted


def test_a_second_migrator_waits_for_the_first(empty_dsn: str, block_until: Any) -> None:
    with psycopg.connect(empty_dsn) as first, psycopg.connect(empty_dsn, autocommit=True) as watch:
        first.execute(migrations.LOCK)
        with subprocess.Popen(migrator(empty_dsn), stdout=subprocess.DEVNULL) as second:
            block_until(lambda: watch.execute(WAITING).rowcount == 1, seconds=30)
            assert catalog(empty_dsn) == []
            first.commit()
            assert second.wait(timeout=60) == 0
    assert revision(empty_dsn) == HEAD


def test_a_database_that_a_newer_pgchan_made_is_refused(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("update pgchan.alembic_version set version_num = 'pgchan_9999'")
    assert migrate.upgrade(dsn) == "pgchan_9999", "an old process that migrates as it starts goes on"
    pretend(dsn, "pgchan_9999", "pgchan_9999")
    for act in (migrate.upgrade, migrate.downgrade):
        with pytest.raises(SchemaMismatch, match="pgchan_9999") as caught:
            act(dsn)
        assert (caught.value.found, caught.value.wanted) == ("pgchan_9999", HEAD)


@pytest.mark.parametrize("name", ["pgchan_9999", "", "head:base", "+1", "' or 1"])
def test_an_unknown_revision_is_refused(dsn: str, name: str) -> None:
    with pytest.raises(InvalidInput):
        migrate.upgrade(dsn, name)


def test_a_role_that_may_not_is_told_what_to_grant(empty_dsn: str, admin: psycopg.Connection[Any]) -> None:
    role = f"pgchan_test_{os.getpid()}"
    admin.execute(f"create role {role} login")
    try:
        with pytest.raises(UnsafeDeployment, match="grant create on the database"):
            migrate.upgrade(empty_dsn.replace("postgres@", f"{role}@"))
    finally:
        admin.execute(f"drop role {role}")


def test_a_database_that_cannot_be_reached_is_unavailable_and_its_password_not_shown() -> None:
    with pytest.raises(Unavailable) as caught:
        migrate.upgrade("postgresql://me:s3cret@127.0.0.1:1/nowhere")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(InvalidInput) as refused:
        migrate.upgrade("postgresql://me:s3cret@127.0.0.1:1/nowhere?s3cret=1")
    assert "s3cret" not in str(refused.value)


# ---- autogenerate


def test_an_applications_autogenerate_does_not_see_our_tables(dsn: str, foreign: Path) -> None:
    alembic("upgrade", "head", cwd=foreign, dsn=dsn)
    assert "No new upgrade operations detected" in alembic("check", cwd=foreign, dsn=dsn)


def test_include_name_is_what_keeps_it_from_dropping_them(
    dsn: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNFILTERED", "1")
    alembic("upgrade", "head", cwd=foreign, dsn=dsn)
    with pytest.raises(AssertionError, match="messages"):
        alembic("check", cwd=foreign, dsn=dsn)


@pytest.mark.parametrize(
    ("name", "type_", "parents", "is_kept"),
    [
        ("pgchan", "schema", {}, False),
        (None, "schema", {}, True),
        ("public", "schema", {}, True),
        ("channels", "table", {"schema_name": "pgchan"}, False),
        ("channels", "table", {"schema_name": None}, True),
        ("id", "column", {"schema_name": "pgchan", "table_name": "channels"}, False),
    ],
)
def test_include_name(name: str | None, type_: str, parents: dict[str, str | None], is_kept: bool) -> None:
    assert migrations.include_name(name, type_, parents) is is_kept


# ---- the splitter


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("", []),
        (" ; ;\n-- nothing; here\n/* nor; /* nested; */ here; */", []),
        ("select 1; select 2", ["select 1", "select 2"]),
        ("select ';' ; select 'it''s;';", ["select ';'", "select 'it''s;'"]),
        (r"select E'\';' ; select e'a\\'; select '\';", [r"select E'\';'", r"select e'a\\'", r"select '\'"]),
        ('select 1 as ";" ; select 1 as "a"";";', ['select 1 as ";"', 'select 1 as "a"";"']),
        ("do $$ begin; end; $$; select 1", ["do $$ begin; end; $$", "select 1"]),
        ("do $a$ x; $$ y; $b$ z; $a$; select $1", ["do $a$ x; $$ y; $b$ z; $a$", "select $1"]),
        ("select a$$b; select 1", ["select a$$b", "select 1"]),
        ("-- why; it's\nselect 1; -- after; it's\nselect 2", ["-- why; it's\nselect 1", "-- after; it's\nselect 2"]),
        ("select /* a; 'b /* $$ */ ; */ 1;", ["select /* a; 'b /* $$ */ ; */ 1"]),
        ("select 'a' -- x;\n'b'; select 1", ["select 'a' -- x;\n'b'", "select 1"]),
    ],
)
def test_statements_end_at_semicolons_outside_of_quotes_and_comments(script: str, wanted: list[str]) -> None:
    assert statements.split(script) == wanted


@pytest.mark.parametrize(
    "script",
    ["select 'a; select 1", 'select "a;', "do $$ begin", "/* a", "create function f() begin atomic select 1; end"],
)
def test_what_cannot_be_split_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match=r"not closed|cannot be split"):
        statements.split(script)


@pytest.fixture
def engine(empty_dsn: str) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(empty_dsn.replace("postgresql:", "postgresql+psycopg:"))
    yield engine
    engine.dispose()


def test_a_statement_reaches_the_server_unchanged(engine: sqlalchemy.Engine, tmp_path: Path) -> None:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    body = r"-- :name \: 100 % %s %% $1 ::int a[1:2] := 'x\:y' " + "\n select 'ä';"
    (tmp_path / "x.sql").write_text(f"create procedure f() language sql as $p${body}$p$;", "utf-8")
    with engine.begin() as connection:
        statements.run(Operations(MigrationContext.configure(connection)), tmp_path / "x.sql")
        assert connection.scalar(sqlalchemy.text("select prosrc from pg_proc where proname = 'f'")) == body
