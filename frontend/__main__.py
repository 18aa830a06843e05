"""`python -m frontend`: settings, the connection to NATS, the event loop, signals."""

import asyncio
import logging
import os
import signal
import sys
from functools import partial

import uvloop
from prometheus_client import disable_created_metrics

from eventstore.claims import SNAPSHOT_CLAIM
from eventstore.claims_nats import NatsClaims
from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.logs import configure, parse_filter
from eventstore.process_settings import default_data_dir
from eventstore.server import connect_or_embed
from eventstore.settings import from_command_line, unknown_environment
from eventstore.snapshots_nats import NatsSnapshots
from frontend.process import FrontendProcess, PortInUse
from frontend.settings import FrontendSettings
from router.snapshot_trigger import Snapshots
from router.snapshotter import take_in_process
from workers.discovery_nats import NatsDiscovery, NatsFrontends
from workers.errors import WorkerError
from workers.models import ModelStore

_log = logging.getLogger("frontend")


def main(argv: list[str] | None = None) -> int:
    settings = from_command_line(
        FrontendSettings, sys.argv[1:] if argv is None else argv, os.environ
    )
    configure(
        parse_filter(settings.log_levels),
        jsonl=settings.logging_jsonl,
        local_tz=settings.log_use_local_tz,
    )
    unknown = unknown_environment(os.environ, FrontendSettings)
    if unknown:
        _log.warning("these variables are not known here and set nothing: %s", ", ".join(unknown))
    # Else a second series stands beside every counter, of no use here.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings))
    except LogUnavailable as error:
        print(f"Error: {error}", file=sys.stderr)
        if error.try_this:
            print(f"Try: {error.try_this}", file=sys.stderr)
    except (EventStoreError, WorkerError) as error:
        print(f"Error: {error}", file=sys.stderr)
    except PortInUse as error:
        print(f"Error: {error}\nTry: another one, with --http-port", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


async def _run(settings: FrontendSettings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    connection, server = await connect_or_embed(
        settings.nats_url,
        settings.data_dir or default_data_dir(os.environ),
        name="reckon frontend",
        access=settings.access(),
        wait_s=settings.nats_wait_secs,
        binary=settings.nats_server_binary,
    )
    namespace, replicas = settings.log_namespace, settings.log_replicas
    try:
        log = await JetStreamLog.open(
            connection, namespace, replicas=replicas, wait_s=settings.nats_wait_secs
        )
        try:
            snapshots = Snapshots(
                NatsSnapshots(connection, namespace, replicas=replicas),
                NatsClaims(connection, namespace, SNAPSHOT_CLAIM, replicas=replicas),
                take=partial(take_in_process, settings),
            )
            await FrontendProcess(settings, namespace, log, stop, snapshots=snapshots).run(
                NatsDiscovery(connection, namespace, replicas=replicas),
                NatsFrontends(connection, namespace, replicas=replicas),
                ModelStore(connection, namespace).download,
                lambda address: print(f"ready {address}", flush=True),
            )
        except BaseExceptionGroup as group:
            raise _cause(group) from group
        finally:
            await log.close()
    finally:
        await connection.close()
        if server is not None:
            await server.stop()
    return 0


def _cause(error: BaseException) -> BaseException:
    """What ended a task group, where it was one thing."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    raise SystemExit(main())
