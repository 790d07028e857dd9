-- pgchan: named durable channels and durable runs, in one schema.
--
-- The nouns, in the order you meet them. A CHANNEL is a named append-only sequence of MESSAGES with positions
-- 1, 2, 3… in commit order. A RUN is one execution of a workflow. It is two channels: the one people talk to it on,
-- whose name is the run's id, and its JOURNAL, where each step's result is a message whose key is the step's name.
-- A WORKER is a process that claims runs; it is alive while it holds a session advisory lock on its id.
-- The EPOCH of a channel fences out earlier owners: a claim raises it, and a write that names an older one is refused.
--
-- The life of a run: enqueue → claim → append (steps, output, consumed signals) → [suspend → deliver → claim] → finish.
-- A worker dies: reap → claim by another. People: deliver (a signal), cancel, resume. What is over: upkeep.
--
-- Rules that hold everywhere in this file:
--   * Lock order: rows of workers, then rows of runs, then rows of channels, each in id order. Nothing takes a runs row
--     while it holds a channels row.
--   * A function does one transaction's work and never announces it. `wake` announces. The procedures are what clients
--     call outside a transaction: function, COMMIT, wake. NOTIFY takes a lock for the whole server until its
--     transaction has committed, so a wakeup inside the writing transaction would make all writers queue behind each
--     other's fsync; in a transaction of its own, which writes no WAL, it costs microseconds.
--   * A procedure that commits may be neither SECURITY DEFINER nor have a SET clause. So procedures are bare: every name
--     is qualified, they hold no operator and decide nothing. Functions are SECURITY DEFINER with a pinned search_path.
--   * Refusals that belong to one entry of a batch are outcomes (text), not exceptions: the other entries go ahead.
--   * What writers and runs go through plans each statement once per session (plan_cache_mode). A session of a pool would
--     do it anew for each call, since for one run instead of some a plan looks cheaper: half of the time of a claim. That
--     plan was made when the tables were small, and must be right when they are large: a few rows by their keys, whatever
--     reading all of a table would have cost then (enable_seqscan, enable_hashjoin, enable_mergejoin). Such a header
--     costs a tenth of a microsecond.

create schema if not exists pgchan;

-- One row: one channel. The row is updated by each append, so no index may cover a column that an append changes
-- (updates stay HOT) and the page keeps room for the next version (fillfactor). An id is never that of another channel,
-- not even after a failover that lost channels together with the numbers they had: a sequence alone hands those out
-- again, and processes that remember an id would write to, and hear from, a stranger. Hence the 20 random bits, which
-- leave one chance in a million.
create sequence pgchan.channel_numbers;
create table pgchan.channels (
  id            bigint primary key
                default (nextval('pgchan.channel_numbers') << 20) + floor(random() * (1 << 20))::bigint,
  name          text collate "C" not null unique,
  content_type  text not null default 'application/json',
  head          bigint not null default 0,         -- last position; 0 while empty
  trimmed       bigint not null default 0,         -- last position that was removed; messages start after it
  epoch         bigint not null default 0,         -- raised by each claim of the run that owns this channel
  inbox         bigint not null default 0,         -- every signal up to this position is consumed
  closed_at     timestamptz,                       -- takes no messages from then on
  ttl           double precision,                  -- seconds after creation at which the channel may be removed
  expires_at    timestamptz,
  created_at    timestamptz not null default clock_timestamp(),
  keep_messages bigint,                            -- the upkeep trims it to its last so many messages; null: it does not
  keep_seconds  double precision                   -- and to those that are no older
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);
-- Serves `upkeep`: which channels have expired. No append changes expires_at.
create index channels_expiry on pgchan.channels (expires_at) where expires_at is not null;
alter sequence pgchan.channel_numbers owned by pgchan.channels.id;
-- Serves `upkeep`: which channels are to be trimmed. No append changes these columns.
create index channels_kept on pgchan.channels (id) where keep_messages is not null or keep_seconds is not null;

-- One row: one message. No foreign key to channels: checking it would double the cost of an insert, and only routines
-- in this file insert here.
create table pgchan.messages (
  channel_id    bigint not null,
  "position"    bigint not null,                   -- dense from channels.trimmed + 1 to channels.head
  at            timestamptz not null,              -- one value for all entries of an append; with the position: the cursor
  kind          smallint not null,                 -- 0 message, 1 signal, 2 control (written by pgchan itself)
  key           text collate "C",                  -- idempotency key; in a journal: the name of the step
  step          text collate "C",                  -- the step that published it; null outside of steps
  attempt       integer,                           -- which try of that step, from 1
  void_from     bigint,                            -- in a reset only: output of this step from this position on, by
                                                   -- earlier attempts, is void
  body          bytea not null,                    -- exactly the bytes that were published
  primary key (channel_id, "position")
);
-- Serves the promise that a key is stored once; look-ups by key.
create unique index messages_key on pgchan.messages (channel_id, key) where key is not null;
-- Serves the search for signals. Ordinary messages are not in it.
create index messages_special on pgchan.messages (channel_id, kind, "position") where kind <> 0;
-- Serves `final_messages`: is there a reset? Only resets are in it, for a page of a channel with thousands of other
-- control messages must not look at each of them for each of its rows.
create index messages_reset on pgchan.messages (channel_id, step, "position") where void_from is not null;

