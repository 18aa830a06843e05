"""Laws of one decision: who is chosen by which rule, and that the record says why."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from eventstore.events import RequestRouted, WorkerRegistered
from indexer.radix import WorkerRank
from router.candidates import Candidates
from router.cost import PrefillModel, predict_ms
from router.decision import Picture, RoutedRequest, RouterOptions, asked_for, decide
from router.errors import NoWorkers, UnknownRank, UnknownWorker, WorkerRequired
from router.selection import REASONS_MAX, Load, RouterMode

BLOCK_SIZE = 4
BLOCKS = 5
ISL = BLOCK_SIZE * BLOCKS + 2
MODES = [mode for mode in RouterMode if mode not in (RouterMode.DIRECT, RouterMode.SESSION)]

rank_facts = st.tuples(
    st.integers(0, BLOCKS),  # announced
    st.integers(0, BLOCKS),  # believed
    st.integers(0, BLOCKS),  # active
    st.integers(0, 200),  # prefill tokens
    st.integers(0, 40),  # blocks
    st.integers(0, 3),  # requests
)


class Scene(Struct, frozen=True):
    """A picture of `ranks`, of which every one in `places` may be chosen."""

    picture: Picture
    candidates: Candidates

    def decide(
        self,
        mode: RouterMode,
        options: RouterOptions | None = None,
        request: RoutedRequest | None = None,
        seed: int = 0,
        turn: int = 0,
    ) -> RequestRouted:
        options = options or RouterOptions(mode=mode)
        return decide(
            request or REQUEST,
            0,
            self.candidates,
            mode,
            self.picture,
            options,
            Random(seed),
            turn,
        )

    def with_blocks(self, blocks: int) -> "Scene":
        """The same, with other active blocks."""
        load = self.picture.load
        picture = replace(
            self.picture,
            load=load._replace(blocks=[blocks + slot for slot in range(len(load.blocks))]),
            active_overlaps=[blocks % (BLOCKS + 1)] * len(load.blocks),
        )
        return Scene(picture, self.candidates)


REQUEST = RoutedRequest(
    request_id="a",
    model="m",
    endpoint="chat",
    isl=ISL,
    block_size=BLOCK_SIZE,
    sequence_hashes=list(range(100, 100 + BLOCKS)),
)


def scene(facts: list[tuple[int, ...]], keep: list[bool]) -> Scene:
    announced, believed, active, tokens, blocks, requests = map(list, zip(*facts, strict=True))
    places = [slot for slot in range(len(facts)) if keep[slot]] or [0]
    ranks = [WorkerRank(1000 + slot, slot % 2) for slot in places]
    workers = [WorkerRegistered(rank.worker_id, "m", "aggregated", BLOCK_SIZE) for rank in ranks]
    picture = Picture(
        cursor=7,
        overlaps=list(map(max, announced, believed)),
        announced=announced,
        active_overlaps=active,
        load=Load(tokens, blocks, requests),
        size_of=lambda rank: rank.worker_id,
        model_of=lambda worker: PrefillModel(batch_tokens=worker.worker_id),
    )
    return Scene(picture, Candidates(ranks, places, workers))


scenes = st.integers(1, 12).flatmap(
    lambda count: st.builds(
        scene,
        st.lists(rank_facts, min_size=count, max_size=count),
        st.lists(st.booleans(), min_size=count, max_size=count),
    )
)


@given(scenes, st.sampled_from(MODES), st.integers(0, 99))
def test_every_mode_chooses_a_candidate_and_says_why(
    here: Scene, mode: RouterMode, turn: int
) -> None:
    """Chosen first, then others, each with what was known of it; the same from the same seed."""
    routed = here.decide(mode, turn=turn)
    chosen = WorkerRank(routed.worker_id, routed.dp_rank)
    assert chosen in here.candidates.ranks
    assert (routed.mode, routed.candidate_count) == (mode.value, len(here.candidates.ranks))
    recorded = [WorkerRank(c.worker_id, c.dp_rank) for c in routed.candidates]
    assert recorded[0] == chosen
    assert len(set(recorded)) == len(recorded) <= REASONS_MAX
    if len(here.candidates.ranks) > 1:
        assert len(recorded) > 1
    for candidate, rank in zip(routed.candidates, recorded, strict=True):
        slot = here.candidates.slots[here.candidates.ranks.index(rank)]
        overlap = here.picture.overlaps[slot]
        assert candidate.overlap_blocks == overlap
        uncached = ISL - overlap * BLOCK_SIZE
        tokens, blocks, requests = (each[slot] for each in here.picture.load)
        assert candidate.prefill_tokens == tokens + uncached
        assert candidate.decode_blocks == blocks + BLOCKS - here.picture.active_overlaps[slot]
        assert candidate.active_requests == requests
        cost = candidate.prefill_tokens / BLOCK_SIZE + candidate.decode_blocks
        assert candidate.cost == pytest.approx(cost)
    slot = here.candidates.slots[here.candidates.ranks.index(chosen)]
    believed = here.picture.overlaps[slot] - here.picture.announced[slot]
    assert routed.predicted_blocks == believed
    assert here.decide(mode, turn=turn) == routed


@given(scenes, st.integers(0, 99), st.integers(1, 4))
def test_in_turn_all_are_chosen_equally_often(here: Scene, start: int, rounds: int) -> None:
    """Over any number of whole rounds, whatever the load."""
    count = len(here.candidates.ranks)
    turns = range(start, start + rounds * count)
    chosen = Counter(here.decide(RouterMode.ROUND_ROBIN, turn=turn).worker_id for turn in turns)
    assert chosen == dict.fromkeys((rank.worker_id for rank in here.candidates.ranks), rounds)


@given(scenes, st.integers(0, 99))
def test_what_load_alone_decides(here: Scene, seed: int) -> None:
    """least-loaded takes one of the fewest requests; power-of-two the better of two, which it
    names, and so never the worst of all but by a tie."""
    by_id = dict(
        zip(
            (rank.worker_id for rank in here.candidates.ranks),
            here.candidates.items_of(here.picture.load.requests),
            strict=True,
        )
    )
    least = here.decide(RouterMode.LEAST_LOADED, seed=seed)
    assert by_id[least.worker_id] == min(by_id.values())
    assert [c.active_requests for c in least.candidates] == sorted(by_id.values())[:REASONS_MAX]
    two = here.decide(RouterMode.POWER_OF_TWO, seed=seed)
    assert len(two.candidates) == min(2, len(by_id))
    assert by_id[two.worker_id] == min(by_id[c.worker_id] for c in two.candidates)


@given(scenes, st.floats(0, 50), st.integers(0, 9))
def test_the_lowest_cost_wins(here: Scene, weight: float, seed: int) -> None:
    """weight * (prefill tokens / block size) + decode blocks."""
    options = RouterOptions(mode=RouterMode.KV, overlap_weight=weight)
    routed = here.decide(RouterMode.KV, options, seed=seed)
    slots, picture = here.candidates.slots, here.picture
    costs = [
        weight * (picture.load.prefill_tokens[s] + ISL - BLOCK_SIZE * picture.overlaps[s]) / 4
        + picture.load.blocks[s]
        + BLOCKS
        - picture.active_overlaps[s]
        for s in slots
    ]
    assert routed.candidates[0].cost == pytest.approx(min(costs))
    assert (routed.overlap_weight, routed.cost_unit) == (weight, "blocks")


@given(
    scenes,
    st.sampled_from(
        [
            ("overlap_weight", 0.0, 3.0),
            ("temperature", 0.0, 2.0),
            ("assume_kv_reuse", True, False),
            ("assume_kv_reuse", False, True),
        ]
    ),
    st.integers(0, 9),
)
def test_an_override_is_the_option_for_one_request(
    here: Scene, what: tuple[str, object, object], seed: int
) -> None:
    """decide(request with x, options with y) == decide(request, options with x), to the bit."""
    name, ours, theirs = what
    base = RouterOptions(mode=RouterMode.KV)
    overridden = here.decide(
        RouterMode.KV,
        replace(base, **{name: theirs}),
        replace(REQUEST, **{name: ours}),
        seed,
    )
    assert overridden == here.decide(RouterMode.KV, replace(base, **{name: ours}), REQUEST, seed)


@given(scenes, st.integers(0, 60), st.integers(0, 9))
def test_without_tracking_active_blocks_count_nowhere(here: Scene, other: int, seed: int) -> None:
    options = RouterOptions(mode=RouterMode.KV, track_active_blocks=False)
    routed = here.decide(RouterMode.KV, options, seed=seed)
    assert here.with_blocks(other).decide(RouterMode.KV, options, seed=seed) == routed
    assert not routed.books_blocks
    assert all(candidate.decode_blocks == BLOCKS for candidate in routed.candidates)


@given(scenes)
def test_without_reuse_no_block_counts_as_active_already(here: Scene) -> None:
    options = RouterOptions(mode=RouterMode.KV, assume_kv_reuse=False)
    routed = here.decide(RouterMode.KV, options)
    assert not routed.shares_blocks
    slot_of = dict(zip(here.candidates.ranks, here.candidates.slots, strict=True))
    for candidate in routed.candidates:
        slot = slot_of[WorkerRank(candidate.worker_id, candidate.dp_rank)]
        assert candidate.decode_blocks == here.picture.load.blocks[slot] + BLOCKS


@given(scenes, st.integers(0, 9))
def test_by_time_costs_are_milliseconds_and_the_weight_is_without_effect(
    here: Scene, seed: int
) -> None:
    options = RouterOptions(mode=RouterMode.KV, cost="time")
    routed = here.decide(RouterMode.KV, options, seed=seed)
    assert routed.cost_unit == "ms"
    model = PrefillModel(batch_tokens=routed.worker_id)
    assert routed.predicted_ms == predict_ms(model, routed.candidates[0].prefill_tokens)
    assert routed.candidates[0].cost == min(c.cost for c in routed.candidates)
    heavier = here.decide(RouterMode.KV, replace(options, overlap_weight=9.0), seed=seed)
    assert heavier.candidates == routed.candidates
    own = here.decide(RouterMode.KV, options, replace(REQUEST, overlap_weight=9.0), seed)
    assert (own.cost_unit, own.predicted_ms) == ("blocks", None)


@given(scenes, st.sampled_from(list(RouterMode)))
def test_what_the_request_names(here: Scene, mode: RouterMode) -> None:
    """A worker, a rank or both leave only those; what nobody has is an error of the client's."""
    every = here.candidates
    for worker_id in (None, every.ranks[0].worker_id, 5):
        for dp_rank in (None, 0, 1, 9):
            request = replace(REQUEST, worker_id=worker_id, dp_rank=dp_rank)
            left = [
                rank
                for rank in every.ranks
                if worker_id in (None, rank.worker_id) and dp_rank in (None, rank.dp_rank)
            ]
            if worker_id is None and mode is RouterMode.DIRECT:
                with pytest.raises(WorkerRequired):
                    asked_for(every, request, mode)
            elif worker_id == 5:
                with pytest.raises(UnknownWorker):
                    asked_for(every, request, mode)
            elif not left:
                with pytest.raises(UnknownRank, match=f"rank {dp_rank}"):
                    asked_for(every, request, mode)
            else:
                named = asked_for(every, request, mode)
                assert (named[0].ranks, named[1]) == (left, worker_id is not None)
    avoided = replace(REQUEST, avoid=frozenset(rank.worker_id for rank in every.ranks))
    if mode is not RouterMode.DIRECT:
        with pytest.raises(NoWorkers):
            asked_for(every, avoided, mode)
