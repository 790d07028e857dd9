"""A channel that is rewritten as its final text: what its readers see then, wherever they stood, and what stays.

Long, because what a reader does with a reset is written down here as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psycopg
import pytest
from doors import Door, Reading, query, rows
from generated import effort, patience
from hypothesis import given
from hypothesis import strategies as st
from proxy import Proxy
from serving import Running, follow
from workers import Workers

import pgchan
from pgchan import Message, channels, errors
from pgchan.names import BODY_BYTES_MAX
from pgchan.server import Insecure, create_app

NOW = pgchan.Retry(attempts=3, delay=0)
COMPACT = "select outcome, removed from pgchan.compact_channel(%s)"


@pytest.fixture
def client(door: Door) -> Any:
    return door.client()


class Stored(NamedTuple):
    """A message as a test stores it, past the routines: with a step, in an attempt, or as a reset."""

    body: bytes
    step: str | None = None
    attempt: int | None = None
    kind: int = 0
    void_from: int | None = None
    key: str | None = None


def store(dsn: str, name: str, *messages: Stored | bytes) -> None:
    """A closed channel with these messages."""
    with psycopg.connect(dsn) as connection:
        connection.execute("select pgchan.create_channel(%s, 'application/json', null)", [name])
        for message in messages:
            stored = message if isinstance(message, Stored) else Stored(message)
            connection.execute(
                """select pgchan.append(array[c.id], null, null, null, null, null, null, null, null,
                     array[%s::smallint], array[%s::text], array[%s::text], array[%s::integer], array[%s::bigint],
                     array[%s::bytea])
                   from pgchan.channels c where c.name = %s""",
                [stored.kind, stored.key, stored.step, stored.attempt, stored.void_from, stored.body, name],
            )
        connection.execute("select pgchan.close_channel(%s)", [name])


def fold(messages: Sequence[Message]) -> list[Message]:
    """What stands: each reset takes what it voids. As pgchan.js does it."""
    standing: list[Message] = []
    for message in messages:
        if message.kind == "control" and message.body["type"] == "reset":
            step, attempt, start = (message.body.get(name) for name in ("step", "attempt", "from"))
            standing = [
                m for m in standing
                if m.position < start
                or (step is not None and not (m.kind == "message" and m.step == step and m.attempt < attempt))
            ]  # fmt: skip
        standing.append(message)
    return standing


def text(messages: Sequence[Message]) -> list[tuple[str | None, Any]]:
    """Steps and bodies of what stands, with the text of a step in one piece wherever nothing else stands between."""
    found: list[tuple[str | None, Any]] = []
    for message in fold(messages):
        if message.kind != "message":
            continue
        step, body = message.step, message.body
        if found and isinstance(body, str) and found[-1][0] == step and isinstance(found[-1][1], str):
            found[-1] = (step, found[-1][1] + body)
        else:
            found.append((step, body))
    return found


async def everything(channel: Any, after: int | str = 0) -> list[Message]:
    """All behind a position or cursor; a reader that is told where to go on goes on there."""
    try:
        found: list[Message] = await channel.read(after=after, limit=1000)
    except errors.Trimmed as trimmed:
        found = await channel.read(after=trimmed.cursor, limit=1000)
    return found


# ------------------------------------------------------------------------------------------------ a run


@pgchan.workflow
async def essay(run: pgchan.Run) -> str:
    """All that a run's channel may hold."""
    tries: list[int] = []

    async def write() -> str:
        tries.append(1)
        for word in ("The ", "tides ") if len(tries) < 2 else ("It ", "depends", '."\\\n'):
            await run.publish(word, wait=False)
        if len(tries) < 2:
            raise OSError
        return "".join(("It ", "depends"))

    async def listen() -> None:
        await run.publish("Go on?", wait=False)
        await run.publish({"buttons": ["yes"]}, wait=False)
        await run.receive()

    await run.publish("Hear, ")
    await run.publish("hear: ")
    await run.step(write, retry=NOW)
    await run.step(listen)
    await run.publish("The end", wait=False)
    await run.publish(".", wait=False)
    return "done"


FINAL = [(None, "Hear, hear: "), ("write", 'It depends."\\\n'), ("listen", "Go on?"), ("listen", {"buttons": ["yes"]}),
         (None, "The end.")]  # fmt: skip


@pytest.fixture
async def ended(client: Any, workers: Workers) -> Any:
    """The handle of such a run that has succeeded."""
    await workers.start(essay)
    handle = await client.start(essay, id="essay")
    await handle.signal("yes", key="k")
    assert await handle.result(10) == "done"
    return handle


