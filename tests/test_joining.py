"""Text that is joined on its way: cut up otherwise, and nothing else. What it says, its order and its safety stay.

Long: whatever else an attempt writes must come behind the text that it holds, and each has a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from doors import query
from generated import effort, patience
from hypothesis import given
from hypothesis import strategies as st
from workers import Processes, Workers

import pgchan
from pgchan import attempt, errors

LONG = 1.0  # a wait for more text that ends otherwise in these tests
NOW = pgchan.Retry(attempts=3, delay=0)


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[pgchan.AsyncClient]:
    async with pgchan.AsyncClient(dsn) as client:
        yield client


@pytest.fixture
def execute(client: pgchan.AsyncClient, workers: Workers) -> Callable[..., Any]:
    """Start a worker with this workflow and a run of it."""

    async def start(fn: Callable[..., Any], **options: Any) -> pgchan.AsyncRunHandle:
        workflow = pgchan.workflow(fn)
        await workers.start(workflow, **options)
        return await client.start(workflow)

    return start


async def told(handle: pgchan.AsyncRunHandle, view: str = "raw") -> list[Any]:
    """What is on the run's channel, in order: bodies, and of control messages their type."""
    messages = await handle.channel.read(view=view, limit=1000)
    return [f"<{m.body['type']}>" if m.kind == "control" else m.body for m in messages]


async def say(run: Any, text: str, **options: Any) -> None:
    """Each character for itself."""
    for character in text:
        assert await run.publish(character, wait=False, **{"join": LONG, **options}) is None


# ------------------------------------------------------------------------------------------------ what is joined


async def test_text_that_follows_text_becomes_one_message(execute: Any) -> None:
    pieces = ['"', "\\", "\\u00", "e9", "\n", "é", "😀", "", "\0", "\u2028", "</script>", "e\u0301"]

    async def speak(run: pgchan.Run) -> None:
        for piece in pieces:
            await run.publish(piece, wait=False, join=LONG)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    (message, _) = await handle.channel.read()
    assert (message.body, message.step, message.attempt) == ("".join(pieces), "speak", 1)
    assert json.loads(message.raw) == "".join(pieces)


async def test_half_a_character_is_refused_and_spoils_nothing(execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        await run.publish("a", wait=False, join=LONG)
        for half in "\ud83d\ude00":
            with pytest.raises(errors.InvalidInput, match="lone surrogate"):
                await run.publish(half, wait=False, join=LONG)
        await run.publish("b", wait=False, join=LONG)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", "<ended>"]


async def test_everything_else_ends_a_message_and_keeps_its_place(execute: Any) -> None:
    stored: list[int] = []

    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        await run.publish({"n": 1}, wait=False)
        await say(run, "cd")
        await run.publish("not joined", wait=False)
        await say(run, "ef")
        stored.append((await run.publish("waits")).position)  # type: ignore[union-attr]
        await say(run, "gh")

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)
        await run.publish("outside", wait=False)
        await run.step(speak, run, name="again")

    handle = await execute(flow)
    await handle.result(10)
    said = ["ab", {"n": 1}, "cd", "not joined", "ef", "waits", "gh"]
    assert await told(handle) == [*said, "outside", *said, "<ended>"]
    assert stored == [6, 14]


async def test_steps_at_the_same_time_do_not_mix(execute: Any) -> None:
    async def speak(run: pgchan.Run, text: str) -> None:
        for character in text:
            await run.publish(character, wait=False, join=LONG)
            await run.publish(character.upper(), wait=False, join=LONG)
            await asyncio.sleep(0)

    async def flow(run: pgchan.Run) -> None:
        await asyncio.gather(*(run.step(speak, run, text, name=text) for text in ("abc", "xyz")))

    handle = await execute(flow)
    await handle.result(10)
    messages = [m for m in await handle.channel.read() if m.kind == "message"]
    for step, text in (("abc", "aAbBcC"), ("xyz", "xXyYzZ")):
        assert "".join(m.body for m in messages if m.step == step) == text
    assert len(messages) < 12


async def test_text_waits_no_longer_than_it_may(execute: Any, wait_until: Any) -> None:
    reached, gate = asyncio.Event(), asyncio.Event()

    async def speak(run: pgchan.Run) -> None:
        await asyncio.sleep(2 * attempt.STEP_SHOWN_SECONDS)  # that it has started is recorded, and ends no message
        await run.publish("a", wait=False, join=LONG)
        await run.publish("b", wait=False, join=0.005)  # what may wait the least decides
        reached.set()
        await gate.wait()
        await run.publish("c", wait=False, join=LONG)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await reached.wait()
    began = time.monotonic()

    async def is_there() -> bool:
        return await told(handle) == ["ab"]

    await wait_until(is_there)
    assert time.monotonic() - began < LONG / 2
    gate.set()
    await handle.result(10)
    assert await told(handle) == ["ab", "c", "<ended>"]


