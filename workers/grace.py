"""The grace period of a bucket of leases: while it lasts, an expired lease may be a live process's.

A lease ends by the server's clock, whether or not its owner could renew it. Nobody could while a
server alone was down, or while no server of a cluster led the bucket; what is due by then ends for
all at once when the server is back, or by the hand of the next leader. So for a while from then on
watches do not believe that a lease expired, and an owner may reclaim its own: write its record
again under the same key. Lock services do the same after a restart, NFSv4 and Chubby among them.

In a cluster a bucket with a single copy has no election and so no grace period.
"""

import asyncio
import math
from datetime import datetime

from msgspec import Struct

from eventstore.connect import JetStreamRefused, Nats, NotPermitted
from eventstore.errors import LogUnavailable

ASK_AGAIN_S = 0.25
"""How long an answer may take, and how long to wait for the next one while there is none."""


class _Leadership(Struct, frozen=True):
    leader: str = ""
    """Empty: there is none now, says a server that is not."""
    leader_since: datetime | None = None
    """None: the bucket has a single copy."""


class _Led(Struct, frozen=True):
    """What JetStream says of a bucket's leader, and when; both by that server's clock."""

    ts: datetime
    cluster: _Leadership | None = None


class GracePeriod:
    """That of one bucket, as one connection sees it. Does not own the connection."""

    def __init__(self, connection: Nats, bucket: str, length_s: float) -> None:
        """length_s: how long it is, from the start of a server alone or of a leadership."""
        self._nats = connection
        self._bucket = bucket
        self._length_s = length_s
        self._server_id = connection.server_id
        self._restart_over_s = 0.0
        connection.on_connected.add(self._on_reconnect)

    def close(self) -> None:
        """Watch the connection no longer. Safe to call twice."""
        self._nats.on_connected.discard(self._on_reconnect)

    @property
    def surely_over(self) -> bool:
        """Whether an expiry can be believed without asking anybody: never in a cluster."""
        return (
            self._nats.connected
            and not self._nats.clustered
            and asyncio.get_running_loop().time() >= self._restart_over_s
        )

    async def left_s(self) -> float:
        """Seconds that it still lasts; 0: it is over, or the server will not say who leads.

        Returns once there is a connection and, in a cluster, somebody who leads. Raises
        LogUnavailable when the connection is closed.
        """
        while True:
            await self._nats.wait_connected()
            if not self._nats.clustered:
                return max(0.0, self._restart_over_s - asyncio.get_running_loop().time())
            age_s = await self._leader_age_s()
            if age_s is not None:
                return max(0.0, self._length_s - age_s)
            await asyncio.sleep(ASK_AGAIN_S)

    async def _leader_age_s(self) -> float | None:
        """For how long the bucket has been led; None: nobody leads, or nobody says so."""
        try:
            led = await self._nats.api(f"STREAM.INFO.KV_{self._bucket}", None, _Led, ASK_AGAIN_S)
        except NotPermitted:
            return math.inf
        except JetStreamRefused as refused:
            return math.inf if refused.final else None
        except LogUnavailable:
            return None
        if led.cluster is not None and not led.cluster.leader:
            return None
        if led.cluster is None or led.cluster.leader_since is None:
            return math.inf
        return (led.ts - led.cluster.leader_since).total_seconds()

    def _on_reconnect(self) -> None:
        # To be cut off from a server that ran on says nothing: others could renew meanwhile.
        if self._nats.server_id != self._server_id:
            self._server_id = self._nats.server_id
            self._restart_over_s = asyncio.get_running_loop().time() + self._length_s
