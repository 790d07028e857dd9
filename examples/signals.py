"""A run can be spoken to by its name. Here it waits for a person's answer, for days if need be, and holds no memory.

Run it with `PGCHAN_DSN=postgresql://… python -m pgchan.examples.signals`.
"""

from __future__ import annotations

import asyncio

import pgchan


@pgchan.workflow
async def travel(run: pgchan.Run, place: str) -> str:
    """Ask, wait for the answer, act on it."""
    await run.publish({"question": f"Book a flight to {place}?"})
    answer = await run.receive(timeout=7 * 24 * 3600)
    if answer is None:
        return "nobody answered within a week"
    return f"{place}: booked" if answer.body == "yes" else f"{place}: not booked"


async def main() -> None:
    async with pgchan.AsyncClient() as client:
        worker = pgchan.Worker(client, [travel])
        working = asyncio.create_task(worker.run())
        handle = await client.start(travel, "Lisbon")
        async for message in handle.tail():
            if message.kind == "message":
                print(message.body["question"])
                # Any process may answer: all it needs is the run's id. The signal is stored when this returns.
                await client.run(handle.id).signal("yes")
            elif message.kind == "control":
                print("told by pgchan:", message.body["type"])
        print(await handle.result())
        worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())

# Prints:
# Book a flight to Lisbon?
# told by pgchan: consumed
# told by pgchan: ended
# Lisbon: booked
