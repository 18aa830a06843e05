"""One decision: which rank, and the record of why. Pure; `router.router` brings the state.

`Picture` is what the decision is made from, by slot of the index; the ranks that may be chosen are
the `Candidates`. What comes out is the fact as it is written.
"""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, TypeVar

from msgspec import Struct

from eventstore.events import (
    Candidate,
    Prediction,
    RequestRouted,
    SessionBinding,
    WorkerRegistered,
)
from indexer.radix import WorkerRank
from router.candidates import Candidates
from router.cost import PrefillModel, RankLoad, predict_ms, time_costs
from router.errors import NoWorkers, UnknownRank, UnknownWorker, WorkerRequired
from router.queue import QueuePolicy
from router.selection import (
    Load,
    Prompt,
    RouterMode,
    best,
    costs,
    least_loaded,
    pick,
    power_of_two,
)

T = TypeVar("T")

Role = Literal["aggregated", "prefill", "decode"]


class RouterOptions(Struct, frozen=True, kw_only=True):
    """What the operator decides. The names are those of the options without `--router-`."""

    mode: RouterMode
    overlap_weight: float = 1.0
    temperature: float = 0.0
    cost: Literal["blocks", "time"] = "blocks"
    """The peer's formula, or milliseconds by what was learned of each worker."""
    replica_sync: bool = False
    kv_events: bool = True
    """False: only what was routed tells what is cached where."""
    ttl_secs: float = 120.0
    """How long that is believed, without KV events."""
    predicted_ttl_secs: float | None = None
    """The same beside KV events; None: not believed at all."""
    max_tree_size: int = 1_048_576
    prune_target_ratio: float = 0.8
    track_active_blocks: bool = True
    assume_kv_reuse: bool = True
    track_output_blocks: bool = False
    queue_threshold: float | None = None
    """A rank with more active prefill tokens than this many batches takes no more; None: no
    queue."""
    queue_policy: QueuePolicy = QueuePolicy.FCFS
    queue_len_max: int = 1024
    queue_wait_max_secs: float = 60.0
    session_ttl_secs: float | None = None
    """None: sessions are not bound."""
    session_mode: Literal["hard", "soft"] = "soft"

    @property
    def prediction(self) -> Prediction | None:
        """What a decision makes replicas believe."""
        ttl_secs = self.predicted_ttl_secs if self.kv_events else self.ttl_secs
        if ttl_secs is None:
            return None
        kept = int(self.max_tree_size * self.prune_target_ratio)
        return Prediction(round(ttl_secs * 1000), self.max_tree_size, kept)


class RoutedRequest(Struct, frozen=True, kw_only=True):
    """What the router is told about a request.

    worker_id, dp_rank: the caller's own choice, if any. overlap_weight, temperature and
    assume_kv_reuse go before the options of the same name.
    """

    request_id: str
    model: str
    endpoint: str
    isl: int
    block_size: int
    sequence_hashes: list[int]
    max_tokens: int | None = None
    streaming: bool = False
    role: Role = "aggregated"
    worker_id: int | None = None
    dp_rank: int | None = None
    priority: float = 0.0
    """Seconds by which it counts as having come earlier."""
    strict_priority: int = 0
    expected_osl: int | None = None
    session_id: str | None = None
    overlap_weight: float | None = None
    temperature: float | None = None
    assume_kv_reuse: bool | None = None
    remote_prefill: bool = False
    """A decode worker is asked for, and it gets the computed prompt from a prefill worker."""
    avoid: frozenset[int] = frozenset()
    """Workers that have failed this request already."""


class Picture(Struct, frozen=True):
    """The state as a decision sees it; sequences are by slot."""

    cursor: int
    overlaps: Sequence[int]
    """Leading blocks of the prompt that are cached, announced or believed."""
    announced: Sequence[int]
    """Those that a worker has announced."""
    active_overlaps: Sequence[int]
    """Leading blocks of the prompt that are active already."""
    load: Load
    size_of: Callable[[WorkerRank], int]
    """Blocks that a rank holds."""
    model_of: Callable[[WorkerRegistered], PrefillModel]
    """What a worker's prefills take."""


def asked_for(
    candidates: Candidates, request: RoutedRequest, mode: RouterMode
) -> tuple[Candidates, bool]:
    """The candidates that the request itself allows, and whether it names its worker.

    Raises NoWorkers, UnknownWorker, UnknownRank, WorkerRequired.
    """
    if not candidates.ranks:
        raise NoWorkers(request.model, request.role)
    if request.worker_id is not None:
        named = candidates.of_worker(request.worker_id, request.dp_rank)
        if not named.ranks:
            if request.dp_rank is not None and candidates.of_worker(request.worker_id).ranks:
                raise UnknownRank(request.dp_rank, request.model, request.worker_id)
            raise UnknownWorker(request.worker_id, request.model, request.role)
        return named, True
    if mode is RouterMode.DIRECT:
        raise WorkerRequired()
    if request.dp_rank is not None:
        candidates = candidates.where(lambda rank: rank.dp_rank == request.dp_rank)
        if not candidates.ranks:
            raise UnknownRank(request.dp_rank, request.model)
    if request.avoid:
        candidates = candidates.where(lambda rank: rank.worker_id not in request.avoid)
        if not candidates.ranks:
            raise NoWorkers(request.model, request.role)
    return candidates, False


