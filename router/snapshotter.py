"""`python -m router.snapshotter`: the process that takes a snapshot, and how a frontend runs it.

A process of its own, because to fold a million messages takes seconds in which nobody could be
served. It gets its settings by the environment, which other users cannot read, and tells what came
of it as one line of JSON on its standard output; its log lines go where the frontend's go.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
import uvloop
from msgspec import Struct

from eventstore.claims import SNAPSHOT_CLAIM, ClaimTaken
from eventstore.claims_nats import NatsClaims
from eventstore.connect import DEFAULT_URL, Nats
from eventstore.errors import EventStoreError
from eventstore.jetstream import JetStreamLog
from eventstore.logs import configure, parse_filter
from eventstore.marks_nats import NatsMarks
from eventstore.process_settings import ProcessSettings
from eventstore.settings import VERSION, declarations, from_command_line
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.subjects import hex_id
from router.settings import SnapshotterSettings
from router.snapshot_steps import Outcome, SnapshotTaker, due_of

NICE = 10
"""Serving goes first where processors are scarce."""
RUN_MAX_S = 3600.0
END_S = 2.0
"""How long the process may take to release the claim when it is ended."""
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SnapshotFailed(EventStoreError):
    """The process did not take a snapshot."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"no snapshot was taken: {self.why}"


class _Told(Struct, frozen=True, omit_defaults=True):
    """The line on standard output."""

    outcome: Outcome | None = None
    held_by: str = ""
    """Who else holds the claim."""
    why: str = ""
    """What went wrong."""


# --- the process ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    settings = from_command_line(
        SnapshotterSettings, sys.argv[1:] if argv is None else argv, os.environ
    )
    configure(
        parse_filter(settings.log_levels),
        jsonl=settings.logging_jsonl,
        local_tz=settings.log_use_local_tz,
    )
    if settings.parent_pid is not None:
        die_with(settings.parent_pid)
    os.nice(NICE)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            told = _Told(outcome=runner.run(_run(settings)))
    except ClaimTaken as taken:
        told = _Told(held_by=taken.holder)
    except EventStoreError as error:
        told = _Told(why=str(error))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    print(msgspec.json.encode(told).decode(), flush=True)
    return 1 if told.why else 0


def die_with(parent_pid: int) -> None:
    """End when the parent ends, whatever it ends of (Linux; elsewhere the claim's end must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before we could ask
            sys.exit("the parent is gone")


async def _run(settings: SnapshotterSettings) -> Outcome:
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    connection = await Nats.connect(
        settings.nats_addresses() or (DEFAULT_URL,),
        name="reckon snapshotter",
        access=settings.access(),
        wait_s=settings.nats_wait_secs,
    )
    namespace, replicas = settings.namespace, settings.log_replicas
    try:
        log = await JetStreamLog.open(connection, namespace, create=False)
        try:
            taker = SnapshotTaker(
                log,
                namespace,
                NatsSnapshots(connection, namespace, replicas=replicas),
                NatsClaims(connection, namespace, SNAPSHOT_CLAIM, replicas=replicas),
                kept=settings.router_snapshots_kept,
                version=VERSION,
                marks=NatsMarks(connection, namespace, replicas=replicas),
                offload=in_thread,
            )
            return await taker.run(holder_name(), due=due_of(settings))
        finally:
            await log.close()
    finally:
        await connection.close()


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)


def holder_name() -> str:
    """A name for a claim that nobody else uses."""
    return f"process {os.getpid()} of {os.uname().nodename}, {hex_id(_random_u64())}"


def _random_u64() -> int:
    return int.from_bytes(os.urandom(8), "big")


# --- the frontend's side --------------------------------------------------------------------------


async def take_in_process(settings: ProcessSettings) -> Outcome:
    """Have a process of its own take a snapshot, if it is due by these settings.

    settings: the caller's own; those that the process has too are handed on. Cancelled, it ends the
    process. Raises ClaimTaken, SnapshotFailed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router.snapshotter", "--parent-pid", str(os.getpid())),
            env=environment_for(settings, os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise SnapshotFailed(f"no process could be started: {error}") from error
    try:
        async with asyncio.timeout(RUN_MAX_S):
            line, _ = await process.communicate()
    except TimeoutError as error:
        raise SnapshotFailed(f"it was not done after {RUN_MAX_S:g} s") from error
    finally:
        await _end(process)
    try:
        told = msgspec.json.decode(line, type=_Told)
    except msgspec.MsgspecError as error:
        raise SnapshotFailed(f"the process ended with status {process.returncode}") from error
    if told.held_by:
        raise ClaimTaken(SNAPSHOT_CLAIM, told.held_by)
    if told.outcome is None:
        raise SnapshotFailed(told.why)
    return told.outcome


def environment_for(settings: ProcessSettings, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with variables that make the process have the same settings."""
    handed_on = dict(env)
    for each in declarations(SnapshotterSettings):
        if not each.variables or not hasattr(settings, each.name):
            continue
        for name in each.variables:
            handed_on.pop(name, None)
        value = getattr(settings, each.name)
        if value is not None or each.nullable:
            handed_on[each.variables[0]] = _text(value)
    if settings.nats_url is None:
        handed_on["NATS_SERVER"] = DEFAULT_URL  # where the caller found or started one
    return handed_on


def _text(value: object) -> str:
    """As `eventstore.settings.read` takes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await process.wait()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


if __name__ == "__main__":
    sys.exit(main())
