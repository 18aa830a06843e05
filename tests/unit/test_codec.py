"""The wire format, sample by sample. What is here has been written to logs: it is never edited.

An event that has got new fields gets another sample; the one without them stays.
"""

from typing import Any, get_args

import msgspec
import pytest

from eventstore import codec
from eventstore.events import (
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    BusyThresholdChanged,
    Candidate,
    FrontendRemoved,
    KvRebased,
    OutputGrown,
    Prediction,
    PrefillCompleted,
    PrefillHopEnded,
    PrefixPinned,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    RequestRejected,
    RequestRouted,
    SessionBinding,
    SnapshotTaken,
    StateReset,
    WorkerRegistered,
    WorkerRemoved,
    WorkerSetAside,
)

U64 = 2**64 - 1
GOLDEN: list[tuple[AnyEvent, list[Any]]] = [
    (BlockStored(U64, 1, None, [1, U64]), ["kv.block_stored", U64, 1, None, [1, U64]]),
    (BlockRemoved(2, 0, [7]), ["kv.block_removed", 2, 0, [7]]),
    (AllBlocksCleared(2, 3), ["kv.all_blocks_cleared", 2, 3]),
    (KvRebased(2, 0, "start"), ["kv.rebased", 2, 0, "start"]),
    (
        WorkerRegistered(2, "m", "aggregated", 16, 0, 1, 1000, 8192, 256, 4096),
        ["worker.registered", 2, "m", "aggregated", 16, 0, 1, 1000, 8192, 256, 4096],
    ),
    (WorkerRemoved(2, "lease_expired"), ["worker.removed", 2, "lease_expired"]),
    (FrontendRemoved(5, "lease_expired"), ["frontend.removed", 5, "lease_expired"]),
    (
        RequestAccepted("r", 5, "m", "chat", 100, None, True),
        ["request.accepted", "r", 5, "m", "chat", 100, None, True],
    ),
    (RequestQueued("r", 1.5), ["request.queued", "r", 1.5]),
    (
        RequestRouted(
            *("r", 0, 2, 1, "kv", 100, 3, [1, 2, 3], 42, 1.0, 0.0, 4),
            *([Candidate(2, 1, 3, 52, 6, 9.25)], "m", 64),
        ),
        [
            *("request.routed", "r", 0, 2, 1, "kv", 100, 3, [1, 2, 3], 42, 1.0, 0.0, 4),
            *([[2, 1, 3, 52, 6, 9.25]], "m", 64),
        ],
    ),
    (
        RequestRouted(
            *("r", 1, 2, 1, "kv", 100, 3, [1, 2, 3], 42, 1.0, 0.0, 4),
            *([Candidate(2, 1, 3, 52, 6, 9.25, 7)], "m", 64, "decode", 500, True, False, False),
            *("ms", 12.5, Prediction(120_000, 100, 80), SessionBinding("s", 60_000), 2, 1, 88.5),
        ),
        [
            *("request.routed", "r", 1, 2, 1, "kv", 100, 3, [1, 2, 3], 42, 1.0, 0.0, 4),
            *([[2, 1, 3, 52, 6, 9.25, 7]], "m", 64, "decode", 500, True, False, False),
            *("ms", 12.5, [120_000, 100, 80], ["s", 60_000], 2, 1, 88.5),
        ],
    ),
    (
        RequestQueued("r", 1.5, "prefill", 2, 900, 4),
        ["request.queued", "r", 1.5, "prefill", 2, 900, 4],
    ),
    (PrefillCompleted("r", 48), ["request.prefill_completed", "r", 48]),
    (PrefillCompleted("r", 48, 20.5), ["request.prefill_completed", "r", 48, 20.5]),
    (
        PrefillHopEnded("r", 4, 1.5, "done"),
        ["request.prefill_hop_ended", "r", 4, 1.5, "done"],
    ),
    (OutputGrown("r", 16), ["request.output_grown", "r", 16]),
    (RequestMigrated("r", 3, "worker_lost"), ["request.migrated", "r", 3, "worker_lost"]),
    (RequestCompleted("r", 64, "length", 48), ["request.completed", "r", 64, "length", 48]),
    (RequestFailed("r", 3, "worker_lost"), ["request.failed", "r", 3, "worker_lost"]),
    (RequestCancelled("r", 3, "disconnect"), ["request.cancelled", "r", 3, "disconnect"]),
    (RequestRejected("r", "overloaded", 503), ["request.rejected", "r", "overloaded", 503]),
    (
        RequestRejected("r", "all_workers_busy", 503, "all 2 are"),
        ["request.rejected", "r", "all_workers_busy", 503, "all 2 are"],
    ),
    (
        WorkerSetAside(1, 2, 5, 1.0, "worker_lost"),
        ["frontend.worker_set_aside", 1, 2, 5, 1.0, "worker_lost"],
    ),
    (PrefixPinned(1, 2, [3], 300), ["kv.prefix_pinned", 1, 2, [3], 300]),
    (
        BusyThresholdChanged("m", 0.85, 1000, None),
        ["threshold.changed", "m", 0.85, 1000, None],
    ),
    (
        BusyThresholdChanged("m", 0.85, 1000, None, "somebody"),
        ["threshold.changed", "m", 0.85, 1000, None, "somebody"],
    ),
    (StateReset("operator"), ["state.reset", "operator"]),
    (SnapshotTaken("state-42", 42, "ab12"), ["snapshot.taken", "state-42", 42, "ab12"]),
]


