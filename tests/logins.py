"""Roles that log in, each a member of one of pgchan's four, made for one test on the run's server."""

from __future__ import annotations

import re
from typing import Any

import psycopg

GROUPS = ("pgchan_publisher", "pgchan_subscriber", "pgchan_worker", "pgchan_admin")


class Logins:
    """`of("pgchan_worker")` is the DSN of a fresh role that is a member of this role and of nothing else."""

    def __init__(self, admin: psycopg.Connection[Any], dsn: str) -> None:
        self._admin = admin
        self._dsn = dsn
        self._database = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        self.names: list[str] = []

    def of(self, *groups: str) -> str:
        """The DSN of a role that is a member of these groups and may do nothing else in this test's database."""
        # Roles belong to the server: the database's name makes theirs unique.
        name = f"{self._database}_{len(self.names)}"
        self.names.append(name)
        self._admin.execute(f"create role {name} login".encode())
        for group in groups:
            self._admin.execute(f"grant {group} to {name}".encode())
        return as_role(self._dsn, name)

    def close(self) -> None:
        for name in self.names:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                connection.execute(f"drop owned by {name}".encode())
            self._admin.execute(f"drop role {name}".encode())


def as_role(dsn: str, name: str) -> str:
    """The same DSN for another role, without a password."""
    return re.sub(r"//([^@/?]*@)?", f"//{name}@", dsn, count=1)
