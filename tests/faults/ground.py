"""The ground on which a scenario happens: a database, the processes that work on it, what was done, and the verdict."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
from cluster import Cluster
from doors import query
from faults.history import ROWS, Log, Operation, Tables, Violation, check, read_logs
from faults.programs import Process, stored

import pgchan

SHORT = {"lease": 2.0, "takeover_grace": 0.3}
# Where nobody may take over: on a busy machine a server is away for seconds.
LONG = {"lease": 30.0, "takeover_grace": 10.0}

OTHERS = """
    select application_name from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
"""


async def wait_until(fact: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Wait for a fact; False if the time is over."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


class Ground:
    """One database with pgchan's tables; starts processes on it, does what people do, and judges in the end."""

    def __init__(self, dsn: str, directory: Path, *, cluster: Cluster | None = None, **patience: float) -> None:
        """patience: lease and takeover_grace of the workers. cluster: the server, if it may be crashed."""
        self.dsn = dsn
        self.cluster = cluster
        self.patience = patience or SHORT
        self.directory = directory
        self.log = Log(directory, "test")
        self.client = pgchan.AsyncClient(dsn, name="test", timeout=10.0)
        self.processes: list[Process] = []
        self.found: list[Violation] = []
        self._following: list[asyncio.Task[None]] = []
        self._readings = 0

    # -- processes

    async def start(self, name: str, **options: Any) -> Process:
        """Start a worker and wait until it claims runs."""
        dsn = options.pop("dsn", self.dsn)
        self.processes.append(Process(dsn, name, **self.patience, **options))
        await self.processes[-1].tells("started", seconds=30)
        return self.processes[-1]

    async def start_reader(self, door: str, channel: str) -> Process:
        """Start a process that follows a channel through this door ("async" or "blocking"), and is at its end."""
        self.processes.append(Process(self.dsn, f"reader {door}", role=door, channel=channel))
        await self.processes[-1].does("reading", seconds=30)
        return self.processes[-1]

    def fault(self, kind: str, target: Process, edge: str = "begin", **facts: Any) -> None:
        self.log.write("fault", kind=kind, target=target.name, edge=edge, **facts)

    def kill(self, process: Process) -> None:
        self.fault("kill", process, deadly=True)
        process.kill()

    def freeze(self, process: Process) -> float:
        """SIGSTOP; the time."""
        self.fault("freeze", process, deadly=True)
        return process.send(signal.SIGSTOP)

    def wake(self, process: Process) -> None:
        """Let a frozen process go on, also from the point where it had stopped."""
        process.order("go")
        process.send(signal.SIGCONT)
        self.fault("freeze", process, "end", deadly=True)

    async def watched(self, process: Process) -> None:
        """Wait until another worker waits for its lock, and does for a while yet: it waits in slices."""
        waiting = """
            select 1 from pg_locks where locktype = 'advisory' and objid = %s::oid and not granted
            and clock_timestamp() - waitstart < interval '0.1 s'
        """
        worker = process.of("worker")[-1]["worker"]
        assert await wait_until(lambda: query(self.dsn, waiting, worker)), f"nobody watches {process.name}"

    # -- what people do

    async def start_run(self, workflow: str, id: str = "r") -> None:
        await self.client.start(workflow, id=id)
        self.log.write("start", type="ok", run=id)

    async def signal(self, body: str, run: str = "r") -> None:
        self.log.write("signal", type="invoke", run=run, value=body)
        message = await self.client.run(run).signal(body)
        self.log.write("signal", type="ok", run=run, value=body, position=message.position)

    async def result(self, run: str = "r", seconds: float = 20.0) -> Any:
        """Wait for a run's end; what it came to, None if it has not ended by then."""
        with suppress(TimeoutError):
            value = await self.client.run(run).result(seconds)
            self.log.write("ended", run=run, state="succeeded", value=value)
            return value
        self.blame("L1", "runs_end", f"run {run!r} has not ended {seconds} s later")

    async def publish(
        self, channel: str, value: Any, *, client: pgchan.AsyncClient | None = None, key: str | None = None,
        probe: bool = False,
    ) -> str:  # fmt: skip
        """Publish, and log how that ends: "ok", "fail" or "info"."""
        facts = {"channel": channel, "value": value, "key": key, "probe": probe}
        self.log.write("publish", type="invoke", **facts)
        try:
            message = await (client or self.client).channel(channel).publish(value, key=key)
        except pgchan.Indefinite as error:
            self.log.write("publish", type="info", **facts, error=str(error))
            return "info"
        except pgchan.Error as error:
            self.log.write("publish", type="fail", **facts, error=str(error))
            return "fail"
        self.log.write("publish", type="ok", **facts, **stored(message))
        return "ok"

    async def read(self, channel: str, *, after: int | str = 0, limit: int = 100, expect: str | None = None) -> str:
        """Read from a cursor on; the cursor behind it. expect: the reason of the reset that must come."""
        self._readings += 1
        where = {"reader": "test reading", "reading": self._readings, "channel": channel}
        position = after if isinstance(after, int) else int(after[:16])
        self.log.write("reading", **where, after=position, view="raw", expect=expect)
        try:
            page = await self.client.channel(channel).page(after=after, limit=limit, view="raw")
        except pgchan.Reset as reset:
            reason = "trimmed" if isinstance(reset, pgchan.Trimmed) else "history_lost"
            self.log.write("reset", **where, reason=reason, first=reset.first, last=reset.last)
            return reset.cursor
        for message in page.messages:
            self.log.write("read", **where, **stored(message), kind=message.kind, value=message.body)
        return page.cursor

    def follow(self, channel: str = "r") -> asyncio.Task[None]:
        """Read a channel from now on, whatever happens; ends with the channel."""
        self._following.append(asyncio.create_task(self._follow(channel)))
        return self._following[-1]

    async def _follow(self, channel: str) -> None:
        where = {"reader": "test", "reading": 1, "channel": channel}
        self.log.write("reading", **where, after=0, view="raw")
        async for message in self.client.channel(channel).tail(view="raw"):
            self.log.write("read", **where, **stored(message), kind=message.kind, value=message.body)

    # -- the verdict

    def blame(self, invariant: str, name: str, what: str) -> None:
        """Note a violation that only the scenario can see."""
        self.found.append(Violation(invariant, name, what))

    @property
    def operations(self) -> list[Operation]:
        """All that was done so far, in order."""
        told = [operation for process in self.processes for operation in process.operations]
        return sorted(read_logs(self.directory) + told, key=lambda operation: operation["m"])

    def is_settled(self) -> bool:
        """Whether just the workers that live are registered, and each has its lock."""
        found = Tables.read(self.dsn)
        alive = [p.of("worker")[-1]["worker"] for p in self.processes if p.process.poll() is None and p.of("worker")]
        return found.workers == sorted(found.locks) == sorted(alive)

    async def end(self) -> list[Violation]:
        """End everything in good order, or at once if something is wrong already; what is wrong with this history."""
        if not self.found:
            await self._end_in_good_order()
        return [*self.found, *check(self.operations, Tables.read(self.dsn))]

    async def _end_in_good_order(self) -> None:
        await wait_until(self.is_settled, 5.0)
        await self.client.close()
        alive = [process for process in self.processes if process.process.poll() is None]
        for process in alive:
            process.send(signal.SIGTERM)
        for process in alive:
            try:
                code = await process.exits()
            except Exception:
                code = None
            if code not in (0, -signal.SIGTERM):  # a reader has nothing to bring to an end
                self.blame("L4", "nothing_is_left", f"{process.name} ended with {code} when it was told to")
                process.close()
        if not await wait_until(lambda: not query(self.dsn, OTHERS), 5.0):
            self.blame("L4", "nothing_is_left", f"connections are left: {query(self.dsn, OTHERS)}")

    async def close(self) -> None:
        """Leave nothing behind, also after a failure."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self.client.close()
        for process in self.processes:
            process.close()
        self.log.close()


def prepare(dsn: str) -> None:
    """Make the tables of the package that is imported, and those of the scenarios."""
    schema = Path(pgchan.__file__).with_name("schema.sql").read_text("utf-8")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set synchronous_commit = on")
        connection.execute(schema.encode())
        connection.execute(ROWS.encode())
