"""Block and sequence hashes: the peer's test vectors, and what is refused."""

from array import array

import pytest

from indexer.blocks import block_hashes, multimodal_hash, prompt_hashes, sequence_hashes

V2_LOCAL = [
    14643705804678351452,
    16777012769546811212,
    483935686894639516,
    135165725823939817,
]
V2_SEQUENCE = [
    14643705804678351452,
    4945711292740353085,
    12583592247330656132,
    1921452330601040443,
]


@pytest.mark.parametrize(
    ("token_ids", "block_size", "local", "sequence"),
    [
        pytest.param(
            range(1, 33),
            16,
            [16863443419780771464, 2287610619914608821],
            [16863443419780771464, 12466389667045779788],
            id="V1",
        ),
        pytest.param(
            range(1, 41),
            16,
            [16863443419780771464, 2287610619914608821],
            [16863443419780771464, 12466389667045779788],
            id="V1b: a tail of half a block",
        ),
        pytest.param(range(1, 10), 4, V2_LOCAL[:2], V2_SEQUENCE[:2], id="V2"),
        pytest.param(range(1, 19), 4, V2_LOCAL, V2_SEQUENCE, id="V2b"),
        pytest.param(
            [0] * 32,
            16,
            [5523182284766269584, 5523182284766269584],
            [5523182284766269584, 3102875163438626881],
            id="V3: equal blocks",
        ),
    ],
)
def test_vectors(
    token_ids: range | list[int], block_size: int, local: list[int], sequence: list[int]
) -> None:
    assert block_hashes(token_ids, block_size) == local
    assert sequence_hashes(local) == sequence
    assert prompt_hashes(token_ids, block_size) == sequence


def test_extras_vectors() -> None:
    """V4, V5: an adapter changes the seed, objects follow the tokens, EAGLE hashes one more."""
    tokens = [1, 2, 3, 4]
    assert block_hashes(tokens, 4, lora_name="") == [14643705804678351452]
    assert block_hashes(tokens, 4, lora_name="my-lora") == [15671544057904749233]
    assert block_hashes(tokens, 4, mm_objects=[[0xDEADBEEF]]) == [15207512089340001072]
    assert block_hashes(range(1, 10), 4, eagle=True) == [1914873892905420881, 1929047464662796003]


def test_prompt_hashes_pass_the_extras_on() -> None:
    extras = {"lora_name": "a", "mm_objects": [[1], [], [2, 3]], "eagle": True}
    local = block_hashes(range(20), 4, lora_name="a", mm_objects=[[1], [], [2, 3]], eagle=True)
    assert prompt_hashes(range(20), 4, **extras) == sequence_hashes(local)  # type: ignore[arg-type]


@pytest.mark.parametrize("token_ids", [[], [1], [1, 2, 3]])
def test_no_full_block_no_hash(token_ids: list[int]) -> None:
    assert prompt_hashes(token_ids, 4) == []
    assert block_hashes([*token_ids, 4], 4, eagle=True) == []


def test_an_array_needs_no_conversion() -> None:
    assert block_hashes(array("I", range(1, 19)), 4) == V2_LOCAL


def test_objects_past_the_last_full_block_do_not_count() -> None:
    assert block_hashes([1, 2, 3, 4, 5], 4, mm_objects=[[], [7]]) == V2_LOCAL[:1]


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_below_one(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        block_hashes([1, 2], block_size)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_outside_u32(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([1, 2, token], 2)


def test_object_hash_outside_u64() -> None:
    with pytest.raises(OverflowError):
        block_hashes([1, 2], 2, mm_objects=[[2**64]])


def test_multimodal_hash() -> None:
    """A hex digest of 64 digits gives its first 16; any other name is hashed whole."""
    digest = "00000000deadbeef" + "0123456789abcdef" * 3
    assert multimodal_hash(digest) == 0xDEADBEEF
    assert multimodal_hash(digest.upper()) == 0xDEADBEEF
    for name in ("", "image-1", digest[:-1], digest + "0", "g" + digest[1:], "_" + digest[1:]):
        assert multimodal_hash(name) not in (0, 0xDEADBEEF)
        assert 0 <= multimodal_hash(name) < 2**64
