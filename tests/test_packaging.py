"""What users install: a wheel and an editable checkout, each in a clean environment far from this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path

import pytest
from catalog import describe
from packaging.requirements import Requirement
from psycopg import connect

from pgchan import db

ROOT = Path(__file__).parent.parent
PACKAGES = ("pgchan", "migrations", "server", "examples", "benchmarks")


pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("packaging")]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program as a stranger would, without anything of this environment, and return what it printed."""
    ours = ("PYTHON", "VIRTUAL_ENV", "PGCHAN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves files behind, and stale ones would get into the wheel."""
    copy = tmp_path_factory.mktemp("sources") / "pgchan"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", home, checkout, cwd=home)
    (found,) = home.glob("pgchan-*.whl")
    return found


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has nothing to do with pgchan."""
    return tmp_path_factory.mktemp("outside")


def environment(home: Path, wheel: Path, *install: str | Path) -> Path:
    """A virtual environment with pgchan and what pgchan[server] declares that it needs, and with nothing else.

    The needed packages are links to those of this environment, which saves their download.
    """
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    for distribution in _needed(wheel, {"server"}):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = site / top
            if not link.exists():
                link.symlink_to(str(distribution.locate_file(top)))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *install, cwd=home)
    return home / "bin"


def _needed(wheel: Path, extras: set[str]) -> Iterator[metadata.Distribution]:
    """What the wheel requires, with everything that those packages require in turn."""
    seen: set[tuple[str, str]] = set()
    waiting = [(line, extra) for line in _requirements(wheel) for extra in ("", *extras)]
    while waiting:
        requirement, extra = Requirement(waiting[-1][0]), waiting.pop()[1]
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "pgchan":
            continue
        distribution = metadata.distribution(requirement.name)
        for inner in ("", *requirement.extras):
            if (requirement.name, inner) not in seen:
                seen.add((requirement.name, inner))
                yield distribution
                waiting += [(line, inner) for line in distribution.requires or ()]


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found: list[str] = BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])
        return found


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, wheel: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The `bin` of an environment that pgchan is installed in."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    return environment(home, wheel, *([wheel] if request.param == "wheel" else ["--editable", checkout]))


def test_the_wheel_holds_each_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = [name for name in names if name.endswith((".py", ".sql", ".mako", ".js", ".html"))]
    assert len(modules) == len(set(modules))
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"pgchan"}
    for wanted in (
        "pgchan/py.typed", "pgchan/schema.sql", "pgchan/migrations/env.py", "pgchan/migrations/script.py.mako",
        *(f"pgchan/migrations/versions/{db.SCHEMA_VERSION}{suffix}" for suffix in (".py", ".sql", ".down.sql")),
        "pgchan/server/__init__.py", "pgchan/examples/__init__.py", "pgchan/benchmarks/_common.py",
    ):  # fmt: skip
        assert wanted in names


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        inside = "pgchan" if package == "pgchan" else f"pgchan/{package}"
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT / package)
            through_a_symlink = package == "pgchan" and relative.parts[0] in PACKAGES
            if path.is_file() and "__pycache__" not in relative.parts and not through_a_symlink:
                assert f"{inside}/{relative}" in names, f"{path} is not shipped: name its package in pyproject.toml"


def test_the_wheel_requires_nothing_that_only_this_checkout_has(wheel: Path) -> None:
    assert not [line for line in _requirements(wheel) if "@" in line]


def test_everything_imports_where_it_is_installed(installed: Path, outside: Path) -> None:
    program = """
import pgchan, pgchan.migrations, pgchan.server, pgchan.examples, pgchan.benchmarks, pgchan.cli, pgchan.migrate, sys
assert pgchan.migrations.upgrade and pgchan.server.create_app and pgchan.AsyncClient
assert not {"server", "migrations", "examples", "benchmarks"} & set(sys.modules)
print(pgchan.__file__)
"""
    where = run(installed / "python", "-W", "error", "-c", program, cwd=outside)
    assert str(ROOT) not in where


def test_the_command_migrates_a_database(installed: Path, outside: Path, empty_dsn: str) -> None:
    assert run(installed / "pgchan", "migrate", cwd=outside, PGCHAN_DSN=empty_dsn) == f"{db.SCHEMA_VERSION}\n"
    with connect(empty_dsn) as connection:
        assert describe(connection)
    current = run(installed / "pgchan", "migrate", "--current", "--dsn", empty_dsn, cwd=outside)
    assert current == f"{db.SCHEMA_VERSION}\n"


def test_the_command_measures_a_server(installed: Path, outside: Path, empty_dsn: str) -> None:
    table = run(installed / "pgchan", "bench", "floors", "--rounds", "1", "--dsn", empty_dsn, cwd=outside)
    assert "INSERT, autocommit" in table


def test_alembic_migrates_a_database_from_an_applications_ini(installed: Path, tmp_path: Path, empty_dsn: str) -> None:
    (tmp_path / "alembic.ini").write_text("[pgchan]\nscript_location = pgchan.migrations:\n")
    python = [installed / "python", "-m", "alembic", "-n", "pgchan"]
    run(*python, "upgrade", "head", cwd=tmp_path, PGCHAN_DSN=empty_dsn)
    assert f"{db.SCHEMA_VERSION} (head)" in run(*python, "current", cwd=tmp_path, PGCHAN_DSN=empty_dsn)


def test_the_version_is_the_packages(installed: Path, outside: Path) -> None:
    assert run(installed / "pgchan", "--version", cwd=outside) == "0.2.0\n"
