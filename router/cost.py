"""The cost of a placement in milliseconds, by a model of each worker's prefill that is learned.

x tokens of prefill take steps = ceil(x / batch) steps of the engine, all full but the last:

    prefill_ms(x) = step_ms * steps + token_ms * (x + SQUARES * (sum of squares of tokens a step))

`step_ms` and `token_ms` are learned from times to first token: least squares of relative errors in
which older observations count less and less. Until there are any, and where they leave something
open, two preferences decide: both coefficients are the same multiple of their priors, so that an
engine that is just faster is known after a few requests; and this multiple is 1. The priors and
`SQUARES` are those of `workers.timing`, measured on a peer's engine. The share of the squares is
not learned: from times with usual noise it came out anywhere between nothing and ten times what it
was, and an engine without it is predicted to within 10 % all the same.

Only + - * / and comparisons of floats are used, in a fixed order, so every replica gets the same
bits. (sum() is not: it rounds differently from one Python to the next.)
"""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

BATCH_TOKENS = 8_192
"""Tokens that an engine computes in a step, where its card does not say."""
STEP_MS = 16.50142
TOKEN_MS = 0.01518344
"""The priors."""
SQUARES = 4.209989e-07 / TOKEN_MS
"""What a squared token costs, in tokens."""
MULTIPLE_MIN = 0.01
MULTIPLE_MAX = 100.0
"""Bounds of a coefficient and of an observed time, as multiples of what the priors give."""
DECODE_MS = 54.01
"""Prior: what a decode step takes longer for a full cache than for an empty one."""
INTERFERENCE = 0.3
"""What a millisecond counts by which the next token of a request beside it comes later, where one
of the time to the first token counts 1."""
OUTPUT_TOKENS = 100
"""Decode steps for which a request's blocks count. Fewer than most answers have: those beside it
end before it does, and with more, long prompts would choose by the decode load alone."""
OWN_SHARE = 1 / 3
"""What counts of the length of those steps for the request itself. Less than for the others: it
meets the rank as it will be, of which the present load says little."""
RESOLUTION = 0.02
"""Costs so near to the lowest, as a share of it, are equal to it: no learned model is finer, and
equal workers that have learned a little differently must stay equal."""

_KEEP = 127 / 128
"""Of an observation's weight, at each later one: about the last 128 count."""
_START_WEIGHT = 0.25
_START_TIE = 2.0
"""Weights of the preferences at first, in observations; they are forgotten like observations."""
_WEIGHT = 0.0001
_TIE = 0.02
"""Weights of the preferences that stay."""
_DEVIATIONS_MAX = 3.0
"""No observation counts as farther from what was predicted than so many mean deviations."""
_DEVIATION_MIN = 0.02
_DEVIATION_RATE = 1 / 16


