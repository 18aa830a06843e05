"""Clients of a simulated deployment: prompts with shared beginnings, and impatience."""

import asyncio
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from eventstore.errors import EventStoreError
from frontend.errors import ShuttingDown
from indexer.blocks import prompt_hashes
from router.errors import RouterError
from simulations.processes import MODEL, SimulatedFrontend
from simulations.swarm import Mix, Sizes
from workers.errors import WorkerError
from workers.protocol import EngineRequest, StopConditions

if TYPE_CHECKING:
    from simulations.cluster import Cluster

PREFIX_BLOCKS_MAX = 8
TAIL_BLOCKS_MAX = 3
PATIENCE_S = 1.0
"""Mean time until a client that does not wait for its answer goes away."""


class Workload:
    """Sends all requests, at random times within the run, each to a random running frontend."""

    def __init__(self, cluster: "Cluster", mix: Mix, sizes: Sizes, rng: Random) -> None:
        self.answers: Counter[str] = Counter()
        """What the frontends said at once: taken, the name of an error, or no frontend."""
        self._cluster = cluster
        self._mix = mix
        self._sizes = sizes
        self._rng = rng
        self._prefixes = [
            self._tokens(PREFIX_BLOCKS_MAX * mix.block_size) for _ in range(mix.prefixes)
        ]

    async def run(self) -> None:
        rate = self._sizes.requests / self._sizes.seconds
        for number in range(self._sizes.requests):
            await asyncio.sleep(self._rng.expovariate(rate))
            self._send(f"r{number}")

    def give_up(self) -> None:
        """All clients go away that still wait for an answer."""
        for frontend in self._cluster.running(SimulatedFrontend):
            for request_id in list(frontend.calls):
                frontend.abort(request_id)

    def _send(self, request_id: str) -> None:
        mix, rng = self._mix, self._rng
        request = EngineRequest(
            request_id=request_id,
            model=MODEL,
            token_ids=self._prompt(),
            stop_conditions=StopConditions(max_tokens=rng.randint(1, mix.max_tokens)),
        )
        goes_after_s = PATIENCE_S * rng.expovariate(1) if rng.random() < mix.aborts else None
        frontends = self._cluster.running(SimulatedFrontend)
        if not frontends:
            self.answers["no frontend"] += 1
            return
        frontend = rng.choice(frontends)
        hashes = prompt_hashes(request.token_ids, mix.block_size)
        try:
            frontend.call(request, hashes, mix.block_size)
        except (RouterError, WorkerError, EventStoreError, ShuttingDown) as error:
            self.answers[type(error).__name__] += 1
            return
        self.answers["taken"] += 1
        if goes_after_s is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(goes_after_s, frontend.abort, request_id)

    def _prompt(self) -> list[int]:
        block_size = self._mix.block_size
        prefix = self._rng.choice(self._prefixes)
        shared = self._rng.randint(0, len(prefix))
        return prefix[:shared] + self._tokens(self._rng.randint(1, TAIL_BLOCKS_MAX * block_size))

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(1000) for _ in range(count)]
