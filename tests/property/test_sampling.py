"""What the mock engine says of its tokens' probabilities hangs together as a model's would."""

import math

from hypothesis import given
from hypothesis import strategies as st

from workers.sampling import TokenSource


@given(st.integers(0, 2**64 - 1), st.integers(1, 30), st.integers(0, 20))
def test_log_probabilities_are_those_of_one_distribution(
    context: int, vocabulary: int, count: int
) -> None:
    source = TokenSource(seed=1, token_ids=range(100, 100 + vocabulary), length_mean=5)
    token = source.token(context)
    told = source.logprobs(context, token, count)
    ids, logprobs = [one for one, _ in told.top], [value for _, value in told.top]
    assert len(ids) == len(set(ids)) == min(count, vocabulary)
    assert logprobs == sorted(logprobs, reverse=True)
    assert sum(map(math.exp, logprobs)) <= 1
    assert told.logprob < 0
    if token in ids:
        assert told.logprob == logprobs[ids.index(token)]
    elif logprobs:
        assert told.logprob < logprobs[-1]
    assert source.logprobs(context, token, count) == told
