"""Real databases for the tests: one server for the whole run, one template, one database per test.

The server is the one of $PGCHAN_TEST_DSN, whose role must be allowed to create databases and which is never crashed,
else an embedded one. Under xdist the controller starts it, the workers share it.

With PGCHAN_TEST_POOLER=transaction (or session) a PgBouncer stands in front of it: `dsn`, and all that is made from it,
leads through that, and $PGCHAN_CONTROL_DSN past it. What looks at sessions, or ends them, uses `direct_dsn`.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster, on_database
from doors import Door, Reading
from pooler import Pooler, pooled
from psycopg import sql
from workers import Processes, Workers

from pgchan import dsn as dsns
from pgchan import migrate

# What the machine says about databases must not lead a test to one.
for _variable in [name for name in os.environ if name.startswith("PG") and not name.startswith("PGCHAN_TEST_")]:
    del os.environ[_variable]
os.environ.pop("DATABASE_URL", None)

# What whoever uses psycopg behind a transaction pooler must say to each connection. Here it is said for those of the
# tests; pgchan says it for its own.
if os.environ.get("PGCHAN_TEST_POOLER"):
    for _kind in (psycopg.Connection, psycopg.AsyncConnection):
        _kind.connect.__kwdefaults__["prepare_threshold"] = None  # type: ignore[index]

TEMPLATE_LOCK = 1885823848
POLL_SECONDS = 0.01

_server_key = pytest.StashKey["SharedServer"]()


class SharedServer:
    """The server of this run, and the prefix that its databases have in common."""

    def __init__(self) -> None:
        self.prefix = f"pgchan_test_{secrets.token_hex(4)}"
        self.cluster: Cluster | None = None
        given = os.environ.get("PGCHAN_TEST_DSN")
        self.dsn = dsns.resolve(given) if given else ""
        if not self.dsn:
            self.cluster = Cluster(guarded=True)
            self.cluster.start()
            self.dsn = self.cluster.dsn
        mode = os.environ.get("PGCHAN_TEST_POOLER")
        self.pooler = Pooler(self.dsn, mode, size=50) if mode else None

    def close(self) -> None:
        """Leave nothing behind: drop the databases of this run, or the whole server if it is ours."""
        if self.pooler is not None:
            self.pooler.close()
        if self.cluster is not None:
            self.cluster.remove()
            return
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            left = connection.execute("select datname from pg_database where starts_with(datname, %s)", [self.prefix])
            for (name,) in left.fetchall():
                connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _shared_server(config: pytest.Config) -> SharedServer:
    """Start it when the first test, or the first worker, asks for it."""
    if _server_key not in config.stash:
        config.stash[_server_key] = SharedServer()
    return config.stash[_server_key]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist, in the controller: tell a worker which server to use."""
    server = _shared_server(node.config)
    node.workerinput["pgchan_server"] = (server.dsn, server.prefix)
    node.workerinput["pgchan_pooler"] = server.pooler.port if server.pooler else None


def pytest_unconfigure(config: pytest.Config) -> None:
    if _server_key in config.stash:
        config.stash[_server_key].close()


# In CI nothing is skipped because the machine lacks something: what a test needs is installed by .ci/run.


def _is_refused_skip(report: pytest.TestReport | pytest.CollectReport) -> bool:
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return False
    return "no root" not in str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    if _is_refused_skip(report):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only 'no root' is a reason to: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    report = yield
    if _is_refused_skip(report):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only 'no root' is a reason to: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def shared_server(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The DSN of the run's server, and the prefix for names of databases on it."""
    if hasattr(request.config, "workerinput"):
        dsn, prefix = request.config.workerinput["pgchan_server"]
        return dsn, prefix
    server = _shared_server(request.config)
    return server.dsn, server.prefix


@pytest.fixture(scope="session")
def pooler_port(request: pytest.FixtureRequest) -> int | None:
    """Where the pooler of this run listens; None in a run without one."""
    if hasattr(request.config, "workerinput"):
        port: int | None = request.config.workerinput["pgchan_pooler"]
        return port
    pooler = _shared_server(request.config).pooler
    return pooler.port if pooler else None


@pytest.fixture(scope="session")
def admin(shared_server: tuple[str, str]) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection to the run's server, for creating and dropping databases."""
    with psycopg.connect(shared_server[0], autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def template(admin: psycopg.Connection[Any], shared_server: tuple[str, str]) -> str:
    """The name of a migrated database, which the first test of the whole run to ask for it makes."""
    dsn, prefix = shared_server
    name, unfinished = f"{prefix}_template", f"{prefix}_unfinished"
    admin.execute("select pg_advisory_lock(%s)", [TEMPLATE_LOCK])
    try:
        if not admin.execute("select from pg_database where datname = %s", [name]).fetchall():
            admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(unfinished)))
            admin.execute(sql.SQL("create database {} template template0").format(sql.Identifier(unfinished)))
            migrate.upgrade(on_database(dsn, unfinished))
            admin.execute(
                sql.SQL("alter database {} rename to {}").format(sql.Identifier(unfinished), sql.Identifier(name))
            )
    finally:
        admin.execute("select pg_advisory_unlock(%s)", [TEMPLATE_LOCK])
    return name


