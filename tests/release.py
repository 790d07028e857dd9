"""Releases: build the wheel of one and keep it, and unpack a kept one to run its code beside the newest.

As a program: build what HEAD has into tests/releases/. That is done once, at the moment in which the newest revision in
freeze.py is named in RELEASED; the wheel is never built anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASES = ROOT / "tests" / "releases"


def wheel(version: str) -> Path:
    """The wheel of this release, as users installed it."""
    (found,) = RELEASES.glob(f"pgchan-{version}-*.whl")
    return found


def text(version: str, name: str) -> str:
    """A file of this release."""
    return zipfile.ZipFile(wheel(version)).read(name).decode()


def unpack(version: str, directory: Path) -> Path:
    """Put the code of this release into the directory: as $PYTHONPATH it hides the code of this checkout."""
    zipfile.ZipFile(wheel(version)).extractall(directory)
    return directory


def build() -> Path:
    """Build the wheel of what is committed."""
    with tempfile.TemporaryDirectory(prefix="pgchan-release-") as home:
        archive, sources = Path(home) / "sources.tar", Path(home) / "sources"
        subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(sources, filter="data")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", home, sources]
        subprocess.run(pip, cwd=home, check=True)
        (built,) = Path(home).glob("pgchan-*.whl")
        if (RELEASES / built.name).exists():
            sys.exit(f"{built.name} is released and stays as it is; raise the version")
        RELEASES.mkdir(exist_ok=True)
        return Path(shutil.move(built, RELEASES / built.name))


if __name__ == "__main__":
    print(f"built {build().relative_to(ROOT)}")
