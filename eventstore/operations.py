"""The commands of `python -m eventstore` that change the log, move it or check it.

`verify` and `snapshot` need the fold, which is the router's. The router is built on this package
and not the other way round, so their functions are looked up by name when they are asked for: the
one place where that direction is turned.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eventstore.archive import ArchiveReader, BadArchive, check_archive
from eventstore.claims import SNAPSHOT_CLAIM, ClaimTaken
from eventstore.claims_nats import NatsClaims
from eventstore.connect import Nats
from eventstore.control import record_reset
from eventstore.errors import EventStoreError, LogGap
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog, Extent
from eventstore.marks import cut_at
from eventstore.marks_nats import NatsMarks
from eventstore.snapshots import (
    KEPT_DEFAULT,
    KEPT_MIN,
    BadSnapshot,
    SnapshotGone,
    SnapshotStore,
    check_body,
    read_snapshot,
    trim_before,
    unusable,
)
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.transfer import (
    ImportStopped,
    NotEmpty,
    Transferred,
    export_log,
    import_archive,
)

FOLD_TOOLS = "router.tools"
ACCEPT_LOSS = "python -m eventstore snapshot --accept-loss, which goes on with what is left"


class Refused(EventStoreError):
    """The command would do harm, or needs a word more. advice: what to try."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why, advice)
        self.why = why
        self.advice = advice

    def __str__(self) -> str:
        return self.why


Operation = Callable[[Nats, argparse.Namespace], Awaitable[int]]
"""Does a command and prints what came of it; returns the exit code."""


# --- the command line -----------------------------------------------------------------------------


def add_commands(
    commands: "argparse._SubParsersAction[Any]", common: argparse.ArgumentParser
) -> None:
    """common: the options that every command has."""

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], help=summary, description=description
        )
        return added

    verify = add(
        "verify",
        "fold the log again and compare",
        "Fold the log again, from its beginning and from each snapshot, and compare the digests; "
        "list gaps and records that cannot be read. Exit code 1 if anything is wrong.",
    )
    verify.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="an archive, instead of the log"
    )
    snapshot = add(
        "snapshot",
        "take a snapshot now",
        "Take a snapshot of the log as it is now, and trim the log to the oldest one kept.",
    )
    snapshot.add_argument(
        "--kept",
        type=_at_least(KEPT_MIN),
        default=KEPT_DEFAULT,
        metavar="N",
        help=f"snapshots that stay ({KEPT_DEFAULT})",
    )
    snapshot.add_argument(
        "--accept-loss",
        action="store_true",
        help="where records are lost, at the log's beginning or within it: go on with what is left",
    )
    trim = add(
        "trim",
        "remove records that a snapshot stands for",
        "Remove the records before the oldest snapshot, of at least two.",
    )
    trim.add_argument(
        "--before",
        type=_at_least(1),
        metavar="SEQ",
        help="remove those before SEQ, as far as a snapshot that can be read stands for them",
    )
    reset = add(
        "reset",
        "empty the state of every replica",
        "Append state.reset: every replica empties its state there, and workers announce their "
        "caches again. The records before it stay.",
    )
    reset.add_argument("--reason", default="operator", help="goes into the log (operator)")
    reset.add_argument("--yes", action="store_true", help="do it")
    export = add(
        "export",
        "write the log to a file",
        "Write the newest snapshot, or the log's beginning, and all records after it to one file.",
    )
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument(
        "--whole", action="store_true", help="begin with the oldest snapshot, or record 1"
    )
    load = add(
        "import",
        "make a log from such a file",
        "Make the log of a namespace that has none from an archive. Order and numbers of the "
        "records stay; their times, and so what ends by the clock, are new.",
    )
    load.add_argument("file", type=Path, metavar="FILE")


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
        return int(text)

    return read


def needs_server(options: argparse.Namespace) -> bool:
    return not (options.command == "verify" and options.file is not None)


# --- commands -------------------------------------------------------------------------------------


