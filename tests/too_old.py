"""A server that is older than pgchan supports is refused with one sentence, at every way in.

versions.py runs this on such a server; its name keeps it out of the suite, which runs on servers that are supported.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pgchan
from pgchan import doctor, errors

SENTENCE = "PostgreSQL 13 is too old; pgchan needs 14 or newer: upgrade the server"

PROGRAM = """
import pgchan
from pgchan.server import Insecure, create_app

client = pgchan.AsyncClient()
worker = pgchan.Worker(client, [pgchan.workflow(lambda run: None)])
app = create_app(client, auth=Insecure())
"""


@pytest.fixture
def dsn(shared_server: tuple[str, str]) -> str:
    return shared_server[0]


async def test_clients_and_workers_refuse_it(dsn: str) -> None:
    @pgchan.workflow
    async def nothing(run: pgchan.Run) -> None: ...

    blocking, client = pgchan.Client(dsn), pgchan.AsyncClient(dsn)
    for call in (
        client.channel("chat").publish(1), client.channel("chat").tail().__anext__(),
        pgchan.Worker(client, [nothing]).run(signals=False),
        asyncio.to_thread(blocking.channel("chat").publish, 1),
        asyncio.to_thread(next, blocking.channel("chat").tail()),
    ):  # fmt: skip
        with pytest.raises(errors.UnsafeDeployment) as caught:
            await call
        assert str(caught.value) == SENTENCE
    await client.close()
    blocking.close()


async def test_the_doctor_names_it(dsn: str) -> None:
    (finding,) = await doctor.check(dsn)
    assert (finding.check, finding.is_fine, finding.detail) == ("deployment", False, SENTENCE)


@pytest.mark.parametrize(
    "arguments", ["migrate", "publish chat 1", "tail chat", "worker program:worker", "serve program:app"]
)
def test_every_command_refuses_it(dsn: str, tmp_path: Path, arguments: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "pgchan.cli", *arguments.split()], cwd=tmp_path, env=os.environ | {"PGCHAN_DSN": dsn},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pgchan: {SENTENCE}\n"
