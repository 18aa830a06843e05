"""The clients of all listed workers, following what discovery says.

A worker whose lease ended is given up at once: its streams are lost, so that they can go elsewhere.
One that took itself off the list is shutting down in order: it may finish its streams. So may one
whose lease ended while its address is listed under a new id: that process is alive and has only
lost its lease.
"""

import asyncio
import logging
import random
from collections.abc import Iterator

from workers.card import Instance
from workers.discovery import Ending
from workers.tcp_client import Changed, WorkerClient

DRAIN_S_MAX = 60.0
"""How long a worker that is shutting down may take to finish; a backstop, workers end earlier."""

_logger = logging.getLogger(__name__)


class WorkerClients:
    """One `WorkerClient` per listed worker. `put` and `remove` fit `Discovery.watch`."""

    def __init__(
        self,
        rng: random.Random | None = None,
        *,
        on_connected: Changed = lambda worker_id: None,
        on_disconnected: Changed = lambda worker_id: None,
    ) -> None:
        """on_connected, on_disconnected: called with a worker_id whenever its connection stands,
        or stands no longer; they must not raise."""
        self._rng = rng if rng is not None else random.Random()
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._listed: dict[int, WorkerClient] = {}
        self._unreleased: dict[WorkerClient, None] = {}  # ordered, unlike a set
        self._deadlines: dict[WorkerClient, asyncio.TimerHandle] = {}

    def __iter__(self) -> Iterator[WorkerClient]:
        """The clients of the listed workers."""
        return iter(list(self._listed.values()))

    def __len__(self) -> int:
        return len(self._listed)

    def get(self, worker_id: int) -> WorkerClient | None:
        """The client of a listed worker, connected or not."""
        return self._listed.get(worker_id)

    def is_connected(self, worker_id: int) -> bool:
        client = self._listed.get(worker_id)
        return client is not None and client.is_connected

    def put(self, instance: Instance) -> None:
        """A worker is listed: begin to connect to it. Nothing happens if it already was."""
        known = self._listed.get(instance.worker_id)
        if known is not None and known.address == instance.address:
            return
        if known is not None:
            self.remove(instance, Ending.EXPIRED)
        try:
            client = WorkerClient(
                instance.worker_id,
                instance.address,
                self._rng,
                on_connected=self._on_connected,
                on_disconnected=self._on_disconnected,
            )
        except ValueError as error:
            _logger.error("worker left out worker=%016x why=%s", instance.worker_id, error)
            return
        self._listed[instance.worker_id] = client
        self._unreleased[client] = None
        client.start().add_done_callback(lambda _: self._released(client))

    def remove(self, instance: Instance, ending: Ending) -> None:
        """A worker is no longer listed. Nothing happens if it never was."""
        client = self._listed.pop(instance.worker_id, None)
        if client is not None:
            self._leave(client, ending)

    async def close(self) -> None:
        """Close all connections; open streams are lost."""
        self._listed.clear()
        clients = list(self._unreleased)
        for client in clients:
            client.close("the frontend is shutting down")
        for client in clients:
            await client.wait_closed()

    def _leave(self, client: WorkerClient, ending: Ending) -> None:
        alive = any(client.address == listed.address for listed in self)
        if ending is Ending.EXPIRED and not alive:
            client.close("its lease ended")
            return
        client.drain()
        if client in self._unreleased:
            self._deadlines[client] = asyncio.get_running_loop().call_later(
                DRAIN_S_MAX, client.close, f"did not finish within {DRAIN_S_MAX:.0f} s"
            )

    def _released(self, client: WorkerClient) -> None:
        self._unreleased.pop(client, None)
        deadline = self._deadlines.pop(client, None)
        if deadline is not None:
            deadline.cancel()
