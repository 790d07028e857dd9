"""Every statement that the clients send, and why it is written that way.

Writes are calls of the routines in schema.sql; reads stand here. Statements are static text with `$n` parameters,
each cast, so that both drivers and SQLAlchemy send the same text and the server never guesses a type. A session keeps
the plan that it made when the tables were small, so what reads by keys says `lateral (… limit 1)` or `offset 0` where a
join would do: that leaves only an index. The worker's presence (locks, heartbeats) is in the last section. Long,
because SQL stands here and nowhere else.
"""

from __future__ import annotations

# ------------------------------------------------------------------------------------------------ writing

# The batch of a writer, where it is nothing but messages: 9 arrays and a limit for waiting in, one row out. It is all
# that a publisher may call, and has fewer arrays to spell out. See `append` and `append_messages` in schema.sql.
WRITE_MESSAGES = """
call pgchan.write_messages($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[], $6::integer[],
                           $7::integer[], $8::text[], $9::bytea[], $10::integer,
                           null, null, null, null, null, null, null)
"""

# The batch of a worker's writer, with what the attempts of runs say and record: 15 arrays.
WRITE = """
call pgchan.write($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::integer[], $7::bigint[],
                  $8::integer[], $9::integer[], $10::smallint[], $11::text[], $12::text[], $13::integer[],
                  $14::bigint[], $15::bytea[], $16::integer, null, null, null, null, null, null, null)
"""

# The same for a batch of one entry to a channel that is known: plain values, which cost both sides less.
WRITE_MESSAGE = "call pgchan.write_message($1::bigint, $2::text, $3::bytea, $4::integer, null, null, null)"
WRITE_ENTRY = """
call pgchan.write_entry($1::bigint, $2::bigint, $3::bigint, $4::bigint, $5::smallint, $6::text, $7::text, $8::integer,
                        $9::bigint, $10::bytea, $11::integer, null, null, null)
"""

# Messages in the caller's transaction, announced within it (a NOTIFY is sent when its transaction commits).
APPEND_MESSAGES = """
select a.channel_ids, a.heads, a.bases, a.outcomes, a.at, a.positions, a.ats,
       pgchan.wake(a.channel_ids, a.heads, a.created)
from pgchan.append_messages($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[], $6::integer[],
                            $7::integer[], $8::text[], $9::bytea[]) a
"""

# The same without the announcement, for callers that send it after their commit.
APPEND_MESSAGES_QUIETLY = """
select a.channel_ids, a.heads, a.bases, a.outcomes, a.at, a.positions, a.ats, a.created
from pgchan.append_messages($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[], $6::integer[],
                            $7::integer[], $8::text[], $9::bytea[]) a
"""

# The batch of a run's attempt, in the transaction of its user.
APPEND_QUIETLY = """
select a.channel_ids, a.heads, a.bases, a.outcomes, a.at, a.positions, a.ats, a.created
from pgchan.append($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::integer[], $7::bigint[],
                   $8::integer[], $9::integer[], $10::smallint[], $11::text[], $12::text[], $13::integer[],
                   $14::bigint[], $15::bytea[]) a
"""

WAKE = "select pgchan.wake($1::bigint[], $2::bigint[], $3::boolean, $4::text[])"

# What an owner wrote behind a position: tells after a lost answer whether the batch committed. Only the owner of a run
# writes messages with a step, or with a key of pgchan's own, to its channel; the epoch tells who that is by now.
WRITTEN_SINCE = """
select c.epoch, m."position", m.at
from pgchan.channels c left join pgchan.messages m
  on m.channel_id = c.id and m."position" > $2::bigint and (m.step is not null or m.key like 'pgchan:%')
where c.id = $1::bigint order by m."position"
"""

