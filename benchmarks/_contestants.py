"""The programs that peers.py compares, pgchan among them, each as one process that is asked over its standard streams.

    python _contestants.py NAME ADDRESS      one line of JSON in, one line of JSON out

All are treated alike: publisher, worker and reader are one process, since two of the peers cannot be told apart from
their pollers otherwise; latencies are taken one at a time with a pause between them, on an idle system, from the call
of the sender to the first line of the receiver's code; rates are closed loops. The file is long because the peers are
many. It runs in an environment that has the peers and not pgchan, so nothing of pgchan is imported at the top.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

STEPS_PER_RUN = 10
RESULT = "x" * 58  # 60 bytes as JSON
BODY = "x" * 98  # 100 bytes as JSON
PAUSE_SECONDS = 0.01
HEARD_SECONDS = 30.0


class Contestant:
    """What all of them do; one that cannot do a thing lacks the method. Times are in µs."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.late: list[float] = []
        self.came = asyncio.Event()
        self.held = asyncio.Event()
        self._numbers = itertools.count()

    def hear(self, due: int) -> None:
        """A message that was sent at this moment is here."""
        self.late.append((time.monotonic_ns() - due) / 1e3)
        self.came.set()

    def number(self) -> int:
        """One that was not given before."""
        return next(self._numbers)

    async def one_by_one(self, count: int, send: Callable[[int], Awaitable[object]]) -> list[float]:
        """How late each message is heard that is sent like this."""
        self.late = []
        for _ in range(count):
            self.came.clear()
            await send(time.monotonic_ns())
            await asyncio.wait_for(self.came.wait(), HEARD_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)
        return self.late

    async def loop(self, seconds: float, work: Callable[[], Awaitable[object]], *, concurrency: int = 1) -> float:
        """How often a second this is done, by so many at a time."""
        done = 0
        began = time.monotonic()

        async def again() -> None:
            nonlocal done
            while time.monotonic() < began + seconds:
                await work()
                done += 1

        await asyncio.gather(*(again() for _ in range(concurrency)))
        return done / (time.monotonic() - began)

    async def taken(self, seconds: float) -> int | None:
        """When the step of `hold` begins here, in ns of the monotonic clock."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.held.wait(), seconds)
            return time.monotonic_ns()
        return None

    async def worked_off(self, count: int, working: Callable[[], Awaitable[object]]) -> float:
        """How many of the jobs that are waiting a second are begun, from the start of a worker to the last of them."""
        self.late = []
        began = time.monotonic()
        task = asyncio.ensure_future(working())
        try:
            async with asyncio.timeout(60):
                while len(self.late) < count:
                    self.came.clear()
                    await self.came.wait()
            return count / (time.monotonic() - began)
        finally:
            await _end(task)


async def _end(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def _forever(event: asyncio.Event) -> None:
    event.set()
    await asyncio.sleep(3600)


# ------------------------------------------------------------------------------------------------ pgchan


class Ours(Contestant):
    """pgchan as it is without any setting."""

    async def open(self) -> None:
        """A client, and a worker on the default queue."""
        import pgchan

        me = self

        async def result() -> str:
            return RESULT

        async def hear(due: int) -> None:
            me.hear(due)

        @pgchan.workflow
        async def ten(run: pgchan.Run) -> str:
            for _ in range(STEPS_PER_RUN):
                await run.step(result)
            return RESULT

        @pgchan.workflow
        async def first(run: pgchan.Run, due: int) -> None:
            await run.step(hear, due)

        @pgchan.workflow
        async def nothing(run: pgchan.Run, due: int) -> None:
            me.hear(due)

        @pgchan.workflow
        async def talk(run: pgchan.Run, count: int) -> None:
            for _ in range(count):
                await run.publish(time.monotonic_ns())
                await asyncio.sleep(PAUSE_SECONDS)

        @pgchan.workflow
        async def listen(run: pgchan.Run, count: int) -> None:
            for _ in range(count):
                signal = await run.receive()
                assert signal is not None
                me.hear(signal.body)

        @pgchan.workflow
        async def hold(run: pgchan.Run) -> None:
            await run.step(_forever, me.held)

        self.ten, self.first, self.nothing, self.talk, self.listen, self.held_run = (
            ten,
            first,
            nothing,
            talk,
            listen,
            hold,
        )
        self.all: list[Any] = [ten, first, nothing, talk, listen, hold]
        self.client, self.reading = pgchan.AsyncClient(self.address), pgchan.AsyncClient(self.address)
        self.worker = pgchan.Worker(self.client, self.all, concurrency=256)
        self.working = asyncio.create_task(self.worker.run(signals=False))
        await self.worker.wait_started()

    async def runs(self, concurrency: int, seconds: float) -> float:
        """Runs of ten steps a second, from start to result."""

        async def one() -> None:
            await (await self.client.start(self.ten)).result(timeout=30)

        return await self.loop(seconds, one, concurrency=concurrency)

    async def begin(self, count: int) -> list[float]:
        """Until the first step runs."""
        return await self.one_by_one(count, lambda due: self.client.start(self.first, due))

    async def stream(self, count: int) -> list[float]:
        """From a workflow to a reader."""
        self.late = []
        handle = await self.client.start(self.talk, count)
        async for message in handle.tail():
            if message.kind == "message":
                self.hear(message.body)
            if len(self.late) == count:
                break
        return self.late

    async def send(self, count: int) -> list[float]:
        """From outside into a waiting workflow."""
        handle = await self.client.start(self.listen, count)
        return await self.one_by_one(count, handle.signal)

    async def jobs(self, concurrency: int, count: int) -> float:
        """Jobs a second, without any step."""
        import pgchan

        queue = f"jobs-{self.number()}"
        for _ in range(count):
            await self.client.start(self.nothing, time.monotonic_ns(), queue=queue)
        worker = pgchan.Worker(self.client, self.all, queues=[queue], concurrency=concurrency)
        return await self.worked_off(count, lambda: worker.run(signals=False))

    async def job_begins(self, count: int) -> list[float]:
        """Until a job is begun."""
        return await self.one_by_one(count, lambda due: self.client.start(self.nothing, due))

    async def deliver(self, count: int) -> list[float]:
        """From publish to a reader on another client."""
        channel = self.client.channel(f"peers/{os.getpid()}/{self.number()}")
        await channel.publish(0)
        tail = self.reading.channel(channel.name).tail(after="now")
        await tail.next_page(0.01)

        async def read() -> None:
            async for message in tail:
                self.hear(message.body["due"])

        reading = asyncio.create_task(read())
        try:
            return await self.one_by_one(count, lambda due: channel.publish({"due": due, "body": BODY}))
        finally:
            await _end(reading)

    async def publish(self, batch: int, seconds: float) -> float:
        """Messages a second, each batch acknowledged before the next."""
        channel = self.client.channel(f"peers/{os.getpid()}/{self.number()}")
        if batch == 1:
            return await self.loop(seconds, lambda: channel.publish(BODY))
        return batch * await self.loop(seconds, lambda: channel.publish_many([BODY] * batch))

    async def hold(self) -> None:
        """Start a run whose step never ends; returns when it runs here."""
        await self.client.start(self.held_run)
        await self.held.wait()


# ------------------------------------------------------------------------------------------------ workflows


class Dbos(Contestant):
    """DBOS Transact as documented, in asyncio."""

    POLL_SECONDS: float | None = None
    COALESCE_SECONDS: float | None = None

    async def open(self) -> None:
        """Launch it on its own schema in the same database."""
        from dbos import DBOS

        me = self
        self.dbos = DBOS
        config: dict[str, Any] = {
            "name": "bench", "application_version": "1", "system_database_url": self.address, "log_level": "ERROR",
        }  # fmt: skip
        if self.COALESCE_SECONDS:
            config["notification_coalesce_sec"] = self.COALESCE_SECONDS
        DBOS(config=config)

        @DBOS.step()
        async def result() -> str:
            return RESULT

        @DBOS.step()
        async def hear(due: int) -> None:
            me.hear(due)

        @DBOS.step()
        async def stay() -> None:
            await _forever(me.held)

        @DBOS.workflow()
        async def ten() -> str:
            for _ in range(STEPS_PER_RUN):
                await result()
            return RESULT

        @DBOS.workflow()
        async def first(due: int) -> None:
            await hear(due)

        @DBOS.workflow()
        async def talk(count: int) -> None:
            for _ in range(count):
                await DBOS.write_stream_async("said", time.monotonic_ns())
                await asyncio.sleep(PAUSE_SECONDS)

        @DBOS.workflow()
        async def listen(count: int) -> None:
            for _ in range(count):
                me.hear(await DBOS.recv_async())

        @DBOS.workflow()
        async def hold() -> None:
            await stay()

        self.ten, self.first, self.talk, self.listen, self.held_run = ten, first, talk, listen, hold
        DBOS.launch()
        self.queue = "slow" if self.POLL_SECONDS is None else "fast"
        polling = {} if self.POLL_SECONDS is None else {"polling_interval_sec": self.POLL_SECONDS}
        await DBOS.register_queue_async(self.queue, **polling)

    async def runs(self, concurrency: int, seconds: float) -> float:
        """Workflows of ten steps a second, called directly, which is the shortest way."""
        return await self.loop(seconds, self.ten, concurrency=concurrency)

    async def begin(self, count: int) -> list[float]:
        """Through a queue: the way by which another process can execute it."""
        return await self.one_by_one(count, lambda due: self.dbos.enqueue_workflow_async(self.queue, self.first, due))

    async def stream(self, count: int) -> list[float]:
        """From a workflow to a reader."""
        self.late = []
        handle = await self.dbos.start_workflow_async(self.talk, count)
        async for due in self.dbos.read_stream_async(handle.get_workflow_id(), "said"):
            self.hear(due)
            if len(self.late) == count:
                break
        return self.late

    async def send(self, count: int) -> list[float]:
        """From outside into a waiting workflow."""
        handle = await self.dbos.start_workflow_async(self.listen, count)
        return await self.one_by_one(count, lambda due: self.dbos.send_async(handle.get_workflow_id(), due))

    async def hold(self) -> None:
        """Start a workflow whose step never ends; returns when it runs here."""
        await self.dbos.start_workflow_async(self.held_run)
        await self.held.wait()


class DbosFast(Dbos):
    """With both of its intervals turned down: queues polled every 10 ms, notifications held back for 1 ms."""

    POLL_SECONDS = 0.01
    COALESCE_SECONDS = 0.001


class Absurd(Contestant):
    """Absurd's asyncio client; its schema is put there by absurdctl."""

    POLL_SECONDS = 0.25  # the default

    async def open(self) -> None:
        """The schema, a queue, a task, and a client to spawn with beside the worker's."""
        from absurd_sdk import AsyncAbsurd

        me = self
        self.spawning = AsyncAbsurd(self.address)
        program = os.path.join(os.path.dirname(sys.executable), "absurdctl")
        # It refuses where the schema is already; if it fails for another reason, the first queue says so.
        process = await asyncio.create_subprocess_exec(
            program, "init", "--database", self.address, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await process.wait()

        async def result() -> str:
            return RESULT

        async def ten(parameters: dict[str, int], context: Any) -> str:
            for number in range(STEPS_PER_RUN):
                await context.step(f"step {number}", result)
            me.hear(parameters["due"])
            return RESULT

        async def first(parameters: dict[str, int], context: Any) -> None:
            async def hear() -> None:
                me.hear(parameters["due"])

            await context.step("hear", hear)

        self.tasks = {"ten": ten, "first": first}

    async def _queue(self) -> tuple[Any, str]:
        from absurd_sdk import AsyncAbsurd

        name = f"q{os.getpid()}x{self.number()}"
        await self.spawning.create_queue(name)
        app = AsyncAbsurd(self.address, queue_name=name)
        for task, function in self.tasks.items():
            app.register_task(task)(function)
        return app, name

    async def runs(self, concurrency: int, seconds: float) -> float:
        """Tasks of ten steps a second, all of them waiting when the worker starts: it never sleeps between polls."""
        app, name = await self._queue()
        count = max(concurrency, round(60 * seconds))
        for _ in range(count):
            await self.spawning.spawn("ten", {"due": time.monotonic_ns()}, queue=name)
        return await self.worked_off(
            count, lambda: app.start_worker(concurrency=concurrency, poll_interval=self.POLL_SECONDS)
        )

    async def begin(self, count: int) -> list[float]:
        """Until the first step runs."""
        app, name = await self._queue()
        working = asyncio.create_task(app.start_worker(poll_interval=self.POLL_SECONDS))
        try:
            return await self.one_by_one(count, lambda due: self.spawning.spawn("first", {"due": due}, queue=name))
        finally:
            await _end(working)


class AbsurdFast(Absurd):
    """With a poll every 10 ms."""

    POLL_SECONDS = 0.01


# ------------------------------------------------------------------------------------------------ queues


class Procrastinate(Contestant):
    """procrastinate with psycopg, woken by LISTEN/NOTIFY, which is its default."""

    async def open(self) -> None:
        """Its schema, and a worker for the latencies."""
        import procrastinate

        me = self
        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self.address))

        @self.app.task(name="nothing")
        async def nothing(due: int) -> None:
            me.hear(due)

        self.nothing = nothing
        await self.app.open_async()
        await self.app.schema_manager.apply_schema_async()

    async def jobs(self, concurrency: int, count: int) -> float:
        """Jobs a second."""
        queue = f"q{self.number()}"
        await self.nothing.configure(queue=queue).batch_defer_async(*[{"due": time.monotonic_ns()}] * count)
        return await self.worked_off(count, lambda: self._work(queue, concurrency))

    async def job_begins(self, count: int) -> list[float]:
        """Until a job is begun."""
        queue = f"q{self.number()}"
        working = asyncio.create_task(self._work(queue, 32))
        await asyncio.sleep(0.5)
        try:
            deferred = self.nothing.configure(queue=queue)
            return await self.one_by_one(count, lambda due: deferred.defer_async(due=due))
        finally:
            await _end(working)

    async def _work(self, queue: str, concurrency: int) -> None:
        await self.app.run_worker_async(queues=[queue], concurrency=concurrency, install_signal_handlers=False)


