"""Four roles, each with what it needs and nothing else; and nobody gets around them.

Long, because the first two tables are the specification: who may do what, and which right is granted to whom.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
import sqlalchemy
from cluster import Cluster, on_database
from doors import Door, Reading, query
from logins import GROUPS, Logins, as_role
from serving import Running, follow, message_of
from sqlalchemy.orm import Session
from workers import Processes, Workers, everything

import pgchan
from pgchan import db, doctor, errors, migrate
from pgchan.server import Insecure, create_app

PUBLISHER, SUBSCRIBER, WORKER, ADMIN = GROUPS
ALL = frozenset(GROUPS)
WRITES = ALL - {SUBSCRIBER}
READS = ALL - {PUBLISHER}
WORKS = frozenset({WORKER, ADMIN})
ADMINISTERS = frozenset({ADMIN})
NOBODY: frozenset[str] = frozenset()

# ------------------------------------------------------------------------------------------------ what is granted

# A routine that is added needs a decision here.
ROUTINES = {
    ALL: {"version", "serves"},
    WRITES: {
        "publish", "start", "signal", "cancel", "append_messages", "write_messages", "append_message",
        "write_message", "find_channel", "create_channel", "close_channel", "enqueue", "call_enqueue",
        "try_enqueue_many", "call_enqueue_many", "deliver", "call_deliver", "try_deliver_many", "call_deliver_many",
        "wake",
    },
    READS: {"read", "status", "as_json", "ping", "take_probe", "free_probe"},
    WORKS: {
        "append", "write", "append_entry", "write_entry", "announced", "claim", "suspend", "finish", "call_finish",
        "try_finish_many", "call_finish_many", "continue_run", "release", "upkeep", "expire",
        "new_worker", "register", "come_back", "leave", "reap", "take_lock", "await_lock", "free_lock", "free_locks",
    },
    ADMINISTERS: {
        "trim_channel", "compact_channel", "delete_channel", "resume", "fork", "call_fork", "set_retention",
        "set_channel_retention",
    },
    NOBODY: {
        "append_one", "check_body", "check_key", "check_name", "deliver_many", "enqueue_many", "finish_many",
        "force_durability", "grant_roles", "hold_families", "hold_family",
        "lock_channels", "lock_runs", "open_signals", "owns", "settle", "settle_many", "supersede", "delete_removed",
        "is_text", "remove_channels", "remove_ended", "remove_expired", "remove_free", "trim_kept",
    },
}  # fmt: skip
READABLE = {
    "channels", "messages", "workers", "retention", "removed", "final_messages", "run_status", "channel_status",
    "worker_status",
}  # fmt: skip
READABLE_COLUMNS_OF_RUNS = {
    "channel_id", "journal_id", "workflow", "version", "queue", "priority", "state", "wake_at", "worker", "attempt",
    "speaks_from", "deadline", "result", "error", "parent", "created_at", "started_at", "ended_at",
}  # fmt: skip

GRANTS = """
select c.kind, c.name, a.grantee::regrole::text, a.privilege_type, a.is_grantable
from (select 'routine' as kind, p.proname::text as name, p.proacl as acl, p.proowner as owner
      from pg_proc p where p.pronamespace = 'pgchan'::regnamespace
      union all
      select 'relation', r.relname, r.relacl, r.relowner from pg_class r where r.relnamespace = 'pgchan'::regnamespace
      union all
      select 'column', r.relname || '.' || c.attname, c.attacl, r.relowner
      from pg_attribute c join pg_class r on r.oid = c.attrelid where r.relnamespace = 'pgchan'::regnamespace
      union all
      select 'schema', n.nspname, n.nspacl, n.nspowner from pg_namespace n where n.nspname = 'pgchan') c,
     aclexplode(c.acl) a
