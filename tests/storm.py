"""Publishers that go on through a fault, and the check of what they were told against what is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from doors import Reading, direct, query

from pgchan import errors


def terminate(dsn: str, role: str) -> int:
    """Cut the connections of this role ("writer", "listen", "pool") of all clients; how many there were."""
    found = query(
        direct(dsn),
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and application_name = %s",
        f"pgchan {role}",
    )
    return len(found)


def bodies(dsn: str, channel: str) -> list[Any]:
    """All that is stored, and a check that positions are dense."""
    rows = query(
        dsn,
        "select m.position, convert_from(m.body, 'UTF8')::jsonb from pgchan.messages m"
        " join pgchan.channels c on c.id = m.channel_id where c.name = %s order by m.position",
        channel,
    )
    assert [position for position, _ in rows] == list(range(1, len(rows) + 1))
    assert query(dsn, "select head from pgchan.channels where name = %s", channel) == [(len(rows),)]
    return [body for _, body in rows]


class Storm:
    """Publishers that go on until they are stopped, some with keys and some without, and what they were told."""

    def __init__(self, client: Any, channel: str, publishers: int = 6) -> None:
        self._channel = client.channel(channel)
        self.acknowledged: dict[str, int] = {}
        self.indefinite: set[str] = set()
        self.not_done: set[str] = set()
        self._stopping = False
        self._tasks = [asyncio.create_task(self._publish(n)) for n in range(publishers)]

    async def _publish(self, publisher: int) -> None:
        turn = 0
        while not self._stopping:
            turn += 1
            value = f"{publisher}-{turn}"
            try:
                message = await self._channel.publish(value, key=value if publisher % 2 else None)
                self.acknowledged[value] = message.position
            except errors.Indefinite:
                self.indefinite.add(value)
            except errors.Unavailable:
                self.not_done.add(value)
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def check(self, stored: list[Any], reader: Reading | None = None) -> None:
        counts = Counter(stored)
        assert max(counts.values()) == 1
        assert all(stored[position - 1] == value for value, position in self.acknowledged.items())
        assert set(counts) <= self.acknowledged.keys() | self.indefinite
        assert not any(int(value.split("-")[0]) % 2 for value in self.indefinite), "a keyed publish was left in doubt"
        if reader is not None:
            assert reader.bodies == stored
