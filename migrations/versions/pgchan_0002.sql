-- From pgchan_0001 to pgchan_0002. Written by `make freeze`.

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
    try_until := clock_timestamp() + make_interval(secs => case when tries % 4 = 0 then 1.5 else 0.3 end);
    begin
      foreach relation in array array['workers', 'runs', 'channels', 'messages', 'final_messages', 'run_status', 'channel_status', 'worker_status'] loop
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

-- The schema's revision, read at start-up. Each migration redefines it.
create or replace function pgchan.version() returns text
language sql immutable security definer set search_path = pg_catalog, pg_temp as $$ select 'pgchan_0002' $$;

-- ------------------------------------------------------------------------------------------------ roles

-- Nobody but the owner may call a routine until a role is given the right to.
revoke all on all routines in schema pgchan from public;

revoke all on procedure pgchan.grant_roles() from public;

call pgchan.grant_roles();