async def test_zero_joins_what_is_said_without_a_pause(execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab", join=0)
        await asyncio.sleep(0.01)
        await say(run, "cd", join=0)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", "cd", "<ended>"]


async def test_a_message_does_not_grow_for_ever(execute: Any) -> None:
    piece = "é" * 100  # 202 bytes as JSON

    async def speak(run: pgchan.Run) -> None:
        for _ in range(300):
            await run.publish(piece, wait=False, join=LONG)
        await run.publish("x" * 3 * attempt.JOINED_BYTES_MAX, wait=False, join=LONG)
        await run.publish("y", wait=False, join=LONG)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    *joined, large, last, _ = await handle.channel.read()
    assert len(joined) == -(-300 * 200 // (attempt.JOINED_BYTES_MAX - 202))
    assert all(len(m.raw) <= attempt.JOINED_BYTES_MAX for m in joined)
    assert "".join(m.body for m in joined) == piece * 300
    assert (len(large.body), last.body) == (3 * attempt.JOINED_BYTES_MAX, "y")


@pytest.mark.parametrize(
    ("body", "options", "said"),
    [
        ("a", {"join": 0.01}, "wait=False"),
        ({"text": "a"}, {"join": 0.01, "wait": False}, "must be a str, not dict"),
        (b"a", {"join": 0.01, "wait": False}, "must be a str, not bytes"),
        ("a", {"join": -0.01, "wait": False}, "from 0 to 1"),
        ("a", {"join": 10, "wait": False}, "from 0 to 1"),
        ("a", {"join": float("nan"), "wait": False}, "from 0 to 1"),
        ("a", {"join": True, "wait": False}, "must be a number"),
        ("a", {"join": "10ms", "wait": False}, "must be a number"),
    ],
)
async def test_what_cannot_be_joined_is_refused(execute: Any, body: Any, options: Any, said: str) -> None:
    async def speak(run: pgchan.Run) -> None:
        with pytest.raises(errors.InvalidInput, match=said):
            await run.publish(body, **options)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["<ended>"]


async def test_outside_of_steps_it_is_refused_and_the_order_of_the_calls_stays(execute: Any, dsn: str) -> None:
    async def flow(run: pgchan.Run) -> None:
        with pytest.raises(errors.InvalidInput, match="outside of steps each message is recorded by the order"):
            await run.publish("a", wait=False, join=0.01)
        await run.publish("b", wait=False)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["b", "<ended>"]
    assert [key for (key,) in query(dsn, "select split_part(key, ':', 4) from pgchan.messages where kind = 0")] == ["1"]


async def test_a_step_in_a_thread_joins_too(execute: Any) -> None:
    def flow(run: Any) -> None:
        def speak() -> None:
            for character in "abcdef":
                run.publish(character, wait=False, join=LONG)

        run.step(speak)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["abcdef", "<ended>"]


# ------------------------------------------------------------------------------------------------ tries and ends


async def test_text_of_a_failed_try_is_void_and_stands_before_the_reset(execute: Any) -> None:
    tries: list[int] = []

    async def speak(run: pgchan.Run) -> None:
        tries.append(1)
        await say(run, "ab")
        if len(tries) < 3:
            raise OSError
        await say(run, "c")

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run, retry=NOW)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", "<reset>", "ab", "<reset>", "abc", "<ended>"]
    assert await told(handle, "final") == ["<reset>", "<reset>", "abc", "<ended>"]


async def test_a_try_may_carry_on_from_text_that_was_still_held_when_the_last_one_failed(execute: Any) -> None:
    async def speak(run: pgchan.Run) -> str:
        earlier = "".join(m.body for m in run.previous())
        await say(run, "abcdef"[len(earlier) :][:3])
        if not earlier:
            raise OSError
        return earlier

    async def flow(run: pgchan.Run) -> Any:
        return await run.step(speak, run, retry=NOW)

    handle = await execute(flow)
    assert await handle.result(10) == "abc"
    assert await told(handle) == ["abc", "def", "<ended>"]


async def test_text_before_an_interruption_stands_before_what_records_it(execute: Any) -> None:
    reached = asyncio.Event()

    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        reached.set()
        await asyncio.Event().wait()

    async def flow(run: pgchan.Run) -> None:
        with pytest.raises(pgchan.Interrupted):
            await run.step(speak, run, interruptible=True)

    handle = await execute(flow)
    await reached.wait()
    await handle.signal("stop")
    await handle.result(10)
    assert await told(handle) == ["stop", "ab", "<consumed>", "<ended>"]


async def test_signals_are_consumed_behind_the_text_that_was_said_before(execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        await run.receive()
        await say(run, "cd")

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.signal("go")
    await handle.result(10)
    messages = await told(handle)
    assert messages[-2:] == ["<consumed>", "<ended>"]
    assert "".join(m for m in messages[:-2] if m != "go") == "abcd"


async def test_text_of_a_step_that_was_given_up_is_written_before_the_run_leaves_memory(
    execute: Any, wait_until: Any
) -> None:
    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab", join=0.3)
        await asyncio.Event().wait()

    async def flow(run: pgchan.Run) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.step(speak, run), 0.01)
        await run.receive()

    handle = await execute(flow, linger=0.01)

    async def is_waiting() -> bool:
        return (await handle.status()).state == "waiting"

    await wait_until(is_waiting)
    assert await told(handle) == ["ab"]


async def test_text_of_a_step_that_was_given_up_is_there_when_the_run_ends(execute: Any) -> None:
    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        await asyncio.Event().wait()

    async def flow(run: pgchan.Run) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.step(speak, run), 0.01)

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", "<ended>"]


