"""Behind PgBouncer: what needs a session is refused in transaction mode, and works past it with control_dsn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import free_port
from doors import Door
from psycopg.conninfo import conninfo_to_dict

import pgchan
from pgchan import errors


@pytest.fixture
def pooled(dsn: str, tmp_path: Path, block_until: Callable[..., None]) -> Iterator[Callable[[str], str]]:
    """`pooled("transaction")`: the DSN of this test's database through a PgBouncer of its own."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    with contextlib.ExitStack() as stack:

        def start(mode: str) -> str:
            port = free_port()
            direct = conninfo_to_dict(dsn)
            folder = Path("/tmp") / f"pgchan-bouncer-{port}"
            folder.mkdir(mode=0o755)
            stack.callback(shutil.rmtree, folder)
            (folder / "ini").write_text(
                f"[databases]\n* = host={direct['host']} port={direct.get('port') or 5432} user={direct['user']}\n"
                f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
                f"pool_mode = {mode}\ndefault_pool_size = 5\n"
            )
            # It refuses to be root; the server's user may enter the directory of the server's socket.
            host = str(direct["host"])
            owner = os.stat(host if host.startswith("/") else folder).st_uid or "nobody"
            user = {"user": owner} if os.getuid() == 0 else {}
            process = stack.enter_context(
                subprocess.Popen([program, str(folder / "ini")], stderr=subprocess.DEVNULL, **user)  # type: ignore[call-overload]
            )
            stack.callback(process.terminate)
            url = f"postgresql://{direct['user']}@127.0.0.1:{port}/{direct['dbname']}"

            def is_up() -> bool:
                with contextlib.suppress(psycopg.OperationalError):
                    psycopg.connect(url, connect_timeout=2).close()
                    return True
                return False

            block_until(is_up)
            return url

        yield start


@pytest.fixture(params=["async", "blocking"])
async def opened(request: pytest.FixtureRequest, dsn: str) -> Any:
    door = Door(request.param, dsn)
    yield door
    await door.close()


async def test_behind_a_transaction_pooler_publishing_and_reading_work(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("transaction"))
    channel = client.channel("chat")
    for n in range(20):
        await channel.publish(n, key=str(n))
    assert (await channel.publish(3, key="3")).position == 4
    assert [message.body for message in await channel.read()] == list(range(20))


async def test_behind_a_transaction_pooler_what_must_listen_is_refused_with_the_fix(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("transaction"))
    await client.channel("chat").publish(1)
    with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
        await client.channel("chat").tail().__anext__()
    handle = await client.start("nobody_has_it")
    with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
        await handle.result(timeout=5)


async def test_a_worker_refuses_a_transaction_pooler(pooled: Any) -> None:
    @pgchan.workflow
    async def nothing(run: pgchan.Run) -> None: ...

    async with pgchan.AsyncClient(pooled("transaction")) as client:
        with pytest.raises(errors.UnsafeDeployment, match="control_dsn"):
            await pgchan.Worker(client, [nothing]).run(signals=False)


async def test_with_a_direct_control_dsn_tails_and_workers_work(pooled: Any, dsn: str) -> None:
    @pgchan.workflow
    async def hello(run: pgchan.Run, name: str) -> str:
        async def greet() -> str:
            await run.publish(f"hello {name}")
            return name

        return await run.step(greet)

    async with pgchan.AsyncClient(pooled("transaction"), control_dsn=dsn) as client:
        worker = pgchan.Worker(client, [hello])
        task = asyncio.create_task(worker.run(signals=False))
        handle = await client.start(hello, "you")
        said = [message.body async for message in handle.tail() if message.kind == "message"]
        assert (said, await handle.result(10)) == (["hello you"], "you")
        worker.stop()
        await task


async def test_a_session_pooler_is_as_good_as_no_pooler(pooled: Any, opened: Door) -> None:
    client = opened.client(pooled("session"))
    channel = client.channel("chat")
    await channel.publish(1)
    await channel.close()
    assert [message.body async for message in channel.tail()] == [1]