async def run_verify(nats: Nats, options: argparse.Namespace) -> int:
    tools = importlib.import_module(FOLD_TOOLS)
    async with _opened(nats, options) as (log, store):
        with _bar("folding") as progress:
            verdict = await tools.verify(log, store, progress)
    return _tell_verdict(verdict, options)


def verify_file(options: argparse.Namespace) -> int:
    """`verify FILE`, for which no server is needed."""
    tools = importlib.import_module(FOLD_TOOLS)
    with _bar("folding") as progress, _files():
        verdict = tools.verify_archive(options.file, progress)
    return _tell_verdict(verdict, options)


async def run_snapshot(nats: Nats, options: argparse.Namespace) -> int:
    tools = importlib.import_module(FOLD_TOOLS)
    async with _opened(nats, options) as (log, store):
        claims = NatsClaims(nats, options.namespace, SNAPSHOT_CLAIM)
        with _bar("folding") as progress:
            try:
                outcome = await tools.take_snapshot(
                    log,
                    options.namespace,
                    store,
                    claims,
                    NatsMarks(nats, options.namespace),
                    kept=options.kept,
                    accept_loss=options.accept_loss,
                    progress=progress,
                )
            except ClaimTaken as taken:
                why = f"a snapshot is just being taken by {taken.holder}"
                raise Refused(why, "again, when that is done") from taken
            except LogGap as gap:
                raise await _missing(log, gap) from gap
    if not outcome.name:
        text = "the log is empty"
    else:
        what = f"{outcome.pairs:,} pairs in {outcome.bytes:,} bytes" if outcome.taken else "as new"
        text = f"{outcome.name}: {what}; the log begins at record {outcome.first_seq:,}"
    return _tell(options, msgspec.to_builtins(outcome), text)


async def run_trim(nats: Nats, options: argparse.Namespace) -> int:
    async with _opened(nats, options) as (log, store):
        extent = await log.extent()
        usable = [ref for ref in await store.refs() if unusable(ref, extent) is None]
        before_seq = options.before or trim_before(usable)
        if not before_seq:
            raise Refused(
                f"{len(usable)} snapshots are usable, and at least {KEPT_MIN} are needed to trim",
                "python -m eventstore snapshot",
            )
        await _check_stands_for(log, store, extent, before_seq)
        cut = await cut_at(NatsMarks(nats, options.namespace), extent, before_seq)
        await log.trim(cut.before_seq)
        first_seq = (await log.extent()).first_seq
    removed = first_seq - extent.first_seq
    text = f"{removed:,} records removed; the log begins at record {first_seq:,}"
    told = {"removed": removed, "first_seq": first_seq}
    if not cut.held_back:
        return _tell(options, told, text)
    return _tell(options, {**told, "held_back": cut.held_back}, f"{text}; {cut.held_back}")


async def _check_stands_for(
    log: EventLog, store: SnapshotStore, extent: Extent, before_seq: int
) -> None:
    """Raises Refused unless a snapshot that is whole stands for all records before `before_seq`."""
    for ref in reversed(await store.refs()):
        if unusable(ref, extent) is None and ref.seq >= before_seq - 1:
            try:
                check_body(await read_snapshot(log, store, ref, extent))
            except (BadSnapshot, SnapshotGone):
                continue
            return
    raise Refused(
        f"no snapshot that can be read stands for the records before {before_seq}",
        "python -m eventstore snapshot, then trim",
    )


async def run_reset(nats: Nats, options: argparse.Namespace) -> int:
    if not options.yes:
        raise Refused(
            f"this empties the state of every replica of {options.namespace}", "--yes, to do it"
        )
    async with _opened(nats, options) as (log, _):
        reset_id = int.from_bytes(os.urandom(8), "big")
        seq = await record_reset(log, options.namespace, options.reason, reset_id)
    return _tell(options, {"seq": seq}, f"reset at record {seq:,}")


