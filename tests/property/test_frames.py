"""The request plane's framing: however the bytes are cut, the same messages come out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import FrameTooLarge
from workers.frames import LENGTH_BYTES, FrameReader
from workers.protocol import (
    Cancel,
    EngineRequest,
    Generate,
    Output,
    Outputs,
    SamplingOptions,
    StopConditions,
    decode_to_frontend,
    decode_to_worker,
    frame,
)

streams = st.integers(min_value=0, max_value=2**63 - 1)
token_ids = st.lists(st.integers(min_value=0, max_value=2**32 - 1), max_size=40)
requests = st.builds(
    EngineRequest,
    request_id=st.text(max_size=20),
    model=st.text(max_size=20),
    token_ids=token_ids,
    dp_rank=st.integers(min_value=0, max_value=64),
    stop_conditions=st.builds(
        StopConditions, max_tokens=st.none() | st.integers(0, 2**31), stop=st.lists(st.text())
    ),
    sampling_options=st.builds(
        SamplingOptions, temperature=st.none() | st.floats(0, 2), seed=st.none() | st.integers(0, 9)
    ),
)
to_worker = st.builds(Generate, streams, requests) | st.builds(Cancel, streams)
outputs = st.builds(
    Output,
    streams,
    token_ids,
    st.none() | st.sampled_from(["stop", "length", "eos"]),
    st.none() | st.integers(0, 2**31),
    st.none() | st.tuples(st.text(max_size=20), st.text(max_size=20)),
)


@given(st.lists(to_worker, max_size=8))
def test_requests_survive_the_wire(messages: list[Generate | Cancel]) -> None:
    """decode(frame(m)) == m, for everything a frontend sends."""
    bodies = FrameReader().feed(b"".join(map(frame, messages)))
    assert [decode_to_worker.decode(body) for body in bodies] == messages


@given(st.lists(st.builds(Outputs, st.lists(outputs, max_size=5)), max_size=8))
def test_outputs_survive_the_wire(messages: list[Outputs]) -> None:
    """decode(frame(m)) == m, for everything a worker sends."""
    bodies = FrameReader().feed(b"".join(map(frame, messages)))
    assert [decode_to_frontend.decode(body) for body in bodies] == messages


@given(st.data())
def test_any_cut_gives_the_same_frames(data: st.DataObject) -> None:
    """feed(a + b) == feed(a) + feed(b), and no byte is kept that belongs to a finished frame."""
    bodies = data.draw(st.lists(st.binary(max_size=50), max_size=8))
    whole = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=20).map(sorted))
    reader = FrameReader()
    got: list[bytes | bytearray] = []
    for start, end in pairwise([0, *cuts, len(whole)]):
        got += reader.feed(whole[start:end])
    assert [bytes(body) for body in got] == bodies
    assert reader.waiting_bytes == 0


@given(st.binary(max_size=50), st.integers(1, 49))
def test_an_incomplete_frame_waits(body: bytes, missing: int) -> None:
    """Without its last byte a frame does not come out, and with it it does."""
    whole = len(body).to_bytes(4, "big") + body
    cut = max(0, len(whole) - missing)
    reader = FrameReader()
    assert reader.feed(whole[:cut]) == []
    assert reader.waiting_bytes == cut
    assert reader.feed(whole[cut:]) == [body]


@given(st.integers(min_value=0, max_value=2**32 - 1), st.integers(min_value=0, max_value=1000))
def test_a_length_over_the_limit_is_refused_at_once(size: int, limit: int) -> None:
    """A frame's length decides before any of its body has come."""
    reader = FrameReader(frame_bytes_max=limit)
    header = size.to_bytes(LENGTH_BYTES, "big")
    if size > limit:
        with pytest.raises(FrameTooLarge):
            reader.feed(header)
    else:
        assert reader.feed(header) == ([b""] if size == 0 else [])
