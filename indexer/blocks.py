"""Token ids to block hashes to sequence hashes.

A *block hash* names the content of one full block, wherever it stands; a *sequence hash* names a
block together with everything before it, so equal sequence hashes mean equal prefixes:

    block_hash(i)    = XXH3-64(tokens of block i as little-endian u32, seed 1337)
    sequence_hash(0) = block_hash(0)
    sequence_hash(i) = XXH3-64(LE64(sequence_hash(i-1)) ‖ LE64(block_hash(i)), seed 1337)

These are the hashes of NVIDIA Dynamo 1.6, so its publishers and traces fit our index. Its cache
namespaces (a salt in the seed) are not supported: their formula is not published.
"""

import re
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

HASH_SEED = 1337
TOKEN_BYTES = 4

_pack_link = struct.Struct("<QQ").pack
_is_digest = re.compile("[0-9a-fA-F]{64}").fullmatch


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    lora_name: str = "",
    mm_objects: Sequence[Sequence[int]] = (),
    eagle: bool = False,
) -> list[int]:
    """Hash every full block of a prompt; the tokens after the last full block do not count.

    token_ids: u32 each. An `array("I")` saves a conversion.
    block_size: tokens per block, at least 1.
    lora_name: the adapter that computed the blocks; "" for the base model.
    mm_objects: for each block, the u64 hashes of the multimodal objects that overlap it, in any
        order; blocks past its end have none.
    eagle: hash windows of `block_size + 1` tokens, `block_size` apart, as EAGLE drafting needs.
    Returns one u64 per full block. Raises ValueError for a block size below 1, OverflowError for a
    token outside u32 or an object hash outside u64. About 15 ns a token in blocks of 16.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    data = _little_endian("I", token_ids)
    stride = block_size * TOKEN_BYTES
    width = stride + TOKEN_BYTES if eagle else stride
    starts = range(0, len(data) - width + 1, stride)
    seed = _lora_seed(lora_name) if lora_name else HASH_SEED
    if not mm_objects:
        return [xxh3_64_intdigest(data[at : at + width], seed) for at in starts]
    suffixes = [_little_endian("Q", sorted(objects)) for objects in mm_objects[: len(starts)]]
    suffixes += [b""] * (len(starts) - len(suffixes))
    return [
        xxh3_64_intdigest(data[at : at + width] + suffix, seed)
        for at, suffix in zip(starts, suffixes, strict=True)
    ]


def sequence_hashes(block_hashes: Iterable[int], parent_hash: int | None = None) -> list[int]:
    """Chain block hashes, from the root or onwards from the sequence hash `parent_hash`.

    block_hashes: u64 each, in prompt order. Returns one u64 per block; about 0.1 µs each.
    """
    chain: list[int] = []
    previous = parent_hash
    for block_hash in block_hashes:
        if previous is None:
            previous = block_hash
        else:
            previous = xxh3_64_intdigest(_pack_link(previous, block_hash), HASH_SEED)
        chain.append(previous)
    return chain


def prompt_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    lora_name: str = "",
    mm_objects: Sequence[Sequence[int]] = (),
    eagle: bool = False,
) -> list[int]:
    """The sequence hashes of a prompt's full blocks: `block_hashes`, then `sequence_hashes`."""
    return sequence_hashes(
        block_hashes(token_ids, block_size, lora_name=lora_name, mm_objects=mm_objects, eagle=eagle)
    )


def multimodal_hash(identifier: str) -> int:
    """The u64 of a multimodal object: the head of a 64-digit hex digest, or a hash of its name."""
    if _is_digest(identifier):
        return int(identifier[:16], 16)
    return xxh3_64_intdigest(identifier.encode())


def _lora_seed(lora_name: str) -> int:
    return (HASH_SEED + xxh3_64_intdigest(lora_name.encode())) % 2**64


def _little_endian(typecode: str, values: Sequence[int]) -> bytes:
    """Unsigned integers as consecutive little-endian `array` items: u32 for "I", u64 for "Q"."""
    column = array(typecode, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()
