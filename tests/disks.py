"""Small disks in memory, to be filled up. They need root."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

MIB = 1 << 20


class Disk:
    """A file system of so many MiB. `directory` on it is empty; entering skips the test where there may be none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._mount = Path()

    @property
    def directory(self) -> Path:
        return self._mount / "files"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("no root: a disk cannot be mounted")
        self._mount = Path(tempfile.mkdtemp(prefix="pgchan-disk-"))
        options = f"size={self._size}m,mode=755"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self._mount]
        told = subprocess.run(mount, stderr=subprocess.PIPE, text=True, check=False)
        if told.returncode != 0:
            self._mount.rmdir()
            pytest.skip(f"no root that may mount a disk: {told.stderr.strip()}")
        self.directory.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        subprocess.run(["umount", "-l", self._mount], check=True)
        self._mount.rmdir()

    def fill(self, *, leave: int) -> None:
        """Take all room but so many MiB."""
        found = os.statvfs(self._mount)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - leave * MIB))

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink()

    def grow(self, size: int) -> None:
        """Make it a disk of so many MiB."""
        subprocess.run(["mount", "-o", f"remount,size={size}m", self._mount], check=True)

    @property
    def _filler(self) -> Path:
        return self._mount / "filler"
