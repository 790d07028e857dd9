"""A connection to PostgreSQL for a thread that must always come back.

psycopg's cursors wait for as long as the server, or the network, is silent. A session here waits with libpq's
asynchronous calls, which psycopg documents as `psycopg.pq`, so that every wait ends: with the answer, at a time limit
of the client's own, or when the owner of the thread says stop. It knows at once when the server hangs up, also
between statements. Two things can go wrong: `Cut`, the session is lost; `Refused`, the server answered with an error.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import threading
import time
from collections.abc import Iterator
from typing import Self

import psycopg
from psycopg import pq

from pgchan import sql
from pgchan.errors import InvalidInput

CONNECT_SECONDS_MAX = 5
CONNECT_SECONDS_MIN = 2  # libpq takes anything less for this
REPLY_SECONDS = 5.0  # everything but a heartbeat
STOP_SECONDS = 0.25  # for a statement that is under way when `stop` is called

# What the server says when it ends a session.
ENDED = {
    "57P01": "the session was ended by an administrator",
    "57P02": "the server crashed",
    "57P03": "the server is shutting down",
    "57P05": "the server heard nothing for a lease",
}


class Cut(Exception):
    """The connection is of no further use; str() says why, without any part of the DSN."""


class Refused(Exception):
    """The server answered with an error and the session goes on."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(f"the server refused with SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate


class Stop:
    """A flag that also wakes who waits for a socket: the reading end of a pipe, whose other end `set` closes."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe()
        self._lock = threading.Lock()
        self._set = False

    def __del__(self) -> None:  # closed by nobody else: a thread in the middle of connecting may outlive its owner
        self.set()
        os.close(self.fd)

    def set(self) -> None:
        """Wake everybody who waits, now and from now on."""
        with self._lock:
            if not self._set:
                self._set = True
                os.close(self._end)

    def is_set(self) -> bool:
        """Whether it is time to stop."""
        return self._set

    def wait(self, seconds: float) -> bool:
        """True as soon as it is set, False when the time is over."""
        return self._set or bool(_poll({self.fd: select.POLLIN}, seconds))


class Session:
    """A connection whose every wait ends: with the answer, at its time limit, or soon after `stop` is set."""

    def __init__(self, dsn: str, lease: float, stop: Stop) -> None:
        try:
            self._connection = psycopg.connect(
                dsn, autocommit=True, client_encoding="utf8", target_session_attrs="read-write",
                connect_timeout=max(CONNECT_SECONDS_MIN, min(CONNECT_SECONDS_MAX, math.ceil(lease / 2))),
                keepalives=1, keepalives_idle=math.ceil(0.2 * lease), keepalives_interval=math.ceil(0.1 * lease),
                keepalives_count=3, tcp_user_timeout=math.ceil(500 * lease),
            )  # fmt: skip
        except psycopg.OperationalError as error:
            raise Cut(_reason(error)) from None
        except psycopg.Error:
            raise InvalidInput("the DSN cannot be read; write postgresql://user:password@host:port/database") from None
        self._pq = self._connection.pgconn
        self._stop = stop
        self.backend_pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the server frees what the session holds."""
        self._connection.close()

    def configure(self, settings: dict[str, str]) -> None:
        """Set these for the session; those that this server does not know are left out."""
        names = "{" + ",".join(settings) + "}"
        values = "{" + ",".join(f'"{value}"' for value in settings.values()) + "}"
        ((pid, _),) = self.fetch(sql.CONFIGURE, names, values)
        self.backend_pid = int(pid or 0)

    def wait(self, seconds: float) -> bool:
        """Do nothing for this long; True as soon as it is time to stop. Raises Cut as soon as the server hangs up."""
        until = time.monotonic() + seconds
        with _errors_as_cuts():
            while not self._stop.is_set():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                if self._pq.socket in _poll({self._pq.socket: select.POLLIN, self._stop.fd: select.POLLIN}, left):
                    self._pq.consume_input()
        return True

    def fetch(self, statement: str, *values: int | str, seconds: float = REPLY_SECONDS) -> list[tuple[str | None, ...]]:
        """Run one statement; its rows, as text. Raises Cut, and Refused if the server answers with an error."""
        until = time.monotonic() + seconds
        last: pq.abc.PGresult | None = None
        with _errors_as_cuts():
            self._pq.send_query_params(statement.encode(), [str(value).encode() for value in values])
            while True:
                self._await_result(until)
                if (result := self._pq.get_result()) is None:
                    break
                last = result
        assert last is not None, "a statement gives a result"
        if last.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            sqlstate = (last.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
            if self._pq.status != pq.ConnStatus.OK or not sqlstate or sqlstate in ENDED:
                raise Cut(ENDED.get(sqlstate, "the connection was lost"))
            raise Refused(sqlstate)
        columns = range(last.nfields)
        cells = [[last.get_value(row, column) for column in columns] for row in range(last.ntuples)]
        return [tuple(None if cell is None else cell.decode() for cell in row) for row in cells]

    def _await_result(self, until: float) -> None:
        stopping = self._stop.is_set()  # what is sent on the way out has the time that it is given
        while (unsent := self._pq.flush()) or self._pq.is_busy():
            watched = {self._pq.socket: select.POLLIN | (select.POLLOUT if unsent else 0)}
            if not stopping:
                watched[self._stop.fd] = select.POLLIN
            ready = _poll(watched, until - time.monotonic())
            if not ready:
                raise Cut("the server did not answer in time")
            if self._stop.fd in ready:
                stopping, until = True, min(until, time.monotonic() + STOP_SECONDS)
            if ready.get(self._pq.socket, 0) & ~select.POLLOUT:
                self._pq.consume_input()


def _poll(watched: dict[int, int], seconds: float) -> dict[int, int]:
    """Wait until one of these descriptors is ready; no select(), which ends at descriptor 1024."""
    poll = select.poll()
    for descriptor, events in watched.items():
        poll.register(descriptor, events)
    return dict(poll.poll(math.ceil(max(0.0, seconds) * 1000)))


@contextlib.contextmanager
def _errors_as_cuts() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise Cut(_reason(error)) from None


def _reason(error: psycopg.Error) -> str:
    """What libpq says, without where and as whom it tried to connect."""
    said = str(error).partition("\n")[0].rpartition("failed: ")[2]
    return re.sub(r"\"[^\"]*\"|'[^']*'", "…", said) or "the connection failed"


def milliseconds(seconds: float) -> str:
    """A duration as PostgreSQL's settings take it."""
    return f"{math.ceil(seconds * 1000)}ms"
