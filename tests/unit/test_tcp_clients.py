"""The clients follow the list: who is connected to, who is given up, who may finish."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from tests.waiting import eventually
from workers import clients as clients_module
from workers.card import Instance, ModelCard
from workers.clients import WorkerClients
from workers.discovery import Ending
from workers.errors import WorkerLost
from workers.protocol import Announce, EngineRequest, Output, Pin, Refused
from workers.tcp_server import Connection, WorkerServer


class Worker:
    """A worker that keeps its streams open until it is told to end one."""

    def __init__(self) -> None:
        self.streams: list[tuple[Connection, int]] = []

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        self.streams.append((connection, stream))

    def on_cancel(self, connection: Connection, stream: int) -> None: ...

    def on_announce(self, message: Announce) -> None: ...

    def on_pin(self, message: Pin) -> None: ...

    def on_refused(self, message: Refused) -> None: ...

    def running(self, connection: Connection) -> list[int]:
        return sorted(connection.streams)

    def on_disconnect(self, connection: Connection, streams: frozenset[int]) -> None: ...

    def finish(self) -> None:
        for connection, stream in self.streams:
            connection.send([Output(stream, [1], finish_reason="stop")])


class World:
    """A worker at an address, and the clients of a frontend with one open stream to it."""

    def __init__(self, worker: Worker, clients: WorkerClients, instance: Instance) -> None:
        self.worker = worker
        self.clients = clients
        self.instance = instance
        self.outputs: list[Output] = []
        self.losses: list[WorkerLost] = []
        self.told: list[tuple[str, int]] = []


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    worker = Worker()
    server = WorkerServer(worker)
    port = await server.start("127.0.0.1", 0)
    card = ModelCard(name="m", block_size=4, context_length=100, files={})
    instance = Instance(
        worker_id=1,
        namespace="n",
        component="backend",
        endpoint="generate",
        address=f"127.0.0.1:{port}",
        card=card,
    )
    told: list[tuple[str, int]] = []
    clients = WorkerClients(
        random.Random(0),
        on_connected=lambda worker_id: told.append(("connected", worker_id)),
        on_disconnected=lambda worker_id: told.append(("disconnected", worker_id)),
    )
    made = World(worker, clients, instance)
    made.told = told
    clients.put(instance)
    client = clients.get(1)
    assert client is not None
    await client.ready()
    request = EngineRequest(request_id="r", model="m", token_ids=[1])
    client.generate(request, made.outputs.append, made.losses.append)
    await eventually(lambda: bool(worker.streams))
    try:
        yield made
    finally:
        await clients.close()
        await server.close()


async def test_a_listed_worker_is_connected_to_once() -> None:
    async with world() as made:
        client = made.clients.get(1)
        made.clients.put(made.instance)
        made.clients.put(replace(made.instance, dp_size=2))
        assert made.clients.get(1) is client and len(made.clients) == 1
        assert made.clients.is_connected(1) and not made.clients.is_connected(2)
        assert made.told == [("connected", 1)]
    assert len(made.losses) == 1
    assert made.told == [("connected", 1), ("disconnected", 1)]


async def test_an_expired_worker_is_given_up_at_once() -> None:
    async with world() as made:
        made.clients.remove(made.instance, Ending.EXPIRED)
        assert len(made.losses) == 1
        assert made.clients.get(1) is None and len(made.clients) == 0
        made.clients.remove(made.instance, Ending.EXPIRED)
    assert len(made.losses) == 1


async def test_a_worker_that_leaves_in_order_may_finish() -> None:
    async with world() as made:
        client = made.clients.get(1)
        assert client is not None
        made.clients.remove(made.instance, Ending.DEREGISTERED)
        assert made.clients.get(1) is None and not client.is_connected
        made.worker.finish()
        await eventually(lambda: bool(made.outputs))
        async with asyncio.timeout(5):
            await client.wait_closed()
    assert not made.losses


async def test_finishing_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "DRAIN_S_MAX", 0.01)
    async with world() as made:
        made.clients.remove(made.instance, Ending.DEREGISTERED)
        await eventually(lambda: len(made.losses) == 1)


async def test_a_process_that_only_changed_its_id_may_finish() -> None:
    async with world() as made:
        made.clients.put(replace(made.instance, worker_id=2))
        made.clients.remove(made.instance, Ending.EXPIRED)
        assert not made.losses
        made.worker.finish()
        await eventually(lambda: bool(made.outputs))
        await eventually(lambda: made.clients.is_connected(2))
    assert not made.losses


async def test_a_worker_at_another_address_is_another_connection() -> None:
    async with world() as made:
        server = WorkerServer(Worker())
        port = await server.start("127.0.0.1", 0)
        made.clients.put(replace(made.instance, address=f"127.0.0.1:{port}"))
        assert len(made.losses) == 1
        await eventually(lambda: made.clients.is_connected(1))
        await eventually(lambda: len(server.connections) == 1)
        await made.clients.close()
        await server.close()


async def test_an_address_that_is_none_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async with world() as made:
        with caplog.at_level(logging.ERROR):
            made.clients.put(replace(made.instance, worker_id=2, address="nowhere"))
        assert made.clients.get(2) is None
        assert "not host:port" in caplog.text
        made.clients.remove(replace(made.instance, worker_id=2), Ending.EXPIRED)
