"""The whole deployment in virtual time under faults: many seeds hold, and each repeats exactly."""

import os
import subprocess
import sys

import pytest

from simulations.seeds import command, regressions, run_quietly
from simulations.swarm import Sizes

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