class Pgqueuer(Contestant):
    """pgqueuer with asyncpg. Its batch size is its concurrency here, at most as many as run at a time."""

    async def open(self) -> None:
        """Its schema."""
        import asyncpg
        from pgqueuer import AsyncpgDriver, Queries

        self.queries = Queries(AsyncpgDriver(await asyncpg.connect(self.address)))
        await self.queries.install()

    async def jobs(self, concurrency: int, count: int) -> float:
        """Jobs a second."""
        entry, working = await self._worker(concurrency)
        await self.queries.enqueue([entry] * count, [b"%d" % time.monotonic_ns()] * count, [0] * count)
        return await self.worked_off(count, working)

    async def job_begins(self, count: int) -> list[float]:
        """Until a job is begun."""
        entry, work = await self._worker(10)
        working = asyncio.ensure_future(work())
        await asyncio.sleep(0.5)
        try:
            return await self.one_by_one(count, lambda due: self.queries.enqueue(entry, b"%d" % due))
        finally:
            await _end(working)

    async def _worker(self, concurrency: int) -> tuple[str, Callable[[], Awaitable[object]]]:
        import asyncpg
        from pgqueuer import AsyncpgDriver, PgQueuer

        program = PgQueuer(AsyncpgDriver(await asyncpg.connect(self.address)))
        entry = f"e{self.number()}"

        @program.entrypoint(entry)
        async def nothing(job: Any) -> None:
            self.hear(int(job.payload))

        return entry, lambda: program.run(batch_size=concurrency, max_concurrent_tasks=2 * concurrency)


