"""`python -m eventstore`: look into the log (`tail`, `stat`), and the commands of `operations`."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Never

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eventstore.connect import DEFAULT_URL, Nats
from eventstore.errors import EventStoreError, LogGap, LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.operations import (
    OPERATIONS,
    Refused,
    add_commands,
    needs_server,
    verify_file,
)
from eventstore.process_settings import NAMESPACE_DEFAULT, AccessSettings, nats_servers
from eventstore.settings import SettingsError, declarations, parse
from eventstore.show import Selection, check_pattern
from eventstore.snapshots import SnapshotStore
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.stat import as_json, as_table, list_snapshots, snapshots_table, tally
from eventstore.subjects import check_namespace
from eventstore.tail import Printer, Range, tail

CONNECT_WAIT_S = 5.0
PIPED_WIDTH = 160
INTERRUPTED = 130
"""The exit code that shells give to what Ctrl-C ended."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])\Z")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.exit(2, f"Error: {message}\nTry: {self.prog} --help\n")


class _PassOn(argparse.Action):
    """Collects flags and their values for `eventstore.settings`, which reads them."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, value: object, flag: object = None
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), flag, value])


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 130 interrupted (2, misused, exits
    by itself)."""
    top = parser(environ, time.time_ns())
    options = top.parse_args(argv)
    try:
        options.access = parse(AccessSettings, options.access, environ)
    except SettingsError as error:
        top.error(str(error))
    try:
        if not needs_server(options):
            return verify_file(options)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        # To end a `tail` is no failure; anything else is not done.
        return 0 if options.command == "tail" else INTERRUPTED
    except BrokenPipeError:
        # Whoever read the lines has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EventStoreError as error:
        print(f"Error: {error}\nTry: {_advice(error)}", file=sys.stderr)
        return 1


def _advice(error: EventStoreError) -> str:
    if isinstance(error, Refused):
        return error.advice
    if isinstance(error, LogGap):
        return f"--from-seq {error.got}"
    if isinstance(error, LogUnavailable) and error.try_this:
        return error.try_this
    return "again, once the NATS server is well"


async def run(options: argparse.Namespace) -> int:
    """Do what is asked for; SIGTERM ends it as Ctrl-C does, between two steps. The exit code."""
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with connected(options) as nats:
        if options.command in OPERATIONS:
            return await OPERATIONS[options.command](nats, options)
        log = await JetStreamLog.open(nats, options.namespace, create=False)
        try:
            if options.command == "tail":
                await run_tail(log, options)
            else:
                await run_stat(log, NatsSnapshots(nats, options.namespace), options)
        finally:
            await log.close()
    return 0


@contextlib.asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[Nats]:
    nats = await Nats.connect(
        options.nats_url,
        name="reckon eventstore",
        access=options.access.access(),
        wait_s=CONNECT_WAIT_S,
    )
    try:
        yield nats
    finally:
        await nats.close()


async def run_tail(log: JetStreamLog, options: argparse.Namespace) -> None:
    within = Range(options.from_seq, options.to_seq, options.since, options.until)
    selection = Selection(options.subject, options.request, options.worker)

    def write(line: str) -> None:
        sys.stdout.write(line)
        if options.follow:
            sys.stdout.flush()

    printer = Printer(write, selection, within, as_json=options.json, limit=options.limit)
    await tail(log, printer, within, follow=options.follow)
    sys.stdout.flush()


