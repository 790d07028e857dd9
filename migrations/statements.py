"""Run the frozen SQL of a revision, one statement at a time.

Drivers that prepare what they send refuse several statements in one string, so the text is cut at the semicolons that
end statements: those outside quotes, dollar quotes and comments. Bodies of the form `begin atomic … end` are not
understood, and refused, because their semicolons look like ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import text

_TOKEN = re.compile(
    r"""
      (?P<line>    --[^\n]* )
    | (?P<block>   /\* )
    | (?P<escape>  (?<![A-Za-z0-9_$]) [eE] ' (?: [^'\\] | \\. | '' )* ' )
    | (?P<quoted>  ' (?: [^'] | '' )* ' )
    | (?P<name>    " (?: [^"] | "" )* " )
    | (?P<dollar>  (?<![A-Za-z0-9_$]) \$ (?: [A-Za-z_][A-Za-z0-9_]* )? \$ )
    | (?P<end>     ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_ATOMIC = re.compile(r"\bbegin\s+atomic\b", re.IGNORECASE)


def run(op: Any, path: Path) -> None:
    """Execute the statements of the file at `path` through `op`, online or into the output of offline mode."""
    for statement in split(path.read_text("utf-8")):
        # A bare ":name", even in a comment, would be taken for a parameter.
        op.execute(text(statement.replace(":", r"\:")))


def split(sql: str) -> list[str]:
    """The statements of `sql` in order, without their semicolons; each keeps the comments that precede it."""
    return [statement.strip() for statement, code in _pieces(sql) if code.strip()]


def _pieces(sql: str) -> Iterator[tuple[str, str]]:
    """Each statement as it stands, and once more as code alone, without comments and quoted text."""
    start = at = 0
    code: list[str] = []
    while found := _TOKEN.search(sql, at):
        code.append(sql[at : found.start()])
        kind, at = found.lastgroup, found.end()
        if kind == "block":
            at = _after_block_comment(sql, at)
        elif kind == "dollar":
            close = sql.find(found.group(), at)
            if close < 0:
                raise ValueError(f"dollar quote {found.group()} at character {found.start()} is not closed")
            at = close + len(found.group())
            code.append("$$")
        elif kind == "end":
            yield _checked(sql[start : found.start()], code)
            start, code = at, []
        elif kind != "line":
            code.append("''")
    code.append(sql[at:])
    yield _checked(sql[start:], code)


def _checked(statement: str, code: list[str]) -> tuple[str, str]:
    bare = " ".join(code)
    if "'" in bare.replace("''", "") or '"' in bare:
        raise ValueError(f"a quote is not closed in {statement.strip()[:60]!r}")
    if _ATOMIC.search(bare):
        raise ValueError("a body of the form `begin atomic … end` cannot be split; write it as a dollar-quoted text")
    return statement, bare


def _after_block_comment(sql: str, at: int) -> int:
    """Where a block comment ends; PostgreSQL nests them."""
    depth = 1
    for mark in re.finditer(r"/\*|\*/", sql[at:]):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return at + mark.end()
    raise ValueError("a block comment is not closed")
