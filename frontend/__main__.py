"""`python -m frontend`: settings, the connection to NATS, the event loop, signals."""

import asyncio
import logging
import os
import signal
import sys

import uvloop
from prometheus_client import disable_created_metrics

from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.logs import configure, parse_filter
from eventstore.process_settings import default_data_dir
from eventstore.server import connect_or_embed
from eventstore.settings import from_command_line, unknown_environment
from frontend.backing_nats import NatsBackings
from frontend.config_dump import dump_config
from frontend.connections import allow_open_files
from frontend.model_options import BadModelPath
from frontend.process import FrontendProcess, PortInUse
from frontend.service import Limits
from frontend.settings import FrontendSettings
from frontend.tls import BadCertificate
from workers.errors import WorkerError

_log = logging.getLogger("frontend")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    settings = from_command_line(FrontendSettings, arguments, os.environ)
    configure(
        parse_filter(settings.log_levels),
        jsonl=settings.logging_jsonl,
        local_tz=settings.log_use_local_tz,
    )
    unknown = unknown_environment(os.environ, FrontendSettings)
    if unknown:
        _log.warning("these variables are not known here and set nothing: %s", ", ".join(unknown))
    if settings.router_durable_kv_events:
        _log.warning("--router-durable-kv-events can be left out: KV events always are durable")
    dump_config(settings.dump_config_to, settings, arguments, os.environ)
    # Else a second series stands beside every counter, of no use here.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings))
    except LogUnavailable as error:
        print(f"Error: {error}", file=sys.stderr)
        if error.try_this:
            print(f"Try: {error.try_this}", file=sys.stderr)
    except (EventStoreError, WorkerError, BadModelPath, BadCertificate) as error:
        print(f"Error: {error}", file=sys.stderr)
    except PortInUse as error:
        print(f"Error: {error}\nTry: another one, with --http-port", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


async def _run(settings: FrontendSettings) -> int:
    connection, server = await connect_or_embed(
        settings.nats_url,
        settings.data_dir or default_data_dir(os.environ),
        name="reckon frontend",
        access=settings.access(),
        wait_s=settings.nats_wait_secs,
        binary=settings.nats_server_binary,
    )
    # Only now: who still waits for a server has nothing to end in order.
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    limits = Limits(
        body_bytes_max=settings.http_body_limit_bytes,
        connections_max=min(Limits().connections_max, allow_open_files() // 2),
    )
    try:
        try:
            await FrontendProcess(settings, NatsBackings(connection, settings), stop, limits).run(
                lambda address: print(f"ready {address}", flush=True)
            )
        except BaseExceptionGroup as group:
            raise _cause(group) from group
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