# A backend whose client has lost its connection may still be at work. It must be gone before anybody concludes from the
# tables that its statement did nothing. backend_start guards against a pid that was given to somebody else since.
END_BACKEND = """
select pg_terminate_backend(a.pid, 5000) from pg_stat_activity a
where a.pid = $1::integer and a.backend_start = $2::timestamptz
"""
WHO_AM_I = """
select pg_backend_pid(), (select a.backend_start from pg_stat_activity a where a.pid = pg_backend_pid())
"""

# ------------------------------------------------------------------------------------------------ channels

CREATE_CHANNEL = """
select c.content_type, c.created from pgchan.create_channel($1::text, $2::text, $3::double precision) c
"""
CLOSE_CHANNEL = "select pgchan.close_channel($1::text)"
TRIM_CHANNEL = "select pgchan.trim_channel($1::text, $2::bigint)"
COMPACT_CHANNEL = "select c.outcome, c.removed from pgchan.compact_channel($1::text) c"
DELETE_CHANNEL = "select pgchan.delete_channel($1::text)"
SET_RETENTION = "select pgchan.set_retention($1::double precision)"
SET_CHANNEL_RETENTION = "select pgchan.set_channel_retention($1::text, $2::bigint, $3::double precision)"
UPKEEP = "select u.channels, u.messages, u.more from pgchan.upkeep() u"

# A channel as its readers are told of it.
CHANNEL_INFO = """
select c.name, c.head, c.trimmed, c.epoch, c.closed_at is not null, c.content_type, c.created_at, c.expires_at,
       c.keep_messages, c.keep_seconds
from pgchan.channels c where c.name = $1::text
"""

# Channels by name, page by page; $2 is the beginning of the names. In two halves, for between them stand the journals
# of all runs, which a plain `not like` would read and drop. The bounds are comparisons, not a LIKE: from a pattern that
# is a parameter no plan can tell where to begin. "~" is the greatest character of a name, ";" the one after ":".
CHANNELS = """
select c.name, c.head, c.trimmed, c.epoch, c.closed_at is not null, c.content_type, c.created_at, c.expires_at,
       c.keep_messages, c.keep_seconds
from (
  (select b.* from pgchan.channels b
   where b.name > $1::text and b.name >= $2::text and b.name <= $2::text || repeat('~', 200) and b.name < 'pgchan:'
   order by b.name limit $3::integer)
  union all
  (select a.* from pgchan.channels a
   where a.name > $1::text and a.name >= $2::text and a.name <= $2::text || repeat('~', 200) and a.name >= 'pgchan;'
   order by a.name limit $3::integer)) c
order by c.name limit $3::integer
"""

# A channel's type, before its first publish from this process.
CHANNEL_ID = "select c.id, c.content_type from pgchan.find_channel($1::text) c where c.id is not null"

# One page: the state of the channel on every row, and its messages from the reader's own position on. That row comes
# along to be compared with the cursor: in the same statement, so no failover can fall between check and read. The left
# join keeps the state where there is nothing to read. Positions are dense, so a page of n messages is n positions: said
# as a range, or the planner, which knows channels by their average length, reads a long one to its end for each page.
# Bodies are bounded by their running size, which the window sums up before any of them is fetched from TOAST; total
# tells how many rows there were before that bound. e is the last message of the range: it makes the cursor.
PAGE_RAW = """
select c.id, c.head, c.trimmed, c.closed_at is not null, c.content_type, e."position", e.at, m.total,
       m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body
from pgchan.channels c
left join pgchan.messages e
  on e.channel_id = c.id and e."position" = least(c.head, greatest($2::bigint, c.trimmed) + $3::integer)
left join lateral (
  select b.*, sum(octet_length(b.body)) over (order by b."position") as size,
         row_number() over (order by b."position") as n, count(*) over () as total
  from pgchan.messages b
  where b.channel_id = c.id and b."position" >= greatest($2::bigint, c.trimmed)
    and b."position" <= greatest($2::bigint, c.trimmed) + $3::integer) m on m.size <= $4::bigint or m.n <= 2
where c.name = $1::text order by m."position"
"""
# The same without void output, so a page may have fewer messages than positions. The reader's own row is compared
# whether it has become void or not.
PAGE_FINAL = """
select c.id, c.head, c.trimmed, c.closed_at is not null, c.content_type, e."position", e.at, m.total,
       m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body
from pgchan.channels c
left join pgchan.messages e
  on e.channel_id = c.id and e."position" = least(c.head, greatest($2::bigint, c.trimmed) + $3::integer)
left join lateral (
  select b.*, sum(octet_length(b.body)) over (order by b."position") as size,
         row_number() over (order by b."position") as n, count(*) over () as total
  from (select * from pgchan.messages o where o.channel_id = c.id and o."position" = $2::bigint
        union all
        select * from pgchan.final_messages f
        where f.channel_id = c.id and f."position" > greatest($2::bigint, c.trimmed)
          and f."position" <= greatest($2::bigint, c.trimmed) + $3::integer) b) m on m.size <= $4::bigint or m.n <= 2
where c.name = $1::text order by m."position"
"""

