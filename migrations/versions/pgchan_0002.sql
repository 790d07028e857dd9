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
    try_until := clock_timestamp() + make_interval(secs => case when tries % 4 = 0 then 1.2 else 0.3 end);
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

alter table pgchan.channels
  add column keep_messages bigint,
  add column keep_seconds double precision;

-- One row in all: what is kept, and how far the upkeep has come on its rounds. Who locks it does the next batch.
create table pgchan.retention (
  id            boolean primary key default true check (id),
  ended_runs    double precision,                  -- seconds that a run is kept after its end; null: for ever
  expired_to    timestamptz,                       -- where the next batch goes on; null: at the beginning
  ended_to      timestamptz,
  kept_to       bigint
);

-- One row: a channel that is gone and had so many messages that later batches of the upkeep delete them. Nobody reaches
-- them meanwhile: all that reads messages looks for their channel first, and ids are not used again.
create table pgchan.removed (
  channel_id    bigint primary key,
  trimmed       bigint not null,                   -- last position that is deleted
  head          bigint not null                    -- last position to delete
);

-- Serves `upkeep`: which channels are to be trimmed. No append changes these columns.
create index channels_kept on pgchan.channels (id) where keep_messages is not null or keep_seconds is not null;

-- Serves `upkeep`: which runs ended long ago.
create index runs_ended on pgchan.runs (ended_at) where ended_at is not null;

-- The schema's revision, read at start-up. Each migration redefines it.
create or replace function pgchan.version() returns text
language sql immutable security definer set search_path = pg_catalog, pg_temp as $$ select 'pgchan_0002' $$;

-- ------------------------------------------------------------------------------------------------ wakeups

-- Announce that channels have moved, that channels were created, that queues have work. A hint without content: names
-- are 16 buckets by channel id, the payload is "id:head,…"; head -1 means that something else than messages changed.
-- The guard keeps a full queue (a stuck listener somewhere on the server) from failing commits; asking for the usage
-- also advances the queue's tail, which heals it after the culprit has gone.
create or replace function pgchan.wake(ids bigint[], heads bigint[], created boolean default false, queues text[] default null)
returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  hint record;
  told boolean;
begin
  if heads is null and queues is null and created is not true or pg_notification_queue_usage() >= 0.5 then
    return;
  end if;
  if created then
    perform pg_notify('pgchan_new', '');
  end if;
  if cardinality(ids) = 1 then
    if heads[1] is not null then  -- an expression, as in write
      told := pg_notify('pgchan_' || mod(ids[1], 16), ids[1] || ':' || heads[1]) is null;
    end if;
  elsif heads is not null then
    -- 190 hints of at most 40 bytes stay below the 8,000 bytes that a payload may have.
    for hint in
      select w.bucket, string_agg(w.id || ':' || w.head, ',') as payload
      from (select mod(a.id, 16) as bucket, a.id, a.head, row_number() over (partition by mod(a.id, 16)) / 190 as part
            from unnest(wake.ids, wake.heads) a (id, head) where a.head is not null) w
      group by w.bucket, w.part
    loop
      perform pg_notify('pgchan_' || hint.bucket, hint.payload);
    end loop;
  end if;
  if queues is not null then
    for hint in select distinct hashtext(q.name) as number from unnest(wake.queues) q (name) where q.name is not null loop
      perform pg_notify('pgchan_queue', hint.number::text);
    end loop;
  end if;
end $$;

-- Of the heads that `append` has returned, those that `wake` should announce; null if none. A journal, which is the channel
-- that is its own owner, is left out: nobody can follow one, and the worker that has the run wrote it. So a step that
-- says nothing wakes nobody. It is asked before the commit: a downgrade that goes on meanwhile drops it, and what fails
-- after the commit would be taken for not done, and be written again.
create or replace function pgchan.announced(ids bigint[], owners bigint[], heads bigint[]) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if owners = ids then
    return null;
  end if;
  if owners is not null and cardinality(ids) > 1 then
    return array(select case when w.id = w.owner then null else w.head end
                 from unnest(ids, owners, heads) with ordinality w (id, owner, head, n) order by w.n);
  end if;
  return heads;
end $$;

-- Lock channels in id order, until the transaction ends. lock_wait null: all, however long it takes. Else wait so many
-- milliseconds, then take those that are free. Returns those that are not locked: a caller's open transaction has them.
create or replace function pgchan.lock_channels(ids bigint[], lock_wait integer) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  busy bigint[] := '{}';
begin
  if lock_wait is null then
    perform from pgchan.channels c where c.id = any (ids) order by c.id for no key update;
    return busy;
  end if;
  begin
    perform set_config('lock_timeout', greatest(lock_wait, 1) || 'ms', true);
    perform from pgchan.channels c where c.id = any (ids) order by c.id for no key update;
    perform set_config('lock_timeout', '0', true);  -- it must not strike later, least of all after the commit
  exception when lock_not_available then
    -- The setting was undone with the subtransaction, and so were the locks.
    with free as materialized (
      select c.id from pgchan.channels c where c.id = any (ids) order by c.id for no key update skip locked)
    select coalesce(array_agg(c.id), '{}') into busy from pgchan.channels c
      where c.id = any (ids) and not exists (select from free f where f.id = c.id);
  end;
  return busy;
end $$;