where a.grantee <> c.owner
"""


def test_each_right_in_the_catalog_is_one_of_the_list(dsn: str) -> None:
    listed = [(name, role) for roles, names in ROUTINES.items() for name in names for role in roles]
    wanted = {("routine", name, role, "EXECUTE") for name, role in listed}
    wanted |= {("relation", name, role, "SELECT") for name in READABLE for role in READS}
    wanted |= {("column", f"runs.{name}", role, "SELECT") for name in READABLE_COLUMNS_OF_RUNS for role in READS}
    wanted |= {("schema", "pgchan", role, "USAGE") for role in ALL}
    found = query(dsn, GRANTS)
    assert {row[:4] for row in found} == wanted
    assert not any(row[4] for row in found), "nobody may pass a right on"


def test_each_routine_has_a_decision(dsn: str) -> None:
    decided = [name for names in ROUTINES.values() for name in names]
    there = [name for (name,) in query(dsn, "select proname from pg_proc where pronamespace = 'pgchan'::regnamespace")]
    assert sorted(decided) == sorted(there), "once each: an overload would be granted, or not, by accident"


def test_the_error_names_the_least_role(dsn: str) -> None:
    least = {WRITES: PUBLISHER, READS: SUBSCRIBER, ALL: SUBSCRIBER, WORKS: WORKER, ADMINISTERS: ADMIN}
    for roles, names in ROUTINES.items():
        for name in names if roles else ():
            said = str(db.translate("42501", f"permission denied for function {name}", None, writing=True))
            assert f"run: grant {least[roles]} to" in said, said
    for name in (*READABLE, "runs"):
        said = str(db.translate("42501", f"keine Berechtigung für Relation {name}", None, writing=False))
        assert f"run: grant {SUBSCRIBER} to" in said


def test_the_four_roles_cannot_log_in_and_are_no_members_of_each_other(dsn: str) -> None:
    rows = query(
        dsn,
        "select rolname, rolcanlogin or rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls,"
        " (select count(*) from pg_auth_members m where m.member = r.oid) from pg_roles r where rolname = any (%s)",
        list(GROUPS),
    )
    assert sorted(rows) == sorted((group, False, 0) for group in GROUPS)


# ------------------------------------------------------------------------------------------------ what works

Operation = Callable[[Any], Awaitable[Any]]


def operations() -> dict[str, tuple[frozenset[str], Operation]]:
    """Everything that a client does, by whom it may be done. Each finds what it needs in a database of `fill`."""

    async def first(tail: Any) -> Any:
        async with asyncio.timeout(10):
            return await anext(aiter(tail))

    async def twice(client: Any) -> None:
        await client.channel("chat").publish(1)
        await client.channel("chat").publish(2, key="by id, and with a key")

    return {
        "publish": (WRITES, lambda c: c.channel("new").publish(1)),
        "publish with a key": (WRITES, twice),
        "publish text": (WRITES, lambda c: c.channel("text").publish("words")),
        "publish bytes": (WRITES, lambda c: c.channel("bytes").publish(b"bytes")),
        "publish many": (WRITES, lambda c: c.channel("many").publish_many([1, 2])),
        "publish very many": (WRITES, lambda c: c.channel("many").publish_many(list(range(1500)))),
        "create": (WRITES, lambda c: c.channel("made").create(ttl=60)),
        "close": (WRITES, lambda c: c.channel("closing").close()),
        "start": (WRITES, lambda c: c.start("work", 1, id="started")),
        "start again": (WRITES, lambda c: c.start("work", id="scheduled")),
        "signal": (WRITES, lambda c: c.run("scheduled").signal({"a": 1}, key="k")),
        "cancel": (WRITES, lambda c: c.run("cancelling").cancel()),
        "read": (READS, lambda c: c.channel("chat").read()),
        "read raw": (READS, lambda c: c.channel("chat").read(view="raw")),
        "page": (READS, lambda c: c.channel("chat").page()),
        "tail": (READS, lambda c: first(c.channel("chat").tail())),
        "tail of a run": (READS, lambda c: first(c.run("done").tail())),
        "info": (READS, lambda c: c.channel("chat").info()),
        "channels": (READS, lambda c: c.channels()),
        "status": (READS, lambda c: c.run("done").status()),
        "result": (READS, lambda c: c.run("done").result(5)),
        "journal": (READS, lambda c: c.run("done").journal()),
        "runs": (READS, lambda c: c.runs(state="succeeded")),
        "workers": (READS, lambda c: c.workers()),
        "trim": (ADMINISTERS, lambda c: c.channel("chat").trim(2)),
        "delete": (ADMINISTERS, lambda c: c.channel("deleting").delete()),
        "delete a run": (ADMINISTERS, lambda c: c.run("done").delete()),
        "resume": (ADMINISTERS, lambda c: c.run("failed").resume()),
        "fork": (ADMINISTERS, lambda c: c.run("failed").fork("first", id="forked")),
    }


RECORD = b'{"type":"result","value":1}'


def fill(dsn: str) -> None:
    """One thing of each kind for `operations`: runs that are scheduled, done and failed; channels of three types."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pgchan.publish(c, '1') from unnest(array['chat', 'closing', 'deleting']) c")
        connection.execute("select pgchan.create_channel('text', 'text/plain', null)")
        connection.execute("select pgchan.create_channel('bytes', 'application/octet-stream', null)")
        connection.execute("select pgchan.register(pgchan.new_worker(), 'by hand', 'here', 1)")
        for run, state in ("done", "succeeded"), ("failed", "failed"):
            connection.execute("select pgchan.start('work', id => %s)", [run])
            claimed = connection.execute(
                "select channel_id, epoch, journal_id from pgchan.claim((select id from pgchan.workers), '{default}',"
                " '{work}', 1)"
            ).fetchone()
            assert claimed is not None
            connection.execute(
                "select pgchan.append(array[%s::bigint], null, null, array[%s::bigint], null, null, null, null, null,"
                " null, array['first'], array['first'], '{1}', null, array[%s::bytea])",
                [claimed[2], claimed[1], RECORD],
            )
            connection.execute(
                "call pgchan.call_finish(%s, %s, %s, '1', '{\"type\":\"E\",\"message\":\"\"}', null, null)",
                [claimed[0], claimed[1], state],
            )
        connection.execute("select pgchan.start('work', id => i) from unnest(array['scheduled', 'cancelling']) i")


