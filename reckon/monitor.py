"""Asks the frontends how things stand, and keeps what a restarted frontend no longer knows."""

import asyncio

from reckon.child import Child, ChildState
from reckon.probe import Frontend
from reckon.screen import Digests, Replica, Status


class Monitor:
    """Reads the state of a deployment; changes nothing in it."""

    def __init__(self, workers: list[Child], frontends: dict[str, Frontend]) -> None:
        """frontends: by name."""
        self._workers = workers
        self._frontends = frontends
        self._digests = Digests()
        self._done = {name: Odometer() for name in frontends}

    async def status(self, up_s: float) -> Status:
        """Ask every frontend at once; at most `probe.ANSWER_S` long."""
        asked = (self._replica(name, frontend) for name, frontend in self._frontends.items())
        replicas = await asyncio.gather(*asked)
        return Status(
            up_s=up_s,
            workers_up=sum(worker.state is ChildState.READY for worker in self._workers),
            workers=len(self._workers),
            replicas=tuple(replicas),
            digests=self._digests.verdict,
        )

    async def listed_by_all(self) -> set[int]:
        """The workers that every frontend lists now; empty if one does not answer."""
        asked = (frontend.health() for frontend in self._frontends.values())
        answers = await asyncio.gather(*asked)
        return set.intersection(*(a.worker_ids() if a is not None else set() for a in answers))

    async def _replica(self, name: str, frontend: Frontend) -> Replica:
        health, requests = await asyncio.gather(frontend.health(), frontend.requests())
        if requests is not None:
            self._done[name].read(requests.done)
        done = self._done[name].total
        if health is None:
            return Replica(name, done=done)
        log, digest = health.log, health.replica.digest
        if digest is not None:
            self._digests.saw(name, log.cursor, digest)
        return Replica(
            name,
            cursor=log.cursor,
            head=log.head,
            lag=log.lag,
            done=done,
            in_flight=requests.in_flight if requests is not None else 0,
        )


class Odometer:
    """A total that goes on where a counter begins anew, as it does when its process restarts."""

    def __init__(self) -> None:
        self.total = 0
        self._last = 0

    def read(self, counter: int) -> None:
        """The counter reads `counter` now."""
        self.total += counter - self._last if counter >= self._last else counter
        self._last = counter