async def test_a_run_that_has_ended_becomes_its_final_text(client: Any, ended: Any) -> None:
    channel = client.channel("essay")
    before = await channel.read(view="raw")
    assert text(before) == FINAL
    removed = await channel.compact()
    after = await channel.read(view="raw")
    assert len(after) == len(before) - removed == 7
    reset, *messages, end = after
    assert (reset.position, reset.kind, reset.body) == (len(before) + 1, "control", {"type": "reset", "from": 1})
    assert [(m.step, m.body) for m in messages] == FINAL
    assert [(m.step, m.attempt) for m in messages[:2]] == [(None, None), ("write", 2)]
    assert end.body == {"type": "ended", "state": "succeeded"}
    assert [m.position for m in after] == [len(before) + n for n in range(1, 8)]
    assert all(m.at > before[-1].at for m in after)
    info = await channel.info()
    assert (info.head, info.trimmed, info.closed) == (len(before) + 7, len(before), True)


async def test_every_reader_ends_with_the_final_text_wherever_he_stood(client: Any, ended: Any) -> None:
    channel = client.channel("essay")
    before = await channel.read(view="raw", limit=1000)
    await channel.compact()
    for seen in range(len(before) + 1):
        for after in {seen, before[seen - 1].cursor if seen else 0}:
            if 0 < seen < len(before):
                with pytest.raises(errors.Trimmed) as caught:
                    await channel.read(after=after)
                assert (caught.value.first, caught.value.last) == (len(before) + 1, len(before) + 7)
            assert text(before[:seen] + await everything(channel, after)) == FINAL, (seen, after)
            tail = channel.tail(after=after)
            told: list[Message] = []
            try:
                async for page in tail.pages():
                    told += page
            except errors.Trimmed as trimmed:
                assert told == []
                async for page in channel.tail(after=trimmed.cursor).pages():
                    told += page
            assert text(before[:seen] + told) == FINAL, (seen, after)


async def test_over_http_readers_see_the_final_text_and_the_end(dsn: str, workers: Workers) -> None:
    async with pgchan.AsyncClient(dsn) as client, Running(create_app(client, auth=Insecure())) as served:
        await workers.start(essay)
        handle = await client.start(essay, id="essay")
        await handle.signal("yes")
        await handle.result(10)
        before = await handle.channel.read(view="raw", limit=1000)
        await handle.channel.compact()
        for seen in (0, 2, len(before)):
            events: list[dict[str, Any]] = []
            cursor = before[seen - 1].cursor if seen else ""
            headers = {"Last_Event_ID": cursor} if cursor else {}
            async with follow(served.port, "/channels/essay", **headers) as reader:
                while (block := await reader.next()).get("event") != "end":
                    if block.get("event") == "reset":
                        assert json.loads(block["data"])["reason"] == "trimmed"
                        assert 0 < seen < len(before)
                    elif "data" in block:
                        events.append(json.loads(block["data"]))
            kinds = [event["body"]["type"] if event["kind"] == "control" else event["body"] for event in events]
            assert kinds == ["reset", *(body for _, body in FINAL), "ended"]


async def test_the_run_itself_stays_as_it_was(client: Any, ended: Any, dsn: str, workers: Workers) -> None:
    status, journal = await ended.status(), await ended.journal()
    await client.channel("essay").compact()
    assert (await ended.status(), await ended.journal(), await ended.result(1)) == (status, journal, "done")
    fork = await ended.fork("listen", id="forked")
    await fork.signal("again")
    assert await fork.result(10) == "done"
    with pytest.raises(errors.ChannelClosed):
        await ended.signal("yes", key="k")
    await ended.delete()
    left = "select from pgchan.messages where channel_id not in (select id from pgchan.channels)"
    assert query(dsn, left) == []


async def test_a_cancelled_run_too_but_none_that_goes_on_or_may(client: Any, dsn: str, workers: Workers) -> None:
    @pgchan.workflow
    async def fails(run: pgchan.Run) -> None:
        await run.publish("a")
        await run.publish("b")
        raise ValueError

    await client.start("other", id="r")
    for body in ("a", "b", "c"):
        await client.channel("r").publish(body)
    with pytest.raises(errors.InvalidInput, match="is open; close it first, or wait until its run has ended"):
        await client.channel("r").compact()
    await client.run("r").cancel()
    assert await client.channel("r").compact() == 1
    assert [m.body for m in await client.channel("r").read()] == [
        {"type": "reset", "from": 1}, "abc", {"type": "ended", "state": "cancelled"},
    ]  # fmt: skip

    await workers.start(fails)
    handle = await client.start(fails, id="f")
    with pytest.raises(pgchan.RunFailed):
        await handle.result(10)
    before = rows(dsn)
    with pytest.raises(errors.InvalidInput, match="failed run, which may be resumed"):
        await client.channel("f").compact()
    assert rows(dsn) == before


