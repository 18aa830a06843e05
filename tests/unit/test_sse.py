"""Reading a streamed completion by the arrival of its frames."""

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.sse import FRAME_BYTES_MAX, CompletionStream, StreamEnd, error_code

DONE = b"data: [DONE]\n\n"


def frame(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def token(text: str = " word") -> bytes:
    return frame({"id": "cmpl-1", "choices": [{"index": 0, "text": text}]})


USAGE = frame(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 600,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 512},
        },
        "nvext": {
            "worker_id": {"decode_worker_id": 2**64 - 1, "decode_dp_rank": 1},
            "predicted_cached_tokens": 500,
        },
    }
)


def read(*reads: tuple[float, bytes]) -> tuple[StreamEnd, list[float]]:
    gaps_s = array("d")
    stream = CompletionStream(gaps_s)
    for now_s, data in reads:
        stream.feed(data, now_s)
    return stream.end(), list(gaps_s)


def test_a_whole_stream() -> None:
    end, gaps_s = read(
        (1.0, token()), (1.5, token() + token()), (2.0, token()), (2.5, USAGE + DONE)
    )
    assert end == StreamEnd(
        first_token_s=1.0,
        last_token_s=2.0,
        output_tokens=4,
        prompt_tokens=600,
        cached_tokens=512,
        predicted_cached_tokens=500,
        worker_id=2**64 - 1,
        dp_rank=1,
    )
    assert gaps_s == [0.5, 0.0, 0.5]


@given(st.data())
def test_it_does_not_matter_where_the_bytes_are_cut(data: st.DataObject) -> None:
    whole = token() + b": alive\n\n" + token("data: [DONE]\n\n") + USAGE + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(*((0.0, piece) for piece in pieces)) == read((0.0, whole))


def test_without_usage_the_frames_are_the_tokens() -> None:
    end, gaps_s = read((1.0, token()), (2.0, token() + DONE))
    assert (end.output_tokens, end.prompt_tokens, end.error) == (2, None, None)
    assert gaps_s == [1.0]


def test_comments_are_neither_output_nor_an_end() -> None:
    end, gaps_s = read((1.0, token()), (2.0, b":\n\n"), (3.0, token() + DONE))
    assert (end.output_tokens, end.last_token_s, gaps_s) == (2, 3.0, [2.0])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "cut_short"),
        (token() + token(), "cut_short"),
        (token() + USAGE, "cut_short"),
        (DONE, "no_output"),
        (USAGE + DONE, "no_output"),
        (token() + b"data: {nonsense\n\n" + DONE, "unreadable"),
        (token() + frame({"error": {"code": "worker_lost"}}) + DONE, "stream_worker_lost"),
        (token() + frame({"error": {"code": 500, "type": "x"}}), "stream_500"),
        (token() + frame({"error": {"code": None, "type": "server_error"}}), "stream_server_error"),
        (frame({"error": {}}) + DONE, "stream_error"),
    ],
)
def test_what_went_wrong_has_a_name(data: bytes, error: str) -> None:
    end, _ = read((1.0, data))
    assert end.error == error


def test_a_frame_without_end_is_refused() -> None:
    stream = CompletionStream(array("d"))
    with pytest.raises(ValueError, match="frame of more than"):
        for _ in range(17):
            stream.feed(b"x" * (FRAME_BYTES_MAX // 16), 0.0)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":{"message":"m","type":"t","param":null,"code":"overloaded"}}', "overloaded"),
        (b'{"error":{"message":"m","type":"bad_request","code":null}}', "bad_request"),
        (b'{"detail":"Not Found"}', None),
        (b"<html>502</html>", None),
        (b"\xff\xfe", None),
    ],
)
def test_the_code_of_an_error_body(body: bytes, code: str | None) -> None:
    assert error_code(body) == code
