"""What a workflow can rely on: steps, output, signals, sleep, transactions, children, chance; recorded once.

A run is interrupted here by stopping its worker or by a failure; what faults do to it is in test_takeover.py. Long: it
is the specification.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from doors import query
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from workers import Workers

import pgchan
from pgchan import attempt, errors, points, worker

NOW = pgchan.Retry(attempts=3, delay=0)


class Steps:
    """Counts what is executed, and holds it up where a test says so."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()

    async def note(self, what: Any) -> Any:
        self.calls.append(what)
        return what

    async def wait(self, what: Any = "wait") -> Any:
        self.calls.append(what)
        self.reached.set()
        await self.gate.wait()
        return what

    def fail(self, times: int, error: BaseException) -> Callable[[], Any]:
        """A step that fails so often and then returns how often it was called."""

        async def flaky() -> int:
            self.calls.append("flaky")
            if self.calls.count("flaky") <= times:
                raise error
            return self.calls.count("flaky")

        return flaky


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


@pytest.fixture
def execute(client: pgchan.AsyncClient, workers: Workers) -> Callable[..., Any]:
    """Start a worker with this workflow and a run of it."""

    async def start(fn: Callable[..., Any], *args: Any, **options: Any) -> pgchan.AsyncRunHandle:
        workflow = fn if isinstance(fn, pgchan.Workflow) else pgchan.workflow(fn)
        await workers.start(workflow, **options)
        return await client.start(workflow, *args)

    return start


@pytest.fixture
def moves(client: pgchan.AsyncClient, workers: Workers) -> Callable[..., Any]:
    """Stop this worker, which hands its runs back, and start another with the same code."""

    async def move(worker_of: Callable[..., Any], **options: Any) -> None:
        (_, executing, _) = workers._all[0]
        await workers.stop(executing)
        await workers.start(pgchan.workflow(worker_of), **options)

    return move


async def said(handle: pgchan.AsyncRunHandle, view: str = "final") -> list[Any]:
    return [m.body for m in await handle.channel.read(view=view, limit=1000) if m.kind == "message"]


async def controls(handle: pgchan.AsyncRunHandle, kind: str) -> list[Any]:
    return [m.body for m in await handle.channel.read(limit=1000) if m.kind == "control" and m.body["type"] == kind]


async def keys(handle: pgchan.AsyncRunHandle) -> list[Any]:
    return [m.key for m in await handle.journal()]


@pytest.fixture
def reaches(wait_until: Callable[..., Any]) -> Callable[..., Any]:
    async def wait(handle: Any, state: str) -> None:
        async def is_there() -> bool:
            return bool((await handle.status()).state == state)

        await wait_until(is_there)

    return wait


# ------------------------------------------------------------------------------------------------ recorded once


