"""The commands. They print and decide nothing: each is a call of the public API. Long, for there are many.

Exit status: 0 done · 1 refused, failed or not found · 2 the input is wrong. An error is one line on stderr, without
traceback, SQL or DSN; PGCHAN_DEBUG=1 shows the traceback of a fault in pgchan itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgchan import console
from pgchan.errors import Error, InvalidInput, SchemaMismatch

if TYPE_CHECKING:
    from pgchan.sync import Client

Command = TypeVar("Command", bound=Callable[..., Any])

PATIENCE_SECONDS = 5.0  # a person at a terminal wants to know sooner than a program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (else those of the process) name, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a terminal that knows no UTF-8 must not stop us
    logging.getLogger("pgchan").addHandler(logging.NullHandler())  # an error is one line; `worker` and `serve` say more
    try:
        # Not click's own main(): that has other ideas about exit statuses and closed pipes.
        with commands.make_context("pgchan", list(sys.argv[1:] if arguments is None else arguments)) as context:
            commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as left:
        return left.exit_code
    except click.ClickException as error:
        return _say(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader, `head` for one, has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InvalidInput, SchemaMismatch) as error:
        return _say(str(error), 2)
    except (Error, TimeoutError) as error:
        return _say(str(error) or "timed out", 1)
    except Exception as error:
        # Whatever it is, its text may hold what nobody should read: SQL, a body, a DSN.
        if os.environ.get("PGCHAN_DEBUG"):
            raise
        return _say(f"{type(error).__name__} inside pgchan; PGCHAN_DEBUG=1 shows where", 1)
    return 0


def _say(message: str, status: int) -> int:
    print(f"pgchan: {console.printable(' '.join(message.split()))}", file=sys.stderr)
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pgchan", message="%(version)s")
def commands() -> None:
    """Durable execution and durable named channels on PostgreSQL.

    The database is --dsn, else $PGCHAN_DSN, else $DATABASE_URL. Bodies are JSON.
    """


def _with_dsn(command: Command) -> Command:
    return click.option("--dsn", metavar="URL", help="The database; else $PGCHAN_DSN, else $DATABASE_URL.")(command)


def _with_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")(command)


# ---- programs


@commands.command()
@click.option("--dsn", metavar="URL", help="The database to use, and to migrate; an embedded one else.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0, 64), help="Worker processes.")
@click.option("--data", metavar="DIRECTORY", help="Where the embedded PostgreSQL keeps its data; ./.pgchan else.")
def demo(dsn: str | None, port: int, workers: int, data: str | None) -> None:
    """Run the whole system to look at: PostgreSQL, server, workers and a page with buttons."""
    program = console.load_extra("pgchan.demo", "demo")
    raise click.exceptions.Exit(program.main(port=port, dsn=dsn, workers=workers, data=data))


@commands.command()
@click.argument("target", metavar="MODULE:ATTRIBUTE")
@click.option("--workers", type=click.IntRange(0, 64), help="Worker processes; 1 for a worker, 0 for an app.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--insecure", is_flag=True, help="Let everybody do everything; on a loopback address only.")
def serve(target: str, workers: int | None, host: str, port: int, insecure: bool) -> None:
    """Serve HTTP, from an ASGI app or for a worker's client, with worker processes beside it."""
    console.load_extra("pgchan.server", "server")
    from pgchan import Worker
    from pgchan import serve as program

    found = console.load(target)
    if workers is None:
        workers = 1 if isinstance(found, Worker) else 0
    status = program.main(found, target, host=host, port=port, workers=workers, insecure=insecure)
    raise click.exceptions.Exit(status)


@commands.command()
@click.argument("target", metavar="MODULE:WORKER")
def worker(target: str) -> None:
    """Run a worker until SIGTERM or SIGINT; what it holds then is finished or handed back."""
    from pgchan import Worker

    found = console.load(target)
    if not isinstance(found, Worker):
        raise InvalidInput(f"{target!r} is a {type(found).__name__}; name a pgchan.Worker, as module:attribute")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    console.spare_collector()
    asyncio.run(found.run())


@commands.command()
@_with_dsn
@click.argument("revision", default="head")
@click.option("--yes", is_flag=True, help="Go down to an older revision without asking, though data is lost.")
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL and run nothing; needs no database.")
@click.option("--start", metavar="REVISION", help="With --sql: the revision to begin at; the empty database else.")
@click.option("--current", is_flag=True, help="Print the database's revision and change nothing.")
def migrate(dsn: str | None, revision: str, yes: bool, as_sql: bool, start: str | None, current: bool) -> None:
    """Bring the database to REVISION, the newest one by default, and print it. "base" removes pgchan's tables."""
    from pgchan import migrate as program

    if as_sql:
        program.print_sql(sys.stdout, revision, start=start or "base")
        return
    if start is not None:
        raise InvalidInput("--start is for --sql; otherwise the database knows where it stands")
    logging.basicConfig(level=logging.WARNING, format="pgchan: %(message)s")  # whom it waits for, if it has to
    if current:
        reached = program.current(dsn)
    elif program.leads_down(dsn, revision):
        if not yes and program.holds_data(dsn):
            _confirm("This removes channels, messages and runs. Go on?")
        reached = program.downgrade(dsn, revision)
    else:
        reached = program.upgrade(dsn, revision)
    print(reached or "base")


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise Error("refused: the database holds data; say --yes to lose it")
    if not click.confirm(question, err=True):
        raise Error("nothing was changed")


