"""Write the newest revision, which is not released yet, from pgchan/schema.sql: `make freeze`.

A released revision keeps its text for ever: name it in RELEASED, with the release whose wheel tests/release.py keeps.
The next one leads from that release's schema to pgchan/schema.sql, and back by the same rules the other way round:

    tables        new ones are created; columns, constraints and options that differ are altered. A new column stands
                  last in its table, as it does in one that was migrated
    indexes       created, or dropped and created if they differ
    routines      `create or replace` where the text differs: who is in the middle of one is not disturbed, and grants
    and views     stay. Those whose arguments or columns differ in a way that it cannot follow are dropped first
    the rest      rows that schema.sql inserts: once; grants: always

What cannot be derived is what becomes of rows, and of calls under way: BACKFILL, FAREWELL, PARTING.
tests/test_migrations.py proves that the way up ends at schema.sql, and the way down at the release.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import release
from cluster import Cluster, on_database

from pgchan.migrations import statements

# Each released revision, and the first release that had it.
RELEASED: dict[str, str] = {"pgchan_0001": "0.1.0"}
REVISION = "pgchan_0002"

# Statements that follow the changes of the tables on the way up. Everybody waits meanwhile: few rows, or a default.
BACKFILL = ""
# Statements that come first on the way down, while what it drops is still there.
FAREWELL = """
-- Nobody would ever delete them.
delete from pgchan.messages m using pgchan.removed r where m.channel_id = r.channel_id;
"""

# Statements that come last on the way down, when the calls that came meanwhile wait for its tables.
PARTING = """
-- What a worker writes, starts, signals or ends that waits here began with the text of pgchan_0002, which calls what is
-- gone now, and workers of 0.1.0 take what the server says then for the failure of their run. With their connection cut
-- they ask again. Who may not cut it can only hope.
do $$
declare
  one record;
begin
  perform pg_stat_clear_snapshot();
  for one in
    select a.pid from pg_stat_activity a
    where a.datname = current_database() and a.pid <> pg_backend_pid() and a.wait_event_type = 'Lock'
      and (a.query like '%pgchan.call_%' or a.query like '%pgchan.write(%')
  loop
    begin
      perform pg_terminate_backend(one.pid);
    exception when insufficient_privilege then
      null;
    end;
  end loop;
end $$;
"""

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "pgchan" / "schema.sql"
VERSIONS = ROOT / "migrations" / "versions"

# Tables in the order in which everybody locks them; the others follow.
ORDER = ("workers", "runs", "channels", "messages")

# Without `cascade` anywhere, so that what others built on these objects stops the migration and is named by the server.
HEAD = "-- From {before} to {after}. Written by `make freeze`.\n\n"

LOCK = """\
-- All tables at once or none of them. While this waits for a transaction that uses one, everybody else waits behind it:
-- so a try is short, and between two of them all catch up. Each fourth is longer than deadlock_timeout (1 s), for only
-- then does the server send an autovacuum out of the way; none is longer than twice that, so no deadlock is resolved at
-- somebody else's expense. After a minute this gives up, and nothing has changed.
do $$
declare
  give_up_at timestamptz := clock_timestamp() + interval '60 seconds';
  before text := current_setting('lock_timeout');
  tries integer := 0;
  try_until timestamptz;
  relation text;
  held_by text;
begin
  loop
    tries := tries + 1;
    try_until := clock_timestamp() + make_interval(secs => case when tries % 4 = 0 then 1.2 else 0.3 end);
    begin
      foreach relation in array array[{relations}] loop
        perform set_config('lock_timeout', greatest(
          1, round(1000 * extract(epoch from try_until - clock_timestamp())))::integer || 'ms', true);
        execute format('lock table pgchan.%I in access exclusive mode', relation);
      end loop;
      exit;
    exception when lock_not_available or deadlock_detected then
      null;
    end;
    select format('session %s, which has been in a transaction for %s s', a.pid,
                  coalesce(round(extract(epoch from clock_timestamp() - a.xact_start))::text, 'some')) into held_by
      from pg_locks l join pg_class c on c.oid = l.relation join pg_stat_activity a on a.pid = l.pid
      where c.relnamespace = 'pgchan'::regnamespace and l.granted and l.pid <> pg_backend_pid()
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
      order by a.xact_start limit 1;
    if clock_timestamp() > give_up_at then
      raise exception 'table pgchan.% was in use by %', relation, coalesce(held_by, 'somebody')
        using errcode = 'lock_not_available';
    end if;
    raise warning 'table pgchan.% is in use by %; trying again', relation, coalesce(held_by, 'somebody');
    perform pg_sleep(0.5 + random());
  end loop;
  perform set_config('lock_timeout', before, true);