# ------------------------------------------------------------------------------------------------ what is joined


async def test_what_is_text_is_joined_and_nothing_else(client: Any, dsn: str) -> None:
    bodies = [b'"a"', b'"\\"\\\\"', b'""', '"é😀\u2028"'.encode(), b'"\\u0000\\uD7FF\\n"', b'{"a":1}', b'"b"', b'"c"',
              b"1", b'"d"', b"null", b'["e"]']  # fmt: skip
    store(dsn, "c", *bodies)
    assert await client.channel("c").compact() == 12 - 8
    messages = (await client.channel("c").read())[1:]
    assert [m.raw for m in messages] == [
        '"a\\"\\\\é😀\u2028\\u0000\\uD7FF\\n"'.encode(), b'{"a":1}', b'"bc"', b"1", b'"d"', b"null", b'["e"]',
    ]  # fmt: skip
    assert messages[0].body == 'a"\\é😀\u2028\0\ud7ff\n'


async def test_what_only_looks_like_text_stays_alone(client: Any, dsn: str) -> None:
    """Nothing of pgchan's stores such bodies, but whoever may call its routines can."""
    odd = [b'"', b'"a\\"', b'"\\ud83d"', b'"\\uDE00"', b'"\xff"', b'"\0"', b'"\n"', b' "a"', b'"a" ', b'"\\x"',
           b'"a"b"', b"", b'"\\u12"']  # fmt: skip
    store(dsn, "c", b'"x"', b'"y"', *[body for one in odd for body in (one, b'"x"')], b'"y"', b'"z"')
    assert await client.channel("c").compact() == 2
    found = query(dsn, "select body from pgchan.messages where kind = 0 order by position")
    assert [bytes(body) for (body,) in found] == [
        b'"xy"', *[body for one in odd for body in (one, b'"x"')][:-1], b'"xyz"',
    ]  # fmt: skip


async def test_messages_are_as_few_as_their_size_allows(client: Any, dsn: str) -> None:
    piece = BODY_BYTES_MAX // 3
    sizes = [piece - 2, piece, BODY_BYTES_MAX - 2 * piece, 1, 10, BODY_BYTES_MAX - 2, 5]
    store(dsn, "c", *(b'"' + b"x" * size + b'"' for size in sizes))
    assert await client.channel("c").compact() == 7 - 5
    assert [len(m.raw) for m in (await client.channel("c").read())[1:]] == [
        BODY_BYTES_MAX, 13, BODY_BYTES_MAX, 7,
    ]  # fmt: skip


async def test_text_of_one_step_is_not_joined_to_that_of_another(client: Any, dsn: str) -> None:
    one, two = Stored(b'"a"', "one", 1), Stored(b'"b"', "two", 1)
    store(dsn, "c", one, one, two, two, b'"c"', b'"c"', one._replace(attempt=1), one._replace(attempt=2))
    assert await client.channel("c").compact() == 3
    assert [(m.body, m.step, m.attempt) for m in (await client.channel("c").read())[1:]] == [
        ("aa", "one", 1), ("bb", "two", 1), ("cc", None, None), ("aa", "one", 2),
    ]  # fmt: skip


async def test_a_message_with_a_key_keeps_it_and_is_recognised(client: Any, dsn: str) -> None:
    channel = client.channel("c")
    for body, key in (("a", None), ("b", None), ("c", "mine"), ("d", None), ("e", None), ("f", None)):
        await channel.publish(body, key=key)
    await channel.close()
    assert await channel.compact() == 2
    assert [(m.body, m.key) for m in (await channel.read())[1:]] == [("ab", None), ("c", "mine"), ("def", None)]
    assert (await channel.publish("c", key="mine")).position == 9
    with pytest.raises(errors.IdempotencyConflict):
        await channel.publish("another", key="mine")
    with pytest.raises(errors.ChannelClosed):
        await channel.publish("c", key="other")


