"""The request plane over real sockets on loopback: one worker, its client, and who breaks what."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import cast

import pytest
import uvloop

from tests.waiting import eventually
from workers import tcp_client, tcp_server
from workers.errors import CannotConnect, FrameTooLarge, WorkerBacklogged, WorkerLost
from workers.protocol import (
    Announce,
    Cancel,
    EngineRequest,
    Generate,
    Output,
    Outputs,
    Pin,
    Refused,
    frame,
)
from workers.sockets import format_address, parse_address
from workers.tcp_client import StreamHandle, WorkerClient
from workers.tcp_server import Connection, WorkerServer

WORKER = 7


class Worker:
    """A handler that records what it is told, and answers when the test says so."""

    def __init__(self) -> None:
        self.requests: dict[int, EngineRequest] = {}
        self.cancelled: list[int] = []
        self.lost: list[frozenset[int]] = []
        self.connections: list[Connection] = []
        self.pins: list[Pin] = []
        self.refusals: list[Refused] = []

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        self.requests[stream] = request
        if connection not in self.connections:
            self.connections.append(connection)

    def on_cancel(self, connection: Connection, stream: int) -> None:
        self.cancelled.append(stream)

    def on_announce(self, message: Announce) -> None: ...

    def on_pin(self, message: Pin) -> None:
        self.pins.append(message)

    def on_refused(self, message: Refused) -> None:
        self.refusals.append(message)

    def running(self, connection: Connection) -> list[int]:
        return sorted(connection.streams)

    def on_disconnect(self, connection: Connection, streams: frozenset[int]) -> None:
        self.lost.append(streams)


class Caller:
    """What one stream was told."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.losses: list[WorkerLost] = []

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]


@asynccontextmanager
async def serving(worker: Worker, port: int = 0) -> AsyncIterator[tuple[WorkerServer, str]]:
    server = WorkerServer(worker)
    port = await server.start("127.0.0.1", port)
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.close()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[WorkerClient]:
    client = WorkerClient(WORKER, address, random.Random(0))
    client.start()
    try:
        await client.ready()
        yield client
    finally:
        client.close()
        await client.wait_closed()


def request(name: str = "r", tokens: int = 3) -> EngineRequest:
    return EngineRequest(request_id=name, model="m", token_ids=list(range(tokens)))


def generate(client: WorkerClient, caller: Caller, name: str = "r") -> StreamHandle:
    return client.generate(request(name), caller.outputs.append, caller.losses.append)


async def test_a_request_goes_out_and_its_tokens_come_back() -> None:
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = generate(client, caller)
        await eventually(lambda: bool(worker.requests))
        assert worker.requests[handle.number] == request()
        [connection] = worker.connections
        connection.send([Output(handle.number, [1, 2], cached_tokens=64)])
        connection.send([Output(handle.number, [3], finish_reason="stop")])
        await eventually(lambda: len(caller.outputs) == 2)
        assert caller.tokens == [1, 2, 3]
        assert caller.outputs[0].cached_tokens == 64
        assert client.stream_count == 0 and connection.streams == frozenset()
    assert caller.losses == []


async def test_streams_share_a_connection_and_a_frame() -> None:
    worker, callers = Worker(), [Caller() for _ in range(50)]
    async with serving(worker) as (_, address), connected(address) as client:
        handles = [generate(client, caller, str(i)) for i, caller in enumerate(callers)]
        await eventually(lambda: len(worker.requests) == 50)
        [connection] = worker.connections
        connection.send([Output(handle.number, [handle.number]) for handle in handles])
        await eventually(lambda: all(caller.outputs for caller in callers))
        assert [caller.tokens for caller in callers] == [[handle.number] for handle in handles]


async def test_after_a_cancel_nothing_is_delivered_and_the_worker_knows() -> None:
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = generate(client, caller)
        await eventually(lambda: bool(worker.requests))
        [connection] = worker.connections
        connection.send([Output(handle.number, [1])])  # crosses the cancel
        handle.cancel()
        handle.cancel()
        await eventually(lambda: worker.cancelled == [handle.number])
        connection.send([Output(handle.number, [2], finish_reason="stop")])
        other = Caller()
        number = generate(client, other).number
        await eventually(lambda: number in worker.requests)
        connection.send([Output(number, [3], finish_reason="stop")])
        await eventually(lambda: bool(other.outputs))
        assert caller.outputs == [] and caller.losses == []
        assert connection.streams == frozenset()


