"""What a router counts ahead of the log, and no longer than that."""

import pytest
from msgspec.structs import replace

from eventstore import codec, events
from eventstore.log import Record
from indexer.masks import slots_of
from router.active import growth
from router.fold import apply
from router.local_load import LocalLoad
from router.selection import Load
from router.state import RouterState

CHAIN = [11, 12, 13, 14]
ROUTED = events.RequestRouted(
    "a", 0, 1, 0, "kv", 18, 0, CHAIN, 1, 1.0, 0.0, 2, [], "m",
    prediction=events.Prediction(10_000, 100, 80),
)  # fmt: skip
ACCEPTED = events.RequestAccepted("a", 9, "m", "chat", 18, None, False)


class Here:
    """A state, and the load of a router over it."""

    def __init__(self, replica_sync: bool) -> None:
        self.state = RouterState()
        self.local = LocalLoad(lambda: self.state, replica_sync)
        for worker_id in (1, 2):
            self.put(events.WorkerRegistered(worker_id, "m", "aggregated", 4))

    def put(self, *written: events.AnyEvent) -> None:
        seq = self.state.cursor + 1
        data = codec.encode(f"p{seq}", 1, 0, list(written))
        for event in apply(self.state, Record(seq, seq, "s", data)):
            if isinstance(event, events.RequestRouted):
                self.local.folded(event.request_id, event)
            elif isinstance(event, (events.WorkerRemoved, events.StateReset)):
                self.local.rebuild()

    def predicted(self) -> dict[int, int]:
        """By worker: leading blocks of the prompt that are predicted ahead of the log."""
        return {
            self.state.tree.rank_of(slot).worker_id: depth
            for mask, depth in self.local.predicted_depths(CHAIN)
            for slot in slots_of(mask)
        }


@pytest.mark.parametrize("sync", [True, False])
def test_a_prediction_counts_from_the_decision_to_its_echo(sync: bool) -> None:
    """Then the fold has it. Also if the request has ended meanwhile."""
    here = Here(sync)
    here.local.book("a", ROUTED)
    assert here.predicted() == {1: 4}
    here.local.free("a")
    assert (here.predicted(), len(here.local)) == ({1: 4}, 0)
    here.put(ACCEPTED, ROUTED)
    assert here.predicted() == {}
    assert here.state.predicted.match_depths(CHAIN) == [(0b01, 4)]


def test_a_decision_that_predicts_nothing_is_not_believed() -> None:
    here = Here(True)
    here.local.book("a", replace(ROUTED, prediction=None))
    assert here.predicted() == {}


@pytest.mark.parametrize("sync", [True, False])
def test_the_echo_of_an_earlier_choice_ends_nothing_of_the_later_one(sync: bool) -> None:
    here = Here(sync)
    here.local.book("a", ROUTED)
    here.local.free("a")
    later = replace(ROUTED, attempt=1, worker_id=2)
    here.local.book("a", later)
    here.put(ACCEPTED, ROUTED)
    assert here.predicted() == {2: 4}
    assert list(here.local.load().requests) == ([1, 1] if sync else [0, 1])
    here.put(events.RequestMigrated("a", 0, "worker_lost"), later)
    assert here.predicted() == {}
    assert list(here.local.load().requests) == [0, 1]
    assert len(here.local) == (0 if sync else 1)


@pytest.mark.parametrize("sync", [True, False])
def test_nothing_is_lost_when_slots_move(sync: bool) -> None:
    """Progress and growth are kept; with sync, what the fold counts is not counted twice."""
    here = Here(sync)
    here.local.book("a", replace(ROUTED, worker_id=2))
    here.local.prefill_completed("a")
    here.local.grown("a", growth(18, 10, 4, 40))
    before = here.local.load().blocks[1]
    assert before == 5, "(4 + 2) * 3 / 4, and a half counts as one"
    here.put(events.WorkerRemoved(1, "shutdown"))
    here.put(events.WorkerRegistered(3, "m", "aggregated", 4))
    slot = here.state.tree.slot_of(here.state.ranks_of(2)[0])
    load = here.local.load()
    assert (load.prefill_tokens[slot], load.blocks[slot], load.requests[slot]) == (0, before, 1)
    assert here.predicted() == {2: 4}
    here.put(events.StateReset("test"))
    assert here.local.load().blocks[slot] == before
    here.local.free("a")
    assert here.local.load() == Load([0, 0], [0, 0], [0, 0])


def test_a_rank_that_has_left_books_nothing() -> None:
    here = Here(True)
    here.put(events.WorkerRemoved(1, "shutdown"))
    here.local.book("a", ROUTED)
    assert (len(here.local), here.predicted()) == (0, {})