@pytest.mark.parametrize("bodies", [[], [b'"a"'], [b'"a"', b'"b"'], [b"1", b"2", b"3"], [b"1", b'"a"', b"2", b'"b"']])
async def test_nothing_is_done_where_nothing_is_to_be_gained(client: Any, dsn: str, bodies: list[bytes]) -> None:
    store(dsn, "c", *bodies)
    before = rows(dsn)
    assert await client.channel("c").compact() == 0
    assert rows(dsn) == before


async def test_what_cannot_be_compacted_says_why(client: Any, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ChannelNotFound):
        await client.channel("none").compact()
    await client.channel("text").create("text/plain")
    await client.channel("text").close()
    with pytest.raises(errors.InvalidInput, match="does not hold JSON"):
        await client.channel("text").compact()
    await client.channel("open").create()
    with pytest.raises(errors.InvalidInput, match="is open"):
        await client.channel("open").compact()
    store(dsn, "long")
    query(dsn, "update pgchan.channels set head = %s where name = 'long'", channels.COMPACTED_MESSAGES_MAX + 1)
    with pytest.raises(errors.InvalidInput, match="over 250,000 messages"):
        await client.channel("long").compact()
    with pytest.raises(psycopg.Error) as refused:  # a journal is what a run is resumed and forked from
        query(dsn, COMPACT, "pgchan:journal:1")
    assert refused.value.sqlstate == "PC001"


# ------------------------------------------------------------------------------------------------ again, or cut short


async def test_a_second_time_changes_nothing(client: Any, ended: Any, dsn: str) -> None:
    assert await client.channel("essay").compact() > 0
    once = rows(dsn)
    assert await client.channel("essay").compact() == 0
    assert rows(dsn) == once


async def test_also_after_it_was_trimmed(client: Any, dsn: str) -> None:
    store(dsn, "c", *[b'"a"'] * 5, b"1", *[b'"b"'] * 5)
    channel = client.channel("c")
    assert await channel.compact() == 7
    await channel.trim(before=13)  # the reset
    assert await channel.compact() == 0
    assert [m.body for m in await channel.read()] == ["aaaaa", 1, "bbbbb"]


async def test_what_was_trimmed_before_stays_with_those_who_have_read_it(client: Any, dsn: str) -> None:
    store(dsn, "c", *[b'"a"'] * 3, *[b'"b"'] * 3)
    channel = client.channel("c")
    before = await channel.read()
    await channel.trim(before=4)
    assert await channel.compact() == 1
    assert text(await channel.read()) == [(None, "bbb")]
    assert text(before + await channel.read(after=before[-1].cursor)) == [(None, "aaabbb")]


async def test_of_two_at_once_one_does_it(direct_dsn: str, block_until: Callable[..., None]) -> None:
    store(direct_dsn, "c", *[b'"a"'] * 5)
    with psycopg.connect(direct_dsn) as first, psycopg.connect(direct_dsn) as second:
        assert first.execute(COMPACT, ["c"]).fetchall() == [("compacted", 3)]
        other = asyncio.create_task(asyncio.to_thread(lambda: second.execute(COMPACT, ["c"]).fetchall()))
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        pid = second.info.backend_pid
        await asyncio.to_thread(block_until, lambda: query(direct_dsn, waits, pid) == [(True,)])
        first.commit()
        assert await other == [("compacted", 0)]
    assert query(direct_dsn, "select convert_from(body, 'UTF8') from pgchan.messages where kind = 0") == [('"aaaaa"',)]


async def test_who_dies_before_the_commit_has_done_nothing(direct_dsn: str) -> None:
    store(direct_dsn, "c", *[b'"a"'] * 5)
    before = rows(direct_dsn)
    with psycopg.connect(direct_dsn) as connection:
        assert connection.execute(COMPACT, ["c"]).fetchall() == [("compacted", 3)]
        query(direct_dsn, "select pg_terminate_backend(%s, 5000)", connection.info.backend_pid)
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    assert rows(direct_dsn) == before


async def test_after_a_lost_answer_it_is_called_again(dsn: str, direct_dsn: str) -> None:
    store(dsn, "its/name", *[b'"a"'] * 5)
    async with Proxy(direct_dsn) as proxy, pgchan.AsyncClient(proxy.dsn, control_dsn=proxy.dsn) as client:
        channel = client.channel("its/name")
        proxy.swallow(b"its/name")  # the call, and not what prepares it
        with pytest.raises(errors.Indefinite):
            await channel.compact()
        assert await channel.compact() == 0
        assert [m.body for m in await channel.read()] == [{"type": "reset", "from": 1}, "aaaaa"]


