"""`python -m workers mock` as a process: it serves, ends, dies, and freezes; the log tells all."""

import asyncio
import os
import random
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from eventstore.codec import decode
from eventstore.connect import Nats
from eventstore.events import (
    BlockStored,
    KvRebased,
    PrefixPinned,
    WorkerRegistered,
    WorkerRemoved,
)
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog
from tests.waiting import eventually
from workers.card import Instance
from workers.clients import WorkerClients
from workers.discovery import Ending
from workers.discovery_nats import NatsDiscovery
from workers.errors import WorkerLost
from workers.models import ModelStore, read_model
from workers.protocol import Bootstrap, EngineRequest, Output, StopConditions
from workers.registry import LEASE_EXPIRED, record_removed
from workers.settings import MODEL_NAME_DEFAULT, SHIPPED_MODEL
from workers.sockets import parse_address
from workers.tcp_client import StreamHandle

START_S = 30.0
READY = re.compile(rf"ready worker=([0-9a-f]{{16}}) model={MODEL_NAME_DEFAULT} address=(\S+:\d+)\n")


class Worker:
    """A worker process, from its ready line on."""

    def __init__(self, process: Process, ready: str) -> None:
        self.process = process
        match = READY.fullmatch(ready)
        assert match is not None, ready
        self.worker_id = int(match[1], 16)
        self.address = match[2]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def worker(nats_url: str, namespace: str, *options: str) -> AsyncIterator[Worker]:
    process = await start("--nats-url", nats_url, "--namespace", namespace, *options)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            ready = (await process.stdout.readline()).decode()
        yield Worker(process, ready)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def start(*options: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers", "mock", *options), stdout=PIPE, stderr=PIPE
    )


class Frontend:
    """What a frontend does with workers: follow the list, connect, record whose lease ended."""

    def __init__(self, log: EventLog, namespace: str) -> None:
        self.log = log
        self.namespace = namespace
        self.clients = WorkerClients(random.Random(0))
        self.listed: list[Instance] = []
        self.endings: list[tuple[int, Ending]] = []
        self.recorded: list[bool] = []
        self._ended: asyncio.Queue[Instance] = asyncio.Queue()

    def put(self, instance: Instance) -> None:
        self.listed.append(instance)
        self.clients.put(instance)

    def remove(self, instance: Instance, ending: Ending) -> None:
        self.endings.append((instance.worker_id, ending))
        self.clients.remove(instance, ending)
        if ending is Ending.EXPIRED:
            self._ended.put_nowait(instance)

    async def record(self) -> None:
        while True:
            instance = await self._ended.get()
            self.recorded.append(
                await record_removed(
                    self.log,
                    self.namespace,
                    instance.worker_id,
                    LEASE_EXPIRED,
                    instance.registered_seq,
                )
            )


@asynccontextmanager
async def frontend(nats_url: str, namespace: str) -> AsyncIterator[Frontend]:
    nats = await Nats.connect([nats_url], name="frontend")
    log = await JetStreamLog.open(nats, namespace)
    discovery = NatsDiscovery(nats, namespace)
    made = Frontend(log, namespace)
    async with asyncio.TaskGroup() as tasks:
        recording = tasks.create_task(made.record())
        await discovery.watch(made.put, made.remove)
        try:
            yield made
        finally:
            recording.cancel()
            await made.clients.close()
            await discovery.close()
            await log.close()
            await nats.close()


class Caller:
    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.losses: list[WorkerLost] = []

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]


async def ask(
    made: Frontend,
    worker_id: int,
    caller: Caller,
    prompt: list[int],
    max_tokens: int,
    bootstrap: Bootstrap | None = None,
) -> StreamHandle:
    client = made.clients.get(worker_id)
    assert client is not None
    await client.ready()
    request = EngineRequest(
        request_id="r",
        model=MODEL_NAME_DEFAULT,
        token_ids=prompt,
        stop_conditions=StopConditions(max_tokens=max_tokens),
        bootstrap=bootstrap,
    )
    return client.generate(request, caller.outputs.append, caller.losses.append)


async def events(log: EventLog) -> list[object]:
    found: list[object] = []
    async for record in log.read(1):
        batch = decode(record.data).batch
        assert batch is not None
        found += batch.events
    return found


async def removals(log: EventLog) -> list[WorkerRemoved]:
    return [event for event in await events(log) if isinstance(event, WorkerRemoved)]


