import psycopg, pytest
import test_run_model as m
from doors import query
MUT = [
 ("deliver", "and target.state = 'waiting'", "and false"),
 ("suspend", "if found then\n    return 'ready';", "if false then\n    return 'ready';"),
 ("release", "perform pgchan.supersede(mine);", ""),
 ("claim", "perform pgchan.supersede(picked);", ""),
 ("append", "when g.fence <> c.epoch then 'fenced'", ""),
 ("settle", "perform pgchan.supersede(array[run]);", ""),
 ("owns", "c.epoch = owns.epoch", "true"),
 ("open_signals", "c.inbox", "0"),
 ("reap", "delete from pgchan.workers w where w.id = reap.worker;", ""),
 ("claim", "d.wake_at <= clock_timestamp()", "false"),
]
@pytest.mark.parametrize("mut", MUT, ids=lambda x: x[0]+x[1][:20])
def test_mut(dsn, mut):
    name, a, b = mut
    (d,), = query(dsn, "select pg_get_functiondef(p.oid) from pg_proc p where proname=%s and pronamespace='pgchan'::regnamespace", name)
    assert a in d, d
    with psycopg.connect(dsn, autocommit=True) as c: c.execute(d.replace(a, b))
    try:
        m.test_any_sequence_of_calls_leaves_what_the_model_says(dsn)
    except BaseException as e:
        print("CAUGHT", name, type(e).__name__, str(e)[:80].replace("\n"," "))
        return
    raise SystemError("not caught")
def test_old_claim(session, block_until, monkeypatch):
    monkeypatch.setattr(m.sql, "CLAIM", m.sql.CLAIM.replace("c.head,\n       c.journal_head", "h.head,\n       j.head")+" join pgchan.channels h on h.id = c.channel_id join pgchan.channels j on j.id = c.journal_id")
    with pytest.raises(AssertionError): m.test_a_claim_returns_every_run_that_it_takes_also_one_that_was_started_since_it_began(session, block_until)
def test_old_claim2(session, block_until, monkeypatch):
    monkeypatch.setattr(m.sql, "CLAIM", m.sql.CLAIM.replace("c.head,\n       c.journal_head", "h.head,\n       j.head")+" join pgchan.channels h on h.id = c.channel_id join pgchan.channels j on j.id = c.journal_id")
    with pytest.raises(AssertionError): m.test_a_claim_tells_what_was_recorded_since_it_began(session, block_until)
session = m.session
