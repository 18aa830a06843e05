"""Looks, twice a second, for what the log, the list and the connections disagree on.

Events tell what changes while somebody watches. What happened while nobody did, or while the log
away or lost its end, is found here, by comparing, and put right with an event or by asking the one
who knows:

| found for longer than a grace                               | done                            |
|---|---|
| a worker in the state that is not listed                    | `worker.removed`                |
| requests of a frontend that is not listed                   | `frontend.removed`              |
| a listed, connected worker that the state does not know     | it is asked to register again   |
| a rank whose cache is in doubt (`RouterState.unbased`)      | it is asked to announce it      |
| own requests: live here, not in the state; or the reverse   | `Router.reconcile`              |
| open streams that their worker does not run; or the reverse | `WorkerClient.audit`            |
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from eventstore.subjects import frontend_producer, hex_id, kv_producer
from frontend.removals import FrontendGone, Gone, WorkerGone
from indexer.radix import WorkerRank
from router.replica import Replica, ReplicaPhase
from router.router import Router
from workers.card import FrontendInstance, Instance
from workers.clients import WorkerClients

LOOK_S = 0.5
RECONCILE_LOOKS = 4
AUDIT_LOOKS = 20
"""Requests and streams are compared at every fourth and twentieth look."""
GRACE_S = 15.0
"""Longer than a lease and the writing of its end take when somebody watches."""
DOUBT_S = 1.0
"""What is missing is usually on its way: a worker registers before it is listed, and announces its
cache right after."""

K = TypeVar("K", bound=Hashable)

_log = logging.getLogger(__name__)


class Overdue(Generic[K]):
    """Which of some findings have been found, without a break, for `grace_s`."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since: dict[K, float] = {}

    def found(self, keys: Iterable[K], now_s: float) -> list[K]:
        """The overdue ones, in order of `keys`; each is then on a new grace."""
        since = {key: self._since.get(key, now_s) for key in keys}
        overdue = [key for key, first_s in since.items() if now_s - first_s >= self._grace_s]
        since.update(dict.fromkeys(overdue, now_s))
        self._since = since
        return overdue

    def forget(self) -> None:
        self._since = {}


class Caretaker:
    """One frontend's. `look` does nothing while the state is not at hand or the log is away."""

    def __init__(
        self,
        *,
        router: Router,
        replica: Replica,
        clients: WorkerClients,
        workers: Callable[[], Mapping[int, Instance]],
        frontends: Callable[[], Mapping[int, FrontendInstance]],
        record: Callable[[Gone], None],
    ) -> None:
        """workers, frontends: those listed now, by id. record: has a removal written."""
        self._router = router
        self._replica = replica
        self._clients = clients
        self._workers = workers
        self._frontends = frontends
        self._record = record
        self._unlisted = Overdue[int](GRACE_S)
        self._orphaned = Overdue[int](GRACE_S)
        self._unknown = Overdue[int](DOUBT_S)
        self._doubted = Overdue[WorkerRank](DOUBT_S)
        self._asked: Counter[WorkerRank] = Counter()
        self._looks = 0

    async def run(self) -> None:
        """Look, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(loop.time())

    def look(self, now_s: float) -> None:
        if self._replica.status().phase is not ReplicaPhase.READY:
            for overdue in (self._unlisted, self._orphaned, self._unknown, self._doubted):
                overdue.forget()
            return
        self._find_gone(now_s)
        self._find_untold(now_s)
        self._looks += 1
        if self._looks % RECONCILE_LOOKS == 0:
            self._router.reconcile()
        if self._looks % AUDIT_LOOKS == 0:
            for client in self._clients:
                client.audit()

    def _find_gone(self, now_s: float) -> None:
        state, listed = self._replica.state, self._workers()
        for worker_id in self._unlisted.found(state.workers.keys() - listed.keys(), now_s):
            _log.warning("worker %s is in the state and not listed", hex_id(worker_id))
            self._record(WorkerGone(worker_id, 0))
        owners = {live.frontend_id for live in state.requests.values()}
        for frontend_id in self._orphaned.found(owners - self._frontends().keys(), now_s):
            _log.warning("frontend %s has requests and is not listed", hex_id(frontend_id))
            before = state.producers.get(frontend_producer(frontend_id))
            lease = 1 if before is None else before.epoch + 1
            self._record(FrontendGone(frontend_id, lease, None))

    def _find_untold(self, now_s: float) -> None:
        state = self._replica.state
        connected = [client for client in self._clients if client.is_connected]
        unknown = {c.worker_id: c for c in connected if c.worker_id not in state.workers}
        for worker_id in self._unknown.found(unknown, now_s):
            _log.warning("worker %s is listed and not in the state: asked", hex_id(worker_id))
            unknown[worker_id].ask_to_announce(None, 0)
        for rank in self._doubted.found(sorted(state.unbased), now_s):
            client = self._clients.get(rank.worker_id)
            if client is None:
                continue
            known = state.producers.get(kv_producer(*rank))
            # Each further asking names a later epoch: what the worker announced in the one before
            # may be what was lost.
            epoch = (0 if known is None else known.epoch) + self._asked[rank]
            _log.info("cache of %s.%d in doubt: asked", hex_id(rank.worker_id), rank.dp_rank)
            client.ask_to_announce(rank.dp_rank, epoch)
            self._asked[rank] += 1
        for rank in self._asked.keys() - state.unbased:
            del self._asked[rank]
