"""Text that is on every machine: the documentation inside Python's standard library. No network, nothing imported.

Used by research.py. Modules are read as text and parsed, never executed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import sys
import sysconfig
from pathlib import Path
from typing import TypedDict

SKIPPED = re.compile(r"^_|\._|^(idlelib|lib2to3|turtledemo|ensurepip|pydoc_data|encodings|distutils|this)\b|\btests?\b")
NOT_PROSE = re.compile(r">>>|[-=*~]{4}|\s:\s.*\s:\s|:$|^import |^from \S+ import|\) as <|^Arguments|\s--\s.*\s--\s")
COMMON = frozenset(
    "a about an and are as at by can do does explain for from how in instead into is it me not of on only or our "
    "please python should some tell than that the them then this to use using want was what when where which why "
    "with you".split()
)
PASSAGE_LENGTH_MIN = 120  # characters of documentation: less is not worth a section
EXCERPT_LENGTH_MAX = 420


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "coroutine"}
OPENINGS = ("It has {}, described like this:", "Of {} one reads:", "And {} is documented so:")


class Passage(TypedDict):
    """A documented thing in a module's source, and how much it is about the topic. Plain JSON: a step returns it."""

    title: str
    kind: str
    module: str
    line: int
    score: float
    documentation: str
    members: dict[str, str]  # the documentation of methods; of a module: of its functions and classes


def words_of(topic: str) -> list[str]:
    """The words of a topic that are worth looking for, without their plural s."""
    found = re.findall(r"[a-z0-9_]{2,}", topic.lower())
    return [re.sub(r"(?<=[a-z]{3})s$", "", word) for word in found if word not in COMMON]


def rank_modules(topic: str, most: int) -> list[str]:
    """Names of the modules that have most to say about the topic, best first."""
    words = words_of(topic)
    scores = {name: _score(name, text, words) for name, text in _sources().items()}
    return sorted((name for name in scores if scores[name] > 0), key=lambda name: (-scores[name], name))[:most]


def find_passages(topic: str, module: str) -> list[Passage]:
    """What a module documents about the topic: itself, its classes, its functions; the three that say most."""
    tree = ast.parse(_sources()[module])
    words = words_of(topic)
    found = []
    for node in [tree, *tree.body]:
        if not isinstance(node, Documented) or getattr(node, "name", "").startswith("_"):
            continue
        title = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
        documentation, members = ast.get_docstring(node) or "", _members(node)
        whole = "\n\n".join([documentation, *members.values()])
        score = _score(title, whole, words)
        if score > 0 and len(whole) >= PASSAGE_LENGTH_MIN and _paragraphs(documentation):
            found.append(Passage(
                title=title, kind=KINDS[type(node)], module=module, line=getattr(node, "lineno", 1),
                score=round(score, 3), documentation=documentation, members=members,
            ))  # fmt: skip
    return sorted(found, key=lambda passage: -passage["score"])[:3]


def compose(topic: str, passage: Passage) -> str:
    """A section about a passage: plain sentences around quotes, the quotes on lines that begin with "> "."""
    first, *others = _paragraphs(passage["documentation"])
    where = "" if passage["kind"] == "module" else f" of the module {passage['module']}"
    is_a = f"{passage['title']} is a {passage['kind']}{where}."
    parts = [f"{is_a} Its source, from line {passage['line']} on, says of it:", f"> {first}"]
    if telling := _telling(topic, others):
        parts += ["On our subject it adds:", *(f"> {paragraph}" for paragraph in telling[:2])]
    members = passage["members"]
    chosen = sorted(members, key=lambda name: -_score(name, members[name], words_of(topic)))
    quoted = [(name, paragraphs[0]) for name in chosen if (paragraphs := _paragraphs(members[name]))][:3]
    for opening, (name, quote) in zip(OPENINGS, quoted, strict=False):
        parts += [opening.format(name), f"> {quote}"]
    return "\n\n".join(parts)


@functools.cache
def _sources() -> dict[str, str]:
    """The text of each public module of the standard library, by the module's name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name.partition(".")[0] in sys.stdlib_module_names and not SKIPPED.search(name):
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _score(name: str, text: str, words: list[str]) -> float:
    """How much a text is about the words: each counts with its logarithm, and a name that holds it counts most."""
    text, name = text.lower(), name.lower()
    parts = [min(3.0, math.log1p(text.count(word))) + (4.0 if word in name else 0.0) for word in words]
    return sum(parts) * sum(part > 0 for part in parts) / (len(words) or 1)


def _members(node: Documented) -> dict[str, str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {}
    children = (child for child in node.body if isinstance(child, Documented) and not isinstance(child, ast.Module))
    documented = ((child.name, ast.get_docstring(child)) for child in children if not child.name.startswith("_"))
    return {name: text[: 4 * EXCERPT_LENGTH_MAX] for name, text in documented if text and len(text) > 40}


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of prose, each on one line; examples, lists and headings are left out."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(block.split())
        if len(line) > 20 and line[0].isalpha() and not NOT_PROSE.search(line):
            found.append(_shortened(line.replace("``", "")))
    return found


def _shortened(line: str) -> str:
    """At most EXCERPT_LENGTH_MAX characters, cut after a sentence where there is one."""
    if len(line) <= EXCERPT_LENGTH_MAX:
        return line
    cut = line[:EXCERPT_LENGTH_MAX]
    stop = cut.rfind(". ")
    return cut[: stop + 1] if stop > 80 else cut[: cut.rfind(" ")] + " …"


def _telling(topic: str, paragraphs: list[str]) -> list[str]:
    words = words_of(topic)
    scored = [(_score("", paragraph, words), paragraph) for paragraph in paragraphs]
    return [paragraph for score, paragraph in sorted(scored, key=lambda pair: -pair[0]) if score > 0]
