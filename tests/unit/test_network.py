"""The simulated network: bytes in order after a while, cuts that hold back, deaths that reset."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from simulations.clock import TaskOwner
from simulations.network import Network, NetworkLoop

LATENCY_S = 0.01


class Recorder(asyncio.Protocol):
    """One end of a connection: what it got, and how it ended."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.append(exc)


class Connected:
    """Hosts `a` and `b`, where `near` at `a` is connected to `far` at `b`."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.near, self.far = Recorder(), Recorder()
        self._hosts = {name: TaskOwner(name) for name in "ab"}
        self._port = 0

    async def open(self) -> None:
        await self._hosts["b"].spawn(self._listen())
        await self.connect()
        await asyncio.sleep(1)

    async def connect(self) -> None:
        await self._hosts["a"].spawn(self._connect())

    async def _listen(self) -> None:
        server = await asyncio.get_running_loop().create_server(lambda: self.far, "b", 0)
        self._port = server.sockets[0].getsockname()[1]

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self.near, "b", self._port)


def run(main: Callable[[Connected], Awaitable[None]]) -> None:
    async def connected() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, NetworkLoop)
        loop.network = Network(Random(1), LATENCY_S)
        two = Connected(loop.network)
        await two.open()
        await main(two)

    with asyncio.Runner(loop_factory=NetworkLoop) as runner:
        runner.run(connected())


def test_bytes_arrive_in_order_and_the_end_after_them() -> None:
    async def main(two: Connected) -> None:
        two.near.transport.write(b"hello")
        await asyncio.sleep(1)
        for number in range(50):
            two.far.transport.write(b"%d," % number)
        two.far.transport.close()
        two.far.transport.write(b"too late")
        await asyncio.sleep(1)
        assert two.far.data == b"hello"
        assert two.near.data == b"".join(b"%d," % number for number in range(50))
        assert two.near.ends == [None] and two.far.ends == [None]

    run(main)


def test_a_cut_holds_everything_back_until_it_is_healed() -> None:
    async def main(two: Connected) -> None:
        two.network.cut("a")
        two.far.transport.write(b"patience")
        two.far.transport.close()
        await asyncio.sleep(100)
        assert two.near.data == b"" and not two.near.ends
        two.network.heal("a")
        await asyncio.sleep(1)
        assert two.near.data == b"patience" and two.near.ends == [None]

    run(main)


def test_a_killed_host_hears_nothing_and_its_peers_are_reset() -> None:
    async def main(two: Connected) -> None:
        two.far.transport.write(b"last words")
        two.network.kill("b")
        two.near.transport.write(b"?")
        await asyncio.sleep(1)
        assert two.near.data == b"last words"
        assert [type(end) for end in two.near.ends] == [ConnectionResetError]
        assert two.far.data == b"" and not two.far.ends
        with pytest.raises(ConnectionRefusedError):
            await two.connect()

    run(main)
