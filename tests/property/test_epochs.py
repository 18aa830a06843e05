"""Worker epochs against a naive model: whatever reaches the log, and in whatever order, the state
never believes more of a rank than that rank has told, and it knows when it does not know all.

Each rank has a cache and writes down what happens to it, event by event, in numbered epochs that
begin with `kv.rebased` and the whole cache. What of that reaches the log is anything: in order or
not, once or twice, cut into other batches, or never.
"""

from random import Random

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from eventstore import codec
from eventstore.events import (
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    KvRebased,
    StateReset,
    WorkerRegistered,
    WorkerRemoved,
)
from eventstore.log import Record
from eventstore.subjects import CONTROL_PRODUCER, kv_producer, subject, worker_producer
from indexer.radix import WorkerRank
from router.fold import apply
from router.state import RouterState

# A forest of prompts as a heap: block n follows block n // 2, and blocks 2 and 3 follow nothing.
BLOCKS = range(2, 16)
SIZES = {1: 2, 2: 1}
"""Worker → its ranks."""
RANKS = [WorkerRank(worker, number) for worker, size in SIZES.items() for number in range(size)]
MORTAL = WorkerRank(2, 0)
"""The only rank of the only worker that may end; the others have the longer stories."""

Change = tuple[str, int, int]
"""What happens to how many blocks, the last of them this one."""

Written = AnyEvent | None
"""None: an event of a kind that this version cannot read."""
NEWER = msgspec.msgpack.encode(["kv.of_a_newer_kind", 1, 0])

ALL = len(BLOCKS) + 1
"""Of the events that tell a whole cache, at least."""

ranks = st.sampled_from(RANKS)
changes = st.tuples(
    st.sampled_from(["store", "store", "store", "remove", "remove", "clear", "newer"]),
    st.sampled_from(BLOCKS),
    st.integers(1, 3),
)
sizes = st.integers(1, 3)
"""Of batches, in events."""
times = st.sampled_from([1, 1, 1, 0, 2])
"""How often a batch arrives."""
pieces = st.tuples(st.integers(0, 15), st.integers(1, 8))
"""Of an epoch: so many events before its last, so many events."""


def parent_of(block: int) -> int | None:
    return block // 2 if block >= 4 else None


def chain_to(block: int) -> list[int]:
    """The prompt that ends with this block."""
    parent = parent_of(block)
    return [block] if parent is None else [*chain_to(parent), block]


class Rank:
    """A worker's rank: what it truly holds, and all that it has written."""

    def __init__(self, rank: WorkerRank) -> None:
        self.rank = rank
        self.cache: set[int] = set()
        self.epoch = 0
        self.written: dict[int, list[Written]] = {}
        """Epoch → its events, by number."""
        self.told: dict[int, list[set[int] | None]] = {}
        """Epoch → after how many of its events a reader of all of them knows which cache: None
        while the whole cache is still being told."""
        self.sent = 0
        """Of the present epoch."""
        self.start_epoch(1)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.sent = epoch, 0
        self.written[epoch], self.told[epoch] = [], []
        contents = [BlockStored(*self.rank, parent_of(b), [b]) for b in sorted(self.cache)]
        self.write(KvRebased(*self.rank, "test"), *contents)
        self.told[epoch][:-1] = [None] * len(contents)

    def write(self, *events: Written) -> None:
        for event in events:
            self.written[self.epoch].append(event)
            self.told[self.epoch].append(set(self.cache))

    def change(self, change: Change) -> None:
        """Of the last blocks of a prompt, whether what comes before is held or not."""
        what, block, length = change
        chain = chain_to(block)[-length:]
        match what:
            case "store":
                self.cache.update(chain)
                self.write(BlockStored(*self.rank, parent_of(chain[0]), chain))
            case "remove":
                self.cache.difference_update(chain)
                self.write(BlockRemoved(*self.rank, chain))
            case "clear":
                self.cache.clear()
                self.write(AllBlocksCleared(*self.rank))
            case "newer":
                self.write(None)

    def send(self, count: int) -> list[Written]:
        events = self.written[self.epoch][self.sent : self.sent + count]
        self.sent += len(events)
        return events