# ------------------------------------------------------------------------------------------------ streams


class Redis(Contestant):
    """Redis Streams through redis-py's asyncio client."""

    async def open(self) -> None:
        """Two connections."""
        import redis.asyncio

        self.writing = redis.asyncio.Redis.from_url(self.address)
        self.reading = redis.asyncio.Redis.from_url(self.address)

    async def deliver(self, count: int) -> list[float]:
        """XADD → XREAD that waits."""
        name = f"s{self.number()}"
        await self.writing.xadd(name, {"due": 0, "body": BODY})

        async def read() -> None:
            last = "0"
            while True:
                for _, entries in await self.reading.xread({name: last}, block=10_000) or ():
                    for place, fields in entries:
                        last = place
                        if due := int(fields[b"due"]):
                            self.hear(due)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        try:
            return await self.one_by_one(count, lambda due: self.writing.xadd(name, {"due": due, "body": BODY}))
        finally:
            await _end(reading)
            await self.reading.connection_pool.disconnect()

    async def publish(self, batch: int, seconds: float) -> float:
        """Messages a second: one XADD, or a pipeline of them."""
        name = f"s{self.number()}"

        async def many() -> None:
            pipeline = self.writing.pipeline(transaction=False)
            for _ in range(batch):
                pipeline.xadd(name, {"body": BODY})
            await pipeline.execute()

        if batch == 1:
            return await self.loop(seconds, lambda: self.writing.xadd(name, {"body": BODY}))
        return batch * await self.loop(seconds, many)


