"""What follows from a decision in the log: beliefs, bindings and growth, and when they end."""

from msgspec.structs import replace

from eventstore import codec, events
from eventstore.log import Record
from indexer.radix import WorkerRank
from router.fold import apply
from router.snapshot import restored, snapshot_of
from router.state import RouterState

S = 1_000_000_000
CHAIN = [11, 12, 13, 14]
LEFT, RIGHT = WorkerRank(1, 0), WorkerRank(2, 0)


class Replicas:
    """Two states over one log; the second is put back from a snapshot before every record."""

    def __init__(self) -> None:
        self.state = RouterState()
        self._other = RouterState()
        self._number = 0
        self.put(0, events.WorkerRegistered(1, "m", "aggregated", 4))
        self.put(0, events.WorkerRegistered(2, "m", "aggregated", 4))

    def put(self, second: float, *written: events.AnyEvent) -> None:
        """One record at a time in seconds."""
        self._number += 1
        data = codec.encode(f"p{self._number}", 1, 0, list(written))
        record = Record(self.state.cursor + 1, round(second * S) + 1, "s", data)
        snapshot = snapshot_of(self._other, identity="x", version="x")
        self._other = restored("x", snapshot)
        for state in (self.state, self._other):
            apply(state, record)
            state.check()
        assert self.state.digest() == self._other.digest()

    def accept(self, second: float, request_id: str) -> None:
        self.put(second, events.RequestAccepted(request_id, 9, "m", "chat", 18, None, False))

    def route(self, second: float, request_id: str, rank: WorkerRank, **changes: object) -> None:
        """Accepted if need be, and routed."""
        if request_id not in self.state.requests:
            self.accept(second, request_id)
        fields = {**ROUTED, "request_id": request_id, "worker_id": rank.worker_id, **changes}
        self.put(second, events.RequestRouted(**fields))  # type: ignore[arg-type]

    def end(self, second: float, request_id: str) -> None:
        self.put(second, events.RequestCompleted(request_id, 3, "stop", 0))

    def session(self, second: float, name: str = "s", **where: str) -> WorkerRank | None:
        scope = {"model": "m", "role": "aggregated", **where}
        return self.state.session_rank(scope["model"], scope["role"], name, round(second * S) + 1)


ROUTED = {
    "attempt": 0,
    "dp_rank": 0,
    "mode": "kv",
    "isl": 18,
    "overlap_blocks": 0,
    "sequence_hashes": CHAIN,
    "cursor": 1,
    "overlap_weight": 1.0,
    "temperature": 0.0,
    "candidate_count": 2,
    "candidates": [],
    "model": "m",
}
TEN_S = events.Prediction(10_000, 100, 80)
SESSION = events.SessionBinding("s", 10_000)


# --- predictions ----------------------------------------------------------------------------------


def test_a_prediction_lasts_for_its_time_and_is_renewed() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, prediction=TEN_S)
    here.route(6, "b", LEFT, prediction=TEN_S, sequence_hashes=CHAIN[:2])
    here.put(9, events.SnapshotTaken("x", 1, ""))
    assert here.state.predicted.match_depths(CHAIN) == [(0b01, 4)]
    here.put(10, events.SnapshotTaken("x", 1, ""))
    assert here.state.predicted.match_depths(CHAIN) == [(0b01, 2)]
    assert here.state.predicted.match_depths(CHAIN, 16 * S) == [(0b01, 2)]
    assert here.state.predicted.match_depths(CHAIN, 16 * S + 1) == [], "without a record"
    here.put(16, events.SnapshotTaken("x", 1, ""))
    assert len(here.state.predicted) == 0


def test_too_many_predictions_are_pruned_to_what_is_kept() -> None:
    here = Replicas()
    bound = events.Prediction(10_000, 10, 6)
    for number in range(3):
        hashes = [100 * number + block for block in range(1, 5)]
        here.route(number, f"r{number}", LEFT, prediction=bound, sequence_hashes=hashes)
    assert len(here.state.predicted) == 6
    assert here.state.predicted.match_depths([201, 202, 203, 204]) == [(0b01, 4)]
    assert here.state.predicted.match_depths([1, 2]) == [], "the soonest to expire went first"


def test_the_worker_knows_better_what_it_holds() -> None:
    """What it evicts is believed no more; a new base ends pins and not predictions, as these may
    be ahead of it; an emptied cache ends both."""
    here = Replicas()
    here.route(0, "a", LEFT, prediction=TEN_S)
    here.put(0, events.PrefixPinned(1, 0, CHAIN, 300))
    here.put(1, events.BlockRemoved(1, 0, CHAIN[2:]))
    for index in (here.state.predicted, here.state.pinned):
        assert index.match_depths(CHAIN) == [(0b01, 2)]
    here.put(1, events.KvRebased(1, 0, "asked"))
    assert (len(here.state.predicted), len(here.state.pinned)) == (2, 0)
    here.put(1, events.PrefixPinned(1, 0, CHAIN, 300))
    here.put(1, events.AllBlocksCleared(1, 0))
    assert (len(here.state.predicted), len(here.state.pinned)) == (0, 0)