class PrefillModel(Struct, array_like=True, gc=False):
    """What is known of one worker's prefill. Equal observations give equal fields, to the bit.

    ValueError for `batch_tokens` below 1.
    """

    batch_tokens: int = BATCH_TOKENS
    """Most tokens of a step."""
    step_ms: float = STEP_MS
    token_ms: float = TOKEN_MS
    deviation: float = 1.0
    """Mean deviation of what was observed from what was predicted, as a share of the latter."""
    moments: tuple[float, float, float, float, float] = (
        _START_WEIGHT + _START_TIE,
        -_START_TIE,
        _START_WEIGHT + _START_TIE,
        _START_WEIGHT,
        _START_WEIGHT,
    )
    """Weighted sums of aa, ab, bb, ar and br over the observations. By the priors, a is the share
    of the steps in the time and b = 1 - a that of the tokens; r is the observed time over it."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")


def predict_ms(model: PrefillModel, tokens: int) -> float:
    """Time to compute so many prompt tokens, from an idle start. Never falls with `tokens`.

    Fewer than 1 count as 1: an engine computes the last token of a prompt even if all is cached.
    """
    steps, weighted_tokens = _work(tokens, model.batch_tokens)
    return model.step_ms * steps + model.token_ms * weighted_tokens


def observe(model: PrefillModel, tokens: int, ttft_ms: float) -> None:
    """Learn from one time to first token. About 5 µs.

    tokens: computed until then: the request's own that were not cached, and those ahead of it.
    ttft_ms: 0 or more; anything else is ignored. However long, it counts as at most three mean
    deviations above its prediction, so a single one moves a model that has converged very little.
    """
    if not ttft_ms >= 0:
        return
    steps, weighted_tokens = _work(tokens, model.batch_tokens)
    prior_ms = STEP_MS * steps + TOKEN_MS * weighted_tokens
    predicted = (model.step_ms * steps + model.token_ms * weighted_tokens) / prior_ms
    error = _clip(ttft_ms / prior_ms, MULTIPLE_MIN, MULTIPLE_MAX) / predicted - 1
    error_max = _DEVIATIONS_MAX * model.deviation
    error = _clip(error, -error_max, error_max)
    model.deviation += _DEVIATION_RATE * (abs(error) - model.deviation)
    model.deviation = max(_DEVIATION_MIN, model.deviation)
    a = STEP_MS * steps / prior_ms
    b = TOKEN_MS * weighted_tokens / prior_ms
    r = predicted * (1 + error)
    aa, ab, bb, ar, br = (_KEEP * moment for moment in model.moments)
    model.moments = (aa + a * a, ab + a * b, bb + b * b, ar + a * r, br + b * r)
    _fit(model)


def _fit(model: PrefillModel) -> None:
    """Least squares: the multiples s and t of the priors that minimise, over the observations,

        sum (a*s + b*t - r)^2 + _TIE * (s - t)^2 + _WEIGHT * ((s - 1)^2 + (t - 1)^2)

    within their bounds. The determinant is at least _WEIGHT^2.
    """
    aa, ab, bb, ar, br = model.moments
    aa += _TIE + _WEIGHT
    bb += _TIE + _WEIGHT
    ab -= _TIE
    ar += _WEIGHT
    br += _WEIGHT
    s = _clip((ar * bb - br * ab) / (aa * bb - ab * ab), MULTIPLE_MIN, MULTIPLE_MAX)
    # The second coefficient is the best beside the first, and so once more the other way round: no
    # change where no bound is met.
    t = _clip((br - ab * s) / bb, MULTIPLE_MIN, MULTIPLE_MAX)
    s = _clip((ar - ab * t) / aa, MULTIPLE_MIN, MULTIPLE_MAX)
    model.step_ms = STEP_MS * s
    model.token_ms = TOKEN_MS * t


class RankLoad(NamedTuple):
    """What the cost needs to know of the ranks; all sequences are parallel, one item a rank."""

    ahead_tokens: Sequence[int]
    """Of prefill, booked there and not computed yet."""
    new_tokens: Sequence[int]
    """Of the prompt, not cached there."""
    running: Sequence[int]
    """Requests."""
    active_blocks: Sequence[int]
    grown_blocks: Sequence[int]
    """Of the prompt, not active there."""
    total_blocks: Sequence[float]
    """Of its cache; infinite where that is not known."""


def time_costs(
    models: Sequence[PrefillModel], ranks: RankLoad, interference: float = INTERFERENCE
) -> list[float]:
    """The cost of placing a request on each rank, in ms: the sum of

        prefill_ms(ahead + new)                                    its time to the first token
        interference * running * (step_ms + token_ms * new)        its prefill, for those beside it
        interference * OUTPUT_TOKENS * decode_ms                   its blocks, in the steps to come

        decode_ms = d * (running * grown + OWN_SHARE * (active + grown)) / total blocks
        d         = DECODE_MS * token_ms / TOKEN_MS        an engine that is slower is so in both

    models: parallel to the ranks. interference: 0 or more. Never falls with any count but the total
    of blocks. Costs within `RESOLUTION` of the lowest are equal to it. About 0.25 µs a rank.
    """
    costs = []
    decode_tokens = interference * OUTPUT_TOKENS * DECODE_MS / TOKEN_MS
    for model, ahead, new, running, active, grown, total in zip(models, *ranks, strict=True):
        tokens = ahead + new or 1
        batch_tokens = model.batch_tokens
        if tokens <= batch_tokens:
            steps, squares = 1, tokens * tokens
        else:  # as `_work`, without the call
            steps, rest = divmod(tokens, batch_tokens)
            squares = steps * (batch_tokens * batch_tokens) + rest * rest
            steps += rest > 0
        weight = interference * running
        decode = running * grown + OWN_SHARE * (active + grown)
        costs.append(
            model.step_ms * (steps + weight)
            + model.token_ms
            * (tokens + SQUARES * squares + weight * new + decode_tokens * decode / total)
        )
    if not costs:
        return costs
    lowest = min(costs)
    limit = lowest * (1 + RESOLUTION)
    return [lowest if cost <= limit else cost for cost in costs]


def _work(tokens: int, batch_tokens: int) -> tuple[int, float]:
    """Steps, and tokens with what their squares add."""
    tokens = max(1, tokens)
    full_steps, rest = divmod(tokens, batch_tokens)
    squares = full_steps * (batch_tokens * batch_tokens) + rest * rest
    return full_steps + (rest > 0), tokens + SQUARES * squares


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
