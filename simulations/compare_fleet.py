"""What stands around the real router in a comparison: virtual time, the log, the engines.

    producers ─publish→ log ─`delay_ns` later, in order→ fold ─→ router's observer

Time is a heap of moments in nanoseconds; nothing sleeps. `VirtualLog` encodes, numbers and folds
events as the real log's ends do, a record for each publish; `Feed` and `Mirror` offer a router
what it uses of a publisher and a replica.
"""

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from msgspec import Struct

from eventstore import codec
from eventstore.events import AnyEvent, KvRebased, WorkerRegistered
from eventstore.log import Record
from eventstore.subjects import kv_producer, subject, worker_producer
from router.fold import apply
from router.state import RouterState
from simulations.trace import TRACE_BLOCK_TOKENS
from workers.engine import EngineConfig, MockEngine, StepResult

NAMESPACE = "compare"
MODEL = "compared"
NS_PER_MS = 1_000_000
EPOCH_NS = 1_700_000_000 * 1_000_000_000
"""When the log's clock begins; the fold takes 0 for never."""

DELIVERY, STEP_END, ARRIVAL, STEP_BEGIN = range(4)
"""The order of what happens at one moment. Whoever decides has seen every fact that is due, and
requests that come at the moment when a step begins are part of it."""


class Fleet(Struct, frozen=True, kw_only=True):
    """The simulated deployment. ValueError names the field that is out of range."""

    workers: int = 8
    blocks: int = 16_384
    """KV blocks of a worker."""
    block_size: int = 64
    """Tokens of a KV block; divides a trace's block."""
    slow_workers: int = 0
    """Of all workers, the last so many are slow."""
    slow_factor: float = 2.0
    """A slow worker's steps take so many times as long."""
    event_delay_ns: int = 0
    """From an event to its effect on the router's state."""

    def __post_init__(self) -> None:
        for name in ("workers", "blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if TRACE_BLOCK_TOKENS % self.block_size:
            raise ValueError(f"block_size must divide {TRACE_BLOCK_TOKENS}, got {self.block_size}")
        if not 0 <= self.slow_workers <= self.workers:
            raise ValueError(f"slow_workers must be 0 to {self.workers}, got {self.slow_workers}")
        if not self.slow_factor > 0:
            raise ValueError(f"slow_factor must be above 0, got {self.slow_factor}")
        if self.event_delay_ns < 0:
            raise ValueError(f"event_delay_ns must not be negative, got {self.event_delay_ns}")


class Clock:
    """Virtual time, and what is still to happen: at equal times by kind, then in order of `at`."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._moments: list[tuple[int, int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_ns: int, kind: int, action: Callable[[], None]) -> None:
        """Call `action` at `time_ns`, which is not past."""
        self._count += 1
        heappush(self._moments, (time_ns, kind, self._count, action))

    @property
    def is_last_now(self) -> bool:
        """Whether nothing else is due at this very moment."""
        return not self._moments or self._moments[0][0] > self.now_ns

    def run(self) -> None:
        """Until nothing is left to happen."""
        moments = self._moments
        while moments:
            self.now_ns, _, _, action = heappop(moments)
            action()


class VirtualLog:
    """Records in order, each folded into `state` a fixed time after it was published."""

    def __init__(self, clock: Clock, delay_ns: int) -> None:
        self.state = RouterState()
        self.last_seq = 0
        self.observe: Callable[[list[AnyEvent]], None] = lambda events: None
        """Gets the events of every record after it is applied."""
        self._clock = clock
        self._delay_ns = delay_ns
        self._numbers: dict[str, int] = {}

    def publish(self, producer: str, events: list[AnyEvent]) -> None:
        """Append one record. Encoded now, so what becomes of the events later does not matter."""
        first = self._numbers.get(producer, 0)
        self._numbers[producer] = first + len(events)
        self.last_seq += 1
        now_ns = self._clock.now_ns
        data = codec.encode(producer, 0, first, events)
        record = Record(self.last_seq, EPOCH_NS + now_ns, subject(NAMESPACE, producer), data)
        self._clock.at(now_ns + self._delay_ns, DELIVERY, lambda: self._deliver(record))

    def _deliver(self, record: Record) -> None:
        self.observe(apply(self.state, record))


class Feed:
    """What a router sees of its publisher. The log is always there, so nothing piles up."""

    events_max = 1_000_000_000

    def __init__(self, log: VirtualLog, producer: str) -> None:
        self.producer = producer
        self.published = 0
        self._log = log

    @property
    def buffered(self) -> int:
        return 0

    @property
    def last_seq(self) -> int:
        return self._log.last_seq

    def publish(self, event: AnyEvent) -> None:
        self.published += 1
        self._log.publish(self.producer, [event])


class Mirror:
    """What a router sees of its replica: always ready."""

    is_ready = True

    def __init__(self, log: VirtualLog) -> None:
        self.state = log.state
        self._log = log

    @property
    def head(self) -> int:
        return self._log.last_seq


class SimulatedWorker:
    """One worker with its real engine: steps follow each other for as long as there is work.

    worker_id: its number, from 1. requests, computed_tokens (prompt tokens computed and output
    tokens), busy_ns: what it did so far.
    """

    def __init__(
        self,
        worker_id: int,
        fleet: Fleet,
        clock: Clock,
        log: VirtualLog,
        deliver: Callable[[StepResult], None],
        *,
        waiting_max: int,
    ) -> None:
        """deliver: gets the result of each step when its time is over."""
        self.worker_id = worker_id
        self.requests = self.computed_tokens = self.busy_ns = 0
        slow = worker_id > fleet.workers - fleet.slow_workers
        config = EngineConfig(
            block_size=fleet.block_size,
            num_gpu_blocks=fleet.blocks,
            max_num_waiting=waiting_max,
            context_length=fleet.blocks * fleet.block_size + 1,
            speedup=1 / fleet.slow_factor if slow else 1.0,
        )
        self.engine = MockEngine(config, worker_id=worker_id)
        self._producer = kv_producer(worker_id, 0)
        self._clock = clock
        self._log = log
        self._deliver = deliver
        self._is_stepping = False
        self._result: StepResult | None = None
        registered = WorkerRegistered(
            worker_id,
            MODEL,
            "aggregated",
            fleet.block_size,
            total_kv_blocks=config.num_gpu_blocks,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            context_length=config.context_length,
        )
        log.publish(worker_producer(worker_id), [registered])
        log.publish(self._producer, [KvRebased(worker_id, 0, "start")])

    def wake(self) -> None:
        """There is work: step at this moment, once all that comes at it has come."""
        if not self._is_stepping:
            self._is_stepping = True
            self._clock.at(self._clock.now_ns, STEP_BEGIN, self._begin)

    def _begin(self) -> None:
        result = self._result = self.engine.step(self._clock.now_ns / NS_PER_MS)
        if result is None:
            self._is_stepping = False
            return
        duration_ns = round(result.duration_ms * NS_PER_MS)
        self.busy_ns += duration_ns
        self._clock.at(self._clock.now_ns + duration_ns, STEP_END, self._end)

    def _end(self) -> None:
        result = self._result
        assert result is not None
        self.computed_tokens += result.prefill_tokens + len(result.outputs)
        if result.kv_events:
            self._log.publish(self._producer, list(result.kv_events))
        self._deliver(result)
        if self._clock.is_last_now:
            self._begin()
        else:
            self._clock.at(self._clock.now_ns, STEP_BEGIN, self._begin)


def prompt_tokens(blocks: Sequence[int], input_length: int) -> "array[int]":
    """A prompt with the prefix structure of its trace blocks, as u32 token ids.

    blocks: a u32 for each trace block begun. Nobody reads these tokens, so the first one of a block
    is its number and all others are 0: two prompts agree up to the first block that differs, as
    with `simulations.trace.expand`, at a thousandth of its cost.
    """
    tokens = array("I", bytes(4 * TRACE_BLOCK_TOKENS * len(blocks)))
    tokens[::TRACE_BLOCK_TOKENS] = array("I", blocks)
    del tokens[input_length:]
    return tokens