# Names to what a listener must know of them; the last message's time makes their cursors verifiable.
FOLLOW = """
select c.name, c.id, c.head, m.at, c.closed_at is not null, c.content_type
from unnest($1::text[]) q (name)
cross join lateral (select c.* from pgchan.channels c where c.name = q.name limit 1) c
left join lateral (
  select m.at from pgchan.messages m where m.channel_id = c.id and m."position" = c.head limit 1) m on true
"""

# All channels that have moved, in one statement: from the last message that the process has on, which is compared.
# Limits per channel keep one busy channel from delaying the others; what is left over is read by the next statement.
READ_MOVED = """
select f.id, c.head, c.closed_at is not null,
       m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body
from unnest($1::bigint[], $2::bigint[]) f (id, after)
left join pgchan.channels c on c.id = f.id
left join lateral (
  select b.*, sum(octet_length(b.body)) over (order by b."position") as size,
         row_number() over (order by b."position") as n
  from (select * from pgchan.messages m
        where m.channel_id = f.id and m."position" >= greatest(f.after, c.trimmed)
          and m."position" < greatest(f.after, c.trimmed) + $3::integer
        order by m."position" limit $3::integer) b) m on m.size <= $4::bigint or m.n <= 2
order by f.id, m."position"
"""

# The same for one channel of which little is expected: a plain join, for half the price. No row: no such channel.
READ_ONE = """
select c.id, c.head, c.closed_at is not null,
       m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body
from pgchan.channels c left join pgchan.messages m
  on m.channel_id = c.id and m."position" >= greatest($2::bigint, c.trimmed)
 and m."position" <= greatest($2::bigint, c.trimmed) + $3::integer
where c.id = $1::bigint order by m."position"
"""

# What a lost wakeup would have told.
SWEEP = """
select f.id, c.head, c.closed_at is not null, c.epoch
from unnest($1::bigint[]) f (id) left join pgchan.channels c on c.id = f.id
"""

# ------------------------------------------------------------------------------------------------ runs, from outside