async def run_export(nats: Nats, options: argparse.Namespace) -> int:
    async with _opened(nats, options) as (log, store):
        with _bar("writing") as progress, _files():
            try:
                done = await export_log(
                    log,
                    store,
                    options.namespace,
                    options.file,
                    whole=options.whole,
                    now_ns=time.time_ns(),
                    progress=progress,
                )
            except LogGap as gap:
                raise await _missing(log, gap) from gap
    return _tell_transferred(done, options)


async def _missing(log: EventLog, gap: LogGap) -> Refused:
    """What to say of a gap: the log was trimmed or made anew under the command, or has a hole."""
    if (await log.extent()).first_seq <= gap.expected < gap.got:
        return Refused(f"records are missing: {gap}", ACCEPT_LOSS)
    return Refused(f"the log changed meanwhile: {gap}", "again")


async def run_import(nats: Nats, options: argparse.Namespace) -> int:
    store = NatsSnapshots(nats, options.namespace)
    with _bar("reading") as progress, _files(), options.file.open("rb") as file:
        await asyncio.to_thread(check_archive, file)  # half of it would be in the way of the next
        file.seek(0)
        reader = ArchiveReader(file)
        try:
            done = await import_archive(nats, store, options.namespace, reader, progress=progress)
        except (NotEmpty, ImportStopped) as error:
            raise Refused(str(error), "another --namespace") from error
    return _tell_transferred(done, options)


OPERATIONS: Mapping[str, Operation] = {
    "verify": run_verify,
    "snapshot": run_snapshot,
    "trim": run_trim,
    "reset": run_reset,
    "export": run_export,
    "import": run_import,
}


# --- telling --------------------------------------------------------------------------------------


def _tell(options: argparse.Namespace, result: Any, text: str) -> int:
    print(json.dumps(result) if options.json else text, flush=True)
    return 0


def _tell_transferred(done: Transferred, options: argparse.Namespace) -> int:
    begun = "the beginning" if done.snapshot is None else f"snapshot {done.snapshot}"
    text = f"{begun} and {done.records:,} records, {done.first_seq:,} to {done.last_seq:,}"
    if done.bytes:
        text += f", in {done.bytes:,} bytes"
    return _tell(options, msgspec.to_builtins(done), text)


def _tell_verdict(verdict: Any, options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(msgspec.to_builtins(verdict)), flush=True)
        return 1 if verdict.problems else 0
    print(
        f"records {verdict.first_seq:,} to {verdict.last_seq:,}: {verdict.events:,} events in "
        f"{verdict.records:,} records folded"
    )
    for stretch in verdict.stretches:
        until = stretch.until or "the head"
        agrees = {None: "", stretch.digest: ", as it says"}.get(
            stretch.expected, ", NOT as it says"
        )
        where = f"from {stretch.begun_from} to {until} at {stretch.last_seq:,}"
        print(f"  {where}: {stretch.digest}{agrees}")
    noticed = {kind: count for kind, count in verdict.anomalies.items() if count}
    if noticed:
        print("noticed: " + ", ".join(f"{kind} {count:,}" for kind, count in noticed.items()))
    for problem in verdict.problems:
        print(f"problem: {problem}")
    print(
        "all is well" if not verdict.problems else f"{len(verdict.problems)} problems", flush=True
    )
    return 1 if verdict.problems else 0


@contextlib.asynccontextmanager
async def _opened(
    nats: Nats, options: argparse.Namespace
) -> AsyncIterator[tuple[JetStreamLog, NatsSnapshots]]:
    log = await JetStreamLog.open(nats, options.namespace, create=False)
    try:
        yield log, NatsSnapshots(nats, options.namespace)
    finally:
        await log.close()


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, moved by what is yielded: how much is done, of how much."""
    bar = Progress(
        *(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """What is wrong with a file as an error of the command."""
    try:
        yield
    except BadArchive as error:
        raise Refused(str(error), "another file") from error
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise Refused(what, "another file") from error