async def test_a_reader_in_memory_is_given_the_reset_and_not_what_it_voids(
    client: Any, dsn: str, reading: Callable[[Any], Reading], wait_until: Any
) -> None:
    """The process remembers the old messages; a reader that stands among them is served from there."""
    channel = client.channel("c")
    seen = [await channel.publish(body) for body in ("a", "b")]
    keeper = reading(channel.tail(view="raw"))
    await keeper.has(2)
    for body in ("c", "d", "e"):
        await channel.publish(body)
    await keeper.has(5)
    with psycopg.connect(dsn) as connection:  # closed and compacted in one moment, so that the keeper is not at its end
        connection.execute("update pgchan.channels set closed_at = clock_timestamp() where name = 'c'")
        connection.execute(COMPACT, ["c"])
    await keeper.end()
    assert [m.body for m in keeper.messages] == ["a", "b", "c", "d", "e", {"type": "reset", "from": 1}, "abcde"]
    late = channels.without_void(keeper.messages[2:])
    assert text(seen + late) == [(None, "abcde")]
    assert [m.position for m in late] == [6, 7]


# ------------------------------------------------------------------------------------------------ the upkeep


async def test_retention_goes_on_with_what_is_there_now(client: Any, dsn: str) -> None:
    store(dsn, "c", *[b'"a"'] * 5, b"1", *[b'"b"'] * 5)
    channel = client.channel("c")
    await channel.compact()
    await channel.set_retention(messages=2)
    query(dsn, "select pgchan.upkeep()")
    assert [m.body for m in await channel.read()] == [1, "bbbbb"]
    await channel.set_retention(seconds=0.0)
    query(dsn, "select pgchan.upkeep()")
    assert await channel.read() == []
    assert await channel.compact() == 0


# ------------------------------------------------------------------------------------------------ any channel

JSON = st.sampled_from([b'"a"', b'"\\""', '"é"'.encode(), b'""', b'"\\\\"', b"1", b'{"b":2}'])
SAID = st.lists(
    st.one_of(
        st.tuples(JSON, st.sampled_from([None, "s", "t"])).map(lambda drawn: Stored(*drawn)),
        st.tuples(JSON, st.sampled_from(["k", "pgchan:said:1:1"])).map(lambda drawn: Stored(drawn[0], key=drawn[1])),
        st.just(Stored(b"0", kind=1)),
        st.just(Stored(b'{"type":"resumed"}', kind=2)),
        st.sampled_from(["s", "t"]),  # this step starts over
    ),
    max_size=14,
)


def as_stored(said: list[Any]) -> list[Stored]:
    """With the attempts that the resets make of it, and each key once."""
    attempts = {"s": 1, "t": 1}
    keys: set[str] = set()
    found: list[Stored] = []
    for one in said:
        if isinstance(one, str):
            attempts[one] += 1
            reset = {"type": "reset", "step": one, "attempt": attempts[one], "from": 1}
            found.append(Stored(json.dumps(reset).encode(), one, attempts[one], 2, 1))
        elif one.step is not None:
            found.append(one._replace(attempt=attempts[one.step]))
        else:
            found.append(one._replace(attempt=None, key=None if one.key in keys else one.key))
            if one.key:
                keys.add(one.key)
    return found


@patience(300)
def test_any_channel_reads_as_before_from_any_place(dsn: str) -> None:
    numbers = iter(range(10**9))
    with pgchan.Client(dsn) as client:

        @effort(80)
        @given(SAID)
        def check(said: list[Any]) -> None:
            channel = client.channel(f"c/{next(numbers)}")
            store(dsn, channel.name, *as_stored(said))
            before = channel.read(view="raw", limit=1000)
            final = text(before)
            assert text(channel.read(limit=1000)) == final
            removed = channel.compact()
            after = channel.read(view="raw", limit=1000)
            assert len(after) == len(before) - removed
            assert channel.compact() == 0
            assert channel.read(view="raw", limit=1000) == channel.read(limit=1000) == after or removed == 0
            for seen in range(len(before) + 1):
                try:
                    rest = channel.read(after=before[seen - 1].cursor if seen else 0, limit=1000)
                except errors.Trimmed as trimmed:
                    rest = channel.read(after=trimmed.cursor, limit=1000)
                assert text(before[:seen] + rest) == final
            if removed:
                assert [m.kind for m in after] == ["control"] + ["message"] * (len(after) - 1)

        check()

