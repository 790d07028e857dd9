"""The house rules that a program can check."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest

import pgchan
from pgchan import errors, points

ROOT = Path(__file__).parent.parent
LINES_MAX = 400
FUNCTION_LINES_MAX = 60

# Imports point down: to a lower row or, within a row, to the left. What stands in one set never imports each other.
ROWS: tuple[tuple[set[str], ...], ...] = (
    ({"errors", "points"}, {"names", "dsn"}, {"codec"}, {"model"}),
    ({"sql"}, {"db"}),
    ({"writer"}, {"callers", "workflows"}, {"channels"}, {"wakeups"}, {"journal"}, {"runs"}),
    ({"groups"}, {"asyncpg_db", "psycopg_db"}, {"sqlalchemy"}, {"aio", "sync"}),
    ({"session"}, {"liveness"}, {"attempt"}, {"transactions"}, {"steps"}, {"blocking"}, {"worker"}),
    (
        {"migrations"}, {"migrate"}, {"env"}, {"doctor", "harden"}, {"server"}, {"console"}, {"serve"}, {"testing"},
        {"examples"}, {"embedded"}, {"demo"}, {"bench"}, {"cli"},
    ),
)  # fmt: skip
# Only these may import drivers, asyncio or threading. What is inside is coroutines over Db, and does no I/O; callers.py
# is the exception, because the caller's own connection is a driver's.
OUTSIDE = {module for row in ROWS[3:] for group in row for module in group} | {"callers"}
IO = {"asyncio", "threading", "asyncpg", "psycopg", "sqlalchemy", "socket", "select", "selectors", "concurrent"}

# Words that have another name in this house, as a part of the name of a module, class or function.
NEVER = {
    "topic", "emit", "prune", "purge", "notification", "job", "activity", "memo", "generation", "manager",
    "handler", "util", "utils", "common", "core", "misc", "async",
}  # fmt: skip


def sources(*directories: str) -> list[Path]:
    """The Python files of these directories, not through symlinks."""
    found = []
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            if not any(parent.is_symlink() for parent in [path, *path.parents]):
                found.append(path)
    return found


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The name that the table of rows has for the module that this file belongs to."""
    top, *rest = path.relative_to(ROOT).parts
    # Alembic runs env.py as a program; it lies among the revisions because Alembic looks for it there.
    return Path(rest[0]).stem if top == "pgchan" or rest == ["env.py"] else top


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Each import of the file that runs, as a dotted name; those for type checkers only do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def rank(module: str) -> tuple[int, int]:
    for height, row in enumerate(ROWS):
        for place, group in enumerate(row):
            if module in group:
                return height, place
    raise AssertionError(f"module {module!r} has no place in the rows above")


@pytest.mark.parametrize("path", sources("pgchan", "server", "migrations", "examples"), ids=short)
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        return
    for node, name in imports(path):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        modules = {module for row in ROWS for group in row for module in group}
        if first != "pgchan" or other not in modules or other == own:
            continue
        assert rank(other) < rank(own), f"{path}:{node.lineno} {own} imports {other}, which does not lie below it"


@pytest.mark.parametrize("path", sources("pgchan"), ids=short)
def test_what_is_inside_does_no_io(path: Path) -> None:
    if module_of(path) in OUTSIDE | {"__init__"}:
        return
    for node, name in imports(path):
        assert name.partition(".")[0] not in IO, f"{path}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", sources("server"), ids=short)
def test_the_server_uses_a_door_and_never_sql(path: Path) -> None:
    assert not [name for _, name in imports(path) if name.startswith(("pgchan.sql", "asyncpg", "psycopg"))]


# ---- both doors


