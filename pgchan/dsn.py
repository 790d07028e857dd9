"""Which database: the argument, else the environment, in the one form that both drivers and libpq take."""

from __future__ import annotations

import os
import re

from pgchan.errors import InvalidInput

DSN_LENGTH_MAX = 8_192  # a long list of hosts and options fits; a file that was passed by mistake does not
WANTED = "write postgresql://user:password@host:port/database"

_SCHEME = re.compile(r"postgres(?:ql)?(?:\+[a-z0-9_]+)?://", re.IGNORECASE)
_BROKEN_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")


def resolve(dsn: str | None) -> str:
    """The DSN to connect to: `dsn`, else $PGCHAN_DSN, else $DATABASE_URL, as a `postgresql://` URL.

    Takes `postgresql://`, `postgres://`, either with a SQLAlchemy driver (`postgresql+asyncpg://`), several hosts, and
    unix sockets (`postgresql:///database?host=/run/postgresql`). Raises InvalidInput, which never shows the DSN.
    """
    if dsn is not None:
        return _normal(dsn, "the DSN")
    for variable in ("PGCHAN_DSN", "DATABASE_URL"):
        if value := os.environ.get(variable):
            return _normal(value, f"${variable}")
    raise InvalidInput("no database is named; pass a DSN or set PGCHAN_DSN")


def resolve_control(control_dsn: str | None, dsn: str | None) -> str:
    """The DSN for LISTEN and locks: `control_dsn`, else $PGCHAN_CONTROL_DSN, else what `resolve(dsn)` gives.

    It must lead to the same database as the main one, past any pooler that shares server connections.
    """
    if control_dsn is not None:
        return _normal(control_dsn, "the control DSN")
    if value := os.environ.get("PGCHAN_CONTROL_DSN"):
        return _normal(value, "$PGCHAN_CONTROL_DSN")
    return resolve(dsn)


def _normal(dsn: object, what: str) -> str:
    # `what` and the reason are all that an error says: any part of a broken DSN may be a part of its password.
    if not isinstance(dsn, str):
        raise InvalidInput(f"{what} must be a str, not {type(dsn).__name__}")
    if not 1 <= len(dsn) <= DSN_LENGTH_MAX:
        raise InvalidInput(f"{what} must have 1 to {DSN_LENGTH_MAX} characters, not {len(dsn)}")
    scheme = _SCHEME.match(dsn)
    if scheme is None:
        raise InvalidInput(f"{what} is not a PostgreSQL URL; {WANTED}")
    if not dsn.isprintable() or " " in dsn:
        raise InvalidInput(f"{what} holds a space or an unprintable character; write it as %20 or the like")
    if _BROKEN_PERCENT.search(dsn):
        raise InvalidInput(f"{what} holds a % that two hexadecimal digits do not follow; write % itself as %25")
    url = "postgresql://" + dsn[scheme.end() :]
    _check_hosts(url, what)
    return url


def _check_hosts(url: str, what: str) -> None:
    if "#" in url:
        raise InvalidInput(f"{what} holds a #; write # in a password as %23")
    authority = re.split("[/?]", url.removeprefix("postgresql://"), maxsplit=1)[0]
    login, _, hosts = authority.rpartition("@")
    if "@" in login:
        raise InvalidInput(f"{what} holds two @; write @ in a password as %40")
    for host in hosts.split(","):
        port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::([0-9]{0,5}))?", host)
        if port is None or (port[1] and not 1 <= int(port[1]) <= 65_535):
            raise InvalidInput(f"{what} has a host or port that cannot be read; {WANTED}")
