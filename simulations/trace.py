"""Mooncake traces: recorded requests as JSON lines, their content reduced to prefix structure.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, …]}

`hash_ids` names each 512-token block of the prompt, the last one partial. Equal ids at equal
positions with equal predecessors are a shared prefix. The tokens are gone; `expand` makes
others with the same structure.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import shake_128
from typing import TypeVar

import msgspec
from msgspec import Struct

TRACE_BLOCK_TOKENS = 512
"""Prompt tokens that one hash id stands for."""

_unpack_block = struct.Struct(f"<{TRACE_BLOCK_TOKENS}I").unpack
_BLOCK_BYTES = 4 * TRACE_BLOCK_TOKENS

T = TypeVar("T")


class TraceError(Exception):
    """Line `line` (from 1) is not a request of a trace. `problem` names the field."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line = line
        self.problem = problem

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


class TraceRequest(Struct, frozen=True, kw_only=True):
    """One recorded request. Lengths in tokens, at least 1."""

    timestamp_ms: int = msgspec.field(name="timestamp")
    """Arrival, from the start of the trace."""
    input_length: int
    output_length: int
    hash_ids: list[int]

    def __post_init__(self) -> None:
        for name in ("timestamp_ms", "input_length", "output_length"):
            least = 0 if name == "timestamp_ms" else 1
            if getattr(self, name) < least:
                field = name.removesuffix("_ms")
                raise ValueError(f"{field} is {getattr(self, name)}, below {least}")
        blocks = -(-self.input_length // TRACE_BLOCK_TOKENS)
        if len(self.hash_ids) != blocks:
            raise ValueError(
                f"hash_ids has {len(self.hash_ids)} ids; an input_length of {self.input_length} "
                f"takes {blocks}, one for every {TRACE_BLOCK_TOKENS} tokens begun"
            )


_decoder = msgspec.json.Decoder(TraceRequest)
_encoder = msgspec.json.Encoder()


def read_trace(lines: Iterable[bytes | str]) -> Iterator[TraceRequest]:
    """The requests of a trace, in its order, which is that of time. Unknown fields are left out.

    Raises TraceError at the first line that is no request, or is earlier than the one before it.
    """
    before_ms = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TraceError(number, str(error)) from error
        if request.timestamp_ms < before_ms:
            problem = f"timestamp is {request.timestamp_ms}, before the last one's {before_ms}"
            raise TraceError(number, problem)
        before_ms = request.timestamp_ms
        yield request


def encode_request(request: TraceRequest) -> bytes:
    """One line of a trace, line feed included."""
    return _encoder.encode(request) + b"\n"


def expand(hash_ids: Iterable[int], input_length: int, vocabulary: Sequence[T]) -> list[T]:
    """A prompt of `input_length` items of `vocabulary` with the prefix structure of `hash_ids`.

    vocabulary: token ids, or words that are one token each; a few hundred or more, so that blocks
        of different ids differ within their first few tokens.
    Equal ids give equal blocks, in every process. Raises ValueError if the ids don't stand for
    `input_length` tokens. About 30 µs a block.
    """
    tokens: list[T] = []
    size = len(vocabulary)
    for hash_id in hash_ids:
        # An extendable-output hash gives a whole block of draws at once, for any integer.
        draws = _unpack_block(shake_128(b"%d" % hash_id).digest(_BLOCK_BYTES))
        tokens += [vocabulary[draw % size] for draw in draws]
    if not 0 <= len(tokens) - input_length < TRACE_BLOCK_TOKENS:
        raise ValueError(f"input_length is {input_length}, the blocks have {len(tokens)} tokens")
    del tokens[input_length:]
    return tokens
