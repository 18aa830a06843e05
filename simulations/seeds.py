"""`python -m simulations cluster`: one seed in full view, or many with a progress bar."""

import logging
import multiprocessing
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eventstore.settings import VERSION, from_command_line
from simulations.cluster import Outcome, mix_of, simulate
from simulations.settings import ClusterSettings
from simulations.swarm import Sizes

REGRESSIONS = Path(__file__).with_name("regressions.txt")
SEED_BITS = 32
_SEEDS_A_CHUNK = 8

FAILED, INTERRUPTED = 1, 130


class Regression(NamedTuple):
    """A seed that found a bug, with the sizes it found it at, and what it was."""

    seed: int
    sizes: Sizes
    what: str


def regressions(path: Path = REGRESSIONS) -> list[Regression]:
    """Lines of `seed replicas workers requests seconds what it found`; # begins a comment."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            seed, replicas, workers, requests, seconds, what = line.split(maxsplit=5)
            sizes = Sizes(
                replicas=int(replicas),
                workers=int(workers),
                requests=int(requests),
                seconds=float(seconds),
            )
            found.append(Regression(int(seed), sizes, what))
    return found


def command(seed: int, sizes: Sizes) -> str:
    """What repeats a run."""
    options = [
        f"--replicas {sizes.replicas}",
        f"--workers {sizes.workers}",
        f"--requests {sizes.requests}",
        f"--seconds {sizes.seconds:g}",
    ]
    return " ".join([ClusterSettings.program, str(seed), *options])


@contextmanager
def silence() -> Iterator[None]:
    """Without the log lines of all simulated processes, which are many and bad news."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run_quietly(seed: int, sizes: Sizes) -> Outcome:
    """A run without log lines; one that fails is repeated to find the very record."""
    with silence():
        outcome = simulate(seed, sizes)
        if outcome.failure is not None and outcome.failure.seq:
            outcome = simulate(seed, sizes, digest_every=1)
    return outcome


# --- the command ----------------------------------------------------------------------------------


def cluster(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Returns the exit code: 0 if all checks held, 1 if one did not, 130 after Ctrl-C."""
    settings = from_command_line(ClusterSettings, argv, env)
    sizes = Sizes(
        replicas=settings.replicas,
        workers=settings.workers,
        requests=settings.requests,
        seconds=settings.seconds,
    )
    first = settings.seed
    if first is None:
        first = random.SystemRandom().getrandbits(SEED_BITS)
    try:
        if settings.seeds == 1:
            return _run_one(first, sizes, settings)
        return _run_many(range(first, first + settings.seeds), sizes, settings)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run_one(seed: int, sizes: Sizes, settings: ClusterSettings) -> int:
    if not settings.json:
        print(f"seed {seed}, reckon {VERSION}, {_described(sizes)}")
        print("\n".join(mix_of(seed).lines()), flush=True)
    if settings.log_lines:
        _show_log_lines()
        outcome = simulate(seed, sizes, digest_every=1)
    else:
        outcome = run_quietly(seed, sizes)
    if settings.json:
        print(msgspec.json.encode(outcome).decode())
    else:
        print(_summary([outcome]))
    return _tell_failure(outcome, sizes)


def _run_many(seeds: range, sizes: Sizes, settings: ClusterSettings) -> int:
    jobs = settings.jobs or os.cpu_count() or 1
    if not settings.json:
        described = _described(sizes)
        print(f"seeds {seeds[0]} to {seeds[-1]}, reckon {VERSION}, {described}", flush=True)
    outcomes, code = [], 0
    with (
        Progress(
            TextColumn("seeds"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        ) as progress,
        # Not forked: the progress bar has a thread.
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("seeds", total=len(seeds), failed=0)
        sizes_of_all = [sizes] * len(seeds)
        try:
            for outcome in pool.map(run_quietly, seeds, sizes_of_all, chunksize=_SEEDS_A_CHUNK):
                outcomes.append(outcome)
                if settings.json:
                    print(msgspec.json.encode(outcome).decode(), flush=True)
                code = _tell_failure(outcome, sizes) or code
                failed = sum(one.failure is not None for one in outcomes)
                progress.update(bar, advance=1, failed=failed)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if not settings.json:
        print(_summary(outcomes))
    return code


def _described(sizes: Sizes) -> str:
    return (
        f"{sizes.replicas} replicas, {sizes.workers} workers, "
        f"{sizes.requests} requests in {sizes.seconds:g} s"
    )


def _summary(outcomes: Sequence[Outcome]) -> str:
    virtual_s = sum(outcome.virtual_s for outcome in outcomes)
    real_s = sum(outcome.real_s for outcome in outcomes)
    records = sum(outcome.records for outcome in outcomes)
    lines = [
        f"{virtual_s:.1f} virtual seconds in {real_s:.1f}, {virtual_s / real_s:.0f} times as fast",
        f"{records} records, {sum(outcome.lives for outcome in outcomes)} lives of the log, "
        f"{sum(outcome.decisions for outcome in outcomes)} decisions, "
        f"{sum(outcome.digests_checked for outcome in outcomes)} digests compared",
        f"requests: {_counts(outcome.answers for outcome in outcomes)}",
        f"faults: {_counts(outcome.faults for outcome in outcomes)}",
    ]
    if len(outcomes) == 1:
        lines.append(f"log: {outcomes[0].fingerprint}")
    return "\n".join(lines)


def _counts(counts: Iterable[Mapping[str, int]]) -> str:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return ", ".join(f"{name} {count}" for name, count in sorted(total.items())) or "none"


def _tell_failure(outcome: Outcome, sizes: Sizes) -> int:
    if outcome.failure is None:
        return 0
    print(f"FAILED seed {outcome.seed}: {outcome.failure}", file=sys.stderr)
    print(f"Repeat: {command(outcome.seed, sizes)}", file=sys.stderr, flush=True)
    return FAILED


def _show_log_lines() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