async def test_it_registers_serves_and_ends_in_order(nats_url: str, namespace: str) -> None:
    caller = Caller()
    async with worker(nats_url, namespace) as served, frontend(nats_url, namespace) as made:
        client = made.clients.get(served.worker_id)
        assert client is not None and client.address == served.address
        await ask(made, served.worker_id, caller, list(range(200)), 40)
        await eventually(lambda: bool(caller.outputs))
        served.signal(signal.SIGTERM)
        await eventually(lambda: made.endings == [(served.worker_id, Ending.DEREGISTERED)])
        await eventually(lambda: len(caller.tokens) == 40)
        async with asyncio.timeout(10):
            assert await served.process.wait() == 0
        assert caller.outputs[-1].finish_reason == "length" and not caller.losses
        told = await events(made.log)
        registered = told[0]
        assert isinstance(registered, WorkerRegistered)
        assert registered.worker_id == served.worker_id
        assert registered.model == MODEL_NAME_DEFAULT and registered.block_size == 64
        assert registered.total_kv_blocks == 16_384 and registered.context_length == 131_072
        assert told[1] == KvRebased(served.worker_id, 0, "started")
        stored = next(event for event in told if isinstance(event, BlockStored))
        assert len(stored.sequence_hashes) == 3
        assert await removals(made.log) == [WorkerRemoved(served.worker_id, "shutdown")]
        assert made.recorded == []


async def test_its_model_files_reach_a_frontend(nats: Nats, nats_url: str, namespace: str) -> None:
    parsers = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    async with worker(nats_url, namespace, *parsers, "--modalities", "image"):
        cards = []
        discovery = NatsDiscovery(nats, namespace)
        await discovery.watch(lambda instance: cards.append(instance.card), lambda *_: None)
        [card] = cards
        assert await ModelStore(nats, namespace).download(card.files) == read_model(SHIPPED_MODEL)
        assert card.eos_token_ids
        assert (card.tool_call_parser, card.reasoning_parser) == ("hermes", "qwen3")
        assert card.modalities == ["text", "image"]
        await discovery.close()


async def test_a_killed_worker_is_dropped_and_recorded_once(nats_url: str, namespace: str) -> None:
    """Two frontends see its lease end; one record says so, and its streams are lost."""
    caller = Caller()
    async with (
        worker(nats_url, namespace, "--lease-ttl-secs", "1") as served,
        frontend(nats_url, namespace) as one,
        frontend(nats_url, namespace) as other,
    ):
        await ask(one, served.worker_id, caller, [1, 2, 3], 5000)
        await eventually(lambda: bool(caller.outputs))
        served.signal(signal.SIGKILL)
        await eventually(lambda: len(caller.losses) == 1)
        for made in (one, other):
            await eventually(lambda made=made: len(made.recorded) == 1)  # type: ignore[misc]
            assert made.endings == [(served.worker_id, Ending.EXPIRED)]
            assert made.clients.get(served.worker_id) is None
        assert sorted([*one.recorded, *other.recorded]) == [False, True]
        assert await removals(one.log) == [WorkerRemoved(served.worker_id, "lease_expired")]


async def test_a_worker_that_was_frozen_comes_back_as_another(
    nats_url: str, namespace: str
) -> None:
    """Its lease ends meanwhile; awake, it registers anew and announces its whole cache."""
    caller = Caller()
    async with (
        worker(nats_url, namespace, "--lease-ttl-secs", "1") as served,
        frontend(nats_url, namespace) as made,
    ):
        await ask(made, served.worker_id, caller, list(range(200)), 2)
        await eventually(lambda: len(caller.tokens) == 2)
        served.signal(signal.SIGSTOP)
        await eventually(lambda: made.endings == [(served.worker_id, Ending.EXPIRED)])
        await eventually(lambda: made.recorded == [True])
        served.signal(signal.SIGCONT)
        await eventually(lambda: len(made.clients) == 1)
        [client] = made.clients
        assert client.worker_id != served.worker_id and client.address == served.address
        again = Caller()
        await ask(made, client.worker_id, again, list(range(200)), 2)
        await eventually(lambda: len(again.tokens) == 2)
        assert again.outputs[0].cached_tokens == 192

        async def told() -> bool:
            return any(
                isinstance(event, BlockStored) and event.worker_id == client.worker_id
                for event in await events(made.log)
            )

        await eventually(told)
        assert await removals(made.log) == [WorkerRemoved(served.worker_id, "lease_expired")]


async def test_a_second_signal_ends_it_at_once(nats_url: str, namespace: str) -> None:
    caller = Caller()
    async with (
        worker(nats_url, namespace, "--drain-secs", "60") as served,
        frontend(nats_url, namespace) as made,
    ):
        await ask(made, served.worker_id, caller, [1, 2, 3], 100_000)
        await eventually(lambda: bool(caller.outputs))
        served.signal(signal.SIGINT)
        await eventually(lambda: bool(made.endings))
        served.signal(signal.SIGINT)
        async with asyncio.timeout(5):
            assert await served.process.wait() == -signal.SIGINT
        await eventually(lambda: len(caller.losses) == 1)
        assert await removals(made.log) == [WorkerRemoved(served.worker_id, "shutdown")]