ENQUEUE = """
call pgchan.call_enqueue($1::text, $2::text, $3::text, $4::text, $5::integer, $6::double precision,
                         $7::double precision, $8::bytea, $9::bigint, null, null)
"""
# Several at once, as is each statement below that ends in _MANY: arguments as arrays, and how long to wait for a lock.
ENQUEUE_MANY = """
call pgchan.call_enqueue_many($1::text[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::double precision[],
                              $7::double precision[], $8::bytea[], $9::bigint[], $10::integer, null)
"""
# The same in the caller's transaction, as is each statement below that ends in _IN.
ENQUEUE_IN = """
select e.outcome, e.ready, pgchan.wake(null, null, true, array[e.ready])
from pgchan.enqueue($1::text, $2::text, $3::text, $4::text, $5::integer, $6::double precision, $7::double precision,
                    $8::bytea, $9::bigint) e
"""
DELIVER = "call pgchan.call_deliver($1::text, $2::bytea, $3::text, null, null, null, null, null, null)"
DELIVER_MANY = """
call pgchan.call_deliver_many($1::text[], $2::bytea[], $3::text[], $4::integer, null, null, null, null, null)
"""
# A signal in the caller's transaction.
DELIVER_IN = """
select d.outcome, d.channel_id, d."position", d.at, d.head, d.ready,
       pgchan.wake(array[d.channel_id], array[d.head], false, array[d.ready])
from pgchan.deliver($1::text, $2::bytea, $3::text) d
"""
FORK = "call pgchan.call_fork($1::text, $2::text, $3::text, null, null)"
CANCEL = "select pgchan.cancel($1::text)"
RESUME = "select pgchan.resume($1::text)"

# The columns of RunStatus, in its order.
RUN_STATUS = """
select s.id, s.workflow, s.queue, s.priority, s.state, s.attempt, s.worker, s.step, s.error ->> 'type',
       s.error ->> 'message', s.created_at, s.started_at, s.ended_at, s.wake_at
from pgchan.run_status s where s.id = $1::text
"""
RUN_RESULT = """
select r.channel_id, r.state, r.result, r.error
from pgchan.channels c join pgchan.runs r on r.channel_id = c.id where c.name = $1::text
"""
# The same of several.
RUN_RESULTS = """
select c.name, r.channel_id, r.state, r.result, r.error
from unnest($1::text[]) q (name)
cross join lateral (select c.id, c.name from pgchan.channels c where c.name = q.name limit 1) c
cross join lateral (
  select r.channel_id, r.state, r.result, r.error from pgchan.runs r where r.channel_id = c.id limit 1) r
"""
# The channel that holds a run's results.
RUN_JOURNAL = """
select j.name
from pgchan.channels c join pgchan.runs r on r.channel_id = c.id join pgchan.channels j on j.id = r.journal_id
where c.name = $1::text
"""
# Newest first. $5 is the id of the last run of the page before; null: from the newest. Its time is compared alone, too,
# or the index on times could not tell where the page begins: the pair is of two tables.
RUNS = """
select s.id, s.workflow, s.queue, s.priority, s.state, s.attempt, s.worker, s.step, s.error ->> 'type',
       s.error ->> 'message', s.created_at, s.started_at, s.ended_at, s.wake_at
from pgchan.run_status s
where ($1::text is null or s.state = $1::text) and ($2::text is null or s.workflow = $2::text)
  and ($3::text is null or s.queue = $3::text)
  and s.created_at <= coalesce((select a.created_at from pgchan.run_status a where a.id = $5::text), 'infinity')
  and ($5::text is null
       or (s.created_at, s.id) < (select a.created_at, a.id from pgchan.run_status a where a.id = $5::text))
order by s.created_at desc, s.id desc limit $4::integer
"""

# ------------------------------------------------------------------------------------------------ runs, by a worker

