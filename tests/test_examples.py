"""Every example runs by itself and prints what its last comment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
RUN_SECONDS = 60


def promised(path: Path) -> list[str]:
    """The lines of the comment that ends the file, after its heading."""
    lines = path.read_text("utf-8").splitlines()
    comment: list[str] = []
    while lines and lines[-1].startswith("#"):
        comment.insert(0, lines.pop().removeprefix("#").strip())
    assert comment, f"{path.name} does not end in a comment that says what it prints"
    assert comment[0].startswith("Prints")
    return comment[1:]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_its_last_comment_says(name: str, dsn: str) -> None:
    environment = os.environ | {"PGCHAN_DSN": dsn, "RESEARCH_PACE": "0", "PYTHONIOENCODING": "utf-8"}
    environment.pop("OPENAI_BASE_URL", None)
    ran = subprocess.run(
        [sys.executable, "-m", f"pgchan.examples.{name}"],
        env=environment, capture_output=True, text=True, encoding="utf-8", timeout=RUN_SECONDS, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = promised(EXAMPLES / f"{name}.py")
    # The report depends on the Python that is installed; what counts is how it ends.
    printed = ran.stdout.splitlines()
    assert (printed[-len(lines) :] if name == "research" else printed) == lines


def test_each_example_says_in_one_sentence_what_it_shows() -> None:
    for name in NAMES:
        first = (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()[0]
        assert first.startswith('"""'), f"{name} has no docstring"
        assert first.endswith("."), f"{name}: the first line of the docstring is not a sentence"
