-- From pgchan_0002 to pgchan_0001. Written by `make freeze`.

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
      foreach relation in array array['workers', 'runs', 'channels', 'messages', 'retention', 'removed', 'final_messages', 'run_status', 'channel_status', 'worker_status'] loop
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

-- Nobody would ever delete them.
delete from pgchan.messages m using pgchan.removed r where m.channel_id = r.channel_id;

drop view pgchan.channel_status;

drop routine pgchan.announced(bigint[], bigint[], bigint[]);

drop routine pgchan.append_entry(bigint, bigint, bigint, smallint, text, text, integer, bigint, bytea, integer);

drop routine pgchan.append_message(bigint, text, bytea, integer);

drop routine pgchan.write_message(bigint, text, bytea, integer, text, bigint, timestamp with time zone);

drop routine pgchan.write_entry(bigint, bigint, bigint, bigint, smallint, text, text, integer, bigint, bytea, integer, text, bigint, timestamp with time zone);

drop routine pgchan.is_text(bytea);

drop routine pgchan.compact_channel(text);

drop routine pgchan.remove_channels(bigint[], bigint);

drop routine pgchan.set_channel_retention(text, bigint, double precision);

drop routine pgchan.set_retention(double precision);

drop routine pgchan.upkeep(integer);

drop routine pgchan.delete_removed(bigint);

drop routine pgchan.remove_expired(timestamp with time zone, bigint);

drop routine pgchan.remove_ended(double precision, timestamp with time zone, bigint);

drop routine pgchan.remove_free(bigint[], bigint);

drop routine pgchan.trim_kept(bigint, bigint);

drop routine pgchan.enqueue_many(text[], text[], text[], text[], integer[], double precision[], double precision[], bytea[], bigint[]);

drop routine pgchan.try_enqueue_many(text[], text[], text[], text[], integer[], double precision[], double precision[], bytea[], bigint[], integer);

drop routine pgchan.call_enqueue_many(text[], text[], text[], text[], integer[], double precision[], double precision[], bytea[], bigint[], integer, text[]);

drop routine pgchan.hold_families(bigint[]);

drop routine pgchan.finish_many(bigint[], bigint[], text[], bytea[], bytea[]);

drop routine pgchan.settle_many(bigint[], text[], bytea[], bytea[]);

drop routine pgchan.try_finish_many(bigint[], bigint[], text[], bytea[], bytea[], integer);

drop routine pgchan.call_finish_many(bigint[], bigint[], text[], bytea[], bytea[], integer, text[]);

drop routine pgchan.deliver_many(text[], bytea[], text[]);

drop routine pgchan.try_deliver_many(text[], bytea[], text[], integer);

drop routine pgchan.call_deliver_many(text[], bytea[], text[], integer, text[], bigint[], bigint[], timestamp with time zone[], bigint[]);

drop index pgchan.channels_kept;

drop index pgchan.runs_ended;

drop table pgchan.retention;

drop table pgchan.removed;

alter table pgchan.channels
  drop column keep_messages,
  drop column keep_seconds;

-- The schema's revision, read at start-up. Each migration redefines it.
create or replace function pgchan.version() returns text
language sql immutable security definer set search_path = pg_catalog, pg_temp as $$ select 'pgchan_0001' $$;

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
  if pg_notification_queue_usage() >= 0.5 then
    return;
  end if;
  if created then
    perform pg_notify('pgchan_new', '');
  end if;
  if cardinality(ids) = 1 then
    if heads[1] is not null then  -- an expression, as in write
      told := pg_notify('pgchan_' || mod(ids[1], 16), ids[1] || ':' || heads[1]) is null;
    end if;
  elsif cardinality(ids) > 1 then
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

