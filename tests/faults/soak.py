"""Random faults for as long as you like: `python tests/faults/soak.py --minutes 60 --seed 7`.

A soak is a series of rounds of a few minutes, each in a database of its own and judged when it is over. It prints what
was done and what was found, ends with 1 if anything was, and keeps the logs of what went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from cluster import Cluster
from faults.history import Violation, check, read_logs, takeovers
from faults.nemesis import FAULTS, Nemesis, Settings, World

ROUND_SECONDS = 240.0
MEMORY_SECONDS = 120.0  # a round that is shorter is no measure of memory


@dataclass
class Report:
    """What a soak did and found."""

    seed: int
    versions: str = ""
    seconds: float = 0.0
    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    takeovers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    directory: Path | None = None  # the logs of the rounds in which something was found

    def print(self, console: Console) -> None:
        """The figures, as tables."""
        console.print(f"seed {self.seed} · {self.versions} · {self.rounds} rounds, {self.seconds / 60:.1f} minutes")
        table = Table("what", "how often")
        for what, count in [*sorted(self.counts.items()), *(("fault: " + k, n) for k, n in self.faults.most_common())]:
            table.add_row(what, f"{count:,}")
        table.add_row("faults", f"{self.faults.total():,}")
        table.add_row("violations", f"{len(self.violations):,}", style="bold red" if self.violations else "green")
        console.print(table)
        if self.takeovers:
            table = Table("takeover after", "n", "p50 s", "p99 s", "max s")
            for kind, seconds in sorted(self.takeovers.items()):
                ordered = sorted(seconds)
                p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
                figures = statistics.median(ordered), p99, ordered[-1]
                table.add_row(kind, f"{len(ordered)}", *(f"{figure:.2f}" for figure in figures))
            console.print(table)
        for violation in self.violations:
            console.print(str(violation), markup=False, highlight=False, soft_wrap=True)
        if self.directory is not None:
            console.print(f"logs: {self.directory}")

    def __str__(self) -> str:
        found = "\n".join(map(str, self.violations))
        return f"seed {self.seed}: {len(self.violations)} violations; logs: {self.directory}\n{found}"


def run(
    minutes: float, seed: int, *, settings: Settings | None = None, stop: bool = False, keep: bool = False,
    round_seconds: float = ROUND_SECONDS, told: Callable[[str], None] = lambda text: None,
) -> Report:  # fmt: skip
    """Do a soak. settings: leases, the kinds of faults, the package under test. stop: at the first round in which
    something is found. keep: the logs of good rounds too. told: is called with a line about each round."""
    return asyncio.run(
        _run(minutes * 60, replace(settings or Settings(), seed=seed), stop, keep, round_seconds, told)
    )  # fmt: skip


async def _run(
    seconds: float, settings: Settings, stop: bool, keep: bool, round_seconds: float, told: Callable[[str], None]
) -> Report:
    report = Report(settings.seed)
    home = Path(tempfile.mkdtemp(prefix=f"pgchan-soak-{settings.seed}-"))
    cluster = await asyncio.to_thread(Cluster, {"max_connections": "300", "autovacuum_naptime": "5s"}, tcp=True)
    began = time.monotonic()
    try:
        await asyncio.to_thread(cluster.start)
        with psycopg.connect(cluster.dsn) as connection:
            version = connection.info.server_version
        report.versions = f"PostgreSQL {version // 10000}.{version % 10000}, Python {platform.python_version()}"
        while (left := seconds - (time.monotonic() - began)) > 1 and not (stop and report.violations):
            report.rounds += 1
            directory = home / f"round-{report.rounds}"
            directory.mkdir()
            found = await _round(cluster, directory, settings, report, min(left, round_seconds))
            report.violations += found
            told(f"round {report.rounds}: {report.faults.total()} faults, {len(report.violations)} violations")
            if found:
                report.directory = home
                (directory / "violations").write_text("\n".join(map(str, found)) + "\n")
                shutil.copy(cluster.log, directory / "server.log")
            elif not keep:
                shutil.rmtree(directory)
    finally:
        await asyncio.to_thread(cluster.remove)
    report.seconds = time.monotonic() - began
    if report.directory is None and not keep:
        shutil.rmtree(home)
    else:
        report.directory = home
    return report


async def _round(
    cluster: Cluster, directory: Path, settings: Settings, report: Report, seconds: float
) -> list[Violation]:
    """One database, one set of actors, faults for so long, and the verdict."""
    database = f"round_{report.rounds}"
    async with World(cluster, database, directory, settings) as world:
        nemesis = Nemesis(world, f"{settings.seed}/{report.rounds}")
        pids: list[int] = []
        if seconds >= MEMORY_SECONDS:
            await nemesis.harm(seconds / 2)
            pids = world.weigh("before")
            seconds /= 2
        await nemesis.harm(seconds)
        world.weigh("after", pids)
        tables = await world.calm()
    operations = await asyncio.to_thread(read_logs, directory)
    for o in operations:
        if o["op"] == "fault" and o["edge"] == "begin":
            report.faults[o["kind"]] += 1
        elif o["op"] in ("publish", "signal") and o["type"] == "ok":
            report.counts["acknowledged " + ("messages" if o["op"] == "publish" else "signals")] += 1
        elif o["op"] == "read":
            report.counts["reads"] += 1
    report.counts["runs"] += len(tables.runs)
    for takeover in takeovers(operations):
        report.takeovers[takeover.kind].append(takeover.seconds)
    found = await asyncio.to_thread(check, operations, tables)
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute(f"drop database {database} with (force)".encode())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="random faults, and a checker that has seen it all")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--short", action="store_true", help="a lease of 3 s instead of 10: more takeovers, no figures")
    parser.add_argument("--stop", action="store_true", help="end at the first round in which something is found")
    parser.add_argument("--keep", action="store_true", help="keep the logs of good rounds too")
    parser.add_argument("--round", type=float, default=ROUND_SECONDS, help="seconds of faults in a round")
    parser.add_argument("--faults", default="", help=f"only these, separated by commas: {', '.join(FAULTS)}")
    parser.add_argument("--package", type=Path, default=None, help="a directory that holds the pgchan to be tested")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else secrets.randbelow(1_000_000)
    settings = Settings(
        lease=3.0 if given.short else 10.0, package=given.package, faults=tuple(filter(None, given.faults.split(",")))
    )
    console = Console()
    console.print(f"seed {seed}")
    report = run(
        given.minutes, seed, settings=settings, stop=given.stop, keep=given.keep, round_seconds=given.round,
        told=lambda text: console.print(text, highlight=False),
    )  # fmt: skip
    report.print(console)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