-- Append a batch over many channels in one go. Entries are grouped by channel; a channel appears in one group only.
--
-- Per group: ids (null: look the name up, create the channel if there is none) · names, types (only where id is null:
-- the type a new channel gets and an existing one must have) · fences (the owner's epoch; null: anybody) · owners
-- (groups of one owner are written together or not at all; null: on its own) · counts (entries) · inboxes (raise
-- channels.inbox to this; null: leave it).
-- Per entry: slots (its group) · nths (1, 2, 3… within it) · kinds (null: all messages), keys, steps, attempts, voids,
-- bodies. counts, slots and nths are null where there is but one entry. The arrays that are not needed are left out
-- because of a single publish: each one costs both sides more than it looks.
--
-- Returns per group: channel_ids, heads (after the append; null where nothing was), outcomes, bases (position = base +
-- nth). When a key of the batch is already stored, bases is null and the answer is per entry: positions, outcomes, ats.
-- Outcomes: appended · repeated (this key with this body is stored at this position) · conflict (with another body) ·
-- missing (no such channel) · fenced (also: a journal, which takes nothing without a fence) · closed · type (the channel
-- has another content type) · blocked (another group of its owner was refused) · locked (somebody's open transaction has
-- held this channel for lock_wait ms; only with it).
-- Locks the channels in id order. Called within a transaction it holds them until that commits, which is why a channel
-- takes one publishing transaction at a time. lock_wait keeps one such transaction from delaying the other channels of
-- the batch; null waits for all.
create or replace function pgchan.append(
  ids bigint[], names text[], types text[], fences bigint[], owners bigint[], counts integer[], inboxes bigint[],
  slots integer[], nths integer[], kinds smallint[], keys text[], steps text[], attempts integer[], voids bigint[],
  bodies bytea[], lock_wait integer default null,
  out channel_ids bigint[], out heads bigint[], out bases bigint[], out outcomes text[], out at timestamptz,
  out positions bigint[], out ats timestamptz[], out created boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  busy bigint[] := '{}';
  unborn boolean := false;  -- whether a transaction that is still open is making one of these channels
  one record;
begin
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);  -- force_durability, without the call
  end if;
  created := false;
  channel_ids := ids;
  if counts is null then
    counts := '{1}';
    slots := '{1}';
    nths := '{1}';
  end if;
  if kinds is null then
    kinds := array_fill(0::smallint, array[cardinality(bodies)]);
  end if;
  if array_position(ids, null) is not null then
    begin
      if lock_wait is not null then
        perform set_config('lock_timeout', greatest(lock_wait, 1) || 'ms', true);
      end if;
      insert into pgchan.channels (name, content_type)
        select distinct on (g.name) g.name, g.type from unnest(ids, names, types) g (id, name, type)
        where g.id is null order by g.name
        on conflict (name) do nothing;
      created := found;
      if lock_wait is not null then
        perform set_config('lock_timeout', '0', true);
      end if;
    exception when lock_not_available then
      if lock_wait is null then
        raise;
      end if;
      -- Make the others, one by one.
      for one in select distinct on (g.name) g.name, g.type from unnest(ids, names, types) g (id, name, type)
                 where g.id is null order by g.name loop
        begin
          perform set_config('lock_timeout', '1ms', true);
          insert into pgchan.channels (name, content_type) values (one.name, one.type) on conflict (name) do nothing;
          created := created or found;
          perform set_config('lock_timeout', '0', true);
        exception when lock_not_available then
          unborn := true;
        end;
      end loop;
    end;
    select array_agg(coalesce(g.id, c.id) order by g.slot) into channel_ids
      from unnest(ids, names) with ordinality g (id, name, slot)
      left join pgchan.channels c on g.id is null and c.name = g.name;
  end if;
  -- The next position comes from the channel's row, never from max(position): a statement that waits for a lock keeps
  -- the snapshot it took before waiting, so max() is stale and two publishers collide. The lock is taken in a statement
  -- of its own; the next one sees what it waited for. It lasts until commit, which puts positions in commit order.
  if cardinality(ids) = 1 and ids[1] is not null
     and (keys is null or cardinality(bodies) = 1 and inboxes is null or cardinality(array_remove(keys, null)) = 0) then
    -- One known channel, and no keys or one entry: what a single publisher has written meanwhile, what a transaction or a
    -- worker of 0.1.0 writes. If nobody has the lock and nothing refuses the batch, it takes two plain statements;
    -- everything else is told apart below.
    update pgchan.channels c set head = c.head + counts[1], inbox = greatest(c.inbox, inboxes[1])
      where c.id = (select k.id from pgchan.channels k where k.id = ids[1] for no key update skip locked)
        and c.closed_at is null and (fences[1] = c.epoch or fences[1] is null and c.name not like 'pgchan:%')
      returning array[c.head - counts[1]], array[c.head], array['appended'] into bases, heads, outcomes;
    if found then
      at := clock_timestamp();
      if keys[1] is not null then
        insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
          values (ids[1], heads[1], append.at, kinds[1], keys[1], steps[1], attempts[1], voids[1], bodies[1])
          on conflict do nothing;
      elsif cardinality(bodies) = 1 then
        insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, void_from, body)
          values (ids[1], heads[1], append.at, kinds[1], steps[1], attempts[1], voids[1], bodies[1]);
      else
        insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, void_from, body)
          select ids[1], bases[1] + e.nth, append.at, e.kind, e.step, e.attempt, e.void_from, e.body
          from unnest(nths, kinds, steps, attempts, voids, bodies) e (nth, kind, step, attempt, void_from, body);
      end if;
      if found then
        return;
      end if;
      -- The key is stored already. Nobody has seen the new head: the row is locked.
      update pgchan.channels c set head = c.head - 1 where c.id = ids[1];
    end if;
  end if;
  busy := pgchan.lock_channels(channel_ids, lock_wait);
  at := clock_timestamp();  -- after the lock, so that it does not run backwards within a channel
  begin
    with judged as (
      select g.*, c.head,
        case when c.id is null then case when g.given is null and unborn then 'locked' else 'missing' end
             when c.id = any (busy) then 'locked'
             when g.fence <> c.epoch or g.fence is null and c.name like 'pgchan:%' then 'fenced'
             when c.closed_at is not null then 'closed'
             when g.given is null and g.type <> c.content_type then 'type' else 'appended' end as outcome
      from unnest(channel_ids, ids, types, fences, owners, counts, inboxes)
        with ordinality g (id, given, type, fence, owner, n, inbox, slot)
      left join pgchan.channels c on c.id = g.id
    ), decided as (
      select j.*, case when j.outcome = 'appended' and j.owner is not null
                        and not bool_and(j.outcome = 'appended') over (partition by j.owner)
                       then 'blocked' else j.outcome end as decision
      from judged j
    ), moved as (
      update pgchan.channels c set head = c.head + d.n, inbox = greatest(c.inbox, d.inbox)
      from decided d where c.id = d.id and d.decision = 'appended'
    )
    select array_agg(case when d.decision = 'appended' then d.head end order by d.slot),
           array_agg(case when d.decision = 'appended' then d.head + d.n end order by d.slot),
           array_agg(d.decision order by d.slot)
      into bases, heads, outcomes from decided d;
    -- A key is recognised for as long as its message is kept, also on a channel that was closed since.
    if 'closed' = any (outcomes) and exists (
        select from unnest(slots, keys) e (slot, key) where e.key is not null and outcomes[e.slot] = 'closed') then
      raise unique_violation;
    end if;
    -- Positions are computed from the arrays. Joining RETURNING back to the entries instead is quadratic.
    insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
      select channel_ids[e.slot], bases[e.slot] + e.nth, append.at, e.kind, e.key, e.step, e.attempt, e.void_from, e.body
      from unnest(slots, nths, kinds, keys, steps, attempts, voids, bodies)
        e (slot, nth, kind, key, step, attempt, void_from, body)
      where bases[e.slot] is not null;
  exception when unique_violation then
    -- A key of the batch is, or may be, stored already. Looking keys up always would cost every batch; this way only
    -- repeats pay.
    bases := null;
    with judged as materialized (
      select e.*, g.id, g.owner, g.inbox, c.head, first."position" as stored_position, first.at as stored_at,
        case when c.id is null then case when g.given is null and unborn then 'locked' else 'missing' end
             when c.id = any (busy) then 'locked'
             when g.fence <> c.epoch or g.fence is null and c.name like 'pgchan:%' then 'fenced'
             when first."position" is not null
               then case when first.body = e.body and first.kind = e.kind then 'repeated' else 'conflict' end
             when c.closed_at is not null then 'closed'
             when g.given is null and g.type <> c.content_type then 'type' else 'appended' end as outcome
      from unnest(slots, kinds, keys, steps, attempts, voids, bodies)
        with ordinality e (slot, kind, key, step, attempt, void_from, body, n)
      join unnest(channel_ids, ids, types, fences, owners, inboxes)
        with ordinality g (id, given, type, fence, owner, inbox, slot) on g.slot = e.slot
      left join pgchan.channels c on c.id = g.id
      left join lateral (select m."position", m.at, m.body, m.kind from pgchan.messages m
                         where e.key is not null and m.channel_id = g.id and m.key = e.key) first on true
    ), decided as materialized (
      select j.*, case when j.outcome = 'appended' and j.owner is not null
                        and not bool_and(j.outcome in ('appended', 'repeated')) over (partition by j.owner)
                       then 'blocked' else j.outcome end as decision
      from judged j
    ), placed as materialized (
      select d.*, case when d.decision = 'appended'
                       then d.head + row_number() over (partition by d.id, d.decision order by d.n)
                       else d.stored_position end as placed_at
      from decided d
    ), moved as (
      update pgchan.channels c set head = g.head, inbox = greatest(c.inbox, g.inbox)
      from (select p.id, max(p.placed_at) as head, max(p.inbox) as inbox from placed p
            where p.decision = 'appended' group by p.id) g
      where c.id = g.id
    ), stored as (
      insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
      select p.id, p.placed_at, append.at, p.kind, p.key, p.step, p.attempt, p.void_from, p.body
      from placed p where p.decision = 'appended'
    )
    select array_agg(p.placed_at order by p.n), array_agg(p.decision order by p.n),
           array_agg(case when p.decision = 'appended' then append.at else p.stored_at end order by p.n)
      into positions, outcomes, ats from placed p;
    select array_agg(p.head order by g.slot) into heads
      from unnest(channel_ids) with ordinality g (id, slot)
      left join (select a.slot, max(a."position") as head
                 from unnest(positions, outcomes, slots) a ("position", outcome, slot)
                 where a.outcome = 'appended' group by a.slot) p on p.slot = g.slot;
  end;
end $$;

-- `append` for one entry to a known channel, in plain values: what a writer has whose caller is alone. Arrays, and an
-- answer in arrays, cost both sides as much as the writing does.
--
-- Returns the channel's new head, null where nothing was appended; the outcome, in the words of `append`; the position
-- and the time of the message, if it is stored.
create or replace function pgchan.append_entry(
  id bigint, fence bigint, inbox bigint, kind smallint, key text, step text, attempt integer, void_from bigint,
  body bytea, lock_wait integer default null,
  out head bigint, out outcome text, out "position" bigint, out at timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  stored record;
begin
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);  -- force_durability, without the call
  end if;
  if key is null or inbox is null then
    -- If nobody has the lock and nothing refuses the entry, it takes two plain statements, as in `append`.
    update pgchan.channels c set head = c.head + 1, inbox = greatest(c.inbox, append_entry.inbox)
      where c.id = (select k.id from pgchan.channels k where k.id = append_entry.id for no key update skip locked)
        and c.closed_at is null and (fence = c.epoch or fence is null and c.name not like 'pgchan:%')
      returning c.head, 'appended' into head, outcome;
    if found then
      "position" := head;
      at := clock_timestamp();
      if key is null then
        insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, void_from, body)
          values (append_entry.id, append_entry.head, append_entry.at, append_entry.kind, append_entry.step,
                  append_entry.attempt, append_entry.void_from, append_entry.body);
      else
        insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
          values (append_entry.id, append_entry.head, append_entry.at, append_entry.kind, append_entry.key,
                  append_entry.step, append_entry.attempt, append_entry.void_from, append_entry.body)
          on conflict do nothing;
      end if;
      if found then
        return;
      end if;
      -- The key is stored already. Nobody has seen the new head: the row is locked.
      update pgchan.channels c set head = c.head - 1 where c.id = append_entry.id;
    end if;
  end if;
  stored := pgchan.append(array[id], null, null, array[fence], null, null, array[inbox], null, null, array[kind],
                          case when key is not null then array[key] end, array[step], array[attempt],
                          array[void_from], array[body], lock_wait);
  head := stored.heads[1];
  outcome := stored.outcomes[1];
  "position" := coalesce(stored.positions[1], stored.bases[1] + 1);
  at := case when "position" is not null then coalesce(stored.ats[1], stored.at) end;
end $$;

