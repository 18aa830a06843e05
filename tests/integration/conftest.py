"""A real nats-server for the whole session, and a namespace of its own for each test."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from eventstore.connect import Nats
from eventstore.server import EmbeddedServer


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a nats-server with JetStream on a file store, on a free port."""
    server = EmbeddedServer(tmp_path_factory.mktemp("nats"))
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture
def namespace() -> str:
    """One that no other test uses."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
async def nats(nats_url: str) -> AsyncIterator[Nats]:
    """A connection to the session's server."""
    connection = await Nats.connect([nats_url], name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A nats-server that the test may stop, pause and start again."""
    server = EmbeddedServer(tmp_path / "nats")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
