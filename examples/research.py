"""An agent that survives: it looks things up, picks, and writes a report that is streamed word by word.

What it found and wrote is recorded step by step. If its process dies, another worker goes on from the last recorded
step, and in the middle of a section from the last word that readers have seen. A signal makes it change course.

Run it with `PGCHAN_DSN=postgresql://… python -m pgchan.examples.research asyncio queues`, or see it in `pgchan demo`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pgchan
from pgchan.examples import _library, _model

MODULES_READ = 12
SECTIONS = 4


@pgchan.workflow
async def research(run: pgchan.Run, topic: str) -> list[str]:
    """Write a report on `topic`. A signal {"text": "…"} turns it to another one, whatever it is doing just then."""
    sections: list[str] = []
    while True:
        try:
            found = await run.step(search, topic, interruptible=True)
            for passage in await run.step(pick, topic, found):
                sections.append(await run.step(write, topic, passage, interruptible=True))
            return sections
        except pgchan.Interrupted as interrupted:
            topic = await run.step(change_course, topic, interrupted.signal.body)


async def search(topic: str) -> list[_library.Passage]:
    """Read the documentation of the modules that mention the topic most."""
    run = pgchan.current_run()
    await run.publish({"type": "step", "title": f"Look for “{topic}” in the standard library"}, wait=False)
    found: list[_library.Passage] = []
    for module in await asyncio.to_thread(_library.rank_modules, topic, MODULES_READ):
        await run.publish({"type": "reading", "module": module}, wait=False)
        found += _library.find_passages(topic, module)
        await asyncio.sleep(5 * _model.pace())
    return found


async def pick(topic: str, found: list[_library.Passage]) -> list[_library.Passage]:
    """Choose what the sections will be about: the best passages, two of a module at most."""
    run = pgchan.current_run()
    await run.publish({"type": "step", "title": f"Pick from {len(found)} passages"}, wait=False)
    chosen: list[_library.Passage] = []
    for passage in sorted(found, key=lambda passage: -passage["score"]):
        if len(chosen) < SECTIONS and sum(passage["module"] == other["module"] for other in chosen) < 2:
            chosen.append(passage)
    await run.publish({"type": "plan", "topic": topic, "sections": [passage["title"] for passage in chosen]})
    return chosen


async def write(topic: str, passage: _library.Passage) -> str:
    """Write one section and stream it. A later attempt goes on from what an earlier one has said."""
    run = pgchan.current_run()
    said = [message.body for message in run.previous()]
    text = "".join(body["text"] for body in said if body["type"] == "text")
    if not said:
        await run.publish({"type": "section", "title": passage["title"]}, wait=False)
    async for piece in _model.words(topic, passage, text):
        await run.publish({"type": "text", "text": piece}, wait=False)
        text += piece
    return text


async def change_course(topic: str, wish: Any) -> str:
    """Decide what a signal means for the report."""
    run = pgchan.current_run()
    wanted = str(wish.get("text", "")).strip() if isinstance(wish, dict) else ""
    decision = f"Leave “{topic}” and turn to “{wanted}”" if wanted else f"Stay with “{topic}”: no topic was named"
    await run.publish({"type": "step", "title": "Change course"}, wait=False)
    await run.publish({"type": "decision", "text": decision})
    return wanted or topic


async def main(topic: str) -> None:
    """Run the agent in this process and print what it says."""
    async with pgchan.AsyncClient() as client:
        worker = pgchan.Worker(client, [research])
        working = asyncio.create_task(worker.run())
        handle = await client.start(research, topic)
        async for message in handle.tail():
            if message.kind == "message" and message.body["type"] == "text":
                print(message.body["text"], end="", flush=True)
            elif message.kind == "message" and message.body["type"] == "section":
                print(f"\n\n## {message.body['title']}\n")
        print(f"\n\n{len(await handle.result())} sections")
        worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "asyncio queues"))

# Prints the report, section by section as it is written, and at the end:
# 4 sections