-- Lock channels in id order, until the transaction ends. lock_wait null: all, however long it takes. Else wait so many
-- milliseconds, then take those that are free. Returns those that are not locked: a caller's open transaction has them.
create or replace function pgchan.lock_channels(ids bigint[], lock_wait integer) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
  if cardinality(ids) = 1 and ids[1] is not null and (keys is null or cardinality(array_remove(keys, null)) = 0) then
    -- One known channel and no keys, the usual batch of a single publisher. If nobody has the lock and nothing refuses
    -- the batch, it takes two plain statements; everything else is told apart below.
    update pgchan.channels c set head = c.head + counts[1], inbox = greatest(c.inbox, inboxes[1])
      where c.id = (select k.id from pgchan.channels k where k.id = ids[1] for no key update skip locked)
        and c.closed_at is null and (fences[1] = c.epoch or fences[1] is null and c.name not like 'pgchan:%')
      returning array[c.head - counts[1]], array[c.head], array['appended'] into bases, heads, outcomes;
    if found then
      at := clock_timestamp();
      if cardinality(bodies) = 1 then
        insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, void_from, body)
          values (ids[1], heads[1], append.at, kinds[1], steps[1], attempts[1], voids[1], bodies[1]);
      else
        insert into pgchan.messages (channel_id, "position", at, kind, step, attempt, void_from, body)
          select ids[1], bases[1] + e.nth, append.at, e.kind, e.step, e.attempt, e.void_from, e.body
          from unnest(nths, kinds, steps, attempts, voids, bodies) e (nth, kind, step, attempt, void_from, body);
      end if;
      return;
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
  commit;
  told := pgchan.wake(channel_ids, heads, stored.created) is null;
end $$;

-- Delete a channel and its messages; of a run that has ended, its journal too. Outcomes: deleted, missing, running.
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
  delete from pgchan.messages m where m.channel_id in (target, run.journal_id);
  delete from pgchan.runs r where r.channel_id = target;
  delete from pgchan.channels c where c.id in (target, run.journal_id);
  perform pgchan.wake(array[target], array[-1]);
  return 'deleted';
end $$;

-- Remove expired channels, at most `most`, oldest first; those of runs that have not ended stay. Returns how many.
create or replace function pgchan.expire(most integer default 100) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  doomed text;
  gone integer := 0;
begin
  for doomed in
    select c.name from pgchan.channels c
    where c.expires_at <= clock_timestamp()
      and not exists (select from pgchan.runs r where r.channel_id = c.id and r.ended_at is null)
    order by c.expires_at limit most for update skip locked
  loop
    if pgchan.delete_channel(doomed) = 'deleted' then
      gone := gone + 1;
    end if;
  end loop;
  return gone;
end $$;

-- ------------------------------------------------------------------------------------------------ runs

