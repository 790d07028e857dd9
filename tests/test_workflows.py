"""What may be declared as a workflow or a step, and how arguments that are JSON become those of the function."""

from __future__ import annotations

import dataclasses
import uuid
from datetime import UTC, date, datetime
from typing import Annotated, Any

import pydantic
import pytest

import pgchan
from pgchan import InvalidInput
from pgchan.workflows import Step, Workflow, encode_input, workflow_name


@dataclasses.dataclass
class Order:
    id: uuid.UUID
    amount: float


class Model(pydantic.BaseModel):
    day: date


def bound(fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments that the function is called with, behind the run."""
    return dict(pgchan.workflow(fn).bind(list(args), kwargs).arguments)


def test_a_workflow_is_named_after_its_function_and_calls_it() -> None:
    @pgchan.workflow
    async def research(run: pgchan.Run, topic: str) -> str:
        """Finds out."""
        return topic

    assert isinstance(research, Workflow)
    assert (research.name, research.queue, research.is_async) == ("research", "default", True)
    assert research.__doc__ == "Finds out."
    coroutine = research(None, "x")  # type: ignore[arg-type]
    coroutine.close()


def test_a_workflow_takes_its_options_from_the_decorator() -> None:
    retry = pgchan.Retry(attempts=2)

    @pgchan.workflow(name="other", version="2", retry=retry, timeout=5, queue="gpu")
    def blocking(run: Any) -> None: ...

    assert (blocking.name, blocking.version, blocking.retry, blocking.timeout, blocking.queue, blocking.is_async) == (
        "other", "2", retry, 5.0, "gpu", False,
    )  # fmt: skip


def test_a_step_takes_its_defaults_from_the_decorator_and_can_be_called() -> None:
    @pgchan.step(retry=pgchan.Retry(attempts=2), timeout=1, interruptible=True, name="half")
    def halve(n: int) -> float:
        return n / 2

    assert isinstance(halve, Step)
    assert (halve.name, halve.timeout, halve.interruptible, halve(3)) == ("half", 1.0, True, 1.5)


def test_a_workflow_must_take_the_run_first() -> None:
    with pytest.raises(InvalidInput, match="must take the run as its first parameter"):
        pgchan.workflow(lambda: None)
    with pytest.raises(InvalidInput, match="must take the run as its first parameter"):

        @pgchan.workflow
        async def fn(*, run: Any) -> None: ...


def test_what_is_neither_a_workflow_nor_a_name_cannot_be_started() -> None:
    async def plain(run: Any) -> None: ...

    for target in (plain, None, 7, ""):
        with pytest.raises(InvalidInput):
            workflow_name(target)  # type: ignore[arg-type]


def test_json_arguments_become_what_the_annotations_say() -> None:
    async def fn(  # type: ignore[no-untyped-def]
        run: Any, order: Order, model: Model, at: datetime, many: list[Order], plain, anything: Any
    ) -> None: ...  # fmt: skip

    id = uuid.uuid4()
    order = {"id": str(id), "amount": 1}
    found = bound(fn, order, {"day": "2024-05-06"}, "2024-05-06T07:08:09Z", [order], {"a": 1}, many_things := [1])
    assert found["order"] == Order(id, 1.0) and found["many"] == [Order(id, 1.0)]
    assert found["model"] == Model(day=date(2024, 5, 6))
    assert found["at"] == datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    assert (found["plain"], found["anything"]) == ({"a": 1}, many_things)


def test_variable_and_keyword_arguments_are_converted_one_by_one() -> None:
    async def fn(run: Any, *days: date, limit: Annotated[int, pydantic.Field(ge=1)] = 3, **more: date) -> None: ...

    assert bound(fn, "2024-05-06", limit=5, last="2024-05-07") == {
        "days": (date(2024, 5, 6),), "limit": 5, "more": {"last": date(2024, 5, 7)},
    }  # fmt: skip


def test_an_argument_that_does_not_fit_is_named_with_its_place() -> None:
    async def fn(run: Any, orders: list[Order], limit: Annotated[int, pydantic.Field(ge=1)] = 3) -> None: ...

    with pytest.raises(InvalidInput, match=r"argument 'orders\.0\.id' of workflow 'fn'"):
        bound(fn, [{"id": "no uuid", "amount": 1}])
    with pytest.raises(InvalidInput, match="argument 'limit' of workflow 'fn'"):
        bound(fn, [], limit=0)


def test_missing_and_surplus_arguments_are_refused() -> None:
    async def fn(run: Any, topic: str) -> None: ...

    for args, kwargs in (((), {}), (("a", "b"), {}), (("a",), {"more": 1})):
        with pytest.raises(InvalidInput, match="arguments of workflow 'fn'"):
            bound(fn, *args, **kwargs)


def test_arguments_are_checked_against_the_function_where_it_is_known() -> None:
    @pgchan.workflow
    async def fn(run: Any, n: int) -> None: ...

    with pytest.raises(InvalidInput, match="argument 'n'"):
        encode_input(fn, ("seven",), {})
    assert encode_input("fn", ("seven",), {}) == b'{"args":["seven"],"kwargs":{}}'


def test_arguments_that_are_not_json_are_refused() -> None:
    @pgchan.workflow
    async def fn(run: Any, what: Any) -> None: ...

    for value in (object(), {1, 2}, b"x", float("nan"), {1: 2}, "\ud800"):
        with pytest.raises(InvalidInput, match="arguments"):
            encode_input(fn, (value,), {})


def test_an_annotation_that_only_type_checkers_know_converts_nothing() -> None:
    async def fn(run: Any, n: NoSuchName) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert bound(fn, "7") == {"n": "7"}


def test_two_workflows_of_a_worker_cannot_share_a_name() -> None:
    @pgchan.workflow(name="same")
    async def one(run: Any) -> None: ...

    @pgchan.workflow(name="same")
    async def two(run: Any) -> None: ...

    client = pgchan.AsyncClient("postgresql://localhost/nothing")
    with pytest.raises(InvalidInput, match="two workflows are named 'same'"):
        pgchan.Worker(client, [one, two])
    with pytest.raises(InvalidInput, match="decorated with @pgchan"):
        pgchan.Worker(client, [test_two_workflows_of_a_worker_cannot_share_a_name])  # type: ignore[list-item]


def test_a_retry_waits_longer_each_time_up_to_its_bound() -> None:
    retry = pgchan.Retry(attempts=10, delay=1, backoff=2, max_delay=5)
    assert [retry.seconds(n) for n in (1, 2, 3, 4, 2000)] == [1, 2, 4, 5, 5]
