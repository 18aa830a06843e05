"""What is asked of the router for a job: one worker for all of it, or one for each leg of it.

A model with aggregated workers is served by those. One with decode workers is served disaggregated:
a prefill worker computes the prompt, a decode worker the output.
"""

from msgspec import Struct
from msgspec.structs import replace

from frontend.chunks import WorkerId
from frontend.hints import RoutingHints
from frontend.served import ServedModel
from frontend.service import Service
from indexer.blocks import prompt_hashes
from router.decision import RoutedRequest
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
    started_s: float
    """When the handler began, by the service's clock."""


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


def first_leg(service: Service, job: Job, request: RoutedRequest) -> RoutedRequest:
    """Whose turn it is first: a worker that does it all, or the one that computes the prompt."""
    if service.router.has_workers(request.model, AGGREGATED):
        return request
    if not _is_disaggregated(service, job, request):
        return replace(request, role=DECODE, worker_id=job.hints.decode_worker_id)
    hints = job.hints
    return replace(
        request, role=PREFILL, worker_id=hints.prefill_worker_id, dp_rank=hints.prefill_dp_rank
    )


def decode_leg(job: Job, request: RoutedRequest) -> RoutedRequest:
    """The second leg, for whoever gets the computed prompt."""
    return replace(request, role=DECODE, remote_prefill=True, worker_id=job.hints.decode_worker_id)


def _is_disaggregated(service: Service, job: Job, request: RoutedRequest) -> bool:
    """Whether a prefill worker computes the prompt, of a model without aggregated workers.

    Without prefill workers --decode-fallback decides; with them, the client and, if asked to, how
    much of the prompt the best decode worker would have to compute.
    """
    router, how = service.router, service.disaggregation
    if not router.has_workers(request.model, DECODE):
        return router.has_workers(request.model, PREFILL)
    if not router.has_workers(request.model, PREFILL):
        return not how.decode_fallback
    if job.hints.bypass_remote_prefill:
        return False
    return not how.is_short(router, replace(request, role=DECODE))


def where(service: Service, job: Job) -> WorkerId:
    """Where the job would go now; nothing is booked, sent or written. Raises RouterError."""
    request = routed_request(job, prompt_hashes(job.token_ids, job.served.card.block_size))
    leg = first_leg(service, job, request)
    first = service.router.potential(leg)
    last = first if leg.role != PREFILL else service.router.potential(decode_leg(job, request))
    return WorkerId(last.worker_id, last.dp_rank, first.worker_id, first.dp_rank)