@commands.command()
@_with_dsn
@_with_json
def doctor(dsn: str | None, as_json: bool) -> None:
    """Tell whether this server, pooler and role are fit to run on, and what to change. Status 1 if they are not."""
    from pgchan.doctor import check

    findings = asyncio.run(check(dsn))
    if as_json:
        console.print_rows(findings, as_json)
    else:  # in full: the end of a line is what to do
        for finding in findings:
            click.echo(f"{'fine' if finding.is_fine else 'NOT FINE'}\t{finding.check}: {finding.detail}")
    if not all(finding.is_fine for finding in findings):
        raise click.exceptions.Exit(1)


@commands.command()
@_with_dsn
@_with_json
@click.option("--undo", is_flag=True, help="Give everybody the functions back.")
@click.option("--dry-run", is_flag=True, help="Print the statements and run none.")
def harden(dsn: str | None, as_json: bool, undo: bool, dry_run: bool) -> None:
    """Let advisory locks and pg_notify() be used through pgchan only, in this database. Takes a superuser.

    Without it another role can hold the locks of workers and keep new ones from starting. Prints the statements that it
    ran, as SQL. Running it again does nothing.
    """
    from pgchan import harden as program

    statements = program.harden(dsn, undo=undo, dry_run=dry_run)
    if as_json:
        console.print_rows([{"statement": statement, "done": not dry_run} for statement in statements], as_json)
        return
    for statement in statements or ["-- nothing to change"]:
        click.echo(statement + ";" * (not statement.startswith("--")))
    for note in () if undo else program.NOTES:
        click.echo(f"-- {note}")


@commands.command()
@_with_dsn
@click.argument("questions", metavar="[QUESTION]...", nargs=-1)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 100), help="More are more exact.")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(dir_okay=False), help="Write the tables there.")
def bench(dsn: str | None, questions: tuple[str, ...], rounds: int, json_path: str | None) -> None:
    """Measure pgchan on this server, beside the least that has the same durable effect. Takes a minute or two.

    Runs in databases of its own that it makes and drops, so the role must be allowed to create databases. QUESTION is
    one of floors, latency and steps, which are the default, cost and notify (which take a superuser), growth, peers,
    soak, sse, start, takeover and tokens.
    """
    from pgchan import bench as program

    if unknown := [question for question in questions if question not in program.QUESTIONS]:
        raise InvalidInput(f"no benchmark is called {unknown[0]!r}; there are {', '.join(program.QUESTIONS)}")
    if "sse" in questions:
        console.load_extra("pgchan.server", "server")
    raise click.exceptions.Exit(program.main(questions, dsn=dsn, rounds=rounds, json_path=json_path))


# ---- channels


@commands.command()
@_with_dsn
@_with_json
@click.argument("channel")
@click.option("--after", default="0", metavar="POSITION", help='A position, a cursor, or "now".')
@click.option("--view", default="final", type=click.Choice(["final", "raw"]), help="raw: with void output.")
def tail(dsn: str | None, as_json: bool, channel: str, after: str, view: str) -> None:
    """Print a channel's messages, then wait for more, until it is closed: position, kind and body."""
    with _client(dsn) as client:
        for message in client.channel(channel).tail(after=console.parse_after(after), view=view):
            if as_json:
                print(message.to_json().decode(), flush=True)
            else:
                print(f"{message.position}\t{message.kind}\t{console.one_line(message.body)}", flush=True)


@commands.command()
@_with_dsn
@_with_json
@click.argument("channel")
@click.argument("body", default="-")
@click.option("--key", help="Stored once: publishing the same key again stores nothing.")
@click.option("--text", is_flag=True, help="BODY, or each line, is text and not JSON.")
def publish(dsn: str | None, as_json: bool, channel: str, body: str, key: str | None, text: bool) -> None:
    """Publish BODY and print its position; "-" or nothing: one message for each line of the standard input."""
    if body == "-" and key is not None:
        raise InvalidInput("--key names one message; give its BODY as an argument")
    bodies = console.read_bodies(sys.stdin.buffer, text) if body == "-" else [console.parse_body(body, text)]
    with _client(dsn) as client:
        bound = client.channel(channel)
        for value in bodies:
            message = bound.publish(value, key=key)
            print(message.to_json().decode() if as_json else message.position, flush=True)


@commands.command()
@_with_dsn
@click.argument("channel")
def compact(dsn: str | None, channel: str) -> None:
    """Rewrite a closed CHANNEL, or that of an ended run, as its final text; print how many messages that saves."""
    with _client(dsn) as client:
        print(client.channel(channel).compact())


