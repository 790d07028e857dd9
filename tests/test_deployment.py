"""Servers on which a promise would break are refused at the first use, by both doors and the worker, with the fix."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

import pgchan
from pgchan import errors


@pgchan.workflow
async def nothing(run: pgchan.Run) -> None: ...


async def refused_by_all(dsn: str, match: str) -> None:
    blocking = pgchan.Client(dsn, timeout=2)
    client = pgchan.AsyncClient(dsn, timeout=2)
    with pytest.raises(errors.UnsafeDeployment, match=match):
        await client.channel("chat").publish(1)
    with pytest.raises(errors.UnsafeDeployment, match=match):
        await pgchan.Worker(client, [nothing]).run(signals=False)
    await client.close()
    with pytest.raises(errors.UnsafeDeployment, match=match):
        await asyncio.to_thread(blocking.channel("chat").publish, 1)
    blocking.close()


async def test_a_standby_is_refused(server: Any) -> None:
    server.stop()
    signal = server.data / "standby.signal"  # recovers for ever: what a replica does, without a primary
    signal.touch()
    os.chown(signal, server.data.stat().st_uid, server.data.stat().st_gid)
    server.start()
    await refused_by_all(server.dsn, "standby")


@pytest.mark.parametrize("server", [{"fsync": "off"}, {"full_page_writes": "off"}], indirect=True, ids=str)
async def test_a_server_that_may_lose_commits_is_refused(server: Any) -> None:
    await refused_by_all(server.dsn, "may lose commits")
