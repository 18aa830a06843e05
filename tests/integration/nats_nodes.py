"""nats-servers of a test's own: with any configuration, and three of them as a cluster."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from msgspec import Struct

from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.server import find_server
from tests.waiting import eventually

READY_S = 20.0


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listened a moment ago, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class NatsNode:
    """A nats-server process. `start` and `kill` it as often as needed; `stop` ends it for good."""

    def __init__(
        self,
        directory: Path,
        port: int,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
    ) -> None:
        """env: beside this process's own."""
        self.directory = directory
        self.port = port
        self._arguments = arguments
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def configured(cls, directory: Path, **options: object) -> Self:
        """A server alone, with JetStream on a file store and further `options`."""
        (port,) = free_ports(1)
        defaults = {
            "host": "127.0.0.1",
            "port": port,
            "jetstream": {"store_dir": str(directory / "store")},
        }
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "nats.conf"
        config.write_text(json.dumps(defaults | options))
        return cls(directory, port, ("--config", str(config)))

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.directory / "nats.log").read_text()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Return when it takes connections."""
        self._spawn()
        await eventually(lambda: not self.running or self._listens(), READY_S)
        assert self.running, self.log

    def kill(self) -> None:
        """SIGKILL: what it had not told the kernel is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    def _spawn(self) -> None:
        with (self.directory / "nats.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_server(), *self._arguments], stdout=log, stderr=log, env=self._env
            )

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()


class _Placed(Struct, frozen=True):
    leader: str = ""


class _Info(Struct, frozen=True):
    cluster: _Placed = _Placed()


class NatsCluster:
    """Three servers on loopback. Their names are node-0 to node-2."""

    SIZE = 3

    def __init__(self, directory: Path, options: Sequence[str] = ()) -> None:
        """options: further ones of every server's command line."""
        ports = free_ports(2 * self.SIZE)
        routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[self.SIZE :])
        self.nodes = {
            f"node-{n}": NatsNode(
                directory / f"node-{n}",
                ports[n],
                (
                    *("--name", f"node-{n}", "--addr", "127.0.0.1", "--port", str(ports[n])),
                    *("--jetstream", "--store_dir", str(directory / f"node-{n}" / "store")),
                    *("--cluster_name", "test", "--routes", routes),
                    *("--cluster", f"nats://127.0.0.1:{ports[self.SIZE + n]}"),
                    *options,
                ),
            )
            for n in range(self.SIZE)
        }

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes.values()]

    async def leader(self, nats: Nats, stream: str) -> str:
        """The name of the node that leads `stream`, once one does."""
        found = ""

        async def led() -> bool:
            nonlocal found
            try:
                found = (await nats.api(f"STREAM.INFO.{stream}", None, _Info, 1)).cluster.leader
            except LogUnavailable:
                return False
            return bool(found)

        await eventually(led, READY_S)
        return found

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(node.start() for node in self.nodes.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.kill()
