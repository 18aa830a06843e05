"""Laws of the fold: split anywhere, redelivered or repeated, the same log gives the same state."""

import os
import subprocess
import sys
from collections.abc import Iterable
from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from eventstore import codec, events
from eventstore.log import Record
from eventstore.subjects import kv_producer, request_producer, worker_producer
from indexer.radix import WorkerRank
from router.fold import apply
from router.lifecycle import Phase
from router.state import RouterState

WORKERS = (1, 2, 3)
CHAINS = ([10, 11, 12, 13], [10, 11, 20], [30], [10, 11, 12, 40, 41], [])


def history(seed: int, length: int) -> list[Record]:
    """A log of `length` records from producers that live, die, and now and then write nonsense."""
    rng = Random(seed)
    numbers: dict[str, int] = {}
    live: list[str] = []
    records = []

    def message(producer: str, *written: events.AnyEvent) -> bytes:
        first = numbers.get(producer, 0)
        numbers[producer] = first + len(written)
        return codec.encode(producer, 1, first, list(written))

    for seq in range(1, length + 1):
        worker = rng.choice(WORKERS)
        rank = rng.randrange(3)
        chain = rng.choice(CHAINS)
        cut = rng.randrange(len(chain) + 1)
        parent = chain[cut - 1] if cut else None
        request = rng.choice(live) if live and rng.random() < 0.9 else f"r{seq}"
        frontend = request_producer(rng.randrange(2))
        kv = kv_producer(worker, rank)
        what = rng.randrange(20)
        if what == 0:
            data = message(
                worker_producer(worker),
                events.WorkerRegistered(worker, "m", "aggregated", 4, 0, 2),
            )
        elif what == 1 and rng.random() < 0.3:
            data = message(worker_producer(worker), events.WorkerRemoved(worker, "shutdown"))
        elif what in (1, 2, 3):
            data = message(kv, events.BlockStored(worker, rank, parent, chain[cut:]))
        elif what == 4:
            data = message(kv, events.BlockRemoved(worker, rank, chain[cut:]))
        elif what == 5:
            data = message(kv, rng.choice([events.AllBlocksCleared, _rebased])(worker, rank))
        elif what in (6, 7):
            live.append(request)
            data = message(
                frontend, events.RequestAccepted(request, 0, "m", "chat", 18, None, False)
            )
        elif what in (8, 9):
            data = message(
                frontend,
                _routed(rng, request, worker, rank, chain, seq),
            )
        elif what == 10:
            ttft_ms = rng.choice([None, 20.0, 1e300, -1.0, float("inf"), float("nan")])
            completed = rng.choice([events.PrefillCompleted, _hop_ended])
            data = message(frontend, completed(request, rng.choice([None, 0, 4, 99]), ttft_ms))
        elif what == 11:
            data = message(frontend, events.RequestCompleted(request, 3, "stop", 4))
        elif what == 12:
            data = message(
                frontend,
                events.RequestMigrated(request, 1, "lost"),
                events.RequestQueued(request, 0.0),
                events.RequestCancelled(request, 0, "client"),
            )
        elif what == 13 and records:
            data = rng.choice(records).data
        elif what in (14, 15):
            data = message(frontend, events.OutputGrown(request, rng.randrange(-1, 40)))
        elif what == 16:
            data = message(kv, events.PrefixPinned(worker, rank, chain, rng.randrange(-1, 2)))
        elif what == 17:
            changed = events.BusyThresholdChanged("m", rng.random(), None, 0.5, "test")
            data = message("control", changed)
        elif rng.random() < 0.2:
            data = message(
                "control",
                rng.choice([events.StateReset("test"), events.FrontendRemoved(0, "lease_expired")]),
            )
        else:
            data = rng.choice([b"", b"\xc1", rng.randbytes(20), b"\x95\x02\xa1a\x01\x00\x90"])
        records.append(Record(seq, seq * 1_000_000, "reckon.t.any", data))
    return records


def _routed(
    rng: Random, request: str, worker: int, rank: int, chain: list[int], seq: int
) -> events.RequestRouted:
    return events.RequestRouted(
        request_id=request,
        attempt=0,
        worker_id=worker,
        dp_rank=rank,
        mode="kv",
        isl=18,
        overlap_blocks=1,
        sequence_hashes=chain,
        cursor=seq,
        overlap_weight=1.0,
        temperature=0.0,
        candidate_count=1,
        candidates=[],
        model="m",
        role=rng.choice(["aggregated", "aggregated", "prefill", "decode"]),
        expected_osl=rng.choice([None, -1, 0, 7, 20]),
        books_blocks=rng.random() < 0.8,
        shares_blocks=rng.random() < 0.8,
        books_prefill=rng.random() < 0.8,
        prediction=rng.choice([None, events.Prediction(rng.randrange(-1, 20), 6, 3)]),
        session=rng.choice([None, events.SessionBinding(rng.choice("abc"), rng.randrange(20))]),
    )


def _hop_ended(
    request: str, cached_tokens: int | None, ttft_ms: float | None
) -> events.PrefillHopEnded:
    return events.PrefillHopEnded(request, cached_tokens, ttft_ms, "done")


def _rebased(worker: int, rank: int) -> events.KvRebased:
    return events.KvRebased(worker, rank, "test")


def fold(records: Iterable[Record], state: RouterState | None = None) -> RouterState:
    state = state or RouterState()
    for record in records:
        apply(state, record)
    return state


logs = st.builds(history, st.integers(0, 2**32), st.integers(0, 80))


@given(logs)
def test_the_parts_of_the_state_agree_after_every_record(log: list[Record]) -> None:
    state = RouterState()
    for record in log:
        apply(state, record)
        state.check()
    assert state.cursor == len(log)