end $$;
"""


@dataclass
class Text:
    """The statements of a schema.sql: by kind, then by the name of what they create; the others as they are."""

    routine: dict[str, str] = field(default_factory=dict)
    view: dict[str, str] = field(default_factory=dict)
    table: dict[str, str] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)
    grant: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # names of routines and views as they follow each other


_CREATE = re.compile(r"create (?:unique )?(function|procedure|view|table|index) (?:pgchan\.)?(\w+)", re.IGNORECASE)


def read(schema: str) -> Text:
    """Sort the statements of a schema.sql."""
    text = Text()
    for statement in statements.split(schema):
        code = re.sub(r"\A(?:\s*--[^\n]*\n)*\s*", "", statement)
        if created := _CREATE.match(code):
            kind, name = created[1].lower().replace("function", "routine").replace("procedure", "routine"), created[2]
            found: dict[str, str] = getattr(text, kind)
            assert name not in found, f"two statements create pgchan.{name}"
            found[name] = statement
            if kind in ("routine", "view"):
                text.order.append(name)
        elif re.match(r"(?:grant|revoke|alter default|call pgchan\.grant_roles)\b", code, re.IGNORECASE):
            text.grant.append(statement)
        elif not code.lower().startswith("create schema"):
            text.rest.append(statement)
    return text


def same(one: str | None, other: str | None) -> bool:
    """Whether two statements are the same but for the comments above them."""
    bare = [None if each is None else re.sub(r"\A(?:\s*--[^\n]*\n)*\s*", "", each) for each in (one, other)]
    return bare[0] == bare[1]


# What of a schema cannot be read off its text: each row is a name and what is compared.
SIGNATURES = """
    select p.proname, format('%s|%s|%s', p.prokind, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)),
           format('pgchan.%I(%s)', p.proname, oidvectortypes(p.proargtypes))
    from pg_proc p where p.pronamespace = 'pgchan'::regnamespace
"""
VIEWS = """
    select c.relname, array(select a.attname || ' ' || format_type(a.atttypid, a.atttypmod) from pg_attribute a
                            where a.attrelid = c.oid and a.attnum > 0 order by a.attnum)
    from pg_class c where c.relnamespace = 'pgchan'::regnamespace and c.relkind = 'v'
"""
# What each view stands on: routines, columns of tables, and views.
STANDS_ON = """
    select distinct v.relname, coalesce(p.proname, case c.relkind when 'r' then c.relname || '.' || a.attname
                                                                  else c.relname end)
    from pg_depend d join pg_rewrite w on w.oid = d.objid and d.classid = 'pg_rewrite'::regclass
    join pg_class v on v.oid = w.ev_class
    left join pg_proc p on d.refclassid = 'pg_proc'::regclass and p.oid = d.refobjid
    left join pg_class c on d.refclassid = 'pg_class'::regclass and c.oid = d.refobjid
    left join pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid
    where v.relnamespace = 'pgchan'::regnamespace and v.oid is distinct from c.oid
"""
COLUMNS = """
    select c.relname, a.attname, format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
      || coalesce(' collate ' || (select quote_ident(l.collname) from pg_collation l
                                  where l.oid = a.attcollation and l.collname <> 'default'), '')
      || coalesce(' default ' || (select pg_get_expr(d.adbin, d.adrelid) from pg_attrdef d
                                  where d.adrelid = c.oid and d.adnum = a.attnum), '')
      || case when a.attnotnull then ' not null' else '' end
    from pg_class c join pg_attribute a on a.attrelid = c.oid
    where c.relnamespace = 'pgchan'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
    order by c.relname, a.attnum
"""
CONSTRAINTS = """
    select c.relname, n.conname, pg_get_constraintdef(n.oid)
    from pg_constraint n join pg_class c on c.oid = n.conrelid
    where n.connamespace = 'pgchan'::regnamespace and n.contype <> 'n' order by c.relname, n.conname
"""
OPTIONS = """
    select c.relname, split_part(o, '=', 1), split_part(o, '=', 2)
    from pg_class c cross join unnest(c.reloptions) o
    where c.relnamespace = 'pgchan'::regnamespace and c.relkind = 'r' order by 1, 2
