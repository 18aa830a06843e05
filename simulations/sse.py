"""One streamed completion as its client sees it: when frames arrived, and what the last one says.

Reading must cost little, for the reader shares the machine with what it measures: frames are only
cut apart and counted. The last one before `[DONE]` alone is decoded; it carries the usage, or the
error that ended the stream. Pure: bytes and times go in, a `StreamEnd` comes out.
"""

from array import array

import msgspec
from msgspec import Struct

FRAME_BYTES_MAX = 1024 * 1024
"""A frame longer than this is not the answer of a completions server."""


class StreamEnd(Struct, frozen=True, kw_only=True):
    """What a stream came to. Times are the caller's clock; None: no token arrived.

    error: what went wrong, in one word for counting: `cut_short` (no `[DONE]`), `no_output`,
    `unreadable` (the last frame), or the server's own error code after `stream_`.
    """

    first_token_s: float | None
    last_token_s: float | None
    output_tokens: int
    """As the usage says; without usage, the frames that carried output."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_cached_tokens: int | None = None
    worker_id: int | None = None
    dp_rank: int = 0
    error: str | None = None


class _PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptTokensDetails | None = None


class _WorkerId(Struct, frozen=True):
    decode_worker_id: int | None = None
    decode_dp_rank: int | None = None


class _Nvext(Struct, frozen=True):
    worker_id: _WorkerId | None = None
    predicted_cached_tokens: int | None = None


class _Error(Struct, frozen=True):
    code: str | int | None = None
    type: str | None = None


class _Chunk(Struct, frozen=True):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    nvext: _Nvext | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


def error_code(body: bytes) -> str | None:
    """The `error.code` (or `error.type`) of an OpenAI error body; None if it is none."""
    try:
        error = _decode(body).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return _word(error) if error else None


def _word(error: _Error) -> str:
    return str(error.code if error.code is not None else error.type or "error")


class CompletionStream:
    """Reads the bytes of one response body in order.

    gaps_s: takes the times between successive output frames, in seconds; may be shared by streams.
    Frames that came in one read have the same time: a gap of 0.
    """

    __slots__ = (
        "_done",
        "_first_s",
        "_frames",
        "_gaps_s",
        "_last",
        "_last_s",
        "_previous_s",
        "_rest",
    )

    def __init__(self, gaps_s: "array[float]") -> None:
        self._gaps_s = gaps_s
        self._rest = b""
        self._done = False
        self._frames = 0
        self._first_s: float | None = None
        self._previous_s: float | None = None
        # The newest frame is held back: only at the end is it known to be no output.
        self._last: bytes | None = None
        self._last_s = 0.0

    def feed(self, data: bytes, now_s: float) -> None:
        """Take the bytes that arrived at `now_s`. Raises ValueError on an endless frame."""
        *frames, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of more than {FRAME_BYTES_MAX} bytes")
        for frame in frames:
            if frame == b"data: [DONE]":
                self._done = True
            elif frame.startswith(b"data: "):
                self._count_last()
                self._last, self._last_s = frame[len(b"data: ") :], now_s
            # Everything else is a comment, sent to keep the connection alive.

    def end(self) -> StreamEnd:
        """Close the account, after the last bytes."""
        error = None if self._done else "cut_short"
        chunk = _Chunk()
        if self._last is not None:
            try:
                chunk = _decode(self._last)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                error = "unreadable"
            if chunk.choices:
                self._count_last()
        if chunk.error:
            error = f"stream_{_word(chunk.error)}"
        elif self._done and not self._frames:
            error = "no_output"
        usage, nvext = chunk.usage, chunk.nvext or _Nvext()
        details = usage.prompt_tokens_details if usage else None
        worker = nvext.worker_id or _WorkerId()
        return StreamEnd(
            first_token_s=self._first_s,
            last_token_s=self._previous_s,
            output_tokens=usage.completion_tokens if usage else self._frames,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            predicted_cached_tokens=nvext.predicted_cached_tokens,
            worker_id=worker.decode_worker_id,
            dp_rank=worker.decode_dp_rank or 0,
            error=error,
        )

    def _count_last(self) -> None:
        if self._last is None:
            return
        if self._previous_s is None:
            self._first_s = self._last_s
        else:
            self._gaps_s.append(self._last_s - self._previous_s)
        self._previous_s = self._last_s
        self._frames += 1
