"""What a frontend shows of its connection to NATS, and how it comes back."""

from pathlib import Path

import aiohttp

from eventstore.connect import RECONNECT_WAIT_S, Nats
from eventstore.server import EmbeddedServer
from tests.integration.processes import deployment
from tests.waiting import eventually


async def test_the_connection_is_on_the_metrics_page(nats_url: str, namespace: str) -> None:
    async with deployment(nats_url, namespace) as here:
        frontend = await here.add_frontend()
        async with (
            aiohttp.ClientSession() as session,
            session.get(frontend.url + "/metrics") as page,
        ):
            lines = (await page.text()).splitlines()
    assert "reckon_nats_connected 1.0" in lines
    for name in ("disconnects", "reconnects", "errors", "denials"):
        assert f"reckon_nats_{name}_total 0.0" in lines


async def test_waits_between_attempts_grow_and_differ(tmp_path: Path) -> None:
    """A server that stays away is asked ever less often; one that is back is asked at once."""
    async with EmbeddedServer(tmp_path) as server:
        nats = await Nats.connect([server.url], name="test")
        waits: list[float] = []
    # The server has gone with its block.
    try:

        def grown() -> bool:
            wait_s = float(nats.client.options["reconnect_time_wait"])
            if wait_s not in waits:
                waits.append(wait_s)
            return len(waits) >= 6

        await eventually(grown, 30)
        first_s, longest_s = RECONNECT_WAIT_S
        assert waits[0] <= 1.5 * first_s and max(waits) > 2 * first_s
        assert all(wait_s <= 1.5 * longest_s for wait_s in waits)
        assert not nats.connected and nats.disconnects == 1 and nats.errors >= 5
    finally:
        await nats.close()
