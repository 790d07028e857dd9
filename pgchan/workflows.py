"""Workflows and steps as their author declares them, and the arguments that go in.

Arguments are JSON, stored as one object {"args": […], "kwargs": {…}} and converted to the function's annotations when
it is called: by the worker, and by `start` as well if it is given the function, so that what does not fit fails at
the caller.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import cached_property, partial, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar, overload

import pydantic

from pgchan import codec, names
from pgchan.errors import InvalidInput
from pgchan.model import Retry

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_QUEUE = "default"


class Workflow(Generic[P, R]):
    """A function that runs can execute, as `@pgchan.workflow` makes it. Calling it calls the function, as in a test.

    name: what runs are started by, unique among a worker's workflows. version: stored with its runs.
    retry: default for its steps. timeout: seconds from start to end of a run. queue: where its runs wait.
    """

    def __init__(
        self, fn: Callable[P, R], *, name: str | None = None, version: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, queue: str = DEFAULT_QUEUE,
    ) -> None:  # fmt: skip
        self.fn = fn
        self.name = names.check_label(name if name is not None else fn.__name__, "workflow name")
        self.version = None if version is None else names.check_label(version, "workflow version")
        self.retry = check_retry(retry)
        self.timeout = names.check_optional_seconds(timeout, "timeout", 0.001)
        self.queue = names.check_label(queue, "queue")
        self.is_async = inspect.iscoroutinefunction(fn)
        parameters = list(inspect.signature(fn).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        ):  # fmt: skip
            raise InvalidInput(f"workflow {self.name!r} must take the run as its first parameter: def f(run, …)")
        update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name}>"

    @cached_property
    def _signature(self) -> inspect.Signature:
        signature = inspect.signature(self.fn)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @cached_property
    def _converters(self) -> dict[str, pydantic.TypeAdapter[Any]]:
        try:
            hints = typing.get_type_hints(self.fn, include_extras=True)
        except NameError:  # an annotation of a name that exists for type checkers only
            return {}
        return {
            name: pydantic.TypeAdapter(hint)
            for name, hint in hints.items()
            if name in self._signature.parameters and hint is not Any
        }

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """JSON arguments as the function wants them. Raises InvalidInput where they do not fit."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(f"arguments of workflow {self.name!r}: {codec.place(str(error))}") from None
        for name, value in bound.arguments.items():
            converter = self._converters.get(name)
            if converter is None:
                continue
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(self._convert(converter, name, one) for one in value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._convert(converter, name, one) for key, one in value.items()}
            else:
                bound.arguments[name] = self._convert(converter, name, value)
        return bound

    def _convert(self, converter: pydantic.TypeAdapter[Any], name: str, value: Any) -> Any:
        try:
            return converter.validate_python(value)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = codec.place(".".join([name, *map(str, first["loc"])]))
            raise InvalidInput(f"argument {place!r} of workflow {self.name!r}: {first['msg']}") from None


@overload
def workflow(fn: Callable[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *, name: str | None = None, version: str | None = None, retry: Retry | None = None, timeout: float | None = None,
    queue: str = DEFAULT_QUEUE,
) -> Callable[[Callable[P, R]], Workflow[P, R]]: ...  # fmt: skip
def workflow(fn: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Declare a workflow: a function whose first parameter is the run; `async def` or `def`.

    name: default the function's. version: stored with its runs. retry: default of its steps. timeout: seconds a run may
    take from its start. queue: where its runs wait, default "default".

        @pgchan.workflow
        async def research(run: pgchan.Run, topic: str) -> str: …
    """
    return Workflow(fn, **options) if fn is not None else partial(Workflow, **options)


class Step(Generic[P, R]):
    """A function with defaults for how it is tried as a step, as `@pgchan.step` makes it. Calling it calls it."""

    def __init__(
        self, fn: Callable[P, R], *, name: str | None = None, retry: Retry | None = None,
        timeout: float | None = None, interruptible: bool = False,
    ) -> None:  # fmt: skip
        self.fn = fn
        self.name = names.check_label(name if name is not None else fn.__name__, "step name")
        self.retry = check_retry(retry)
        self.timeout = names.check_optional_seconds(timeout, "timeout", 0.001)
        self.interruptible = interruptible
        update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<step {self.name}>"


@overload
def step(fn: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    *, name: str | None = None, retry: Retry | None = None, timeout: float | None = None, interruptible: bool = False
) -> Callable[[Callable[P, R]], Step[P, R]]: ...
def step(fn: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Give a function its defaults as a step; the arguments of `run.step` override them."""
    return Step(fn, **options) if fn is not None else partial(Step, **options)


def check_retry(retry: object) -> Retry | None:
    """None, or a Retry."""
    if retry is not None and not isinstance(retry, Retry):
        raise InvalidInput(f"retry must be a pgchan.Retry, not {type(retry).__name__}")
    return retry


def encode_input(target: Workflow[Any, Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The stored form of a run's arguments; checked against the function if it is known."""
    raw = codec.encode({"args": list(args), "kwargs": kwargs}, "arguments")
    if isinstance(target, Workflow):
        target.bind(list(args), kwargs)
    return raw


def workflow_name(target: Workflow[Any, Any] | str | Callable[..., Any]) -> str:
    """The name that a workflow, given as such or by name, is started by."""
    if isinstance(target, Workflow):
        return target.name
    if isinstance(target, str):
        return names.check_label(target, "workflow")
    raise InvalidInput(f"workflow must be a function decorated with @pgchan.workflow, or a name, not {target!r:.80}")
