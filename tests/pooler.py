"""A PgBouncer in front of a server of the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
from cluster import die_with_parent, free_port
from psycopg.conninfo import conninfo_to_dict

START_SECONDS = 30


def pooled(dsn: str, port: int) -> str:
    """The DSN through the pooler at this port of what a DSN leads to directly."""
    direct = conninfo_to_dict(dsn)
    return f"postgresql://{direct['user']}@127.0.0.1:{port}/{direct['dbname']}"


class Pooler:
    """Runs from its making until close(). Whoever may log in to the server may log in here, as the same role.

    mode: PgBouncer's pool_mode. size: server connections for each pair of role and database. It ends too when the
    thread that started it dies, however it dies.
    """

    def __init__(self, dsn: str, mode: str, *, size: int = 20) -> None:
        program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"  # where it lies on Debian, off an ordinary PATH
        direct = conninfo_to_dict(dsn)
        host, user = str(direct["host"]), str(direct["user"])
        self.port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="pgchan-bouncer-"))
        self.home.chmod(0o755)
        (self.home / "users").write_text(f'"{user}" ""\n')
        (self.home / "ini").write_text(
            f"[databases]\n* = host={host} port={direct.get('port') or 5432} auth_user={user}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {self.home / 'users'}\n"
            "auth_query = select rolname, '' from pg_catalog.pg_roles where rolname = $1\n"
            f"pool_mode = {mode}\ndefault_pool_size = {size}\nmax_client_conn = 2000\nserver_idle_timeout = 5\n"
        )
        # It refuses to be root; the server's user may enter the directory of the server's socket.
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = os.stat(host).st_uid if host.startswith("/") else 0
            who = {"user": owner or pwd.getpwnam("nobody").pw_uid}
        with (self.home / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, str(self.home / "ini")],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                preexec_fn=die_with_parent, **who,
            )  # fmt: skip
        try:
            self._wait_until_ready(dsn)
        except BaseException:
            self.close()
            raise

    def dsn_of(self, dsn: str) -> str:
        """The DSN through this pooler of what a DSN leads to directly."""
        return pooled(dsn, self.port)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self.home)

    def _wait_until_ready(self, dsn: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.dsn_of(dsn), connect_timeout=2).close()
                return
            time.sleep(0.02)
        raise RuntimeError(f"PgBouncer did not start:\n{(self.home / 'log').read_text()}")
