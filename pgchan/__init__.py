"""pgchan: durable runs and named, resumable channels on PostgreSQL alone.

    client = pgchan.AsyncClient()                       # or pgchan.Client(), which blocks
    await client.channel("chat/42").publish({"text": "hello"})
    handle = await client.start(research, "tides")      # a function decorated with @pgchan.workflow
    async for message in handle.tail(): ...

The README has the tour; ARCHITECTURE.md tells how it works.
"""

from pgchan.aio import AsyncChannel, AsyncClient, AsyncRunHandle, AsyncTail
from pgchan.errors import (
    ChannelClosed,
    ChannelNotFound,
    Error,
    Fatal,
    Fenced,
    HistoryLost,
    IdempotencyConflict,
    Indefinite,
    Interrupted,
    InvalidInput,
    Reset,
    RetryAfter,
    RunCancelled,
    RunConflict,
    RunFailed,
    RunNotFound,
    SchemaMismatch,
    StepFailed,
    StepMismatch,
    Trimmed,
    Unavailable,
    UnsafeDeployment,
)
from pgchan.model import ChannelInfo, Message, Page, Retry, RunError, RunStatus, WorkerInfo
from pgchan.steps import Child, Run, current_run
from pgchan.sync import Channel, ChannelTail, Client, RunHandle
from pgchan.worker import Worker
from pgchan.workflows import Step, Workflow, step, workflow

__version__ = "0.2.0"

__all__ = [
    "AsyncChannel",
    "AsyncClient",
    "AsyncRunHandle",
    "AsyncTail",
    "Channel",
    "ChannelClosed",
    "ChannelInfo",
    "ChannelNotFound",
    "ChannelTail",
    "Child",
    "Client",
    "Error",
    "Fatal",
    "Fenced",
    "HistoryLost",
    "IdempotencyConflict",
    "Indefinite",
    "Interrupted",
    "InvalidInput",
    "Message",
    "Page",
    "Reset",
    "Retry",
    "RetryAfter",
    "Run",
    "RunCancelled",
    "RunConflict",
    "RunError",
    "RunFailed",
    "RunHandle",
    "RunNotFound",
    "RunStatus",
    "SchemaMismatch",
    "Step",
    "StepFailed",
    "StepMismatch",
    "Trimmed",
    "Unavailable",
    "UnsafeDeployment",
    "Worker",
    "WorkerInfo",
    "Workflow",
    "current_run",
    "step",
    "workflow",
]
