"""The worker: claims runs, executes them, hands back what it cannot finish.

How it works. `run()` registers with liveness.py (the lock, its thread, the deaths of others) and then claims: at
start, when a queue is announced, when a timer is due, and once a second in any case. Each claimed run is one asyncio
task over an `Attempt`. One pump reads signals for all runs whose channel has moved, in one statement; it also learns
there that a run was cancelled or taken over, because its epoch is another one.

Long, because all that ends a run early is here.

The worker may act until `liveness.deadline`. If the database cannot be reached until then it stops its runs: somebody
else may start them soon. When it is back under the same id it returns to their queues what it held; under a new id
(it was taken for dead) there is nothing left to return.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from pgchan import codec, errors, names, sql
from pgchan.aio import AsyncClient
from pgchan.attempt import INBOX_SIGNALS_MAX, LINGER_SECONDS, Attempt, Claimed
from pgchan.blocking import BlockingRun, Threads
from pgchan.journal import describe_error
from pgchan.liveness import Liveness
from pgchan.points import point
from pgchan.steps import Run, current
from pgchan.wakeups import SWEEP_SECONDS, Pace, Watch
from pgchan.workflows import DEFAULT_QUEUE, Workflow

CLAIM_MAX = 100  # runs per claim; more in one transaction would keep others waiting
UPKEEP_SECONDS = 10.0  # how often to look for runs without code, and for what is over and can be removed
LOOK_LATER_SECONDS = 0.02  # after a claim that found something: what comes until then needs one look together
CHECK_SECONDS = 5.0  # how often to compare what is executed with what is held
DEADLINE_CHECK = 0.02  # of the lease: how late a passed deadline is noticed
FINISH_SECONDS_MAX = 1.0  # longest pause between tries to record a run's end
LOOK_BACK_SECONDS = 5.0  # to ask a new connection for the heads of all runs that are held
CUT_SHORT_SECONDS_MAX = 1.0  # longest pause before a run that cancelled itself goes back; it grows with each claim
STOPPED_SECONDS = 2.0  # after stop(), for a claim or a handing back that is under way; leaving gives back all the same
LEASE_SECONDS_MIN = 1.0  # below it a busy machine looks dead

log = logging.getLogger("pgchan")


class Worker:
    """Executes runs of these workflows from these queues. `await worker.run()` until SIGTERM, SIGINT or stop().

    concurrency: runs at a time. name: shown as RunStatus.worker; default host:pid.
    takeover_grace: seconds that a worker whose connection was cut gets to come back before its runs go to others.
    lease: seconds of silence after which the server takes this worker for dead; it stops its own runs before that.
    drain: seconds that running steps get to finish after stop(). linger: seconds that a run which only waits stays in
    memory.
    """

    def __init__(
        self, client: AsyncClient, workflows: Iterable[Workflow[Any, Any]], *,
        queues: Iterable[str] = (DEFAULT_QUEUE,), concurrency: int = 100, name: str | None = None,
        takeover_grace: float = 1.0, lease: float = 10.0, drain: float = 10.0, linger: float = LINGER_SECONDS,
    ) -> None:  # fmt: skip
        self.client = client
        self.workflows = _by_name(workflows)
        self.queues = _queues(queues)
        self.concurrency = names.check_integer(concurrency, "concurrency", 1, 10_000)
        self.name = names.check_label(name if name is not None else f"{socket.gethostname()}:{os.getpid()}", "name")
        self._grace = names.check_seconds(takeover_grace, "takeover_grace")
        self._lease = names.check_seconds(lease, "lease", LEASE_SECONDS_MIN)
        self._drain = names.check_seconds(drain, "drain")
        self._linger = names.check_seconds(linger, "linger")
        self.id = 0
        self._held: dict[int, Attempt] = {}
        self._dirty: set[int] = set()
        self._claims = Pace()
        self._inboxes = Pace()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = asyncio.Event()
        self._check_due = 0.0  # time.monotonic() at which to compare with what the database says
        self._claim_soon = asyncio.Event()
        self._look_due: float | None = None  # time.monotonic() of a look that was put off
        self._is_full = True  # there may be runs that there was no room for
        self._inbox_soon = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Future[None] | None = None
        self._warned: set[str] = set()
        self._threads = Threads()
        self._started = asyncio.Event()

    @property
    def running(self) -> int:
        """How many runs this worker executes now."""
        return len(self._held)

    async def wait_started(self) -> None:
        """Until the worker is registered and claims runs."""
        await self._started.wait()

    def stop(self) -> None:
        """Let run() end: no more claims, running steps get `drain` seconds, the rest goes back. From any thread."""
        if self._loop is None:
            self._stopped.set()  # run() will end as it begins
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)

    @property
    def _stopping(self) -> bool:
        return self._stopped.is_set()

    def _stop(self) -> None:
        self._stopped.set()
        if self._opening is not None:
            self._opening.cancel()
        self._claim_soon.set()

    # -- the life of the worker

    async def run(self, *, signals: bool = True) -> None:
        """Execute runs until stopped. signals: end at SIGTERM and SIGINT (in the main thread only).

        Raises UnsafeDeployment, SchemaMismatch, Unavailable at the start.
        """
        loop = self._loop = asyncio.get_running_loop()
        handlers = self._handle_signals(loop) if signals else []  # first: nothing below may be left half done
        try:
            if not await self._opened():
                return
            liveness = Liveness(
                self.client.control_dsn, name=self.name, lease=self._lease, grace=self._grace,
                on_held=self._from_thread(self._on_held), on_lost=self._from_thread(self._on_lost),
                on_superseded=self._from_thread(self._on_superseded), on_reaped=self._from_thread(self._on_reaped),
            )  # fmt: skip
            self.id = await asyncio.to_thread(liveness.start)
            try:
                await self._run(liveness)
            finally:
                await asyncio.to_thread(liveness.stop)
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def _opened(self) -> bool:
        """Connect; False if the worker was stopped before that was done."""
        # The listener refuses a transaction pooler, before a lock is taken that would hold nothing.
        self._opening = asyncio.ensure_future(self.client._use().listener.start())
        try:
            await self._opening
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            return False
        return True

    async def _run(self, liveness: Liveness) -> None:
        db = self.client._use()
        db.writer.on_written = self._on_written
        db.look_backs.append(self._look_back)
        numbers = await db.fetch(sql.QUEUE_NUMBERS, list(self.queues))
        for _, number in numbers:
            db.listener.hub.on_queue(number, self._claim_soon.set)
        background = [
            asyncio.create_task(self._forever(self._pump_inbox), name="pgchan inbox"),
            asyncio.create_task(self._forever(self._upkeep), name="pgchan upkeep"),
            asyncio.create_task(self._forever(lambda: self._keep_deadline(liveness)), name="pgchan deadline"),
        ]
        log.info("worker %s (%d) claims from %s", self.name, self.id, ", ".join(self.queues))
        self._started.set()
        try:
            with contextlib.suppress(TimeoutError):
                await self._until_stopped(self._claim_forever(liveness))
            await self._finish_running()
        finally:
            for task in background:
                task.cancel()
            for attempt in list(self._held.values()):
                attempt.end("stopped")
            await asyncio.gather(*background, *self._tasks, return_exceptions=True)
            for _, number in numbers:
                db.listener.hub.off_queue(number, self._claim_soon.set)
            db.writer.on_written = None
            db.look_backs.remove(self._look_back)
            self._started.clear()

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> list[signal.Signals]:
        handled = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread, or Windows
                loop.add_signal_handler(number, self._stop)
                handled.append(number)
        return handled

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it; after stop() it has STOPPED_SECONDS left, for the database may be away. Raises TimeoutError then."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait_for(asyncio.shield(task), STOPPED_SECONDS if self._stopping else None)
        finally:
            stopped.cancel()
            task.cancel()
            await asyncio.gather(stopped, task, return_exceptions=True)

    async def _finish_running(self) -> None:
        """Drain: steps that are under way may finish; what only waits goes back at once."""
        until = time.monotonic() + self._drain
        for attempt in self._held.values():
            attempt.draining = True
        while time.monotonic() < until:
            for attempt in list(self._held.values()):
                if not attempt.busy:
                    attempt.end("stopped")
            if not self._held:
                return
            await asyncio.sleep(0.02)

    async def _forever(self, once: Callable[[], Any]) -> None:
        while True:
            try:
                await once()
            except errors.Error as error:
                log.warning("worker %s: %s", self.name, error)
                await asyncio.sleep(SWEEP_SECONDS)
            except Exception:
                log.exception("worker %s", self.name)
                await asyncio.sleep(SWEEP_SECONDS)

    async def _upkeep(self) -> None:
        db = self.client._use()
        for workflow, count in await db.fetch(sql.UNKNOWN_WORKFLOWS, list(self.queues), list(self.workflows)):
            if workflow not in self._warned:
                self._warned.add(workflow)
                log.warning(
                    "%d run(s) of workflow %r are ready, but worker %s has no such workflow; they stay in their queue",
                    count, workflow, self.name,
                )  # fmt: skip
        more = True
        while more:
            began = time.monotonic()
            _, _, more = await db.call(sql.UPKEEP)  # None: another worker is at it
            point("upkept")
            await asyncio.sleep(time.monotonic() - began)  # a long backlog takes half of the time of one connection
        await asyncio.sleep(UPKEEP_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - not all at the same time

    # -- liveness tells

    def _from_thread(self, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(callback, *args)

        return call

    def _on_held(self, id: int, again: bool) -> None:
        self.id = id
        if again:  # the server may have lost what it had promised: ask which runs are still ours
            self._check_due = 0.0
            self._claim_soon.set()

    def _on_lost(self, reason: str) -> None:
        log.info("worker %s lost its lock connection; taking the lock back", self.name)

    def _on_superseded(self, id: int) -> None:
        log.warning("worker %s was taken for dead; it goes on as %d, without the runs it had", self.name, id)
        self.id = id
        for attempt in list(self._held.values()):
            attempt.end("fenced")
        self._claim_soon.set()

    def _on_reaped(self, id: int, runs: int) -> None:
        log.info("worker %d is dead; %d of its runs are back in their queues", id, runs)
        self._claim_soon.set()

    async def _check_held(self) -> None:
        """Make what this worker executes and what the database says it holds the same.

        Called by the claiming task only, so no claim is under way: a run that is held and not executed was claimed by
        a statement whose answer was lost.
        """
        held = {row[0]: row[1] for row in await self.client._use().fetch(sql.HELD, self.id)}
        for channel_id, attempt in list(self._held.items()):
            if held.get(channel_id) != attempt.claimed.epoch:
                attempt.end("fenced")
        if strangers := [channel_id for channel_id in held if channel_id not in self._held]:
            await self.client._use().call(sql.RELEASE, self.id, strangers)
        self._check_due = time.monotonic() + CHECK_SECONDS

    async def _look_back(self, connection: Any) -> set[int]:
        """Stop the runs of which the server behind a new connection has less than they wrote or read: a failover lost
        it. They go back, and begin again from what their journals hold. Returns the owners that must not write."""
        reached = {id: head for attempt in self._held.values() for id, head in attempt.reached().items()}
        if not reached:
            return set()
        rows = await connection.fetch(sql.SWEEP, list(reached), timeout=LOOK_BACK_SECONDS)
        lost = {id for id, head, *_ in rows if (head or 0) < reached[id]}
        owners = set()
        for attempt in list(self._held.values()):
            if not lost.isdisjoint((attempt.claimed.channel_id, attempt.claimed.journal_id)):
                if attempt.over is None:
                    log.warning("run %s goes back: a failover lost some of what it had written", attempt.claimed.run)
                attempt.end("unavailable")
                owners.add(attempt.claimed.journal_id)
        return owners

    async def _keep_deadline(self, liveness: Liveness) -> None:
        """Stop all runs when this worker may no longer act. A task of its own: claiming may be waiting meanwhile."""
        await asyncio.sleep(self._lease * DEADLINE_CHECK)
        if not liveness.alive and self._held:
            self._check_due = 0.0
            running = [attempt for attempt in self._held.values() if attempt.over is None]
            if running:
                log.warning("worker %s cannot reach the database; it stops its %d runs", self.name, len(running))
            for attempt in running:
                attempt.end("unavailable")

    # -- claiming

    async def _claim_forever(self, liveness: Liveness) -> None:
        while not self._stopping:
            await self._claim_loop(liveness)

    async def _claim_loop(self, liveness: Liveness) -> None:
        if pause := self._claims.pause(time.monotonic()):
            await asyncio.sleep(pause)
        hinted = self._claim_soon.is_set()
        self._claim_soon.clear()
        if liveness.alive:
            try:
                if time.monotonic() >= self._check_due:
                    await self._check_held()
                claimed = await self._claim_all() if hinted or self._is_full else 0
                seconds = self._may_look_later(claimed)
                if not seconds:
                    is_ready, seconds = await self._look()
                    if is_ready and not hinted:
                        await self._claim_all()  # a wakeup was lost, or a timer is due
            except errors.Error as error:
                log.warning("worker %s cannot claim: %s", self.name, error)
                seconds = SWEEP_SECONDS
        else:
            seconds = SWEEP_SECONDS / 4
        if not self._stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.005, seconds)):
                    await self._claim_soon.wait()

    def _may_look_later(self, claimed: int) -> float:
        """For how long the next look may wait. A claim took what was ready; a look would only tell of timers, which are
        rarely due within a moment, and the next hint may be there before."""
        now = time.monotonic()
        if claimed and self._look_due is None:
            self._look_due = now + LOOK_LATER_SECONDS
        if not claimed or self._look_due is None or now >= self._look_due:
            self._look_due = None
            return 0.0
        return self._look_due - now

    async def _claim_all(self) -> int:
        """Take what is ready, as far as there is room; how many."""
        self._is_full = True
        total = 0
        while not self._stopping and (room := min(CLAIM_MAX, self.concurrency - len(self._held))) > 0:
            claimed = await self._claim(room)
            total += claimed
            self._claims.looked(claimed > 0, time.monotonic())
            if claimed < room:
                self._is_full = False
                break
        return total

    async def _look(self) -> tuple[bool, float]:
        """Whether a run is ready, or due, for this worker, and when to look again. Locks and writes nothing."""
        if self._is_full:
            return False, SWEEP_SECONDS
        ((is_ready, timer),) = await self.client._use().fetch(sql.READY, list(self.queues), list(self.workflows))
        seconds = SWEEP_SECONDS if timer is None else min(SWEEP_SECONDS, float(timer))
        return is_ready or seconds <= 0, seconds

    async def _claim(self, most: int) -> int:
        db = self.client._use()
        try:
            rows = await db.fetch_claims(sql.CLAIM, self.id, list(self.queues), list(self.workflows), most)
        except errors.Indefinite:
            self._check_due = 0.0  # what may have been claimed goes back
            raise
        for row in rows:
            self._begin(Claimed(*row))
        point("claimed")
        return len(rows)

    def _begin(self, claimed: Claimed) -> None:
        db = self.client._use()
        attempt = Attempt(db, claimed, self.workflows[claimed.workflow], self._linger)
        attempt.watch = Watch(claimed.channel_id, claimed.head, lambda: self._mark(claimed.channel_id))
        self._held[claimed.channel_id] = attempt
        db.listener.hub.watch(attempt.watch)
        attempt.task = self._spawn(self._execute(attempt))

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- signals and other news of held runs

    def _mark(self, channel_id: int) -> None:
        self._dirty.add(channel_id)
        self._inbox_soon.set()

    def _on_written(self, channel_id: int, before: int, after: int) -> None:
        # What this process wrote itself is no news, as long as nobody else's message lies between.
        attempt = self._held.get(channel_id)
        if attempt is not None and attempt.watch is not None and attempt.watch.known >= before:
            attempt.watch.known = max(attempt.watch.known, after)

    async def _pump_inbox(self) -> None:
        await self._inbox_soon.wait()
        if pause := self._inboxes.pause(time.monotonic()):
            await asyncio.sleep(pause)
        self._inbox_soon.clear()
        dirty, self._dirty = self._dirty, set()
        attempts = [self._held[id] for id in dirty if id in self._held]
        if not attempts:
            return
        try:
            rows = await self.client._use().fetch(
                sql.INBOX, [a.claimed.channel_id for a in attempts], [a.seen for a in attempts],
                [INBOX_SIGNALS_MAX] * len(attempts),
            )  # fmt: skip
        except BaseException:
            self._dirty |= dirty
            self._inbox_soon.set()
            raise
        by_channel: dict[int, list[Any]] = {}
        for row in rows:
            by_channel.setdefault(row[0], []).append(row)
        self._inboxes.looked(any(_is_news(attempt, by_channel) for attempt in attempts), time.monotonic())
        for attempt in attempts:
            found = by_channel.get(attempt.claimed.channel_id, [])
            if found and attempt.watch is not None:
                attempt.watch.known = max(attempt.watch.known, found[0][2] or 0)
            if attempt.over is None:
                attempt.take_in(found)
            if len(found) == INBOX_SIGNALS_MAX:
                self._mark(attempt.claimed.channel_id)  # there may be more

    # -- executing

    async def _execute(self, attempt: Attempt) -> None:
        claimed = attempt.claimed
        deadline: asyncio.TimerHandle | None = None
        try:
            if claimed.deadline is not None:
                left = attempt.seconds_until(claimed.deadline)
                deadline = asyncio.get_running_loop().call_later(max(0.0, left), attempt.end, "deadline")
            await attempt.load()
            value = await self._call(attempt)
            await self._succeed(attempt, value)
        except (errors.Unavailable, errors.Indefinite) as error:
            log.warning("run %s goes back to its queue: %s", claimed.run, error)
            attempt.end("unavailable")
        except (errors.SchemaMismatch, errors.UnsafeDeployment) as error:
            await self._cut_short(attempt, error)  # between this code and the database; the run has done nothing wrong
        except Exception as error:
            if attempt.over is None:
                await self._fail(attempt, error)
            elif attempt.over == "deadline":  # raised by code that caught the cancellation
                await self._cut_short(attempt, error)
        except BaseException as error:
            await self._cut_short(attempt, error)
        finally:
            if deadline is not None:
                deadline.cancel()
            await self._release(attempt)
            if attempt.watch is not None:
                self.client._db.listener.hub.unwatch(attempt.watch)
            # This worker may have claimed the run again meanwhile; then the place is that attempt's.
            if self._held.get(claimed.channel_id) is attempt:
                del self._held[claimed.channel_id]
                attempt.forget()
            if attempt.over != "finished" or self._is_full:
                self._claim_soon.set()

    async def _call(self, attempt: Attempt) -> Any:
        loop = asyncio.get_running_loop()
        run = Run(attempt, self._threads)
        blocking = run._in_threads = BlockingRun(run, loop)
        given = codec.decode(attempt.claimed.input)
        bound = attempt.workflow.bind(given["args"], given["kwargs"])
        current.set(run)
        if attempt.workflow.is_async:
            return await attempt.workflow.fn(run, *bound.args, **bound.kwargs)
        current.set(blocking)
        context = contextvars.copy_context()
        return await loop.run_in_executor(
            self._threads, lambda: context.run(attempt.workflow.fn, blocking, *bound.args, **bound.kwargs)
        )

    async def _succeed(self, attempt: Attempt, value: Any) -> None:
        attempt.check()
        if missing := attempt.journal.unreached():
            raise errors.StepMismatch(
                f"the journal holds {missing[0]!r}, which the workflow no longer reaches; give it back its step of "
                f"that name and resume the run, or start a new one",
                step=missing[0],
            )
        body = codec.encode(value, "the result")
        await attempt.flushed()
        await self._finish(attempt, "succeeded", body, None)

    async def _fail(self, attempt: Attempt, error: BaseException) -> None:
        log.warning("run %s failed", attempt.claimed.run, exc_info=error)
        with contextlib.suppress(errors.Error):
            await attempt.flushed()
        if attempt.over is None or attempt.over == "deadline":
            await self._finish(attempt, "failed", None, codec.encode(describe_error(error)))

    async def _finish(self, attempt: Attempt, state: str, result: bytes | None, error: bytes | None) -> None:
        """Record the run's end. A repeat after a lost answer finds itself fenced by the first."""
        if attempt.watch is not None:
            self.client._db.listener.hub.unwatch(attempt.watch)  # its own end is no news, and signals come too late
        tries = 0
        while attempt.over is None or attempt.over == "deadline":
            try:
                await self.client._db.call(
                    sql.FINISH, attempt.claimed.channel_id, attempt.claimed.epoch, state, result, error
                )
                break
            except (errors.Unavailable, errors.Indefinite):
                if self._stopping:
                    return  # what is not recorded goes back as this worker leaves, and ends elsewhere
                tries += 1
                await asyncio.sleep(min(FINISH_SECONDS_MAX, 0.05 * tries))
        if attempt.over is None:
            attempt.over = "finished"

    async def _cut_short(self, attempt: Attempt, error: BaseException) -> None:
        """The task was cancelled: by `end`, by this worker's own end, or by something in the user's code."""
        task = asyncio.current_task()
        if task is not None:
            while task.cancelling():
                task.uncancel()
        if attempt.over == "deadline":
            log.info("run %s passed its deadline", attempt.claimed.run)
            await self._fail(attempt, TimeoutError(f"the run did not end before {attempt.claimed.deadline}"))
        elif attempt.over is None:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            log.warning("run %s was cut short by %s; it goes back", attempt.claimed.run, said)
            attempt.over = "cut short"
            await asyncio.sleep(min(CUT_SHORT_SECONDS_MAX, 0.01 * attempt.claimed.number))  # it may be cut short again

    async def _release(self, attempt: Attempt) -> None:
        """Return the run to its queue if this worker still owns it and will not go on with it."""
        if attempt.over in ("stopped", "cut short", "unavailable"):
            try:
                await self._until_stopped(self._hand_back(attempt))
            except (errors.Error, TimeoutError) as error:
                # When the lock is held again _check_held returns it; if this worker dies, its reaper does.
                log.warning("run %s could not be handed back: %s", attempt.claimed.run, str(error) or "no answer")

    async def _hand_back(self, attempt: Attempt) -> None:
        if attempt.over == "stopped":
            with contextlib.suppress(errors.Error):
                await attempt.flushed()  # what it said last must not be fenced out by its own release
        await self.client._db.call(sql.RELEASE, self.id, [attempt.claimed.channel_id])


