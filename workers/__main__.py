"""`python -m workers mock`: settings, the model, the connection to NATS, the loop, signals."""

import asyncio
import logging
import os
import signal
import socket
import sys

import uvloop

from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.logs import configure, parse_filter
from eventstore.process_settings import default_data_dir
from eventstore.server import connect_or_embed
from eventstore.settings import from_command_line
from eventstore.subjects import hex_id
from workers.card import PREFILL, Instance, ModelCard
from workers.discovery_nats import NatsDiscovery
from workers.engine import EngineConfig, MockEngine
from workers.errors import WorkerError
from workers.model_facts import ModelFacts
from workers.models import ModelStore, read_model
from workers.service import CannotListen, MockWorker
from workers.settings import SHIPPED_MODEL, MockWorkerSettings

USAGE = """\
Usage: python -m workers mock [OPTIONS]

A worker with a simulated engine. Its options: python -m workers mock --help"""
CONTEXT_LENGTH_DEFAULT = 131_072

_logger = logging.getLogger("workers")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] != ["mock"]:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    settings = from_command_line(MockWorkerSettings, arguments[1:], os.environ)
    configure(
        parse_filter(settings.log_levels),
        jsonl=settings.logging_jsonl,
        local_tz=settings.log_use_local_tz,
    )
    try:
        if settings.bootstrap and settings.role != PREFILL:
            raise ValueError("--bootstrap is for --role prefill")
        files = read_model(settings.model_path or SHIPPED_MODEL)
        facts = ModelFacts.read(files)
        config = _engine_config(settings, facts)
        advertised = _advertised(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings, files, facts, config, advertised))
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except LogUnavailable as error:
        print(f"Error: {error}", file=sys.stderr)
        if error.try_this:
            print(f"Try: {error.try_this}", file=sys.stderr)
        return 1
    except (EventStoreError, WorkerError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except CannotListen as error:
        print(f"Error: {error}\nTry: another address, with --host and --port", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _run(
    settings: MockWorkerSettings,
    files: dict[str, bytes],
    facts: ModelFacts,
    config: EngineConfig,
    advertised: str,
) -> None:
    connection, server = await connect_or_embed(
        settings.nats_url,
        settings.data_dir or default_data_dir(os.environ),
        name="reckon worker",
        access=settings.access(),
        wait_s=settings.nats_wait_secs,
        binary=settings.nats_server_binary,
    )
    namespace, replicas = settings.namespace, settings.log_replicas
    try:
        log = await JetStreamLog.open(
            connection, namespace, replicas=replicas, wait_s=settings.nats_wait_secs
        )
        discovery = NatsDiscovery(
            connection, namespace, lease_ttl_s=settings.lease_ttl_secs, replicas=replicas
        )
        try:
            names = await ModelStore(connection, namespace, replicas=replicas).upload(files)
            worker = MockWorker(
                _instance(settings, config, facts, names),
                [
                    MockEngine(config, seed=settings.seed, worker_id=0, dp_rank=rank)
                    for rank in range(settings.data_parallel_size)
                ],
                log,
                discovery,
                new_id=lambda: int.from_bytes(os.urandom(8), "big"),
                drain_s=settings.drain_secs,
                bootstrap_port=settings.bootstrap_port if settings.bootstrap else None,
                bootstrap_wait_s=settings.bootstrap_timeout_secs,
            )
            _stop_on_signals(worker)
            await worker.run(settings.host, settings.port, advertised, _tell_ready)
        finally:
            await discovery.close()
            await log.close()
    finally:
        await connection.close()
        if server is not None:
            await server.stop()


def _engine_config(settings: MockWorkerSettings, facts: ModelFacts) -> EngineConfig:
    return EngineConfig(
        block_size=settings.block_size,
        num_gpu_blocks=settings.num_gpu_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_waiting=settings.max_num_waiting,
        context_length=settings.context_length or facts.context_length or CONTEXT_LENGTH_DEFAULT,
        speedup=settings.speedup_ratio,
        kv_bytes_per_token=settings.kv_bytes_per_token,
        kv_transfer_gbps=settings.kv_transfer_gbps,
        max_pinned_ratio=settings.max_pinned_ratio,
        output_token_ids=facts.text_token_ids,
        output_length_mean=settings.output_tokens_mean,
    )


def _instance(
    settings: MockWorkerSettings, config: EngineConfig, facts: ModelFacts, names: dict[str, str]
) -> Instance:
    card = ModelCard(
        name=settings.model_name,
        block_size=config.block_size,
        context_length=config.context_length,
        files=names,
        eos_token_ids=facts.eos_token_ids,
        worker_type=settings.role,
        total_kv_blocks=config.num_gpu_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        modalities=["text", *settings.modalities],
    )
    return Instance(
        worker_id=0,
        namespace=settings.namespace,
        component=settings.component,
        endpoint="generate",
        address="",
        card=card,
        dp_size=settings.data_parallel_size,
    )


def _advertised(settings: MockWorkerSettings) -> str:
    """The host that frontends connect to. Raises ValueError."""
    if settings.advertise_host is not None:
        return settings.advertise_host
    if settings.host in ("", "0.0.0.0", "::"):
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            raise ValueError("this machine's name has no address: use --advertise-host") from None
    return settings.host


def _tell_ready(instance: Instance) -> None:
    name = hex_id(instance.worker_id)
    print(f"ready worker={name} model={instance.card.name} address={instance.address}", flush=True)


def _stop_on_signals(worker: MockWorker) -> None:
    """The first signal ends the worker in order, the second one at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        _logger.info("shutting down")
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        worker.stop()

    for number in signals:
        loop.add_signal_handler(number, stop)


if __name__ == "__main__":
    raise SystemExit(main())
