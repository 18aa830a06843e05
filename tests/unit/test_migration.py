"""What a request that moves on takes along, and when it may not."""

import pytest

from frontend.errors import (
    DeadlineExceeded,
    EngineError,
    EngineOverloaded,
    EnginePrefillFailed,
    EngineRefused,
    EngineShutDown,
)
from frontend.hints import RoutingHints
from frontend.legs import Job, routed_request
from frontend.migration import Migration
from frontend.served import ServedModel
from indexer.blocks import prompt_hashes
from tests.integration.harness import TOKENIZER, card
from workers.errors import CannotConnect, FrameTooLarge, WorkerBacklogged, WorkerLost
from workers.protocol import SamplingOptions, StopConditions

PROMPT = list(range(40))
LOST = WorkerLost(1, "gone")


def job(
    stop: StopConditions | None = None,
    sampling: SamplingOptions | None = None,
    hints: RoutingHints | None = None,
) -> Job:
    return Job(
        request_id="r",
        endpoint="completions",
        streaming=False,
        served=ServedModel(card(), TOKENIZER, None, 0),
        token_ids=PROMPT,
        stop=stop or StopConditions(),
        sampling=sampling or SamplingOptions(),
        include_stop=False,
        skip_special_tokens=True,
        hints=hints or RoutingHints(),
        started_s=0.0,
    )


def test_what_was_produced_goes_behind_the_prompt_and_counts_towards_the_limits() -> None:
    asked = job(
        StopConditions(max_tokens=30, min_tokens=4, ignore_eos=True),
        hints=RoutingHints(expected_osl=8),
    )
    migration = Migration(asked, 1)
    request = routed_request(asked, prompt_hashes(PROMPT, 16))
    assert migration.token_ids() is PROMPT
    assert migration.stop_conditions() is asked.stop
    assert migration.rest(request) is request
    migration.produced += [7] * 10
    assert migration.token_ids() == PROMPT + [7] * 10
    rest = migration.rest(request)
    assert (rest.isl, rest.max_tokens, rest.expected_osl) == (50, 20, 1)
    assert rest.sequence_hashes == prompt_hashes(PROMPT + [7] * 10, 16)
    stop = migration.stop_conditions()
    assert (stop.max_tokens, stop.min_tokens, stop.ignore_eos) == (20, 0, True)
    assert not migration.is_complete
    migration.produced += [7] * 20
    assert migration.is_complete
    # From whatever the last choice was for: all there is so far.
    assert migration.rest(rest).isl == 70


def test_without_limits_there_are_none() -> None:
    migration = Migration(job(), 1)
    migration.produced += [7] * 10
    stop = migration.stop_conditions()
    assert stop.max_tokens is stop.min_tokens is None
    assert not migration.is_complete


@pytest.mark.parametrize(
    ("error", "moves_on", "prefill_moves_on"),
    [
        (LOST, True, True),
        (CannotConnect(1, "", ""), True, True),
        (WorkerBacklogged(1, 9), True, True),
        (EngineOverloaded(""), True, True),
        (EngineShutDown(""), True, True),
        (DeadlineExceeded("first_token", 1), True, True),
        (EngineError(""), False, True),
        (EnginePrefillFailed(""), False, True),
        (EngineRefused(""), False, False),
        (FrameTooLarge(2, 1), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_errors_another_worker_may_not_have(
    error: Exception, moves_on: bool, prefill_moves_on: bool
) -> None:
    migration = Migration(job(), 1)
    assert migration.allows(error) == moves_on
    assert migration.allows(error, in_prefill_hop=True) == prefill_moves_on


def test_as_often_as_the_limit_says_and_never_back() -> None:
    assert not Migration(job(), 0).is_on and not Migration(job(), 0).allows(LOST)
    migration = Migration(job(), 2)
    for worker_id in (5, 6):
        assert migration.allows(LOST)
        migration.leave(worker_id)
    assert not migration.allows(LOST)
    assert migration.avoid == {5, 6} and migration.count == 2


@pytest.mark.parametrize(
    "hints",
    [RoutingHints(worker_id=5, decode_worker_id=5), RoutingHints(prefill_worker_id=5)],
    ids=["worker", "prefill worker"],
)
def test_a_named_worker_is_meant(hints: RoutingHints) -> None:
    assert not Migration(job(hints=hints), 9).allows(LOST)


@pytest.mark.parametrize(
    "sampling", [SamplingOptions(guided_decoding={"regex": "a*"}), SamplingOptions(n=2)]
)
def test_state_that_only_the_worker_had_stays_behind(sampling: SamplingOptions) -> None:
    migration = Migration(job(sampling=sampling), 9)
    assert migration.allows(LOST), "nothing has begun"
    migration.produced += [7]
    assert not migration.allows(LOST)