async def test_several_ranks_and_the_engines_options(nats_url: str, namespace: str) -> None:
    options = ("--data-parallel-size", "2", "--block-size", "16", "--num-gpu-blocks", "64")
    speed = ("--speedup-ratio", "1000", "--context-length", "512", "--model-name", "own")
    process = await start("--nats-url", nats_url, "--namespace", namespace, *options, *speed)
    assert process.stdout is not None
    async with frontend(nats_url, namespace) as made, asyncio.timeout(START_S):
        assert b" model=own " in await process.stdout.readline()
        await eventually(lambda: len(made.clients) == 1)
        [client] = made.clients
        await client.ready()
        caller = Caller()
        request = EngineRequest(request_id="r", model="own", token_ids=[7] * 400, dp_rank=1)
        client.generate(request, caller.outputs.append, caller.losses.append)
        await eventually(lambda: len(caller.tokens) == 112)  # to the end of the context
        process.terminate()
        await process.communicate()
        assert process.returncode == 0
        told = await events(made.log)
        assert isinstance(told[0], WorkerRegistered) and told[0].dp_size == 2
        stored = [event for event in told if isinstance(event, BlockStored)]
        assert {event.dp_rank for event in stored} == {1}
        assert sum(len(event.sequence_hashes) for event in stored) == 31


async def test_a_prefill_and_a_decode_worker(nats_url: str, namespace: str) -> None:
    """They are listed with their roles, hand over at the address that is told, and keep pins."""
    prompt, answer = Caller(), Caller()
    prefill = worker(nats_url, namespace, "--role", "prefill", "--bootstrap")
    decode = worker(nats_url, namespace, "--role", "decode", "--kv-transfer-gbps", "1000")
    async with prefill as one, decode as other, frontend(nats_url, namespace) as made:
        await eventually(lambda: len(made.clients) == 2)
        listed = {instance.worker_id: instance for instance in made.listed}
        assert listed[one.worker_id].card.worker_type == "prefill"
        assert listed[other.worker_id].card.worker_type == "decode"
        assert listed[other.worker_id].bootstrap_address is None
        address = listed[one.worker_id].bootstrap_address
        assert address is not None
        bootstrap = Bootstrap(*parse_address(address), 2**64 - 1)
        await ask(made, other.worker_id, answer, list(range(200)), 5, bootstrap)
        await ask(made, one.worker_id, prompt, list(range(200)), 1, bootstrap)
        await eventually(lambda: len(answer.tokens) == 5)
        assert prompt.outputs[-1].disaggregated_params == {
            "worker_id": one.worker_id,
            "room": 2**64 - 1,
            "blocks": 4,
            "tokens": 200,
        }
        client = made.clients.get(other.worker_id)
        assert client is not None
        client.pin(0, list(range(200)), 300)

        async def told() -> bool:
            return any(isinstance(event, PrefixPinned) for event in await events(made.log))

        await eventually(told)
        history = await events(made.log)
        pin = next(event for event in history if isinstance(event, PrefixPinned))
        assert (pin.worker_id, len(pin.sequence_hashes), pin.ttl_s) == (other.worker_id, 3, 300)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--block-size", "0"], 2, "--block-size"),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], 2, "max_num_batched_tokens"),
        (["--component", "a.b"], 2, "--component"),
        (["--role", "none"], 2, "--role"),
        (["--role", "decode", "--bootstrap"], 2, "--bootstrap is for --role prefill"),
        (["--max-pinned-ratio", "1.5"], 2, "--max-pinned-ratio"),
        (["--model-path", "/nonexistent"], 1, "tokenizer.json: is missing"),
        (["--host", "203.0.113.1"], 1, "can't listen on 203.0.113.1:0"),
        (["--nats-url", "nats://127.0.0.1:1", "--nats-wait-secs", "0.2"], 1, "127.0.0.1:1"),
    ],
)
async def test_what_keeps_it_from_starting_is_one_clear_line(
    options: list[str], code: int, says: str, nats_url: str, namespace: str
) -> None:
    process = await start("--nats-url", nats_url, "--namespace", namespace, *options)
    async with asyncio.timeout(START_S):
        out, err = (each.decode() for each in await process.communicate())
    assert process.returncode == code
    assert says in err and "Traceback" not in err and err.startswith("Error: ")
    assert len(err.splitlines()) <= 2
    assert "ready" not in out


async def test_without_a_verb_it_says_how_it_is_used() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers"), stdout=PIPE, stderr=PIPE, env={**os.environ}
    )
    out, err = await process.communicate()
    assert process.returncode == 2 and out == b"" and b"python -m workers mock" in err


def test_the_shipped_model_is_there() -> None:
    assert Path(SHIPPED_MODEL, "tokenizer.json").is_file()