def test_whatever_times_the_log_says_a_snapshot_can_hold_them() -> None:
    here = Replicas()
    far, before = 2**64 - 1, -(2**63)
    for number, ms in enumerate((far, before)):
        here.route(
            0,
            f"r{number}",
            LEFT,
            prediction=events.Prediction(ms, ms, before),
            session=events.SessionBinding("s", ms),
        )
        here.put(0, events.PrefixPinned(1, 0, CHAIN, ms))
        here.end(0, f"r{number}")
    here.put(1, events.SnapshotTaken("x", 1, ""))


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_is_bound_until_it_has_been_idle_for_its_time() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, session=SESSION)
    assert (here.session(9.9), here.session(10)) == (LEFT, None)
    here.route(8, "b", LEFT, session=SESSION)
    assert here.session(17) == LEFT
    here.end(12, "b")
    assert (here.session(21), here.session(22)) == (LEFT, None), "not idle while it was served"
    here.end(40, "a")
    assert here.session(49) == LEFT, "nor while the other request ran, however long"


def test_a_session_that_moved_on_is_not_brought_back() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, session=SESSION)
    here.route(1, "b", RIGHT, session=SESSION)
    here.end(2, "a")
    assert here.session(2) == RIGHT
    here.put(3, events.RequestMigrated("b", 0, "worker_lost"))
    here.route(3, "b", LEFT, attempt=1, session=SESSION)
    here.end(4, "b")
    assert here.session(4) == LEFT


def test_a_binding_ends_with_its_worker() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, session=SESSION)
    here.put(1, events.WorkerRemoved(1, "lease_expired"))
    assert here.session(1) is None
    here.end(2, "a")
    assert here.session(2) is None


def test_each_model_and_role_has_its_own_binding() -> None:
    here = Replicas()
    here.put(0, events.WorkerRegistered(3, "m", "prefill", 4))
    here.accept(0, "a")
    here.route(0, "a", WorkerRank(3, 0), role="prefill", session=SESSION)
    here.route(0, "a", RIGHT, role="decode", session=SESSION)
    assert here.session(0, role="prefill") == WorkerRank(3, 0)
    assert here.session(0, role="decode") == RIGHT
    assert here.session(0) is here.session(0, model="other", role="decode") is None
    here.put(20, events.PrefillHopEnded("a", 0, 5.0, "done"))
    here.end(20, "a")
    assert here.session(29, role="prefill") == WorkerRank(3, 0)
    assert here.session(29, role="decode") == RIGHT


# --- growth ---------------------------------------------------------------------------------------


def test_output_grows_and_weighs_less_towards_the_expected_end() -> None:
    """Four prompt blocks, a partial one, and block size 4: the third token begins another."""
    here = Replicas()
    here.route(0, "a", LEFT, expected_osl=40)
    assert here.state.active.blocks[0] == 4
    here.put(1, events.PrefillCompleted("a", 0))
    for osl, blocks in ((3, 5), (10, 5), (20, 5), (38, 1), (60, 0)):
        # (4 + begun) * (1 - osl / 40), and a half counts as one
        here.put(2, events.OutputGrown("a", osl))
        assert here.state.active.blocks[0] == blocks
    here.end(3, "a")
    assert here.state.active.blocks[0] == 0


def test_a_shared_prompt_is_not_relieved_and_without_a_hint_nothing_is() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, expected_osl=20)
    here.route(0, "b", LEFT)
    for request_id in "ab":
        here.put(1, events.PrefillCompleted(request_id, 0))
        here.put(1, events.OutputGrown(request_id, 10))
    # Each began two blocks; those of "a" count half.
    assert here.state.active.blocks[0] == 4 + 1 + 2
    here.end(2, "a")
    assert here.state.active.blocks[0] == 4 + 2


def test_a_request_that_books_no_blocks_shares_none() -> None:
    here = Replicas()
    here.route(0, "a", LEFT, books_blocks=False)
    assert here.state.active.blocks[0] == 0
    here.route(0, "b", LEFT, shares_blocks=False)
    here.route(0, "c", LEFT, shares_blocks=False)
    here.route(0, "d", LEFT)
    here.route(0, "e", LEFT)
    assert here.state.active.blocks[0] == 4 + 4 + 4


def test_an_unknown_request_grows_nothing() -> None:
    here = Replicas()
    before = replace(here.state.anomalies)
    here.put(1, events.OutputGrown("nobody", 10))
    assert here.state.anomalies.out_of_order == before.out_of_order + 1