async def test_an_error_ends_a_stream() -> None:
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = generate(client, caller)
        await eventually(lambda: bool(worker.requests))
        [connection] = worker.connections
        connection.send([Output(handle.number, [], error=("overloaded", "busy"))])
        await eventually(lambda: bool(caller.outputs))
        assert caller.outputs[0].error == ("overloaded", "busy")
        assert client.stream_count == 0
    assert caller.losses == []


async def test_a_lost_connection_is_told_once_to_every_open_stream() -> None:
    worker, callers, ended = Worker(), [Caller() for _ in range(5)], Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = generate(client, ended)
        for caller in callers:
            generate(client, caller)
        await eventually(lambda: len(worker.requests) == 6)
        [connection] = worker.connections
        connection.send([Output(handle.number, [], finish_reason="stop")])
        await eventually(lambda: bool(ended.outputs))
        connection.abort()
        await eventually(lambda: all(caller.losses for caller in callers))
        await eventually(lambda: worker.lost == [frozenset(range(1, 6))])
    assert [len(caller.losses) for caller in callers] == [1] * 5
    assert ended.losses == []
    assert callers[0].losses[0].worker_id == WORKER


async def test_it_reconnects_after_a_restart_of_the_worker() -> None:
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address):
        client = WorkerClient(WORKER, address, random.Random(0))
        client.start()
        await client.ready()
    await eventually(lambda: not client.is_connected)
    with pytest.raises(CannotConnect):
        generate(client, caller)
    async with serving(worker, parse_address(address)[1]):
        await client.ready()
        generate(client, caller)
        await eventually(lambda: bool(worker.requests))
        client.close()
        assert len(caller.losses) == 1
        await client.wait_closed()
    assert len(caller.losses) == 1


async def test_nobody_listening_is_an_error_within_the_time_given() -> None:
    async with serving(Worker()) as (_, address):
        pass
    client = WorkerClient(WORKER, address, random.Random(0))
    client.start()
    with pytest.raises(CannotConnect, match="Errno"):
        await client.ready(timeout_s=0.3)
    client.close()
    await client.wait_closed()


async def test_draining_lets_streams_end_and_takes_no_new_one() -> None:
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = generate(client, caller)
        await eventually(lambda: bool(worker.requests))
        client.drain()
        with pytest.raises(CannotConnect, match="shutting down"):
            generate(client, Caller())
        with pytest.raises(CannotConnect):
            await client.ready()
        [connection] = worker.connections
        connection.send([Output(handle.number, [1], finish_reason="stop")])
        await eventually(lambda: bool(caller.outputs))
        async with asyncio.timeout(5):
            await client.wait_closed()
    assert caller.losses == []


