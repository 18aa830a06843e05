"""What passes between a process that follows a log and the one that it follows it for.

A frame is a length, u32 little-endian, and that many bytes of MessagePack. The owner sends one, an
`Order`; the process sends any number of `Frame`: `eventstore.relay`, `eventstore.relayed`.
"""

from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from eventstore.access import Access
from eventstore.log import Record

LENGTH_BYTES = 4


class Order(Struct, frozen=True):
    """What to follow: the first frame, from the owner. level: of its log lines."""

    addresses: tuple[str, ...]
    access: Access
    namespace: str
    replicas: int | None
    start_seq: int
    level: int


class Started(Struct, frozen=True, array_like=True, tag="started"):
    """Records will come from now on."""


class Records(Struct, frozen=True, array_like=True, tag="records", gc=False):
    """At least one, in the log's order."""

    records: list[Record]


class Line(Struct, frozen=True, array_like=True, tag="line"):
    """A log line, for the owner to write among its own."""

    level: int
    logger: str
    text: str


class Gap(Struct, frozen=True, array_like=True, tag="gap"):
    """The last frame: what ended the following was a LogGap."""

    expected: int
    got: int


class Unavailable(Struct, frozen=True, array_like=True, tag="unavailable"):
    """The last frame: what ended the following was a LogUnavailable."""

    what: str
    try_this: str


Frame: TypeAlias = Started | Records | Line | Gap | Unavailable


def _path(kind: type, value: Any) -> Any:
    return Path(value)


# The only type in a frame that MessagePack has no form for is Path.
_encoder = msgspec.msgpack.Encoder(enc_hook=str)
_order = msgspec.msgpack.Decoder(Order, dec_hook=_path)
_frame: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Order | Frame) -> bytes:
    """With its length before it."""
    data = _encoder.encode(frame)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def length(head: bytes | bytearray) -> int:
    """Of the frame behind these LENGTH_BYTES, in bytes."""
    return int.from_bytes(head, "little")


def decode_order(data: bytes) -> Order:
    """data: without the length. Raises msgspec.MsgspecError."""
    return _order.decode(data)


def decode(data: bytes | memoryview) -> Frame:
    """data: without the length. Raises msgspec.MsgspecError."""
    return _frame.decode(data)
