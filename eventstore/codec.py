"""Events to bytes and back: one message of the log is one batch of one producer.

    [version, producer, epoch, first, [event, …]]        as MessagePack

`producer` is the part of the subject that names the writer, `epoch` its incarnation, and `first`
the number of the first event within the epoch, counted from 0: a reader can tell what it has seen.
Reading is total: what cannot be read comes back as `Unreadable`, so that one bad record from a
newer producer or a bug is set aside in full view and stops nobody.
"""

from typing import Any

import msgspec
from msgspec import Struct

from eventstore.events import AnyEvent
from eventstore.subjects import hex_id

VERSION = 1


class Batch(Struct, frozen=True, array_like=True, gc=False):
    """Events `first … first + len(events) - 1` of `producer` in its `epoch`."""

    version: int
    producer: str
    epoch: int
    first: int
    events: list[AnyEvent]


class _Envelope(Struct, frozen=True, array_like=True):
    version: int
    producer: str
    epoch: int
    first: int
    events: list[msgspec.Raw]


class Unreadable(Struct, frozen=True, gc=False):
    """An event, or a whole message, that this version cannot read.

    index: position in the batch, or -1 for a whole message.
    """

    index: int
    reason: str


class Decoded(Struct, frozen=True, gc=False):
    """What a message says: `batch.events` are the readable ones, in order.

    count: events in the message, readable or not (0 if the message as a whole is unreadable): the
    producer's numbers `first … first + count - 1` are used up.
    """

    batch: Batch | None
    count: int
    unreadable: tuple[Unreadable, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_batch = msgspec.msgpack.Decoder(Batch)
_envelope = msgspec.msgpack.Decoder(_Envelope)
_event: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)


def encode(producer: str, epoch: int, first: int, events: list[AnyEvent]) -> bytes:
    """One message. The caller keeps it below the server's max_payload."""
    return _encoder.encode(Batch(VERSION, producer, epoch, first, events))


def join(producer: str, epoch: int, first: int, events: list[bytes]) -> bytes:
    """One message of events that `encoded_event` made: what `encode` makes of them, for less."""
    raws = list(map(msgspec.Raw, events))
    return _encoder.encode(_Envelope(VERSION, producer, epoch, first, raws))


def encoded_event(event: AnyEvent) -> bytes:
    """One event alone: its size in a batch, and its canonical form."""
    return _encoder.encode(event)


def decode(data: bytes) -> Decoded:
    """Read a message. Never raises on any bytes."""
    try:
        batch = _batch.decode(data)
        if batch.version == VERSION:
            return Decoded(batch, len(batch.events))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return _decode_slowly(data)


def _decode_slowly(data: bytes) -> Decoded:
    try:
        envelope = _envelope.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Decoded(None, 0, (Unreadable(-1, f"not a batch: {error}"),))
    if envelope.version != VERSION:
        reason = f"format version {envelope.version}, this reader knows {VERSION}"
        return Decoded(None, 0, (Unreadable(-1, reason),))
    events: list[AnyEvent] = []
    unreadable: list[Unreadable] = []
    for index, raw in enumerate(envelope.events):
        try:
            events.append(_event.decode(raw))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            unreadable.append(Unreadable(index, str(error)))
    batch = Batch(VERSION, envelope.producer, envelope.epoch, envelope.first, events)
    return Decoded(batch, len(envelope.events), tuple(unreadable))


def tag_of(event: AnyEvent) -> str:
    """The event's wire tag, such as `request.routed`."""
    return str(event.__struct_config__.tag)


U64_FIELDS = frozenset({"worker_id", "frontend_id", "parent_hash", "sequence_hashes"})
"""Shown as 16 hex digits in JSON, where many readers keep only 53 bits of a number."""


def to_json_value(event: AnyEvent) -> dict[str, Any]:
    """The event as a JSON object with named fields, its tag under `type` first."""
    return {"type": tag_of(event), **_named_fields(event)}


def _named_fields(struct: Struct) -> dict[str, Any]:
    return {
        name: _plain(getattr(struct, name), name in U64_FIELDS) for name in struct.__struct_fields__
    }


def _plain(value: Any, as_hex: bool) -> Any:
    if isinstance(value, Struct):
        return _named_fields(value)
    if isinstance(value, list):
        return [_plain(item, as_hex) for item in value]
    return hex_id(value) if as_hex and value is not None else value