class Nats(Contestant):
    """NATS JetStream in files through nats-py."""

    async def open(self) -> None:
        """Two connections."""
        import nats

        self.writing, self.reading = await nats.connect(self.address), await nats.connect(self.address)
        self.stream = self.writing.jetstream()

    async def _subject(self) -> str:
        from nats.js.api import StorageType, StreamConfig

        name = f"s{self.number()}"
        await self.stream.add_stream(StreamConfig(name=name, subjects=[name], storage=StorageType.FILE))
        return name

    async def deliver(self, count: int) -> list[float]:
        """An acknowledged publish → an ordered push consumer."""
        name = await self._subject()

        async def hear(message: Any) -> None:
            self.hear(int(message.data[:20]))

        subscription = await self.reading.jetstream().subscribe(name, ordered_consumer=True, cb=hear)
        try:
            return await self.one_by_one(count, lambda due: self.stream.publish(name, b"%020d" % due + BODY.encode()))
        finally:
            await subscription.unsubscribe()

    async def publish(self, batch: int, seconds: float) -> float:
        """Messages a second: one, or so many at once, all acknowledged."""
        name, body = await self._subject(), BODY.encode()

        async def many() -> None:
            await asyncio.gather(*(self.stream.publish(name, body, timeout=30) for _ in range(batch)))

        if batch == 1:
            return await self.loop(seconds, lambda: self.stream.publish(name, body))
        return batch * await self.loop(seconds, many)


CONTESTANTS: dict[str, type[Any]] = {
    "pgchan": Ours, "dbos": Dbos, "dbos-fast": DbosFast, "absurd": Absurd, "absurd-fast": AbsurdFast,
    "procrastinate": Procrastinate, "pgqueuer": Pgqueuer, "redis": Redis, "nats": Nats,
}  # fmt: skip


async def _serve(name: str, address: str) -> None:
    """Answer one question after the other, until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        contestant = CONTESTANTS[name](address)
        await contestant.open()
        answer(value="ready")
        while line := await lines.readline():
            question = json.loads(line)
            answer(value=await getattr(contestant, question.pop("ask"))(**question))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}"[:300])
    os._exit(0)  # nothing is closed, as if it were killed


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2]))
