"""One router configuration over one trace, in virtual time: who waits how long for what.

A discrete event simulation of the real parts: the router with its fold, index and bookings decides
from encoded records, `MockEngine` serves. Requests come at their recorded times; the network takes
no time. Equal arguments give equal results, to the byte.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import ceil
from random import Random
from typing import cast

from msgspec import Struct

from eventstore.publisher import Publisher
from eventstore.subjects import request_producer
from indexer.blocks import prompt_hashes
from router.decision import RoutedRequest, RouterOptions
from router.errors import RouterError
from router.replica import Replica
from router.router import Router
from router.ticket import Ticket, Waiting
from simulations.compare_fleet import (
    ARRIVAL,
    EPOCH_NS,
    MODEL,
    NS_PER_MS,
    Clock,
    Feed,
    Fleet,
    Mirror,
    SimulatedWorker,
    VirtualLog,
    prompt_tokens,
)
from simulations.report import Spread, spread_ms
from simulations.trace import TraceRequest
from workers.engine import RequestRefused, StepResult
from workers.protocol import EngineRequest, SamplingOptions, StopConditions

FRONTEND_ID = 1
_NS_PER_US = 1_000
_NS_PER_S = 1_000_000_000
_AFTER_NS = 1_000
"""A wait has surely ended so long after its end, whichever way a sum of seconds was rounded."""


class WorkerShare(Struct, frozen=True, kw_only=True):
    """What one worker did. `busy_share`: of the time from the first arrival to the last token."""

    requests: int
    computed_tokens: int
    """Prompt tokens that it computed, those computed again included, and output tokens."""
    busy_share: float


class Result(Struct, frozen=True, kw_only=True):
    """A configuration in numbers. Times in virtual ms; shares in 0 … 1.

    ITL runs over all gaps between successive tokens of a request, to 1 µs; all other times over
    requests. Latency is from arrival to last token. Requests that failed count in `errors` only.
    """

    requests: int
    errors: int
    cached_share: float
    """Prompt tokens that workers took from their cache, of all prompt tokens."""
    predicted_share: float
    """Prompt tokens that the router believed cached where it sent them, of all prompt tokens."""
    ttft_ms: Spread
    itl_ms: Spread
    latency_ms: Spread
    queue_wait_ms: Spread
    """From arrival to the router's decision."""
    imbalance: float
    """Computed tokens of the worker with the most, over the mean of all workers; 1 is even."""
    duration_s: float
    """Virtual time from the first arrival to the last token."""
    workers: list[WorkerShare]


class Run(Struct, frozen=True, kw_only=True):
    """A result, and the sample behind its TTFT for a plot."""

    result: Result
    ttft_ms: list[float]
    """Ascending."""


class _Live:
    """A request that has come and not ended. Times in ns; -1 before they are known."""

    __slots__ = (
        "arrived_ns",
        "last_ns",
        "number",
        "prompt",
        "request",
        "routed_ns",
        "ticket",
        "tokens",
    )

    def __init__(
        self,
        number: int,
        request: TraceRequest,
        prompt: "array[int]",
        ticket: Ticket,
        arrived_ns: int,
    ) -> None:
        """number: its place in the trace."""
        self.number = number
        self.request = request
        self.prompt = prompt
        self.ticket = ticket
        self.arrived_ns = arrived_ns
        self.routed_ns = self.last_ns = -1
        self.tokens = 0