class Belief:
    """What may be believed of a rank: the rule, one event at a time."""

    def __init__(self) -> None:
        self.is_registered = False
        self.in_doubt = False
        self.blocks: set[int] = set()
        self.epoch = 0
        self.next = 0

    def read(self, epoch: int, first: int, events: list[Written]) -> None:
        for number, event in enumerate(events, start=first):
            self._read(epoch, number, event)
        if None in events:
            self.doubt()

    def _read(self, epoch: int, number: int, event: Written) -> None:
        if epoch > self.epoch:
            self.epoch, self.next = epoch, 0
        if epoch < self.epoch or number < self.next:
            return
        if number > self.next:
            self.doubt()
        self.next = number + 1
        if not self.is_registered:
            return
        match event:
            case KvRebased() | AllBlocksCleared():
                self.blocks.clear()
                self.in_doubt = False
            case BlockStored(sequence_hashes=hashes):
                self.blocks.update(hashes)
            case BlockRemoved(sequence_hashes=hashes):
                self.blocks.difference_update(hashes)

    def doubt(self) -> None:
        self.in_doubt = self.is_registered

    def forget(self) -> None:
        self.blocks.clear()
        self.doubt()

    def register(self, is_registered: bool) -> None:
        self.is_registered = is_registered
        self.forget()


