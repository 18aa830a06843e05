"""Reading traces, and making them up, by example."""

import json
from pathlib import Path
from random import Random

import pytest

from simulations.generate import TrafficOptions, generate, generate_trace
from simulations.trace import (
    TRACE_BLOCK_TOKENS,
    TraceError,
    TraceRequest,
    encode_request,
    expand,
    read_trace,
)

GOOD = b'{"timestamp": 5, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}\n'


def test_a_line_is_a_request() -> None:
    assert list(read_trace([GOOD, b"\n"])) == [
        TraceRequest(timestamp_ms=5, input_length=600, output_length=9, hash_ids=[0, 1])
    ]


def test_fields_that_are_not_known_are_left_out() -> None:
    line = GOOD.replace(b"{", b'{"chat_id": 3, "type": "text", ')
    assert list(read_trace([line])) == list(read_trace([GOOD]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[1, 2]", "object"),
        (b"{", "truncated"),
        (b"\xff\xfe{", "malformed"),
        (b"[" * 5000, "depth|recursion|object"),
        (GOOD.replace(b"5", b'"5"'), r"\$\.timestamp"),
        (GOOD.replace(b"600", b"1.5"), r"\$\.input_length"),
        (GOOD.replace(b'"output_length": 9, ', b""), "output_length"),
        (GOOD.replace(b"[0, 1]", b'[0, "a"]'), r"\$\.hash_ids\[1\]"),
        (GOOD.replace(b"5", b"-5"), "timestamp is -5"),
        (GOOD.replace(b"600", b"0"), "input_length is 0"),
        (GOOD.replace(b": 9", b": 0"), "output_length is 0"),
        (GOOD.replace(b"[0, 1]", b"[0]"), "hash_ids has 1 .* takes 2"),
        (GOOD.replace(b"600", b"512"), "hash_ids has 2 .* takes 1"),
        (GOOD.replace(b"5", b"4"), "timestamp is 4, before"),
    ],
)
def test_what_is_no_request_is_named_with_its_line_and_field(line: bytes, problem: str) -> None:
    with pytest.raises(TraceError, match=f"(?i)^line 3: .*({problem})") as raised:
        list(read_trace([GOOD, b"", line]))
    assert raised.value.line == 3


def test_lengths_must_agree_with_the_blocks() -> None:
    for input_length in (TRACE_BLOCK_TOKENS, 2 * TRACE_BLOCK_TOKENS + 1):
        with pytest.raises(ValueError, match="input_length"):
            expand([4, 5], input_length, range(100))


def test_blocks_are_the_same_in_every_process() -> None:
    assert expand([0, 182_789], 600, range(1000))[:4] == [18, 481, 489, 747]
    assert expand([0], 4, "abcdefgh") == ["c", "b", "b", "d"]


def test_generated_traffic_has_the_shape_that_was_asked_for() -> None:
    options = TrafficOptions(
        duration_s=2_000,
        sessions_per_s=0.5,
        turns_mean=3,
        system_prompts=2,
        system_tokens_sigma=0,
        system_tokens_median=1_100,
        user_tokens_median=300,
        user_tokens_sigma=0.1,
        output_tokens_median=100,
        output_tokens_sigma=0,
        pause_s_median=1,
        input_tokens_max=20_000,
    )
    requests = generate(options, Random(1))
    assert 2_600 < len(requests) < 3_400  # 1,000 sessions of three turns, σ about 100
    assert all(request.output_length == 100 for request in requests)
    first_blocks = {request.hash_ids[0] for request in requests}
    assert len(first_blocks) == 2
    assert max(request.timestamp_ms for request in requests) < 2_000_000
    assert max(request.input_length for request in requests) <= 20_000


def test_the_command_writes_a_trace_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    assert generate_trace([str(file), "--seed", "4", "--duration-s", "60"], {}) == 0
    requests = list(read_trace(file.read_bytes().splitlines()))
    assert requests == generate(TrafficOptions(duration_s=60), Random(4))
    assert json.loads(encode_request(requests[0]))["timestamp"] == requests[0].timestamp_ms


def test_the_command_says_when_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_trace([str(tmp_path / "no" / "trace"), "--duration-s", "9"], {}) == 1
    assert "No such file" in capsys.readouterr().err
