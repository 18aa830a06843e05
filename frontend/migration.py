"""What a request takes along when it moves on to another worker, and whether it may.

The tokens that it has produced go behind its prompt and count towards its limits, so a worker that
never saw it goes on where the last one stopped, and the client sees one stream.

It may not move on where it can't be continued as it would have gone on: the client named its
worker; or there is output, and with it state that only the lost worker had: how far a grammar has
advanced, or what the other choices of the same prompt are.
"""

from msgspec.structs import replace

from frontend.errors import (
    DeadlineExceeded,
    EngineOverloaded,
    EngineRefused,
    EngineShutDown,
)
from frontend.legs import Job
from indexer.blocks import prompt_hashes
from router.decision import RoutedRequest
from workers.errors import CannotConnect, FrameTooLarge, WorkerBacklogged, WorkerLost
from workers.protocol import StopConditions

MOVED_ON_AFTER = (
    WorkerLost,
    CannotConnect,
    WorkerBacklogged,
    EngineOverloaded,
    EngineShutDown,
    DeadlineExceeded,
)
"""Errors that another worker may not have. An engine that fails on a request fails elsewhere, too;
only the computing of a prompt, which nobody has seen anything of, is tried again after that."""
SAME_EVERYWHERE = (EngineRefused, FrameTooLarge)
"""What a request meets at every worker, and no worker is to blame for."""


class Migration:
    """Of one request. limit: how often it may move on; 0: never, and nothing is kept for it."""

    __slots__ = ("_is_named", "_job", "_leaves_state", "_limit", "avoid", "count", "produced")

    def __init__(self, job: Job, limit: int) -> None:
        hints, sampling = job.hints, job.sampling
        self._job = job
        self._limit = limit
        self._is_named = hints.worker_id is not None or hints.prefill_worker_id is not None
        self._leaves_state = sampling.guided_decoding is not None or (sampling.n or 1) > 1
        self.count = 0
        self.avoid: frozenset[int] = frozenset()
        """Workers that have failed the request."""
        self.produced: list[int] = []
        """The output so far, for whoever sees it to add to; nothing is, if the limit is 0."""

    @property
    def is_on(self) -> bool:
        return self._limit > 0

    @property
    def is_complete(self) -> bool:
        """All tokens have come that may; only the word that it is all has not."""
        limit = self._job.stop.max_tokens
        return limit is not None and len(self.produced) >= limit

    def allows(self, error: Exception, *, in_prefill_hop: bool = False) -> bool:
        """Whether the request may move on after this error of its worker.

        in_prefill_hop: the worker was to compute the prompt only.
        """
        if self.count >= self._limit or self._is_named or (self._leaves_state and self.produced):
            return False
        if in_prefill_hop:
            return not isinstance(error, SAME_EVERYWHERE)
        return isinstance(error, MOVED_ON_AFTER)

    def leave(self, worker_id: int) -> None:
        """The request moves on, and does not come back to this worker."""
        self.count += 1
        self.avoid |= {worker_id}

    def token_ids(self) -> list[int]:
        """What the next worker gets as the prompt."""
        return self._job.token_ids + self.produced if self.produced else self._job.token_ids

    def stop_conditions(self) -> StopConditions:
        """What ends the rest of the output."""
        stop, done = self._job.stop, len(self.produced)
        if not done:
            return stop
        return replace(
            stop,
            max_tokens=None if stop.max_tokens is None else stop.max_tokens - done,
            min_tokens=None if stop.min_tokens is None else max(0, stop.min_tokens - done),
        )

    def rest(self, request: RoutedRequest) -> RoutedRequest:
        """The request, as routed before, with all that was produced behind its prompt.

        Hashes the prompt anew if there is more of it: O(tokens).
        """
        tokens = self.token_ids()
        if len(tokens) == request.isl:
            return request
        expected = self._job.hints.expected_osl
        return replace(
            request,
            isl=len(tokens),
            sequence_hashes=prompt_hashes(tokens, request.block_size),
            max_tokens=self.stop_conditions().max_tokens,
            expected_osl=None if expected is None else max(1, expected - len(self.produced)),
        )