async def run_stat(log: JetStreamLog, store: SnapshotStore, options: argparse.Namespace) -> None:
    extent = await log.extent()
    bar = Progress(
        *(TextColumn("reading the log"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("read", total=extent.last_seq - extent.first_seq + 1)
        result = await tally(
            log,
            extent,
            lambda seq: bar.update(task, completed=seq - extent.first_seq + 1),
        )
    snapshots = await list_snapshots(store, extent)
    if options.json:
        told = as_json(options.namespace, extent, result) | {"snapshots": snapshots}
        print(json.dumps(told))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = PIPED_WIDTH
        console.print(as_table(options.namespace, extent, result))
        if snapshots:
            console.print(snapshots_table(snapshots))
    sys.stdout.flush()


def parser(environ: Mapping[str, str], now_ns: int) -> Parser:
    """The command line. now_ns: what the ages in --since and --until count back from."""

    def moment(text: str) -> int:
        return parse_moment(text, now_ns)

    common = Parser(add_help=False)
    common.add_argument(
        "--nats-url",
        type=_nats_servers,
        default=environ.get("NATS_SERVER") or DEFAULT_URL,
        metavar="URL",
        help=f"NATS server, or several with commas between (env NATS_SERVER; {DEFAULT_URL})",
    )
    common.add_argument(
        "--namespace",
        type=_namespace,
        default=environ.get("DYN_NAMESPACE") or NAMESPACE_DEFAULT,
        help=f"whose log (env DYN_NAMESPACE; {NAMESPACE_DEFAULT})",
    )
    for each in declarations(AccessSettings):
        if each.flag:
            common.add_argument(
                each.flag,
                dest="access",
                action=_PassOn,
                default=[],
                metavar="TEXT" if each.kind is str else "FILE",
                help=f"{each.option.help} (env {each.variables[0]})".replace("%", "%%"),
            )
    common.add_argument("--json", action="store_true", help="JSON instead of text")

    top = Parser(
        prog="python -m eventstore",
        description="Look into the log of a namespace, and look after it.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser(
        "tail",
        parents=[common],
        help="print the events, one a line",
        description="Print the events of the log from its beginning, one a line: seq, time (UTC), "
        "producer, tag and fields. Lists are shown by their length and first item.",
    )
    show.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    show.add_argument(
        "--subject",
        type=_pattern,
        metavar="PATTERN",
        help="NATS pattern for the part behind the namespace, such as 'request.*' or 'kv.>'",
    )
    show.add_argument("--request", metavar="ID", help="events of this request")
    show.add_argument(
        "--worker",
        type=parse_worker,
        metavar="ID",
        help="events that name this worker: its 16 hex digits, 0x…, or a decimal number",
    )
    show.add_argument("--from-seq", type=_positive, metavar="N", help="begin with this record")
    show.add_argument("--to-seq", type=_positive, metavar="N", help="end with this record")
    show.add_argument(
        "--since", type=moment, metavar="TIME", help="an ISO time (UTC unless it says), or 90s, 10m"
    )
    show.add_argument("--until", type=moment, metavar="TIME", help="likewise")
    show.add_argument("--limit", type=_positive, metavar="N", help="at most so many events")
    commands.add_parser(
        "stat",
        parents=[common],
        help="count the events by kind",
        description="Read the whole log and count its events, messages and bytes by kind, and list "
        "the snapshots.",
    )
    add_commands(commands, common)
    return top


def parse_moment(text: str, now_ns: int) -> int:
    """UTC nanoseconds of an ISO time, or of an age such as 90s, 10m, 2h, 1d before `now_ns`."""
    if age := _AGE.match(text):
        return now_ns - round(float(age[1]) * _UNIT_S[age[2]] * 1e9)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time such as 2026-01-31T12:00:00Z nor an age such as 10m"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def parse_worker(text: str) -> int:
    """A worker id as lines show it (16 hex digits), as 0x…, or as a decimal number."""
    try:
        decimal = text.isdecimal() and len(text) != 16
        number = int(text, 10 if decimal else 16)
    except ValueError:
        number = -1
    if not 0 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a worker's id")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _pattern(text: str) -> str:
    try:
        return check_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _namespace(text: str) -> str:
    try:
        return check_namespace(text)
    except EventStoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _nats_servers(text: str) -> tuple[str, ...]:
    try:
        return nats_servers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
