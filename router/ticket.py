"""One accepted request, from the router's side: its facts are written here, each once."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from eventstore.events import (
    AnyEvent,
    OutputGrown,
    PrefillCompleted,
    PrefillHopEnded,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    RequestRejected,
    RequestRouted,
)
from indexer.radix import WorkerRank
from router.active import growth
from router.decision import RoutedRequest
from router.errors import RouterError
from router.state import hop_id

if TYPE_CHECKING:
    from router.router import Router


class Timings(Struct, frozen=True):
    """How long the parts of a decision took, in seconds."""

    find_matches_s: float
    scheduling_s: float
    queued_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.find_matches_s + self.scheduling_s + self.queued_s


class Waiting(Struct, frozen=True):
    """Whom to tell how waiting in the queue has ended; one of the two is called, once."""

    released: Callable[[Timings], None]
    refused: Callable[[RouterError], None]


class Ticket:
    """Routed at most once at a time and role, ended exactly once.

    The owner calls one of the four endings; later calls do nothing, so a drop guard may always call
    `cancelled`.
    """

    def __init__(self, router: "Router", request: RoutedRequest) -> None:
        self.request = request
        self.routed: RequestRouted | None = None
        """Where the request is booked now, but for its hop."""
        self.hop: RequestRouted | None = None
        """The prefill worker's booking, while there is one."""
        self.queued: RequestQueued | None = None
        """What was written when it was parked, while it waits."""
        self.is_prefilling = False
        self.cached_tokens: int | None = None
        self.osl = 0
        """Output tokens that the log has been told of."""
        self._router = router
        self._attempts = 0
        self._grow_at: int | None = None
        self._ended = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def rank(self) -> WorkerRank | None:
        """Where the request is booked now."""
        if self.routed is None:
            return None
        return WorkerRank(self.routed.worker_id, self.routed.dp_rank)

    @property
    def has_ended(self) -> bool:
        return self._ended

    # --- choices ----------------------------------------------------------------------------------

    def route(
        self, waiting: Waiting | None = None, request: RoutedRequest | None = None
    ) -> Timings | None:
        """Choose a rank, book it, record why; None if the request waits in the queue.

        waiting: None where it must not wait. request: what to choose for, if not for the request as
        it was accepted: its hop, of role `prefill`, or its decode worker. Raises as
        `Router.eligible`, and QueueFull.
        """
        return self._router.route(self, request or self.request, waiting)

    def place(self, routed: RequestRouted) -> None:
        """The router has chosen: book it and record it."""
        router = self._router
        self.queued = None
        if routed.role == "prefill":
            self.hop = routed
            router.local.book(hop_id(self.request_id), routed)
        else:
            self.routed = routed
            self.is_prefilling = True
            self._attempts += 1
            self._note_growth()
            router.local.book(self.request_id, routed)
        router.publish(routed)

    @property
    def attempt(self) -> int:
        """The number of the next choice."""
        return self._attempts

    def hop_ended(self, cached_tokens: int | None, ttft_ms: float | None, cause: str) -> None:
        """The prefill worker has nothing more to do for this request. Later calls do nothing."""
        if self.hop is None or self._ended:
            return
        self.hop = None
        self._router.local.free(hop_id(self.request_id))
        self._router.publish(PrefillHopEnded(self.request_id, cached_tokens, ttft_ms, cause))
        self._router.release()

    def migrated(self, osl: int, cause: str, request: RoutedRequest) -> None:
        """The worker is lost after `osl` tokens in all; `request` is what is left to do: the prompt
        with the tokens since the last choice behind it."""
        assert self.routed is not None and request.request_id == self.request_id
        router = self._router
        self.hop_ended(None, None, cause)
        self.routed = None
        self.request = request
        self.osl, self._grow_at = 0, None
        router.local.free(self.request_id)
        router.publish(RequestMigrated(self.request_id, osl, cause))

    # --- progress ---------------------------------------------------------------------------------

    def prefill_completed(self, cached_tokens: int | None, ttft_ms: float | None = None) -> None:
        """The first token is here, `ttft_ms` after the request was sent. Later calls do nothing."""
        if not self.is_prefilling or self._ended:
            return
        self.is_prefilling = False
        self.cached_tokens = cached_tokens
        router = self._router
        router.local.prefill_completed(self.request_id)
        router.publish(PrefillCompleted(self.request_id, cached_tokens, ttft_ms))
        router.release()

    def produced(self, osl: int) -> None:
        """`osl` tokens came since the last choice. Called for every token, so mostly nothing."""
        if self._grow_at is None or osl < self._grow_at or self._ended:
            return
        self.osl = osl
        self._note_growth()
        router, request = self._router, self.request
        to = growth(request.isl, osl, request.block_size, request.expected_osl)
        router.local.grown(self.request_id, to)
        if router.has_room(1):
            # A block more or less is not worth a place that an ending may need.
            router.publish(OutputGrown(self.request_id, osl))

    def _note_growth(self) -> None:
        """Find the number of tokens that begins the next block."""
        request = self.request
        if not self._router.options.track_output_blocks:
            return
        tokens = request.isl + self.osl
        blocks = -(-tokens // request.block_size)
        self._grow_at = blocks * request.block_size + 1 - request.isl

    # --- endings ----------------------------------------------------------------------------------

    def completed(self, osl: int, finish_reason: str, cached_tokens: int | None) -> None:
        self._end(RequestCompleted(self.request_id, osl, finish_reason, cached_tokens))

    def failed(self, osl: int, code: str) -> None:
        self._end(RequestFailed(self.request_id, osl, code))

    def cancelled(self, osl: int, cause: str) -> None:
        self._end(RequestCancelled(self.request_id, osl, cause))

    def rejected(self, code: str, status: int, reason: str = "") -> None:
        self._end(RequestRejected(self.request_id, code, status, reason))

    def _end(self, event: AnyEvent) -> None:
        if self._ended:
            return
        self._ended = True
        self._router.forget(self)
        self._router.publish(event)
        self._router.release()

    def facts(self) -> list[AnyEvent]:
        """What has been written of the request so far and still holds."""
        facts: list[AnyEvent] = []
        if self.queued is not None:
            facts.append(self.queued)
        if self.hop is not None:
            facts.append(self.hop)
        if self.routed is not None:
            facts.append(self.routed)
            if not self.is_prefilling:
                facts.append(PrefillCompleted(self.request_id, self.cached_tokens))
                if self.osl:
                    facts.append(OutputGrown(self.request_id, self.osl))
        return facts