-- Start a run: idempotent by id. Outcomes: started · existed (same workflow, same input) · conflict (another) · closed
-- (a channel of this name exists and takes no more messages). The queue that must be woken is null if nothing is ready.
create or replace function pgchan.enqueue(
  run text, workflow text, version text, queue text, priority integer, delay double precision, timeout double precision,
  input bytea, parent bigint,
  out outcome text, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
declare
  channel pgchan.channels;
  journal bigint;
  existing pgchan.runs;
begin
  perform pgchan.check_name(run);
  perform pgchan.force_durability();
  insert into pgchan.channels as c (name) values (run) on conflict on constraint channels_name_key do nothing;
  -- The row stays locked until this commits, so of two concurrent starts the second sees the first one's run.
  select c.* into channel from pgchan.channels c where c.name = run for no key update;
  select r.* into existing from pgchan.runs r where r.channel_id = channel.id;
  if found then
    -- As bytes first: the other comparison is for a start repeated from a client with another JSON style.
    outcome := case when existing.workflow = workflow
                     and (existing.input = input or pgchan.as_json(existing.input, 'application/json')
                                                  = pgchan.as_json(input, 'application/json'))
                    then 'existed' else 'conflict' end;
    return;
  end if;
  if channel.closed_at is not null then
    outcome := 'closed';
    return;
  end if;
  insert into pgchan.channels as c (name) values ('pgchan:journal:' || channel.id) returning c.id into journal;
  insert into pgchan.runs (channel_id, journal_id, workflow, version, queue, priority, state, wake_at, speaks_from,
                           deadline, input, parent)
    values (channel.id, journal, workflow, version, queue, priority, 'scheduled',
            clock_timestamp() + make_interval(secs => delay), channel.head + 1,
            clock_timestamp() + make_interval(secs => coalesce(delay, 0) + timeout), input, parent);
  outcome := 'started';
  ready := case when delay is null then queue end;
end $$;

-- `enqueue`, durable, then announced.
create or replace procedure pgchan.call_enqueue(
  run text, workflow text, version text, queue text, priority integer, delay double precision, timeout double precision,
  input bytea, parent bigint, inout outcome text, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
begin
  select e.outcome, e.ready into outcome, ready
    from pgchan.enqueue(run, workflow, version, queue, priority, delay, timeout, input, parent) e;
  commit;
  perform pgchan.wake(null, null, true, array[ready]);
end $$;

-- Hand ready runs of these queues and workflows to a worker, in order of priority and age, and raise the epoch of both
-- their channels: from this commit on no earlier owner can write. Nothing for a worker that was reaped: its row is
-- locked against deletion until this commits, so a reaper either sees these runs or stops this claim.
create or replace function pgchan.claim(worker integer, queues text[], workflows text[], most integer)
returns table (channel_id bigint, run text, journal_id bigint, workflow text, input bytea, attempt integer, epoch bigint,
               speaks_from bigint, deadline timestamptz, head bigint, journal_head bigint, now timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  one text;
  picked bigint[] := '{}';
  taken bigint[];
begin
  -- A wakeup reaches every worker of a queue. Those that come too late lock nothing, so they have nothing to commit.
  if not exists (select from pgchan.runs r where r.state = 'scheduled' and r.wake_at is null
                   and r.queue = any (queues) and r.workflow = any (claim.workflows))
     and not exists (select from pgchan.runs r where r.wake_at <= clock_timestamp() and r.state in ('scheduled', 'waiting')) then
    return;
  end if;
  perform pgchan.force_durability();
  perform from pgchan.workers w where w.id = claim.worker for key share;
  if not found then
    return;
  end if;
  -- Timers that are due become ready. `wake_at is null` is what makes the next run of a queue one index look-up, however
  -- many runs are asleep.
  update pgchan.runs r set state = 'scheduled', wake_at = null
    where r.channel_id in (
      select d.channel_id from pgchan.runs d
      where d.wake_at <= clock_timestamp() and d.state in ('scheduled', 'waiting')
      order by d.wake_at limit 1000 for no key update skip locked);
  foreach one in array queues loop  -- queue by queue: `= any` would lose the order of the index
    select array_agg(p.channel_id) into taken from (
      select r.channel_id from pgchan.runs r
      where r.state = 'scheduled' and r.wake_at is null and r.queue = one and r.workflow = any (claim.workflows)
      order by r.priority desc, r.created_at limit most - cardinality(picked) for no key update skip locked) p;
    picked := picked || coalesce(taken, '{}');
    exit when cardinality(picked) >= most;
  end loop;
  picked := pgchan.lock_runs(picked, 50);
  if cardinality(picked) = 0 then
    return;
  end if;
  perform pgchan.supersede(picked);
  -- The heads tell whether there is anything to load. They are read here and not by the calling statement: its snapshot
  -- is older than this claim, so it would miss what was written since, or even the channel of a run just started.
  return query
    update pgchan.runs r set state = 'running', worker = claim.worker, attempt = r.attempt + 1,
                             started_at = coalesce(r.started_at, clock_timestamp())
    from pgchan.channels c, pgchan.channels j
    where r.channel_id = any (picked) and c.id = r.channel_id and j.id = r.journal_id
    returning r.channel_id, c.name, r.journal_id, r.workflow, r.input, r.attempt, c.epoch, r.speaks_from, r.deadline,
              c.head, j.head, clock_timestamp();
end $$;

-- Raise the epochs of these runs' channels, both to the same number: whoever owned them can write no more. The caller
-- has locked the runs. The step is random, or a claim that a failover lost would have the number of the one after it,
-- and two workers would own the run.
create or replace function pgchan.supersede(runs bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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

-- Lock the row of a run that is about to end, and against `suspend` that of the run which started it, in order of ids.
-- Without the second lock a parent that suspends just before this commits would neither see the end nor be woken by it.
-- It is a share of a lock: children that end together do not wait for each other, nor does a claim of the parent.
create or replace function pgchan.hold_family(run bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  mother bigint := (select r.parent from pgchan.runs r where r.channel_id = run);
begin
  if mother < run then
    perform from pgchan.runs r where r.channel_id = mother for key share;
  end if;
  perform from pgchan.runs r where r.channel_id = run for update;
  if mother > run then
    perform from pgchan.runs r where r.channel_id = mother for key share;
  end if;
end $$;

-- End a run. Signals that nobody consumed are named in a `missed` control message; both channels close, so readers end
-- too; a parent that waits becomes ready. Outcomes: finished, fenced. ready: queue of the parent, if it must be woken.
create or replace function pgchan.finish(
  run bigint, epoch bigint, state text, result bytea, error bytea, out outcome text, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform pgchan.force_durability();
  perform pgchan.hold_family(run);
  if not pgchan.owns(run, epoch) then
    outcome := 'fenced';
    return;
  end if;
  ready := pgchan.settle(run, state, result, error);
  outcome := 'finished';
end $$;

-- What `finish` and `cancel` have in common, once they hold the family. Returns the parent's queue, if it waits.
create or replace function pgchan.settle(run bigint, state text, result bytea, error bytea) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  journal bigint;
  mother bigint;
  missed text;
  ready text;
begin
  update pgchan.runs r set state = settle.state, result = settle.result, error = settle.error, worker = null,
                           wake_at = null, ended_at = clock_timestamp()
    where r.channel_id = run returning r.journal_id, r.parent into journal, mother;
  perform pgchan.supersede(array[run]);
  select string_agg(s."position"::text, ',' order by s."position") into missed from pgchan.open_signals(run) s;
  perform pgchan.append_one(run, 2, null, null, convert_to(
    case when missed is null then '{"type":"ended","state":"' || settle.state || '"}'
         else '{"type":"ended","state":"' || settle.state || '","missed":[' || missed || ']}' end, 'UTF8'));
  update pgchan.channels c set closed_at = clock_timestamp() where c.id in (run, journal);
  -- A runs row after channels rows, against the rule; what holds the parent's for longer is kept out by the lock above.
  update pgchan.runs r set state = 'scheduled', wake_at = null
    where r.channel_id = mother and r.state = 'waiting' returning r.queue into ready;
  return ready;
end $$;

-- `finish`, durable, then announced.
create or replace procedure pgchan.call_finish(
  run bigint, epoch bigint, state text, result bytea, error bytea, inout outcome text, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
begin
  select f.outcome, f.ready into outcome, ready from pgchan.finish(run, epoch, state, result, error) f;
  commit;
  perform pgchan.wake(array[run], array[-1], false, array[ready]);
end $$;

-- One entry to one channel that the caller has locked and knows to be open. For this file's own control messages.
create or replace function pgchan.append_one(channel bigint, kind integer, key text, step text, body bytea) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select a.heads[1] from pgchan.append(
    array[channel], null, null, array[(select c.epoch from pgchan.channels c where c.id = channel)], null, null, null,
    null, null, array[kind::smallint], array[key], array[step], null, null, array[body]) a
$$;

-- Let a run leave memory until a signal, a child's end or wake_at. False if something that it waits for has already
-- happened: a signal past `seen`, the end of one of the children. The row lock puts this in order with `deliver`.
create or replace function pgchan.suspend(run bigint, epoch bigint, wake_at timestamptz, seen bigint, children text[])
returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
  select * into stored from pgchan.append(
    array[target.channel_id], null, null, null, null, null, null,
    null, null, array[1::smallint], array[key], null, null, null, array[body]) a;
  outcome := stored.outcomes[1];
  "position" := coalesce(stored.positions[1], stored.bases[1] + 1);
  at := coalesce(stored.ats[1], stored.at);
  head := stored.heads[1];
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
begin
  select d.outcome, d.channel_id, d."position", d.at, d.head, d.ready
    into outcome, channel_id, "position", at, head, ready from pgchan.deliver(run, body, key) d;
  commit;
  perform pgchan.wake(array[channel_id], array[head], false, array[ready]);
end $$;

-- Cancel a run: true from this commit on nothing more is recorded for it; false if it had ended; null if there is none.
create or replace function pgchan.cancel(run text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  target pgchan.runs;
  ready text;
begin
  perform pgchan.force_durability();
  perform pgchan.hold_family(c.id) from pgchan.channels c where c.name = cancel.run;
  select r.* into target from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = cancel.run for update of r;
  if not found then
    return null;
  end if;
  if target.ended_at is not null then
    return false;
  end if;
  ready := pgchan.settle(target.channel_id, 'cancelled', null, null);
  perform pgchan.wake(array[target.channel_id], array[-1], false, array[ready]);
  return true;
end $$;

-- Take a dead worker's runs back into their queues and remove it. Returns how many they were, 0 also if somebody else
-- has reaped it. Null if it is alive after all (the session in its row holds the lock) or if some of its runs have
-- channels that a caller's open transaction has locked: the others are taken, and this is called again.
-- The lock counts only in the hands of the session that the row names. Anybody may take any advisory lock, and a
-- stranger that sits on this one must not keep a dead worker alive.
create or replace function pgchan.reap(worker integer) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
  select c.name, c.head, c.trimmed, c.epoch, c.closed_at is not null as closed, c.content_type, c.created_at, c.expires_at
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
    pgchan.append_messages, pgchan.write_messages, pgchan.find_channel, pgchan.create_channel, pgchan.close_channel,
    pgchan.enqueue, pgchan.call_enqueue, pgchan.deliver, pgchan.call_deliver, pgchan.wake
    to pgchan_publisher, pgchan_worker, pgchan_admin;

  -- A subscriber reads everything but what runs were started with; it writes nothing.
  grant execute on routine
    pgchan.read, pgchan.status,                                        -- in SQL
    pgchan.as_json,                                                    -- run_status calls it, with the reader's rights
    pgchan.ping, pgchan.take_probe, pgchan.free_probe                  -- its LISTEN connection
    to pgchan_subscriber, pgchan_worker, pgchan_admin;
  grant select on
    pgchan.channels, pgchan.messages, pgchan.workers,
    pgchan.final_messages, pgchan.run_status, pgchan.channel_status, pgchan.worker_status
    to pgchan_subscriber, pgchan_worker, pgchan_admin;
  grant select (channel_id, journal_id, workflow, version, queue, priority, state, wake_at, worker, attempt, speaks_from,
                deadline, result, error, parent, created_at, started_at, ended_at)
    on pgchan.runs to pgchan_subscriber, pgchan_worker, pgchan_admin;

  -- A worker does both and executes runs. `expire` removes only what has outlived the time it was created for.
  grant execute on routine
    pgchan.append, pgchan.write, pgchan.claim, pgchan.suspend, pgchan.finish, pgchan.call_finish, pgchan.continue_run,
    pgchan.release, pgchan.expire,
    pgchan.new_worker, pgchan.register, pgchan.come_back, pgchan.leave, pgchan.reap,
    pgchan.take_lock, pgchan.await_lock, pgchan.free_lock, pgchan.free_locks
    to pgchan_worker, pgchan_admin;

  -- An administrator does all of it, and what loses or revives something.
  grant execute on routine
    pgchan.trim_channel, pgchan.delete_channel, pgchan.resume, pgchan.fork, pgchan.call_fork
    to pgchan_admin;
end $$;

-- ------------------------------------------------------------------------------------------------ roles

-- Nobody but the owner may call a routine until a role is given the right to.
revoke all on all routines in schema pgchan from public;

revoke all on procedure pgchan.grant_roles() from public;

call pgchan.grant_roles();

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
