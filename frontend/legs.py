"""What is asked of the router for a job: one worker for all of it, or one for each leg of it.

A model with aggregated workers is served by those. One with decode workers is served disaggregated:
a prefill worker computes the prompt, a decode worker the output.
"""

from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from frontend.chunks import WorkerId
from frontend.hints import RoutingHints
from frontend.served import ServedModel
from frontend.service import Service
from indexer.blocks import block_hashes, prompt_hashes, sequence_hashes
from router.decision import Role, RoutedRequest
from workers.card import AGGREGATED, DECODE, PREFILL
from workers.protocol import SamplingOptions, StopConditions


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
    hints: RoutingHints
    media: dict[str, list[dict[str, str]]] | None = None
    """As `frontend.media` has them for a worker."""
    started_s: float
    """When the handler began, by the service's clock."""


def hash_prompt(service: Service, job: Job) -> tuple[list[int], float]:
    """The sequence hashes of the prompt's complete blocks, and the seconds they took; measured."""
    started_s = service.clock()
    blocks = block_hashes(job.token_ids, job.served.card.block_size)
    hashed_s = service.clock()
    hashes = sequence_hashes(blocks)
    chained_s = service.clock()
    service.router_metrics.hashed(hashed_s - started_s, chained_s - hashed_s)
    return hashes, chained_s - started_s


def routed_request(job: Job, hashes: list[int]) -> RoutedRequest:
    """The job as the router sees it. hashes: of its prompt's complete blocks."""
    hints, overrides, card = job.hints, job.hints.overrides, job.served.card
    return RoutedRequest(
        request_id=job.request_id,
        model=card.name,
        endpoint=job.endpoint,
        isl=len(job.token_ids),
        block_size=card.block_size,
        sequence_hashes=hashes,
        max_tokens=job.stop.max_tokens,
        streaming=job.streaming,
        worker_id=hints.worker_id,
        dp_rank=hints.dp_rank,
        priority=hints.priority,
        strict_priority=hints.strict_priority,
        expected_osl=hints.expected_osl,
        session_id=hints.session_id,
        overlap_weight=overrides.overlap_score_weight,
        temperature=overrides.router_temperature,
        assume_kv_reuse=overrides.assume_kv_reuse,
    )


def first_leg(
    service: Service, job: Job, request: RoutedRequest, *, bypass: bool = False
) -> RoutedRequest:
    """Whose turn it is first: a worker that does it all, or the one that computes the prompt.

    bypass: no prefill worker shall have it. Where a role is missing the leg is that role's, so that
    it is named in what follows.
    """
    role = _first_role(service, job, request, bypass)
    hints = job.hints
    if role == PREFILL:
        worker_id, dp_rank = hints.prefill_worker_id, hints.prefill_dp_rank
        return replace(request, role=PREFILL, worker_id=worker_id, dp_rank=dp_rank)
    if role == DECODE:
        return replace(request, role=DECODE, worker_id=hints.decode_worker_id)
    return request


def decode_leg(job: Job, request: RoutedRequest) -> RoutedRequest:
    """The second leg, for whoever gets the computed prompt."""
    return replace(request, role=DECODE, remote_prefill=True, worker_id=job.hints.decode_worker_id)


def missing_roles(service: Service, model: str) -> tuple[str, ...]:
    """The roles that the model needs and has no worker of now; none: it is ready."""
    counts = partial(service.router.has_workers, model)
    listed = partial(service.models.listed_roles, model)
    return service.disaggregation.missing_roles(counts, listed)


def _first_role(service: Service, job: Job, request: RoutedRequest, bypass: bool) -> Role:
    """Of a model without aggregated workers --decode-fallback decides while there is no prefill
    worker; with one, the client and, if asked to, how much of the prompt the best decode worker
    would have to compute."""
    how, hints = service.disaggregation, job.hints
    counts = partial(service.router.has_workers, request.model)
    if counts(AGGREGATED) or not (counts(PREFILL) or counts(DECODE)):
        return "aggregated"
    if not counts(DECODE):
        return "decode"
    if not counts(PREFILL):
        return "decode" if how.decode_fallback else "prefill"
    if bypass or hints.bypass_remote_prefill:
        return "decode"
    if hints.prefill_worker_id is not None:
        return "prefill"
    local = replace(request, role="decode", worker_id=hints.decode_worker_id)
    return "decode" if how.is_short(service.router, local) else "prefill"


def where(service: Service, job: Job) -> WorkerId:
    """Where the job would go now; nothing is booked, sent or written. Raises RouterError."""
    request = routed_request(job, prompt_hashes(job.token_ids, job.served.card.block_size))
    leg = first_leg(service, job, request)
    first = service.router.potential(leg)
    last = first if leg.role != PREFILL else service.router.potential(decode_leg(job, request))
    return WorkerId(last.worker_id, last.dp_rank, first.worker_id, first.dp_rank)
