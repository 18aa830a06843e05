"""One decision: which rank, and the record of why. Pure; `router.router` brings the state.

`Picture` is what the decision is made from, by slot of the index; the ranks that may be chosen are
the `Candidates`. What comes out is the fact as it is written.
"""

from collections.abc import Callable, Sequence
from random import Random

from msgspec import Struct

from eventstore.events import Candidate, RequestRouted
from indexer.radix import WorkerRank
from router.errors import NoWorkers, UnknownWorker, WorkerRequired
from router.selection import Load, Prompt, RouterMode, best, costs, pick


class RouterOptions(Struct, frozen=True, kw_only=True):
    mode: RouterMode
    overlap_weight: float = 1.0
    temperature: float = 0.0
    replica_sync: bool = False


class RoutedRequest(Struct, frozen=True, kw_only=True):
    """What the router is told about a request. `worker_id`: the caller's own choice, if any."""

    request_id: str
    model: str
    endpoint: str
    isl: int
    block_size: int
    sequence_hashes: list[int]
    max_tokens: int | None = None
    streaming: bool = False
    worker_id: int | None = None


class Candidates(Struct, frozen=True):
    """The ranks a request may go to, by slot, ascending."""

    ranks: list[WorkerRank]
    slots: list[int]

    def items_of(self, by_slot: Sequence[int]) -> Sequence[int]:
        """The candidates' items of a list by slot. No copy where every slot is a candidate."""
        if len(self.slots) == len(by_slot):
            return by_slot
        return [by_slot[slot] for slot in self.slots]

    def of_worker(self, worker_id: int) -> "Candidates":
        here = [index for index, rank in enumerate(self.ranks) if rank.worker_id == worker_id]
        return Candidates([self.ranks[i] for i in here], [self.slots[i] for i in here])


class Picture(Struct, frozen=True):
    """The state as a decision sees it; sequences are by slot."""

    cursor: int
    overlaps: Sequence[int]
    """Leading blocks of the prompt that are cached."""
    active_overlaps: Sequence[int]
    """Leading blocks of the prompt that are active already."""
    load: Load
    size_of: Callable[[WorkerRank], int]
    """Blocks that a rank holds."""


def eligible(
    candidates: Candidates, request: RoutedRequest, mode: RouterMode
) -> tuple[Candidates, RouterMode]:
    """Who may be chosen, and how; a request that names its worker is routed directly in any mode.

    Raises NoWorkers, UnknownWorker, WorkerRequired.
    """
    if not candidates.ranks:
        raise NoWorkers(request.model)
    if request.worker_id is not None:
        named = candidates.of_worker(request.worker_id)
        if not named.ranks:
            raise UnknownWorker(request.worker_id, request.model)
        return named, RouterMode.DIRECT
    if mode is RouterMode.DIRECT:
        raise WorkerRequired()
    return candidates, mode


def decide(
    request: RoutedRequest,
    attempt: int,
    candidates: Candidates,
    mode: RouterMode,
    picture: Picture,
    options: RouterOptions,
    rng: Random,
    turn: int,
) -> RequestRouted:
    """Choose one of the candidates, of which there is at least one. turn: decisions made so far."""
    ranks, hashes = candidates.ranks, request.sequence_hashes
    overlaps = candidates.items_of(picture.overlaps)
    active_overlaps = candidates.items_of(picture.active_overlaps)
    load = Load(*map(candidates.items_of, picture.load))
    prompt = Prompt(request.isl, request.block_size, len(hashes))
    by_cost = costs(prompt, load, overlaps, active_overlaps, options.overlap_weight)

    if mode is RouterMode.ROUND_ROBIN:
        chosen = turn % len(ranks)
    elif mode is RouterMode.RANDOM:
        chosen = rng.randrange(len(ranks))
    else:
        chosen = pick(
            by_cost, lambda index: picture.size_of(ranks[index]), options.temperature, rng
        )

    def reason(index: int) -> Candidate:
        uncached = max(0, request.isl - overlaps[index] * request.block_size)
        return Candidate(
            *ranks[index],
            overlaps[index],
            load.prefill_tokens[index] + uncached,
            load.blocks[index] + len(hashes) - active_overlaps[index],
            by_cost[index],
        )

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
        overlap_weight=options.overlap_weight,
        temperature=options.temperature,
        candidate_count=len(ranks),
        candidates=[reason(index) for index in best(by_cost, chosen)],
        model=request.model,
        max_tokens=request.max_tokens,
    )