async def test_a_sink_may_end_everything() -> None:
    worker, first, second = Worker(), Caller(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        handle = client.generate(request(), lambda _: client.close("enough"), first.losses.append)
        other = generate(client, second)
        await eventually(lambda: len(worker.requests) == 2)
        [connection] = worker.connections
        connection.send([Output(handle.number, [1]), Output(other.number, [1])])
        await eventually(lambda: bool(first.losses))
        assert second.outputs == [] and len(second.losses) == 1


async def raw_connection(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*parse_address(address))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        frame(Outputs([])),
        frame(Generate(5, request())) + frame(Generate(5, request())),
        frame(Generate(5, request())) + frame(Generate(4, request())),
    ],
    ids=["too large", "not msgpack", "not for a worker", "number used twice", "number went back"],
)
async def test_a_frontend_that_breaks_the_protocol_is_disconnected(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is closed with a log line, its streams are cancelled, others go on."""
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        generate(client, caller)
        await eventually(lambda: 0 in worker.requests)
        reader, writer = await raw_connection(address)
        writer.write(data)
        with pytest.raises(ConnectionResetError):
            assert await reader.read() == b""
            raise ConnectionResetError  # a plain end is as good
        await eventually(lambda: len(worker.lost) == 1)
        assert worker.lost[0] == (frozenset({5}) if 5 in worker.requests else frozenset())
        writer.close()
        assert "frontend connection closed" in caplog.text
        assert client.is_connected
    assert len(caller.losses) == 1


async def test_a_cancel_of_an_unknown_stream_is_nothing() -> None:
    worker = Worker()
    async with serving(worker) as (_, address):
        _, writer = await raw_connection(address)
        writer.write(frame(Cancel(3)) + frame(Generate(4, request())))
        await eventually(lambda: 4 in worker.requests)
        assert worker.cancelled == []
        writer.close()
        await eventually(lambda: bool(worker.lost))


async def test_a_frontend_that_does_not_read_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output that nobody takes is bounded: then the connection and its streams end."""
    monkeypatch.setattr(tcp_server, "WRITE_BUFFER_BYTES_MAX", 100_000)
    worker = Worker()
    async with serving(worker) as (_, address):
        reader, writer = await raw_connection(address)
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(frame(Generate(0, request())))
        await eventually(lambda: bool(worker.requests))
        [connection] = worker.connections

        def flood() -> bool:
            connection.send([Output(0, [2**31] * 100_000)])
            return bool(worker.lost)

        await eventually(flood)
        assert worker.lost == [frozenset({0})]
        writer.transport.abort()
        del reader


async def test_a_worker_that_does_not_read_refuses_new_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_client, "WRITE_BUFFER_BYTES_MAX", 100_000)
    accepted: list[asyncio.StreamWriter] = []

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast(asyncio.Transport, writer.transport).pause_reading()
        accepted.append(writer)

    server = await asyncio.start_server(never_read, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    async with connected(format_address(host, port)) as client:
        caller = Caller()
        with pytest.raises(WorkerBacklogged):
            for _ in range(1000):
                client.generate(request(tokens=50_000), caller.outputs.append, caller.losses.append)
        assert client.is_connected
    assert caller.outputs == []
    for writer in accepted:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


async def test_a_request_over_the_frame_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_client, "FRAME_BYTES_MAX", 10_000)
    worker, caller = Worker(), Caller()
    async with serving(worker) as (_, address), connected(address) as client:
        with pytest.raises(FrameTooLarge):
            client.generate(request(tokens=20_000), caller.outputs.append, caller.losses.append)
        assert client.stream_count == 0
        generate(client, caller)
        await eventually(lambda: bool(worker.requests))


async def test_a_worker_that_breaks_the_protocol_is_disconnected() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\x00\x00\x00\x01\xc1")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    async with connected(format_address(host, port)) as client:
        caller = Caller()
        generate(client, caller)
        await eventually(lambda: bool(caller.losses))
        assert "cannot be read" in caller.losses[0].cause
    server.close()
    await server.wait_closed()


async def test_there_is_a_bound_on_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "CONNECTIONS_MAX", 1)
    worker = Worker()
    async with serving(worker) as (server, address), connected(address) as client:
        await eventually(lambda: len(server.connections) == 1)
        reader, writer = await raw_connection(address)
        with pytest.raises(ConnectionResetError):
            assert await reader.read() == b""
            raise ConnectionResetError
        writer.close()
        assert client.is_connected


@pytest.mark.parametrize(
    "scenario",
    [
        test_a_request_goes_out_and_its_tokens_come_back,
        test_after_a_cancel_nothing_is_delivered_and_the_worker_knows,
        test_a_lost_connection_is_told_once_to_every_open_stream,
        test_it_reconnects_after_a_restart_of_the_worker,
        test_nobody_listening_is_an_error_within_the_time_given,
        test_draining_lets_streams_end_and_takes_no_new_one,
        test_a_sink_may_end_everything,
        test_a_worker_that_breaks_the_protocol_is_disconnected,
    ],
)
def test_it_is_the_same_on_uvloop(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    """Processes run on uvloop, whose transports only look like asyncio's."""
    uvloop.run(scenario())