async def test_a_run_that_fails_at_its_deadline_has_said_what_it_held(
    client: pgchan.AsyncClient, workers: Workers
) -> None:
    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        await asyncio.Event().wait()

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    await workers.start(flow)
    handle = await client.start(flow, timeout=0.2)
    with pytest.raises(pgchan.RunFailed):
        await handle.result(10)
    assert await told(handle) == ["ab", "<ended>"]


async def test_an_attempt_that_has_ended_holds_nothing(execute: Any) -> None:
    found: list[Any] = []

    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        if not found:
            attempt = run._attempt
            attempt.end("unavailable")  # as where the database stays away
            found.extend((attempt._held, attempt._held_until))

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    assert found == [None, None]
    assert "".join(m for m in await told(handle, "final") if m[0] != "<") == "ab"


async def test_a_worker_that_stops_says_what_it_held_before_it_hands_the_run_back(
    client: pgchan.AsyncClient, workers: Workers
) -> None:
    reached = asyncio.Event()

    async def speak(run: pgchan.Run) -> str:
        earlier = "".join(m.body for m in run.previous())
        if not earlier:
            await say(run, "ab")
            reached.set()
            await asyncio.Event().wait()
        return earlier

    @pgchan.workflow
    async def flow(run: pgchan.Run) -> str:
        return await run.step(speak, run)

    worker = await workers.start(flow, drain=0)
    handle = await client.start(flow)
    await reached.wait()
    await workers.stop(worker)
    await workers.start(flow)
    assert await handle.result(10) == "ab"
    assert await told(handle) == ["ab", "<ended>"]


async def test_a_crash_loses_what_was_held_and_leaves_no_half_of_it(dsn: str, processes: Processes) -> None:
    """The first worker dies with text in memory; what it had written is void, and the second says all of it."""
    client = pgchan.AsyncClient(dsn)
    async with client:
        first = await processes.start("first")
        handle = await client.start("stream", "abcdef")
        await first.tells("gate", "stream")
        first.kill()
        second = await processes.start("second")
        await second.tells("gate", "stream")
        second.open("stream")
        assert await handle.result(15) == "abcdef"
        assert await told(handle) == ["abc", "<reset>", "abc", "def", "<ended>"]
        assert await told(handle, "final") == ["<reset>", "abc", "def", "<ended>"]


# ------------------------------------------------------------------------------------------------ transactions


async def test_text_within_a_transaction_is_joined_and_goes_with_its_commit(execute: Any, dsn: str) -> None:
    query(dsn, "create table ledger (n int)")

    async def flow(run: pgchan.Run) -> None:
        with contextlib.suppress(OSError):
            async with run.transaction("undone"):
                await say(run, "void")
                raise OSError
        async with run.transaction("rows") as connection:
            await say(run, "ab")
            await run.publish(1, wait=False)
            await say(run, "cd", join=0)
            await asyncio.sleep(0.01)
            await say(run, "ef")
            await connection.execute("insert into ledger values (1)")

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", 1, "cdef", "<ended>"]


