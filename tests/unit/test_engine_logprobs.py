"""Log probabilities from the mock engine."""

from tests.unit.test_engine import engine, request


def test_log_probabilities_are_told_to_who_asks_for_them() -> None:
    one = engine()
    for name, asked in (("plain", None), ("bare", 0), ("five", 5)):
        asking = request(name, range(4))
        asking.sampling_options.logprobs = asked
        one.submit(asking)
    result = one.step()
    assert result is not None
    told = {output.request_id: output.logprobs for output in result.outputs}
    assert told["plain"] is None
    assert told["bare"] is not None and [each.top for each in told["bare"]] == [[]]
    assert told["five"] is not None and [len(each.top) for each in told["five"]] == [5]
