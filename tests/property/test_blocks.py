"""Laws of block and sequence hashes."""

import struct
from array import array

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from indexer.blocks import block_hashes, prompt_hashes, sequence_hashes

U64 = st.integers(0, 2**64 - 1)
TOKENS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=40)
BLOCK_SIZES = st.integers(1, 9)
NAMES = st.text(max_size=5)


@given(TOKENS, BLOCK_SIZES, NAMES, st.lists(st.lists(U64, max_size=3), max_size=5), st.booleans())
def test_block_hashes_follow_their_definition(
    tokens: list[int], block_size: int, lora: str, objects: list[list[int]], eagle: bool
) -> None:
    seed = (1337 + xxhash.xxh3_64_intdigest(lora.encode()) if lora else 1337) % 2**64
    expected = []
    for start in range(0, len(tokens), block_size):
        window = tokens[start : start + block_size + eagle]
        if len(window) == block_size + eagle:
            index = start // block_size
            data = struct.pack(f"<{len(window)}I", *window)
            for object_hash in sorted(objects[index]) if index < len(objects) else ():
                data += struct.pack("<Q", object_hash)
            expected.append(xxhash.xxh3_64_intdigest(data, seed=seed))
    got = block_hashes(tokens, block_size, lora_name=lora, mm_objects=objects, eagle=eagle)
    assert got == expected
    assert got == block_hashes(
        array("I", tokens), block_size, lora_name=lora, mm_objects=objects, eagle=eagle
    )


@given(TOKENS, BLOCK_SIZES, st.data())
def test_prefix(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    """What follows a block never changes its hashes."""
    cut = data.draw(st.integers(0, len(tokens)))
    head = prompt_hashes(tokens[:cut], block_size)
    assert prompt_hashes(tokens, block_size)[: len(head)] == head
    assert len(head) == cut // block_size


@given(st.lists(U64, min_size=1), st.lists(U64))
def test_a_chain_continues_from_its_last_hash(head: list[int], tail: list[int]) -> None:
    whole = sequence_hashes(head)
    assert sequence_hashes(tail, whole[-1]) == sequence_hashes(head + tail)[len(head) :]


@given(st.lists(U64, min_size=1, max_size=10), st.data())
def test_another_block_changes_all_that_follows(local: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(local) - 1))
    changed = list(local)
    changed[index] = data.draw(U64.filter(lambda value: value != local[index]))
    before, after = sequence_hashes(local), sequence_hashes(changed)
    assert before[:index] == after[:index]
    assert not set(before[index:]) & set(after[index:])