-- One row: one worker process that has not been reaped. Its lock is (1885823848, id).
create table pgchan.workers (
  id            integer generated always as identity primary key,
  name          text not null,
  host          text not null,
  pid           integer not null,
  backend_pid   integer not null,                  -- the server process that holds its lock
  started_at    timestamptz not null default clock_timestamp()
);

-- One row: one run. state: scheduled (ready now, or at wake_at) · running (on worker) · waiting (left memory until a
-- signal, a child's end or wake_at) · succeeded, failed, cancelled (ended_at is set).
create table pgchan.runs (
  channel_id      bigint primary key references pgchan.channels (id) on delete cascade,
  journal_id      bigint not null references pgchan.channels (id),
  workflow        text not null,
  version         text,
  queue           text not null,
  priority        integer not null default 0,      -- higher goes first
  state           text not null check (state in ('scheduled', 'running', 'waiting', 'succeeded', 'failed', 'cancelled')),
  wake_at         timestamptz,                     -- not before; null in scheduled: ready; null in waiting: no timer
  worker          integer,                         -- workers.id while running
  attempt         integer not null default 0,      -- how often it was claimed
  speaks_from     bigint not null default 1,       -- the first position of its channel that can be this run's output
  deadline        timestamptz,                     -- the run fails when it has not ended by then
  input           bytea not null,                  -- {"args": […], "kwargs": {…}}
  result          bytea,                           -- JSON, of a succeeded run
  error           bytea,                           -- {"type", "message"}, of a failed run
  parent          bigint,                          -- channel_id of the run that started it
  created_at      timestamptz not null default clock_timestamp(),
  started_at      timestamptz,
  ended_at        timestamptz
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
-- Serves `claim`: the next ready run of a queue.
create index runs_ready on pgchan.runs (queue, priority desc, created_at) where state = 'scheduled' and wake_at is null;
-- Serves `claim`: which timers are due.
create index runs_due on pgchan.runs (wake_at) where wake_at is not null and state in ('scheduled', 'waiting');
-- Serves `reap` and `held`: what a worker has.
create index runs_worker on pgchan.runs (worker) where worker is not null;
-- Serves lists of runs, newest first.
create index runs_recent on pgchan.runs (created_at desc);
-- Serves the removal of a journal's channel.
create index runs_journal on pgchan.runs (journal_id);
-- Serves `upkeep`: which runs ended long ago.
create index runs_ended on pgchan.runs (ended_at) where ended_at is not null;

-- One row in all: what is kept, and how far the upkeep has come on its rounds. Who locks it does the next batch.
create table pgchan.retention (
  id            boolean primary key default true check (id),
  ended_runs    double precision,                  -- seconds that a run is kept after its end; null: for ever
  expired_to    timestamptz,                       -- where the next batch goes on; null: at the beginning
  ended_to      timestamptz,
  kept_to       bigint
);
insert into pgchan.retention default values;

-- One row: a channel that is gone and had so many messages that later batches of the upkeep delete them. Nobody reaches
-- them meanwhile: all that reads messages looks for their channel first, and ids are not used again.
create table pgchan.removed (
  channel_id    bigint primary key,
  trimmed       bigint not null,                   -- last position that is deleted
  head          bigint not null                    -- last position to delete
);

-- Messages without void output: what an unfinished attempt of a step left behind before a later one started over. Only
-- resets have a void_from. That their kind is 2 is not asked for, or the planner might take messages_special.
create view pgchan.final_messages as
  select m.* from pgchan.messages m
  where m.step is null or m.kind <> 0 or not exists (
    select from pgchan.messages r
    where r.channel_id = m.channel_id and r."position" > m."position"
      and r.step = m.step and r.attempt > m.attempt and r.void_from <= m."position");

-- The schema's revision, read at start-up. Each migration redefines it.
create function pgchan.version() returns text
language sql immutable security definer set search_path = pg_catalog, pg_temp as $$ select 'pgchan_0002' $$;

-- The oldest revision whose code this schema serves: all that this code calls and reads is here, and means what it meant.
-- A migration that takes something of it away raises this; until then old processes go on through a deploy.
create function pgchan.serves() returns text
language sql immutable security definer set search_path = pg_catalog, pg_temp as $$ select 'pgchan_0001' $$;

-- ------------------------------------------------------------------------------------------------ wakeups

-- Announce that channels have moved, that channels were created, that queues have work. A hint without content: names
-- are 16 buckets by channel id, the payload is "id:head,…"; head -1 means that something else than messages changed.
-- The guard keeps a full queue (a stuck listener somewhere on the server) from failing commits; asking for the usage
-- also advances the queue's tail, which heals it after the culprit has gone.
create function pgchan.wake(ids bigint[], heads bigint[], created boolean default false, queues text[] default null)
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
create function pgchan.announced(ids bigint[], owners bigint[], heads bigint[]) returns bigint[]
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

-- A NOTIFY from a listener to itself, by which it knows that it hears.
create function pgchan.ping(name text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if name is null or name !~ '^pgchan_ping_[0-9a-f]{16}$' then
    raise exception 'this is not the name of a ping' using errcode = 'PC001', hint = 'pgchan_ping_ and 16 digits of hex';
  end if;
  perform pg_notify(name, '');
end $$;

-- ------------------------------------------------------------------------------------------------ append

-- Raise this transaction's commit to durable, whatever the session says; remote_apply is stronger and stays. A SET
-- clause on a function would end with the function; this lasts until the commit.
create function pgchan.force_durability() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);
  end if;
end $$;

-- Lock channels in id order, until the transaction ends. lock_wait null: all, however long it takes. Else wait so many
-- milliseconds, then take those that are free. Returns those that are not locked: a caller's open transaction has them.
create function pgchan.lock_channels(ids bigint[], lock_wait integer) returns bigint[]
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
create function pgchan.append(
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
create function pgchan.append_entry(
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

-- `append` for those who may publish and nothing else: messages without step, fence or kind, to channels that are not
-- pgchan's own. The arrays and the answer are those of `append`. Raises PC001 for a name or a key that is not legal.
create function pgchan.append_messages(
  ids bigint[], names text[], types text[], owners bigint[], counts integer[], slots integer[], nths integer[],
  keys text[], bodies bytea[], lock_wait integer default null,
  out channel_ids bigint[], out heads bigint[], out bases bigint[], out outcomes text[], out at timestamptz,
  out positions bigint[], out ats timestamptz[], out created boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  stored record;
begin
  if array_position(ids, null) is not null then
    perform pgchan.check_name(g.name) from unnest(ids, names) g (id, name) where g.id is null;
  end if;
  if keys is not null then
    perform pgchan.check_key(k.key) from unnest(keys) k (key);
  end if;
  stored := pgchan.append(ids, names, types, null, owners, counts, null, slots, nths, null, keys, null, null, null,
                          bodies, lock_wait);
  channel_ids := stored.channel_ids;
  heads := stored.heads;
  bases := stored.bases;
  outcomes := stored.outcomes;
  at := stored.at;
  positions := stored.positions;
  ats := stored.ats;
  created := stored.created;
end $$;

-- `append_entry` for those who may publish and nothing else. Raises PC001 for a key that is not legal.
create function pgchan.append_message(
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

-- `append_messages`, durable, then announced. What a client's writer calls, once per batch that holds nothing else.
create procedure pgchan.write_messages(
  ids bigint[], names text[], types text[], owners bigint[], counts integer[], slots integer[], nths integer[],
  keys text[], bodies bytea[], lock_wait integer,
  inout channel_ids bigint[], inout heads bigint[], inout bases bigint[], inout outcomes text[], inout at timestamptz,
  inout positions bigint[], inout ats timestamptz[])
language plpgsql as $$
#variable_conflict use_variable
declare
  stored record;
  told boolean;
begin
  -- Assignments are evaluated as expressions; SELECT INTO and PERFORM would start an executor each, a tenth of the call.
  stored := pgchan.append_messages(ids, names, types, owners, counts, slots, nths, keys, bodies, lock_wait);
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

-- `append`, durable, then announced. What the writer of a worker calls.
create procedure pgchan.write(
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
create procedure pgchan.write_message(
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
create procedure pgchan.write_entry(
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

-- ------------------------------------------------------------------------------------------------ channels

-- Raise InvalidInput (PC001) unless the name is legal: 1-200 of A-Za-z0-9._:/@~+=- without empty, "." or ".." segments.
create function pgchan.check_name(name text) returns void
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
begin
  if name is null or name !~ '^[A-Za-z0-9._:/@~+=-]{1,200}$' or name like 'pgchan:%'
     or name ~ '(^|/)(\.|\.\.)?(/|$)' then
    raise exception 'channel name % is not legal', coalesce(quote_literal(left(name, 200)), 'null')
      using errcode = 'PC001', hint = '1 to 200 of A-Z a-z 0-9 . _ : / @ ~ + = -, no empty, "." or ".." segment, '
                                      'not beginning with "pgchan:"';
  end if;
end $$;

-- Raise InvalidInput (PC001) unless the key is legal; null is. Keys with "pgchan:" tell what a run has consumed.
create function pgchan.check_key(key text) returns void
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
begin
  if octet_length(key) not between 1 and 200 or key like 'pgchan:%' then
    raise exception 'key is not legal' using errcode = 'PC001', hint = '1 to 200 bytes, not beginning with "pgchan:"';
  end if;
end $$;

-- The id and the type of a channel, null if there is none of this name: what one must know to publish to it.
create function pgchan.find_channel(name text, out id bigint, out content_type text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select c.id, c.content_type from pgchan.channels c
  where c.name = find_channel.name and c.name not like 'pgchan:%'
$$;

-- Create a channel. created is false if it exists; content_type is then the type it has.
create function pgchan.create_channel(name text, inout content_type text, ttl double precision, out created boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
begin
  perform pgchan.check_name(name);
  perform pgchan.force_durability();
  insert into pgchan.channels as c (name, content_type, ttl, expires_at)
    values (name, content_type, ttl, clock_timestamp() + make_interval(secs => ttl))
    on conflict on constraint channels_name_key do nothing;
  created := found;
  if created then
    perform pgchan.wake(null, null, true);
  else
    select c.content_type into content_type from pgchan.channels c where c.name = create_channel.name;
  end if;
end $$;

-- Close a channel: true if it is closed now or was before, false if it is the channel of a run that has not ended,
-- null if there is none.
create function pgchan.close_channel(name text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  channel pgchan.channels;
begin
  perform pgchan.check_name(name);
  perform pgchan.force_durability();
  perform from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = close_channel.name and r.ended_at is null for update of r;
  if found then
    return false;
  end if;
  update pgchan.channels c set closed_at = coalesce(c.closed_at, clock_timestamp())
    where c.name = close_channel.name returning * into channel;
  if not found then
    return null;
  end if;
  perform pgchan.wake(array[channel.id], array[-1]);
  return true;
end $$;

-- Remove messages before a position, at most `most` of them: the boundary moves and the rows go in one transaction under
-- the channel's row lock, so no reader can miss one without the other. Returns the boundary reached (call again while
-- it is below what was asked), null if there is no channel; PC001 if the position is past head + 1.
create function pgchan.trim_channel(name text, before bigint, most integer default 5000) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  channel pgchan.channels;
  boundary bigint;
begin
  perform pgchan.force_durability();
  select * into channel from pgchan.channels c where c.name = trim_channel.name for no key update;
  if not found then
    return null;
  end if;
  if before < 0 or before > channel.head + 1 then
    raise exception 'before must be from 0 to % (the head plus one), not %', channel.head + 1, before
      using errcode = 'PC001', hint = 'the message at this position is the first one that is kept';
  end if;
  boundary := greatest(channel.trimmed, least(before - 1, channel.trimmed + most));
  if boundary > channel.trimmed then
    update pgchan.channels c set trimmed = boundary where c.id = channel.id;
    delete from pgchan.messages m
      where m.channel_id = channel.id and m."position" > channel.trimmed and m."position" <= boundary;
  end if;
  return boundary;
end $$;

-- Whether a body is one JSON string, as it may be joined to others at its quotation marks. Not one with the half of a
-- surrogate pair: it would become a character together with the other half, and readers of halves disagree already.
create function pgchan.is_text(body bytea) returns boolean
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
create function pgchan.compact_channel(name text, out outcome text, out removed bigint)
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
create function pgchan.delete_channel(name text) returns text
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
create function pgchan.remove_channels(ids bigint[], most bigint) returns bigint
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
create function pgchan.set_channel_retention(channel text, messages bigint, seconds double precision) returns boolean
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
create function pgchan.set_retention(ended_runs double precision) returns void
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
create function pgchan.upkeep(most integer default 2000, out channels bigint, out messages bigint, out more boolean)
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
create function pgchan.expire(most integer default 100) returns integer
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select u.channels::integer from pgchan.upkeep() u
$$;

-- The parts of `upkeep`. Each does nothing when `most` is used up, begins after where its last batch came to, and returns
-- where this one came to; null: the round is over.

-- Delete messages whose channel is gone; how many.
create function pgchan.delete_removed(most bigint) returns bigint
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
create function pgchan.remove_expired(
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
create function pgchan.remove_ended(
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
create function pgchan.remove_free(ids bigint[], most bigint, out channels bigint, out messages bigint)
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
create function pgchan.trim_kept(after bigint, most bigint, out messages bigint, out reached bigint)
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
create function pgchan.enqueue_many(
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
create function pgchan.enqueue(
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
create procedure pgchan.call_enqueue(
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
create function pgchan.try_enqueue_many(
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
create procedure pgchan.call_enqueue_many(
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
create function pgchan.claim(worker integer, queues text[], workflows text[], most integer)
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

-- Of these runs, whose rows the caller has locked, those whose channels could be locked too, within lock_wait. A run
-- whose channel a caller's open transaction has must not hold up the others.
create function pgchan.lock_runs(runs bigint[], lock_wait integer) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  busy bigint[];
begin
  if cardinality(runs) = 0 then
    return runs;
  end if;
  busy := pgchan.lock_channels(
    (select array_agg(b.id) from pgchan.runs r cross join lateral unnest(array[r.channel_id, r.journal_id]) b (id)
     where r.channel_id = any (runs)), lock_wait);
  return (select coalesce(array_agg(r.channel_id), '{}') from pgchan.runs r
          where r.channel_id = any (runs) and r.channel_id <> all (busy) and r.journal_id <> all (busy));
end $$;

-- Raise the epochs of these runs' channels, both to the same number: whoever owned them can write no more. The caller
-- has locked the runs. The step is random, or a claim that a failover lost would have the number of the one after it,
-- and two workers would own the run.
create function pgchan.supersede(runs bigint[]) returns void
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
create function pgchan.hold_families(runs bigint[]) returns void
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

-- Whether this epoch still owns this run; locks the run's row until commit.
create function pgchan.owns(run bigint, epoch bigint) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform from pgchan.runs r where r.channel_id = owns.run and r.state = 'running' for update;
  return found and exists (select from pgchan.channels c where c.id = owns.run and c.epoch = owns.epoch);
end $$;

-- End runs. Signals that nobody consumed are named in the `ended` control message; both channels close, so readers end
-- too; a parent that waits becomes ready. Outcomes: finished, fenced. ready: queues of parents that must be woken.
create function pgchan.finish_many(
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
create function pgchan.finish(
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
create function pgchan.settle_many(runs bigint[], states text[], results bytea[], errors bytea[]) returns text[]
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
create function pgchan.hold_family(run bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select pgchan.hold_families(array[run])
$$;

create function pgchan.settle(run bigint, state text, result bytea, error bytea) returns text
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select (pgchan.settle_many(array[run], array[state], array[result], array[error]))[1]
$$;

-- `finish`, durable, then announced.
create procedure pgchan.call_finish(
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
create function pgchan.try_finish_many(
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
create procedure pgchan.call_finish_many(
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

-- The signals of a run that nobody has consumed, in order. Consumption is a control message with a key of its own, so a
-- signal cannot be consumed twice; channels.inbox is where the search starts.
create function pgchan.open_signals(run bigint)
returns setof pgchan.messages
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select m.* from pgchan.channels c
  join pgchan.messages m on m.channel_id = c.id and m.kind = 1 and m."position" > c.inbox
  where c.id = open_signals.run and not exists (
    select from pgchan.messages d
    where d.channel_id = c.id and d.key = 'pgchan:consumed:' || m."position")
  order by m."position"
$$;

-- One entry to one channel that the caller has locked and knows to be open. For this file's own control messages.
create function pgchan.append_one(channel bigint, kind integer, key text, step text, body bytea) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select a.head from pgchan.append_entry(
    channel, (select c.epoch from pgchan.channels c where c.id = channel), null, kind::smallint, key, step, null, null,
    body) a
$$;

-- Let a run leave memory until a signal, a child's end or wake_at. False if something that it waits for has already
-- happened: a signal past `seen`, the end of one of the children. The row lock puts this in order with `deliver`.
create function pgchan.suspend(run bigint, epoch bigint, wake_at timestamptz, seen bigint, children text[])
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
create function pgchan.release(worker integer, runs bigint[], lock_wait integer default null) returns text[]
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
create function pgchan.deliver(
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
create procedure pgchan.call_deliver(
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
create function pgchan.deliver_many(
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
create function pgchan.try_deliver_many(
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
create procedure pgchan.call_deliver_many(
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
create function pgchan.cancel(run text) returns boolean
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

-- Put a failed run back into its queue, to go on from its journal. What it recorded stays; failures of steps before the
-- `resumed` control message in the journal do not count any more. Outcomes: resumed, missing, or the run's state.
create function pgchan.resume(run text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  target pgchan.runs;
begin
  perform pgchan.force_durability();
  select r.* into target from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
    where c.name = resume.run for update of r;
  if not found then
    return 'missing';
  end if;
  if target.state <> 'failed' then
    return target.state;
  end if;
  perform pgchan.supersede(array[target.channel_id]);
  update pgchan.channels c set closed_at = null where c.id in (target.channel_id, target.journal_id);
  perform pgchan.append_one(target.journal_id, 2, null, null, convert_to('{"type":"resumed"}', 'UTF8'));
  perform pgchan.append_one(target.channel_id, 2, null, null, convert_to('{"type":"resumed"}', 'UTF8'));
  update pgchan.runs r set state = 'scheduled', error = null, ended_at = null, deadline = null
    where r.channel_id = target.channel_id;
  perform pgchan.wake(array[target.channel_id], array[-1], false, array[target.queue]);
  return 'resumed';
end $$;

-- Start a run that begins with what another has recorded before a step, with the same workflow and input. Outcomes are
-- those of `enqueue`, missing (no such run) and unrecorded (it has no such step). Idempotent by id.
create function pgchan.fork(run text, step text, id text, out outcome text, out ready text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
declare
  source pgchan.runs;
  journal bigint;
  before bigint;
begin
  perform pgchan.force_durability();
  -- Locked, or `continue_run` might take the journal away between the look for the step and the copy.
  select r.* into source from pgchan.runs r join pgchan.channels c on c.id = r.channel_id where c.name = run
    for share of r;
  if not found then
    outcome := 'missing';
    return;
  end if;
  select m."position" into before from pgchan.messages m where m.channel_id = source.journal_id and m.key = step;
  if not found then
    outcome := 'unrecorded';
    return;
  end if;
  select e.outcome, e.ready into outcome, ready
    from pgchan.enqueue(id, source.workflow, source.version, source.queue, source.priority, null, null, source.input,
                        null) e;
  if outcome <> 'started' then
    return;
  end if;
  select r.journal_id into journal from pgchan.runs r join pgchan.channels c on c.id = r.channel_id where c.name = id;
  insert into pgchan.messages (channel_id, "position", at, kind, key, step, attempt, void_from, body)
    select journal, m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body
    from pgchan.messages m where m.channel_id = source.journal_id and m."position" < before;
  update pgchan.channels c set head = before - 1 where c.id = journal;
end $$;

-- `fork`, durable, then announced.
create procedure pgchan.call_fork(run text, step text, id text, inout outcome text, inout ready text)
language plpgsql as $$
#variable_conflict use_variable
begin
  select f.outcome, f.ready into outcome, ready from pgchan.fork(run, step, id) f;
  commit;
  perform pgchan.wake(null, null, true, array[ready]);
end $$;

-- Begin a run anew, under the same id and on the same channel, with other arguments and an empty journal; what the old
-- one recorded is removed. Signals that were not consumed wait for the new one. Outcomes: continued, fenced.
create function pgchan.continue_run(run bigint, epoch bigint, input bytea) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  old bigint;
  new bigint;
  queue text;
begin
  perform pgchan.force_durability();
  if not pgchan.owns(run, epoch) then
    return 'fenced';
  end if;
  perform pgchan.supersede(array[run]);
  select r.journal_id into old from pgchan.runs r where r.channel_id = run;
  insert into pgchan.channels as c (name) values ('pgchan:journal:' || run || ':' || continue_run.epoch)
    returning c.id into new;
  update pgchan.runs r set journal_id = new, input = continue_run.input, state = 'scheduled', worker = null,
                           speaks_from = (select c.head + 1 from pgchan.channels c where c.id = run)
    where r.channel_id = run returning r.queue into queue;
  delete from pgchan.messages m where m.channel_id = old;
  delete from pgchan.channels c where c.id = old;
  perform pgchan.wake(null, null, false, array[queue]);
  return 'continued';
end $$;

-- ------------------------------------------------------------------------------------------------ workers

-- A fresh id for a worker. It takes the lock on it first and registers then: a row without a lock means death.
create function pgchan.new_worker() returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select nextval('pgchan.workers_id_seq')::integer
$$;

-- Locks on workers' ids, which belong to the session that asks for them, as PostgreSQL's own functions give them. These
-- exist so that `pgchan harden` can take those away from everybody else. 0 is not a worker: it is what migrators lock.
create function pgchan.take_lock(worker integer) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select case when worker > 0 then pg_try_advisory_lock(1885823848, worker) end
$$;

-- Wait for a lock, for so many milliseconds at most (55P03).
create function pgchan.await_lock(worker integer, milliseconds integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if worker > 0 then
    perform set_config('lock_timeout', milliseconds || 'ms', true);
    perform pg_advisory_lock(1885823848, worker);
  end if;
end $$;

create function pgchan.free_lock(worker integer) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select pg_advisory_unlock(1885823848, worker)
$$;

create function pgchan.free_locks() returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select pg_advisory_unlock_all()
$$;

-- Locks that mean nothing: two sessions that both get one of them are one session, behind a transaction pooler.
create function pgchan.take_probe(key integer) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select pg_try_advisory_lock(1885823849, key)
$$;

create function pgchan.free_probe(key integer) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  select pg_advisory_unlock(1885823849, key)
$$;

-- Enter a worker that holds the lock on its id in this very session, or note the session that holds it now.
create function pgchan.register(worker integer, name text, host text, pid integer) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  insert into pgchan.workers as w (id, name, host, pid, backend_pid) overriding system value
  values (worker, name, host, pid, pg_backend_pid())
  on conflict (id) do update set backend_pid = pg_backend_pid()
$$;

-- Note that this worker's lock is held by this very session now. False if it was taken for dead: its row is gone, or
-- is that of another worker which was given the same id.
create function pgchan.come_back(worker integer, name text, host text, pid integer) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  update pgchan.workers w set backend_pid = pg_backend_pid()
    where w.id = worker and w.name = come_back.name and w.host = come_back.host and w.pid = come_back.pid;
  return found;
end $$;

-- Take a dead worker's runs back into their queues and remove it. Returns how many they were, 0 also if somebody else
-- has reaped it. Null if it is alive after all (the session in its row holds the lock) or if some of its runs have
-- channels that a caller's open transaction has locked: the others are taken, and this is called again.
-- The lock counts only in the hands of the session that the row names. Anybody may take any advisory lock, and a
-- stranger that sits on this one must not keep a dead worker alive.
create function pgchan.reap(worker integer) returns integer
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

-- A worker leaves in good order: what it still holds goes back to the queues.
create function pgchan.leave(worker integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgchan.force_durability();
  delete from pgchan.workers w where w.id = leave.worker;
  perform pgchan.release(worker, null);
end $$;

-- ------------------------------------------------------------------------------------------------ SQL users

-- A body as jsonb: JSON as it is, text as a string, both with the NUL that jsonb cannot hold shown as U+FFFD; anything
-- else, also text in another encoding than UTF-8, as base64 in a string.
create function pgchan.as_json(body bytea, content_type text) returns jsonb
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
begin
  if lower(rtrim(split_part(content_type, ';', 1))) = 'application/json' then
    return regexp_replace(convert_from(body, 'UTF8'), '(?<!\\)((?:\\\\)*)\\u0000', '\1\ufffd', 'g')::jsonb;
  elsif content_type like 'text/%' then
    begin
      if position('\x00'::bytea in body) = 0 then
        return to_jsonb(convert_from(body, 'UTF8'));
      end if;
      return to_jsonb(convert_from(
        (select string_agg(case when get_byte(body, i) = 0 then '\xefbfbd' else substr(body, i + 1, 1) end, '' order by i)
         from generate_series(0, octet_length(body) - 1) i), 'UTF8'));
    exception when character_not_in_repertoire then
      null;
    end;
  end if;
  return to_jsonb(translate(encode(body, 'base64'), E'\n', ''));
end $$;

-- Raise InvalidInput (PC001) unless the body and the key can be stored. jsonb may be nested much deeper than the parsers
-- of readers follow, and a message that cannot be read would be in every reader's way.
create function pgchan.check_body(body jsonb, key text) returns void
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
begin
  if body is null then
    raise exception 'body must not be NULL' using errcode = 'PC001', hint = 'publish the JSON value null instead';
  elsif octet_length(body::text) > 1048576 then
    raise exception 'body has % bytes; at most 1048576', octet_length(body::text)
      using errcode = 'PC001', hint = 'store large things elsewhere and publish their address';
  elsif body @? 'strict $.**{64 to last} ? (@.type() == "array" || @.type() == "object")' then
    raise exception 'body is nested deeper than 64 levels' using errcode = 'PC001', hint = 'flatten it';
  end if;
  perform pgchan.check_key(key);
end $$;

-- Publish in the caller's transaction; the position. Readers see and hear of it when that commits; until then the
-- channel is locked. Raises PC001, PC004 (closed), PC005 (the key was used with another body).
create function pgchan.publish(channel text, body jsonb, key text default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  stored record;
begin
  perform pgchan.check_name(channel);
  perform pgchan.check_body(body, key);
  loop  -- missing: somebody deleted the channel between its look-up and its lock
    select * into stored from pgchan.append(
      array[null::bigint], array[channel], array['application/json'], null, null, null, null,
      null, null, null, array[key], null, null, null, array[convert_to(body::text, 'UTF8')]) a;
    exit when stored.outcomes[1] <> 'missing';
  end loop;
  case stored.outcomes[1]
    when 'appended', 'repeated' then null;
    when 'closed' then
      raise exception 'channel % is closed', quote_literal(channel)
        using errcode = 'PC004', hint = 'it takes no further messages';
    when 'type' then
      raise exception 'channel % does not hold JSON', quote_literal(channel)
        using errcode = 'PC001', hint = 'this function publishes application/json only';
    else
      raise exception 'key % was published to % at position % with another body', quote_literal(key),
        quote_literal(channel), stored.positions[1] using errcode = 'PC005', hint = 'use another key';
  end case;
  perform pgchan.wake(stored.channel_ids, stored.heads, stored.created);
  return coalesce(stored.positions[1], stored.bases[1] + 1);
end $$;

-- The messages after a position, at most max; without void output. Nothing if there is no such channel. Raises PC001.
create function pgchan.read(channel text, after bigint default 0, max integer default 100)
returns table ("position" bigint, kind text, body jsonb, key text, at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set enable_bitmapscan = off as $$
#variable_conflict use_column
begin
  perform pgchan.check_name(channel);
  if after is null or after < 0 or max is null or max < 1 then
    raise exception 'read takes a position from 0 and a positive number of messages'
      using errcode = 'PC001', hint = 'pgchan.read(channel, after => 0, max => 100)';
  end if;
  return query
    select m."position", (array['message', 'signal', 'control'])[m.kind + 1],
           pgchan.as_json(m.body, case when m.kind = 2 then 'application/json' else c.content_type end),
           case when m.key not like 'pgchan:%' then m.key end, m.at
    from pgchan.channels c cross join lateral (
      select f.* from pgchan.final_messages f
      where f.channel_id = c.id and f."position" > greatest(read.after, c.trimmed)
      order by f."position" limit read.max) m
    where c.name = read.channel order by m."position";
end $$;

-- Start a run in the caller's transaction; its id. Idempotent by id. Raises PC001, PC006 (the id was used for another).
create function pgchan.start(workflow text, args jsonb default '[]', id text default null, queue text default 'default')
returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
declare
  run text := coalesce(id, gen_random_uuid()::text);
  given jsonb := args;
  outcome text;
  ready text;
begin
  perform pgchan.check_name(run);
  perform pgchan.check_body(given, null);
  if jsonb_typeof(given) <> 'array' or coalesce(octet_length(workflow), 0) not between 1 and 180
     or coalesce(octet_length(queue), 0) not between 1 and 180
     or run ~ '(^|/)(signals|cancel|resume|fork|journal|result)$' then
    raise exception 'start takes a workflow, a JSON array of arguments, a legal id and a queue'
      using errcode = 'PC001', hint = 'pgchan.start(workflow, args => ''[]'', id => null, queue => ''default'')';
  end if;
  select e.outcome, e.ready into outcome, ready from pgchan.enqueue(
    run, workflow, null, queue, 0, null, null,
    convert_to('{"args":' || given::text || ',"kwargs":{}}', 'UTF8'), null) e;
  if outcome = 'closed' then
    raise exception 'channel % is closed', quote_literal(run) using errcode = 'PC004';
  elsif outcome = 'conflict' then
    raise exception 'run % was started with another workflow or other arguments', quote_literal(run)
      using errcode = 'PC006', hint = 'use another id';
  end if;
  perform pgchan.wake(null, null, true, array[ready]);
  return run;
end $$;

-- Signal a run in the caller's transaction; the position. Raises PC001, PC003 (no such run), PC004 (it has ended), PC005.
create function pgchan.signal(run text, body jsonb, key text default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  stored record;
begin
  perform pgchan.check_name(run);
  perform pgchan.check_body(body, key);
  select * into stored from pgchan.deliver(run, convert_to(body::text, 'UTF8'), key) d;
  case stored.outcome
    when 'appended', 'repeated' then null;
    when 'missing' then
      raise exception 'there is no run %', quote_literal(run) using errcode = 'PC003';
    when 'closed' then
      raise exception 'run % has ended', quote_literal(run) using errcode = 'PC004';
    else
      raise exception 'key % was used on % with another body', quote_literal(key), quote_literal(run)
        using errcode = 'PC005', hint = 'use another key';
  end case;
  perform pgchan.wake(array[stored.channel_id], array[stored.head], false, array[stored.ready]);
  return stored."position";
end $$;

-- What the views show of a run's bytes.
create view pgchan.run_status as
  select c.name as id, r.workflow, r.queue, r.priority, r.state, r.attempt, w.name as worker,
         (select s.step from pgchan.messages s
          where s.channel_id = r.journal_id and s.kind = 2 and s.body = convert_to('{"type":"started"}', 'UTF8')
            and not exists (select from pgchan.messages d where d.channel_id = s.channel_id and d.key = s.step)
          order by s."position" desc limit 1) as step,
         pgchan.as_json(r.error, 'application/json') as error,
         r.created_at, r.started_at, r.ended_at, r.wake_at
  from pgchan.runs r join pgchan.channels c on c.id = r.channel_id left join pgchan.workers w on w.id = r.worker;

create view pgchan.channel_status as
  select c.name, c.head, c.trimmed, c.epoch, c.closed_at is not null as closed, c.content_type, c.created_at, c.expires_at,
         c.keep_messages, c.keep_seconds
  from pgchan.channels c where c.name not like 'pgchan:%';

create view pgchan.worker_status as
  select w.id, w.name, w.host, w.pid, w.started_at,
         (select count(*) from pgchan.runs r where r.worker = w.id) as runs
  from pgchan.workers w;

-- The state of a run as JSON, with its result when it has one; null if there is no such run.
create function pgchan.status(run text) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select to_jsonb(s) || jsonb_build_object('result', pgchan.as_json(r.result, 'application/json'))
  from pgchan.run_status s
  join pgchan.channels c on c.name = s.id join pgchan.runs r on r.channel_id = c.id
  where s.id = status.run
$$;

-- ------------------------------------------------------------------------------------------------ roles

-- Nobody but the owner may call a routine until a role is given the right to.
revoke all on all routines in schema pgchan from public;

-- Who may do what, through four roles that nobody logs in as: grant them to those who do. What is not in this list is
-- the owner's alone. The routines that end in _messages, enqueue and deliver decide for themselves what a publisher may
-- write; append trusts its caller, so it is a worker's. What may be read is never written but by routines.
--
-- Roles belong to the server, not to the database: another database may have made them, be making them now, or use them
-- when this one is gone. So they are made where that is possible, taken as they are where they exist, and never dropped.
-- If some are missing, because the migrating role may not create roles, nothing is granted: make them as somebody who
-- may, and call this again as the owner. Calling it again is harmless. In plain SQL and no table of names, so that a
-- routine which is gone fails here and not later.
create procedure pgchan.grant_roles()
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
revoke all on procedure pgchan.grant_roles() from public;
call pgchan.grant_roles();
