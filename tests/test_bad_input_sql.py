"""Bad input from SQL: our own SQLSTATEs with a hint, PostgreSQL's own where the caller's session is at fault."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import on_database
from doors import query, rows

import pgchan
from pgchan import errors

Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def shared(admin: Connection, template: str, shared_server: tuple[str, str]) -> Iterator[str]:
    """A database that no case changes, with what they are about."""
    dsn, prefix = shared_server
    name = f"{prefix}_{os.getpid()}_bad_input_sql"
    admin.execute(f"create database {name} template {template}".encode())
    dsn = on_database(dsn, name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pgchan.publish('chat', '1', 'k'), pgchan.publish('closed', '1')")
        connection.execute("select pgchan.close_channel('closed')")
        connection.execute("select from pgchan.create_channel('text', 'text/plain', null)")
        connection.execute("select pgchan.start('w', '[1]', 'r'), pgchan.start('w', '[1]', 'ended')")
        connection.execute("select pgchan.signal('r', '1', 'k'), pgchan.cancel('ended')")
    yield dsn
    admin.execute(f"drop database {name} with (force)".encode())


def refused(dsn: str, statement: str) -> psycopg.Error:
    """The error of a statement that changes nothing."""
    before = rows(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(statement.encode())
    assert rows(dsn) == before
    return caught.value


# ---- arguments

ILLEGAL: dict[str, str] = {
    "publish, name null": "publish(null, '1')", "publish, name empty": "publish('', '1')",
    "publish, a space": "publish('a b', '1')", "publish, a line end": "publish(E'a\\n', '1')",
    "publish, not ASCII": "publish('ä', '1')", "publish, 201": "publish(repeat('x', 201), '1')",
    "publish, dots": "publish('a/../b', '1')", "publish, reserved": "publish('pgchan:x', '1')",
    "publish, body null": "publish('chat', null)", "publish, key empty": "publish('chat', '1', '')",
    "publish, key reserved": "publish('chat', '1', 'pgchan:x')",
    "publish, key of 201": "publish('chat', '1', repeat('x', 201))",
    "publish, key of 202 bytes": "publish('chat', '1', repeat('é', 101))",
    "publish, over 1 MiB": "publish('chat', to_jsonb(repeat('x', 1048575)))",
    "publish, 65 levels": "publish('chat', (repeat('[', 65) || repeat(']', 65))::jsonb)",
    "publish, 65 levels of objects": "publish('chat', (repeat('{\"a\":', 65) || '1' || repeat('}', 65))::jsonb)",
    "publish, 5,000 levels": "publish('chat', (repeat('[', 5000) || repeat(']', 5000))::jsonb)",
    "publish, to text": "publish('text', '2')", "read, name null": "read(null)", "read, after -1": "read('chat', -1)",
    "read, after null": "read('chat', null)", "read, max 0": "read('chat', 0, 0)",
    "read, max -1": "read('chat', 0, -1)", "read, max null": "read('chat', 0, null)",
    "start, workflow null": "start(null)", "start, workflow empty": "start('')",
    "start, 181": "start(repeat('w', 181))", "start, args an object": "start('w', '{}')",
    "start, args null": "start('w', null)", "start, args a JSON null": "start('w', 'null')",
    "start, args over 1 MiB": "start('w', to_jsonb(array[repeat('x', 1048573)]))",
    "start, args of 65 levels": "start('w', (repeat('[', 65) || repeat(']', 65))::jsonb)",
    "start, id reserved": "start('w', '[]', 'a/result')", "start, id with a space": "start('w', '[]', 'a b')",
    "start, queue empty": "start('w', '[]', 'new', '')", "start, queue null": "start('w', '[]', 'new', null)",
    "start, queue of 181": "start('w', '[]', 'new', repeat('q', 181))", "signal, run null": "signal(null, '1')",
    "signal, body null": "signal('r', null)", "signal, key empty": "signal('r', '1', '')",
    "signal, over 1 MiB": "signal('r', to_jsonb(repeat('x', 1048575)))",
    "trim past the head plus one": "trim_channel('chat', 3)",
}  # fmt: skip


@pytest.mark.parametrize("call", ILLEGAL.values(), ids=ILLEGAL)
def test_an_illegal_argument_is_pc001_with_a_hint(shared: str, call: str) -> None:
    error = refused(shared, f"select pgchan.{call}")
    assert error.sqlstate == "PC001"
    assert error.diag.message_hint
    assert len(str(error)) < 1000


REFUSED: dict[str, tuple[str, str]] = {
    "closed": ("publish('closed', '2')", "PC004"), "same key": ("publish('chat', '2', 'k')", "PC005"),
    "same key of a signal": ("signal('r', '2', 'k')", "PC005"), "signal to nobody": ("signal('no', '1')", "PC003"),
    "signal after the end": ("signal('ended', '1')", "PC004"), "run of another": ("start('v', '[1]', 'r')", "PC006"),
    "run with other arguments": ("start('w', '[2]', 'r')", "PC006"),
    "run on a closed": ("start('w', '[]', 'closed')", "PC004"),
    "a NUL in JSON": ("publish('chat', '\"\\u0000\"'::jsonb)", "22P05"), "NaN": ("publish('chat', 'NaN')", "22P02"),
    "a lone surrogate": ("publish('chat', '\"\\ud800\"'::jsonb)", "22P02"),
    "no JSON": ("publish('chat', '{')", "22P02"), "1e400000": ("publish('chat', '1e400000')", "22003"),
    "100,000 levels": ("publish('chat', repeat('[', 100000)::jsonb)", "54001"),
    "another type": ("publish('chat', 1)", "42883"),
    "an unknown name": ("publish(topic => 'chat', body => '1')", "42883"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "sqlstate"), REFUSED.values(), ids=REFUSED)
def test_each_refusal_has_its_sqlstate(shared: str, call: str, sqlstate: str) -> None:
    error = refused(shared, f"select pgchan.{call}")
    assert error.sqlstate == sqlstate
    assert sqlstate[:2] != "PC" or sqlstate in errors.BY_SQLSTATE


LIMITS: dict[str, tuple[int, str]] = {
    "a name of 200": (200, "publish(repeat('x', {n}), '1')"),
    "a key of 200 bytes": (200, "publish('c', '1', repeat('x', {n}))"),
    "a body of 1 MiB": (1 << 20, "publish('c', to_jsonb(repeat('x', {n} - 2)))"),
    "64 levels": (64, "publish('c', (repeat('[', {n}) || '1' || repeat(']', {n}))::jsonb)"),
    "64 levels of arguments": (64, "start('w', (repeat('[', {n}) || '1' || repeat(']', {n}))::jsonb)"),
    "a workflow of 180": (180, "start(repeat('w', {n}))"),
    "a queue of 180": (180, "start('w', '[]', null, repeat('q', {n}))"),
    "trim before head + 1": (3, "trim_channel('two', {n})"),
}


@pytest.mark.parametrize(("most", "call"), LIMITS.values(), ids=LIMITS)
def test_a_limit_is_where_it_says(dsn: str, most: int, call: str) -> None:
    query(dsn, "select pgchan.publish('two', '1'), pgchan.publish('two', '2')")
    assert refused(dsn, f"select pgchan.{call.format(n=most + 1)}").sqlstate == "PC001"
    query(dsn, f"select pgchan.{call.format(n=most - 1)}")
    query(dsn, f"select pgchan.{call.format(n=most)}")


def test_what_sql_publishes_at_its_limits_python_reads(dsn: str) -> None:
    query(dsn, "select pgchan.publish('c', (repeat('[', 64) || '1' || repeat(']', 64))::jsonb)")
    with pgchan.Client(dsn) as client:
        (message,) = client.channel("c").read()
        client.channel("c").publish(message.body)


# ---- rights


@pytest.fixture
def stranger(dsn: str) -> Iterator[tuple[str, str]]:
    """A role that may connect, and no more: the DSN with which it does, and its name."""
    name = f"stranger_{secrets.token_hex(4)}"
    query(dsn, f"create role {name} login")
    query(dsn, f"grant usage on schema pgchan to {name}")
    yield re.sub(r"//[^@/]*@", f"//{name}@", dsn), name
    query(dsn, f"drop owned by {name}")
    query(dsn, f"drop role {name}")


@pytest.mark.parametrize(
    "statement",
    [
        "select pgchan.publish('chat', '1')", "select pgchan.signal('r', '1')", "select pgchan.start('w')",
        "select pgchan.append_one(1, 0, null, null, '1')", "select pgchan.delete_channel('chat')",
        "insert into pgchan.messages (channel_id, position, kind, body) values (1, 2, 0, '1')",
        "update pgchan.channels set head = 0", "delete from pgchan.runs", "truncate pgchan.messages",
        "select from pgchan.messages", "select from pgchan.channel_status", "begin; lock table pgchan.channels",
        "call pgchan.call_enqueue('r', 'w', null, 'q', 0, null, null, '{}', null, null, null)",
        "drop function pgchan.publish", "create table pgchan.mine ()",
    ],
)  # fmt: skip
def test_a_stranger_may_nothing(stranger: tuple[str, str], statement: str) -> None:
    with psycopg.connect(stranger[0], autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            connection.execute(statement.encode())
        assert caught.value.sqlstate == "42501"


def test_who_may_publish_may_not_write_the_tables(stranger: tuple[str, str], dsn: str) -> None:
    query(dsn, f"grant execute on function pgchan.publish to {stranger[1]}")
    with psycopg.connect(stranger[0], autocommit=True) as connection:
        connection.execute("select pgchan.publish('chat', '1')")
        for statement in ("insert into pgchan.channels (name) values ('x')", "select from pgchan.messages"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
    assert query(dsn, "select body from pgchan.read('chat')") == [(1,)]


# ---- the caller's session and transaction


@pytest.mark.parametrize("call", ["publish('chat', '1')", "signal('r', '1')", "start('w')", "close_channel('chat')"])
def test_a_read_only_transaction_is_25006(shared: str, call: str) -> None:
    assert refused(shared, f"begin read only; select pgchan.{call}").sqlstate == "25006"
    with psycopg.connect(shared) as connection:
        connection.execute("set transaction read only")
        assert len(connection.execute("select from pgchan.read('chat')").fetchall()) == 1


@pytest.mark.parametrize("end", ["statement_timeout", "pg_cancel_backend"])
def test_a_call_that_is_ended_as_it_waits_stores_nothing(
    direct_dsn: str, end: str, block_until: Callable[..., None]
) -> None:
    dsn = direct_dsn  # it waits for a session, and cancels it, by its pid
    query(dsn, "select pgchan.publish('chat', '1')")
    before = rows(dsn)
    with psycopg.connect(dsn) as holder, psycopg.connect(dsn) as waiter, psycopg.connect(dsn, autocommit=True) as other:
        holder.execute("select from pgchan.channels where name = 'chat' for update")
        if end == "statement_timeout":
            waiter.execute("set statement_timeout = '50ms'")
        pid, found = waiter.info.backend_pid, []

        def publish() -> None:
            with pytest.raises(psycopg.errors.QueryCanceled) as caught:
                waiter.execute("select pgchan.publish('chat', '2')")
            found.append(caught.value.sqlstate)

        thread = threading.Thread(target=publish)
        thread.start()
        if end == "pg_cancel_backend":
            waits = "select from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
            block_until(lambda: other.execute(waits, [pid]).rowcount == 1)
            other.execute("select pg_cancel_backend(%s)", [pid])
        thread.join(10)
        assert found == ["57014"]
    assert rows(dsn) == before


@pytest.mark.parametrize(
    "call",
    [
        "call_enqueue('x', 'w', null, 'q', 0, null, null, '{}', null, null, null)",
        "call_deliver('r', '1', null, null, null, null, null, null, null)", "call_fork('r', 's', 'x', null, null)",
    ],
    ids=lambda call: call.partition("(")[0],
)  # fmt: skip
def test_a_procedure_cannot_be_called_in_a_transaction(shared: str, call: str) -> None:
    """The functions are what a transaction of one's own calls; the procedures commit."""
    error = refused(shared, f"begin; call pgchan.{call}")
    assert error.sqlstate == "2D000"


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_race_under_a_snapshot_is_40001_and_nothing_is_left(dsn: str, isolation: str) -> None:
    query(dsn, "select pgchan.publish('a', '1'), pgchan.publish('b', '1')")
    with psycopg.connect(dsn) as connection:
        connection.execute(f"set transaction isolation level {isolation}".encode())
        connection.execute("select pgchan.publish('a', '\"mine\"')")
        query(dsn, "select pgchan.publish('b', '\"other\"')")
        before = rows(dsn)
        with pytest.raises(psycopg.errors.SerializationFailure) as caught:
            connection.execute("select pgchan.publish('b', '\"mine\"')")
        assert caught.value.sqlstate == "40001"
        connection.rollback()
        assert rows(dsn) == before
        connection.execute(f"set transaction isolation level {isolation}".encode())
        connection.execute("select pgchan.publish('a', '2'), pgchan.publish('b', '2')")
    assert query(dsn, "select position from pgchan.read('b')") == [(1,), (2,), (3,)]