"""


class Schema:
    """A schema.sql: its statements, and what a server that ran it has in its catalogs."""

    def __init__(self, revision: str, sql: str, connection: psycopg.Connection[tuple[str, ...]]) -> None:
        self.revision = revision
        self.text = read(sql)
        connection.execute(sql.encode())
        rows = lambda query: connection.execute(query.encode()).fetchall()  # noqa: E731
        self.signatures = {name: (signature, identity) for name, signature, identity in rows(SIGNATURES)}
        self.views: dict[str, list[str]] = {name: list(columns) for name, columns in rows(VIEWS)}
        self.stands_on = {view: {on for v, on in rows(STANDS_ON) if v == view} for view in self.views}
        tables = self.text.table
        self.columns = {t: {name: what for table, name, what in rows(COLUMNS) if table == t} for t in tables}
        self.constraints = {t: {name: what for table, name, what in rows(CONSTRAINTS) if table == t} for t in tables}
        self.options = {t: {name: what for table, name, what in rows(OPTIONS) if table == t} for t in tables}


def way(before: Schema, after: Schema, *, first: str = "", backfill: str = "", last: str = "") -> str:
    """The statements that lead from one schema to another."""
    dropped = [name for name in before.text.routine if before.signatures[name] != after.signatures.get(name)]
    lost = {f"{t}.{c}" for t in before.columns for c in before.columns[t].keys() - after.columns.get(t, {}).keys()}
    views = _dropped_views(before, after, {*dropped, *lost})
    steps = statements.split(first)
    steps += [f"drop view pgchan.{view}" for view in views]
    steps += [f"drop routine {before.signatures[name][1]}" for name in dropped]
    steps += _tables(before, after)
    steps += statements.split(backfill)
    for name in after.text.order:
        statement = after.text.routine.get(name) or after.text.view[name]
        was = before.text.routine.get(name) or before.text.view.get(name)
        if not same(was, statement) or name in views or name in dropped:
            steps.append(re.sub(r"^create (?=[fpv])", "create or replace ", statement, count=1, flags=re.M))
    steps += [row for row in after.text.rest if not any(same(row, was) for was in before.text.rest)]
    steps += after.text.grant
    steps += statements.split(last)
    tables = sorted(before.text.table, key=lambda table: ORDER.index(table) if table in ORDER else len(ORDER))
    known = [*tables, *before.text.view]
    lock = LOCK.format(relations=", ".join(f"'{relation}'" for relation in known))
    head = HEAD.format(before=before.revision, after=after.revision)
    return head + lock + "\n" + "".join(f"{step};\n\n" for step in steps).rstrip("\n") + "\n"


def _dropped_views(before: Schema, after: Schema, gone: set[str]) -> list[str]:
    """Views that cannot be replaced, or that stand on something that is dropped; those on top first."""
    order = [name for name in before.text.order if name in before.views]
    dropped: list[str] = []
    for view in order:  # a view stands on earlier ones
        columns = before.views[view]
        if after.views.get(view, [])[: len(columns)] != columns or before.stands_on[view] & {*gone, *dropped}:
            dropped.append(view)
    return dropped[::-1]


def _tables(before: Schema, after: Schema) -> list[str]:
    steps = []
    for name, statement in before.text.index.items():
        if not same(statement, after.text.index.get(name)):
            steps.append(f"drop index pgchan.{name}")
    for table in before.text.table:
        if table not in after.text.table:
            steps.append(f"drop table pgchan.{table}")
    for table, statement in after.text.table.items():
        if table not in before.text.table:
            steps.append(statement)
        elif changes := _changes(before, after, table):
            steps.append(f"alter table pgchan.{table}\n  " + ",\n  ".join(changes))
    for name, statement in after.text.index.items():
        if not same(statement, before.text.index.get(name)):
            steps.append(statement)
    return [step for step in steps if not _goes_with_its_table(step, before, after)]


def _goes_with_its_table(step: str, before: Schema, after: Schema) -> bool:
    if not step.startswith("drop index"):
        return False
    statement = before.text.index[step.rpartition(".")[2]]
    return any(f" on pgchan.{table} " in statement for table in before.text.table.keys() - after.text.table.keys())


def _changes(before: Schema, after: Schema, table: str) -> list[str]:
    changes = []
    was, wanted = before.constraints[table], after.constraints[table]
    changes += [f"drop constraint {name}" for name in was if wanted.get(name) != was[name]]
    old, new = before.columns[table], after.columns[table]
    changes += [f"drop column {name}" for name in old if name not in new]
    changes += [f"add column {what}" for name, what in new.items() if name not in old]
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            sys.exit(f"column {table}.{name} changes from {old[name]!r} to {new[name]!r}; add another column instead")
    changes += [f"add constraint {name} {wanted[name]}" for name in wanted if wanted[name] != was.get(name)]
    options, chosen = before.options[table], after.options[table]
    changes += [f"set ({name} = {value})" for name, value in chosen.items() if options.get(name) != value]
    changes += [f"reset ({name})" for name in options if name not in chosen]
    return changes


def freeze() -> list[Path]:
    """Write both files of the newest revision and return those that changed."""
    if REVISION in RELEASED:
        sys.exit(f"{REVISION} is released and never changes; write a new revision")
    last = max(RELEASED)
    cluster = Cluster()
    try:
        cluster.start()
        with psycopg.connect(cluster.dsn, autocommit=True) as admin:
            admin.execute("create database released")
        with psycopg.connect(on_database(cluster.dsn, "released")) as connection:
            before = Schema(last, release.text(RELEASED[last], "pgchan/schema.sql"), connection)
        with psycopg.connect(cluster.dsn) as connection:
            after = Schema(REVISION, SCHEMA.read_text("utf-8"), connection)
    finally:
        cluster.remove()
    ways = {
        VERSIONS / f"{REVISION}.sql": way(before, after, backfill=BACKFILL),
        VERSIONS / f"{REVISION}.down.sql": way(after, before, first=FAREWELL, last=PARTING),
    }
    return [path for path, sql in ways.items() if _write(path, sql)]


def _write(path: Path, content: str) -> bool:
    if path.exists() and path.read_text("utf-8") == content:
        return False
    path.write_text(content, "utf-8")
    return True


if __name__ == "__main__":
    for path in freeze():
        print(f"wrote {path.relative_to(ROOT)}")
