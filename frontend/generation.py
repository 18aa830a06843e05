"""One engine stream on its way to a client: routed, sent, turned into text, recorded.

The way of a token is one chain of plain calls: the socket's callback decodes a frame and hands each
output to `_sink`, which counts, detokenizes and hands text to `deliver`. No queue, no task switch;
the handler's task sleeps on `done` until the stream has ended.
"""

import asyncio
import logging
from collections.abc import Callable

from msgspec import Struct

from frontend.detokenize import IncrementalDetokenizer
from frontend.errors import code_of, engine_error, row_of
from frontend.metrics import ModelMetrics, TokenTimes
from frontend.served import ServedModel
from frontend.service import Service
from indexer.blocks import prompt_hashes
from router.decision import RoutedRequest
from router.errors import RouterError
from router.router import Ticket
from workers.errors import CannotConnect, WorkerError, WorkerLost
from workers.protocol import EngineRequest, Output, SamplingOptions, StopConditions
from workers.tcp_client import StreamHandle

_log = logging.getLogger(__name__)

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
"""The engine's word → the API's."""


class Job(Struct, frozen=True, kw_only=True):
    """What is to be generated, for one prompt of one HTTP request."""

    request_id: str
    endpoint: str
    streaming: bool
    served: ServedModel
    token_ids: list[int]
    stop: StopConditions
    sampling: SamplingOptions
    include_stop: bool
    skip_special_tokens: bool
    worker_id: int | None
    started_s: float
    """When the handler began, by the service's clock."""


Deliver = Callable[["Generation", str, str | None], None]
"""(generation, new text, finish reason on the last call)."""


def _deliver_nothing(generation: "Generation", text: str, finish_reason: str | None) -> None:
    """What an ended generation delivers."""


class Generation:
    """Runs once. After `start`, `deliver` is called until it gets a finish reason or `done` fails.

    isl, osl: prompt and output tokens. cached_tokens: as the worker reported. predicted_tokens:
    prompt tokens that the router believed cached where it sent the request.
    """

    __slots__ = (
        "_deliver", "_detokenizer", "_metrics", "_service", "_stream", "_ticket", "_times",
        "cached_tokens", "done", "finish_reason", "index", "isl", "job", "osl",
        "predicted_tokens", "stop_reason",
    )  # fmt: skip

    def __init__(self, service: Service, job: Job, index: int, deliver: Deliver) -> None:
        self.job = job
        self.index = index
        self.isl = len(job.token_ids)
        self.osl = 0
        self.cached_tokens: int | None = None
        self.predicted_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._service = service
        self._deliver = deliver
        self._metrics: ModelMetrics = service.metrics.of_model(job.served.card.name)
        self._ticket: Ticket | None = None
        self._stream: StreamHandle | None = None
        self._times: TokenTimes | None = None
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
    def worker(self) -> tuple[int, int] | None:
        """(worker_id, dp_rank) that serves the request; None before it is routed."""
        rank = None if self._ticket is None else self._ticket.rank
        return None if rank is None else (rank.worker_id, rank.dp_rank)

    @property
    def is_running(self) -> bool:
        """Started and not ended."""
        return self._ticket is not None and not self.done.done()

    def start(self) -> None:
        """Accept, route and send. Raises RouterError or WorkerError; the end is then recorded."""
        service, job = self._service, self.job
        clock = service.clock
        card = job.served.card
        hashing_s = clock()
        hashes = prompt_hashes(job.token_ids, card.block_size)
        hashing_s = clock() - hashing_s
        ticket = service.router.accept(
            RoutedRequest(
                request_id=job.request_id,
                model=card.name,
                endpoint=job.endpoint,
                isl=self.isl,
                block_size=card.block_size,
                sequence_hashes=hashes,
                max_tokens=job.stop.max_tokens,
                streaming=job.streaming,
                worker_id=job.worker_id,
            )
        )
        try:
            timings = ticket.route()
            routed = ticket.routed
            assert routed is not None
            self.predicted_tokens = routed.overlap_blocks * card.block_size
            hit_rate = routed.overlap_blocks / len(hashes) if hashes else None
            service.router_metrics.routed(hashing_s, timings, hit_rate)
            self._stream = self._send(routed.worker_id, routed.dp_rank)
        except (RouterError, WorkerError) as error:
            row = row_of(error)
            ticket.rejected(code_of(error), row.status)
            raise
        self._ticket = ticket
        self._metrics.inflight.inc()
        self._metrics.queued.inc()
        service.live.add(self)

    def _send(self, worker_id: int, dp_rank: int) -> StreamHandle:
        client = self._service.clients.get(worker_id)
        if client is None:
            raise CannotConnect(worker_id, "", "it just left")
        job = self.job
        request = EngineRequest(
            request_id=job.request_id,
            model=job.served.card.name,
            token_ids=job.token_ids,
            dp_rank=dp_rank,
            stop_conditions=job.stop,
            sampling_options=job.sampling,
            eos_token_ids=job.served.card.eos_token_ids,
        )
        return client.generate(request, self._sink, self._lost)

    def cancel(self, cause: str) -> None:
        """The client is gone: stop the work, free the booking. Nothing happens after an end."""
        if self._ticket is None or self.done.done():
            return
        self._close_stream()
        self._ticket.cancelled(self.osl, cause)
        self._ended()
        self.done.cancel()

    def fail(self, error: Exception) -> None:
        """End with an error of our own making. Nothing happens after an end."""
        if self._ticket is None or self.done.done():
            return
        self._close_stream()
        self._ticket.failed(self.osl, code_of(error))
        self._ended()
        self.done.set_exception(error)

    # --- called by the request plane --------------------------------------------------------------

    def _sink(self, output: Output) -> None:
        if output.error is not None:
            code, detail = output.error
            self.fail(engine_error(code, detail))
            return
        token_ids = output.token_ids
        if token_ids:
            now_s = self._service.clock()
            if self._times is None:
                self._first_token(now_s, output.cached_tokens)
            else:
                self._times.tokens(now_s, len(token_ids))
            self.osl += len(token_ids)
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

    def _first_token(self, now_s: float, cached_tokens: int | None) -> None:
        assert self._ticket is not None
        self._times = TokenTimes(now_s)
        self.cached_tokens = cached_tokens
        self._ticket.prefill_completed(cached_tokens)
        self._metrics.queued.dec()
        self._metrics.first_token(now_s - self.job.started_s, self.isl, cached_tokens)

    def _finish(self, text: str, reason: str, still_running: bool) -> None:
        assert self._ticket is not None
        if still_running:
            self._close_stream()
        self.finish_reason = reason
        self._ticket.completed(self.osl, reason, self.cached_tokens)
        deliver = self._deliver
        self._ended()
        deliver(self, text, reason)
        if not self.done.done():
            self.done.set_result(None)

    def _lost(self, error: WorkerLost) -> None:
        _log.warning("stream lost: %s", error, extra={"request_id": self.job.request_id})
        self.fail(error)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def _ended(self) -> None:
        # What points back here is let go, so that a long prompt's tokens leave memory with their
        # request and not whenever the cycle collector comes by.
        self._stream = None
        self._deliver = _deliver_nothing
        self._service.live.discard(self)
        self._metrics.inflight.dec()
        if self._times is None:
            self._metrics.queued.dec()
        self._metrics.output_ended(self.osl, self._times)