@given(logs, st.integers(0, 80))
def test_fold_split_anywhere_is_the_same_fold(log: list[Record], cut: int) -> None:
    """fold(a + b) == fold(b, fold(a)), compared as digests."""
    assert fold(log[cut:], fold(log[:cut])).digest() == fold(log).digest()


@given(logs, st.randoms(use_true_random=False))
def test_redelivery_changes_nothing(log: list[Record], rng: Random) -> None:
    state = RouterState()
    for record in log:
        apply(state, record)
        before = state.digest()
        assert apply(state, log[rng.randrange(record.seq)]) == []
        assert state.digest() == before
    assert state.digest() == fold(log).digest()


@given(logs)
def test_a_batch_appended_twice_counts_once(log: list[Record]) -> None:
    """A retry that slipped past the server's window changes nothing but the count of duplicates."""
    doubled = [
        Record(2 * i + j + 1, record.time_ns, record.subject, record.data)
        for i, record in enumerate(log)
        for j in (0, 1)
    ]
    once, twice = fold(log), fold(doubled)
    assert twice.tree.digest() == once.tree.digest()
    assert twice.requests == once.requests
    assert twice.workers == once.workers
    assert twice.active.prefill_tokens == once.active.prefill_tokens


@given(logs)
@example(history(1, 200))
def test_bookings_end_with_their_requests(log: list[Record]) -> None:
    """Once every live request has ended, nothing is booked anywhere."""
    state = fold(log)
    seq = state.cursor
    for request_id in list(state.requests):
        seq += 1
        end = codec.encode(f"end.{seq}", 1, 0, [events.RequestCancelled(request_id, 0, "x")])
        apply(state, Record(seq, seq, "s", end))
    assert not state.requests
    assert not any(state.active.prefill_tokens)
    assert not any(state.active.blocks)
    assert len(state.active) == 0


def test_a_removed_worker_takes_its_blocks_and_bookings_and_stays_away() -> None:
    log = [
        ("worker.1", [events.WorkerRegistered(1, "m", "aggregated", 4)]),
        ("kv.1.0", [events.BlockStored(1, 0, None, [10, 11])]),
        ("request.1", [events.RequestAccepted("a", 1, "m", "chat", 8, None, True)]),
        (
            "request.1b",
            [events.RequestRouted("a", 0, 1, 0, "kv", 8, 0, [10, 11], 3, 1.0, 0.0, 1, [], "m")],
        ),
    ]
    state = RouterState()

    def put(producer: str, written: list[events.AnyEvent]) -> None:
        data = codec.encode(producer, 1, 0, written)
        apply(state, Record(state.cursor + 1, 0, "s", data))

    for producer, written in log:
        put(producer, written)
    assert state.tree.find_matches([10, 11]) == {WorkerRank(1, 0): 2}
    assert state.active.prefill_tokens == [8]
    put("gone", [events.WorkerRemoved(1, "lease_expired")])
    assert state.tree.pair_count == 0 and len(state.active) == 0
    assert state.requests["a"].phase is Phase.ACCEPTED
    put("late", [events.BlockStored(1, 0, None, [10])])
    put("again", [events.WorkerRegistered(1, "m", "aggregated", 4)])
    assert state.workers == {} and state.tree.pair_count == 0
    assert state.anomalies.unknown_worker == 2


def test_a_rank_is_in_doubt_until_it_announces_its_cache() -> None:
    """After registering, after a reset, after a gap in its numbers, after an unreadable record."""
    rank = WorkerRank(1, 0)
    state = RouterState()

    def put(producer: str, first: int, *written: events.AnyEvent, data: bytes = b"") -> None:
        data = data or codec.encode(producer, 1, first, list(written))
        subject = f"reckon.t.{producer}"
        apply(state, Record(state.cursor + 1, 0, subject, data))

    def rebase(first: int) -> None:
        assert state.unbased == {rank}
        put(kv_producer(1, 0), first, events.KvRebased(1, 0, "asked"))
        assert state.unbased == set()

    put(worker_producer(1), 0, events.WorkerRegistered(1, "m", "aggregated", 4))
    rebase(0)
    put("control", 0, events.StateReset("test"))
    assert set(state.workers) == {1}
    rebase(1)
    put(kv_producer(1, 0), 5, events.BlockStored(1, 0, None, [10]))
    rebase(6)
    put(kv_producer(1, 0), 7, data=b"nonsense")
    rebase(7)
    put("worker.x", 0, data=b"nonsense")
    assert state.unbased == set()


def test_a_frontends_requests_end_with_its_lease() -> None:
    state = RouterState()
    registered = events.WorkerRegistered(1, "m", "aggregated", 4)
    routed = events.RequestRouted("a", 0, 1, 0, "kv", 8, 0, [10, 11], 1, 1.0, 0.0, 1, [], "m")
    for producer, written in [
        ("worker.1", [registered]),
        ("request.7", [events.RequestAccepted("a", 7, "m", "chat", 8, None, True), routed]),
        ("request.8", [events.RequestAccepted("b", 8, "m", "chat", 8, None, True)]),
        ("frontend.7", [events.FrontendRemoved(7, "lease_expired")]),
    ]:
        data = codec.encode(producer, 1, 0, list(written))
        apply(state, Record(state.cursor + 1, 0, "s", data))
        state.check()
    assert set(state.requests) == {"b"}
    assert not any(state.active.blocks)


def test_digest_does_not_depend_on_the_hash_seed() -> None:
    """Two processes with different string hashing fold one log to one digest."""
    program = (
        "from tests.property.test_fold import fold, history;print(fold(history(5, 400)).digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