async def test_recorded_steps_are_not_executed_again(steps: Steps, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> list[Any]:
        return [await run.step(steps.note, "a"), await run.step(steps.wait), await run.step(steps.note, "b")]

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    assert await handle.result(10) == ["a", "wait", "b"]
    assert steps.calls.count("a") == 1
    assert await keys(handle) == ["note", "wait", "note#2"]


async def test_a_step_is_named_after_its_function_and_numbered(steps: Steps, execute: Any) -> None:
    class Callable:
        def __call__(self) -> int:
            return 1

    @pgchan.step(name="declared")
    async def other() -> int:
        return 2

    async def flow(run: pgchan.Run) -> None:
        await run.step(steps.note, 1)
        await run.step(steps.note, 2)
        await run.step(steps.note, 3, name="mine")
        await run.step(steps.note, 4, name="mine")
        await run.step(lambda: 5)
        await run.step(Callable())
        await run.step(other)

    handle = await execute(flow)
    await handle.result(10)
    assert await keys(handle) == ["note", "note#2", "mine", "mine#2", "step", "Callable", "declared"]


async def test_a_result_comes_back_as_json_gives_it(execute: Any) -> None:
    async def flow(run: pgchan.Run) -> list[Any]:
        return [type(await run.step(lambda: (1, 2))).__name__, await run.step(dict)]

    assert await (await execute(flow)).result(10) == ["list", {}]


@pytest.mark.parametrize("name", ["", "a#1", "pgchan:x", "x" * 181, "a\nb", 7], ids=repr)
async def test_an_illegal_step_name_is_refused(name: Any, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> str:
        with pytest.raises(errors.InvalidInput):
            await run.step(dict, name=name)
        return "refused"

    assert await (await execute(flow)).result(10) == "refused"


async def test_one_name_for_two_functions_is_a_mismatch_that_names_both(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.step(steps.note, 1, name="same")
        await run.step(steps.wait, name="same")

    with pytest.raises(errors.RunFailed, match=r"StepMismatch.*'same'.*Steps\.note.*Steps\.wait"):
        await (await execute(flow)).result(10)


async def test_one_name_twice_at_once_is_a_mismatch(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await asyncio.gather(run.step(steps.note, 1, name="same"), run.step(steps.note, 2, name="same"))

    with pytest.raises(errors.RunFailed, match="StepMismatch: two steps named 'same' run at once"):
        await (await execute(flow)).result(10)


async def test_code_that_lost_a_recorded_step_is_told_which(
    steps: Steps, client: pgchan.AsyncClient, workers: Workers
) -> None:
    @pgchan.workflow(name="flow")
    async def old(run: pgchan.Run) -> None:
        await run.step(steps.note, 1, name="charge")
        await run.step(steps.wait)

    @pgchan.workflow(name="flow")
    async def new(run: pgchan.Run) -> None:
        await run.step(steps.note, 1, name="bill")

    first = await workers.start(old, drain=0)
    handle = await client.start(old)
    await steps.reached.wait()
    await workers.stop(first)
    await workers.start(new)
    with pytest.raises(errors.RunFailed, match="StepMismatch: the journal holds 'charge'"):
        await handle.result(10)


async def test_code_may_gain_a_step_while_a_run_is_under_way(
    steps: Steps, client: pgchan.AsyncClient, workers: Workers
) -> None:
    @pgchan.workflow(name="flow")
    async def old(run: pgchan.Run) -> None:
        await run.step(steps.note, "a", name="a")
        await run.step(steps.wait)

    @pgchan.workflow(name="flow")
    async def new(run: pgchan.Run) -> None:
        await run.step(steps.note, "new", name="new")
        await run.step(steps.note, "a", name="a")
        await run.step(steps.wait)

    first = await workers.start(old, drain=0)
    handle = await client.start(old)
    await steps.reached.wait()
    steps.gate.set()
    await workers.stop(first)
    await workers.start(new)
    await handle.result(10)
    assert steps.calls.count("a") == 1 and "new" in steps.calls


async def test_a_step_within_a_step_is_refused(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> str:
        async def outer() -> None:
            await run.step(steps.note, 1)

        with pytest.raises(errors.InvalidInput, match="a step cannot hold another step"):
            await run.step(outer)
        return "refused"

    assert await (await execute(flow)).result(10) == "refused"
    assert steps.calls == []


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, float("nan"), "\ud800", "x" * (1 << 20)], ids=lambda value: type(value).__name__
)  # fmt: skip
async def test_a_step_whose_result_cannot_be_stored_has_failed(value: Any, execute: Any) -> None:
    async def wrong() -> Any:
        return [value]

    async def flow(run: pgchan.Run) -> None:
        await run.step(wrong, retry=NOW)

    handle = await execute(flow)
    with pytest.raises(errors.RunFailed, match="InvalidInput: the result of step 'wrong'"):
        await handle.result(10)
    assert await keys(handle) == []


async def test_steps_in_parallel_are_recorded_each(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        both = asyncio.Barrier(2)

        async def meet(n: int) -> int:
            await both.wait()
            return n

        return await asyncio.gather(*(run.step(meet, n, name=f"s{n}") for n in range(2)))

    handle = await execute(flow)
    assert await handle.result(10) == [0, 1]
    assert sorted(await keys(handle)) == ["s0", "s1"]


async def test_a_step_that_cancels_itself_is_not_recorded_and_the_run_goes_back(steps: Steps, execute: Any) -> None:
    async def cancels() -> str:
        steps.calls.append("cancels")
        if len(steps.calls) == 1:
            raise asyncio.CancelledError
        return "done"

    async def flow(run: pgchan.Run) -> Any:
        return await run.step(cancels)

    handle = await execute(flow)
    assert await handle.result(10) == "done"
    assert (await handle.status()).attempt == 2


async def test_a_run_that_is_used_after_it_has_ended_is_fenced(execute: Any) -> None:
    kept: list[pgchan.Run] = []

    async def flow(run: pgchan.Run) -> None:
        kept.append(run)

    await (await execute(flow)).result(10)
    uses: list[Any] = [kept[0].publish("late"), kept[0].step(dict), kept[0].receive()]
    for use in uses:
        with pytest.raises(errors.Fenced):
            await use


# ------------------------------------------------------------------------------------------------ retry


async def test_a_failing_step_is_tried_again_and_the_run_is_not(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        return await run.step(steps.fail(2, OSError("no")), retry=NOW)

    handle = await execute(flow)
    assert await handle.result(10) == 3
    assert (await handle.status()).attempt == 1


async def test_the_last_failure_is_raised_and_recorded(steps: Steps, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> str:
        try:
            await run.step(steps.fail(9, OSError("no")), retry=NOW)
        except OSError as error:
            caught = f"{type(error).__name__}"
        except pgchan.StepFailed as error:
            caught = f"{type(error).__name__} {error.step} {error.type} {error.message}"
        steps.calls.append(caught)
        await run.step(steps.wait)
        return caught

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    assert await handle.result(10) == "StepFailed flaky OSError no"
    assert steps.calls.count("flaky") == 3 and "OSError" in steps.calls


async def test_retries_back_off(execute: Any) -> None:
    times: list[float] = []

    async def flow(run: pgchan.Run) -> None:
        def flaky() -> None:
            times.append(time.monotonic())
            assert len(times) == 4

        await run.step(flaky, retry=pgchan.Retry(attempts=4, delay=0.05, backoff=3, max_delay=0.2))

    await (await execute(flow)).result(10)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for pause, least in zip(pauses, (0.05, 0.15, 0.2), strict=True):
        assert least <= pause < least + 0.5


async def test_only_the_named_errors_are_tried_again(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.step(steps.fail(9, ValueError("no")), retry=pgchan.Retry(attempts=3, delay=0, only=OSError))

    with pytest.raises(errors.RunFailed, match="ValueError: no"):
        await (await execute(flow)).result(10)
    assert steps.calls == ["flaky"]


async def test_fatal_ends_the_tries(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.step(steps.fail(9, pgchan.Fatal("bad card")), retry=NOW)

    with pytest.raises(errors.RunFailed, match="Fatal: bad card"):
        await (await execute(flow)).result(10)
    assert steps.calls == ["flaky"]


async def test_retry_after_says_when_to_try_again(execute: Any) -> None:
    times: list[float] = []

    async def flow(run: pgchan.Run) -> None:
        def limited() -> None:
            times.append(time.monotonic())
            if len(times) == 1:
                raise pgchan.RetryAfter(0.2)

        await run.step(limited)

    await (await execute(flow)).result(10)
    assert 0.2 <= times[1] - times[0] < 1.5


async def test_a_step_takes_the_retry_of_its_declaration_then_of_the_workflow(steps: Steps, execute: Any) -> None:
    @pgchan.workflow(retry=pgchan.Retry(attempts=2, delay=0))
    async def flow(run: pgchan.Run) -> list[Any]:
        declared = pgchan.step(retry=NOW, name="declared")(steps.fail(2, OSError()))
        found = [await run.step(declared)]
        steps.calls.clear()
        return [*found, await run.step(steps.fail(1, OSError()))]

    assert await (await execute(flow)).result(10) == [3, 2]


async def test_a_step_that_takes_too_long_has_failed(execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.step(asyncio.Event().wait, name="hang", timeout=0.1)

    with pytest.raises(errors.RunFailed, match="TimeoutError"):
        await (await execute(flow)).result(10)


async def test_tries_count_on_in_another_worker(steps: Steps, execute: Any, moves: Any, wait_until: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        return await run.step(steps.fail(2, OSError()), retry=pgchan.Retry(attempts=3, delay=0.5, backoff=1))

    handle = await execute(flow)
    await wait_until(lambda: steps.calls)
    await moves(flow)
    assert await handle.result(10) == 3


# ------------------------------------------------------------------------------------------------ output


async def test_output_of_a_step_names_the_step_and_the_try(steps: Steps, execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        steps.calls.append(await run.publish({"try": len(steps.calls)}))
        if len(steps.calls) == 1:
            raise OSError

    async def flow(run: pgchan.Run) -> None:
        steps.calls.clear()
        await run.step(speak, run, retry=NOW)
        await run.publish("outside")

    handle = await execute(flow)
    await handle.result(10)
    raw = [m for m in await handle.channel.read(view="raw") if m.kind == "message"]
    assert [(m.step, m.attempt, m.body) for m in raw] == [
        ("speak", 1, {"try": 0}), ("speak", 2, {"try": 1}), (None, None, "outside"),
    ]  # fmt: skip
    assert raw[:2] == steps.calls


async def test_output_of_a_failed_try_is_void(steps: Steps, execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        for n in range(3):
            await run.publish(n, wait=False)
        steps.calls.append("speak")
        assert len(steps.calls) == 3

    async def flow(run: pgchan.Run) -> None:
        await run.publish("before")
        await run.step(speak, run, retry=NOW)

    handle = await execute(flow)
    await handle.result(10)
    assert await said(handle) == ["before", 0, 1, 2]
    assert await said(handle, "raw") == ["before", *[0, 1, 2] * 3]
    resets = await controls(handle, "reset")
    assert [(body["step"], body["attempt"]) for body in resets] == [("speak", 2), ("speak", 3)]


async def test_output_of_a_failed_try_is_void_also_if_the_next_one_says_nothing(steps: Steps, execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        steps.calls.append("speak")
        if len(steps.calls) == 1:
            await run.publish("half a")
            raise OSError

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run, retry=NOW)

    handle = await execute(flow)
    await handle.result(10)
    assert await said(handle) == []
    assert await said(handle, "raw") == ["half a"]


async def test_a_try_may_carry_on_from_what_earlier_ones_said(steps: Steps, execute: Any, moves: Any) -> None:
    async def speak(run: pgchan.Run) -> int:
        earlier = [m.body for m in run.previous()]
        steps.calls.append(earlier)
        for n in range(len(earlier), 6):
            await run.publish(n)
            if n in (1, 3):
                if n == 3:
                    await steps.wait()
                raise OSError
        return len(earlier)

    async def flow(run: pgchan.Run) -> Any:
        return await run.step(speak, run, retry=NOW)

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    await moves(flow)
    assert await handle.result(10) == 4
    assert steps.calls == [[], [0, 1], "wait", [0, 1, 2, 3]]
    assert await said(handle) == [0, 1, 2, 3, 4, 5]
    assert await controls(handle, "reset") == []


async def test_previous_comes_before_the_first_word(steps: Steps, execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        await run.publish("a")
        with pytest.raises(errors.InvalidInput, match=r"before the step publishes"):
            run.previous()

    async def flow(run: pgchan.Run) -> None:
        with pytest.raises(errors.InvalidInput, match="belongs within a step"):
            run.previous()
        await run.step(speak, run)

    await (await execute(flow)).result(10)


async def test_output_is_stored_with_the_result_at_the_latest(steps: Steps, execute: Any, dsn: str) -> None:
    async def speak(run: pgchan.Run) -> None:
        for n in range(2500):  # more than a batch holds
            assert await run.publish(n, wait=False) is None

    async def look() -> int:
        return int(query(dsn, "select count(*) from pgchan.messages where step = 'speak' and kind = 0")[0][0])

    async def flow(run: pgchan.Run) -> Any:
        await run.step(speak, run)
        return await run.step(look)

    assert await (await execute(flow)).result(10) == 2501  # and the record


async def test_a_message_outside_of_steps_is_published_once(steps: Steps, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.publish("a")
        await run.publish("b", wait=False)
        await run.step(steps.wait)
        await run.publish("a")

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    await handle.result(10)
    assert await said(handle, "raw") == ["a", "b", "a"]


async def test_what_is_not_json_is_not_published(execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        with pytest.raises(errors.InvalidInput):
            await run.publish(object())
        with pytest.raises(errors.InvalidInput):
            await run.publish(float("inf"), wait=False)

    handle = await execute(flow)
    await handle.result(10)
    assert await said(handle) == []


# ------------------------------------------------------------------------------------------------ signals


async def test_signals_are_received_in_order_and_once(steps: Steps, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> list[Any]:
        got = [(await run.receive()).body for _ in range(2)]  # type: ignore[union-attr]
        await run.step(steps.wait)
        return [*got, (await run.receive()).body]  # type: ignore[union-attr]

    handle = await execute(flow, drain=0)
    for n in range(3):
        await handle.signal(n)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    assert await handle.result(10) == [0, 1, 2]
    consumed = await controls(handle, "consumed")
    assert [(body["signal"], body["step"]) for body in consumed] == [
        (1, "receive"), (2, "receive#2"), (3, "receive#3"),
    ]  # fmt: skip


async def test_receive_gives_up_after_its_timeout(execute: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        began = time.monotonic()
        none = await run.receive(timeout=0.2)
        return [none, 0.2 <= time.monotonic() - began < 1.5, await run.receive(timeout=0)]

    handle = await execute(flow)
    assert await handle.result(10) == [None, True, None]
    assert [m.body for m in await handle.journal()] == [None, None]


async def test_a_timeout_goes_on_in_another_worker(execute: Any, moves: Any, reaches: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        return await run.receive(timeout=1.0)

    handle = await execute(flow)
    began = time.monotonic()
    await reaches(handle, "running")
    await moves(flow)
    assert await handle.result(10) is None
    assert time.monotonic() - began < 2.5


async def test_signals_of_a_step_are_consumed_with_its_result(steps: Steps, execute: Any) -> None:
    async def listen(run: pgchan.Run) -> list[Any]:
        got = []
        async for signal in run.signals():
            got.append(signal.body)
            if signal.body == "end":
                await steps.wait()
                break
        return got

    async def flow(run: pgchan.Run) -> Any:
        return await run.step(listen, run)

    handle = await execute(flow)
    for body in ("a", "b", "end", "too late"):
        await handle.signal(body)
    await steps.reached.wait()
    assert await controls(handle, "consumed") == []
    steps.gate.set()
    assert await handle.result(10) == ["a", "b", "end"]
    assert [body["signal"] for body in await controls(handle, "consumed")] == [1, 2, 3]
    assert await controls(handle, "ended") == [{"type": "ended", "state": "succeeded", "missed": [4]}]


async def test_signals_of_a_failed_try_go_back_in_order(steps: Steps, execute: Any) -> None:
    async def listen(run: pgchan.Run) -> list[Any]:
        got = [(await run.receive()).body, (await run.receive()).body]  # type: ignore[union-attr]
        steps.calls.append(got)
        if len(steps.calls) < 3:
            raise OSError
        return got

    async def flow(run: pgchan.Run) -> Any:
        return [await run.step(listen, run, retry=NOW), (await run.receive()).body]  # type: ignore[union-attr]

    handle = await execute(flow)
    for n in range(3):
        await handle.signal(n)
    assert await handle.result(10) == [[0, 1], 2]
    assert steps.calls == [[0, 1]] * 3
    assert [body["signal"] for body in await controls(handle, "consumed")] == [1, 2, 3]


async def test_more_signals_than_are_read_at_once_all_arrive(
    steps: Steps, client: pgchan.AsyncClient, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 50
    for module in (attempt, worker):
        monkeypatch.setattr(module, "INBOX_SIGNALS_MAX", 10)

    async def listen(run: pgchan.Run) -> int:
        seen = 0
        steps.reached.set()
        async for signal in run.signals():
            assert signal.body == seen
            seen += 1
            if seen == count:
                break
        return seen

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> Any:
        return await run.step(listen, run)

    send = "select count(pgchan.signal(%s, to_jsonb(n))) from generate_series(%s::int, %s::int) n"
    handle = await client.start(flow)
    query(client.dsn, send, handle.id, 0, 24)  # before the run begins, and while its step is under way
    await workers.start(flow)
    await steps.reached.wait()
    query(client.dsn, send, handle.id, 25, 49)
    assert await handle.result(3) == count


async def test_a_signal_interrupts_a_step_that_allows_it(steps: Steps, execute: Any, moves: Any) -> None:
    async def hang(run: pgchan.Run) -> None:
        await run.publish("begun")
        steps.reached.set()
        await asyncio.Event().wait()

    async def flow(run: pgchan.Run) -> Any:
        try:
            await run.step(hang, run, interruptible=True)
        except pgchan.Interrupted as interrupted:
            signal = interrupted.signal
            steps.calls.append(signal)
            await run.step(steps.wait)
            return [interrupted.step, signal.channel == run.id, signal.kind, signal.body]

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.reached.clear()
    await handle.signal("stop")
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)  # the interruption is recorded
    assert await handle.result(10) == ["hang", True, "signal", "stop"]
    assert await said(handle) == ["begun"]
    assert [(body["signal"], body["step"]) for body in await controls(handle, "consumed")] == [(2, "hang")]


async def test_a_pending_signal_interrupts_a_step_before_it_begins(steps: Steps, execute: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        await run.step(steps.wait)
        try:
            await run.step(steps.note, "never", interruptible=True)
        except pgchan.Interrupted as interrupted:
            return interrupted.signal.body

    handle = await execute(flow)
    await steps.reached.wait()
    await handle.signal("stop")
    steps.gate.set()
    assert await handle.result(10) == "stop"
    assert "never" not in steps.calls


async def test_a_signal_that_a_step_survives_is_not_consumed_by_it(steps: Steps, execute: Any) -> None:
    async def stubborn() -> str:
        steps.reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "finished all the same"
        return "never"

    async def flow(run: pgchan.Run) -> Any:
        return [await run.step(stubborn, interruptible=True), (await run.receive()).body]  # type: ignore[union-attr]

    handle = await execute(flow)
    await steps.reached.wait()
    await handle.signal("stop")
    assert await handle.result(10) == ["finished all the same", "stop"]


async def test_a_step_that_is_cancelled_as_it_is_recorded_does_not_give_its_signal_back(
    execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take(run: pgchan.Run) -> Any:
        return (await run.receive()).body  # type: ignore[union-attr]

    async def flow(run: pgchan.Run) -> list[Any]:
        step = asyncio.ensure_future(run.step(take, run))

        def reached(point: str) -> None:
            if point == "checkpoint_queued" and asyncio.current_task() is step:
                step.cancel()

        monkeypatch.setattr(points, "reached", reached)
        await asyncio.wait({step})
        return [step.cancelled(), (await run.receive()).body]  # type: ignore[union-attr]

    handle = await execute(flow)
    await handle.signal(1)
    await handle.signal(2)
    assert await handle.result(10) == [True, 2]
    assert [body["signal"] for body in await controls(handle, "consumed")] == [1, 2]


# ------------------------------------------------------------------------------------------------ leaving memory


@pytest.mark.parametrize("kind", ["receive", "sleep", "child"])
async def test_a_run_that_waits_leaves_memory_and_is_woken(
    kind: str, client: pgchan.AsyncClient, workers: Workers, reaches: Any, wait_until: Any
) -> None:
    @pgchan.workflow
    async def child(run: pgchan.Run) -> Any:
        return (await run.receive()).body  # type: ignore[union-attr]

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> Any:
        if kind == "receive":
            return (await run.receive()).body  # type: ignore[union-attr]
        if kind == "sleep":
            return await run.sleep(0.6)
        return await (await run.start(child, id="child")).result()

    executing = await workers.start(flow, child, linger=0.05)
    handle = await client.start(flow)
    await reaches(handle, "waiting")
    await wait_until(lambda: executing.running == 0)
    status = await handle.status()
    assert (status.worker, status.wake_at is None) == (None, kind == "receive")
    assert len(asyncio.all_tasks()) < 20
    sent = time.monotonic()
    if kind != "sleep":
        await client.run("child" if kind == "child" else handle.id).signal("wake up")
    assert await handle.result(10) == (None if kind == "sleep" else "wake up")
    assert time.monotonic() - sent < 2.0
    assert (await handle.status()).attempt >= 2


async def test_a_run_stays_in_memory_while_a_step_is_under_way_and_leaves_then(
    steps: Steps, execute: Any, reaches: Any, workers: Workers
) -> None:
    async def flow(run: pgchan.Run) -> Any:
        step, signal = await asyncio.gather(run.step(steps.wait), run.receive())
        return [step, signal.body]  # type: ignore[union-attr]

    handle = await execute(flow, linger=0.05)
    await steps.reached.wait()
    executing = workers._all[0][1]
    with pytest.raises(TimeoutError):
        await handle.result(4 * 0.05)
    assert executing.running == 1 and (await handle.status()).attempt == 1
    steps.gate.set()
    await reaches(handle, "waiting")
    await handle.signal(1)
    assert await handle.result(10) == ["wait", 1]
    assert steps.calls == ["wait"]


async def test_sleep_ends_when_it_was_to_end(execute: Any, moves: Any, reaches: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        await run.sleep(0.8)

    handle = await execute(flow)
    await reaches(handle, "running")
    await moves(flow)
    await handle.result(10)
    status = await handle.status()
    assert timedelta(seconds=0.75) < status.ended_at - status.started_at < timedelta(seconds=2.5)


async def test_sleep_until_a_moment(execute: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        with pytest.raises(errors.InvalidInput):
            await run.sleep_until(datetime(2030, 1, 1))  # noqa: DTZ001 - that is the point
        with pytest.raises(errors.InvalidInput):
            await run.sleep(-1)
        await run.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        await run.sleep_until(run.now() + timedelta(seconds=0.3))

    handle = await execute(flow)
    await handle.result(10)
    status = await handle.status()
    assert status.ended_at - status.started_at > timedelta(seconds=0.25)


async def test_a_run_that_was_woken_by_a_signal_sleeps_on(execute: Any, reaches: Any, wait_until: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        await run.sleep(1.2)
        return (await run.receive()).body  # type: ignore[union-attr]

    handle = await execute(flow, linger=0.05)
    await reaches(handle, "waiting")
    await handle.signal("early")

    async def is_woken_and_sleeps_again() -> bool:
        status = await handle.status()
        return bool(status.attempt == 2 and status.state == "waiting")

    await wait_until(is_woken_and_sleeps_again)
    assert await handle.result(10) == "early"
    status = await handle.status()
    assert status.ended_at - status.started_at > timedelta(seconds=1.15)


# ------------------------------------------------------------------------------------------------ transactions


@pytest.fixture
def ledger(dsn: str) -> Callable[[], list[Any]]:
    """A table of the user's own, and what is in it."""
    query(dsn, "create table ledger (n int unique deferrable initially deferred)")
    return lambda: [row[0] for row in query(dsn, "select n from ledger order by n")]


async def test_rows_record_and_output_commit_together_and_once(
    steps: Steps, execute: Any, moves: Any, ledger: Any, dsn: str
) -> None:
    async def flow(run: pgchan.Run) -> Any:
        async with (block := run.transaction("reserve")) as connection:
            await connection.execute("insert into ledger values (1)")
            assert await run.publish("reserved") is None
            assert ledger() == [] and query(dsn, "select from pgchan.messages where kind = 0") == []
            steps.calls.append("block")
            block.result = {"n": 1}
        steps.calls.append(block.result)
        await run.step(steps.wait)
        return block.result

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    assert await handle.result(10) == {"n": 1}
    assert ledger() == [1]
    assert steps.calls.count("block") == 1 and steps.calls.count({"n": 1}) == 2
    assert await said(handle, "raw") == ["reserved"]
    assert [(m.key, m.body) for m in await handle.journal()] == [("reserve", {"n": 1}), ("wait", "wait")]


async def test_an_exception_rolls_everything_back(execute: Any, ledger: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        async with run.transaction("reserve") as connection:
            await connection.execute("insert into ledger values (1)")
            await run.publish("reserved")
            await run.receive()
            raise ValueError("changed my mind")

    handle = await execute(flow)
    await handle.signal(1)
    with pytest.raises(errors.RunFailed, match="ValueError: changed my mind"):
        await handle.result(10)
    assert (ledger(), await said(handle), await keys(handle)) == ([], [], [])
    assert await controls(handle, "ended") == [{"type": "ended", "state": "failed", "missed": [1]}]


async def test_a_signal_is_consumed_in_the_transaction(execute: Any, ledger: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        async with run.transaction("reserve") as connection:
            signal = await run.receive()
            assert signal is not None
            await connection.execute("insert into ledger values ($1)", signal.body)

    handle = await execute(flow)
    await handle.signal(7)
    await handle.result(10)
    assert ledger() == [7]
    assert [(body["signal"], body["step"]) for body in await controls(handle, "consumed")] == [(1, "reserve")]


@pytest.mark.parametrize("kind", ["transaction", "session", "blocking", "blocking session"])
async def test_what_the_users_rows_violate_at_the_commit_is_raised(
    kind: str, execute: Any, ledger: Any, dsn: str
) -> None:
    """It is no reason to give the run back: it would fail again for ever."""
    query(dsn, "insert into ledger values (1)")
    insert = "insert into ledger values (1)"
    url = dsn.replace("postgresql://", "postgresql+psycopg://")

    async def with_transaction(run: pgchan.Run) -> None:
        async with run.transaction("reserve") as connection:
            await connection.execute(insert)

    async def with_session(run: pgchan.Run) -> None:
        engine = create_async_engine(url)
        try:
            async with run.session("reserve", engine) as session:
                await session.execute(text(insert))
        finally:
            await engine.dispose()

    def blocking(run: Any) -> None:
        with run.transaction("reserve") as connection:
            connection.execute(insert)

    def blocking_session(run: Any) -> None:
        engine = create_engine(url)
        try:
            with run.session("reserve", engine) as session:
                session.execute(text(insert))
        finally:
            engine.dispose()

    flows = {"transaction": with_transaction, "session": with_session, "blocking": blocking}
    handle = await execute(flows.get(kind, blocking_session))
    with pytest.raises(errors.RunFailed, match=r"UniqueViolation|IntegrityError"):
        await handle.result(10)
    assert (await handle.status()).attempt == 1


@pytest.mark.parametrize("kind", ["transaction", "session", "blocking"])
async def test_a_block_whose_connection_is_cut_is_executed_again(
    kind: str, steps: Steps, execute: Any, ledger: Any, dsn: str
) -> None:
    end = "select pg_terminate_backend(pg_backend_pid())"
    insert = "insert into ledger values (1)"
    url = dsn.replace("postgresql://", "postgresql+psycopg://")

    def first() -> bool:
        steps.calls.append("block")
        return len(steps.calls) == 1

    async def with_transaction(run: pgchan.Run) -> None:
        async with run.transaction("reserve") as connection:
            await connection.execute(insert)
            if first():
                await connection.execute(end)

    async def with_session(run: pgchan.Run) -> None:
        engine = create_async_engine(url)
        try:
            async with run.session("reserve", engine) as session:
                await session.execute(text(insert))
                if first():
                    await session.execute(text(end))
        finally:
            await engine.dispose()

    def blocking(run: Any) -> None:
        with run.transaction("reserve") as connection:
            connection.execute(insert)
            if first():
                connection.execute(end)

    flows = {"transaction": with_transaction, "session": with_session, "blocking": blocking}
    handle = await execute(flows[kind])
    await handle.result(10)
    assert ledger() == [1] and len(steps.calls) == 2


async def test_a_session_commits_with_the_step(steps: Steps, execute: Any, moves: Any, ledger: Any, dsn: str) -> None:
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))

    async def flow(run: pgchan.Run) -> None:
        async with run.session("reserve", engine) as session:
            await session.execute(text("insert into ledger values (1)"))
            await run.publish("reserved")
            steps.calls.append("block")
        await run.step(steps.wait)

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    await handle.result(10)
    await engine.dispose()
    assert ledger() == [1] and steps.calls.count("block") == 1
    assert await said(handle) == ["reserved"]


async def test_a_transaction_that_fails_leaves_a_clean_connection_in_the_pool(
    client: pgchan.AsyncClient, workers: Workers, dsn: str, ledger: Any
) -> None:
    @pgchan.workflow
    async def flow(run: pgchan.Run) -> Any:
        for n in range(8):  # more than the pool has
            with contextlib.suppress(ZeroDivisionError):
                async with run.transaction(f"t{n}") as connection:
                    await connection.execute("insert into ledger values (1)")
                    _ = 1 / 0
        async with run.transaction("good") as connection:
            await connection.execute("insert into ledger values (2)")

    await workers.start(flow, client=pgchan.AsyncClient(dsn, pool_size=2))
    await (await client.start(flow)).result(10)
    assert ledger() == [2]


# ------------------------------------------------------------------------------------------------ chance, children


async def test_time_and_chance_are_recorded(steps: Steps, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> None:
        steps.calls.append((run.now(), run.random(), run.random()))
        await run.step(steps.wait)

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    await handle.result(10)
    seen = [call for call in steps.calls if call != "wait"]
    assert len(seen) == 2 and seen[0] == seen[1]
    now, first, second = seen[0]
    assert abs(datetime.now(UTC) - now) < timedelta(minutes=1) and 0 <= first < 1 and first != second


async def test_a_child_is_started_once(steps: Steps, client: pgchan.AsyncClient, execute: Any, moves: Any) -> None:
    async def flow(run: pgchan.Run) -> Any:
        child = await run.start("other", 1)
        named = await run.start("other", 2, id="named")
        assert await named.cancel() or (await named.status()).state == "cancelled"
        with pytest.raises(errors.RunCancelled):
            await named.result()
        await run.step(steps.wait)
        return child.id

    handle = await execute(flow, drain=0)
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    child = await handle.result(10)
    assert sorted(status.id for status in await client.runs()) == sorted([handle.id, child, "named"])


async def test_the_result_of_a_child_is_recorded(steps: Steps, client: pgchan.AsyncClient, workers: Workers) -> None:
    @pgchan.workflow
    async def child(run: pgchan.Run, n: int) -> int:
        if n == 0:
            raise ValueError("nothing")
        return n

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> Any:
        good, bad = await run.start(child, 2), await run.start(child, 0)
        with pytest.raises(errors.RunFailed, match="ValueError: nothing"):
            await bad.result()
        return await good.result()

    await workers.start(flow, child)
    handle = await client.start(flow)
    assert await handle.result(10) == 2
    assert await keys(handle) == ["start", "start#2", "result", "result#2"]


async def test_a_signal_to_a_child_is_sent_once_also_when_that_has_ended(
    steps: Steps, client: pgchan.AsyncClient, workers: Workers
) -> None:
    @pgchan.workflow
    async def child(run: pgchan.Run) -> Any:
        return (await run.receive()).body  # type: ignore[union-attr]

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> Any:
        handle = await run.start(child, id="child")
        await handle.signal("hello")
        result = await handle.result()
        await run.step(steps.wait)
        return result

    first = await workers.start(flow, child, drain=0)
    handle = await client.start(flow)
    await steps.reached.wait()
    steps.gate.set()
    await workers.stop(first)
    await workers.start(flow, child)
    assert await handle.result(10) == "hello"
    assert [m.kind for m in await client.channel("child").read()] == ["signal", "control", "control"]


async def test_a_step_has_a_key_for_outside_services(execute: Any) -> None:
    async def charge() -> str:
        return str(pgchan.current_run().idempotency_key)

    async def flow(run: pgchan.Run) -> list[Any]:
        with pytest.raises(errors.InvalidInput):
            _ = run.idempotency_key
        return [await run.step(charge), await run.step(charge), pgchan.current_run() is run, run.id == run.channel]

    handle = await execute(flow)
    assert await handle.result(10) == [f"{handle.id}/charge", f"{handle.id}/charge#2", True, True]
    with pytest.raises(errors.InvalidInput):
        pgchan.current_run()


# ------------------------------------------------------------------------------------------------ `def`


async def test_blocking_code_has_all_that_a_run_offers(steps: Steps, execute: Any, moves: Any, ledger: Any) -> None:
    def work(n: int) -> int:
        run = pgchan.current_run()
        run.publish({"n": n})
        steps.calls.append(threading.current_thread() is not threading.main_thread())
        return n * 2

    def flow(run: Any) -> list[Any]:
        doubled = run.step(work, 4)
        signal = run.receive()
        none = run.receive(timeout=0.05)
        with run.transaction("reserve") as connection:
            connection.execute("insert into ledger values (%s)", [doubled])
            run.publish("reserved")
            steps.calls.append("block")
        run.sleep(0.05)
        run.publish("said")
        steps.calls.append((run.now(), run.random()))
        run.step(steps.wait)
        return [doubled, signal.body, none, next(iter(run.signals())).body]

    handle = await execute(flow, drain=0, linger=0.3)
    await handle.signal("hello")
    await steps.reached.wait()
    steps.gate.set()
    await moves(flow)
    await handle.signal("and more")
    assert await handle.result(10) == [8, "hello", None, "and more"]
    assert ledger() == [8] and steps.calls.count("block") == 1 and steps.calls.count(True) == 1
    assert steps.calls.count("block") == 1
    assert len({call for call in steps.calls if isinstance(call, tuple)}) == 1
    assert await said(handle) == [{"n": 4}, "reserved", "said"]


async def test_blocking_workflows_never_wait_for_threads_that_they_occupy(execute: Any) -> None:
    def flow(run: Any) -> Any:
        return run.step(lambda: threading.current_thread().name)

    handle = await execute(flow, concurrency=1)
    assert await handle.result(5) == "pgchan run"


async def test_a_blocking_workflow_that_waits_leaves_memory(execute: Any, reaches: Any, wait_until: Any) -> None:
    def flow(run: Any) -> Any:
        return run.receive().body

    before = threading.active_count()
    handle = await execute(flow, linger=0.05)
    await reaches(handle, "waiting")
    await wait_until(lambda: threading.active_count() <= before + 3)  # two of the worker's own, one of the pool
    await handle.signal(5)
    assert await handle.result(10) == 5


async def test_a_blocking_step_that_is_interrupted_says_no_more(steps: Steps, execute: Any) -> None:
    refused = threading.Event()
    reached = threading.Event()
    interrupted = threading.Event()

    def talk() -> None:
        run = pgchan.current_run()
        run.publish("a")
        reached.set()
        interrupted.wait(10)
        try:
            run.publish("b")
        except errors.Fenced:
            refused.set()

    def flow(run: Any) -> Any:
        try:
            run.step(talk, interruptible=True)
        except pgchan.Interrupted as error:
            interrupted.set()
            return error.signal.body

    handle = await execute(flow)
    await asyncio.to_thread(reached.wait, 10)
    await handle.signal("stop")
    assert await handle.result(10) == "stop"
    assert await asyncio.to_thread(refused.wait, 10)
    assert await said(handle) == ["a"]