_numbers = itertools.count(1)


@pytest.fixture
def make_database(
    admin: psycopg.Connection[Any], shared_server: tuple[str, str]
) -> Iterator[Callable[[str], str]]:
    """Create a database from the template of this name; returns its DSN. All are dropped when the test ends."""
    dsn, prefix = shared_server
    made: list[str] = []

    def make(template: str) -> str:
        made.append(f"{prefix}_{os.getpid()}_{next(_numbers)}")
        admin.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(made[-1]), sql.Identifier(template))
        )
        return on_database(dsn, made[-1])

    yield make
    for name in made:
        admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def direct_dsn(make_database: Callable[[str], str], template: str) -> str:
    """A database of this test's own, migrated to the newest revision; past any pooler."""
    return make_database(template)


@pytest.fixture
def dsn(direct_dsn: str, pooler_port: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of this test's own, migrated to the newest revision; through the pooler, if this run has one."""
    if pooler_port is None:
        return direct_dsn
    monkeypatch.setenv("PGCHAN_CONTROL_DSN", direct_dsn)
    through = pooled(direct_dsn, pooler_port)
    monkeypatch.setenv("PGCHAN_TEST_POOLED_DSN", through)  # for doors.query
    return through


@pytest.fixture
def empty_dsn(make_database: Callable[[str], str]) -> str:
    """A database of this test's own with nothing in it."""
    return make_database("template0")


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server of this test's own, migrated and listening on 127.0.0.1, to stop, kill and restart.

    Settings: `@pytest.mark.parametrize("server", [{"max_connections": "20"}], indirect=True)`.
    """
    cluster = Cluster(getattr(request, "param", None), tcp=True)
    try:
        cluster.start()
        migrate.upgrade(cluster.dsn)
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[None]]:
    """Wait for a fact: `await wait_until(predicate, seconds=10)`; the predicate may be a coroutine function."""

    async def wait(predicate: Callable[[], Any], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            found = predicate()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return
            assert time.monotonic() < deadline, f"not within {seconds} s: {_text_of(predicate)}"
            await asyncio.sleep(POLL_SECONDS)

    return wait


@pytest.fixture
def block_until() -> Callable[..., None]:
    """`wait_until` for tests without an event loop: `block_until(predicate, seconds=10)`."""

    def block(predicate: Callable[[], Any], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not predicate():
            assert time.monotonic() < deadline, f"not within {seconds} s: {_text_of(predicate)}"
            time.sleep(POLL_SECONDS)

    return block


def _text_of(predicate: Callable[[], Any]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):
        return repr(predicate)


# ---- one suite, both doors; see doors.py


@pytest.fixture(params=["async", "blocking"])
async def door(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Door]:
    """Makes clients of both kinds, one kind after the other, on this test's database."""
    door = Door(request.param, dsn)
    yield door
    await door.close()


@pytest.fixture
def client(door: Door) -> Any:
    """A client of either kind, with methods to await."""
    return door.client()


@pytest.fixture
async def reading() -> AsyncIterator[Callable[[Any], Reading]]:
    """Collect what a tail gives: `reading(channel.tail())`."""
    started: list[Reading] = []

    def read(tail: Any) -> Reading:
        started.append(Reading(tail))
        return started[-1]

    yield read
    for one in started:
        await one.stop()


# ---- workers; see workers.py


@pytest.fixture
async def workers(dsn: str) -> AsyncIterator[Workers]:
    """Starts workers in this process on this test's database; they end with the test."""
    workers = Workers(dsn)
    yield workers
    await workers.close()


@pytest.fixture
def processes(dsn: str) -> Iterator[Processes]:
    """Starts workers that are processes of their own on this test's database."""
    processes = Processes(dsn)
    yield processes
    processes.close()