@commands.command()
@_with_dsn
@_with_json
@click.option("--prefix", default="", help="Only channels whose name begins with it.")
@click.option("--after", default="", metavar="NAME", help="Only channels that come after this name.")
@click.option("--limit", default=100, show_default=True, type=int)
def channels(dsn: str | None, as_json: bool, prefix: str, after: str, limit: int) -> None:
    """List channels by name."""
    with _client(dsn) as client:
        console.print_rows(client.channels(prefix=prefix, after=after, limit=limit), as_json)


# ---- runs


@commands.command()
@_with_dsn
@_with_json
@click.argument("workflow")
@click.argument("arguments", metavar="[ARGS]", default="[]")
@click.option("--id", "run", help="The run's id; starting it again is the same run.")
@click.option("--queue")
@click.option("--priority", default=0, type=int, help="Higher goes first.")
@click.option("--delay", type=float, metavar="SECONDS", help="Start so much later.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Fail the run if it has not ended by then.")
def start(
    dsn: str | None, as_json: bool, workflow: str, arguments: str, run: str | None, queue: str | None,
    priority: int, delay: float | None, timeout: float | None,
) -> None:  # fmt: skip
    """Start a run of WORKFLOW and print its id. ARGS is a JSON array: '["a topic", 3]'."""
    values = console.parse_body(arguments, text=False)
    if not isinstance(values, list):
        raise InvalidInput("ARGS must be a JSON array of the workflow's arguments, like '[\"a topic\", 3]'")
    with _client(dsn) as client:
        handle = client.start(
            workflow, *values, id=run, queue=queue, priority=priority, delay=delay, timeout=timeout
        )
        print(console.to_json(handle.status()) if as_json else handle.id)


@commands.command()
@_with_dsn
@_with_json
@click.argument("run")
@click.argument("body")
@click.option("--key", help="Stored once: the same key again sends nothing.")
@click.option("--text", is_flag=True, help="BODY is text and not JSON.")
def signal(dsn: str | None, as_json: bool, run: str, body: str, key: str | None, text: bool) -> None:
    """Send BODY to a run and print its position."""
    value = console.parse_body(body, text)
    with _client(dsn) as client:
        message = client.run(run).signal(value, key=key)
        print(message.to_json().decode() if as_json else message.position)


@commands.command()
@_with_dsn
@click.argument("run")
def cancel(dsn: str | None, run: str) -> None:
    """Cancel a run: nothing more is recorded for it."""
    with _client(dsn) as client:
        if not client.run(run).cancel():
            raise Error(f"run {run!r} has ended already")
        print("cancelled")


@commands.command()
@_with_dsn
@click.argument("run")
def resume(dsn: str | None, run: str) -> None:
    """Put a failed run back into its queue, to go on from its journal."""
    with _client(dsn) as client:
        client.run(run).resume()
        print("resumed")


@commands.command()
@_with_dsn
@_with_json
@click.option("--state", help="scheduled, running, waiting, succeeded, failed or cancelled.")
@click.option("--workflow")
@click.option("--queue")
@click.option("--limit", default=100, show_default=True, type=int)
def runs(
    dsn: str | None, as_json: bool, state: str | None, workflow: str | None, queue: str | None, limit: int
) -> None:
    """List runs, the newest first."""
    with _client(dsn) as client:
        found = client.runs(state=state, workflow=workflow, queue=queue, limit=limit)
        columns = ("id", "workflow", "queue", "state", "attempt", "worker", "step", "created_at")
        console.print_rows(found, as_json, columns)


@commands.command()
@_with_dsn
@_with_json
@click.argument("run")
def show(dsn: str | None, as_json: bool, run: str) -> None:
    """Show a run and its steps as a timeline."""
    with _client(dsn) as client:
        handle = client.run(run)
        status, journal = handle.status(), handle.journal()
    if as_json:
        print(console.to_json({"run": status, "journal": [json.loads(message.to_json()) for message in journal]}))
        return
    for name, value in console.fields_of(status).items():
        if value is not None:
            print(f"{name:<12}{console.cell(value)}")
    print()
    console.print_rows(_timeline(journal, status.started_at), False)


def _timeline(journal: Iterable[Any], started_at: datetime | None) -> Iterator[dict[str, Any]]:
    """A row for each entry of the journal: when, how long after the run's start, and what was recorded."""
    for message in journal:
        since = (message.at - started_at).total_seconds() if started_at else 0.0
        yield {
            "at": message.at, "seconds": f"{since:.3f}", "step": message.key or message.step,
            "attempt": message.attempt, "kind": message.kind, "recorded": message.body,
        }  # fmt: skip


def _client(dsn: str | None) -> contextlib.closing[Client]:
    """A client that connects on first use, so that what is wrong with the input is said first."""
    from pgchan import Client

    return contextlib.closing(Client(dsn, timeout=PATIENCE_SECONDS))


if __name__ == "__main__":
    sys.exit(main())