def _is_news(attempt: Attempt, rows: dict[int, list[Any]]) -> bool:
    """Whether rows of sql.INBOX say anything that this attempt has not heard of."""
    _, epoch, head, closed, *_ = rows.get(attempt.claimed.channel_id, [(None,) * 4])[0]
    known = attempt.watch.known if attempt.watch is not None else 0
    return bool(epoch != attempt.claimed.epoch or closed or head > known)


def _by_name(workflows: Iterable[Workflow[Any, Any]]) -> dict[str, Workflow[Any, Any]]:
    found: dict[str, Workflow[Any, Any]] = {}
    for workflow in workflows:
        if not isinstance(workflow, Workflow):
            raise errors.InvalidInput(f"a worker takes functions decorated with @pgchan.workflow, not {workflow!r:.80}")
        if workflow.name in found:
            raise errors.InvalidInput(f"two workflows are named {workflow.name!r}; give one another name=")
        found[workflow.name] = workflow
    return found


def _queues(queues: Iterable[str]) -> tuple[str, ...]:
    if isinstance(queues, str):
        raise errors.InvalidInput(f"queues must be a list of names; write queues=[{queues!r}]")
    found = tuple(dict.fromkeys(names.check_label(queue, "queue") for queue in queues))
    if not found:
        raise errors.InvalidInput("a worker needs at least one queue")
    return found