# A claim. Nothing may be joined to it: this statement's snapshot is older than what the routine has claimed.
CLAIM = """
select c.channel_id, c.run, c.journal_id, c.workflow, c.input, c.attempt, c.epoch, c.speaks_from, c.deadline, c.head,
       c.journal_head, c.now
from pgchan.claim($1::integer, $2::text[], $3::text[], $4::integer) c
"""
# How many runs of these queues are ready that this worker has no code for, by workflow.
UNKNOWN_WORKFLOWS = """
select r.workflow, count(*) from pgchan.runs r
where r.state = 'scheduled' and r.wake_at is null and r.queue = any ($1::text[]) and r.workflow <> all ($2::text[])
group by r.workflow order by r.workflow limit 100
"""
# Whether a run of these queues and workflows is ready, and in how many seconds the next timer is due. A mere look, at
# the first run of each queue. Without the order a planner that knows of many ready runs takes the first that it meets
# in the table, behind all that have ended.
READY = """
select exists (select from unnest($1::text[]) q (name) cross join lateral (
                 select from pgchan.runs r
                 where r.state = 'scheduled' and r.wake_at is null
                   and r.queue = q.name and r.workflow = any ($2::text[])
                 order by r.priority desc, r.created_at limit 1) f),
       (select extract(epoch from min(r.wake_at) - clock_timestamp())::double precision
        from pgchan.runs r where r.wake_at is not null and r.state in ('scheduled', 'waiting'))
"""
# The journals of claimed runs, in order.
JOURNALS = """
select f.id, m.kind, m.key, m.step, m.attempt, m.body, m.at from unnest($1::bigint[]) f (id)
cross join lateral (select m.* from pgchan.messages m where m.channel_id = f.id order by m."position" offset 0) m
order by f.id, m."position"
"""
# Which steps have spoken, how far, and in which attempt: what a later attempt must void or may carry on from.
SPOKEN = """
select f.id, s.* from unnest($1::bigint[], $2::bigint[]) f (id, speaks_from)
cross join lateral (
  select m.step, max(m.attempt) filter (where m.kind = 0),
         max(m.attempt) filter (where m.kind = 2 and m.void_from is not null)
  from pgchan.messages m
  where m.channel_id = f.id and m."position" >= f.speaks_from and m.step is not null group by m.step offset 0) s
"""
# Output of a step by its earlier attempts that is not void, in order: run.previous().
PREVIOUS = """
select m."position", m.at, m.kind, m.key, m.step, m.attempt, m.void_from, m.body from pgchan.final_messages m
where m.channel_id = $1::bigint and m."position" >= $2::bigint and m.step = $3::text and m.attempt < $4::integer
  and m.kind = 0 order by m."position" limit $5::integer
"""
# Signals that arrived and nobody consumed, at most so many of each run. Also says who owns the run now.
INBOX = """
select f.id, c.epoch, c.head, c.closed_at is not null, m."position", m.at, m.key, m.body
from unnest($1::bigint[], $2::bigint[], $3::integer[]) f (id, seen, most)
left join lateral (select c.* from pgchan.channels c where c.id = f.id limit 1) c on true
left join lateral (select s.* from pgchan.messages s where s.channel_id = f.id and s.kind = 1
                   and s."position" > greatest(f.seen, c.inbox) and (
                     select d."position" from pgchan.messages d
                     where d.channel_id = f.id and d.key = 'pgchan:consumed:' || s."position" limit 1) is null
                   order by s."position" limit f.most) m on true
order by f.id, m."position"
"""
FINISH = "call pgchan.call_finish($1::bigint, $2::bigint, $3::text, $4::bytea, $5::bytea, null, null)"
FINISH_MANY = """
call pgchan.call_finish_many($1::bigint[], $2::bigint[], $3::text[], $4::bytea[], $5::bytea[], $6::integer, null)
"""
SUSPEND = "select pgchan.suspend($1::bigint, $2::bigint, $3::timestamptz, $4::bigint, $5::text[])"
CONTINUE = "select pgchan.continue_run($1::bigint, $2::bigint, $3::bytea)"
RELEASE = "select pgchan.release($1::integer, $2::bigint[])"
# Which runs this worker still owns, by the database's word.
HELD = """
select r.channel_id, c.epoch
from pgchan.runs r join pgchan.channels c on c.id = r.channel_id where r.worker = $1::integer
"""
WORKERS = "select w.id, w.name, w.host, w.pid, w.started_at, w.runs from pgchan.worker_status w order by w.id"
QUEUE_NUMBERS = "select q.name, hashtext(q.name) from unnest($1::text[]) q (name)"

# ------------------------------------------------------------------------------------------------ at connect

