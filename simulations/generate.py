"""Made-up traffic with the shape of chat: sessions that grow turn by turn over shared prompts.

Sessions arrive as a Poisson process. Each begins with one of a few system prompts, the k-th with
weight 1/k. Every turn repeats all that was said before and adds a message; its answer (of several
copies of a turn, the last one's) is part of the next turn's prompt. Lengths and pauses are
log-normal, given by their median and their sigma (the standard deviation of the logarithm).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from math import log
from pathlib import Path
from random import Random
from typing import Annotated, ClassVar, NamedTuple

from msgspec.structs import replace

from eventstore.options import Option, Settings
from eventstore.settings import from_command_line
from simulations.trace import TRACE_BLOCK_TOKENS, TraceRequest, encode_request

_SIGMA_HELP = "Its spread: the standard deviation of the logarithm."


class TrafficOptions(Settings, frozen=True, kw_only=True):
    """What the traffic is like."""

    duration_s: Annotated[
        float, Option("", "Length of the trace.", group="Sessions", gt=0, unit="seconds")
    ] = 600.0
    sessions_per_s: Annotated[float, Option("", "New sessions a second, on average.", gt=0)] = 0.5
    turns_mean: Annotated[float, Option("", "Turns of a session (geometric).", ge=1)] = 4.0
    pause_s_median: Annotated[
        float,
        Option("", "From a turn to the next one, its answer included.", gt=0, unit="seconds"),
    ] = 30.0
    pause_s_sigma: Annotated[float, Option("", _SIGMA_HELP, ge=0, le=5)] = 0.8
    copies: Annotated[
        int,
        Option("", "Requests of equal prompt that every turn sends at once.", ge=1, le=10_000),
    ] = 1

    system_prompts: Annotated[
        int, Option("", "Different system prompts.", group="Lengths", ge=1, le=100_000)
    ] = 8
    system_tokens_median: Annotated[float, Option("", "A system prompt.", gt=0, unit="tokens")] = (
        2_000.0
    )
    system_tokens_sigma: Annotated[float, Option("", _SIGMA_HELP, ge=0, le=5)] = 0.5
    user_tokens_median: Annotated[
        float, Option("", "What a turn adds to the prompt.", gt=0, unit="tokens")
    ] = 400.0
    user_tokens_sigma: Annotated[float, Option("", _SIGMA_HELP, ge=0, le=5)] = 1.0
    output_tokens_median: Annotated[float, Option("", "An answer.", gt=0, unit="tokens")] = 200.0
    output_tokens_sigma: Annotated[float, Option("", _SIGMA_HELP, ge=0, le=5)] = 0.8
    input_tokens_max: Annotated[
        int,
        Option("", "A session ends before its prompt gets longer.", ge=1, unit="tokens"),
    ] = 32_000


class GenerateTraceSettings(TrafficOptions, frozen=True, kw_only=True):
    """Write a made-up trace of chat sessions that grow over shared system prompts.

    The form is Mooncake's, as send-trace reads it. The same seed and options give the same file.
    """

    program: ClassVar[str] = "python -m simulations generate-trace"

    file: Annotated[Path, Option("", "Where to write it.", group="Trace", positional=True)]
    seed: Annotated[int, Option("", "Another seed makes another trace.")] = 0


class _SystemPrompt(NamedTuple):
    tokens: int
    ids: list[int]
    """Of the blocks that it fills."""


def generate(options: TrafficOptions, rng: Random) -> list[TraceRequest]:
    """A trace of `options.duration_s`, in order of time; `rng` decides all that is random.

    A block that shared content fills has one id in all prompts with that content; the partial last
    block of a prompt has an id of its own, one for all copies of a turn. Ids count from 0 in the
    order of appearance.
    """
    new_ids = count()
    prompts: list[_SystemPrompt] = []
    for _ in range(options.system_prompts):
        tokens = _draw_tokens(rng, options.system_tokens_median, options.system_tokens_sigma)
        ids = [next(new_ids) for _ in range(tokens // TRACE_BLOCK_TOKENS)]
        prompts.append(_SystemPrompt(tokens, ids))
    weights = [1 / rank for rank in range(1, len(prompts) + 1)]
    requests: list[TraceRequest] = []
    start_s = rng.expovariate(options.sessions_per_s)
    while start_s < options.duration_s:
        (prompt,) = rng.choices(prompts, weights)
        requests += _session(options, rng, start_s, prompt, new_ids)
        start_s += rng.expovariate(options.sessions_per_s)
    requests.sort(key=lambda request: request.timestamp_ms)
    return _renumbered(requests)


def _session(
    options: TrafficOptions,
    rng: Random,
    start_s: float,
    prompt: _SystemPrompt,
    new_ids: Iterator[int],
) -> Iterator[TraceRequest]:
    ids, tokens, now_s, goes_on = list(prompt.ids), prompt.tokens, start_s, True
    while goes_on and now_s < options.duration_s:
        tokens += _draw_tokens(rng, options.user_tokens_median, options.user_tokens_sigma)
        if tokens > options.input_tokens_max:
            return
        full_blocks, rest = divmod(tokens, TRACE_BLOCK_TOKENS)
        ids += [next(new_ids) for _ in range(full_blocks - len(ids))]
        prompt_ids = [*ids, next(new_ids)] if rest else list(ids)
        for _ in range(options.copies):
            output = _draw_tokens(rng, options.output_tokens_median, options.output_tokens_sigma)
            yield TraceRequest(
                timestamp_ms=int(now_s * 1000),
                input_length=tokens,
                output_length=output,
                hash_ids=prompt_ids,
            )
        tokens += output
        now_s += rng.lognormvariate(log(options.pause_s_median), options.pause_s_sigma)
        goes_on = rng.random() >= 1 / options.turns_mean


def _draw_tokens(rng: Random, median: float, sigma: float) -> int:
    return max(1, round(rng.lognormvariate(log(median), sigma)))


def _renumbered(requests: list[TraceRequest]) -> list[TraceRequest]:
    numbers: dict[int, int] = {}
    for request in requests:
        for hash_id in request.hash_ids:
            numbers.setdefault(hash_id, len(numbers))
    return [
        replace(request, hash_ids=[numbers[hash_id] for hash_id in request.hash_ids])
        for request in requests
    ]


def generate_trace(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """The command `generate-trace`; returns the exit code."""
    settings = from_command_line(GenerateTraceSettings, argv, env)
    requests = generate(settings, Random(settings.seed))
    try:
        settings.file.write_bytes(b"".join(map(encode_request, requests)))
    except OSError as error:
        print(f"Error: {settings.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