def _plain(text: str | None) -> str:
    """Text of the async door as the blocking one has it."""
    text = re.sub(r"\bAsync(?=[A-Z])", "", text or "")
    text = re.sub(r"\b(?:await|async) ", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _public(member: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(member).items() if not name.startswith("_")}


def _pairs() -> list[tuple[type, type]]:
    aio, sync = importlib.import_module("pgchan.aio"), importlib.import_module("pgchan.sync")
    pairs = []
    for name, value in vars(aio).items():
        if inspect.isclass(value) and name.startswith("Async") and value.__module__ == aio.__name__:
            other = name.removeprefix("Async")
            pairs.append((value, getattr(sync, "ChannelTail" if other == "Tail" else other)))
    return pairs


def test_there_are_two_doors() -> None:
    assert {blocking.__name__ for _, blocking in _pairs()} >= {"Client", "Channel"}


def test_both_doors_have_the_same_methods_arguments_and_docstrings() -> None:
    for waits, blocks in _pairs():
        assert _public(waits).keys() == _public(blocks).keys(), f"{waits.__name__} and {blocks.__name__}"
        assert _plain(waits.__doc__) == _plain(blocks.__doc__), f"{waits.__name__} and {blocks.__name__}"
        for name, method in _public(waits).items():
            other = getattr(blocks, name)
            assert _plain(inspect.getdoc(method)) == _plain(inspect.getdoc(other)), f"{waits.__name__}.{name}"
            if inspect.isfunction(method):
                assert _arguments(method) == _arguments(other), f"{waits.__name__}.{name}"


def _arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


# ---- SQL

_STATEMENT = re.compile(
    r"""\A\s*(?:
        select\b | insert\s+into\b | delete\s+from\b | update\s+\w | with\s+\w+\s+as\b | call\s+pgchan\. | do\s+\$
      | (?:un)?listen\s+[\w"*] | notify\s+\w | (?:create|alter|drop)\s+(?:table|schema|function|role|index|database)\b
      | set\s+(?:local\s+|session\s+)?\w+\s*(?:=|to\b) | begin\b | commit\b | rollback\b | pg_\w+\(
    )""",
    re.VERBOSE | re.IGNORECASE,
)


def _texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """String constants that are not docstrings."""
    documentation = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield node


@pytest.mark.parametrize("path", sources("pgchan", "server"), ids=short)
def test_sql_stands_in_its_own_files(path: Path) -> None:
    if path.name == "sql.py":
        return
    for node in _texts(ast.parse(path.read_text("utf-8"))):
        assert not _STATEMENT.match(str(node.value)) or " " not in str(node.value).strip(), (
            f"{path}:{node.lineno} holds SQL: {str(node.value).strip()[:60]!r}"
        )


def _statements() -> dict[str, tuple[ast.Assign, str]]:
    tree = ast.parse((ROOT / "pgchan" / "sql.py").read_text("utf-8"))
    return {
        node.targets[0].id: (node, node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def test_every_parameter_is_cast() -> None:
    for name, (_, statement) in _statements().items():
        assert not re.findall(r"\$\d+(?!\d|::)", statement), name


def test_every_statement_is_used() -> None:
    users = "".join(path.read_text("utf-8") for path in sources("pgchan", "server") if path.name != "sql.py")
    for name in _statements():
        assert re.search(rf"\b{name}\b", users), f"sql.{name} is not used"


def test_every_statement_past_two_lines_is_explained() -> None:
    lines = (ROOT / "pgchan" / "sql.py").read_text("utf-8").splitlines()
    for name, (node, statement) in _statements().items():
        if len(statement.strip().splitlines()) > 2:
            assert lines[node.lineno - 2].startswith("#"), f"sql.{name}"


def test_every_function_pins_its_search_path_and_no_procedure_does(dsn: str) -> None:
    # A procedure with a SET clause, or SECURITY DEFINER, may not COMMIT.
    query = """
        select proname, prokind = 'f', prosecdef, coalesce(proconfig, '{}') from pg_proc
        where pronamespace = 'pgchan'::regnamespace
    """
    with psycopg.connect(dsn) as connection:
        for name, is_function, is_definer, settings in connection.execute(query):
            pinned = any(setting.startswith("search_path=pg_catalog") for setting in settings)
            assert pinned == is_function, f"pgchan.{name}"
            assert is_function or not is_definer, f"pgchan.{name}"


def test_nobody_but_the_owner_has_a_right_by_default(dsn: str) -> None:
    query = """
        select p.proname from pg_proc p
        where p.pronamespace = 'pgchan'::regnamespace and has_function_privilege('public', p.oid, 'execute')
    """
    with psycopg.connect(dsn) as connection:
        assert connection.execute(query).fetchall() == []


# ---- errors


def _errors() -> list[type[errors.Error]]:
    found = [errors.Error]
    for parent in found:
        found += parent.__subclasses__()
    return [error for error in found if error.__module__ == errors.__name__]


def test_every_error_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[A-Z]\w+", "\n".join(line for line in errors.__doc__.splitlines() if line[:1] in "├│└E")))
    assert {error.__name__ for error in _errors()} <= drawn


def test_every_error_is_exported_and_has_a_word_of_its_own() -> None:
    words = [error.code for error in _errors()]
    assert len(words) == len(set(words))
    assert {error.__name__ for error in _errors()} <= set(pgchan.__all__)


def test_an_error_has_one_sqlstate_at_most() -> None:
    assert len(set(errors.BY_SQLSTATE.values())) == len(errors.BY_SQLSTATE)


def test_every_sqlstate_that_a_routine_raises_has_an_error() -> None:
    schema = (ROOT / "pgchan" / "schema.sql").read_text("utf-8")
    assert set(re.findall(r"errcode = '(\w+)'", schema)) <= set(errors.BY_SQLSTATE)


@pytest.mark.parametrize("error", _errors()[1:], ids=lambda error: error.__name__)
def test_every_error_is_raised_in_a_test(error: type[errors.Error]) -> None:
    tests = "".join(path.read_text("utf-8") for path in sources("tests") if path != Path(__file__))
    assert error.__subclasses__() or re.search(rf"\b{error.__name__}\b", tests), f"no test names {error.__name__}"


# ---- names, documentation, size


@pytest.mark.parametrize("name", ["pgchan", "pgchan.server", "pgchan.migrations"])
def test_public_names_are_sorted_and_documented(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        value = getattr(module, public)
        assert not callable(value) or inspect.getdoc(value), f"{name}.{public} has no docstring"


def _definitions(tree: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", sources("pgchan", "server", "migrations"), ids=short)
def test_every_module_and_public_function_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for member in [node, *members]:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                is_private = member.name.startswith("_") or member.name in ("upgrade", "downgrade")
                is_fine = is_private or ast.get_docstring(member) or _is_stub(member)
                assert is_fine, f"{path}:{member.lineno} {member.name}"


def _is_stub(node: ast.AST) -> bool:
    """An overload, a method of a Protocol, or a single `return`, which its name explains."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    return bool(decorators & {"overload", "typing.overload"}) or (
        len(node.body) == 1 and (isinstance(node.body[0], ast.Return) or ast.unparse(node.body[0]) == "...")
    )


@pytest.mark.parametrize("path", sources("pgchan", "server", "migrations"), ids=short)
def test_names_use_the_words_of_this_house(path: Path) -> None:
    names = [path.stem, *(node.name for node in _definitions(ast.parse(path.read_text("utf-8"))))]
    for name in names:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
        used = {word.lower() for word in words} & NEVER - ({"async"} if name.startswith("Async") else set())
        assert not used, f"{path}: {name} uses {used}"


@pytest.mark.parametrize(
    "path", sources("pgchan", "server", "migrations", "examples", "benchmarks", "tests"), ids=short
)  # fmt: skip
def test_long_files_and_functions_say_why(path: Path) -> None:
    """A file past LINES_MAX says "long" in its docstring, a function past FUNCTION_LINES_MAX within itself."""
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    assert len(lines) <= LINES_MAX or "long" in (ast.get_docstring(tree) or "").lower(), f"{path}: {len(lines)} lines"
    for node in _definitions(tree):
        if isinstance(node, ast.ClassDef) or node.end_lineno is None:
            continue
        body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        size = node.end_lineno - node.lineno + 1
        assert size <= FUNCTION_LINES_MAX or re.search(r"\blong\b", body.lower()), f"{path}:{node.lineno} {size} lines"


def test_the_symlinks_for_type_checkers_lead_to_the_directories() -> None:
    for name in ("server", "migrations", "examples", "benchmarks"):
        assert (ROOT / "pgchan" / name).readlink() == Path("..") / name


# ---- named points


def _points(path: Path) -> set[str]:
    """The names that the file hands to point() or point_soon(), or maps to: all its texts that are in the list."""
    tree = ast.parse(path.read_text("utf-8"))
    called = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("point", "point_soon")
        and isinstance(node.args[0], ast.Constant)
    }
    return called | {node.value for node in _texts(tree) if node.value in points.NAMES}


def test_the_points_that_are_used_are_the_points_that_are_listed() -> None:
    used = set[str]().union(*(_points(path) for path in sources("pgchan", "server") if path.name != "points.py"))
    assert used == set(points.NAMES)
    assert len(points.NAMES) == len(set(points.NAMES)) == 13


@pytest.mark.parametrize("path", sources("pgchan", "server", "migrations", "examples"), ids=short)
def test_nothing_that_is_shipped_stops_at_a_point(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "reached":
            assert isinstance(node.ctx, ast.Load), f"{path}:{node.lineno} sets points.reached"


def test_an_environment_variable_alone_stops_nothing() -> None:
    environment = os.environ | {"PGCHAN_POINTS": ",".join(points.NAMES)}
    program = "from pgchan import cli, points, serve, worker; assert points.reached is None"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