# Everything that the checks at connect need, in one round trip. to_regprocedure is null, not an error, where pgchan has
# not been migrated.
DEPLOYMENT = """
select current_setting('server_version_num')::integer, current_setting('server_encoding'),
       current_setting('fsync'), current_setting('full_page_writes'), current_setting('transaction_read_only'),
       pg_is_in_recovery(), pg_backend_pid(), to_regprocedure('pgchan.version()') is not null,
       current_database(), current_user
"""
# What the schema is, and the oldest code that it serves.
VERSION = "select pgchan.version(), pgchan.serves()"
# Settings that come to us through a pooler, which does not let us choose others, and that break something: isolation
# that fails concurrent appends, time limits of which none fits, nulls and dates that are written in another way.
INHERITED = """
select s.name, s.setting || coalesce(s.unit, ''), case s.name when 'DateStyle' then 'ISO' else s.boot_val end
from pg_settings s
where s.name = 'default_transaction_isolation' and s.setting <> 'read committed'
   or case when s.name in ('statement_timeout', 'lock_timeout', 'transaction_timeout')
           then s.setting::bigint between 1 and 999 end
   or s.name = 'array_nulls' and s.setting <> 'on' or s.name = 'DateStyle' and s.setting not like 'ISO%'
order by s.name limit 1
"""
# What each of the four roles may do that those before it may not, and whether this session's role may.
RIGHTS = """
select g.name, x.what, case x.kind when 'routine' then has_function_privilege(p.oid, 'execute')
                                   else has_table_privilege(c.oid, 'select') end
from (values (1, 'pgchan_publisher'), (2, 'pgchan_subscriber'), (3, 'pgchan_worker'), (4, 'pgchan_admin')) g (n, name)
join (values ('pgchan_publisher', 'routine', 'write_messages'), ('pgchan_publisher', 'routine', 'append_messages'),
             ('pgchan_publisher', 'routine', 'call_enqueue'), ('pgchan_publisher', 'routine', 'call_deliver'),
             ('pgchan_subscriber', 'table', 'channels'), ('pgchan_subscriber', 'table', 'messages'),
             ('pgchan_subscriber', 'table', 'final_messages'), ('pgchan_subscriber', 'table', 'run_status'),
             ('pgchan_subscriber', 'routine', 'ping'),
             ('pgchan_worker', 'routine', 'write'), ('pgchan_worker', 'routine', 'append'),
             ('pgchan_worker', 'routine', 'claim'), ('pgchan_worker', 'routine', 'take_lock'),
             ('pgchan_worker', 'routine', 'reap'),
             ('pgchan_admin', 'routine', 'trim_channel'), ('pgchan_admin', 'routine', 'delete_channel'),
             ('pgchan_admin', 'routine', 'resume')) x (role, kind, what) on x.role = g.name
join pg_namespace s on s.nspname = 'pgchan'
left join pg_proc p on p.pronamespace = s.oid and p.proname = x.what and x.kind = 'routine'
left join pg_class c on c.relnamespace = s.oid and c.relname = x.what and x.kind = 'table'
order by g.n, x.what
"""
# The four roles: what makes each, whether the server has it, and whether it may use the schema of this database.
ROLES = """
select format('create role %I', g.name), r.oid is not null,
       r.oid is not null and has_schema_privilege(r.oid, s.oid, 'usage')
from unnest(array['pgchan_publisher', 'pgchan_subscriber', 'pgchan_worker', 'pgchan_admin']) with ordinality g (name, n)
join pg_namespace s on s.nspname = 'pgchan' left join pg_roles r on r.rolname = g.name order by g.n
"""
GRANT_ROLES = "call pgchan.grant_roles()"
# How full the NOTIFY queue is, and the session whose transaction has lasted longest, on the whole server: if it LISTENs
# nobody can forget what was announced since. Who has held a snapshot of this database longest, and for how long.
WEATHER = """
select pg_notification_queue_usage(),
       (select a.pid from pg_stat_activity a
        where a.xact_start is not null and a.backend_type = 'client backend' and a.pid <> pg_backend_pid()
        order by a.xact_start limit 1),
       s.pid, s.seconds
from (select 1) one left join lateral (
  select a.pid, extract(epoch from clock_timestamp() - a.xact_start)::double precision as seconds
  from pg_stat_activity a where a.backend_xmin is not null and a.xact_start is not null and a.pid <> pg_backend_pid()
  order by age(a.backend_xmin) desc limit 1) s on true
"""
# How long ended runs are kept; how many channels and runs, counted up to 10,000, the `upkeep` should have removed ten
# minutes ago; how many messages of removed channels are left. An index serves a comparison with now();
# clock_timestamp() is another value for each row.
UPKEEP_BACKLOG = """
select p.ended_runs,
       (select count(*) from (
          select from pgchan.channels c where c.expires_at < now() - interval '10 minutes'
            and not exists (select from pgchan.runs r where r.channel_id = c.id and r.ended_at is null) limit 10000) e),
       (select count(*) from (
          select from pgchan.runs r join pgchan.channels c on c.id = r.channel_id
          where r.ended_at < now() - make_interval(secs => p.ended_runs) - interval '10 minutes'
            and c.expires_at is null and not exists (
              select from pgchan.runs o join pgchan.channels j on j.id = o.journal_id
              where o.channel_id = r.parent and r.created_at >= j.created_at) limit 10000) e),
       (select coalesce(sum(r.head - r.trimmed), 0)::bigint from pgchan.removed r)
from pgchan.retention p
"""
# How many runs have been ready for a minute.
LATE_RUNS = """
select count(*) from pgchan.runs r
where r.state = 'scheduled' and r.wake_at is null and r.created_at < now() - interval '1 minute'
"""
# Sessions that hold the lock of a worker, or of an id that a worker may get, and are not the one that its row names.
STRANGERS = """
select l.objid::bigint, l.pid, coalesce(a.usename, 'unknown')
from pg_locks l left join pgchan.workers w on w.id::oid = l.objid left join pg_stat_activity a on a.pid = l.pid
where l.locktype = 'advisory' and l.classid = 1885823848 and l.objid <> 0::oid and l.objsubid = 2 and l.granted
  and l.database = (select d.oid from pg_database d where d.datname = current_database())
  and l.pid is distinct from w.backend_pid
order by l.objid, l.pid limit 100
"""
PING = "select pgchan.ping($1::text)"
PROBE_LOCK = "select pgchan.take_probe($1::integer)"
PROBE_UNLOCK = "select pgchan.free_probe($1::integer)"

