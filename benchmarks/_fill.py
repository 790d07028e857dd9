"""Fills tables as years of use would: with plain INSERTs, since only how much there is counts. Ends with statistics."""

from __future__ import annotations

import asyncpg

# Runs in one state, with their two channels. $1: what their ids begin with; $2: how many; $3: state; $4: seconds until
# they wake, null: never.
RUNS = """
with numbered as materialized (
  select n, $1::text || n as name, nextval('pgchan.channel_numbers') << 20 as id,
         nextval('pgchan.channel_numbers') << 20 as journal
  from generate_series(1, $2::integer) n
), channels as (
  insert into pgchan.channels (id, name, closed_at)
    select f.id, f.name, case when $3::text = 'succeeded' then clock_timestamp() end from numbered f
    union all select f.journal, 'pgchan:journal:' || f.id, null from numbered f)
insert into pgchan.runs (channel_id, journal_id, workflow, queue, state, wake_at, input, result, created_at, ended_at)
  select f.id, f.journal, 'filled', 'default', $3::text,
         clock_timestamp() + make_interval(secs => $4::double precision + f.n % 1000),
         '{"args":[],"kwargs":{}}', case when $3::text = 'succeeded' then '1'::bytea end,
         clock_timestamp() - make_interval(secs => $2::integer - f.n + 60),
         case when $3::text = 'succeeded' then clock_timestamp() end
  from numbered f
"""
CHANNELS = """
insert into pgchan.channels (name) select $1::text || n from generate_series(1, $2::integer) n
"""
MESSAGES = """
with channel as (
  insert into pgchan.channels (name, head) values ($1::text, $2::integer)
    on conflict (name) do update set head = excluded.head returning id)
insert into pgchan.messages (channel_id, "position", at, kind, body)
  select c.id, n, clock_timestamp(), 0, '{"token":"word"}' from channel c, generate_series(1, $2::integer) n
"""
JOURNAL = """
with journal as (
  update pgchan.channels c set head = $2::integer
  from pgchan.runs r join pgchan.channels o on o.id = r.channel_id where o.name = $1::text and c.id = r.journal_id
  returning c.id)
insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, body)
  select j.id, n, clock_timestamp(), 0, 'step#' || n, 'step#' || n, 1, $3::bytea
  from journal j, generate_series(1, $2::integer) n
"""
FILL_SECONDS = 300.0  # at most, for one of them


async def fill(dsn: str, *statements: tuple[object, ...]) -> None:
    """Run these statements, each with its arguments; then vacuum, as autovacuum would have."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement, *arguments in statements:
            await connection.execute(str(statement), *arguments, timeout=FILL_SECONDS)
        for table in ("channels", "messages", "runs"):
            await connection.execute(f"vacuum analyze pgchan.{table}", timeout=FILL_SECONDS)
    finally:
        await connection.close()
