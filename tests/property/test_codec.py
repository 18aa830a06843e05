"""Bytes of the log: everything written reads back, and nothing at all makes reading fail."""

import json
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from eventstore import codec
from eventstore.events import U64, AnyEvent

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    U64: st.integers(0, 2**64 - 1),
    int: st.integers(0, 2**64 - 1) | st.integers(-(2**63), -1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=10),
    bool: st.booleans(),
    NoneType: st.none(),
}


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    if hint in _SCALARS:
        return _SCALARS[hint]
    if isinstance(hint, type) and issubclass(hint, Struct):
        return _of_struct(hint)
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*map(_of_type, get_args(hint)))
    if get_origin(hint) is list:
        return st.lists(_of_type(get_args(hint)[0]), max_size=5)
    raise NotImplementedError(hint)


def _of_struct(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{name: _of_type(hints[name]) for name in cls.__struct_fields__})


any_event: st.SearchStrategy[AnyEvent] = st.one_of(*map(_of_struct, get_args(AnyEvent)))
batches = st.tuples(
    st.text(max_size=20), st.integers(0, 2**63), st.integers(0, 2**63), st.lists(any_event)
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(batches)
def test_what_is_encoded_is_decoded(batch: tuple[str, int, int, list[AnyEvent]]) -> None:
    """decode(encode(batch)) == batch."""
    producer, epoch, first, events = batch
    decoded = codec.decode(codec.encode(producer, epoch, first, events))
    assert decoded.batch == codec.Batch(codec.VERSION, producer, epoch, first, events)
    assert decoded.count == len(events)
    assert decoded.unreadable == ()


@given(batches)
def test_joined_events_are_the_encoded_batch(
    batch: tuple[str, int, int, list[AnyEvent]],
) -> None:
    """join(encoded events) == encode(events), byte for byte."""
    producer, epoch, first, events = batch
    joined = codec.join(producer, epoch, first, [codec.encoded_event(e) for e in events])
    assert joined == codec.encode(producer, epoch, first, events)


@given(st.binary() | json_like.map(msgspec.msgpack.encode))
def test_no_bytes_make_reading_fail(data: bytes) -> None:
    """decode is total, and says of what it cannot read why."""
    decoded = codec.decode(data)
    if decoded.batch is None:
        assert decoded.count == 0
        assert [u.index for u in decoded.unreadable] == [-1]
    assert all(u.reason for u in decoded.unreadable)


@given(batches, st.data())
def test_no_damage_makes_reading_fail(
    batch: tuple[str, int, int, list[AnyEvent]], data: st.DataObject
) -> None:
    message = bytearray(codec.encode(*batch))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    codec.decode(bytes(message[: data.draw(st.integers(0, len(message)))]))
    codec.decode(bytes(message))


@given(st.lists(any_event | json_like.map(msgspec.msgpack.encode)))
def test_unreadable_events_are_set_aside_in_place(items: list[AnyEvent | bytes]) -> None:
    """The readable events keep their order, and every unreadable one is told with its place."""
    encoded = [item if isinstance(item, bytes) else codec.encoded_event(item) for item in items]
    decoded = codec.decode(codec.join("kv.1.0", 1, 5, encoded))
    assert decoded.batch is not None
    assert decoded.count == len(items)
    bad = {unreadable.index for unreadable in decoded.unreadable}
    assert bad >= {i for i, item in enumerate(items) if isinstance(item, bytes)} - _lucky(items)
    kept = [item for i, item in enumerate(items) if i not in bad]
    assert [codec.encoded_event(e) for e in decoded.batch.events] == [
        codec.encoded_event(item) if not isinstance(item, bytes) else _reencoded(item)
        for item in kept
    ]


def _lucky(items: list[AnyEvent | bytes]) -> set[int]:
    """Bytes that happen to be an event."""
    return {i for i, item in enumerate(items) if isinstance(item, bytes) and _is_event(item)}


def _is_event(data: bytes) -> bool:
    try:
        _reencoded(data)
    except msgspec.MsgspecError:
        return False
    return True


def _reencoded(data: bytes) -> bytes:
    decode: Callable[[bytes], AnyEvent] = msgspec.msgpack.Decoder(AnyEvent).decode
    return codec.encoded_event(decode(data))


@given(any_event)
def test_an_event_as_json_names_its_type_and_fields(event: AnyEvent) -> None:
    value = codec.to_json_value(event)
    assert next(iter(value)) == "type"
    assert value["type"] == codec.tag_of(event)
    assert list(value)[1:] == list(event.__struct_fields__)
    json.dumps(value)