# ------------------------------------------------------------------------------------------------ harden

# Whether this session's role is a superuser, and where it is.
MAY_HARDEN = """
select r.rolsuper, to_regnamespace('pgchan') is not null, current_database()
from pg_roles r where r.rolname = current_user
"""
# What is still to be run to take the 21 functions for advisory locks, and pg_notify, from PUBLIC and give them to the
# owner of pgchan's routines.
HARDEN = """
with functions as (
  select format('pg_catalog.%I(%s)', p.proname, oidvectortypes(p.proargtypes)) as name,
         coalesce(p.proacl, acldefault('f', p.proowner)) as acl
  from pg_proc p
  where p.pronamespace = 'pg_catalog'::regnamespace and p.proname ~ '^(pg_notify$|pg_advisory_|pg_try_advisory_)')
select s.statement from (
  select f.name, 1 as n, format('grant execute on function %s to %I', f.name, o.rolname) as statement
  from functions f cross join pg_roles o
  where o.oid in (select p.proowner from pg_proc p where p.pronamespace = 'pgchan'::regnamespace)
    and not exists (select from aclexplode(f.acl) a where a.grantee = o.oid)
  union all
  select f.name, 2, format('revoke execute on function %s from public', f.name)
  from functions f where exists (select from aclexplode(f.acl) a where a.grantee = 0)) s
order by s.name, s.n
"""
# What is still to be run to give them back.
SOFTEN = """
with functions as (
  select format('pg_catalog.%I(%s)', p.proname, oidvectortypes(p.proargtypes)) as name, p.proowner,
         coalesce(p.proacl, acldefault('f', p.proowner)) as acl
  from pg_proc p
  where p.pronamespace = 'pg_catalog'::regnamespace and p.proname ~ '^(pg_notify$|pg_advisory_|pg_try_advisory_)')
select s.statement from (
  select f.name, 1 as n, format('grant execute on function %s to public', f.name) as statement
  from functions f where not exists (select from aclexplode(f.acl) a where a.grantee = 0)
  union all
  select f.name, 2, format('revoke execute on function %s from %I', f.name, o.rolname)
  from functions f cross join pg_roles o
  where o.oid in (select p.proowner from pg_proc p where p.pronamespace = 'pgchan'::regnamespace)
    and o.oid <> f.proowner and exists (select from aclexplode(f.acl) a where a.grantee = o.oid)) s
order by s.name, s.n
"""