@pytest.mark.parametrize("how", ["SQL", "connection="])
def test_two_channels_in_opposite_order_are_40p01_for_one_of_two(dsn: str, how: str) -> None:
    query(dsn, "select pgchan.publish('a', '0'), pgchan.publish('b', '0')")
    client = pgchan.Client(dsn)

    def publish(connection: Connection, channel: str, body: str) -> None:
        if how == "SQL":
            connection.execute("select pgchan.publish(%s, to_jsonb(%s::text))", [channel, body])
        else:
            client.channel(channel).publish(body, connection=connection)

    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as two:
        publish(one, "a", "one")
        publish(two, "b", "two")
        outcomes: dict[str, str] = {}

        def go_on(connection: Connection, name: str, channel: str) -> None:
            try:
                publish(connection, channel, name)
                connection.commit()
                outcomes[name] = "committed"
            except psycopg.errors.DeadlockDetected as error:
                connection.rollback()
                outcomes[name] = str(error.sqlstate)

        threads = [threading.Thread(target=go_on, args=each) for each in ((one, "one", "b"), (two, "two", "a"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    client.close()
    assert sorted(outcomes.values()) == ["40P01", "committed"]
    (winner,) = [name for name, outcome in outcomes.items() if outcome == "committed"]
    for channel in ("a", "b"):
        assert query(dsn, "select position, body from pgchan.read(%s)", channel) == [(1, 0), (2, winner)]


# ---- in other files

ELSEWHERE = {
    "an error after the commit of a procedure": "test_outages.an_error_after_the_commit_is_never_not_done",
    "a race under a snapshot, from Python": "test_callers.under_repeatable_read_a_race_is_a_retryable_error",
    "a missing right, from Python": "test_outages.a_role_without_rights_is_told_what_it_lacks",
    "opposite order, deferred": "test_sqlalchemy.two_sessions_that_defer_in_opposite_order_do_not_deadlock",
    "names": "test_names.the_database_has_the_same_idea_of_a_name",
}


@pytest.mark.parametrize("name", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_case_is_tested_in_its_own_file(name: str) -> None:
    module, _, test = name.partition(".")
    text = (Path(__file__).parent / f"{module}.py").read_text("utf-8")
    assert re.search(rf"^(async )?def test_{test}\(", text, re.MULTILINE)
