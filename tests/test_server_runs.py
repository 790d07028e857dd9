"""Runs over HTTP, with a worker where one is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

import pgchan
from pgchan import AsyncClient, Run, Worker, workflow
from pgchan.server import Insecure, create_app

Wait = Callable[..., Awaitable[None]]


@workflow
async def add(run: Run, a: int, b: int = 1) -> int:
    async def plus() -> int:
        return a + b

    return await run.step(plus)


@workflow
async def ask(run: Run) -> Any:
    signal = await run.receive()
    assert signal is not None
    return signal.body


@workflow
async def fail_once(run: Run) -> str:
    if run.attempt == 1:
        raise ValueError("not yet")
    return "done"


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(dsn) as client:
        yield client


@pytest.fixture
async def http(client: AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(client, auth=Insecure()))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as http:
        yield http


@pytest.fixture
async def worker(client: AsyncClient) -> AsyncIterator[Worker]:
    worker = Worker(client, [add, ask, fail_once], drain=0.5)
    working = asyncio.create_task(worker.run())
    yield worker
    worker.stop()
    await working


async def test_a_run_is_started_once(client: AsyncClient, http: httpx.AsyncClient) -> None:
    asked = {"workflow": "add", "args": [1], "kwargs": {"b": 2}, "id": "sum/1"}
    asked |= {"queue": "q", "priority": 3, "delay": 60}
    first, again = await http.post("/runs", json=asked), await http.post("/runs", json=asked)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == {"id": "sum/1", "channel": "sum/1", "created": True}
    assert again.json()["created"] is False
    assert first.headers["location"] == "/runs/sum/1"
    status = await client.run("sum/1").status()
    assert (status.workflow, status.queue, status.priority, status.state) == ("add", "q", 3, "scheduled")
    response = await http.post("/runs", json=asked | {"args": [2]})
    assert (response.status_code, response.json()["code"]) == (409, "run_conflict")


async def test_an_id_is_chosen_where_none_is_given(http: httpx.AsyncClient) -> None:
    ids = {(await http.post("/runs", json={"workflow": "add"})).json()["id"] for _ in range(2)}
    assert len(ids) == 2
    assert all("/" not in run for run in ids)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"workflow": ""}, {"workflow": 7}, {"workflow": "w", "args": {}}, {"workflow": "w", "kwargs": []},
        {"workflow": "w", "id": ""}, {"workflow": "w", "id": "a/cancel"}, {"workflow": "w", "id": "a/../b"},
        {"workflow": "w", "id": 7}, {"workflow": "w", "queue": ""}, {"workflow": "w", "priority": "high"},
        {"workflow": "w", "delay": -1}, {"workflow": "w", "timeout": "1"}, {"workflow": "w", "connection": 1},
        {"workflow": "w", "kwargs": {"id": "x"}}, {"workflow": "w", "kwargs": {"defer": 1}},
        {"workflow": "w", "args": 1}, {"workflow": "w", "args": "abc"},
    ],
)  # fmt: skip
async def test_a_bad_start_is_refused(http: httpx.AsyncClient, client: AsyncClient, body: Any) -> None:
    response = await http.post("/runs", json=body)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_input"), response.text
    assert await client.runs() == []


async def test_a_run_shows_its_state_result_and_journal(http: httpx.AsyncClient, worker: Worker) -> None:
    await http.post("/runs", json={"workflow": "add", "args": [40, 2], "id": "sum"})
    response = await http.get("/runs/sum/result", params={"wait": 20})
    assert (response.status_code, response.json()) == (
        200, {"id": "sum", "state": "succeeded", "result": 42, "error": None},
    )  # fmt: skip
    status = (await http.get("/runs/sum")).json()
    assert (status["id"], status["state"], status["workflow"], status["error"]) == ("sum", "succeeded", "add", None)
    assert status["ended_at"].endswith("Z")
    journal = (await http.get("/runs/sum/journal")).json()
    assert [(message["key"], message["body"]) for message in journal["messages"]] == [("plus", 42)]
    rest = (await http.get("/runs/sum/journal", params={"after": journal["cursor"]})).json()
    assert rest == {"messages": [], "cursor": journal["cursor"]}


async def test_a_result_that_is_not_there_yet_is_awaited_for_a_while(http: httpx.AsyncClient) -> None:
    await http.post("/runs", json={"workflow": "add", "args": [1], "id": "sum"})
    response = await http.get("/runs/sum/result", params={"wait": "0.05"})
    assert (response.status_code, response.json()) == (
        202, {"id": "sum", "state": "scheduled", "result": None, "error": None},
    )  # fmt: skip


async def test_a_signal_reaches_the_run(http: httpx.AsyncClient, worker: Worker) -> None:
    await http.post("/runs", json={"workflow": "ask", "id": "ask/1"})
    headers = {"Idempotency-Key": "s"}
    first = await http.post("/runs/ask/1/signals", json={"body": {"go": "left"}}, headers=headers)
    assert (first.status_code, first.json()["kind"], first.json()["channel"]) == (201, "signal", "ask/1")
    assert (await http.get("/runs/ask/1/result", params={"wait": 20})).json()["result"] == {"go": "left"}
    again = await http.post("/runs/ask/1/signals", json={"body": {"go": "left"}}, headers=headers)
    assert again.json()["position"] == first.json()["position"]
    late = await http.post("/runs/ask/1/signals", json={"body": 1})
    assert (late.status_code, late.json()["code"]) == (409, "channel_closed")


async def test_a_run_is_cancelled_once(http: httpx.AsyncClient) -> None:
    await http.post("/runs", json={"workflow": "ask", "id": "r"})
    assert (await http.post("/runs/r/cancel")).json() == {"id": "r", "cancelled": True}
    assert (await http.post("/runs/r/cancel", json={})).json() == {"id": "r", "cancelled": False}
    assert (await http.get("/runs/r/result")).json()["state"] == "cancelled"
    assert (await http.post("/runs/r/cancel", json={"why": 1})).status_code == 400


async def test_a_failed_run_is_resumed(http: httpx.AsyncClient, worker: Worker) -> None:
    await http.post("/runs", json={"workflow": "fail_once", "id": "r"})
    failed = (await http.get("/runs/r/result", params={"wait": 20})).json()
    assert (failed["state"], failed["error"]) == ("failed", {"type": "ValueError", "message": "not yet"})
    assert (await http.get("/runs/r")).json()["error"] == failed["error"]
    assert (await http.post("/runs/r/resume")).json() == {"id": "r", "resumed": True}
    assert (await http.get("/runs/r/result", params={"wait": 20})).json()["result"] == "done"
    response = await http.post("/runs/r/resume")
    assert (response.status_code, response.json()["code"]) == (400, "invalid_input")


async def test_a_run_is_forked_at_a_step(http: httpx.AsyncClient, worker: Worker) -> None:
    await http.post("/runs", json={"workflow": "add", "args": [1, 2], "id": "r"})
    assert (await http.get("/runs/r/result", params={"wait": 20})).json()["result"] == 3
    forks = [await http.post("/runs/r/fork", json={"step": "plus", "id": "r/again"}) for _ in range(2)]
    assert [fork.status_code for fork in forks] == [201, 200]
    assert forks[0].headers["location"] == "/runs/r/again"
    assert (await http.get("/runs/r/again/result", params={"wait": 20})).json()["result"] == 3
    assert (await http.post("/runs/r/fork", json={"step": "unknown"})).status_code == 400
    assert (await http.post("/runs/r/fork", json={"id": "x"})).status_code == 400


async def test_runs_are_listed_page_by_page(http: httpx.AsyncClient) -> None:
    for number in range(3):
        await http.post("/runs", json={"workflow": f"w{number % 2}", "id": f"r/{number}"})
    first = (await http.get("/runs", params={"limit": 2})).json()
    assert [run["id"] for run in first["runs"]] == ["r/2", "r/1"]
    rest = (await http.get("/runs", params={"limit": 2, "after": first["next"]})).json()
    assert ([run["id"] for run in rest["runs"]], rest["next"]) == (["r/0"], None)
    found = (await http.get("/runs", params={"workflow": "w0", "state": "scheduled"})).json()
    assert [run["id"] for run in found["runs"]] == ["r/2", "r/0"]


async def test_the_last_segment_decides_and_ids_may_have_slashes(http: httpx.AsyncClient) -> None:
    await http.post("/runs", json={"workflow": "ask", "id": "a/signals/b"})
    assert (await http.get("/runs/a/signals/b")).status_code == 200
    assert (await http.get("/runs/a%2Fsignals%2Fb")).status_code == 200
    assert (await http.post("/runs/a%2Fsignals%2Fb/signals", json={"body": 1})).status_code == 201
    assert (await http.get("/runs/a/signals/b/signals")).status_code == 405


@pytest.mark.parametrize("path", ["", "/result", "/journal"])
async def test_a_run_that_does_not_exist_is_not_found(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(f"/runs/nothing{path}")
    assert (response.status_code, response.json()["code"]) == (404, pgchan.RunNotFound.code)
    for last, body in [("signals", {"body": 1}), ("cancel", None), ("resume", None), ("fork", {"step": "s"})]:
        assert (await http.post(f"/runs/nothing/{last}", json=body)).status_code == 404
