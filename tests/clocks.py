"""The wall clock of a process, shifted against the true one. The monotonic clock stays as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self


class Clock:
    """What `environment` makes of a process: one whose clock a test can shift. Needs libfaketime."""

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="pgchan-clock-")
        directory = Path(self._directory.name)
        directory.chmod(0o755)  # another user's process reads it
        self._file = directory / "shift"
        self.shift(0)
        (library, *_) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        self.environment = {
            "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._directory.cleanup()

    def shift(self, seconds: int) -> None:
        """From now on it is so many seconds fast."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}s\n")
        new.chmod(0o644)
        new.rename(self._file)