# ------------------------------------------------------------------------------------------------ presence of workers

# What liveness.py sends over its own sessions. A bare UNLOCK_ALL is safe there: they hold nothing else.
NEW_WORKER = "select pgchan.new_worker()"
TRY_LOCK = "select pgchan.take_lock($1::integer)"
UNLOCK_ALL = "select pgchan.free_locks()"
COME_BACK = "select pgchan.come_back($1::integer, $2::text, $3::text, $4::integer)"
REGISTER = "select pgchan.register($1::integer, $2::text, $3::text, $4::integer)"
LEAVE = "select pgchan.leave($1::integer)"
REAP = "select pgchan.reap($1::integer)"

# The heartbeat, and the question of a worker that returns. Never in one statement with TRY_LOCK: that would look with a
# snapshot older than the lock and still see the row that a reaper has just deleted. The rest of the key tells a row
# from that of another worker which was given the same id, after a failover that lost what the sequence had handed out.
IS_OURS = """
select w.name = $2::text and w.host = $3::text and w.pid = $4::integer from pgchan.workers w where w.id = $1::integer
"""

# The sessions of ours that may not know yet that they are cut off. Only one that really holds this lock is ended: after
# a restart of the server a pid may be anybody's.
END_FORGOTTEN = """
select pg_terminate_backend(l.pid) from pg_locks l
where l.locktype = 'advisory' and l.classid = 1885823848 and l.objid = $1::integer::oid and l.objsubid = 2 and l.granted
  and l.database = (select d.oid from pg_database d where d.datname = current_database())
  and l.pid = any ($2::integer[]) and l.pid <> pg_backend_pid()
"""

# All workers, whether the session that registered holds the lock, and another one that does. A watcher that was granted
# it a moment ago does not count: two of them would take each other for the sign of life that they wait for.
LOOK = """
select w.id, w.backend_pid, coalesce(bool_or(l.pid = w.backend_pid), false),
       min(l.pid) filter (where l.pid <> w.backend_pid)
from pgchan.workers w left join pg_locks l
  on l.locktype = 'advisory' and l.classid = 1885823848 and l.objid = w.id::oid and l.objsubid = 2 and l.granted
  and l.database = (select d.oid from pg_database d where d.datname = current_database())
group by w.id, w.backend_pid
"""

# One slice of watching. The limit lasts for this statement, which is a transaction of its own.
WAIT_FOR_LOCK = "select pgchan.await_lock($1::integer, $2::integer)"
UNLOCK = "select pgchan.free_lock($1::integer)"

# Settings that this server does not know are left out. The session's own pid, which is not the one of the handshake if
# a pooler stands between.
CONFIGURE = """
select pg_backend_pid(), count(set_config(s.name, g.value, false))
from unnest($1::text[], $2::text[]) g (name, value) join pg_settings s on s.name = g.name
"""