-- `append_entry` for those who may publish and nothing else. Raises PC001 for a key that is not legal.
create or replace function pgchan.append_message(
  id bigint, key text, body bytea, lock_wait integer default null,
  out head bigint, out outcome text, out "position" bigint, out at timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  stored record;
begin
  if key is not null then
    perform pgchan.check_key(key);
  end if;
  stored := pgchan.append_entry(id, null, null, 0::smallint, key, null, null, null, body, lock_wait);
  head := stored.head;
  outcome := stored.outcome;
  "position" := stored."position";
  at := stored.at;
end $$;

-- `append`, durable, then announced. What the writer of a worker calls.
create or replace procedure pgchan.write(
  ids bigint[], names text[], types text[], fences bigint[], owners bigint[], counts integer[], inboxes bigint[],
  slots integer[], nths integer[], kinds smallint[], keys text[], steps text[], attempts integer[], voids bigint[],
  bodies bytea[], lock_wait integer,
  inout channel_ids bigint[], inout heads bigint[], inout bases bigint[], inout outcomes text[], inout at timestamptz,
  inout positions bigint[], inout ats timestamptz[])
language plpgsql as $$
#variable_conflict use_variable
declare
  stored record;
  announced bigint[];
  told boolean;
begin
  stored := pgchan.append(ids, names, types, fences, owners, counts, inboxes,
                          slots, nths, kinds, keys, steps, attempts, voids, bodies, lock_wait);
  channel_ids := stored.channel_ids;
  heads := stored.heads;
  bases := stored.bases;
  outcomes := stored.outcomes;
  at := stored.at;
  positions := stored.positions;
  ats := stored.ats;
  announced := pgchan.announced(channel_ids, owners, heads);
  commit;
  told := pgchan.wake(channel_ids, announced, stored.created) is null;
end $$;

-- The same for one entry to a known channel: `append_message`, durable, then announced.
create or replace procedure pgchan.write_message(
  id bigint, key text, body bytea, lock_wait integer, inout outcome text, inout "position" bigint, inout at timestamptz)
language plpgsql as $$
#variable_conflict use_variable
declare
  stored record;
  told boolean;
begin
  stored := pgchan.append_message(id, key, body, lock_wait);
  outcome := stored.outcome;
  "position" := stored."position";
  at := stored.at;
  commit;
  told := pgchan.wake(array[id], array[stored.head]) is null;
end $$;

-- And `append_entry`, of a worker: owner is that of `append`, which tells a journal.
create or replace procedure pgchan.write_entry(
  id bigint, fence bigint, owner bigint, inbox bigint, kind smallint, key text, step text, attempt integer,
  void_from bigint, body bytea, lock_wait integer, inout outcome text, inout "position" bigint, inout at timestamptz)
language plpgsql as $$
#variable_conflict use_variable
declare
  stored record;
  announced bigint[];
  told boolean;
begin
  stored := pgchan.append_entry(id, fence, inbox, kind, key, step, attempt, void_from, body, lock_wait);
  outcome := stored.outcome;
  "position" := stored."position";
  at := stored.at;
  announced := pgchan.announced(array[id], array[owner], array[stored.head]);
  commit;
  told := pgchan.wake(array[id], announced) is null;
end $$;

-- Whether a body is one JSON string, as it may be joined to others at its quotation marks. Not one with the half of a
-- surrogate pair: it would become a character together with the other half, and readers of halves disagree already.
create or replace function pgchan.is_text(body bytea) returns boolean
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return convert_from(body, 'UTF8')
    ~ '^"([^"\\\u0001-\u001f]|\\(["\\/bfnrt]|u([0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})))*"$';
exception when character_not_in_repertoire then
  return false;
end $$;

-- Rewrite a closed channel as its final text: what is not void, text joined to text of the same step, in as few messages
-- as their size allows. removed: by how many messages it is shorter; 0: nothing was to be gained, so nothing was done, as
-- when it is repeated. Outcomes: compacted, missing, open, failed (the run may be resumed), type (it does not hold JSON),
-- long (more messages than one transaction should rewrite).
--
-- Positions are never given out twice, so the new messages stand behind the old ones: a reset without a step, which says
-- that all before it is void; the text; and, for a run, the message that told of its end. The boundary moves to just
-- before the reset, and the old rows go, in the same transaction. So whoever had read everything is told to drop it, and
-- then the same once more; whoever stands in between is told Trimmed; nobody reads a mixture.
-- Only the channel's row is locked. It is open until a run that is not over has ended, and how that has ended is in the
-- same commit as the closing; of the ends only `failed` can be undone.
-- Planned for each channel by itself: one of ten messages and one of a million want other joins.
create or replace function pgchan.compact_channel(name text, out outcome text, out removed bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
declare
  channel pgchan.channels;
  state text;
  one record;
  joins boolean := false;  -- whether the message before can be joined to, …
  step text;               -- its step, …
  size bigint := 0;        -- and the bytes of text so far
  starts bigint[] := '{}'; -- where each new message begins
  ending boolean;
  moment timestamptz;
begin
  perform pgchan.check_name(name);
  perform pgchan.force_durability();
  removed := 0;
  select * into channel from pgchan.channels c where c.name = compact_channel.name for no key update;
  if not found then
    outcome := 'missing';
    return;
  end if;
  select r.state into state from pgchan.runs r where r.channel_id = channel.id;
  outcome := case when channel.closed_at is null then 'open'
                  when state = 'failed' then 'failed'
                  when lower(rtrim(split_part(channel.content_type, ';', 1))) <> 'application/json' then 'type'
                  when channel.head - channel.trimmed > 250000 then 'long'
                  else 'compacted' end;
  if outcome <> 'compacted' then
    return;
  end if;
  -- Keys of pgchan's own, which tell a replay what was said, have served their time; who has given a key of his own to a
  -- message may look for it.
  for one in
    select m."position", m.step, octet_length(m.body) - 2 as size,
           coalesce(m.key like 'pgchan:%', true) and pgchan.is_text(m.body) as joins
    from pgchan.final_messages m
    where m.channel_id = channel.id and m.kind = 0 and m."position" > channel.trimmed and m."position" <= channel.head
    order by m."position"
  loop
    if joins and one.joins and one.step is not distinct from step and size + one.size <= 1048574 then
      size := size + one.size;
    else
      starts := array_append(starts, one."position");
      size := one.size;
    end if;
    joins := one.joins;
    step := one.step;
  end loop;
  ending := state is not null and channel.head > channel.trimmed and exists (
    select from pgchan.messages m where m.channel_id = channel.id and m."position" = channel.head and m.kind = 2);
  removed := greatest(0, channel.head - channel.trimmed - cardinality(starts) - 1 - ending::integer);
  if removed = 0 then
    return;
  end if;
  moment := clock_timestamp();
  insert into pgchan.messages (channel_id, "position", at, kind, void_from, body)
    values (channel.id, channel.head + 1, moment, 2, channel.trimmed + 1,
            convert_to('{"type":"reset","from":' || channel.trimmed + 1 || '}', 'UTF8'));
  -- What stands alone is moved, with its key, and without its body being copied if that is large.
  with placed as (
    select m."position", m.step, m.attempt, m.body, count(s.start) over (order by m."position") as n
    from pgchan.final_messages m left join unnest(starts) s (start) on s.start = m."position"
    where m.channel_id = channel.id and m.kind = 0 and m."position" > channel.trimmed and m."position" <= channel.head
  ), joined as (
    insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, body)
      select channel.id, channel.head + 1 + p.n, moment, 0, max(p.step), max(p.attempt),
             '\x22'::bytea || string_agg(substr(p.body, 2, greatest(0, octet_length(p.body) - 2)), '' order by p."position")
             || '\x22'
      from placed p group by p.n having count(*) > 1  -- asked after the bodies of all were cut
  )
  update pgchan.messages m
    set "position" = channel.head + 1 + a.n, at = moment, key = case when m.key not like 'pgchan:%' then m.key end
    from (select p.n, min(p."position") as "position" from placed p group by p.n having count(*) = 1) a
    where m.channel_id = channel.id and m."position" = a."position";
  if ending then
    update pgchan.messages m set "position" = channel.head + 2 + cardinality(starts), at = moment
      where m.channel_id = channel.id and m."position" = channel.head;
  end if;
  delete from pgchan.messages m
    where m.channel_id = channel.id and m."position" > channel.trimmed and m."position" <= channel.head;
  update pgchan.channels c
    set trimmed = channel.head, head = channel.head + 1 + cardinality(starts) + ending::integer
    where c.id = channel.id;
end $$;

-- Delete a channel and its messages; of a run that has ended, its journal too. Outcomes: deleted, missing, running. Past
-- 10,000 messages, which take about a tenth of a second, the upkeep deletes them.
create or replace function pgchan.delete_channel(name text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  run pgchan.runs;
  target bigint;
begin
  perform pgchan.force_durability();
  select r.* into run from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = delete_channel.name for update of r;
  if found and run.ended_at is null then
    return 'running';
  end if;
  select c.id into target from pgchan.channels c where c.name = delete_channel.name for update;
  if target is null then
    return 'missing';
  end if;
  perform pgchan.remove_channels(array_remove(array[target, run.journal_id], null), 10000);
  perform pgchan.wake(array[target], array[-1]);
  return 'deleted';
end $$;

-- Remove channels that the caller has locked, and the runs that they belong to. Their messages go with them, the fewest
-- first, as long as they are at most `most`; those of the others are left to `upkeep`. Returns how many were deleted.
create or replace function pgchan.remove_channels(ids bigint[], most bigint) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  gone bigint;
begin
  insert into pgchan.removed (channel_id, trimmed, head)
    select s.id, s.trimmed, s.head from (
      select c.id, c.trimmed, c.head, sum(c.head - c.trimmed) over (order by c.head - c.trimmed, c.id) as total
      from pgchan.channels c where c.id = any (ids)) s
    where s.total > most and s.head > s.trimmed;
  delete from pgchan.messages m
    where m.channel_id = any (ids) and not exists (select from pgchan.removed r where r.channel_id = m.channel_id);
  get diagnostics gone = row_count;
  delete from pgchan.runs r where r.channel_id = any (ids);
  delete from pgchan.channels c where c.id = any (ids);
  return gone;
end $$;

-- Keep the last `messages` of a channel and none older than `seconds`; null: no such bound. False if there is no channel.
create or replace function pgchan.set_channel_retention(channel text, messages bigint, seconds double precision) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if messages < 1 or not seconds between 0 and 1e9 then
    raise exception 'a channel keeps at least one message, for 0 to 1e9 seconds'
      using errcode = 'PC001', hint = 'null is no bound';
  end if;
  perform pgchan.force_durability();
  update pgchan.channels c set keep_messages = messages, keep_seconds = seconds
    where c.name = set_channel_retention.channel;
  return found;
end $$;

-- ------------------------------------------------------------------------------------------------ upkeep

-- How the database stays small. Each worker calls `upkeep` now and then. The one that gets the lock on the row of
-- `retention` does a batch; the others go on with their work. A batch is one short transaction, so if it is cut short
-- nothing of it has happened, and the lock is free. It waits for nobody: what is locked is left to a later round. Each
-- kind of work goes round in windows of candidates, in which those that must stay are passed over: however many runs
-- with an expired channel have not ended, a batch looks at a few hundred.

-- Keep runs for so many seconds after their end, with all that they said and recorded; null: for ever.
create or replace function pgchan.set_retention(ended_runs double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not ended_runs between 0 and 1e9 then
    raise exception 'ended runs are kept for 0 to 1e9 seconds' using errcode = 'PC001', hint = 'null is for ever';
  end if;
  perform pgchan.force_durability();
  update pgchan.retention r set ended_runs = set_retention.ended_runs;
end $$;

-- Do one batch. Returns how many channels and how many messages went, and whether there is more to do at once; nulls if
-- another one is under way. most: messages, so that the batch, and with it what a publisher may have to wait for while
-- his channel is trimmed, is over within some tens of milliseconds.
create or replace function pgchan.upkeep(most integer default 2000, out channels bigint, out messages bigint, out more boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
#variable_conflict use_variable
declare
  policy pgchan.retention;
  expired record;
  ended record;
  kept record;
begin
  select r.* into policy from pgchan.retention r for update skip locked;
  if not found then
    return;
  end if;
  perform pgchan.force_durability();
  channels := 0;
  messages := pgchan.delete_removed(most);
  select * into expired from pgchan.remove_expired(policy.expired_to, most - messages) e;
  select * into ended from pgchan.remove_ended(policy.ended_runs, policy.ended_to, most - messages - expired.messages) e;
  channels := expired.channels + ended.channels;
  messages := messages + expired.messages + ended.messages;
  select * into kept from pgchan.trim_kept(policy.kept_to, most - messages) k;  -- last: publishers may wait for it
  messages := messages + kept.messages;
  more := messages >= most or (channels > 0 or kept.messages > 0)
                              and (expired.reached, ended.reached, kept.reached) is distinct from (null, null, null);
  if (policy.expired_to, policy.ended_to, policy.kept_to)
     is distinct from (expired.reached, ended.reached, kept.reached) then
    update pgchan.retention r set expired_to = expired.reached, ended_to = ended.reached, kept_to = kept.reached;
  end if;
end $$;

-- What workers of pgchan_0001 call instead. Goes with the revision that does not serve them any more.
create or replace function pgchan.expire(most integer default 100) returns integer
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select u.channels::integer from pgchan.upkeep() u
$$;

-- The parts of `upkeep`. Each does nothing when `most` is used up, begins after where its last batch came to, and returns
-- where this one came to; null: the round is over.

-- Delete messages whose channel is gone; how many.
create or replace function pgchan.delete_removed(most bigint) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  one pgchan.removed;
  boundary bigint;
  gone bigint := 0;
begin
  for one in select r.* from pgchan.removed r order by r.channel_id limit 100 loop
    exit when gone >= most;
    boundary := least(one.head, one.trimmed + most - gone);
    -- By positions, and not the first so many: those that were deleted before stay in the index until it is vacuumed.
    delete from pgchan.messages m
      where m.channel_id = one.channel_id and m."position" > one.trimmed and m."position" <= boundary;
    gone := gone + boundary - one.trimmed;
    if boundary = one.head then
      delete from pgchan.removed r where r.channel_id = one.channel_id;
    else
      update pgchan.removed r set trimmed = boundary where r.channel_id = one.channel_id;
    end if;
  end loop;
  return gone;
end $$;

-- Remove channels whose time is over.
create or replace function pgchan.remove_expired(
  after timestamptz, most bigint, out channels bigint, out messages bigint, out reached timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  ids bigint[];
  moment timestamptz := clock_timestamp();  -- no index serves a comparison with the function itself
begin
  reached := after;
  if most > 0 then
    select array_agg(d.id), max(d.expires_at) into ids, reached from (
      select c.id, c.expires_at from pgchan.channels c
      where c.expires_at <= moment and c.expires_at > coalesce(after, '-infinity')
      order by c.expires_at limit 500) d;
    if coalesce(cardinality(ids), 0) < 500 then
      reached := null;
    end if;
  end if;
  select r.* into channels, messages from pgchan.remove_free(coalesce(ids, '{}'), most) r;
end $$;

-- Remove runs that ended more than so many seconds ago. A channel with a time of its own goes by that. A run that another
-- one has started goes after it, or when that one has begun anew with a fresh journal: it may be asked for its result.
create or replace function pgchan.remove_ended(
  seconds double precision, after timestamptz, most bigint,
  out channels bigint, out messages bigint, out reached timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  ids bigint[];
  seen integer := 0;
  before timestamptz := clock_timestamp() - make_interval(secs => seconds);
begin
  reached := after;
  if most > 0 then
    select array_agg(d.channel_id) filter (where d.may_go), max(d.ended_at), count(*) into ids, reached, seen from (
      select r.channel_id, r.ended_at, c.expires_at is null and not exists (
          select from pgchan.runs p join pgchan.channels j on j.id = p.journal_id
          where p.channel_id = r.parent and r.created_at >= j.created_at) as may_go
      from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
      where r.ended_at < before
        and r.ended_at > coalesce(after, '-infinity')
      order by r.ended_at limit 500) d;
    if seen < 500 then
      reached := null;
    end if;
  end if;
  select r.* into channels, messages from pgchan.remove_free(coalesce(ids, '{}'), most) r;
end $$;

-- Remove those of these channels that nobody has locked and whose run, if they have one, has ended.
create or replace function pgchan.remove_free(ids bigint[], most bigint, out channels bigint, out messages bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  ended bigint[];
  free bigint[];
  doomed bigint[];
begin
  channels := 0;
  messages := 0;
  if cardinality(ids) = 0 then
    return;
  end if;
  select coalesce(array_agg(l.channel_id), '{}') into ended from (
    select r.channel_id from pgchan.runs r where r.channel_id = any (ids) and r.ended_at is not null
    order by r.channel_id for update skip locked) l;
  select coalesce(array_agg(l.id), '{}') into free from (
    select c.id from pgchan.channels c
    where c.id = any (ids) or c.id in (select r.journal_id from pgchan.runs r where r.channel_id = any (ended))
    order by c.id for update skip locked) l;
  -- Asked once more now that they are locked: a run may just have been started on one of them.
  select count(*), array_agg(c.id) || array_remove(array_agg(r.journal_id), null) into channels, doomed
    from pgchan.channels c left join pgchan.runs r on r.channel_id = c.id
    where c.id = any (ids) and c.id = any (free)
      and (r.channel_id is null or r.channel_id = any (ended) and r.journal_id = any (free));
  messages := pgchan.remove_channels(coalesce(doomed, '{}'), most);
end $$;

-- Trim the channels that are to keep a number of messages or an age, as far as no run that goes on needs what it said
-- itself, and signals that nobody has consumed.
create or replace function pgchan.trim_kept(after bigint, most bigint, out messages bigint, out reached bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
#variable_conflict use_variable
declare
  one bigint;
  channel pgchan.channels;
  room bigint;
  boundary bigint;
  locked integer := 0;
begin
  messages := 0;
  reached := after;
  for one in
    select c.id from pgchan.channels c
    where (c.keep_messages is not null or c.keep_seconds is not null) and c.id > coalesce(after, 0)
    order by c.id limit 100
  loop
    room := most - messages;
    exit when room <= 0;
    perform from pgchan.channels c
      where c.id = one and (
        c.head - c.trimmed > c.keep_messages
        or exists (select from pgchan.messages m where m.channel_id = c.id and m."position" = c.trimmed + 1
                     and m.at < clock_timestamp() - make_interval(secs => c.keep_seconds)));
    if not found then
      reached := one;
      continue;
    end if;
    -- A channel that is busy is locked most of the time, each time for a moment. Waiting for that one must not keep the
    -- channels locked that were trimmed already, so it is left to the next batch, which begins with it.
    if pgchan.lock_channels(array[one], case when messages = 0 then 50 else 1 end) <> '{}' then
      exit when messages > 0;
      reached := one;
      locked := locked + 1;
      exit when locked = 4;
      continue;
    end if;
    reached := one;
    select c.* into channel from pgchan.channels c where c.id = one;
    continue when not found;
    boundary := channel.head - channel.keep_messages;
    if channel.keep_seconds is not null then
      select greatest(boundary, coalesce(min(m."position") - 1, channel.trimmed + room)) into boundary
        from pgchan.messages m
        where m.channel_id = one and m."position" > channel.trimmed and m."position" <= channel.trimmed + room
          and m.at >= clock_timestamp() - make_interval(secs => channel.keep_seconds);
    end if;
    boundary := least(boundary, channel.trimmed + room, channel.head, (
      select least(r.speaks_from, (select min(s."position") from pgchan.open_signals(one) s)) - 1
      from pgchan.runs r where r.channel_id = one and r.ended_at is null));
    continue when boundary <= channel.trimmed;
    update pgchan.channels c set trimmed = boundary where c.id = one;
    delete from pgchan.messages m
      where m.channel_id = one and m."position" > channel.trimmed and m."position" <= boundary;
    messages := messages + boundary - channel.trimmed;
    if boundary = channel.trimmed + room then  -- there may be more of it
      reached := one - 1;
      exit;
    end if;
  end loop;
  if not exists (select from pgchan.channels c
                 where (c.keep_messages is not null or c.keep_seconds is not null) and c.id > coalesce(reached, 0)) then
    reached := null;
  end if;
end $$;

-- ------------------------------------------------------------------------------------------------ runs

-- Start runs: idempotent by id. Outcomes: started · existed (same workflow, same input) · conflict (another) · closed (a
-- channel of this name exists and takes no more messages). ready: the queues that must be woken. Ids are given once each.
create or replace function pgchan.enqueue_many(
  runs text[], workflows text[], versions text[], queues text[], priorities integer[], delays double precision[],
  timeouts double precision[], inputs bytea[], parents bigint[],
  out outcomes text[], out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  made integer;
begin
  perform pgchan.check_name(g.run) from unnest(runs) g (run);
  perform pgchan.force_durability();
  insert into pgchan.channels (name) select g.run from unnest(runs) g (run) order by g.run on conflict (name) do nothing;
  get diagnostics made = row_count;
  if made = cardinality(runs) then
    outcomes := array_fill('started'::text, array[made]);  -- nobody else has seen these channels, so none has a run
  else
    -- The rows stay locked until this commits, so of two concurrent starts the second sees the first one's run.
    perform from pgchan.channels c where c.name = any (runs) order by c.id for no key update;
    -- Inputs are compared as bytes first; the other comparison is for a start that is repeated in another JSON style.
    select array_agg(
             case when r.channel_id is null then case when c.closed_at is null then 'started' else 'closed' end
                  when r.workflow = g.workflow
                       and (r.input = g.input or pgchan.as_json(r.input, 'application/json')
                                                 = pgchan.as_json(g.input, 'application/json')) then 'existed'
                  else 'conflict' end order by g.n)
      into outcomes
      from unnest(runs, workflows, inputs) with ordinality g (run, workflow, input, n)
      join pgchan.channels c on c.name = g.run left join pgchan.runs r on r.channel_id = c.id;
  end if;
  with begun as materialized (
    select c.id, c.head, g.*
    from unnest(runs, workflows, versions, queues, priorities, delays, timeouts, inputs, parents, outcomes)
      g (run, workflow, version, queue, priority, delay, timeout, input, parent, outcome)
    join pgchan.channels c on c.name = g.run
    where g.outcome = 'started'
  ), journals as (
    insert into pgchan.channels (name) select 'pgchan:journal:' || m.id from begun m order by m.id returning id, name
  ), inserted as (
    insert into pgchan.runs (channel_id, journal_id, workflow, version, queue, priority, state, wake_at, speaks_from,
                             deadline, input, parent)
      select m.id, j.id, m.workflow, m.version, m.queue, m.priority, 'scheduled',
             clock_timestamp() + make_interval(secs => m.delay), m.head + 1,
             clock_timestamp() + make_interval(secs => coalesce(m.delay, 0) + m.timeout), m.input, m.parent
      from begun m join journals j on j.name = 'pgchan:journal:' || m.id
  )
  select array_agg(distinct m.queue) into ready from begun m where m.delay is null;
end $$;

-- One of them, as the statements of callers want it. ready is null if nothing must be woken.
create or replace function pgchan.enqueue(
  run text, workflow text, version text, queue text, priority integer, delay double precision, timeout double precision,
  input bytea, parent bigint,
  out outcome text, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  started record;
begin
  started := pgchan.enqueue_many(array[run], array[workflow], array[version], array[queue], array[priority],
                                 array[delay], array[timeout], array[input], array[parent]);
  outcome := started.outcomes[1];
  ready := started.ready[1];
end $$;

-- `enqueue`, durable, then announced.
create or replace procedure pgchan.call_enqueue(
  run text, workflow text, version text, queue text, priority integer, delay double precision, timeout double precision,
  input bytea, parent bigint, inout outcome text, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
declare
  started record;
  told boolean;
begin
  started := pgchan.enqueue(run, workflow, version, queue, priority, delay, timeout, input, parent);
  outcome := started.outcome;
  ready := started.ready;
  commit;
  told := pgchan.wake(null, null, true, array[ready]) is null;
end $$;

-- `enqueue_many`, if each lock that it needs is free within lock_wait ms; else all outcomes are locked, and nothing is done.
create or replace function pgchan.try_enqueue_many(
  runs text[], workflows text[], versions text[], queues text[], priorities integer[], delays double precision[],
  timeouts double precision[], inputs bytea[], parents bigint[], lock_wait integer,
  out outcomes text[], out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
begin
  perform set_config('lock_timeout', lock_wait || 'ms', true);
  select e.outcomes, e.ready into outcomes, ready
    from pgchan.enqueue_many(runs, workflows, versions, queues, priorities, delays, timeouts, inputs, parents) e;
  perform set_config('lock_timeout', '0', true);
exception when lock_not_available then
  outcomes := array_fill('locked'::text, array[cardinality(runs)]);
end $$;

-- `try_enqueue_many`, durable, then announced.
create or replace procedure pgchan.call_enqueue_many(
  runs text[], workflows text[], versions text[], queues text[], priorities integer[], delays double precision[],
  timeouts double precision[], inputs bytea[], parents bigint[], lock_wait integer, inout outcomes text[])
language plpgsql as $$
#variable_conflict use_variable
declare
  started record;
  told boolean;
begin
  started := pgchan.try_enqueue_many(runs, workflows, versions, queues, priorities, delays, timeouts, inputs, parents,
                                     lock_wait);
  outcomes := started.outcomes;
  commit;
  told := pgchan.wake(null, null, true, started.ready) is null;
end $$;

-- Hand ready runs of these queues and workflows to a worker, in order of priority and age, and raise the epoch of both
-- their channels: from this commit on no earlier owner can write. Nothing for a worker that was reaped: its row is
-- locked against deletion until this commits, so a reaper either sees these runs or stops this claim.
create or replace function pgchan.claim(worker integer, queues text[], workflows text[], most integer)
returns table (channel_id bigint, run text, journal_id bigint, workflow text, input bytea, attempt integer, epoch bigint,
               speaks_from bigint, deadline timestamptz, head bigint, journal_head bigint, now timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  one text;
  picked bigint[] := '{}';
  owned bigint[] := '{}';  -- the channels of these runs
  taken bigint[];
  theirs bigint[];
  moment timestamptz := clock_timestamp();  -- no index serves a comparison with the function itself
  is_due boolean := coalesce((select min(r.wake_at) from pgchan.runs r
                              where r.wake_at is not null and r.state in ('scheduled', 'waiting')) <= moment, false);
begin
  -- A wakeup reaches every worker of a queue. Those that come too late lock nothing, so they have nothing to commit.
  -- Each look is for the first in the order of an index, else a planner that expects many reads the table for one.
  if not is_due and not exists (select from unnest(queues) q (name) cross join lateral (
                                  select from pgchan.runs r
                                  where r.state = 'scheduled' and r.wake_at is null
                                    and r.queue = q.name and r.workflow = any (claim.workflows)
                                  order by r.priority desc, r.created_at limit 1) f) then
    return;
  end if;
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);  -- force_durability, without the call
  end if;
  perform from pgchan.workers w where w.id = claim.worker for key share;
  if not found then
    return;
  end if;
  if is_due then
    -- Timers that are due become ready. `wake_at is null` is what makes the next run of a queue one index look-up,
    -- however many runs are asleep.
    update pgchan.runs r set state = 'scheduled', wake_at = null
      where r.channel_id in (
        select d.channel_id from pgchan.runs d
        where d.wake_at <= moment and d.state in ('scheduled', 'waiting')
        order by d.wake_at limit 1000 for no key update skip locked);
  end if;
  foreach one in array queues loop  -- queue by queue: `= any` would lose the order of the index
    select array_agg(p.channel_id), array_agg(p.journal_id) into taken, theirs from (
      select r.channel_id, r.journal_id from pgchan.runs r
      where r.state = 'scheduled' and r.wake_at is null and r.queue = one and r.workflow = any (claim.workflows)
      order by r.priority desc, r.created_at limit most - cardinality(picked) for no key update skip locked) p;
    picked := picked || coalesce(taken, '{}');
    owned := owned || coalesce(taken || theirs, '{}');
    exit when cardinality(picked) >= most;
  end loop;
  if cardinality(picked) = 0 then
    return;
  end if;
  begin
    perform from pgchan.channels c where c.id = any (owned) order by c.id for no key update nowait;
  exception when lock_not_available then  -- rarely; what was locked by then is free again, and all is waited for in order
    picked := pgchan.lock_runs(picked, 50);
  end;
  -- What `supersede` does, and more, so that a row of runs or channels is read and written once. The heads tell whether
  -- there is anything to load. They are read here and not by the calling statement: its snapshot is older than this
  -- claim, so it would miss what was written since, or even the channel of a run just started.
  return query
    with moved as (
      update pgchan.runs r set state = 'running', worker = claim.worker, attempt = r.attempt + 1,
                               started_at = coalesce(r.started_at, clock_timestamp())
      where r.channel_id = any (picked)
      returning r.channel_id, r.journal_id, r.workflow, r.input, r.attempt, r.speaks_from, r.deadline
    ), claimed as materialized (
      select m.*, o.name, o.head, j.head as journal_head,
             greatest(o.epoch, j.epoch) + 1 + floor(random() * (1 << 20))::bigint as epoch
      from moved m join pgchan.channels o on o.id = m.channel_id join pgchan.channels j on j.id = m.journal_id
    ), superseded as (
      update pgchan.channels c set epoch = d.epoch from claimed d where c.id in (d.channel_id, d.journal_id)
    )
    select d.channel_id, d.name, d.journal_id, d.workflow, d.input, d.attempt, d.epoch, d.speaks_from, d.deadline,
           d.head, d.journal_head, clock_timestamp()
    from claimed d;
end $$;

-- Raise the epochs of these runs' channels, both to the same number: whoever owned them can write no more. The caller
-- has locked the runs. The step is random, or a claim that a failover lost would have the number of the one after it,
-- and two workers would own the run.
create or replace function pgchan.supersede(runs bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
  perform from pgchan.channels c
    where c.id in (select unnest(array[r.channel_id, r.journal_id]) from pgchan.runs r where r.channel_id = any (supersede.runs))
    order by c.id for no key update;
  update pgchan.channels c set epoch = e.epoch
    from (select r.channel_id, r.journal_id,
                 greatest(o.epoch, j.epoch) + 1 + floor(random() * (1 << 20))::bigint as epoch
          from pgchan.runs r join pgchan.channels o on o.id = r.channel_id join pgchan.channels j on j.id = r.journal_id
          where r.channel_id = any (supersede.runs)) e
    where c.id in (e.channel_id, e.journal_id);
end $$;

-- Lock the rows of runs that are about to end, and against `suspend` those of the runs which started them, in order of
-- ids. Without the latter a parent that suspends just before this commits would neither see the end nor be woken by it.
-- It is a share of a lock: children that end together do not wait for each other, nor does a claim of the parent.
create or replace function pgchan.hold_families(runs bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  one record;
begin
  for one in
    select f.id, bool_or(f.ends) as ends
    from pgchan.runs r cross join lateral (values (r.channel_id, true), (r.parent, false)) f (id, ends)
    where r.channel_id = any (runs) and f.id is not null group by f.id order by f.id
  loop
    if one.ends then
      perform from pgchan.runs r where r.channel_id = one.id for update;
    else
      perform from pgchan.runs r where r.channel_id = one.id for key share;
    end if;
  end loop;
end $$;

-- End runs. Signals that nobody consumed are named in the `ended` control message; both channels close, so readers end
-- too; a parent that waits becomes ready. Outcomes: finished, fenced. ready: queues of parents that must be woken.
create or replace function pgchan.finish_many(
  runs bigint[], epochs bigint[], states text[], results bytea[], errors bytea[], out outcomes text[], out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  owned bigint[];  -- null where another epoch owns the run
begin
  perform pgchan.force_durability();
  perform pgchan.hold_families(runs);
  select array_agg(c.id order by g.n), array_agg(case when c.id is null then 'fenced' else 'finished' end order by g.n)
    into owned, outcomes
    from unnest(runs, epochs) with ordinality g (run, epoch, n)
    left join pgchan.runs r on r.channel_id = g.run and r.state = 'running'
    left join pgchan.channels c on c.id = r.channel_id and c.epoch = g.epoch;
  ready := pgchan.settle_many(owned, states, results, errors);
end $$;

-- One of them.
create or replace function pgchan.finish(
  run bigint, epoch bigint, state text, result bytea, error bytea, out outcome text, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  ended record;
begin
  ended := pgchan.finish_many(array[run], array[epoch], array[state], array[result], array[error]);
  outcome := ended.outcomes[1];
  ready := ended.ready[1];
end $$;

-- What `finish_many` and `cancel` have in common, once they hold the families. Runs that are null are passed over. Returns
-- the queues of parents that wait.
create or replace function pgchan.settle_many(runs bigint[], states text[], results bytea[], errors bytea[]) returns text[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  ending bigint[];
  journals bigint[];
  mothers bigint[];
  ready text[];
  moment timestamptz;
begin
  with ended as (
    update pgchan.runs r set state = e.state, result = e.result, error = e.error, worker = null, wake_at = null,
                             ended_at = clock_timestamp()
    from unnest(runs, states, results, errors) e (run, state, result, error) where r.channel_id = e.run
    returning r.channel_id, r.journal_id, r.parent)
  select array_agg(e.channel_id), array_agg(e.journal_id), array_remove(array_agg(e.parent), null)
    into ending, journals, mothers from ended e;
  if ending is null then
    return null;
  end if;
  perform from pgchan.channels c where c.id = any (ending || journals) order by c.id for no key update;
  moment := clock_timestamp();  -- after the lock, as in append
  -- What supersede, append and a close would do one after the other: each row of a channel is written once. The number is
  -- drawn once for both channels of a run, for what stands in a `with` that is used twice is not computed anew.
  with ended as materialized (
    select r.channel_id, r.journal_id, r.state, o.head, o.closed_at is null as speaks, s.missed,
           greatest(o.epoch, j.epoch) + 1 + floor(random() * (1 << 20))::bigint as epoch
    from pgchan.runs r
    cross join lateral (select c.* from pgchan.channels c where c.id = r.channel_id limit 1) o
    cross join lateral (select c.epoch from pgchan.channels c where c.id = r.journal_id limit 1) j
    cross join lateral (select string_agg(m."position"::text, ',' order by m."position") as missed
                        from pgchan.open_signals(r.channel_id) m) s
    where r.channel_id = any (ending)
  ), closed as (
    update pgchan.channels c
      set epoch = e.epoch, closed_at = moment,
          head = c.head + case when c.id = e.channel_id and e.speaks then 1 else 0 end
      from ended e where c.id in (e.channel_id, e.journal_id)
  )
  insert into pgchan.messages (channel_id, "position", at, kind, body)
    select e.channel_id, e.head + 1, moment, 2,
           convert_to('{"type":"ended","state":"' || e.state || '"' || coalesce(',"missed":[' || e.missed || ']', '')
                      || '}', 'UTF8')
    from ended e where e.speaks;
  if cardinality(mothers) > 0 then
    -- Rows of runs after rows of channels, against the rule; what holds a parent's for longer is kept out by the lock on
    -- the families.
    perform from pgchan.runs r where r.channel_id = any (mothers) and r.state = 'waiting'
      order by r.channel_id for no key update;
    with woken as (
      update pgchan.runs r set state = 'scheduled', wake_at = null
      where r.channel_id = any (mothers) and r.state = 'waiting' returning r.queue)
    select array_agg(distinct w.queue) into ready from woken w;
  end if;
  return ready;
end $$;

-- With these a call of pgchan_0001 goes on which the migration found under way: it has its old text, and had to wait for a
-- table. They go with the revision that does not serve it any more.
create or replace function pgchan.hold_family(run bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select pgchan.hold_families(array[run])
$$;

create or replace function pgchan.settle(run bigint, state text, result bytea, error bytea) returns text
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select (pgchan.settle_many(array[run], array[state], array[result], array[error]))[1]
$$;

-- `finish`, durable, then announced.
create or replace procedure pgchan.call_finish(
  run bigint, epoch bigint, state text, result bytea, error bytea, inout outcome text, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
declare
  ended record;
  told boolean;
begin
  ended := pgchan.finish(run, epoch, state, result, error);
  outcome := ended.outcome;
  ready := ended.ready;
  commit;
  told := pgchan.wake(array[run], array[-1], false, array[ready]) is null;
end $$;

-- `finish_many`, if each lock that it needs is free within lock_wait ms; else all outcomes are locked, and nothing is done.
-- heads: for `wake`.
create or replace function pgchan.try_finish_many(
  runs bigint[], epochs bigint[], states text[], results bytea[], errors bytea[], lock_wait integer,
  out outcomes text[], out heads bigint[], out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
begin
  perform set_config('lock_timeout', lock_wait || 'ms', true);
  select f.outcomes, f.ready into outcomes, ready from pgchan.finish_many(runs, epochs, states, results, errors) f;
  perform set_config('lock_timeout', '0', true);
  heads := array_fill(-1::bigint, array[cardinality(runs)]);
exception when lock_not_available then
  outcomes := array_fill('locked'::text, array[cardinality(runs)]);
end $$;

-- `try_finish_many`, durable, then announced.
create or replace procedure pgchan.call_finish_many(
  runs bigint[], epochs bigint[], states text[], results bytea[], errors bytea[], lock_wait integer,
  inout outcomes text[])
language plpgsql as $$
#variable_conflict use_variable
declare
  ended record;
  told boolean;
begin
  ended := pgchan.try_finish_many(runs, epochs, states, results, errors, lock_wait);
  outcomes := ended.outcomes;
  commit;
  told := pgchan.wake(runs, ended.heads, false, ended.ready) is null;
end $$;

-- One entry to one channel that the caller has locked and knows to be open. For this file's own control messages.
create or replace function pgchan.append_one(channel bigint, kind integer, key text, step text, body bytea) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select a.head from pgchan.append_entry(
    channel, (select c.epoch from pgchan.channels c where c.id = channel), null, kind::smallint, key, step, null, null,
    body) a
$$;

-- Let a run leave memory until a signal, a child's end or wake_at. False if something that it waits for has already
-- happened: a signal past `seen`, the end of one of the children. The row lock puts this in order with `deliver`.
create or replace function pgchan.suspend(run bigint, epoch bigint, wake_at timestamptz, seen bigint, children text[])
returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
  perform pgchan.force_durability();
  if not pgchan.owns(run, epoch) then
    return 'fenced';
  end if;
  perform from pgchan.messages m where m.channel_id = run and m.kind = 1 and m."position" > seen;
  if found then
    return 'ready';
  end if;
  perform from pgchan.channels c join pgchan.runs r on r.channel_id = c.id
    where c.name = any (children) and r.ended_at is not null;
  if found then
    return 'ready';
  end if;
  perform pgchan.supersede(array[run]);
  -- At its deadline a run that waits is claimed once more, to fail. `least` passes over nulls.
  update pgchan.runs r set state = 'waiting', worker = null, wake_at = least(suspend.wake_at, r.deadline)
    where r.channel_id = run;
  return 'waiting';
end $$;

-- Give runs that a worker holds back to their queues; those that it no longer owns are passed over, and with lock_wait
-- those whose channel a caller's open transaction has locked. Returns the queues.
create or replace function pgchan.release(worker integer, runs bigint[], lock_wait integer default null) returns text[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  mine bigint[];
  queues text[];
begin
  perform pgchan.force_durability();
  select array_agg(p.channel_id) into mine from (
    select r.channel_id from pgchan.runs r
    where r.worker = release.worker and (release.runs is null or r.channel_id = any (release.runs))
    order by r.channel_id for update) p;
  mine := pgchan.lock_runs(coalesce(mine, '{}'), lock_wait);
  if cardinality(mine) = 0 then
    return '{}';
  end if;
  perform pgchan.supersede(mine);
  with returned as (
    update pgchan.runs r set state = 'scheduled', worker = null, wake_at = null
    where r.channel_id = any (mine) returning r.queue)
  select array_agg(distinct q.queue) into queues from returned q;
  perform pgchan.wake(null, null, false, queues);
  return queues;
end $$;

-- Store a signal on a run's channel and make the run ready if it waits. Outcomes are those of `append`, and missing if
-- there is no such run. The run's row is locked first: `suspend` either sees the signal or is seen by it.
create or replace function pgchan.deliver(
  run text, body bytea, key text,
  out outcome text, out channel_id bigint, out "position" bigint, out at timestamptz, out head bigint, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  target pgchan.runs;
  stored record;
begin
  perform pgchan.check_key(key);
  perform pgchan.force_durability();
  select r.* into target from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = run for update of r;
  if not found then
    outcome := 'missing';
    return;
  end if;
  channel_id := target.channel_id;
  stored := pgchan.append_entry(target.channel_id, null, null, 1::smallint, key, null, null, null, body);
  outcome := stored.outcome;
  "position" := stored."position";
  at := stored.at;
  head := stored.head;
  if outcome = 'appended' and target.state = 'waiting' then
    update pgchan.runs r set state = 'scheduled', wake_at = null where r.channel_id = target.channel_id;
    ready := target.queue;
  elsif outcome = 'appended' and target.state = 'scheduled' and target.wake_at is null then
    ready := target.queue;  -- a claim that met the lock on its row has passed over it, and must come again
  end if;
end $$;

-- `deliver`, durable, then announced.
create or replace procedure pgchan.call_deliver(
  run text, body bytea, key text, inout outcome text, inout channel_id bigint, inout "position" bigint,
  inout at timestamptz, inout head bigint, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
declare
  delivered record;
  told boolean;
begin
  delivered := pgchan.deliver(run, body, key);
  outcome := delivered.outcome;
  channel_id := delivered.channel_id;
  "position" := delivered."position";
  at := delivered.at;
  head := delivered.head;
  ready := delivered.ready;
  commit;
  told := pgchan.wake(array[channel_id], array[head], false, array[ready]) is null;
end $$;

-- `deliver`, several times, in this order; a run may be given more than once. The answers are arrays; heads for `wake`.
create or replace function pgchan.deliver_many(
  runs text[], bodies bytea[], keys text[],
  out outcomes text[], out channel_ids bigint[], out positions bigint[], out ats timestamptz[], out heads bigint[],
  out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  many constant integer := cardinality(runs);
  places integer[];  -- of those whose run there is; the next three are beside it
  ids bigint[];
  slots integer[];
  nths integer[];
  targets bigint[];
  counts integer[];
  stored record;
begin
  perform pgchan.check_key(k.key) from unnest(keys) k (key);
  perform pgchan.force_durability();
  select array_agg(l.channel_id) into targets from (
    select r.channel_id from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = any (runs) order by r.channel_id for update of r) l;
  outcomes := array_fill('missing'::text, array[many]);
  select array_agg(e.n order by e.n), array_agg(e.id order by e.n), array_agg(e.slot order by e.n),
         array_agg(e.nth order by e.n)
    into places, ids, slots, nths from (
      select g.n::integer, c.id, dense_rank() over (order by c.id)::integer as slot,
             row_number() over (partition by c.id order by g.n)::integer as nth
      from unnest(runs) with ordinality g (name, n)
      cross join lateral (select c.id from pgchan.channels c where c.name = g.name limit 1) c
      where c.id = any (targets)) e;  -- a run that was started since is not locked, so it may be about to suspend
  if places is null then
    return;
  end if;
  select array_agg(t.id order by t.id), array_agg(t.n order by t.id) into targets, counts
    from (select i.id, count(*)::integer as n from unnest(ids) i (id) group by i.id) t;
  select * into stored from pgchan.append(
    targets, null, null, null, null, counts, null, slots, nths, array_fill(1::smallint, array[cardinality(ids)]),
    array(select keys[p.place] from unnest(places) with ordinality p (place, n) order by p.n), null, null, null,
    array(select bodies[p.place] from unnest(places) with ordinality p (place, n) order by p.n)) a;
  channel_ids := array_fill(null::bigint, array[many]);
  positions := channel_ids;
  heads := channel_ids;
  ats := array_fill(null::timestamptz, array[many]);
  for i in 1..cardinality(ids) loop
    channel_ids[places[i]] := ids[i];
    heads[places[i]] := stored.heads[slots[i]];
    if stored.bases is null then  -- a key is stored already: the answer is per entry
      outcomes[places[i]] := stored.outcomes[i];
      positions[places[i]] := stored.positions[i];
      ats[places[i]] := stored.ats[i];
    else
      outcomes[places[i]] := stored.outcomes[slots[i]];
      positions[places[i]] := stored.bases[slots[i]] + nths[i];
      ats[places[i]] := stored.at;
    end if;
  end loop;
  -- Also of those that are ready: a claim that met the lock on such a row has passed over it, and must come again.
  with woken as (
    update pgchan.runs r set state = 'scheduled', wake_at = null
    where r.channel_id in (select a.id from unnest(channel_ids, outcomes) a (id, outcome) where a.outcome = 'appended')
      and (r.state = 'waiting' or r.state = 'scheduled' and r.wake_at is null)
    returning r.queue)
  select array_agg(distinct w.queue) into ready from woken w;
end $$;

-- `deliver_many`, if each lock that it needs is free within lock_wait ms; else all outcomes are locked, and nothing is done.
create or replace function pgchan.try_deliver_many(
  runs text[], bodies bytea[], keys text[], lock_wait integer,
  out outcomes text[], out channel_ids bigint[], out positions bigint[], out ats timestamptz[], out heads bigint[],
  out ready text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
begin
  perform set_config('lock_timeout', lock_wait || 'ms', true);
  select d.outcomes, d.channel_ids, d.positions, d.ats, d.heads, d.ready
    into outcomes, channel_ids, positions, ats, heads, ready from pgchan.deliver_many(runs, bodies, keys) d;
  perform set_config('lock_timeout', '0', true);
exception when lock_not_available then
  outcomes := array_fill('locked'::text, array[cardinality(runs)]);
end $$;

-- `try_deliver_many`, durable, then announced.
create or replace procedure pgchan.call_deliver_many(
  runs text[], bodies bytea[], keys text[], lock_wait integer, inout outcomes text[], inout channel_ids bigint[],
  inout positions bigint[], inout ats timestamptz[], inout heads bigint[])
language plpgsql as $$
#variable_conflict use_variable
declare
  ready text[];
begin
  select d.outcomes, d.channel_ids, d.positions, d.ats, d.heads, d.ready
    into outcomes, channel_ids, positions, ats, heads, ready
    from pgchan.try_deliver_many(runs, bodies, keys, lock_wait) d;
  commit;
  perform pgchan.wake(channel_ids, heads, false, ready);
end $$;

-- Cancel a run: true from this commit on nothing more is recorded for it; false if it had ended; null if there is none.
create or replace function pgchan.cancel(run text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  target pgchan.runs;
  ready text[];
begin
  perform pgchan.force_durability();
  perform pgchan.hold_families(array[c.id]) from pgchan.channels c where c.name = cancel.run;
  select r.* into target from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = cancel.run for update of r;
  if not found then
    return null;
  end if;
  if target.ended_at is not null then
    return false;
  end if;
  ready := pgchan.settle_many(array[target.channel_id], array['cancelled'], null, null);
  perform pgchan.wake(array[target.channel_id], array[-1], false, ready);
  return true;
end $$;

-- Take a dead worker's runs back into their queues and remove it. Returns how many they were, 0 also if somebody else
-- has reaped it. Null if it is alive after all (the session in its row holds the lock) or if some of its runs have
-- channels that a caller's open transaction has locked: the others are taken, and this is called again.
-- The lock counts only in the hands of the session that the row names. Anybody may take any advisory lock, and a
-- stranger that sits on this one must not keep a dead worker alive.
create or replace function pgchan.reap(worker integer) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  session integer;
  held integer;
begin
  perform pgchan.force_durability();
  -- Waits for a claim that is under way; and `come_back` either is done, and seen below, or finds the row gone.
  select w.backend_pid into session from pgchan.workers w where w.id = reap.worker for update;
  if not pg_try_advisory_xact_lock(1885823848, worker) then
    perform from pg_locks l join pg_database d on d.oid = l.database
      where d.datname = current_database() and l.locktype = 'advisory' and l.classid = 1885823848
        and l.objid = worker::oid and l.objsubid = 2 and l.granted and l.pid = session;
    if found then
      return null;
    end if;
  end if;
  select count(*) into held from pgchan.runs r where r.worker = reap.worker;
  perform pgchan.release(worker, null, 50);
  perform from pgchan.runs r where r.worker = reap.worker;
  if found then
    return null;
  end if;
  delete from pgchan.workers w where w.id = reap.worker;
  return held;
end $$;

create or replace view pgchan.channel_status as
  select c.name, c.head, c.trimmed, c.epoch, c.closed_at is not null as closed, c.content_type, c.created_at, c.expires_at,
         c.keep_messages, c.keep_seconds
  from pgchan.channels c where c.name not like 'pgchan:%';

-- Who may do what, through four roles that nobody logs in as: grant them to those who do. What is not in this list is
-- the owner's alone. The routines that end in _messages, enqueue and deliver decide for themselves what a publisher may
-- write; append trusts its caller, so it is a worker's. What may be read is never written but by routines.
--
-- Roles belong to the server, not to the database: another database may have made them, be making them now, or use them
-- when this one is gone. So they are made where that is possible, taken as they are where they exist, and never dropped.
-- If some are missing, because the migrating role may not create roles, nothing is granted: make them as somebody who
-- may, and call this again as the owner. Calling it again is harmless. In plain SQL and no table of names, so that a
-- routine which is gone fails here and not later.
create or replace procedure pgchan.grant_roles()
language plpgsql as $$
begin
  -- Each by itself: where another database's migration is making it as well, one of the two waits and finds it there.
  begin
    if pg_catalog.to_regrole('pgchan_publisher') is null then
      create role pgchan_publisher nologin;
    end if;
  exception when duplicate_object or unique_violation or insufficient_privilege then
  end;
  begin
    if pg_catalog.to_regrole('pgchan_subscriber') is null then
      create role pgchan_subscriber nologin;
    end if;
  exception when duplicate_object or unique_violation or insufficient_privilege then
  end;
  begin
    if pg_catalog.to_regrole('pgchan_worker') is null then
      create role pgchan_worker nologin;
    end if;
  exception when duplicate_object or unique_violation or insufficient_privilege then
  end;
  begin
    if pg_catalog.to_regrole('pgchan_admin') is null then
      create role pgchan_admin nologin;
    end if;
  exception when duplicate_object or unique_violation or insufficient_privilege then
  end;
  if pg_catalog.to_regrole('pgchan_publisher') is null or pg_catalog.to_regrole('pgchan_subscriber') is null
     or pg_catalog.to_regrole('pgchan_worker') is null or pg_catalog.to_regrole('pgchan_admin') is null then
    return;
  end if;

  grant usage on schema pgchan to pgchan_publisher, pgchan_subscriber, pgchan_worker, pgchan_admin;
  grant execute on routine pgchan.version, pgchan.serves to pgchan_publisher, pgchan_subscriber, pgchan_worker, pgchan_admin;

  -- A publisher writes messages, starts runs, signals and cancels them; it reads nothing.
  grant execute on routine
    pgchan.publish, pgchan.start, pgchan.signal, pgchan.cancel,        -- in SQL
    pgchan.append_messages, pgchan.write_messages, pgchan.append_message, pgchan.write_message,
    pgchan.find_channel, pgchan.create_channel, pgchan.close_channel,
    pgchan.enqueue, pgchan.call_enqueue, pgchan.try_enqueue_many, pgchan.call_enqueue_many,
    pgchan.deliver, pgchan.call_deliver, pgchan.try_deliver_many, pgchan.call_deliver_many, pgchan.wake
    to pgchan_publisher, pgchan_worker, pgchan_admin;

  -- A subscriber reads everything but what runs were started with; it writes nothing.
  grant execute on routine
    pgchan.read, pgchan.status,                                        -- in SQL
    pgchan.as_json,                                                    -- run_status calls it, with the reader's rights
    pgchan.ping, pgchan.take_probe, pgchan.free_probe                  -- its LISTEN connection
    to pgchan_subscriber, pgchan_worker, pgchan_admin;
  grant select on
    pgchan.channels, pgchan.messages, pgchan.workers, pgchan.retention, pgchan.removed,
    pgchan.final_messages, pgchan.run_status, pgchan.channel_status, pgchan.worker_status
    to pgchan_subscriber, pgchan_worker, pgchan_admin;
  grant select (channel_id, journal_id, workflow, version, queue, priority, state, wake_at, worker, attempt, speaks_from,
                deadline, result, error, parent, created_at, started_at, ended_at)
    on pgchan.runs to pgchan_subscriber, pgchan_worker, pgchan_admin;

  -- A worker does both and executes runs. `upkeep` removes only what has outlived the time that an administrator gave it.
  grant execute on routine
    pgchan.append, pgchan.write, pgchan.append_entry, pgchan.write_entry, pgchan.announced,
    pgchan.claim, pgchan.suspend, pgchan.finish, pgchan.call_finish,
    pgchan.try_finish_many, pgchan.call_finish_many, pgchan.continue_run,
    pgchan.release, pgchan.upkeep, pgchan.expire,
    pgchan.new_worker, pgchan.register, pgchan.come_back, pgchan.leave, pgchan.reap,
    pgchan.take_lock, pgchan.await_lock, pgchan.free_lock, pgchan.free_locks
    to pgchan_worker, pgchan_admin;

  -- An administrator does all of it, and what loses or revives something.
  grant execute on routine
    pgchan.trim_channel, pgchan.compact_channel, pgchan.delete_channel, pgchan.resume, pgchan.fork, pgchan.call_fork,
    pgchan.set_retention, pgchan.set_channel_retention
    to pgchan_admin;
end $$;

insert into pgchan.retention default values;

-- ------------------------------------------------------------------------------------------------ roles

-- Nobody but the owner may call a routine until a role is given the right to.
revoke all on all routines in schema pgchan from public;

revoke all on procedure pgchan.grant_roles() from public;

call pgchan.grant_roles();
