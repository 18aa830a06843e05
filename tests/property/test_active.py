"""Bookings against a naive model: sums of what is booked, whatever the order."""

from hypothesis import given
from hypothesis import strategies as st

from router.active import ActiveSequences

CHAINS = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6, 7], [8], [], [8, 9, 10]]

steps = st.lists(
    st.tuples(
        st.sampled_from(["book", "prefill", "free", "drop"]),
        st.integers(0, 7),
        st.integers(0, 3),
        st.sampled_from(CHAINS),
        st.integers(0, 100),
    ),
    max_size=40,
)


@given(steps)
def test_load_is_the_sum_of_the_bookings(steps: list[tuple[str, int, int, list[int], int]]) -> None:
    """Blocks count once per rank, tokens once per unfinished prefill, and free undoes book."""
    active = ActiveSequences()
    model: dict[str, tuple[int, list[int], int]] = {}
    for what, request, slot, chain, tokens in steps:
        request_id = f"r{request}"
        if what == "book" and request_id not in model:
            active.book(request_id, slot, tokens, chain)
            model[request_id] = (slot, chain, tokens)
        elif what == "prefill":
            assert active.prefill_completed(request_id) == (request_id in model)
            if request_id in model:
                model[request_id] = (*model[request_id][:2], 0)
        elif what == "free":
            assert active.free(request_id) == (model.pop(request_id, None) is not None)
        elif what == "drop" and slot < len(active.blocks):
            gone = {key for key, value in model.items() if value[0] == slot}
            assert set(active.drop_slot(slot)) == gone
            for key in gone:
                del model[key]
        active.check()
        for index, blocks in enumerate(active.blocks):
            here = [value for value in model.values() if value[0] == index]
            assert blocks == len({h for value in here for h in value[1]})
            assert active.prefill_tokens[index] == sum(value[2] for value in here)
    for chain in CHAINS:
        depths = {
            slot: depth
            for mask, depth in active.match_depths(chain)
            for slot in range(8)
            if mask >> slot & 1
        }
        for index in range(len(active.blocks)):
            held = {h for value in model.values() if value[0] == index for h in value[1]}
            leading = next((i for i, h in enumerate(chain) if h not in held), len(chain))
            assert depths.get(index, 0) == leading
