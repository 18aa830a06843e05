"""What one run is made of, all of it drawn from its seed.

Every run draws its own mix: some faults never happen in it and others often, so that seeds differ
in kind and not only in timing. Each part of a run draws from a generator of its own, named, so that
a new draw in one part does not shift the others.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import asdict

from simulations.faults import LinkRates

RngFor = Callable[[str], Random]

FAULT_WEIGHTS = (0, 0, 0, 1, 1, 5)
"""Half of the faults are off in a run, and a few are frequent."""

T = TypeVar("T")


def rng_for(seed: int) -> RngFor:
    """The generators of a run, by name."""
    return lambda name: Random(f"{seed}/{name}")


class Sizes(Struct, frozen=True, kw_only=True):
    """How large a run is. Given, not drawn."""

    replicas: int = 3
    """Frontends, each with a router replica."""
    workers: int = 4
    requests: int = 2000
    seconds: float = 60.0
    """Virtual time with traffic and faults."""


class Mix(Struct, frozen=True, kw_only=True):
    """The options of one run."""

    rates: LinkRates
    faults: dict[str, int]
    """Fault → weight; those that are off are left out."""
    fault_every_s: float
    """Mean time between two faults."""
    outage_s: float
    """Mean duration of what ends by itself: cuts, slowness, a server's restart."""
    lost_tail: int
    """Records that a rollback loses, at most."""
    replica_sync: bool
    temperature: float
    mode: str
    block_size: int
    num_gpu_blocks: int
    max_num_seqs: int
    ranks: int
    """Data-parallel ranks of a worker."""
    kv_events_max: int
    """Bound of a KV feed's buffer."""
    snapshot_messages: int | None
    """After how many records a snapshot is due; None: never."""
    speedup: float
    prefixes: int
    """Shared prompt beginnings."""
    max_tokens: int
    """Longest output."""
    aborts: float
    """Share of requests whose client goes away."""

    def lines(self) -> list[str]:
        """Every option, one a line."""
        options = asdict(self)
        rates = asdict(options.pop("rates"))
        return [f"  {name} = {value}" for name, value in (rates | options).items()]


def draw_mix(rng: RngFor, faults: Iterable[str]) -> Mix:
    """faults: all that there are. Each option has a generator of its own, so a further one, or a
    further fault, leaves the others of a seed as they were."""

    def choice(name: str, values: Sequence[T]) -> T:
        return rng(f"mix/{name}").choice(values)

    def sometimes(name: str, *values: float) -> float:
        return choice(name, [0.0] * len(values) + list(values))

    weights = {fault: choice(f"faults/{fault}", FAULT_WEIGHTS) for fault in faults}
    return Mix(
        rates=LinkRates(
            latency_s=choice("latency_s", [0.0005, 0.005, 0.05]),
            drop=sometimes("drop", 0.01, 0.1),
            lost_answer=sometimes("lost_answer", 0.01, 0.1),
            duplicate=sometimes("duplicate", 0.02, 0.2),
            duplicate_after_s=choice("duplicate_after_s", [0.01, 1.0, 10.0]),
        ),
        faults={fault: weight for fault, weight in weights.items() if weight},
        fault_every_s=choice("fault_every_s", [0.5, 2.0, 5.0]),
        outage_s=choice("outage_s", [0.5, 3.0, 8.0]),
        lost_tail=choice("lost_tail", [1, 5, 50]),
        replica_sync=choice("replica_sync", [False, True]),
        temperature=choice("temperature", [0.0, 0.0, 0.5]),
        mode=choice("mode", ["kv", "kv", "kv", "round-robin", "random"]),
        block_size=choice("block_size", [4, 16]),
        num_gpu_blocks=choice("num_gpu_blocks", [24, 60, 500]),
        max_num_seqs=choice("max_num_seqs", [1, 4, 16]),
        ranks=choice("ranks", [1, 1, 2]),
        kv_events_max=choice("kv_events_max", [4, 100_000]),
        snapshot_messages=choice("snapshot_messages", [5, 30, None]),
        speedup=choice("speedup", [0.3, 1.0, 3.0]),
        prefixes=choice("prefixes", [1, 3, 10]),
        max_tokens=choice("max_tokens", [3, 12, 30]),
        aborts=choice("aborts", [0.0, 0.1, 0.4]),
    )