class EpochMachine(RuleBasedStateMachine):
    """Ranks change and write; the log gets what it gets; the fold believes what the model does."""

    def __init__(self) -> None:
        super().__init__()
        self.state = RouterState()
        self.controls = 0
        self.ranks = {rank: Rank(rank) for rank in RANKS}
        self.beliefs = {rank: Belief() for rank in RANKS}
        self.ended: set[int] = set()
        self.register(RANKS[0].worker_id)

    @rule(
        rank=ranks,
        changes=st.lists(changes, max_size=8),
        batches=st.lists(st.tuples(sizes, times), min_size=1, max_size=6),
    )
    def live(self, rank: WorkerRank, changes: list[Change], batches: list[tuple[int, int]]) -> None:
        """The cache changes, and some of what is unsent is sent, in order."""
        writer = self.ranks[rank]
        for change in changes:
            writer.change(change)
        for size, times in batches:
            first = writer.sent
            events = writer.send(size)
            for _ in range(times):
                self.arrive(rank, writer.epoch, first, events)

    @rule(
        rank=ranks,
        skipped=st.integers(0, 2),
        keeps_cache=st.booleans(),
        lost=st.sampled_from([0, 0, 1, ALL]),
    )
    def start_epoch(self, rank: WorkerRank, skipped: int, keeps_cache: bool, lost: int) -> None:
        """What was not sent is never sent. An engine that was restarted comes back with nothing,
        and what it held is not named again. The whole cache arrives at once, but what is lost."""
        writer = self.ranks[rank]
        if not keeps_cache:
            writer.cache.clear()
        writer.start_epoch(writer.epoch + 1 + skipped)
        self.arrive(rank, writer.epoch, lost, writer.send(ALL)[lost:])

    @rule(rank=ranks, epochs_ago=st.integers(0, 2), pieces=st.lists(pieces, min_size=1, max_size=4))
    def arrive_late_or_twice(
        self, rank: WorkerRank, epochs_ago: int, pieces: list[tuple[int, int]]
    ) -> None:
        """Any pieces of what any epoch has sent, or was about to send, so also too early."""
        written = self.ranks[rank].written
        epoch = sorted(written)[-1 - min(epochs_ago, len(written) - 1)]
        for back, count in pieces:
            first = max(0, len(written[epoch]) - 1 - back)
            self.arrive(rank, epoch, first, written[epoch][first : first + count])

    @rule(what=st.sampled_from(["unreadable", "reset", "register", "end"]), rank=ranks)
    def befall(self, what: str, rank: WorkerRank) -> None:
        """What else costs a rank its blocks or the trust in them."""
        match what:
            case "unreadable":
                self.beliefs[rank].doubt()
                self.append(kv_producer(*rank), b"nonsense")
            case "reset":
                for belief in self.beliefs.values():
                    belief.forget()
                self.append_alone(CONTROL_PRODUCER, StateReset("test"))
            case "register":
                self.register(rank.worker_id)
            case "end" if rank == MORTAL and self.beliefs[MORTAL].is_registered:
                self.beliefs[MORTAL].register(False)
                self.ended.add(rank.worker_id)
                event = WorkerRemoved(rank.worker_id, "lease_expired")
                self.append_alone(worker_producer(rank.worker_id), event)

    @rule(order=st.integers(0, 2**32))
    def come_to_rest(self, order: int) -> None:
        """Every rank tells its whole cache in one more epoch, in order, among what is late of the
        others: then all is known and nothing in doubt."""
        rng = Random(order)
        for worker in SIZES:
            self.register(worker)
        unsent = []
        for rank, writer in self.ranks.items():
            writer.start_epoch(writer.epoch + 1)
            unsent += [rank] * len(writer.written[writer.epoch])
        rng.shuffle(unsent)
        for rank in unsent:
            self.live(rank, [], [(1, 1)])
            if rng.random() < 0.2:
                late = self.ranks[rng.choice(RANKS)]
                epoch = rng.choice(sorted(late.written)[:-1])
                old = [event for event in late.written[epoch] if event is not None]
                self.arrive(late.rank, epoch, 0, old[: rng.randrange(1, 8)])
        for rank, writer in self.ranks.items():
            assert self.held(rank) == (set() if rank.worker_id in self.ended else writer.cache)
        assert not self.state.unbased

    def teardown(self) -> None:
        self.come_to_rest(0)

    def arrive(self, rank: WorkerRank, epoch: int, first: int, events: list[Written]) -> None:
        if events:
            self.beliefs[rank].read(epoch, first, events)
            producer = kv_producer(*rank)
            written = [NEWER if event is None else codec.encoded_event(event) for event in events]
            self.append(producer, codec.join(producer, epoch, first, written))

    def register(self, worker: int) -> None:
        """Late, or once more, or after its end, when nothing of it counts any longer."""
        if worker not in self.ended:
            for rank, belief in self.beliefs.items():
                if rank.worker_id == worker:
                    belief.register(True)
        event = WorkerRegistered(worker, "m", "aggregated", 4, 0, SIZES[worker])
        self.append_alone(worker_producer(worker), event)

    def append_alone(self, producer: str, event: AnyEvent) -> None:
        """In an epoch of its own: that of other producers is not the matter here."""
        self.controls += 1
        self.append(producer, codec.encode(producer, self.controls, 0, [event]))

    def append(self, producer: str, data: bytes) -> None:
        seq = self.state.cursor + 1
        apply(self.state, Record(seq, seq, subject("t", producer), data))
        self.state.check()
        for rank, belief in self.beliefs.items():
            assert self.held(rank) == belief.blocks, rank
            assert (rank in self.state.unbased) == belief.in_doubt, rank

    # --- what is believed -------------------------------------------------------------------------

    def held(self, rank: WorkerRank) -> set[int]:
        """The blocks that the state believes are there."""
        tree = self.state.tree
        if rank not in tree.ranks():
            return set()
        bit = 1 << tree.slot_of(rank)
        return {block for block, mask in tree.holders().items() if mask & bit}

    @invariant()
    def what_is_not_in_doubt_is_true(self) -> None:
        """It is the very cache that the rank had when it wrote what was last read of it."""
        for rank, belief in self.beliefs.items():
            if belief.is_registered and not belief.in_doubt:
                told = self.ranks[rank].told[belief.epoch][belief.next - 1]
                assert told is None or self.held(rank) == told, rank

    @invariant()
    def prompts_match_as_deep_as_believed(self) -> None:
        for block in BLOCKS[len(BLOCKS) // 2 :]:  # the leaves: what is before is matched, too
            chain = chain_to(block)
            depths = {}
            for rank, belief in self.beliefs.items():
                missing = (depth for depth, one in enumerate(chain) if one not in belief.blocks)
                if depth := next(missing, len(chain)):
                    depths[rank] = depth
            assert self.state.tree.find_matches(chain) == depths


TestEpochs = EpochMachine.TestCase
TestEpochs.settings = settings(stateful_step_count=30)
