"""This frontend on the list of frontends, so that its requests are not kept after its death."""

import asyncio
import logging

from msgspec.structs import replace

from eventstore.errors import LogUnavailable
from eventstore.log import EventLog
from workers.card import FrontendInstance
from workers.discovery import Lease, Leases, OnLost
from workers.errors import DiscoveryError
from workers.registry import record_frontend_removed

RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Presence:
    """Keeps a lease until cancelled, then gives it back.

    A frontend that finds its lease ended has been taken for dead: its requests are released in the
    log, or will be. It makes sure of that, takes the next lease, and leaves it to the router's
    reconciliation to announce what is still running.
    """

    def __init__(
        self, leases: Leases[FrontendInstance], log: EventLog, namespace: str, frontend_id: int
    ) -> None:
        self._leases = leases
        self._log = log
        self._namespace = namespace
        self._frontend_id = frontend_id

    async def run(self, address: str) -> None:
        """address: URL of the HTTP server."""
        instance = FrontendInstance(frontend_id=self._frontend_id, address=address)
        while True:
            cause = await self._hold(instance)
            _log.warning("taken for dead, coming back: %s", cause)
            seq = await self._record_end(instance)
            instance = replace(instance, lease=instance.lease + 1, removed_seq=seq)

    async def _hold(self, instance: FrontendInstance) -> str:
        """Hold a lease; returns why it was lost."""
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def lose(cause: str) -> None:
            if not lost.done():
                lost.set_result(cause)

        lease = await self._register(instance, lose)
        try:
            return await lost
        finally:
            if not lost.done() or lost.cancelled():
                await lease.release()

    async def _register(self, instance: FrontendInstance, lose: OnLost) -> Lease:
        while True:
            try:
                return await self._leases.register(instance, lose)
            except DiscoveryError as error:
                _log.warning("not listed yet, will try again: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _record_end(self, instance: FrontendInstance) -> int:
        while True:
            try:
                return await record_frontend_removed(
                    self._log,
                    self._namespace,
                    instance.frontend_id,
                    instance.lease,
                    instance.removed_seq,
                )
            except LogUnavailable as error:
                _log.warning("the end of our lease is not written yet: %s", error)