class Comparison:
    """One run; make one, call `run` once."""

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        fleet: Fleet,
        options: RouterOptions,
        rng: Random,
        *,
        speed: float = 1.0,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """requests: in order of time, at least one. rng: the router's. speed: recorded times are
        divided by it. on_ended: called as each request ends."""
        self._requests = requests
        self._fleet = fleet
        self._speed = speed
        self._on_ended = on_ended
        self._queue_wait_max_secs = options.queue_wait_max_secs
        self._clock = clock = Clock()
        self._log = log = VirtualLog(clock, fleet.event_delay_ns)
        self._workers = {
            worker_id: SimulatedWorker(
                worker_id, fleet, clock, log, self._deliver, waiting_max=len(requests)
            )
            for worker_id in range(1, fleet.workers + 1)
        }
        clock.run()  # until the router knows all workers
        self._start_ns = self._last_ns = clock.now_ns
        self._router = Router(
            # A router uses little of its replica and publisher, and the stand-ins have that much.
            replica=cast(Replica, Mirror(log)),
            publisher=cast(Publisher, Feed(log, request_producer(FRONTEND_ID))),
            options=options,
            frontend_id=FRONTEND_ID,
            rng=rng,
            clock=lambda: clock.now_ns / _NS_PER_S,
            now_ns=lambda: EPOCH_NS + clock.now_ns,
        )
        log.observe = self._router.observe
        for worker_id in self._workers:
            self._router.serve(worker_id, MODEL)
        self._block_numbers: dict[int, int] = {}
        self._live: dict[str, _Live] = {}
        self._errors = self._prompt_tokens = self._cached_tokens = self._predicted_tokens = 0
        self._ttft_ns = array("q")
        self._latency_ns = array("q")
        self._queue_wait_ns = array("q")
        self._gaps_us: Counter[int] = Counter()

    def run(self) -> Run:
        """All requests, to the end of the last one."""
        first_ms = self._requests[0].timestamp_ms
        for number, request in enumerate(self._requests):
            after_ns = round((request.timestamp_ms - first_ms) * NS_PER_MS / self._speed)
            self._arrive_at(self._start_ns + after_ns, number, request)
        self._clock.run()
        assert not self._live, "requests that never ended"
        return Run(result=self._result(), ttft_ms=[ns / NS_PER_MS for ns in sorted(self._ttft_ns)])

    def _arrive_at(self, time_ns: int, number: int, request: TraceRequest) -> None:
        self._clock.at(time_ns, ARRIVAL, lambda: self._arrive(number, request))

    def _arrive(self, number: int, request: TraceRequest) -> None:
        request_id = f"r{number}"
        numbers = self._block_numbers
        blocks = [numbers.setdefault(each, len(numbers)) for each in request.hash_ids]
        tokens = prompt_tokens(blocks, request.input_length)
        self._prompt_tokens += request.input_length
        routed_request = RoutedRequest(
            request_id=request_id,
            model=MODEL,
            endpoint="completions",
            isl=request.input_length,
            block_size=self._fleet.block_size,
            sequence_hashes=prompt_hashes(tokens, self._fleet.block_size),
            max_tokens=request.output_length,
            streaming=True,
        )
        try:
            ticket = self._router.accept(routed_request)
        except RouterError:
            self._fail()
            return
        live = _Live(number, request, tokens, ticket, self._clock.now_ns)
        self._live[request_id] = live
        waiting = Waiting(lambda _: self._send(live), lambda error: self._refused(live, error))
        try:
            is_parked = ticket.route(waiting) is None
        except RouterError as error:
            self._refused(live, error)
            return
        if is_parked:
            # Who waits too long is told so when load changes, or by someone who looks.
            wait_ns = round(self._queue_wait_max_secs * _NS_PER_S) + _AFTER_NS
            self._clock.at(live.arrived_ns + wait_ns, ARRIVAL, self._router.release)
        else:
            self._send(live)

    def _refused(self, live: _Live, error: RouterError) -> None:
        """By the router, at once or after a wait."""
        del self._live[live.ticket.request_id]
        live.ticket.rejected(type(error).__name__, 503)
        self._fail()

    def _send(self, live: _Live) -> None:
        """To the worker that the router has chosen."""
        routed = live.ticket.routed
        assert routed is not None
        live.routed_ns = self._clock.now_ns
        request = EngineRequest(
            request_id=routed.request_id,
            model=MODEL,
            token_ids=cast("list[int]", live.prompt),  # which spares a conversion
            stop_conditions=StopConditions(max_tokens=live.request.output_length, ignore_eos=True),
            # Equal prompts get different answers, as traces of real traffic have them.
            sampling_options=SamplingOptions(seed=live.number),
        )
        worker = self._workers[routed.worker_id]
        try:
            worker.engine.submit(request)
        except RequestRefused as refused:
            del self._live[routed.request_id]
            live.ticket.failed(0, refused.code)
            self._fail()
            return
        self._predicted_tokens += routed.overlap_blocks * self._fleet.block_size
        worker.requests += 1
        worker.wake()

    def _deliver(self, result: StepResult) -> None:
        now_ns = self._clock.now_ns
        for output in result.outputs:
            live = self._live[output.request_id]
            if live.tokens:
                self._gaps_us[(now_ns - live.last_ns + _NS_PER_US // 2) // _NS_PER_US] += 1
            else:
                self._first_token(live, output.cached_tokens)
            live.tokens += len(output.token_ids)
            live.last_ns = now_ns
            live.ticket.produced(live.tokens)
            if output.finish_reason is not None:
                del self._live[output.request_id]
                live.ticket.completed(live.tokens, output.finish_reason, live.ticket.cached_tokens)
                self._latency_ns.append(now_ns - live.arrived_ns)
                self._last_ns = now_ns
                self._on_ended()

    def _first_token(self, live: _Live, cached_tokens: int | None) -> None:
        now_ns = self._clock.now_ns
        live.ticket.prefill_completed(cached_tokens, (now_ns - live.routed_ns) / NS_PER_MS)
        self._cached_tokens += cached_tokens or 0
        self._ttft_ns.append(now_ns - live.arrived_ns)
        self._queue_wait_ns.append(live.routed_ns - live.arrived_ns)

    def _fail(self) -> None:
        self._errors += 1
        self._on_ended()

    def _result(self) -> Result:
        duration_ns = self._last_ns - self._start_ns
        workers = [
            WorkerShare(
                requests=worker.requests,
                computed_tokens=worker.computed_tokens,
                busy_share=round(worker.busy_ns / duration_ns, 6) if duration_ns else 0.0,
            )
            for worker in self._workers.values()
        ]
        computed = [worker.computed_tokens for worker in workers]
        total = sum(computed)
        return Result(
            requests=len(self._requests),
            errors=self._errors,
            cached_share=round(self._cached_tokens / self._prompt_tokens, 6),
            predicted_share=round(self._predicted_tokens / self._prompt_tokens, 6),
            ttft_ms=spread_ms(ns / 1e9 for ns in self._ttft_ns),
            itl_ms=counted_spread_ms(self._gaps_us),
            latency_ms=spread_ms(ns / 1e9 for ns in self._latency_ns),
            queue_wait_ms=spread_ms(ns / 1e9 for ns in self._queue_wait_ns),
            imbalance=round(max(computed) * len(computed) / total, 6) if total else 1.0,
            duration_s=round(duration_ns / 1e9, 6),
            workers=workers,
        )


def counted_spread_ms(counts_us: Mapping[int, int]) -> Spread:
    """The spread, in ms, of a sample in µs that is given as value → how often.

    Percentiles are values of the sample (nearest rank). O(distinct values).
    """
    total = sum(counts_us.values())
    if not total:
        return Spread(p50=None, p90=None, p99=None, mean=None)
    values = sorted(counts_us)
    reached = list(accumulate(map(counts_us.__getitem__, values)))
    p50, p90, p99 = (
        values[bisect_left(reached, ceil(total * percent / 100))] / 1e3 for percent in (50, 90, 99)
    )
    mean = sum(value * count for value, count in counts_us.items()) / total / 1e3
    return Spread(p50=p50, p90=p90, p99=p99, mean=round(mean, 3))
