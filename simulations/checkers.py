"""What must hold in every run, watched from outside: from the log, from digests, from decisions.

*Safety*, at every moment:

- a replica's digest is that of a refold of the log up to its cursor, in one life of the log;
- an acknowledged fact is in the log and counts; no fact counts twice, however often it is there;
- what a router decides, it decides from a state that has passed the head at its start, and
  never from an earlier one than before;
- the parts of a state agree (`RouterState.check`): no booking is negative or counted twice.

*Liveness*, once faults and traffic have stopped: see `Checkers.unsettled`.

The log itself is the canonical history. Where a crash of its server rolled it back, or it was made
anew, what is gone with it is gone deliberately, and nothing else may be.
"""

import asyncio
from collections.abc import Callable, Iterator

from msgspec import Struct

from eventstore import codec
from eventstore.events import AnyEvent
from eventstore.log import Record
from eventstore.subjects import kv_producer
from indexer.radix import WorkerRank
from router.fold import apply
from router.state import RouterState
from router.ticket import Ticket
from simulations.faults import Life
from simulations.processes import SimulatedFrontend, SimulatedWorker
from workers.engine import MockEngine

CHECK_EVERY = 8
"""Of how many digests one is followed by a check of the whole state, which costs as much as 30."""

Fact = tuple[str, int, int]
"""(producer, epoch, number): the name of a fact."""


class Failure(Struct, frozen=True):
    """A check that did not hold. life, seq: the record that it broke at; seq 0: at none."""

    check: str
    what: str
    life: int
    seq: int
    at_s: float

    def __str__(self) -> str:
        where = f"record {self.seq} of life {self.life}" if self.seq else "no single record"
        return f"{self.check}: {self.what}\n  at {where}, second {self.at_s:.3f}"


