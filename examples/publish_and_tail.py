"""A channel is a name. One side publishes to it, another follows it; neither knows where the other one is.

Run it with `PGCHAN_DSN=postgresql://… python -m pgchan.examples.publish_and_tail`.
"""

from __future__ import annotations

import asyncio
import uuid

import pgchan


async def follow(client: pgchan.AsyncClient, name: str) -> None:
    """Print what is said on the channel until it is closed."""
    async for message in client.channel(name).tail(after=0):
        print(message.position, message.body["text"])
    print("closed")


async def main() -> None:
    name = f"example/{uuid.uuid4()}"
    async with pgchan.AsyncClient() as client:
        # The follower may come first: a name is an address before anything was said there.
        following = asyncio.create_task(follow(client, name))
        channel = client.channel(name)
        await channel.publish({"text": "hello"})
        await channel.publish({"text": "this is said once"}, key="once")
        # A publish whose answer was lost can be repeated with its key: it stores nothing and returns the first message.
        again = await channel.publish({"text": "this is said once"}, key="once")
        await channel.publish({"text": "goodbye"})
        await channel.close()
        await following
        print(f"the repeated publish is message {again.position}")

        # Whoever comes later reads the same, from any position on.
        print([message.body["text"] for message in await channel.read(after=2)])


if __name__ == "__main__":
    asyncio.run(main())

# Prints:
# 1 hello
# 2 this is said once
# 3 goodbye
# closed
# the repeated publish is message 2
# ['goodbye']
