"""What goes into a batch, in which order, and what becomes of entries whose channel is locked."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest

import pgchan
from pgchan.db import Entry, Outcome
from pgchan.writer import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, LOCK_RETRY_SECONDS, Batch, Queued, Waiting


def queued(name: str, body: bytes = b"1", **more: Any) -> Queued:
    return Queued(Entry(name, body, **more), None, 1e9)


def names(batch: Batch | None) -> list[str]:
    return [one.entry.name for one in batch.queued] if batch else []


def test_everything_that_waits_goes_into_one_batch_in_order() -> None:
    waiting = Waiting()
    for name in ("a", "b", "a"):
        waiting.put(queued(name))
    assert names(waiting.take()) == ["a", "b", "a"]
    assert waiting.take() is None


def test_a_batch_ends_before_an_entry_that_cannot_go_along() -> None:
    for first, second in [
        (queued("a", fence=1), queued("a", fence=2)),
        (queued("a", key="k"), queued("a", key="k")),
        (queued("a", channel_id=1), queued("a", channel_id=2)),
        (queued("a", content_type="text/plain"), queued("a")),
        (queued("a", b"x" * BATCH_BYTES_MAX), queued("a")),
    ]:
        waiting = Waiting()
        for one in (first, second, queued("later")):
            waiting.put(one)
        assert len(waiting.take().queued) == 1  # type: ignore[union-attr]
        assert names(waiting.take()) == ["a", "later"], "what came later did not overtake"


def test_a_batch_has_at_most_so_many_entries() -> None:
    waiting = Waiting()
    for _ in range(BATCH_ENTRIES_MAX + 1):
        waiting.put(queued("a"))
    assert [len(names(waiting.take())), len(names(waiting.take()))] == [BATCH_ENTRIES_MAX, 1]


def test_entries_of_a_locked_channel_wait_while_others_go_on() -> None:
    waiting = Waiting()
    first = queued("a")
    waiting.set_aside([first], now=10.0)
    waiting.put(queued("a", b"2"))
    waiting.put(queued("b"))
    assert names(waiting.take(10.0)) == ["b"]
    assert waiting.take(10.0) is None
    assert waiting.seconds_aside(10.0) == pytest.approx(LOCK_RETRY_SECONDS)
    again = waiting.take(10.1)
    assert again is not None
    assert [one.entry.body for one in again.queued] == [b"1", b"2"], "in order"
    assert again.lock_wait == 0, "nobody waits for them twice"


def test_entries_of_one_owner_are_set_aside_together() -> None:
    batch = Batch()
    for one in (queued("run", owner=7), queued("journal", owner=7), queued("other", owner=8), queued("free")):
        batch.add(one)
    words = ["locked", "blocked", "appended", "appended"]
    refused = batch.refused_for_now([Outcome(word, 1, None, None) for word in words])
    assert [one.entry.name for one in refused] == ["run", "journal"]


async def test_a_channel_that_a_transaction_has_locked_does_not_delay_the_others(client: Any, dsn: str) -> None:
    locked, free = client.channel("locked"), client.channel("free")
    await locked.publish(0)
    await free.publish(0)
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('locked', '\"mine\"')")
        waiting = asyncio.create_task(locked.publish("waits"))
        began = time.monotonic()
        for n in range(20):
            await free.publish(n)
        assert time.monotonic() - began < 5
        assert not waiting.done()
        connection.commit()
    assert (await asyncio.wait_for(waiting, 10)).position == 3
    assert [message.body for message in await locked.read()] == [0, "mine", "waits"]


async def test_a_channel_that_stays_locked_is_unavailable_and_nothing_is_written(door: Any, dsn: str) -> None:
    client = door.client(timeout=0.5)
    channel = client.channel("locked")
    await channel.publish(0)
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('locked', '\"mine\"')")
        with pytest.raises(pgchan.Unavailable, match="locked"):
            await channel.publish("late")
        connection.rollback()
    assert [message.body for message in await channel.read()] == [0]


def test_entries_that_must_not_be_parted_wait_for_the_next_batch_together() -> None:
    waiting = Waiting()
    for _ in range(BATCH_ENTRIES_MAX - 1):
        waiting.put(queued("a"))
    for more in (True, True, False):
        waiting.put(Queued(Entry("run", b"1", owner=7), None, 1e9, more))
    assert names(waiting.take()) == ["a"] * (BATCH_ENTRIES_MAX - 1)
    assert names(waiting.take()) == ["run"] * 3


def test_more_entries_that_must_not_be_parted_than_a_batch_has_are_a_batch_of_their_own() -> None:
    waiting = Waiting()
    for n in range(BATCH_ENTRIES_MAX + 5):
        waiting.put(Queued(Entry("run", b"1", owner=7), None, 1e9, n < BATCH_ENTRIES_MAX + 4))
    waiting.put(queued("a"))
    assert len(names(waiting.take())) == BATCH_ENTRIES_MAX + 5
    assert names(waiting.take()) == ["a"]


def test_with_output_that_is_given_up_goes_all_that_its_owner_wrote_after_it() -> None:
    waiting = Waiting()
    output, result = Entry("run", b"output", owner=7), Entry("journal", b"result", owner=7)
    waiting.put(Queued(output, None, 1.0))
    waiting.put(Queued(result, None, 5.0))
    waiting.put(Queued(Entry("run 2", b"1", owner=8), None, 5.0))
    assert [one.entry for one in waiting.take_expired(2.0)] == [output, result]
    assert names(waiting.take()) == ["run 2"]


async def test_a_run_whose_channel_is_locked_does_not_hold_up_the_claim_of_others(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as claiming, psycopg.connect(dsn) as locking:
        (worker,) = claiming.execute("select pgchan.new_worker()").fetchone()  # type: ignore[misc]
        claiming.execute("select pgchan.register(%s, 'w', 'host', 1)", [worker])
        for run in ("first", "second"):
            claiming.execute("select pgchan.start('wf', '[]', %s)", [run])
        locking.execute("select pgchan.publish('first', '1')")
        claim = "select run from pgchan.claim(%s, array['default'], array['wf'], 10)"
        assert claiming.execute(claim, [worker]).fetchall() == [("second",)]
        locking.commit()
        assert claiming.execute(claim, [worker]).fetchall() == [("first",)]


async def test_the_runs_of_a_dead_worker_are_taken_as_their_channels_are_free(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as reaping, psycopg.connect(dsn) as locking:
        (worker,) = reaping.execute("select pgchan.new_worker()").fetchone()  # type: ignore[misc]
        reaping.execute("select pgchan.register(%s, 'w', 'host', 1)", [worker])
        for run in ("first", "second"):
            reaping.execute("select pgchan.start('wf', '[]', %s)", [run])
        reaping.execute("select pgchan.claim(%s, array['default'], array['wf'], 10)", [worker])
        locking.execute("select pgchan.publish('first', '1')")
        states = "select id, state from pgchan.run_status order by id"
        assert reaping.execute("select pgchan.reap(%s)", [worker]).fetchone() == (None,)
        assert reaping.execute(states).fetchall() == [("first", "running"), ("second", "scheduled")]
        locking.commit()
        assert reaping.execute("select pgchan.reap(%s)", [worker]).fetchone() == (1,)
        assert reaping.execute(states).fetchall() == [("first", "scheduled"), ("second", "scheduled")]


# Entries, each to a channel that is in another state, and what becomes of them.
LONE: dict[str, tuple[dict[str, Any], str]] = {
    "open": ({}, "appended"),
    "open, with a new key": ({"key": "new"}, "appended"),
    "keyed, the same": ({"key": "k"}, "repeated"),
    "keyed, another body": ({"key": "k", "body": b"2"}, "conflict"),
    "keyed, another kind": ({"key": "k", "kind": 1}, "conflict"),
    "closed": ({}, "closed"),
    "closed, the same": ({"key": "k"}, "repeated"),
    "deleted": ({}, "missing"),
    "locked": ({}, "locked"),
    "owned": ({"fence": 7, "owner": 1, "step": "s", "attempt": 2, "key": "s", "inbox": 3}, "appended"),
    "owned, output": ({"fence": 7, "owner": 1, "step": "s", "attempt": 2, "void_from": 1, "inbox": 3}, "appended"),
    "owned by another": ({"fence": 6, "owner": 1, "step": "s", "attempt": 2, "key": "s"}, "fenced"),
    "owned by another, the same": ({"fence": 6, "key": "k"}, "fenced"),
    "pgchan:journal:x": ({}, "fenced"),
}


@pytest.mark.parametrize("case", LONE)
def test_a_lone_entry_in_plain_values_does_what_it_does_in_arrays(case: str, dsn: str) -> None:
    facts, expected = LONE[case]
    name = case.partition(",")[0]
    found = []
    for in_values in (True, False):
        with psycopg.connect(dsn, autocommit=True) as connection, psycopg.connect(dsn) as locking:
            ((id,),) = connection.execute(
                "insert into pgchan.channels (name, epoch, closed_at, head)"
                " values (%s, 7, case when %s then now() end, 1) returning id", [name, name == "closed"],
            ).fetchall()  # fmt: skip
            connection.execute(
                "insert into pgchan.messages (channel_id, position, at, kind, key, body)"
                " values (%s, 1, now(), 0, 'k', '1')", [id],
            )  # fmt: skip
            if name == "deleted":
                connection.execute("delete from pgchan.channels where id = %s", [id])
            if name == "locked":
                locking.execute("select from pgchan.channels where id = %s for update", [id])
            entry = Entry(name, **{"body": b"1", "channel_id": id, **facts})
            batch = Batch()
            batch.in_values = in_values
            batch.add(Queued(entry, None, 0.0))
            statement, arguments = batch.call(20)
            assert in_values == ("write_message(" in statement or "write_entry(" in statement)
            with psycopg.RawCursor(connection) as cursor:
                row = cursor.execute(statement, arguments).fetchone()  # type: ignore[arg-type]
            assert row is not None
            (outcome,) = batch.outcomes(row)
            assert (outcome.at is None) == (outcome.position is None)
            locking.rollback()
            found.append((
                outcome.word, outcome.position, outcome.channel_id == id, batch.heads(row) and batch.heads(row)[0][1:],
                connection.execute("select head, inbox from pgchan.channels where id = %s", [id]).fetchall(),
                connection.execute(
                    "select position, kind, key, step, attempt, void_from, body from pgchan.messages"
                    " where channel_id = %s order by position", [id],
                ).fetchall(),
            ))  # fmt: skip
            connection.execute("delete from pgchan.messages where channel_id = %s", [id])
            connection.execute("delete from pgchan.channels where id = %s", [id])
    assert found[0] == found[1]
    assert found[0][0] == expected


def test_a_lone_entry_goes_in_arrays_where_the_schema_has_no_other_call() -> None:
    waiting = Waiting()
    waiting.put(queued("a", channel_id=1))
    batch = waiting.take()
    assert batch is not None
    assert "write_message(" in batch.call(50)[0]
    assert batch.may_go_singly(pgchan.SchemaMismatch("no such routine"))
    assert not batch.may_go_singly(pgchan.Unavailable("gone"))
    assert not batch.may_go_singly(pgchan.InvalidInput("a key"))
    alone = Batch()
    alone.add(batch.queued[0])
    assert "write_messages(" in alone.call(50)[0]
    assert not alone.may_go_singly(pgchan.SchemaMismatch("no such routine")), "or it would go round for ever"