@pytest.fixture
def logins(admin: psycopg.Connection[Any], dsn: str) -> Iterator[Logins]:
    """Makes roles that log in to this test's database."""
    logins = Logins(admin, dsn)
    yield logins
    logins.close()


@pytest.mark.parametrize("group", GROUPS)
async def test_a_role_may_do_what_it_is_for_and_is_told_what_it_lacks_for_the_rest(
    door: Door, logins: Logins, group: str
) -> None:
    fill(door.dsn)
    client = door.client(logins.of(group))
    for name, (allowed, operation) in operations().items():
        try:
            await operation(client)
        except errors.UnsafeDeployment as error:
            refused = str(error)
        else:
            refused = ""
        assert (group in allowed) == (refused == ""), f"{name}: {refused}"
        if refused:
            assert re.search(r"run: grant pgchan_(publisher|subscriber|admin) to <the role>", refused), name


async def test_a_member_of_no_role_is_told_to_become_one(door: Door, logins: Logins) -> None:
    with pytest.raises(errors.UnsafeDeployment, match="grant pgchan_"):
        await door.client(logins.of()).channel("chat").publish(1)


@pytest.mark.parametrize("group", GROUPS)
def test_in_its_own_transaction_a_role_may_do_the_same(dsn: str, logins: Logins, group: str) -> None:
    fill(dsn)
    login = logins.of(group)
    engine = sqlalchemy.create_engine(login.replace("postgresql:", "postgresql+psycopg:"))
    with pgchan.Client(login) as client:
        for deed in (
            lambda c: client.channel("chat").publish(1, connection=c),
            lambda c: client.start("work", connection=c),
            lambda c: client.run("scheduled").signal(1, connection=c),
        ):
            with psycopg.connect(login) as connection:
                if group in WRITES:
                    deed(connection)
                else:
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        deed(connection)
        if group in WRITES:
            with Session(engine) as session:
                client.channel("chat").publish(2, connection=session)
                client.channel("deferred").publish(3, connection=session, defer=True)
                client.run("scheduled").signal(2, connection=session, defer=True)
                session.commit()
    engine.dispose()
    heads = dict(query(dsn, "select name, head from pgchan.channels where name in ('chat', 'deferred', 'scheduled')"))
    assert heads == ({"chat": 3, "deferred": 1, "scheduled": 2} if group in WRITES else {"chat": 1, "scheduled": 0})


IN_SQL = {
    "select pgchan.version(), pgchan.serves()": ALL,
    "select pgchan.publish('chat', '1')": WRITES,
    "select pgchan.start('work')": WRITES,
    "select pgchan.signal('scheduled', '1')": WRITES,
    "select pgchan.cancel('cancelling')": WRITES,
    "select * from pgchan.read('chat')": READS,
    "select pgchan.status('done')": READS,
    "table pgchan.run_status": READS,
    "table pgchan.channel_status": READS,
    "table pgchan.worker_status": READS,
    "table pgchan.messages": READS,
    "select result from pgchan.runs": READS,
    "select input from pgchan.runs": NOBODY,
    "table pgchan.alembic_version": NOBODY,
    "insert into pgchan.messages values (1, 99, now(), 0, null, null, null, null, '1')": NOBODY,
    "update pgchan.channels set head = 0": NOBODY,
    "delete from pgchan.messages": NOBODY,
    "truncate pgchan.messages": NOBODY,
    "select 1 from pgchan.runs for update": NOBODY,
    "select nextval('pgchan.workers_id_seq')": NOBODY,
    "create table pgchan.mine (i integer)": NOBODY,
    "create function pgchan.mine() returns integer language sql return 1": NOBODY,
    "alter table pgchan.messages add column mine integer": NOBODY,
    "drop function pgchan.version()": NOBODY,
    "grant pgchan_admin to current_user": NOBODY,
    "select pgchan.settle(1, 'succeeded', null, null)": NOBODY,
    "select pgchan.append_one(1, 2, null, null, '{}')": NOBODY,
    "select pgchan.supersede('{1}')": NOBODY,
}


