"""The scenarios can fail: each mutant of pgchan is caught by its scenario, which the real build survives.

A mutant is a patch in mutants/, whose first comment says what it breaks, in which scenario of directed.py that must
show, and which invariants must name it. It is applied to a copy of the package; production code carries no switches.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cluster import binary
from faults.directed import SCENARIOS

ROOT = Path(__file__).parents[2]
MUTANTS = sorted((Path(__file__).parent / "mutants").glob("*.patch"))
SECONDS_MAX = 60
HEAD = re.compile(r"# (?P<breaks>.+)\n# Scenario: (?P<scenario>\w+)\. Caught by: (?P<caught>[\w, ]+)\.\n--- a/pgchan/")
QUEUE_SIZE_SINCE = 17  # the server's version from which the NOTIFY queue can be made small

_survived: dict[str, Verdict] = {}  # what the real build made of a scenario


class Verdict(NamedTuple):
    package: Path
    invariants: set[str]
    text: str


def head(patch: Path) -> re.Match[str]:
    found = HEAD.match(patch.read_text("utf-8"))
    assert found is not None, f"{patch.name} does not begin with what it breaks, its scenario, and who catches it"
    return found


def mutated(patch: Path, home: Path) -> Path:
    """A copy of the package with this patch; every line of it must apply as it is."""
    shutil.copytree(ROOT / "pgchan", home / "pgchan", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["patch", "--strip=1", "--fuzz=0", "--no-backup-if-mismatch", "--batch", "--input", str(patch)]
    applied = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert applied.returncode == 0, f"{patch.name} no longer applies; make it anew:\n{applied.stdout}{applied.stderr}"
    return home


def play(scenario: str, dsn: str, package: Path) -> Verdict:
    """Let a scenario happen to the package in this directory."""
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    program = Path(__file__).with_name("directed.py")
    playing = subprocess.Popen(
        [sys.executable, str(program), scenario, dsn], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = playing.communicate(timeout=SECONDS_MAX)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(playing.pid, signal.SIGKILL)  # whoever is left of it
        playing.wait()
    assert playing.returncode == 0, f"{scenario} was not played to its end:\n{out[-1000:]}\n{err[-3000:]}"
    verdict: dict[str, Any] = json.loads(out.splitlines()[-1])
    invariants = {invariant for invariant, _ in verdict["found"]}
    return Verdict(Path(verdict["package"]), invariants, "\n".join(text for _, text in verdict["found"]))


def test_every_scenario_has_a_mutant_and_every_mutant_a_scenario() -> None:
    assert {head(patch)["scenario"] for patch in MUTANTS} == set(SCENARIOS)


@pytest.mark.timeout(3 * SECONDS_MAX)  # it plays twice
@pytest.mark.parametrize("patch", MUTANTS, ids=lambda patch: patch.stem)
def test_a_mutant_is_caught(patch: Path, tmp_path: Path, make_database: Callable[[str], str]) -> None:
    scenario = head(patch)["scenario"]
    package = mutated(patch, tmp_path)
    settings = SCENARIOS[scenario][1]
    if settings and "max_notify_queue_pages" in settings and server_version() < QUEUE_SIZE_SINCE:
        return  # this server's queue is too large to be filled in a test
    if scenario not in _survived:
        _survived[scenario] = play(scenario, make_database("template0"), ROOT)
    real = _survived[scenario]
    assert real.package.parent == ROOT / "pgchan"
    assert not real.invariants, f"the real build does not survive {scenario}:\n{real.text}"

    mutant = play(scenario, make_database("template0"), package)
    assert mutant.package.parent == package / "pgchan"
    assert set(head(patch)["caught"].split(", ")) <= mutant.invariants, f"not caught by these; found:\n{mutant.text}"
    print(mutant.text)


def server_version() -> int:
    said = subprocess.run([binary("postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"\d+", said)[0])
