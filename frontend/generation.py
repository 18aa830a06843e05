"""One engine stream on its way to a client: routed, sent, turned into text, recorded.

The way of a token is one chain of plain calls: the socket's callback decodes a frame and hands each
output to `_sink`, which counts, detokenizes and hands text to `deliver`. No queue, no task switch;
the handler's task sleeps on `done` until the stream has ended.
"""

import asyncio
from collections.abc import Callable

from frontend.chunks import Timing, timing_of
from frontend.detokenize import IncrementalDetokenizer
from frontend.dispatch import Dispatch
from frontend.errors import Deadline, DeadlineExceeded, code_of, is_overload
from frontend.legs import Job
from frontend.logprobs import Sampled
from frontend.metrics import ModelMetrics
from frontend.service import Service
from indexer.radix import WorkerRank
from router.errors import RouterError
from router.token_histogram import TokenTimes
from workers.errors import CannotConnect
from workers.protocol import Output

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
"""The engine's word → the API's."""


Deliver = Callable[["Generation", str, str | None], None]
"""(generation, new text, finish reason on the last call)."""


def _deliver_nothing(generation: "Generation", text: str, finish_reason: str | None) -> None:
    """What an ended generation delivers."""


class Generation:
    """Runs once. After `start`, `deliver` is called until it gets a finish reason or `done` fails.

    isl, osl: prompt and output tokens. cached_tokens: as the worker reported.
    """

    __slots__ = (
        "_accepted_s", "_deliver", "_detokenizer", "_dispatch", "_metrics", "_sampled",
        "_sampled_taken", "_service", "_times", "cached_tokens", "done", "finish_reason", "index",
        "isl", "job", "osl", "stop_reason", "timing",
    )  # fmt: skip

    def __init__(self, service: Service, job: Job, index: int, deliver: Deliver) -> None:
        self.job = job
        self.index = index
        self.isl = len(job.token_ids)
        self.osl = 0
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.timing: Timing | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._service = service
        self._deliver = deliver
        self._metrics: ModelMetrics = service.metrics.of_model(job.served.card.name)
        # A way of its own, so that tokens without log probabilities pay nothing for them.
        sink = self._sink if job.sampling.logprobs is None else self._sink_sampled
        self._dispatch = Dispatch(service, job, sink, self.fail)
        self._sampled: list[Sampled] = []
        self._sampled_taken = 0
        self._times: TokenTimes | None = None
        self._accepted_s = 0.0
        stop = job.stop
        self._detokenizer = IncrementalDetokenizer(
            job.served.tokenizer,
            job.token_ids,
            skip_special_tokens=job.skip_special_tokens,
            stop=stop.stop,
            include_stop=job.include_stop,
            stop_token_ids=frozenset(stop.stop_token_ids_hidden),
            min_tokens=stop.min_tokens or 0,
        )

    @property
    def worker(self) -> WorkerRank | None:
        """Who serves the request, or did; None before it is routed."""
        ticket = self._dispatch.ticket
        return None if ticket is None else ticket.rank

    @property
    def prefill_worker(self) -> WorkerRank | None:
        """Who computed the prompt."""
        return self._dispatch.prefill_rank

    @property
    def predicted_tokens(self) -> int:
        """Prompt tokens that the router believed cached where it sent the request."""
        routed = self._dispatch.routed_for_prefill
        if routed is None:
            return 0
        # After a migration what was produced before it counts as prompt there.
        return min(self.isl, routed.overlap_blocks * self.job.served.card.block_size)

    def take_sampled(self) -> list[Sampled]:
        """The tokens that came since the last time, with their log probabilities: those up to the
        one that stopped the output, and not that one if it is no part of the output."""
        detokenizer, found = self._detokenizer, self._sampled
        left = detokenizer.token_count - self._sampled_taken
        if isinstance(detokenizer.stop_reason, int):
            left -= 1
        taken, self._sampled = found[:left], found[left:]
        self._sampled_taken += len(taken)
        return taken

    @property
    def is_running(self) -> bool:
        """Started and not ended."""
        return self._dispatch.ticket is not None and not self.done.done()

    def start(self) -> None:
        """Accept the request and begin. Raises RouterError if it is not accepted; then nothing is
        recorded. What goes wrong later ends `done`."""
        # Before the dispatch begins, since that may be at its end at once.
        self._metrics.inflight.inc()
        self._metrics.queued.inc()
        self._service.live.add(self)
        self._accepted_s = self._service.clock()
        try:
            self._dispatch.start()
        except RouterError:
            self._ended()
            raise

    def cancel(self, cause: str) -> None:
        """The client is gone: stop the work, free the booking. Nothing happens after an end."""
        ticket = self._dispatch.ticket
        if ticket is None or self.done.done():
            return
        self._dispatch.close()
        ticket.cancelled(self.osl, cause)
        self._ended()
        self.done.cancel()

    def fail(self, error: Exception) -> None:
        """End with an error. Nothing happens after an end."""
        ticket = self._dispatch.ticket
        if ticket is None or self.done.done():
            return
        self._dispatch.close()
        if isinstance(error, (RouterError, CannotConnect)) and not self.osl:
            self._dispatch.refusal(error)
            self._service.router_metrics.rejected(self.job.served.card.name, code_of(error))
            if is_overload(error):
                self._metrics.rejected(self.job.endpoint)
        else:
            ticket.failed(self.osl, code_of(error))
        self._ended()
        self.done.set_exception(error)

    def check_deadlines(self, now_s: float) -> None:
        """Give up what takes longer than the limits allow. Called every so often, so that a token
        needs no timer of its own."""
        limits, times, dispatch = self._service.deadlines, self._times, self._dispatch
        if limits.total_s is not None and now_s - self.job.started_s > limits.total_s:
            self.fail(self._late("total", limits.total_s))
        elif dispatch.is_prefilling:
            if limits.first_token_s is not None and now_s - dispatch.since_s > limits.first_token_s:
                dispatch.late(self._late("first_token", limits.first_token_s))
        elif limits.inter_token_s is not None and times is not None:
            if now_s - times.last_s > limits.inter_token_s:
                dispatch.late(self._late("inter_token", limits.inter_token_s))

    def _late(self, kind: Deadline, limit_s: float) -> DeadlineExceeded:
        self._service.router_metrics.deadline_exceeded(kind)
        return DeadlineExceeded(kind, limit_s)

    # --- called by the request plane --------------------------------------------------------------

    def _sink(self, output: Output) -> None:
        dispatch = self._dispatch
        if output.error is not None:
            dispatch.output_failed(*output.error)
            return
        token_ids = output.token_ids
        if token_ids:
            now_s = self._service.clock()
            if dispatch.is_prefilling:
                self._first_token(now_s, output.cached_tokens, len(token_ids))
            elif self._times is not None:
                self._times.tokens(now_s, len(token_ids))
            self.osl += len(token_ids)
            dispatch.produced(token_ids)
        detokenizer = self._detokenizer
        text = detokenizer.push(token_ids)
        stopped = detokenizer.stop_reason
        if stopped is not None:
            self.stop_reason = stopped if isinstance(stopped, str) else None
            self._finish(text, "stop", still_running=output.finish_reason is None)
        elif output.finish_reason is not None:
            text += detokenizer.finish()
            reason = "stop" if detokenizer.stop_reason is not None else output.finish_reason
            self._finish(text, FINISH_REASONS.get(reason, reason), still_running=False)
        elif text:
            self._deliver(self, text, None)

    def _sink_sampled(self, output: Output) -> None:
        if output.logprobs is not None:
            # A worker that tells of fewer tokens than it sends is believed in those.
            found = zip(output.token_ids, output.logprobs, strict=False)
            self._sampled += [Sampled(*each) for each in found]
        self._sink(output)

    def _first_token(self, now_s: float, cached_tokens: int | None, count: int) -> None:
        """Of this attempt, with `count - 1` more: after a migration there is another one."""
        self._dispatch.first_token(now_s, cached_tokens)
        if self._times is not None:
            self._times.tokens(now_s, count)
            return
        self._times = TokenTimes(now_s)
        hop = self._dispatch.hop
        self.cached_tokens = cached_tokens if hop is None else hop.cached_tokens
        self._metrics.queued.dec()
        ttft_s, service = now_s - self.job.started_s, self._service
        self._metrics.first_token(ttft_s, self.isl, self.cached_tokens)
        service.router_metrics.first_token(now_s - self._accepted_s, self.isl)
        if self.prefill_worker is not None:
            service.metrics.first_token(self.prefill_worker, ttft_s, self.isl)

    def _finish(self, text: str, reason: str, still_running: bool) -> None:
        ticket = self._dispatch.ticket
        assert ticket is not None
        if still_running:
            self._dispatch.close()
        self.finish_reason = reason
        self.timing = self._timing()
        ticket.completed(self.osl, reason, self.cached_tokens)
        self._dispatch.pin()
        deliver = self._deliver
        self._ended()
        deliver(self, text, reason)
        if not self.done.done():
            self.done.set_result(None)

    def _timing(self) -> Timing:
        dispatch, service = self._dispatch, self._service
        routed = dispatch.routed_for_prefill
        now_s = service.clock()
        hit_rate = None
        if routed is not None and routed.sequence_hashes:
            hit_rate = routed.overlap_blocks / len(routed.sequence_hashes)
        return timing_of(
            received_ms=round(1000 * (service.now_s() - (now_s - self.job.started_s)), 3),
            started_s=self.job.started_s,
            sent_s=dispatch.sent_s,
            first_output_s=None if self._times is None else self._times.first_s,
            ended_s=now_s,
            kv_hit_rate=hit_rate,
            router_queue_depth=dispatch.queue_depth,
        )

    def _ended(self) -> None:
        # What points back here is let go, so that a long prompt's tokens leave memory with their
        # request and not whenever the cycle collector comes by.
        self._dispatch.let_go()
        self._deliver = _deliver_nothing
        self._service.live.discard(self)
        self._metrics.inflight.dec()
        times, worker = self._times, self.worker
        self._metrics.output_ended(self.osl, times)
        if times is None:
            self._metrics.queued.dec()
            return
        self._service.router_metrics.output_ended(self.osl, times)
        if worker is not None and times.mean_s is not None:
            self._service.metrics.output_ended(worker, times.mean_s)