class Checkers:
    """Watches one run. `failed` is set at the first check that does not hold."""

    def __init__(self, digest_every: int, now_s: Callable[[], float]) -> None:
        """digest_every: compare digests at each record whose seq this divides. 1 finds the very
        record where two part; as states that have parted stay so, more finds them later."""
        self.failed = asyncio.Event()
        self.failure: Failure | None = None
        self.state = RouterState()
        """The canonical refold, always at the head of the log."""
        self.digests_checked = 0
        self.decisions = 0
        self._digest_every = digest_every
        self._now_s = now_s
        self._digests: dict[int, set[str]] = {}
        """By seq: of every life that had this record."""
        self._facts: set[Fact] = set()
        self._refused: set[Fact] = set()
        self._lost: set[Fact] = set()
        self._must_have: dict[SimulatedFrontend, int] = {}
        """The head of the log at its start, then where it last decided: that never goes back,
        but where the log did and the replica has read it again."""
        self._life: Life | None = None

    def fail(self, check: str, what: str, seq: int = 0) -> None:
        if self.failure is None:
            life = 0 if self._life is None else self._life.number
            self.failure = Failure(check, what, life, seq, self._now_s())
            self.failed.set()

    # --- the log ----------------------------------------------------------------------------------

    def appended(self, life: Life, record: Record) -> None:
        self._life = life
        decoded = codec.decode(record.data)
        bad = {unreadable.index for unreadable in decoded.unreadable}
        new = [
            fact
            for index, fact in enumerate(_facts_of(decoded))
            if index not in bad and fact not in self._facts
        ]
        self._facts.update(new)
        applied = len(apply(self.state, record))
        if applied > len(new):
            what = f"{len(new)} new facts, {applied} applied"
            self.fail("no fact is applied twice", what, record.seq)
        # Some that come late, behind newer ones of their producer, are not taken. Nobody may have
        # been told that they are written.
        self._refused.update(new[: len(new) - applied])
        if record.seq % self._digest_every == 0:
            self._digests.setdefault(record.seq, set()).add(self.state.digest())

    def new_life(self, life: Life, lost: list[Record]) -> None:
        """The log lost records: fold again what is left, and excuse what is not."""
        self._life = life
        self._must_have.clear()
        self.state = RouterState()
        before, self._facts = self._facts, set()
        self._refused.clear()
        for record in life.records:
            self.appended(life, record)
        self._lost |= before - self._facts

    def acknowledged(self, data: bytes) -> None:
        for fact in _facts_of(codec.decode(data)):
            if fact in self._lost:
                continue
            # An announcement behind one of a newer snapshot says nothing any more.
            refused = fact in self._refused and fact[0] != "control.snapshot"
            if fact not in self._facts or refused:
                self.fail("an acknowledged fact counts", f"{fact} is not in the log, or too late")

    # --- frontends --------------------------------------------------------------------------------

    def started(self, frontend: SimulatedFrontend) -> None:
        self._must_have[frontend] = self.state.cursor

    def restarted(self, frontend: SimulatedFrontend) -> None:
        self._must_have.pop(frontend, None)

    def applied(self, frontend: SimulatedFrontend, events: list[AnyEvent]) -> None:
        state = frontend.replica.state
        # `observe` is called when the record is folded, so the state is at it.
        if state.cursor % self._digest_every == 0:
            self.check_digest(frontend)

    def check_digest(self, frontend: SimulatedFrontend) -> None:
        """Compare with the refold, if that was digested at this place."""
        state = frontend.replica.state
        known = self._digests.get(state.cursor)
        if known is None:
            return
        self.digests_checked += 1
        if state.digest() not in known:
            what = f"{frontend.host.name} differs from the refold"
            self.fail("equal cursors have equal digests", what, state.cursor)
        elif self.digests_checked % CHECK_EVERY == 0:
            self.check_state(frontend.host.name, state)

    def check_state(self, name: str, state: RouterState) -> None:
        try:
            state.check()
        except AssertionError as error:
            self.fail("the parts of a state agree", f"{name}: {error!r}", state.cursor)

    def routed(self, frontend: SimulatedFrontend, ticket: Ticket) -> None:
        self.decisions += 1
        routed = ticket.routed
        assert routed is not None
        must_have = self._must_have.get(frontend, 0)
        if not frontend.replica.is_ready or routed.cursor < must_have:
            what = f"{frontend.host.name} decided at {routed.cursor}, had {must_have}"
            self.fail("decisions are made from a ready state", what, routed.cursor)
        self._must_have[frontend] = routed.cursor

    # --- liveness ---------------------------------------------------------------------------------

    def unsettled(
        self, frontends: list[SimulatedFrontend], workers: list[SimulatedWorker]
    ) -> str | None:
        """What is not as it must be once all is healed and idle; None if everything is.

        Every replica is ready, at the head of the log, with the digest of the refold; all facts are
        written; no request is left over anywhere; the workers in the state are the living ones, and
        each holds there exactly the blocks that its engine's cache holds.
        """
        return next(self._unsettled(frontends, workers), None)

    def _unsettled(
        self, frontends: list[SimulatedFrontend], workers: list[SimulatedWorker]
    ) -> Iterator[str]:
        state = self.state
        digest = state.digest()
        for frontend in frontends:
            replica, router, name = frontend.replica, frontend.router, frontend.host.name
            if not replica.is_ready:
                yield f"{name} is {replica.status().phase}"
            elif replica.state.cursor != state.cursor:
                yield f"{name} is at record {replica.state.cursor} of {state.cursor}"
            elif replica.state.digest() != digest:
                yield f"{name} at the head differs from the refold"
            elif router.buffered_events or router.live_requests or router.overlay_bookings:
                yield (
                    f"{name} has {router.buffered_events} facts unwritten, "
                    f"{router.live_requests} live requests, {router.overlay_bookings} overlaid"
                )
        for request_id, live in state.requests.items():
            yield f"request {request_id} of frontend {live.frontend_id:016x} is {live.phase}"
        alive = {worker.worker_id: worker for worker in workers}
        for worker_id in sorted(state.workers.keys() - alive.keys()):
            yield f"worker {worker_id:016x} is gone, and not for the state"
        for worker_id, worker in alive.items():
            if worker_id not in state.workers:
                yield f"{worker.host.name}, {worker_id:016x}, is not in the state"
            else:
                for dp_rank, engine in enumerate(worker.engines):
                    rank = WorkerRank(worker_id, dp_rank)
                    if not _holds_exactly(state, rank, engine) and not self._is_past_telling(rank):
                        yield f"{worker.host.name} holds other blocks than the state says"
        if state.unbased:
            yield f"{len(state.unbased)} caches are in doubt"

    def _is_past_telling(self, rank: WorkerRank) -> bool:
        """Whether nobody can notice that some of what the rank announced is missing.

        An idle feed looks now and then whether its last batch is still in the log. If the log lost
        it, and was then trimmed past that place before the feed looked, it sees what it would see
        if nothing was lost. To close this, frontends would have to tell workers how far they have
        read them.
        """
        producer = kv_producer(*rank)
        known = self.state.producers.get(producer)
        epoch = 0 if known is None else known.epoch
        lost = any(fact[0] == producer and fact[1] >= epoch for fact in self._lost)
        return lost and self._life is not None and self._life.extent().first_seq > 1


def _holds_exactly(state: RouterState, rank: WorkerRank, engine: MockEngine) -> bool:
    held = [h for run in engine.cache_contents() for h in run.sequence_hashes]
    tree = state.tree
    return tree.blocks_of(rank) == len(held) and all(tree.holds(rank, each) for each in held)


def _facts_of(decoded: codec.Decoded) -> list[Fact]:
    batch = decoded.batch
    if batch is None:
        return []
    return [(batch.producer, batch.epoch, batch.first + n) for n in range(decoded.count)]
