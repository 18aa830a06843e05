"""Who may be chosen: the ranks of the workers that can be reached, by model and role."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from eventstore.events import WorkerRegistered
from indexer.radix import WorkerRank
from router.state import RouterState


class Candidates(Struct, frozen=True):
    """The ranks a request may go to, by slot, ascending."""

    ranks: list[WorkerRank]
    slots: list[int]
    workers: list[WorkerRegistered]
    """Of each rank, what its worker says of itself."""

    def items_of(self, by_slot: Sequence[int]) -> Sequence[int]:
        """The candidates' items of a list by slot. No copy where every slot is a candidate."""
        if len(self.slots) == len(by_slot):
            return by_slot
        return [by_slot[slot] for slot in self.slots]

    def of_worker(self, worker_id: int, dp_rank: int | None = None) -> "Candidates":
        """The worker's ranks, or the one named."""
        return self.where(
            lambda rank: rank.worker_id == worker_id and dp_rank in (None, rank.dp_rank)
        )

    def where(self, keep: Callable[[WorkerRank], bool]) -> "Candidates":
        return self.at([index for index, rank in enumerate(self.ranks) if keep(rank)])

    def at(self, indices: Sequence[int]) -> "Candidates":
        """Those at the given places, which ascend."""
        if len(indices) == len(self.ranks):
            return self
        return Candidates(
            [self.ranks[i] for i in indices],
            [self.slots[i] for i in indices],
            [self.workers[i] for i in indices],
        )


class Serving:
    """The workers that this frontend reaches, and the ranks that follow for the state at hand."""

    def __init__(self) -> None:
        self._workers: dict[int, tuple[str, str]] = {}
        self._known: dict[tuple[str, str], Candidates] = {}
        self._version = -1

    def add(self, worker_id: int, model: str, role: str) -> None:
        self._workers[worker_id] = model, role
        self._known.clear()

    def remove(self, worker_id: int) -> None:
        self._workers.pop(worker_id, None)
        self._known.clear()

    def forget(self) -> None:
        """The state is another one, and slots have a new meaning."""
        self._known.clear()
        self._version = -1

    def of(self, model: str, role: str, state: RouterState) -> Candidates:
        """The ranks of a model's workers with this role. Kept until a worker comes or goes."""
        if state.workers_version != self._version:
            self._known.clear()
            self._version = state.workers_version
        known = self._known.get((model, role))
        if known is None:
            ranks = [
                rank
                for worker_id, served in self._workers.items()
                if served == (model, role)
                for rank in state.ranks_of(worker_id)
            ]
            ranks.sort(key=state.tree.slot_of)
            slots = [state.tree.slot_of(rank) for rank in ranks]
            workers = [state.workers[rank.worker_id] for rank in ranks]
            known = Candidates(ranks, slots, workers)
            self._known[model, role] = known
        return known
