"""Bookings against a naive model: sums of what is booked, whatever the order."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.active import ActiveSequences, Growth, growth

CHAINS = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6, 7], [8], [], [8, 9, 10]]

steps_st = st.lists(
    st.tuples(
        st.sampled_from(["book", "book", "grow", "grow", "prefill", "free", "drop"]),
        st.integers(0, 7),
        st.integers(0, 3),
        st.sampled_from(CHAINS),
        st.integers(0, 100),
        st.sampled_from([None, 1, 40, 80]),
    ),
    max_size=40,
)
Steps = list[tuple[str, int, int, list[int], int, int | None]]
BLOCK_SIZE = 4


@dataclass
class Booked:
    """What the model knows of a booking."""

    slot: int
    chain: list[int]
    tokens: int
    own: int
    output: int = 0
    relief: int = 0


def users(model: dict[str, Booked], slot: int, block: int) -> int:
    return sum(each.slot == slot and block in each.chain for each in model.values())


def blocks_of(model: dict[str, Booked], slot: int) -> int:
    """Distinct blocks and those of one booking alone, less the relief; a half counts as one."""
    here = [each for each in model.values() if each.slot == slot]
    distinct = {block for each in here for block in each.chain}
    relief = sum(each.relief for each in here)
    thousandths = 1000 * (len(distinct) + sum(e.own + e.output for e in here)) - relief
    return (thousandths + 500) // 1000


def copy_of(active: ActiveSequences) -> ActiveSequences:
    """As a snapshot would make it: from the bookings alone."""
    copy = ActiveSequences()
    copy.add_slot(len(active.blocks) - 1)
    for request_id in sorted(active.request_ids()):
        booking = active.get(request_id)
        assert booking is not None
        copy.restore(request_id, replace(booking))
    copy.check()
    return copy


@given(steps_st)
def test_load_is_the_sum_of_the_bookings(steps: Steps) -> None:
    """Blocks count once per rank, tokens once per unfinished prefill, free undoes book, and what
    has grown counts less by its share of all that only its request uses; also on a replica that
    starts from a snapshot again and again."""
    active, replica = ActiveSequences(), ActiveSequences()
    model: dict[str, Booked] = {}
    for what, request, slot, chain, number, expected_osl in steps:
        request_id = f"r{request}"
        booked = model.get(request_id)
        if what == "book" and booked is None:
            own = number % 3
            for each in (active, replica):
                each.book(request_id, slot, number, chain, own)
            model[request_id] = Booked(slot, chain, number, own)
        elif what == "grow":
            to = growth(BLOCK_SIZE * len(chain) + 2, number, BLOCK_SIZE, expected_osl)
            assert active.grown(request_id, to) == (booked is not None)
            replica.grown(request_id, to)
            if booked is not None:
                booked.output = to.output_blocks
                alone = sum(users(model, booked.slot, block) == 1 for block in booked.chain)
                booked.relief = to.relief * (booked.own + booked.output + alone)
        elif what == "prefill":
            assert active.prefill_completed(request_id) == (booked is not None)
            replica.prefill_completed(request_id)
            if booked is not None:
                booked.tokens = 0
        elif what == "free":
            assert active.free(request_id) == (model.pop(request_id, None) is not None)
            replica.free(request_id)
        elif what == "drop" and slot < len(active.blocks):
            gone = {key for key, value in model.items() if value.slot == slot}
            assert set(active.drop_slot(slot)) == set(replica.drop_slot(slot)) == gone
            for key in gone:
                del model[key]
        active.check()
        replica = copy_of(replica)
        assert replica.blocks == active.blocks
        for index, blocks in enumerate(active.blocks):
            here = [value for value in model.values() if value.slot == index]
            assert blocks == blocks_of(model, index)
            assert blocks >= 0
            assert active.prefill_tokens[index] == sum(value.tokens for value in here)
            assert active.requests[index] == len(here)
    for chain in CHAINS:
        depths = {
            slot: depth
            for mask, depth in active.match_depths(chain)
            for slot in range(8)
            if mask >> slot & 1
        }
        for index in range(len(active.blocks)):
            held = {h for value in model.values() if value.slot == index for h in value.chain}
            leading = next((i for i, h in enumerate(chain) if h not in held), len(chain))
            assert depths.get(index, 0) == leading


@given(st.integers(0, 500), st.integers(0, 300), st.integers(0, 300), st.integers(1, 64))
def test_a_block_is_begun_by_its_first_token(isl: int, osl: int, more: int, size: int) -> None:
    """ceil((isl + osl) / size) - ceil(isl / size) blocks, however the tokens came."""
    blocks = {token // size for token in range(isl, isl + osl)} - {(isl - 1) // size}
    assert growth(isl, osl, size, None) == Growth(len(blocks), 0)
    assert growth(isl, osl + more, size, None).output_blocks >= len(blocks)


@given(st.integers(0, 300), st.integers(1, 300))
def test_relief_is_the_share_of_the_expected_output(osl: int, expected_osl: int) -> None:
    """max(0, 1 - osl / expected) of each block is left, to a thousandth below."""
    left = 1 - growth(8, osl, 4, expected_osl).relief / 1000
    assert 0 <= left - max(0.0, 1 - osl / expected_osl) < 0.001 + 1e-9
