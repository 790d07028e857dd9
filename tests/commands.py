"""The command line as a process, and what it must never print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECRET = "s3cret-w0rd"


class Done:
    """How a command ended, and what it printed."""

    def __init__(self, process: subprocess.CompletedProcess[bytes]) -> None:
        self.status = process.returncode
        self.out = process.stdout.decode()
        self.error = process.stderr.decode()
        assert "Traceback" not in self.error, self.error
        assert SECRET not in self.out + self.error


def environment(dsn: str | None) -> dict[str, str]:
    ours = {name for name in os.environ if name.startswith("PGCHAN_")} - {"PGCHAN_CONTROL_DSN"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | ({"PGCHAN_DSN": dsn} if dsn else {})


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "pgchan.cli", *arguments]


def done(home: Path, *arguments: str, dsn: str | None = None, stdin: bytes = b"") -> Done:
    """Run the command in this directory, to its end."""
    return Done(
        subprocess.run(
            command(*arguments), env=environment(dsn), cwd=home, input=stdin, capture_output=True, timeout=60
        )
    )


def refused(done: Done, status: int) -> str:
    """The one line on stderr of a command that did not do it."""
    assert done.status == status, (done.status, done.out, done.error)
    assert done.out == ""
    assert done.error.startswith("pgchan: ")
    assert done.error.count("\n") == 1, done.error
    return done.error
