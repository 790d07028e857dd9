"""The rules by which a revision is derived from two schemas, on schemas that need all of them."""

from __future__ import annotations

from typing import Any

import psycopg
from catalog import describe
from freeze import Schema, way

BEFORE = """
create schema if not exists pgchan;
-- One row: one channel.
create table pgchan.channels (
  id bigint generated always as identity primary key, name text not null,
  state text check (state in ('a', 'b')), gone integer
) with (fillfactor = 50);
create index channels_name on pgchan.channels (name);
create index channels_gone on pgchan.channels (gone);
create table pgchan.olds (id bigint primary key);
create index olds_twice on pgchan.olds (id);
create function pgchan.size(name text) returns integer language sql immutable as $$ select length(name) $$;
create view pgchan.sizes as select c.id, pgchan.size(c.name) as size from pgchan.channels c;
create view pgchan.large as select s.id from pgchan.sizes s where s.size > 10;
create view pgchan.states as select c.id, c.state from pgchan.channels c;
create view pgchan.gones as select c.id, c.gone from pgchan.channels c;
-- Stays as it is; this comment does not.
create function pgchan.same() returns text language sql immutable as $$ select ';' $$;
create function pgchan.body() returns integer language sql immutable as $$ select 1 $$;
create procedure pgchan.old(what text) language sql as $$ select 1 $$;
revoke all on all routines in schema pgchan from public;
"""

AFTER = """
create schema if not exists pgchan;
create table pgchan.channels (
  id bigint generated always as identity primary key, name text not null,
  state text check (state in ('a', 'b', 'c')), size integer not null default 7, label text collate "C" unique
) with (autovacuum_vacuum_scale_factor = 0.02);
create unique index channels_name on pgchan.channels (name) where size > 0;
create table pgchan.news (id boolean primary key, channel_id bigint references pgchan.channels (id));
insert into pgchan.news values (true, null);
create index news_channel on pgchan.news (channel_id);
create function pgchan.size(name text, factor integer default 1) returns integer
language sql immutable as $$ select factor * length(name) $$;
create view pgchan.sizes as select c.id, pgchan.size(c.name) as size from pgchan.channels c;
create view pgchan.large as select s.id from pgchan.sizes s where s.size > 20;
create view pgchan.states as select c.id, c.state, c.label from pgchan.channels c;
create function pgchan.same() returns text language sql immutable as $$ select ';' $$;
create function pgchan.body() returns integer language sql immutable as $$ select 2 $$;
create function pgchan.new() returns integer language sql immutable as $$ select pgchan.body() $$;
revoke all on all routines in schema pgchan from public;
"""


def test_both_ways_lead_to_the_other_schema_and_rows_stay(make_database: Any) -> None:
    with psycopg.connect(make_database("template0")) as old, psycopg.connect(make_database("template0")) as new:
        before, after = Schema("pgchan_1", BEFORE, old), Schema("pgchan_2", AFTER, new)
        wanted = describe(old), describe(new)
        old.execute("insert into pgchan.channels (name, state) values ('c', 'a')")
        up, down = way(before, after), way(after, before)
        for _ in range(2):
            old.execute(up.encode())
            assert describe(old) == wanted[1]
            assert old.execute("select name, size, label from pgchan.channels").fetchall() == [("c", 7, None)]
            assert old.execute("select * from pgchan.news").fetchall() == [(True, None)]
            old.execute(down.encode())
            assert describe(old) == wanted[0]
            assert old.execute("select name, state, gone from pgchan.channels").fetchall() == [("c", "a", None)]


def test_what_can_be_replaced_is_not_dropped(make_database: Any) -> None:
    with psycopg.connect(make_database("template0")) as old, psycopg.connect(make_database("template0")) as new:
        up = way(Schema("pgchan_1", BEFORE, old), Schema("pgchan_2", AFTER, new))
    assert "pgchan.same" not in up
    dropped = [line for line in up.splitlines() if line.startswith("drop ")]
    assert dropped == [
        "drop view pgchan.gones;", "drop view pgchan.large;", "drop view pgchan.sizes;",
        "drop routine pgchan.size(text);", "drop routine pgchan.old(text);",
        "drop index pgchan.channels_name;", "drop index pgchan.channels_gone;", "drop table pgchan.olds;",
    ]  # fmt: skip
