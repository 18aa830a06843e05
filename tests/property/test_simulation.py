"""The whole deployment in virtual time under faults: many seeds hold, and each repeats exactly."""

import gc
import os
import random
import subprocess
import sys

import msgspec
import pytest

from simulations.cluster import Outcome
from simulations.seeds import command, regressions, run_quietly
from simulations.swarm import Sizes
from tests.elsewhere import tasks_elsewhere

SHORT = Sizes(replicas=3, workers=3, requests=80, seconds=20.0)
SEEDS = 300
SEEDS_A_TEST = 30


def check(seed: int, sizes: Sizes) -> None:
    outcome = run_quietly(seed, sizes)
    assert outcome.failure is None, f"{outcome.failure}\nRepeat: {command(seed, sizes)}"


@pytest.mark.parametrize("first", range(1, SEEDS + 1, SEEDS_A_TEST))
def test_every_check_holds(first: int) -> None:
    """Safety under each seed's own mix of faults, and then everybody back at one truth."""
    for seed in range(first, first + SEEDS_A_TEST):
        check(seed, SHORT)


@pytest.mark.parametrize(
    "found", regressions(), ids=lambda found: f"{found.seed}-{found.what[:30]}"
)
def test_what_was_found_once_stays_mended(found: "tuple[int, Sizes, str]") -> None:
    check(found[0], found[1])


def test_the_same_seed_writes_the_same_bytes() -> None:
    """In two processes that hash texts differently, and here."""
    program = (
        "from simulations.seeds import run_quietly; from simulations.swarm import Sizes;"
        "print(run_quietly(11, Sizes(requests=80, seconds=20.0)).fingerprint)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    told.add(run_quietly(11, Sizes(requests=80, seconds=20.0)).fingerprint)
    assert len(told) == 1


def timeless(outcome: Outcome) -> Outcome:
    """All that a seed decides."""
    return msgspec.structs.replace(outcome, real_s=0.0)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_run_is_the_same_whatever_else_goes_on_in_the_process(seed: int) -> None:
    """Tasks of other loops, other runs before it, garbage collected at other moments."""
    alone = timeless(run_quietly(seed, SHORT))
    drawn = random.getstate()
    with tasks_elsewhere():
        run_quietly(seed + 1, SHORT)
        assert timeless(run_quietly(seed, SHORT)) == alone
    thresholds = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    try:
        assert timeless(run_quietly(seed, SHORT)) == alone
    finally:
        gc.set_threshold(*thresholds)
    assert random.getstate() == drawn, "something draws from the generator that all share"
