import asyncio, random, time, os, pytest, pgchan
from collections import Counter
from workers import Processes
from doors import query
import test_takeover as t
async def again(f):
    while True:
        try: return await f()
        except (pgchan.Indefinite, pgchan.Unavailable): pass
@pytest.mark.timeout(100)
@pytest.mark.parametrize("seed", [int(os.environ.get("SEED", "1"))])
async def test_soak(server, seed):
    dsn = server.dsn; processes = Processes(dsn)
    rnd = random.Random(seed)
    async with pgchan.AsyncClient(dsn, name="tester") as client:
        alive = [processes.begin(f"w{n}", concurrency=5, lease=10.0, takeover_grace=2.0) for n in range(3)]
        await asyncio.gather(*(p.tells("started", seconds=30) for p in alive))
        runs = []
        stop = time.monotonic() + 25
        faults = Counter()
        async def make():
            while time.monotonic() < stop:
                h = await again(lambda: client.start("everything", id=f"r{len(runs)}")); runs.append(h)
                async def sig(h=h):
                    await asyncio.sleep(rnd.random()*0.5)
                    await again(lambda: h.signal("first", key="1"))
                    await asyncio.sleep(rnd.random()*1.5)
                    await again(lambda: h.signal("second", key="2"))
                asyncio.ensure_future(sig())
                await asyncio.sleep(0.05)
        mk = asyncio.create_task(make())
        n = 3
        while time.monotonic() < stop:
            await asyncio.sleep(rnd.random()*0.6)
            await asyncio.sleep(1); k = rnd.choice(["immediate","fast","kill9"])
            i = rnd.randrange(len(alive)); p = alive[i]
            faults[k]+=1
            if k == "kill9": await asyncio.to_thread(server.kill); await asyncio.to_thread(server.start)
            elif k in ("immediate","fast"): await asyncio.to_thread(server.restart, k)
            elif k == "kill":
                p.kill(); n += 1
                alive[i] = await processes.start(f"w{n}", concurrency=5, lease=10.0, takeover_grace=2.0)
            elif k == "cut": await asyncio.to_thread(p.cut)
            elif k == "role": await asyncio.to_thread(p.cut, rnd.choice(["writer","pool","listen","lock","watch"]))
        await mk
        await asyncio.sleep(2.1)
        bad = 0
        for h in runs:
            try:
                assert await h.result(30) == ["first","second"]
                assert await t.bodies(client, h.id) == ["begin","thinking","answer to second","end"], await t.bodies(client, h.id, "raw")
                assert Counter(m.key for m in await h.journal()) == {"receive":1,"middle":1,"answer":1}
                c = await t.controls(client, h.id, "consumed")
                sigs = [m.position for m in await h.channel.read(view="raw") if m.kind=="signal"]
                assert [x["signal"] for x in c] == sigs, (c, sigs)
            except BaseException as e:
                bad += 1; print("BAD", h.id, type(e).__name__, str(e)[:300], await h.status())
                if bad > 4: break
        st = Counter(s.attempt for s in await client.runs(limit=1000))
        print("RUNS", len(runs), "faults", dict(faults), "attempts", dict(st), "bad", bad)
        assert not bad