def test_every_event_type_has_a_sample() -> None:
    assert {type(event) for event, _ in GOLDEN} == set(get_args(AnyEvent))


@pytest.mark.parametrize(("event", "wire"), GOLDEN, ids=lambda value: type(value).__name__)
def test_events_are_written_and_read_as_ever(event: AnyEvent, wire: list[Any]) -> None:
    assert _begins(msgspec.msgpack.decode(codec.encoded_event(event)), wire)
    decoded = codec.decode(msgspec.msgpack.encode([1, "p", 0, 0, [wire]]))
    assert decoded.batch is not None
    assert decoded.batch.events == [event]


def _begins(now: Any, then: Any) -> bool:
    """Whether an array of today is one of then, perhaps with more behind it, at every level."""
    if not isinstance(then, list):
        return bool(now == then)
    return len(now) >= len(then) and all(map(_begins, now, then))


def test_a_batch_is_an_array_of_five() -> None:
    data = codec.encode("control", 3, 7, [StateReset("x"), OutputGrown("r", 1)])
    assert data.hex() == (
        "9501a7636f6e74726f6c030792"
        "92ab73746174652e7265736574a178"
        "93b4726571756573742e6f75747075745f67726f776ea17201"
    )


def test_a_field_that_came_later_takes_its_default() -> None:
    decoded = codec.decode(
        msgspec.msgpack.encode([1, "p", 0, 0, [["worker.registered", 2, "m", "decode", 16]]])
    )
    assert decoded.batch is not None
    assert decoded.batch.events == [WorkerRegistered(2, "m", "decode", 16)]


def test_a_field_that_comes_later_is_passed_over() -> None:
    """A newer producer's additional fields do not make its events unreadable."""
    decoded = codec.decode(msgspec.msgpack.encode([1, "p", 0, 0, [["state.reset", "x", 99, {}]]]))
    assert decoded.batch is not None
    assert decoded.batch.events == [StateReset("x")]


def test_a_newer_producers_event_is_set_aside_and_the_others_are_kept() -> None:
    message = [1, "p", 4, 9, [["state.reset", "a"], ["kv.folded", 1], ["state.reset", 5]]]
    decoded = codec.decode(msgspec.msgpack.encode(message))
    assert decoded.batch == codec.Batch(1, "p", 4, 9, [StateReset("a")])
    assert decoded.count == 3
    assert [unreadable.index for unreadable in decoded.unreadable] == [1, 2]
    assert "kv.folded" in decoded.unreadable[0].reason


def test_a_newer_format_is_unreadable_as_a_whole() -> None:
    decoded = codec.decode(msgspec.msgpack.encode([2, "p", 0, 0, [["state.reset", "a"]]]))
    assert decoded.batch is None
    assert decoded.count == 0
    assert "version 2" in decoded.unreadable[0].reason


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x95", b"{}", b"\x91" * 10_000, b"\xd9\x01\xff"])
def test_junk_is_unreadable_as_a_whole(data: bytes) -> None:
    decoded = codec.decode(data)
    assert decoded.batch is None
    assert [unreadable.index for unreadable in decoded.unreadable] == [-1]


def test_an_event_in_words() -> None:
    event = BlockStored(2, 0, None, [3])
    assert codec.tag_of(event) == "kv.block_stored"
    assert codec.to_json_value(event) == {
        "type": "kv.block_stored",
        "worker_id": "0000000000000002",
        "dp_rank": 0,
        "parent_hash": None,
        "sequence_hashes": ["0000000000000003"],
    }