def given(override: T | None, option: T) -> T:
    """What the request says, or else the option."""
    return option if override is None else override


def decide(
    request: RoutedRequest,
    attempt: int,
    candidates: Candidates,
    mode: RouterMode,
    picture: Picture,
    options: RouterOptions,
    rng: Random,
    turn: int,
    *,
    queued_ms: float = 0.0,
    set_aside: int = 0,
) -> RequestRouted:
    """Choose one of the candidates, of which there is at least one. turn: how many have been
    chosen in turn so far."""
    ranks, hashes = candidates.ranks, request.sequence_hashes
    decoding = request.remote_prefill
    overlaps = candidates.items_of(picture.overlaps)
    active_overlaps = candidates.items_of(picture.active_overlaps)
    load = Load(*map(candidates.items_of, picture.load))
    # Blocks that arrive from a prefill worker are the request's own.
    shares_blocks = not decoding and given(request.assume_kv_reuse, options.assume_kv_reuse)
    nothing = [0] * len(ranks)
    if not options.track_active_blocks:
        # Whatever other frontends have booked.
        load = load._replace(blocks=nothing)
    if not options.track_active_blocks or not shares_blocks:
        active_overlaps = nothing
    prompt = Prompt(request.isl, request.block_size, len(hashes))
    # A decode worker computes no prompt, so it is chosen by its load alone.
    weight = 0.0 if decoding else given(request.overlap_weight, options.overlap_weight)
    temperature = given(request.temperature, options.temperature)
    # An override of the weight is about the formula that has one.
    by_time = options.cost == "time" and request.overlap_weight is None and not decoding
    by_time = by_time and mode is RouterMode.KV
    predicted_ms = None
    if by_time:
        new_tokens = [request.isl - overlap * request.block_size for overlap in overlaps]
        models = list(map(picture.model_of, candidates.workers))
        ranks_load = RankLoad(
            ahead_tokens=load.prefill_tokens,
            new_tokens=new_tokens,
            running=load.requests,
            active_blocks=load.blocks,
            grown_blocks=[len(hashes) - active for active in active_overlaps],
            total_blocks=[each.total_kv_blocks or math.inf for each in candidates.workers],
        )
        by_cost = time_costs(models, ranks_load)
    else:
        by_cost = costs(prompt, load, overlaps, active_overlaps, weight)

    recorded = None
    if mode is RouterMode.ROUND_ROBIN:
        chosen = turn % len(ranks)
    elif mode is RouterMode.RANDOM:
        chosen = rng.randrange(len(ranks))
    elif mode is RouterMode.POWER_OF_TWO:
        recorded = power_of_two(load.requests, rng)
        chosen = recorded[0]
    elif mode is RouterMode.LEAST_LOADED:
        chosen = least_loaded(load.requests, rng)
        recorded = best(load.requests, chosen)
    else:
        chosen = pick(by_cost, lambda index: picture.size_of(ranks[index]), temperature, rng)
    if recorded is None:
        recorded = best(by_cost, chosen)

    if by_time:
        tokens = load.prefill_tokens[chosen] + new_tokens[chosen]
        predicted_ms = predict_ms(models[chosen], tokens)

    def reason(index: int) -> Candidate:
        uncached = max(0, request.isl - overlaps[index] * request.block_size)
        return Candidate(
            *ranks[index],
            overlaps[index],
            load.prefill_tokens[index] + uncached,
            load.blocks[index] + len(hashes) - active_overlaps[index],
            by_cost[index],
            load.requests[index],
        )

    session = None
    if options.session_ttl_secs is not None and request.session_id is not None:
        session = SessionBinding(request.session_id, round(options.session_ttl_secs * 1000))
    announced = picture.announced[candidates.slots[chosen]]
    return RequestRouted(
        request_id=request.request_id,
        attempt=attempt,
        worker_id=ranks[chosen].worker_id,
        dp_rank=ranks[chosen].dp_rank,
        mode=mode.value,
        isl=request.isl,
        overlap_blocks=overlaps[chosen],
        sequence_hashes=hashes,
        cursor=picture.cursor,
        overlap_weight=weight,
        temperature=temperature,
        candidate_count=len(ranks),
        candidates=list(map(reason, recorded)),
        model=request.model,
        max_tokens=request.max_tokens,
        role=request.role,
        expected_osl=request.expected_osl,
        # A prefill worker holds the blocks for a moment only.
        books_blocks=options.track_active_blocks and request.role != "prefill",
        shares_blocks=shares_blocks,
        books_prefill=not decoding,
        cost_unit="ms" if by_time else "blocks",
        queued_ms=queued_ms,
        prediction=options.prediction,
        session=session,
        set_aside=set_aside,
        predicted_blocks=max(0, overlaps[chosen] - announced),
        predicted_ms=predicted_ms,
    )
