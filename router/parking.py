"""The requests of a frontend that wait for room: parked, released in order, or told to give up.

One queue for each model and role. Whether there is room is looked at whenever load has changed, and
who is released is decided for anew: what was cached where when it came may not be so any more.

All requests of a queue may go to the same ranks, so that the first stands in nobody's way who could
go elsewhere. A request with fewer ranks to choose from than the others never waits: one that names
its rank or is bound to it, and one that moves on, away from the workers that have failed it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from eventstore.events import RequestQueued
from router.admission import Eligible
from router.decision import RoutedRequest
from router.errors import AllWorkersBusy, QueueFull, QueueTimeout, RouterError
from router.queue import ParkedRequest, RequestQueue
from router.selection import Load, RouterMode
from router.ticket import Ticket, Timings, Waiting

if TYPE_CHECKING:
    from router.router import Router


class _Token(NamedTuple):
    ticket: Ticket
    request: RoutedRequest
    waiting: Waiting


class Parking:
    """The queues of one router. Times are of its clock, in seconds."""

    def __init__(self, router: "Router", clock: Callable[[], float]) -> None:
        self.queues: dict[tuple[str, str], RequestQueue] = {}
        """By (model, role)."""
        self.refused = Counter[tuple[str, str, str]]()
        """Requests that reached a bound of a queue, by model, role and bound: `request_limit` or
        `wait_limit`."""
        self._router = router
        self._clock = clock
        self._releasing = False

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self.queues.values()))

    def park(
        self,
        ticket: Ticket,
        request: RoutedRequest,
        waiting: Waiting,
        eligible: Eligible,
        load: Load,
    ) -> bool:
        """Park the request if it must wait: for room, or behind who came before it.

        Raises QueueFull.
        """
        if eligible.mode in (RouterMode.DIRECT, RouterMode.SESSION):
            return False
        if request.avoid or request.dp_rank is not None:
            return False
        queue = self.queues.get((request.model, request.role))
        waits = self._router.must_wait(request, eligible, load)
        if not waits and not queue:
            return False
        parked = ParkedRequest(
            request_id=request.request_id,
            isl=request.isl,
            uncached_tokens=self._uncached(request, eligible),
            arrived_s=self._clock(),
            priority=request.priority,
            strict_priority=request.strict_priority,
            token=_Token(ticket, request, waiting),
        )
        if not waits and queue is not None and not queue.must_wait(parked, parked.arrived_s):
            return False
        if queue is None:
            options = self._router.options
            queue = self.queues[request.model, request.role] = RequestQueue(
                options.queue_policy,
                length_max=options.queue_len_max,
                wait_max_s=options.queue_wait_max_secs,
            )
        depth = len(queue)
        try:
            queue.push(parked)
        except QueueFull:
            self.refused[request.model, request.role, "request_limit"] += 1
            raise
        ticket.queued = RequestQueued(
            request.request_id,
            request.priority,
            request.role,
            request.strict_priority,
            parked.uncached_tokens,
            depth,
        )
        self._router.publish(ticket.queued)
        return True

    def _uncached(self, request: RoutedRequest, eligible: Eligible) -> int:
        """Prompt tokens that the rank with the longest cached prefix would have to compute."""
        _, overlaps = self._router.overlaps(request.sequence_hashes)
        most = max(eligible.candidates.items_of(overlaps))
        return request.isl - most * request.block_size

    def depth_of(self, request: RoutedRequest) -> int:
        """How many others wait where this parked request does."""
        return len(self.queues[request.model, request.role]) - 1

    def remove(self, request_id: str) -> None:
        """The request has ended, wherever it was."""
        for queue in self.queues.values():
            queue.remove(request_id)

    def release(self) -> None:
        """Let requests go on as far as there is room, and end the wait of those that have waited
        too long. What is told of a release may change load again, and that changes nothing: the
        release that runs goes on until there is no room."""
        if self._releasing or not self.queues:
            return
        self._releasing = True
        try:
            for key, queue in list(self.queues.items()):
                for waiting, outcome in self._released(key, queue):
                    if isinstance(outcome, RouterError):
                        waiting.refused(outcome)
                    else:
                        waiting.released(outcome)
        finally:
            self._releasing = False

    def _released(
        self, key: tuple[str, str], queue: RequestQueue
    ) -> Iterator[tuple[Waiting, Timings | RouterError]]:
        router, now_s = self._router, self._clock()
        for late in queue.expired(now_s):
            self.refused[*key, "wait_limit"] += 1
            yield _token(late).waiting, QueueTimeout(now_s - late.arrived_s)
        while len(queue):
            parked = queue.peek(now_s)
            ticket, request, waiting = _token(parked)
            try:
                eligible, load = router.eligible(request)
            except AllWorkersBusy:
                return  # it was let in before they were, and its wait has an end
            except RouterError as error:
                queue.remove(request.request_id)
                yield waiting, error
                continue
            if router.must_wait(request, eligible, load):
                return
            queue.pop(now_s)
            started_s = self._clock()
            waited_s = started_s - parked.arrived_s
            yield waiting, router.decide(ticket, request, eligible, load, started_s, waited_s)


def _token(parked: ParkedRequest) -> _Token:
    token = parked.token
    assert isinstance(token, _Token)
    return token
