"""What tests of a NATS server with users share: its configuration, and what access is enough."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from eventstore.access import Access
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from tests.integration.nats_nodes import NatsNode

SECRET = "hunter2-and-more"
WAIT_S = 0.5


@asynccontextmanager
async def connected(node: NatsNode, access: Access | None = None) -> AsyncIterator[Nats]:
    nats = await Nats.connect([node.url], name="test", access=access)
    try:
        yield nats
    finally:
        await nats.close()


async def appends(node: NatsNode, access: Access | None = None) -> bool:
    """Whether this access is enough for the log."""
    async with connected(node, access) as nats:
        log = await JetStreamLog.open(nats, "ns")
        appended = await log.append("reckon.ns.control", b"", msg_id="1")
        await log.close()
        return appended.seq == 1


async def refusal(node: NatsNode, access: Access | None = None) -> LogUnavailable:
    with pytest.raises(LogUnavailable) as caught:
        await Nats.connect([node.url], name="test", access=access, wait_s=WAIT_S)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.try_this
    return caught.value


def users(**permissions: object) -> dict[str, object]:
    """A server's configuration with one user, `u`."""
    return {"authorization": {"users": [{"user": "u", "password": SECRET, **permissions}]}}


USER = Access(user="u", password=SECRET)
