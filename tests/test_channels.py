"""Channels, through both doors: what publish, read, tail, close, trim and delete promise.

Long, because it is the specification.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from doors import Door, Reading, query

from pgchan import errors, names
from pgchan.names import format_cursor

WAKEUP_SECONDS = 0.8  # less than a sweep: whoever is this fast was woken


# ------------------------------------------------------------------------------------------------ publish


async def test_positions_are_dense_and_what_is_read_is_what_publish_returned(client: Any) -> None:
    channel = client.channel("chat/42")
    published = [await channel.publish({"n": n}) for n in range(5)]
    assert [message.position for message in published] == [1, 2, 3, 4, 5]
    assert await channel.read() == published
    first = published[0]
    assert (first.channel, first.kind, first.body, first.raw) == ("chat/42", "message", {"n": 0}, b'{"n":0}')
    assert abs(datetime.now(UTC) - first.at) < timedelta(minutes=1)


async def test_a_body_comes_back_as_it_was_given(client: Any) -> None:
    channel = client.channel("bodies")
    bodies = [None, True, 0, -1.5, 2**70, "", "\0 naïve ☃ \r\n", [], {}, {"b": 1, "a": [{"": None}]}]
    for body in bodies:
        await channel.publish(body)
    assert [message.body for message in await channel.read()] == bodies


async def test_a_key_is_stored_once(client: Any) -> None:
    channel = client.channel("keyed")
    first = await channel.publish("paid", key="order-1")
    await channel.publish("other")
    assert await channel.publish("paid", key="order-1") == first
    assert [message.key for message in await channel.read()] == ["order-1", None]
    assert await channel.publish("paid", key="order-1") == first
    with pytest.raises(errors.IdempotencyConflict):
        await channel.publish("refunded", key="order-1")
    assert (await channel.publish("more", key="order-2")).position == 3
    assert (await channel.info()).head == 3


async def test_a_key_with_another_body_is_a_conflict_that_names_the_first_position(client: Any) -> None:
    channel = client.channel("keyed")
    await channel.publish("before")
    await channel.publish("paid", key="order-1")
    with pytest.raises(errors.IdempotencyConflict) as caught:
        await channel.publish("refunded", key="order-1")
    assert (caught.value.channel, caught.value.key, caught.value.position) == ("keyed", "order-1", 2)
    assert (await channel.info()).head == 2


async def test_a_key_is_recognised_after_the_channel_was_closed(client: Any) -> None:
    """Its sender may have lost the answer; that somebody closed the channel since changes nothing about it."""
    channel = client.channel("keyed")
    first = await channel.publish("paid", key="order-1")
    await channel.close()
    assert await channel.publish("paid", key="order-1") == first
    assert await channel.publish_many(["paid"], keys=["order-1"]) == [first]
    with pytest.raises(errors.IdempotencyConflict):
        await channel.publish("refunded", key="order-1")
    with pytest.raises(errors.ChannelClosed):
        await channel.publish("paid", key="order-2")


async def test_fifty_publishers_of_one_key_store_one_message(door: Door) -> None:
    clients = [door.client() for _ in range(5)]
    stored = await asyncio.gather(
        *(client.channel("race").publish("once", key="k") for client in clients for _ in range(10))
    )
    assert all(message == stored[0] for message in stored)
    assert (await clients[0].channel("race").info()).head == 1


async def test_a_batch_is_stored_in_order_and_together(client: Any) -> None:
    channel = client.channel("batch")
    await channel.publish("first")
    stored = await channel.publish_many(["a", "b", "c"], keys=["ka", None, "kc"])
    assert [(m.position, m.body, m.key) for m in stored] == [(2, "a", "ka"), (3, "b", None), (4, "c", "kc")]
    assert len({message.at for message in stored}) == 1
    assert await channel.read(after=1) == stored
    assert await channel.publish_many([]) == []


async def test_a_batch_with_one_refused_entry_stores_nothing(client: Any) -> None:
    channel = client.channel("batch")
    await channel.publish("old", key="k")
    with pytest.raises(errors.IdempotencyConflict):
        await channel.publish_many(["a", "new", "c"], keys=[None, "k", "kc"])
    with pytest.raises(errors.InvalidInput, match="lone surrogate"):
        await channel.publish_many(["a", "\ud800"])
    with pytest.raises(errors.InvalidInput, match="differ"):
        await channel.publish_many(["a", "b"], keys=["x", "x"])
    with pytest.raises(errors.InvalidInput, match="one per body"):
        await channel.publish_many(["a", "b"], keys=["x"])
    assert (await channel.info()).head == 1


async def test_a_repeated_batch_returns_the_first_messages(client: Any) -> None:
    channel = client.channel("batch")
    first = await channel.publish_many(["a", "b"], keys=["1", "2"])
    again = await channel.publish_many(["a", "b", "c"], keys=["1", "2", "3"])
    assert again == await channel.read()
    assert again[:2] == first


async def test_a_batch_past_the_limits_of_one_call_is_still_all_or_nothing(client: Any) -> None:
    channel = client.channel("large")
    stored = await channel.publish_many(list(range(2500)))
    assert [message.position for message in stored] == list(range(1, 2501))
    await channel.publish("taken", key="last")
    with pytest.raises(errors.IdempotencyConflict):
        await channel.publish_many(list(range(1500)), keys=[*(f"k{n}" for n in range(1499)), "last"])
    assert (await channel.info()).head == 2501


async def test_publishing_to_a_closed_channel_is_refused(client: Any) -> None:
    channel = client.channel("closed")
    await channel.publish("last")
    await channel.close()
    await channel.close()
    for refused in (channel.publish("more"), channel.publish_many(["more"]), channel.publish("more", key="k")):
        with pytest.raises(errors.ChannelClosed) as caught:
            await refused
        assert caught.value.channel == "closed"
    assert (await channel.info()).closed
    assert len(await channel.read()) == 1


# ------------------------------------------------------------------------------------------------ content types


async def test_text_and_bytes_have_channels_of_their_own_types(door: Door) -> None:
    client, other = door.client(), door.client()
    await client.channel("text").create("text/plain; charset=utf-8")
    await client.channel("image").create("image/png")
    await client.channel("text").publish("grün\0\r\n")
    await other.channel("text").publish("by a process that did not know")
    await other.channel("image").publish(b"\x00\xff\x89PNG")
    assert [m.body for m in await other.channel("text").read()] == ["grün\0\r\n", "by a process that did not know"]
    assert [m.body for m in await client.channel("image").read()] == [b"\x00\xff\x89PNG"]
    assert (await client.channel("image").info()).content_type == "image/png"


async def test_a_body_that_does_not_fit_the_type_is_refused(door: Door) -> None:
    client, other = door.client(), door.client()
    await client.channel("image").create("image/png")
    for writer in (client, other):
        for body in ("text", {"a": 1}, 1):
            with pytest.raises(errors.InvalidInput):
                await writer.channel("image").publish(body)
        with pytest.raises(errors.InvalidInput):
            await writer.channel("json").publish(b"bytes")
        with pytest.raises(errors.InvalidInput):
            await writer.channel("image").publish_many([b"fits", "does not"])
    assert (await client.channel("image").info()).head == 0


async def test_text_that_is_not_utf8_is_readable_and_its_bytes_are_kept(client: Any) -> None:
    channel = client.channel("latin")
    await channel.create("text/plain")
    await channel.publish(b"gr\xfcn")
    (message,) = await channel.read()
    assert (message.raw, message.body) == (b"gr\xfcn", "gr\N{REPLACEMENT CHARACTER}n")
    assert json.loads(message.to_json())["body"] == message.body


async def test_creating_again_with_another_type_is_refused(client: Any) -> None:
    await client.channel("c").create("text/plain")
    await client.channel("c").create("text/plain")
    with pytest.raises(errors.InvalidInput, match="text/plain"):
        await client.channel("c").create()


async def test_after_delete_a_name_begins_anew_with_the_type_of_its_first_publish(door: Door) -> None:
    client, other = door.client(), door.client()
    await client.channel("c").create("text/plain")
    await client.channel("c").publish("plain text")
    await other.channel("c").delete()
    assert (await client.channel("c").publish("a JSON string")).position == 1
    assert (await client.channel("c").info()).content_type == "application/json"
    await other.channel("c").delete()
    await other.channel("c").create("text/plain")
    assert [m.body for m in await client.channel("c").publish_many(["text"])] == ["text"]
    assert (await client.channel("c").read())[0].raw == b"text"


# ------------------------------------------------------------------------------------------------ read


async def test_a_channel_that_does_not_exist_reads_empty_and_cannot_be_managed(client: Any) -> None:
    channel = client.channel("nowhere")
    assert await channel.read() == []
    assert await channel.read(after="now") == []
    page = await channel.page()
    assert (page.messages, page.head, page.closed) == ([], 0, False)
    assert await channel.read(after=page.cursor) == []
    for missing in (channel.info(), channel.trim(1), channel.delete(), channel.close()):
        with pytest.raises(errors.ChannelNotFound) as caught:
            await missing
        assert caught.value.channel == "nowhere"


async def test_pages_follow_each_other_without_gap_or_overlap(client: Any) -> None:
    channel = client.channel("pages")
    stored = await channel.publish_many(list(range(25)))
    found, cursor = [], 0
    for expected in (10, 10, 5, 0):
        page = await channel.page(after=cursor, limit=10)
        assert len(page.messages) == expected
        assert (page.head, page.closed) == (25, False)
        found += page.messages
        cursor = page.cursor
    assert found == stored
    assert cursor == stored[-1].cursor


async def test_an_empty_page_repeats_the_cursor_it_was_asked_with(client: Any) -> None:
    channel = client.channel("pages")
    last = (await channel.publish_many([1, 2]))[-1]
    assert (await channel.page(after=last.cursor)).cursor == last.cursor
    assert (await channel.page(after="now")).cursor == last.cursor
    assert (await channel.page(after="now")).messages == []


async def test_a_page_is_bounded_in_bytes_and_the_rest_follows(client: Any) -> None:
    channel = client.channel("heavy")
    bodies = [str(n) * (names.BODY_BYTES_MAX - 2) for n in range(7)]
    for body in bodies:
        await channel.publish(body)
    found, cursor = [], 0
    while page := await channel.page(after=cursor, limit=1000):
        assert sum(len(message.raw) for message in page.messages) <= names.PAGE_BYTES_MAX
        found += [message.body for message in page.messages]
        cursor = page.cursor
        if not page.messages:
            break
    assert found == bodies


async def test_channels_are_listed_by_prefix_in_order_of_name(client: Any) -> None:
    for name in ("b/2", "a", "b/1", "b_1", "b-1", "c"):
        await client.channel(name).publish(1)
    assert [info.name for info in await client.channels(prefix="b/")] == ["b/1", "b/2"]
    assert [info.name for info in await client.channels(prefix="b_")] == ["b_1"]
    assert [info.name for info in await client.channels(limit=2, after="a")] == ["b-1", "b/1"]
    for bad in ("\ud800", "\0", 1, "x" * 201):
        with pytest.raises(errors.InvalidInput):
            await client.channels(prefix=bad)
        with pytest.raises(errors.InvalidInput):
            await client.channels(after=bad)


# ------------------------------------------------------------------------------------------------ cursors


@pytest.mark.parametrize("kind", ["position", "cursor"])
async def test_a_reader_resumes_behind_the_cursor_it_was_given(client: Any, kind: str) -> None:
    channel = client.channel("resume")
    stored = await channel.publish_many(list(range(10)))
    for position in (0, 1, 5, 9, 10):
        own = stored[position - 1].cursor if position and kind == "cursor" else position
        assert await channel.read(after=own) == stored[position:]
        async with asyncio.timeout(5):
            found = await channel.tail(after=own).next_page(0.01)
        assert found == stored[position:]


async def test_the_cursor_of_nothing_reads_from_the_start(client: Any) -> None:
    channel = client.channel("resume")
    start = (await channel.page()).cursor
    stored = await channel.publish_many([1, 2])
    assert await channel.read(after=start) == stored
    await channel.trim(2)
    assert await channel.read(after=start) == stored[1:]
    assert await channel.read(after=0) == stored[1:]


async def test_a_position_past_the_head_is_lost_history(client: Any) -> None:
    channel = client.channel("resume")
    await channel.publish_many([1, 2])
    for after in (3, 10**15, format_cursor(3, 1)):
        with pytest.raises(errors.HistoryLost) as caught:
            await channel.read(after=after)
        assert (caught.value.channel, caught.value.first, caught.value.last) == ("resume", 1, 2)
    with pytest.raises(errors.HistoryLost):
        await client.channel("nowhere").read(after=1)
    with pytest.raises(errors.HistoryLost):
        await anext(client.channel("resume").tail(after=3).__aiter__())


async def test_a_cursor_behind_the_trim_boundary_is_told_where_to_go_on(client: Any) -> None:
    channel = client.channel("trimmed")
    stored = await channel.publish_many(list(range(1, 11)))
    await channel.trim(6)
    for after in (1, 4, stored[3].cursor):
        with pytest.raises(errors.Trimmed) as caught:
            await channel.read(after=after)
        assert (caught.value.first, caught.value.last) == (6, 10)
        assert await channel.read(after=caught.value.cursor) == stored[5:]
    for after in (5, stored[4].cursor, 0):
        assert await channel.read(after=after) == stored[5:]
    with pytest.raises(errors.Trimmed):
        await anext(channel.tail(after=stored[0].cursor).__aiter__())


async def test_trimming_everything_leaves_a_channel_that_goes_on(client: Any) -> None:
    channel = client.channel("trimmed")
    stored = await channel.publish_many([1, 2, 3])
    await channel.trim(4)
    await channel.trim(2)
    info = await channel.info()
    assert (info.head, info.trimmed) == (3, 3)
    page = await channel.page()
    assert page.messages == []
    assert (await channel.publish(4)).position == 4
    for after in (0, 3, stored[-1].cursor, page.cursor):
        assert [message.body for message in await channel.read(after=after)] == [4]


async def test_a_large_trim_goes_all_the_way(client: Any) -> None:
    channel = client.channel("trimmed")
    for _ in range(6):
        await channel.publish_many([0] * 1000)
    await channel.trim(5999)
    assert [message.position for message in await channel.read()] == [5999, 6000]


async def test_a_cursor_from_before_delete_and_create_is_lost_history(client: Any) -> None:
    channel = client.channel("again")
    old = await channel.publish_many([1, 2, 3])
    await channel.delete()
    with pytest.raises(errors.HistoryLost):
        await channel.read(after=old[1].cursor)
    await channel.publish_many([4, 5, 6])
    for message in old:
        with pytest.raises(errors.HistoryLost) as caught:
            await channel.read(after=message.cursor)
        assert [m.body for m in await channel.read(after=caught.value.cursor)] == [4, 5, 6]


async def test_a_tail_is_told_when_its_channel_was_deleted_and_made_again(
    client: Any, reading: Callable[[Any], Reading]
) -> None:
    channel = client.channel("again")
    await channel.publish_many([1, 2, 3])
    reader = reading(channel.tail())
    await reader.has(3)
    await channel.delete()
    with pytest.raises(errors.HistoryLost):
        await reader.end()
    assert reader.bodies == [1, 2, 3]
    await channel.publish(4)
    assert (await anext(channel.tail().__aiter__())).body == 4


async def test_a_rewritten_history_is_told_to_who_read_it(
    client: Any, dsn: str, reading: Callable[[Any], Reading]
) -> None:
    """What a crash under asynchronous commit, or a failover, does: the positions are handed out again."""
    channel = client.channel("rewritten")
    old = await channel.publish_many([1, 2, 3, 4])
    reader = reading(channel.tail())
    await reader.has(4)
    query(dsn, "delete from pgchan.messages where position > 2")
    query(dsn, "update pgchan.channels set head = 2")
    await channel.publish_many([13, 14, 15])
    with pytest.raises(errors.HistoryLost):
        await reader.end()
    assert reader.bodies == [1, 2, 3, 4]
    for position in (3, 4):
        with pytest.raises(errors.HistoryLost):
            await channel.read(after=old[position - 1].cursor)
    assert [m.body for m in await channel.read(after=old[1].cursor)] == [13, 14, 15]
    second = reading(channel.tail(after=old[1].cursor))
    await second.has(3)
    await channel.publish(16)
    await second.has(4)
    assert second.bodies == [13, 14, 15, 16]


async def test_a_history_that_became_shorter_is_told(client: Any, dsn: str, reading: Callable[[Any], Reading]) -> None:
    channel = client.channel("shorter")
    await channel.publish_many([1, 2, 3, 4])
    reader = reading(channel.tail())
    await reader.has(4)
    query(dsn, "delete from pgchan.messages where position > 2")
    query(dsn, "update pgchan.channels set head = 2")
    with pytest.raises(errors.HistoryLost) as caught:
        await reader.end()
    assert caught.value.last == 2


# ------------------------------------------------------------------------------------------------ views


async def _store_void_output(dsn: str, client: Any) -> None:
    """Two messages of an attempt that was given up, the reset, and two of the next attempt."""
    await client.channel("run").publish("before")
    (channel_id,) = query(dsn, "select id from pgchan.channels where name = 'run'")[0]
    reset = b'{"type":"reset","step":"write","attempt":2}'
    for kind, attempt, void_from, body in (
        (0, 1, None, b'"half"'), (0, 1, None, b'"a sentence"'), (2, 2, 2, reset), (0, 2, None, b'"whole"'),
    ):  # fmt: skip
        query(
            dsn,
            """select pgchan.append(array[%s::bigint], null, null, null, null, array[1], null, array[1], array[1],
                 array[%s::smallint], array[null::text], array['write'], array[%s::integer], array[%s::bigint],
                 array[%s::bytea])""",
            channel_id, kind, attempt, void_from, body,
        )  # fmt: skip


async def test_the_final_view_leaves_void_output_out_and_raw_has_all(client: Any, dsn: str) -> None:
    await _store_void_output(dsn, client)
    channel = client.channel("run")
    final, raw = await channel.read(), await channel.read(view="raw")
    assert [(m.position, m.kind) for m in final] == [(1, "message"), (4, "control"), (5, "message")]
    assert [m.position for m in raw] == [1, 2, 3, 4, 5]
    assert [(m.step, m.attempt) for m in raw[1:]] == [("write", 1), ("write", 1), ("write", 2), ("write", 2)]
    half = raw[1]
    assert [m.position for m in await channel.read(after=half.cursor)] == [4, 5]
    page = await channel.page(limit=2)  # two positions, of which one is void
    assert page.messages == final[:1]
    assert (await channel.page(after=page.cursor)).messages == final[1:]
    assert await channel.read(limit=2) == final[:2], "read goes on until it has what was asked for"


async def test_a_tail_gives_the_view_that_it_was_asked_for_from_memory_too(
    client: Any, dsn: str, reading: Callable[[Any], Reading]
) -> None:
    keeper = reading(client.channel("run").tail(view="raw"))
    await _store_void_output(dsn, client)
    await keeper.has(5)
    # The process now holds the messages in memory, from which later readers are served.
    final, raw = reading(client.channel("run").tail()), reading(client.channel("run").tail(view="raw"))
    await client.channel("run").close()
    await asyncio.gather(final.end(), raw.end())
    assert final.positions == [1, 4, 5]
    assert raw.positions == [1, 2, 3, 4, 5]


async def test_void_output_at_the_end_does_not_keep_a_reader_from_ending(
    client: Any, dsn: str, reading: Callable[[Any], Reading]
) -> None:
    await _store_void_output(dsn, client)
    query(dsn, "update pgchan.messages set void_from = 5, position = 6 where position = 4")
    query(dsn, "update pgchan.messages set position = 4 where position = 5")
    query(dsn, "update pgchan.messages set position = 5, void_from = 2, attempt = 3 where position = 6")
    await client.channel("run").close()
    reader = reading(client.channel("run").tail())
    await reader.end()
    assert reader.positions == [1, 5]
    page = await client.channel("run").page()
    assert int(page.cursor[:16]) == page.head == 5


# ------------------------------------------------------------------------------------------------ tail


async def test_a_tail_gives_what_is_there_and_then_what_comes(client: Any, reading: Callable[[Any], Reading]) -> None:
    channel = client.channel("live")
    await channel.publish_many([1, 2])
    reader = reading(channel.tail())
    await reader.has(2)
    await channel.publish(3)
    await reader.has(3, WAKEUP_SECONDS)
    assert reader.positions == [1, 2, 3]
    assert reader.tail.cursor == reader.messages[-1].cursor


async def test_a_tail_of_a_name_waits_for_its_first_message(door: Door, reading: Callable[[Any], Reading]) -> None:
    reader = reading(door.client().channel("not/yet").tail())
    other = door.client()
    await other.channel("something/else").publish("x")
    await other.channel("not/yet").publish("hello")
    await reader.has(1, WAKEUP_SECONDS)
    assert (await other.channel("not/yet").info()).head == 1
    await other.channel("not/yet").publish("again")
    await reader.has(2, WAKEUP_SECONDS)


async def test_a_name_is_woken_by_its_creation_whatever_creates_it(
    door: Door, dsn: str, reading: Callable[[Any], Reading]
) -> None:
    client = door.client()
    readers = [reading(client.channel(name).tail()) for name in ("by-sql", "by-create", "by-batch")]
    await client.channel("warm").publish(1)
    query(dsn, "select pgchan.publish('by-sql', '1')")
    await client.channel("by-create").create()
    await client.channel("by-create").publish(1)
    await client.channel("by-batch").publish_many([1])
    await asyncio.gather(*(reader.has(1, WAKEUP_SECONDS) for reader in readers))


async def test_a_tail_from_now_gives_only_what_comes(client: Any, reading: Callable[[Any], Reading]) -> None:
    channel = client.channel("live")
    await channel.publish_many([1, 2])
    tail = channel.tail(after="now")
    assert await tail.next_page(0.01) == []
    reader = reading(tail)
    await channel.publish(3)
    await reader.has(1, WAKEUP_SECONDS)
    assert reader.bodies == [3]


async def test_a_tail_ends_when_the_channel_is_closed_and_all_was_read(
    client: Any, reading: Callable[[Any], Reading]
) -> None:
    channel = client.channel("ends")
    await channel.publish_many([1, 2])
    waiting, starting = reading(channel.tail()), reading(channel.tail(after="now"))
    await waiting.has(2)
    await channel.publish(3)
    await channel.close()
    await asyncio.gather(waiting.end(WAKEUP_SECONDS), starting.end(WAKEUP_SECONDS))
    assert waiting.bodies == [1, 2, 3]
    late = reading(channel.tail())
    await late.end()
    assert late.bodies == [1, 2, 3]
    assert await channel.tail(after="now").next_page() is None


async def test_a_tail_catches_up_with_a_long_history_and_goes_on(
    client: Any, reading: Callable[[Any], Reading]
) -> None:
    channel = client.channel("long")
    for start in range(0, 3000, 1000):
        await channel.publish_many(list(range(start, start + 1000)))
    reader = reading(channel.tail())
    await channel.publish_many(list(range(3000, 3500)))
    await reader.has(3500)
    assert reader.bodies == list(range(3500))
    assert reader.positions == list(range(1, 3501))


async def test_a_slow_tail_loses_nothing_and_holds_little_in_memory(door: Door) -> None:
    """Far more arrives than the buffer of a followed channel holds; the reader goes back to the table."""
    client = door.client()
    tail = client.channel("flood").tail()
    fast = client.channel("flood").tail()
    for _ in range(6):
        await client.channel("flood").publish_many(["x" * 900] * 1000)
    while (await fast.next_page())[-1].position < 6000:
        pass
    db = client._db
    (followed,) = db.listener.hub._by_name.values()
    assert len(followed.buffer) <= 1000
    assert sum(len(message.raw) for message in followed.buffer) <= 1 << 20
    found: list[int] = []
    while len(found) < 6000:
        found += [message.position for message in await tail.next_page()]
    assert found == list(range(1, 6001))


async def test_two_readers_share_one_read(door: Door, reading: Callable[[Any], Reading]) -> None:
    client = door.client()
    readers = [reading(client.channel("shared").tail()) for _ in range(10)]
    await client.channel("shared").publish(0)
    await asyncio.gather(*(reader.has(1) for reader in readers))
    before = dict(client.stats)
    for n in range(1, 21):
        await client.channel("shared").publish(n)
        await asyncio.gather(*(reader.has(n + 1) for reader in readers))
    assert client.stats["reads"] - before["reads"] <= 25
    assert client.stats["pages"] - before["pages"] <= 2
    assert all(first is second for first, second in zip(readers[0].messages[1:], readers[9].messages[1:], strict=True))


async def test_a_reader_that_stops_leaves_nothing_behind(client: Any, reading: Callable[[Any], Reading]) -> None:
    channel = client.channel("left")
    await channel.publish(1)
    for _ in range(3):
        tail = channel.tail()
        assert [m.body for m in await tail.next_page()] == [1]
        assert await tail.next_page(0.02) == []
        tail.unfollow()
    listener = client._db.listener
    assert listener.hub.is_idle
    assert not getattr(listener, "_waiters", None)


async def test_a_tail_in_progress_is_told_that_its_client_was_closed(
    door: Door, reading: Callable[[Any], Reading]
) -> None:
    client = door.client()
    reader = reading(client.channel("c").tail())
    await client.channel("c").publish(1)
    await reader.has(1)
    await client.close()
    with pytest.raises(errors.InvalidInput, match="closed"):
        await reader.end(3)


# ------------------------------------------------------------------------------------------------ all at once


async def test_eight_writers_and_twenty_channels_make_no_gap_no_swap_and_no_repeat(
    door: Door, reading: Callable[[Any], Reading]
) -> None:
    writers, channels, rounds = 8, 20, 15
    clients = [door.client() for _ in range(4)]
    watching = clients[0]
    readers = {n: reading(watching.channel(f"c{n}").tail()) for n in range(channels)}

    async def write(writer: int) -> dict[int, list[int]]:
        client = clients[writer % len(clients)]
        positions: dict[int, list[int]] = {n: [] for n in range(channels)}
        for turn in range(rounds):
            order = [(n + writer) % channels for n in range(channels)]
            stored = await asyncio.gather(*(client.channel(f"c{n}").publish([writer, turn]) for n in order))
            for n, message in zip(order, stored, strict=True):
                positions[n].append(message.position)
        return positions

    acknowledged = await asyncio.gather(*(write(writer) for writer in range(writers)))
    for n, reader in readers.items():
        await reader.has(writers * rounds)
        assert reader.positions == list(range(1, writers * rounds + 1))
        for writer in range(writers):
            mine = [m for m in reader.messages if m.body[0] == writer]
            assert [m.body[1] for m in mine] == list(range(rounds))
            assert [m.position for m in mine] == acknowledged[writer][n]


async def test_a_rolled_back_transaction_leaves_no_hole(client: Any, dsn: str) -> None:
    channel = client.channel("hole")
    await channel.publish("before")
    with psycopg.connect(dsn) as connection:
        for n in range(5):
            connection.execute("select pgchan.publish('hole', to_jsonb(%s::int))", [n])
        connection.rollback()
    await channel.publish("after")
    assert [(m.position, m.body) for m in await channel.read()] == [(1, "before"), (2, "after")]


async def test_what_another_transaction_has_not_committed_is_not_read(
    client: Any, dsn: str, reading: Callable[[Any], Reading]
) -> None:
    channel = client.channel("pending")
    await channel.publish("first")
    reader = reading(channel.tail())
    await reader.has(1)
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.publish('pending', '\"second\"')")
        third = asyncio.create_task(channel.publish("third"))
        other = await client.channel("elsewhere").publish("goes ahead")
        assert other.position == 1
        assert len(reader.messages) == 1
        assert not third.done()
    assert (await third).position == 3
    await reader.has(3)
    assert reader.bodies == ["first", "second", "third"]


async def test_publishers_await_rising_positions(client: Any) -> None:
    channel = client.channel("rising")

    async def publish(n: int) -> list[int]:
        return [(await channel.publish([n, turn])).position for turn in range(20)]

    for positions in await asyncio.gather(*(publish(n) for n in range(8))):
        assert positions == sorted(positions)
    assert (await channel.info()).head == 160


# ------------------------------------------------------------------------------------------------ create, ttl


async def test_a_channel_with_a_ttl_is_removed_when_that_is_over(client: Any, dsn: str) -> None:
    await client.channel("short").create(ttl=0.001)
    await client.channel("long").create(ttl=timedelta(days=1))
    await client.channel("short").publish(1)
    info = await client.channel("long").info()
    assert info.expires_at - info.created_at == pytest.approx(timedelta(days=1), abs=timedelta(seconds=5))
    deadline = time.monotonic() + 5
    while query(dsn, "select pgchan.expire()") != [(1,)]:
        assert time.monotonic() < deadline
    assert [info.name for info in await client.channels()] == ["long"]
    assert query(dsn, "select count(*) from pgchan.messages") == [(0,)]