@pytest.mark.parametrize("group", GROUPS)
def test_in_sql_a_role_may_do_what_it_is_for(dsn: str, logins: Logins, group: str) -> None:
    fill(dsn)
    with psycopg.connect(logins.of(group)) as connection:
        for statement, allowed in IN_SQL.items():
            try:
                connection.execute(statement.encode())
            except psycopg.errors.InsufficientPrivilege:
                assert group not in allowed, statement
            else:
                assert group in allowed, statement
            connection.rollback()


FORGERIES = {
    # What a publisher must not write, with the rights that it has, and what it is told.
    "a name of pgchan's own": (
        "select pgchan.append_messages('{null}', '{pgchan:journal:1}', '{application/json}', null, null, null, null,"
        " null, array['1'::bytea])", "PC001"),
    "a key that marks a signal as consumed": (
        "select pgchan.append_messages('{null}', '{chat}', '{application/json}', null, null, null, null,"
        " '{pgchan:consumed:1}', array['1'::bytea])", "PC001"),
    "the same where it is alone": (
        "select pgchan.append_message((select id from pgchan.find_channel('chat')), 'pgchan:consumed:1', '1')",
        "PC001"),
    "the same by a signal": ("select pgchan.deliver('scheduled', '1', 'pgchan:consumed:1')", "PC001"),
    "a run on another run's journal": (
        "select pgchan.enqueue((select 'pgchan:journal:' || 4), 'w', null, 'q', 0, null, null, '{}', null)", "PC001"),
    "a channel where a journal will be": ("select pgchan.create_channel('pgchan:journal:9', 'a/b', null)", "PC001"),
    "the end of a journal": ("select pgchan.close_channel('pgchan:journal:4')", "PC001"),
    "a ping that is a wakeup": ("select pgchan.ping('pgchan_0')", "42501"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
def test_a_publisher_cannot_forge(dsn: str, logins: Logins, what: str) -> None:
    fill(dsn)
    statement, sqlstate = FORGERIES[what]
    with psycopg.connect(logins.of(PUBLISHER)) as connection, pytest.raises(psycopg.Error) as refused:
        connection.execute(statement.encode())
    assert refused.value.sqlstate == sqlstate


@pytest.mark.parametrize("keys", [None, "{any}", "{first}"])
def test_a_publisher_cannot_write_into_a_journal_by_its_id(dsn: str, logins: Logins, keys: str | None) -> None:
    fill(dsn)
    ((journal, head),) = query(
        dsn,
        "select j.id, j.head from pgchan.runs r join pgchan.channels j on j.id = r.journal_id"
        " join pgchan.channels c on c.id = r.channel_id where c.name = 'failed'",
    )
    query(dsn, "update pgchan.channels set closed_at = null where id = %s", journal)
    with psycopg.connect(logins.of(PUBLISHER)) as connection:
        found = connection.execute(
            "select outcomes, positions from pgchan.append_messages("
            "array[%s::bigint], null, null, null, null, null, null, %s::text[], array[%s::bytea])",
            [journal, keys, RECORD],
        ).fetchone()
        alone = connection.execute(
            "select outcome, head from pgchan.append_message(%s, (%s::text[])[1], %s)", [journal, keys, RECORD]
        ).fetchone()
    assert found is not None and found[0] == ["fenced"]
    assert alone == ("fenced", None)
    assert query(dsn, "select head from pgchan.channels where id = %s", journal) == [(head,)]


# ------------------------------------------------------------------------------------------------ the whole of it


async def test_a_publisher_a_subscriber_and_workers_with_a_login_each(
    dsn: str, logins: Logins, reading: Callable[[Any], Reading]
) -> None:
    """Start, stream, signal, kill the worker in the middle, take over, result: nobody has more than its own rights."""
    processes = Processes(logins.of(WORKER))
    try:
        async with (
            pgchan.AsyncClient(logins.of(PUBLISHER)) as publisher,
            pgchan.AsyncClient(logins.of(SUBSCRIBER)) as subscriber,
        ):
            first = await processes.start("first", at="output_published")
            heard = reading(subscriber.run("talk").tail())
            handle = await publisher.start(everything, id="talk")
            await handle.signal("one")
            await first.tells("point", "output_published")
            await processes.start("second")
            first.kill()
            await handle.signal("two")
            assert await subscriber.run("talk").result(20) == ["one", "two"]
            await heard.end()
            said = [message.body for message in heard.messages if message.kind == "message"]
            assert said[0] == "begin" and said[-2:] == ["answer to two", "end"]
            keys = [message.key for message in await subscriber.run("talk").journal()]
            assert keys == ["receive", "middle", "answer"]
            assert (await subscriber.run("talk").status()).attempt == 2
    finally:
        processes.close()


@pgchan.workflow
async def all_of_it(run: pgchan.Run) -> Any:
    """Everything that a workflow may ask the database for."""
    await run.publish("hello")
    async with run.transaction("rows") as connection:
        await connection.execute("insert into rows_of_users values ($1)", run.id)
    child = await run.start(answer, id=f"{run.id}/child")
    await child.signal("a question")
    assert await child.result() == "a question"
    await run.sleep(0.01)
    return "done"


@pgchan.workflow
async def again(run: pgchan.Run, second: bool = False) -> str:
    if not second:
        await run.continue_as(True)
    return "continued"


@pgchan.workflow
async def answer(run: pgchan.Run) -> Any:
    message = await run.receive()
    assert message is not None
    return message.body


async def test_a_worker_needs_no_other_right_for_anything_that_a_workflow_does(dsn: str, logins: Logins) -> None:
    login = logins.of(WORKER)
    query(dsn, f"create table rows_of_users (run text); grant insert on rows_of_users to {logins.names[0]}")
    query(dsn, "select pgchan.create_channel('old', 'application/json', 0.001)")
    workers = Workers(login)
    try:
        await workers.start(all_of_it, answer, again, linger=0.05)
        async with pgchan.AsyncClient(login) as client:
            assert await (await client.start(again)).result(10) == "continued"
            assert await (await client.start(all_of_it, id="r")).result(20) == "done"
            silent = await client.start(answer, id="silent")
            async with asyncio.timeout(10):
                while (await silent.status()).state != "waiting":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await silent.signal("at last")
            assert await silent.result(10) == "at last"
            async with asyncio.timeout(15):  # housekeeping
                while await client.channels(prefix="old"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    finally:
        await workers.close()


async def test_an_endpoint_does_what_its_role_may_and_says_no_more(dsn: str, logins: Logins) -> None:
    fill(dsn)
    async with pgchan.AsyncClient(logins.of(SUBSCRIBER, PUBLISHER)) as client:
        app = Running(create_app(client, auth=Insecure()))
        async with app, httpx.AsyncClient(base_url=app.url) as web:
            assert (await web.post("/channels/chat", json={"body": 2})).status_code == 201
            assert (await web.post("/runs", json={"workflow": "work", "id": "by-web"})).status_code == 201
            assert (await web.post("/runs/by-web/signals", json={"body": 1})).status_code < 300
            assert (await web.get("/runs/done/result?wait=1")).status_code == 200
            assert (await web.post("/runs/by-web/cancel")).status_code < 300
            async with follow(app.port, "/channels/chat") as events:
                told: list[Any] = []
                while len(told) < 2:
                    if "data" in (block := await events.next()):
                        told.append(message_of(block)["body"])
                assert told == [1, 2]
            refused = await web.delete("/channels/chat")
            assert (refused.status_code, refused.json()["code"]) == (503, "unsafe_deployment")
            assert "delete_channel" not in refused.text and "grant" not in refused.text
    async with pgchan.AsyncClient(logins.of(SUBSCRIBER)) as client:
        app = Running(create_app(client, auth=Insecure()))
        async with app, httpx.AsyncClient(base_url=app.url) as web:
            assert (await web.get("/channels/chat")).json()["head"] == 2
            assert (await web.get("/healthz")).status_code == 200
            refused = await web.post("/channels/chat", json={"body": 3})
            assert (refused.status_code, refused.json()["code"]) == (503, "unsafe_deployment")


@pytest.mark.parametrize(
    ("group", "may"),
    [
        (PUBLISHER, "publish"), (SUBSCRIBER, "read"), (WORKER, "publish, read, work"),
        (ADMIN, "publish, read, work, administer"),
    ],
)  # fmt: skip
async def test_the_doctor_says_what_a_role_is_fit_for(dsn: str, logins: Logins, group: str, may: str) -> None:
    found = {finding.check: finding for finding in await doctor.check(logins.of(group))}
    assert all(finding.is_fine for finding in found.values()), found
    assert found["rights"].detail == f"this role may {may}"
    assert ("not looked at" in found) == (group == PUBLISHER)
    assert ("workers" in found) == (group != PUBLISHER)


# ------------------------------------------------------------------------------------------------ nobody's else code


def test_every_function_is_definer_and_pinned_and_procedures_are_bare(dsn: str) -> None:
    rows = query(
        dsn,
        "select proname, prokind::text, prosecdef, proconfig from pg_proc where pronamespace = 'pgchan'::regnamespace",
    )
    for name, kind, is_definer, settings in rows:
        if kind == "f":
            assert is_definer and "search_path=pg_catalog, pg_temp" in settings, name
        else:
            assert (kind, is_definer, settings) == ("p", False, None), name


def test_procedures_hold_no_operator_and_no_unqualified_name(dsn: str) -> None:
    procedures = "select proname, prosrc from pg_proc where pronamespace = 'pgchan'::regnamespace and prokind = 'p'"
    bodies = query(dsn, procedures)
    assert len(bodies) >= 6
    for name, body in bodies:
        code = re.sub(r"--[^\n]*|'[^']*'|(?<=[\[( ])-1\b", " ", body)  # -1 is a constant to the parser
        code = code.replace("#variable_conflict", "").replace(":=", " ")
        assert not re.search(r"[-+*/<>=~!@#%^&|`?]", code), name
        called = re.findall(r"(?<![\w.])(\w+)\s*\(", code)
        assert set(called) <= {"select"}, f"{name} calls {called} unqualified"  # `grant select (columns)`


@pytest.fixture
def hostile(dsn: str) -> Callable[[psycopg.Connection[Any]], None]:
    """Everything that pgchan's routines use once more, in a schema `evil` and in the session's temporary one.

    Every function and operator of it raises `hijacked`, every table of it is empty.
    """
    bodies = [body for (body,) in query(dsn, "select prosrc from pg_proc where pronamespace = 'pgchan'::regnamespace")]
    names = sorted(set(re.findall(r"\b([a-z_]\w*)\s*\(", "\n".join(bodies))))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create schema evil")
        connection.execute("grant all on schema evil to public")
        made = 0
        for name, arguments, result in connection.execute(
            "select proname, oidvectortypes(proargtypes), case when proretset then 'setof ' else '' end"
            " || format_type(prorettype, null) from pg_proc where pronamespace = 'pg_catalog'::regnamespace"
            " and prokind = 'f' and proname = any (%s)", [names],
        ).fetchall():  # fmt: skip
            body = "language plpgsql as $$ begin raise exception 'hijacked'; end $$"
            try:
                connection.execute(f'create function evil."{name}"({arguments}) returns {result} {body}'.encode())
                made += 1
            except psycopg.Error:
                pass  # a pseudo-type that plpgsql does not take
        assert made > 40
        types = ("bigint", "integer", "smallint", "text", "timestamptz", "double precision", "bytea", "oid", "boolean")
        for number, type_ in enumerate(types):
            for symbol in ("=", "<>", "<", ">", "<=", ">=", "+", "-", "||", "~", "!~", "~~", "!~~"):
                kind = type_ if symbol in ("+", "-", "||") else "boolean"
                function = f"evil.operator_{number}_{symbol.encode().hex()}"
                connection.execute(
                    f"create function {function}({type_}, {type_}) returns {kind} language plpgsql as"
                    f" $$ begin raise exception 'hijacked'; end $$".encode()
                )
                sides = f"leftarg = {type_}, rightarg = {type_}"
                connection.execute(f"create operator evil.{symbol} ({sides}, function = {function})".encode())

    def take_over(connection: psycopg.Connection[Any]) -> None:
        tables = ("channels", "messages", "runs", "workers", "final_messages", "run_status", "pg_locks", "pg_database")
        for table in tables:
            columns = "id bigint, name text, channel_id bigint, journal_id bigint, state text, worker integer"
            connection.execute(f"create temporary table {table} ({columns})".encode())
        connection.execute("set search_path = evil, pg_temp, pg_catalog")
        for innocent in ("select mod(1::bigint, 2::bigint)", "select 1::bigint = 1::bigint"):
            with pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
                connection.execute(innocent.encode())

    return take_over


def test_nothing_of_the_caller_is_used_in_place_of_what_is_meant(
    dsn: str, logins: Logins, hostile: Callable[[psycopg.Connection[Any]], None]
) -> None:
    fill(dsn)
    query(dsn, f"grant create, temporary on database {psycopg.conninfo.conninfo_to_dict(dsn)['dbname']} to public")
    with psycopg.connect(logins.of(ADMIN), autocommit=True) as connection:
        hostile(connection)
        run = lambda statement, *args: connection.execute(statement.encode(), args or None).fetchall()  # noqa: E731
        ((position,),) = run("select pgchan.publish('chat', '{\"a\": 1}', 'k')")
        assert position == 2
        assert len(run("select body from pgchan.read('chat')")) == 2
        assert run("select pgchan.start('work', '[1]', 'evil')") == [("evil",)]
        assert run("select pgchan.signal('evil', '1')") == [(1,)]
        assert run("select pgchan.status('evil') ->> 'state'") == [("scheduled",)]
        nulls = "null, null, null, null, null, null, null"
        messages = "'{null}', '{hot}', '{application/json}', null, null, null, null, null, array['1'::bytea], null"
        assert run(f"call pgchan.write_messages({messages}, {nulls})")[0][1] == [1]
        everything_else = "null, null, null, null, null, null, null, null, null, null"
        row = run(
            f"call pgchan.write('{{null}}', '{{hot}}', '{{application/json}}', {everything_else}, null,"
            f" array['1'::bytea], null, {nulls})"
        )[0]
        assert row[1] == [2]
        ((hot,),) = run("select id from pgchan.find_channel('hot')")
        assert run("call pgchan.write_message(%s, 'a', '1', 50, null, null, null)", hot)[0][:2] == ("appended", 3)
        lone = "%s, null, null, null, 0::smallint, 'b', null, null, null, '1', 50"
        assert run(f"call pgchan.write_entry({lone}, null, null, null)", hot)[0][:2] == ("appended", 4)
        begun = run("call pgchan.call_enqueue('e', 'w', null, 'q', 0, null, null, '{}', null, null, null)")
        assert begun[0][0] == "started"
        assert run("call pgchan.call_deliver('e', '1', null, null, null, null, null, null, null)")[0][0] == "appended"
        assert run("call pgchan.call_fork('failed', 'first', 'f', null, null)")[0][0] == "started"
        ((worker,),) = run("select pgchan.new_worker()")
        assert run("select pgchan.take_lock(%s)", worker) == [(True,)]
        run("select pgchan.register(%s, 'w', 'h', 1)", worker)
        assert run("select pgchan.come_back(%s, 'w', 'h', 1)", worker) == [(True,)]
        claimed = run("select channel_id, epoch, run from pgchan.claim(%s, '{q}', '{w}', 1)", worker)
        assert claimed[0][2] == "e"
        assert run("call pgchan.call_finish(%s, %s, 'succeeded', '1', null, null, null)", *claimed[0][:2]) == [
            ("finished", None)
        ]
        assert run("select pgchan.reap((select min(id) from pgchan.workers))") == [(0,)]
        assert run("select pgchan.free_lock(%s)", worker) == [(True,)]
        assert run("select pgchan.cancel('evil')") == [(True,)]
        assert run("select pgchan.resume('failed')") == [("resumed",)]
        assert run("select pgchan.trim_channel('chat', 2)") == [(1,)]
        assert run("select outcome from pgchan.compact_channel('chat')") == [("open",)]
        assert run("select pgchan.delete_channel('chat')") == [("deleted",)]
        assert run("select pgchan.expire()") == [(0,)]
        run("select pgchan.leave(%s)", worker)
        for view in ("run_status", "channel_status", "worker_status", "final_messages"):
            assert run(f"table pgchan.{view}") or view == "worker_status"


def test_who_owns_the_routines_can_grant_without_being_hijacked(
    dsn: str, hostile: Callable[[psycopg.Connection[Any]], None]
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        hostile(connection)
        connection.execute("call pgchan.grant_roles()")


# ------------------------------------------------------------------------------------------------ made by a migration


@pytest.fixture
def bare() -> Iterator[Cluster]:
    """A server of this test's own without any of the four roles; a role `owner` that may not create any."""
    cluster = Cluster()
    try:
        cluster.start()
        query(cluster.dsn, "create role owner login")
        query(cluster.dsn, "create role app login")
        for name in ("one", "two"):
            query(cluster.dsn, f"create database {name} owner owner")
        yield cluster
    finally:
        cluster.remove()


def database(cluster: Cluster, name: str, role: str = "postgres") -> str:
    return as_role(on_database(cluster.dsn, name), role)


def roles_of(cluster: Cluster) -> list[str]:
    rows = query(cluster.dsn, "select rolname from pg_roles where rolname like 'pgchan%' order by 1")
    return [name for (name,) in rows]


async def findings(dsn: str) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in await doctor.check(dsn)}


async def test_a_migrator_that_may_not_create_roles_does_without_and_is_told_how_to_get_them(bare: Cluster) -> None:
    owner, app = database(bare, "one", "owner"), database(bare, "one", "app")
    migrate.upgrade(owner)
    assert roles_of(bare) == []
    async with pgchan.AsyncClient(owner) as client:
        await client.channel("c").publish(1)
    found = (await findings(owner))["roles"]
    assert found.is_fine
    create, _, call = found.detail.partition("as one who may create roles: ")[2].partition("; then as the owner: ")
    query(bare.dsn, create)
    assert roles_of(bare) == sorted(GROUPS)
    found = (await findings(owner))["roles"]
    assert not found.is_fine
    assert call in found.detail
    query(bare.dsn, "grant pgchan_publisher to app")
    with pytest.raises(errors.UnsafeDeployment):
        async with pgchan.AsyncClient(app) as client:
            await client.channel("c").publish(2)
    query(owner, call)
    query(owner, call)
    async with pgchan.AsyncClient(app) as client:
        assert (await client.channel("c").publish(2)).position == 2
    assert (await findings(owner))["roles"].is_fine


def test_a_migrator_that_may_create_roles_and_no_more_makes_them_and_can_grant_them(bare: Cluster) -> None:
    query(bare.dsn, "alter role owner createrole")
    migrate.upgrade(database(bare, "one", "owner"))
    assert roles_of(bare) == sorted(GROUPS)
    query(database(bare, "one", "owner"), "grant pgchan_publisher to app")
    with pgchan.Client(database(bare, "one", "app")) as client:
        assert client.channel("c").publish(1).position == 1


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_two_databases_may_be_migrated_at_once(bare: Cluster, end: str, block_until: Callable[..., None]) -> None:
    schema = migrate._directory() / "versions" / "pgchan_0001.sql"
    caught: list[BaseException] = []

    def second() -> None:
        try:
            migrate.upgrade(database(bare, "two"))
        except BaseException as error:
            caught.append(error)

    with psycopg.connect(database(bare, "one")) as first:
        first.execute(schema.read_bytes())
        thread = threading.Thread(target=second)
        thread.start()
        waiting = "select pid from pg_stat_activity where datname = 'two' and wait_event_type = 'Lock'"
        block_until(lambda: query(bare.dsn, waiting) != [])
        first.commit() if end == "commit" else first.rollback()
        thread.join()
    assert caught == []
    assert roles_of(bare) == sorted(GROUPS)
    assert {row[2] for row in query(database(bare, "two"), GRANTS)} == ALL
    query(bare.dsn, "grant pgchan_subscriber to app")
    with pgchan.Client(database(bare, "two", "app")) as client:
        assert client.channel("c").read() == []


def test_going_down_in_one_database_takes_nothing_from_another(bare: Cluster) -> None:
    for name in ("one", "two"):
        migrate.upgrade(database(bare, name))
    query(bare.dsn, "grant pgchan_publisher to app")
    migrate.downgrade(database(bare, "one"))
    assert roles_of(bare) == sorted(GROUPS)
    with pgchan.Client(database(bare, "two", "app")) as client:
        client.channel("c").publish(1)
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        query(bare.dsn, "drop role pgchan_publisher")
    migrate.downgrade(database(bare, "two"))
    for role in GROUPS:
        query(bare.dsn, f"drop role {role}")  # nothing is left that hangs on them
    migrate.upgrade(database(bare, "one"))
    assert roles_of(bare) == sorted(GROUPS)


def test_a_role_that_exists_is_taken_as_it_is(bare: Cluster) -> None:
    query(bare.dsn, "create role pgchan_publisher login connection limit 3")
    migrate.upgrade(database(bare, "one"))
    assert query(bare.dsn, "select rolcanlogin, rolconnlimit from pg_roles where rolname = 'pgchan_publisher'") == [
        (True, 3)
    ]
    with pgchan.Client(database(bare, "one", "pgchan_publisher")) as client:
        assert client.channel("c").publish(1).position == 1
