"""A run survives its process. The first worker dies in the middle; the second one does only what was not recorded.

Run it with `PGCHAN_DSN=postgresql://… python -m pgchan.examples.durable_steps`.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pgchan


@pgchan.workflow
async def order(run: pgchan.Run, goods: str) -> str:
    """Charge, then ship. Each step is recorded when it has returned, and never executed again after that."""
    receipt = await run.step(charge, goods)
    return await run.step(ship, goods, receipt)


async def charge(goods: str) -> str:
    print(f"charge for {goods}", flush=True)
    return "receipt 7"


async def ship(goods: str, receipt: str) -> str:
    run = pgchan.current_run()
    print(f"ship {goods} with {receipt}, claim {run.attempt} of the run", flush=True)
    if run.attempt == 1:
        print("the process dies", flush=True)
        os._exit(1)
    # Shipping may be tried twice, as here. Whoever ships can tell by this key, which is the same in every attempt.
    print(f"idempotency key ends with {run.idempotency_key.removeprefix(run.id)}", flush=True)
    return f"{goods} are on their way"


async def work() -> None:
    await pgchan.Worker(pgchan.AsyncClient(), [order]).run()


async def main() -> None:
    async with pgchan.AsyncClient() as client:
        handle = await client.start(order, "flowers")
        command = [sys.executable, "-m", "pgchan.examples.durable_steps", "worker"]
        first = await asyncio.create_subprocess_exec(*command)
        await first.wait()
        second = await asyncio.create_subprocess_exec(*command)
        print(await handle.result())
        second.terminate()
        await second.wait()


if __name__ == "__main__":
    asyncio.run(work() if sys.argv[1:] == ["worker"] else main())

# Prints:
# charge for flowers
# ship flowers with receipt 7, claim 1 of the run
# the process dies
# ship flowers with receipt 7, claim 2 of the run
# idempotency key ends with /ship
# flowers are on their way
