"""Pins on the request plane: sent and forgotten."""

import pytest

from tests.unit.test_tcp import Worker, connected, serving
from tests.waiting import eventually
from workers import tcp_client
from workers.protocol import Pin


async def test_a_pin_goes_out_and_is_not_answered() -> None:
    worker = Worker()
    async with serving(worker) as (_, address), connected(address) as client:
        client.pin(1, [1, 2, 3], 600)
        await eventually(lambda: worker.pins == [Pin(1, [1, 2, 3], 600)])
        assert client.is_connected
    client.pin(1, [1, 2, 3], 600)  # nobody there: nothing happens


async def test_a_pin_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    async with serving(worker) as (_, address), connected(address) as client:
        monkeypatch.setattr(tcp_client, "FRAME_BYTES_MAX", 64)
        client.pin(0, [70_000] * 100, 600)
        client.pin(0, [1], 600)
        await eventually(lambda: worker.pins == [Pin(0, [1], 600)])
