"""The network between simulated hosts, below asyncio's streams: TCP as far as a program can tell.

`NetworkLoop` gives `create_server` and `create_connection` to programs that know only the loop, so
the real request plane runs unchanged. Bytes arrive in order, after a while. A host that is cut off
sends and receives nothing until it is healed, and then everything, as TCP retransmits; a killed
host's connections are reset. Deadlines are the programs' own.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from random import Random
from typing import Any

from simulations.clock import OWNER, VirtualLoop

FIRST_PORT = 40_000


class Network:
    """All hosts, by name: a task belongs to the host that its owner is named after."""

    def __init__(self, rng: Random, latency_s: float) -> None:
        """latency_s: mean of the time that bytes are under way."""
        self._rng = rng
        self._latency_s = latency_s
        self._cut: set[str] = set()
        self._dead: set[str] = set()
        self._listening: dict[tuple[str, int], _Server] = {}
        self._transports: dict[_Transport, None] = {}
        self._ports = FIRST_PORT
        self._healed = asyncio.Event()

    def cut(self, host: str) -> None:
        self._cut.add(host)

    def heal(self, host: str) -> None:
        self._cut.discard(host)
        self._healed.set()
        for transport in list(self._transports):
            transport.resume()

    def kill(self, host: str) -> None:
        """The host's programs are gone: what they sent arrives, and then a reset."""
        self._dead.add(host)
        for key in [key for key in self._listening if key[0] == host]:
            del self._listening[key]
        for transport in list(self._transports):
            if transport.host == host:
                transport.abort()

    def is_dead(self, host: str) -> bool:
        return host in self._dead

    def connects(self, one: str, other: str) -> bool:
        return one not in self._cut and other not in self._cut

    def delay_s(self) -> float:
        return self._latency_s * self._rng.expovariate(1)

    # --- what the loop asks for -------------------------------------------------------------------

    def listen(self, host: str, port: int, factory: Callable[[], asyncio.Protocol]) -> "_Server":
        if not port:
            self._ports += 1
            port = self._ports
        server = self._listening[host, port] = _Server(self, host, port, factory)
        return server

    async def connect(
        self, host: str, port: int, factory: Callable[[], asyncio.Protocol]
    ) -> tuple["_Transport", asyncio.Protocol]:
        owner = OWNER.get()
        assert owner is not None, "only a host can connect"
        here = owner.name
        await asyncio.sleep(self.delay_s() + self.delay_s())
        while not self.connects(here, host):
            self._healed.clear()
            await self._healed.wait()
        server = self._listening.get((host, port))
        if server is None:
            raise ConnectionRefusedError(f"nobody listens at {host}:{port}")
        near, far = _Transport(self, here, copy_context()), _Transport(self, host, server.context)
        near.peer, far.peer = far, near
        self._transports |= {near: None, far: None}
        near.protocol = factory()
        asyncio.get_running_loop().call_soon(far.accept, server.factory, context=server.context)
        near.protocol.connection_made(near)
        return near, near.protocol

    def close_server(self, server: "_Server") -> None:
        self._listening.pop((server.host, server.port), None)

    def forget(self, transport: "_Transport") -> None:
        self._transports.pop(transport, None)


class _Socket:
    """As much of a socket as the request plane looks at."""

    def __init__(self, port: int = 0) -> None:
        self._port = port

    def setsockopt(self, *_: object) -> None:
        """There is nothing to tune."""

    def getsockname(self) -> tuple[str, int]:
        return "", self._port


class _Server:
    """As much of `asyncio.Server` as the request plane uses."""

    def __init__(
        self, network: Network, host: str, port: int, factory: Callable[[], asyncio.Protocol]
    ) -> None:
        self.host = host
        self.port = port
        self.factory = factory
        self.context = copy_context()
        self.sockets = (_Socket(port),)
        self._network = network

    def close(self) -> None:
        self._network.close_server(self)

    async def wait_closed(self) -> None:
        """Open connections are their owners' business."""


class _Transport(asyncio.Transport):
    """One end of a connection. What is sent waits here until it arrives at the other end."""

    peer: "_Transport"
    protocol: asyncio.Protocol

    def __init__(self, network: Network, host: str, context: Context) -> None:
        super().__init__({"socket": _Socket(), "peername": ("", 0)})
        self.host = host
        self.context = context
        """The one of the program at this end: what is delivered here runs in it."""
        self._network = network
        self._under_way: deque[tuple[float, bytes | ConnectionResetError | None]] = deque()
        """(when it arrives, the bytes or the end: None for an orderly one)."""
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._lost = False

    def accept(self, factory: Callable[[], asyncio.Protocol]) -> None:
        self.protocol = factory()
        self.protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._send(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return sum(len(data) for _, data in self._under_way if isinstance(data, bytes))

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self._end(ConnectionResetError("connection reset by peer"))

    def resume(self) -> None:
        """Go on delivering after a cut."""
        if self._under_way and self._timer is None:
            self._wait()

    def _end(self, how: ConnectionResetError | None) -> None:
        if not self._closing:
            self._closing = True
            self._send(how)  # behind what was written, which has left the host already
            loop = asyncio.get_running_loop()
            loop.call_soon(self._lose, None, context=self.context)

    def _send(self, data: bytes | ConnectionResetError | None) -> None:
        arrives = asyncio.get_running_loop().time() + self._network.delay_s()
        if self._under_way:
            arrives = max(arrives, self._under_way[-1][0])
        self._under_way.append((arrives, data))
        if self._timer is None:
            self._wait()

    def _wait(self) -> None:
        if not self._network.connects(self.host, self.peer.host):
            return  # `resume` will come
        loop = asyncio.get_running_loop()
        arrives = self._under_way[0][0]
        self._timer = loop.call_at(arrives, self._deliver, context=self.peer.context)

    def _deliver(self) -> None:
        self._timer = None
        if not self._network.connects(self.host, self.peer.host):
            return
        _, data = self._under_way.popleft()
        if self._under_way:
            self._wait()
        self._forget_if_done()
        self.peer.receive(data)

    def receive(self, data: bytes | ConnectionResetError | None) -> None:
        if isinstance(data, bytes):
            if not self._closing and not self._network.is_dead(self.host):
                self.protocol.data_received(data)
        else:
            self._closing = True
            self._lose(data)

    def _lose(self, why: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._forget_if_done()
        if not self._network.is_dead(self.host):
            self.protocol.connection_lost(why)

    def _forget_if_done(self) -> None:
        if self._lost and not self._under_way:
            self._network.forget(self)


class NetworkLoop(VirtualLoop):
    """Virtual time, and a network in it."""

    network: Network

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int, **_: Any
    ) -> _Server:
        return self.network.listen(host, port, protocol_factory)

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[_Transport, asyncio.Protocol]:
        return await self.network.connect(host, port, protocol_factory)
