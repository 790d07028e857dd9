"""A run seen from outside, through both doors: start, status, result, signal, cancel, resume, list, delete.

Long: it is the specification.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from doors import Door, query
from workers import Workers

import pgchan
from pgchan import errors, sql, worker


@pgchan.workflow
async def add(run: pgchan.Run, a: int, b: int = 0) -> int:
    return a + b


@pgchan.workflow
async def echo(run: pgchan.Run) -> Any:
    """Ends with the first signal that it gets."""
    message = await run.receive()
    assert message is not None
    return message.body


@pgchan.workflow
async def hang(run: pgchan.Run) -> None:
    """A step that does not end by itself."""
    await run.publish("begun")
    await run.step(asyncio.Event().wait, name="hang")


@pgchan.workflow
async def fail(run: pgchan.Run, message: str = "no luck") -> None:
    raise ValueError(message)


@pgchan.workflow(timeout=0.3)
async def limited(run: pgchan.Run) -> None:
    await run.receive()


async def state_of(handle: Any) -> str:
    return str((await handle.status()).state)


@pytest.fixture
def reaches(wait_until: Callable[..., Any]) -> Callable[..., Any]:
    """Wait until a run is in this state."""

    async def wait(handle: Any, state: str) -> None:
        async def is_there() -> bool:
            return await state_of(handle) == state

        await wait_until(is_there)

    return wait


# ------------------------------------------------------------------------------------------------ start


async def test_a_run_executes_its_workflow_and_has_its_result(client: Any, workers: Workers) -> None:
    await workers.start(add)
    handle = await client.start(add, 2, b=3)
    assert await handle.result(10) == 5
    assert handle.created and uuid.UUID(handle.id)
    assert await client.run(handle.id).result() == 5


async def test_a_run_is_started_once_by_its_id(client: Any, workers: Workers) -> None:
    first = await client.start(add, 2, id="sum/1")
    again = await client.start("add", 2, id="sum/1")
    assert (first.id, first.created, again.id, again.created) == ("sum/1", True, "sum/1", False)
    await workers.start(add)
    assert await again.result(10) == 2
    assert not (await client.start(add, 2, id="sum/1")).created  # also when it has ended
    assert len(await client.runs()) == 1


async def test_an_id_that_was_used_for_something_else_is_a_conflict(client: Any) -> None:
    await client.start(add, 2, id="r")
    for workflow, args in ((add, (3,)), (echo, ())):
        with pytest.raises(errors.RunConflict) as caught:
            await client.start(workflow, *args, id="r")
        assert caught.value.run == "r"
    assert (await client.run("r").status()).workflow == "add"


async def test_arguments_that_do_not_fit_fail_a_run_that_was_started_by_name(client: Any, workers: Workers) -> None:
    await workers.start(add)
    handle = await client.start("add", "two")
    with pytest.raises(errors.RunFailed, match="InvalidInput: argument 'a'"):
        await handle.result(10)


async def test_a_run_cannot_be_started_on_a_closed_channel(client: Any) -> None:
    await client.channel("chat").publish("hello")
    await client.channel("chat").close()
    with pytest.raises(errors.ChannelClosed):
        await client.start(add, 1, id="chat")


async def test_a_run_may_speak_on_a_channel_that_has_messages(client: Any, workers: Workers) -> None:
    await client.channel("chat").publish("hello")
    await workers.start(add)
    assert await (await client.start(add, 1, id="chat")).result(10) == 1
    assert [m.body for m in await client.channel("chat").read() if m.kind == "message"] == ["hello"]


async def test_a_run_started_in_a_transaction_exists_if_that_commits(door: Door, client: Any, workers: Workers) -> None:
    await workers.start(add)
    with psycopg.connect(door.dsn) as connection:
        handle = await client.start(add, 2, connection=connection)
        assert handle.created and await client.runs() == []
        connection.commit()
        assert await handle.result(0.9) == 2  # it was announced
        rolled_back = await client.start(add, 3, connection=connection)
        connection.rollback()
    with pytest.raises(errors.RunNotFound):
        await rolled_back.status()


async def test_a_delayed_run_begins_then_and_not_before(client: Any, workers: Workers) -> None:
    await workers.start(add)
    handle = await client.start(add, 2, delay=0.5)
    status = await handle.status()
    assert (status.state, status.attempt) == ("scheduled", 0)
    assert status.wake_at - status.created_at == pytest.approx(timedelta(seconds=0.5), abs=timedelta(seconds=0.1))
    await handle.result(10)
    status = await handle.status()
    assert timedelta(seconds=0.4) < status.started_at - status.created_at < timedelta(seconds=2.5)


async def test_a_run_that_is_due_a_moment_after_another_began_is_not_forgotten(client: Any, workers: Workers) -> None:
    await workers.start(add)
    for delay in (0.001, 0.005, 0.015, 0.05):
        due, now = await asyncio.gather(client.start(add, 1, delay=delay), client.start(add, 2))
        await asyncio.gather(due.result(10), now.result(10))
        status = await due.status()
        assert status.started_at - status.created_at < timedelta(seconds=delay + 0.5)


async def test_runs_begin_in_order_of_priority_then_of_age(client: Any, workers: Workers) -> None:
    for name, priority in (("a", 0), ("b", 0), ("low", -1), ("high", 5)):
        await client.start(add, 1, id=name, priority=priority)
    await workers.start(add, concurrency=1)
    for name in ("a", "b", "low", "high"):
        await client.run(name).result(10)
    began = sorted(await client.runs(), key=lambda status: status.started_at)
    assert [status.id for status in began] == ["high", "a", "b", "low"]


async def test_runs_wait_in_the_queue_that_they_were_started_for(client: Any, workers: Workers) -> None:
    await workers.start(add, queues=["gpu"])
    other = await client.start(add, 1)
    assert await (await client.start(add, 2, queue="gpu")).result(10) == 2
    assert await state_of(other) == "scheduled"


@pytest.mark.parametrize("linger", [0.05, 5.0], ids=["out of memory", "in memory"])
async def test_a_run_that_has_not_ended_in_time_fails(client: Any, workers: Workers, linger: float) -> None:
    await workers.start(limited, echo, hang, linger=linger)
    for started in (client.start(limited), client.start(echo, timeout=0.3), client.start(hang, timeout=0.3)):
        handle = await started
        with pytest.raises(errors.RunFailed) as caught:
            await handle.result(10)
        assert caught.value.type == "TimeoutError"
        status = await handle.status()
        assert status.ended_at - status.created_at < timedelta(seconds=2.5)


async def test_code_that_catches_everything_cannot_outlive_the_timeout_of_its_run(
    client: Any, workers: Workers
) -> None:
    @pgchan.workflow
    async def clings(run: pgchan.Run) -> str:
        try:
            await run.step(asyncio.Event().wait, name="hang")
        except BaseException:
            raise RuntimeError("while it was cleaning up") from None
        return "never"

    await workers.start(clings)
    with pytest.raises(errors.RunFailed, match="TimeoutError"):
        await (await client.start(clings, timeout=0.2)).result(4)


# ------------------------------------------------------------------------------------------------ status


async def test_status_tells_what_becomes_of_a_run(client: Any, workers: Workers, reaches: Callable[..., Any]) -> None:
    handle = await client.start(hang, id="r", queue="q", priority=3)
    before = await handle.status()
    assert (before.id, before.workflow, before.queue, before.priority) == ("r", "hang", "q", 3)
    assert (before.state, before.attempt, before.worker, before.step) == ("scheduled", 0, None, None)
    assert before.started_at is before.ended_at is before.error is before.wake_at is None and not before.is_ended
    await workers.start(hang, queues=["q"], name="w-1")
    await reaches(handle, "running")
    during = await handle.status()
    assert (during.attempt, during.worker) == (1, "w-1")
    assert before.created_at <= during.started_at <= datetime.now(UTC) + timedelta(seconds=1)
    await handle.cancel()
    after = await handle.status()
    assert (after.state, after.worker, after.is_ended) == ("cancelled", None, True)
    assert after.ended_at >= after.started_at


async def test_status_names_the_step_under_way(client: Any, workers: Workers, wait_until: Callable[..., Any]) -> None:
    await workers.start(hang)
    handle = await client.start(hang)

    async def is_shown() -> bool:
        return bool((await handle.status()).step == "hang")

    await wait_until(is_shown)


async def test_status_tells_the_error_of_a_failed_run(client: Any, workers: Workers) -> None:
    await workers.start(fail)
    handle = await client.start(fail, "a \0 in it")  # which jsonb cannot hold
    with pytest.raises(errors.RunFailed) as caught:
        await handle.result(10)
    assert (caught.value.run, caught.value.type) == (handle.id, "ValueError")
    error = (await handle.status()).error
    assert (error.type, error.message) == ("ValueError", "a \ufffd in it")
    assert (await client.runs(state="failed"))[0].error == error


async def test_a_run_that_is_not_there_is_not_found(client: Any) -> None:
    handle = client.run("nobody")
    for call in (
        handle.status, handle.result, handle.cancel, handle.resume, handle.journal, handle.delete,
        lambda: handle.signal("x"),
    ):  # fmt: skip
        with pytest.raises(errors.RunNotFound):
            await call()


# ------------------------------------------------------------------------------------------------ result


async def test_a_result_that_does_not_come_in_time_is_a_timeout_and_the_run_goes_on(
    client: Any, workers: Workers
) -> None:
    await workers.start(echo)
    handle = await client.start(echo)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.2 s"):
        await handle.result(0.2)
    assert 0.2 <= time.monotonic() - began < 1.5
    with pytest.raises(TimeoutError):
        await handle.result(0)
    await handle.signal("late")
    assert await handle.result(10) == "late"


async def test_who_waits_for_a_result_is_told_at_once(client: Any, workers: Workers) -> None:
    await workers.start(echo)
    handle = await client.start(echo)
    waiting = [asyncio.create_task(handle.result(10)) for _ in range(3)]
    with pytest.raises(TimeoutError):
        await handle.result(0.1)
    sent = time.monotonic()
    await handle.signal(1)
    assert await asyncio.gather(*waiting) == [1, 1, 1]
    assert time.monotonic() - sent < 0.8


async def test_a_run_that_ends_while_its_result_is_looked_for_is_not_waited_for(
    workers: Workers, dsn: str, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        await workers.start(echo)
        handle, before = await client.start(echo), await client.start(echo)
        await before.signal(0)
        await before.result(10)  # now the client listens
        looks, announced = 0, 0.0
        fetch = client._db.fetch

        async def late(statement: str, *args: object) -> Any:
            nonlocal looks, announced
            rows = await fetch(statement, *args)
            if statement == sql.RUN_RESULT:
                looks += 1
                if looks == 1:
                    mark = client._db.mark()
                    async with pgchan.AsyncClient(dsn) as other:
                        await other.run(handle.id).signal("ended")
                    await wait_until(lambda: client._db.mark() > mark)  # its end has been announced, to nobody
                    announced = time.monotonic()
            return rows

        monkeypatch.setattr(client._db, "fetch", late)
        assert await handle.result(10) == "ended"
        assert looks == 2 and time.monotonic() - announced < 0.8  # less than a sweep


async def test_who_waits_for_a_result_looks_before_and_after(
    workers: Workers, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pgchan.AsyncClient(dsn) as client:
        await workers.start(echo)
        looks = 0
        fetch = client._db.fetch

        async def counted(statement: str, *args: object) -> Any:
            nonlocal looks
            looks += statement == sql.RUN_RESULT
            return await fetch(statement, *args)

        monkeypatch.setattr(client._db, "fetch", counted)
        for first in (True, False):
            looks = 0
            handle = await client.start(echo)
            waiting = asyncio.create_task(handle.result(10))
            await asyncio.sleep(0.3)
            await handle.signal(1)
            assert await waiting == 1
            assert looks == (3 if first else 2)  # at first it does not listen yet


async def test_a_result_is_any_json_value(client: Any, workers: Workers) -> None:
    await workers.start(echo)
    for value in (None, True, "\0 ☃", [1, {"a": None}], 2**70):
        handle = await client.start(echo)
        await handle.signal(value)
        assert await handle.result(10) == value


async def test_a_run_whose_result_is_not_json_fails_with_its_place(client: Any, workers: Workers) -> None:
    @pgchan.workflow
    async def wrong(run: pgchan.Run) -> Any:
        return {"a": [1, object()]}

    await workers.start(wrong)
    with pytest.raises(errors.RunFailed, match=r"the result holds a object at \$\.a\[1\]"):
        await (await client.start(wrong)).result(10)


# ------------------------------------------------------------------------------------------------ signal


async def test_signals_are_messages_on_the_channel_of_the_run(client: Any) -> None:
    handle = await client.start(echo, id="r")
    sent = await handle.signal({"n": 1})
    assert (sent.channel, sent.position, sent.kind, sent.body) == ("r", 1, "signal", {"n": 1})
    assert await handle.channel.read() == [sent]


async def test_a_keyed_signal_is_stored_once(client: Any, workers: Workers) -> None:
    handle = await client.start(echo)
    first = await handle.signal("yes", key="k")
    assert await handle.signal("yes", key="k") == first
    with pytest.raises(errors.IdempotencyConflict):
        await handle.signal("no", key="k")
    await workers.start(echo)
    assert await handle.result(10) == "yes"
    assert await handle.signal("yes", key="k") == first  # also when the run has ended


async def test_a_signal_in_a_transaction_arrives_if_that_commits(door: Door, client: Any, workers: Workers) -> None:
    await workers.start(echo, linger=0.05)
    handle = await client.start(echo)
    with psycopg.connect(door.dsn) as connection:
        await handle.signal("undone", connection=connection)
        connection.rollback()
        await handle.signal("done", connection=connection)
        assert await state_of(handle) != "succeeded"
        connection.commit()
    assert await handle.result(5) == "done"


async def test_a_run_that_has_ended_takes_no_signal(client: Any, workers: Workers) -> None:
    await workers.start(add)
    handle = await client.start(add, 1)
    await handle.result(10)
    with pytest.raises(errors.ChannelClosed):
        await handle.signal("late")
    assert [m.kind for m in await handle.channel.read()] == ["control"]


# ------------------------------------------------------------------------------------------------ cancel


async def test_a_scheduled_run_is_cancelled(client: Any, workers: Workers) -> None:
    handle = await client.start(add, 1)
    assert await handle.cancel() is True
    assert await handle.cancel() is False
    await workers.start(add)
    assert await (await client.start(add, 2)).result(10) == 2
    with pytest.raises(errors.RunCancelled) as caught:
        await handle.result(10)
    assert caught.value.run == handle.id
    assert (await handle.status()).attempt == 0


async def test_a_running_run_is_cancelled_and_its_readers_end(
    client: Any, workers: Workers, reading: Callable[..., Any]
) -> None:
    await workers.start(hang)
    handle = await client.start(hang)
    messages = reading(handle.tail())
    await messages.has(1)
    assert await handle.cancel() is True
    await messages.end(3)
    assert messages.bodies == ["begun", {"type": "ended", "state": "cancelled"}]


async def test_a_waiting_run_is_cancelled_and_its_signals_are_missed(
    client: Any, workers: Workers, reaches: Callable[..., Any]
) -> None:
    @pgchan.workflow
    async def sleeps(run: pgchan.Run) -> None:
        await run.sleep(100)

    await workers.start(sleeps, linger=0.05)
    handle = await client.start(sleeps)
    await reaches(handle, "waiting")
    await handle.signal("nobody hears this")
    await reaches(handle, "waiting")
    assert await handle.cancel() is True
    assert (await handle.channel.read())[-1].body == {"type": "ended", "state": "cancelled", "missed": [1]}


async def test_a_run_that_has_ended_cannot_be_cancelled(client: Any, workers: Workers) -> None:
    await workers.start(add)
    handle = await client.start(add, 1)
    await handle.result(10)
    assert await handle.cancel() is False
    assert await state_of(handle) == "succeeded"


# ------------------------------------------------------------------------------------------------ resume, journal


class Weather:
    """What a step of this process finds."""

    def __init__(self) -> None:
        self.fine = False
        self.calls: list[str] = []


weather = Weather()


@pgchan.workflow
async def fragile(run: pgchan.Run) -> list[str]:
    async def first() -> str:
        weather.calls.append("first")
        return "one"

    async def second() -> str:
        weather.calls.append("second")
        await run.publish("trying")
        if not weather.fine:
            raise OSError("storm")
        return "two"

    return [await run.step(first), await run.step(second)]


@pytest.fixture(autouse=True)
def _calm() -> None:
    weather.__init__()  # type: ignore[misc]


async def test_a_resumed_run_goes_on_from_its_journal(client: Any, workers: Workers) -> None:
    await workers.start(fragile)
    handle = await client.start(fragile)
    with pytest.raises(errors.RunFailed, match="OSError: storm"):
        await handle.result(10)
    weather.fine = True
    await handle.resume()
    assert await handle.result(10) == ["one", "two"]
    assert weather.calls == ["first", "second", "second"]
    assert [m.body for m in await handle.channel.read() if m.kind == "message"] == ["trying"]
    assert (await handle.status()).error is None


async def test_a_failed_run_can_be_resumed_again(client: Any, workers: Workers) -> None:
    await workers.start(fragile)
    handle = await client.start(fragile)
    for _ in range(2):
        with pytest.raises(errors.RunFailed):
            await handle.result(10)
        await handle.resume()
    with pytest.raises(errors.RunFailed):
        await handle.result(10)
    assert weather.calls == ["first", "second", "second", "second"]


async def test_only_a_failed_run_can_be_resumed(client: Any, workers: Workers) -> None:
    handle = await client.start(add, 1)
    with pytest.raises(errors.InvalidInput, match="is scheduled; only a failed run"):
        await handle.resume()
    await workers.start(add)
    await handle.result(10)
    with pytest.raises(errors.InvalidInput, match="is succeeded"):
        await handle.resume()


async def test_the_journal_holds_the_results_by_step(client: Any, workers: Workers) -> None:
    weather.fine = True
    await workers.start(fragile)
    handle = await client.start(fragile)
    assert await handle.journal() == []
    await handle.result(10)
    assert [(m.key, m.body) for m in await handle.journal()] == [("first", "one"), ("second", "two")]


# ------------------------------------------------------------------------------------------------ lists, deletion


async def test_runs_are_listed_newest_first_filtered_and_in_pages(client: Any, workers: Workers) -> None:
    for n in range(5):
        await client.start(add, n, id=f"add/{n}", queue="even" if n % 2 == 0 else "odd")
    await client.start(echo, id="echo")
    await client.run("add/1").cancel()

    async def ids(**filters: Any) -> list[str]:
        return [status.id for status in await client.runs(**filters)]

    assert await ids() == ["echo", "add/4", "add/3", "add/2", "add/1", "add/0"]
    assert await ids(workflow="echo") == ["echo"]
    assert await ids(queue="odd") == ["add/3", "add/1"]
    assert await ids(state="cancelled") == ["add/1"]
    assert await ids(state="scheduled", queue="odd") == ["add/3"]
    assert await ids(limit=2) == ["echo", "add/4"]
    assert await ids(limit=2, after="add/4") == ["add/3", "add/2"]
    assert await ids(after="add/0") == []
    with pytest.raises(errors.InvalidInput, match="state must be one of"):
        await client.runs(state="done")
    with pytest.raises(errors.InvalidInput):
        await client.runs(limit=0)


async def test_a_run_that_has_ended_is_deleted_with_all_it_wrote(client: Any, workers: Workers, dsn: str) -> None:
    weather.fine = True
    handle = await client.start(fragile, id="r")
    with pytest.raises(errors.InvalidInput):
        await handle.delete()
    await workers.start(fragile)
    await handle.result(10)
    await handle.delete()
    with pytest.raises(errors.RunNotFound):
        await handle.status()
    assert await client.channel("r").read() == []
    left = "select (select count(*) from pgchan.messages), (select count(*) from pgchan.channels)"
    assert query(dsn, left) == [(0, 0)]
    assert (await client.start(add, 1, id="r")).created


async def test_the_channel_of_a_run_that_has_not_ended_is_not_closed_or_deleted(client: Any) -> None:
    handle = await client.start(echo)
    for call in (handle.channel.close, handle.channel.delete):
        with pytest.raises(errors.InvalidInput):
            await call()
    assert await state_of(handle) == "scheduled"


async def test_a_run_without_code_stays_in_its_queue_and_the_worker_says_so(
    client: Any, workers: Workers, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., Any]
) -> None:
    handle = await client.start("unheard of")
    await workers.start(add)
    await wait_until(lambda: "1 run(s) of workflow 'unheard of' are ready" in caplog.text)
    assert await state_of(handle) == "scheduled"
    assert worker.UPKEEP_SECONDS > 1  # so it is not said all the time
