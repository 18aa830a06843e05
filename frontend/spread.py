"""Which of several namespaces serves a request, where more than one has its model."""

import hashlib
import math
from collections.abc import Mapping

_BITS = 52
"""Of a hash: as many as a float between 0 and 1 tells apart from both."""


def draw(weights: Mapping[str, int], key: str) -> str:
    """One of the names, each with a probability in proportion to its weight over all keys.

    The same key is drawn the same name for as long as the weights stay; where they change, a name
    keeps its keys but for those that go to one whose share has grown (weighted rendezvous hashing:
    Schindelhauer and Schomaker, Weighted distributed hash tables, 2005). Names of weight 0 are
    drawn only if all weigh 0, and then alike. weights: not empty. About 1 µs a name.
    """
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1)
    return max(weights, key=lambda name: (_score(name, weights[name], key), name))


def _score(name: str, weight: int, key: str) -> float:
    # blake2b, as Python's own hash differs between processes: two frontends should agree.
    digest = hashlib.blake2b(f"{name} {key}".encode(errors="replace"), digest_size=8).digest()
    uniform = ((int.from_bytes(digest) >> (64 - _BITS)) + 0.5) / 2**_BITS
    return weight / -math.log(uniform)