async def test_text_of_another_step_is_written_before_a_transaction_commits_or_after(execute: Any) -> None:
    """Never meanwhile: a lost answer to the commit is resolved by positions."""
    said, committed = asyncio.Event(), asyncio.Event()

    async def speak(run: pgchan.Run) -> None:
        await say(run, "ab")
        said.set()
        await committed.wait()
        await say(run, "cd")

    async def book(run: pgchan.Run) -> None:
        await said.wait()
        async with run.transaction("rows"):
            await say(run, "xy")
        committed.set()

    async def flow(run: pgchan.Run) -> None:
        await asyncio.gather(run.step(speak, run), book(run))

    handle = await execute(flow)
    await handle.result(10)
    assert await told(handle) == ["ab", "xy", "cd", "<ended>"]


async def test_nothing_is_written_or_held_while_a_transaction_commits_even_if_there_was_no_room(
    client: pgchan.AsyncClient, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for room looks once more whether a transaction has begun to commit meanwhile."""
    found: list[Any] = []

    async def speak(run: pgchan.Run) -> None:
        held = run._attempt
        writer = held._writer
        room = asyncio.Event()

        async def no_room() -> None:
            await room.wait()

        monkeypatch.setattr(writer, "room", no_room)
        joining = asyncio.create_task(run.publish("a", wait=False, join=LONG))
        plain = asyncio.create_task(run.publish("b", wait=False))
        await asyncio.sleep(0)
        await held.close_gate()
        room.set()
        await asyncio.sleep(0.01)
        found.append((joining.done(), plain.done(), held._held, held._unsettled))
        held.open_gate()
        await asyncio.gather(joining, plain)

    async def flow(run: pgchan.Run) -> None:
        await run.step(speak, run)

    handle = await execute(flow)
    await handle.result(10)
    assert found == [(False, False, None, 0)]
    assert await told(handle) == ["a", "b", "<ended>"]


# ------------------------------------------------------------------------------------------------ any sequence

TEXT = st.text(st.sampled_from('a"\\\n\0é😀\u2028'), max_size=3)
SAID = st.lists(
    st.one_of(
        st.tuples(st.just("say"), TEXT, st.sampled_from([None, 0, 0.002, LONG])),
        st.tuples(st.just("wait"), TEXT | st.integers(0, 9), st.none()),
        st.tuples(st.just("object"), st.integers(0, 9), st.none()),
        st.tuples(st.just("pause"), st.none(), st.none()),
        st.tuples(st.just("fail"), st.none(), st.none()),
    ),
    max_size=12,
)


async def perform(run: pgchan.Run, said: list[Any], failures: list[int]) -> None:
    """Say all of it; at each "fail" the try ends the first time."""
    await asyncio.sleep(0)
    for number, (what, value, join) in enumerate(said):
        if what == "say":
            await run.publish(value, wait=False, join=join)
        elif what in ("wait", "object"):
            await run.publish(value, wait=what == "wait")
        elif what == "pause":
            await asyncio.sleep(0.001)
        elif number not in failures:
            failures.append(number)
            raise OSError


@pgchan.workflow
async def performance(run: pgchan.Run, steps: list[list[Any]]) -> None:
    """A step for each list, one after the other."""
    for said in steps:
        await run.step(perform, run, said, [], retry=pgchan.Retry(attempts=20, delay=0))


def strung_together(bodies: list[tuple[str | None, Any]]) -> list[tuple[str | None, Any]]:
    """Steps and bodies, with the text of a step in one piece wherever nothing else stands between."""
    found: list[tuple[str | None, Any]] = []
    for step, body in bodies:
        if found and isinstance(body, str) and found[-1][0] == step and isinstance(found[-1][1], str):
            found[-1] = (step, found[-1][1] + body)
        else:
            found.append((step, body))
    return found


@patience(300)
async def test_any_sequence_reads_as_it_was_said(dsn: str, workers: Workers) -> None:
    await workers.start(performance)

    @effort(60)
    @given(st.lists(SAID, min_size=1, max_size=3))
    def check(steps: list[list[Any]]) -> None:
        handle = client.start(performance, steps)
        handle.result(20)
        read = [(m.step, m.body) for m in handle.channel.read(limit=1000) if m.kind == "message"]
        names = ["perform", *(f"perform#{n}" for n in range(2, 4))]
        said = [
            (name, value)
            for name, one in zip(names, steps, strict=False)
            for what, value, _ in one
            if what in ("say", "wait", "object")
        ]
        assert strung_together(read) == strung_together(said)

    client = pgchan.Client(dsn)
    try:
        await asyncio.to_thread(check)
    finally:
        await asyncio.to_thread(client.close)
