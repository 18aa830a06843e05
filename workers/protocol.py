"""The request plane's messages: token ids out, tokens back, many requests on one connection.

A frame is a u32 big-endian length and that many bytes of MessagePack. The frontend sends `Generate`
and `Cancel`; the worker answers with `Outputs`, one frame for everything that an engine step
produced for this connection. `stream` is the frontend's number of a request on this connection,
never used twice on it. A stream ends with an output whose `finish_reason` or `error` is set; an
`error` item may come at any time, also instead of any output. `Announce` and `Audit` keep what a
frontend believes of a worker true, `Pin` asks it to keep something, and `Refused` says why it gets
no requests; they concern no stream.

Disaggregated serving takes two requests for one answer. The prefill worker gets the prompt with
`max_tokens` 1 and `ignore_eos`, and its one output, which ends with `length`, carries
`disaggregated_params`; put into the request for the decode worker, they tell it that the prompt is
computed and where. Where the prefill worker has a bootstrap address neither request waits for the
other: both carry the same `Bootstrap`, and the decode worker asks at that address for that room.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

FRAME_BYTES_MAX = 32 * 1024 * 1024


class StopConditions(Struct, kw_only=True, omit_defaults=True):
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop: list[str] = []
    """Matched by the frontend on decoded text; told to the engine so that it may stop earlier."""
    stop_token_ids_hidden: list[int] = []
    """End the output and are not shown."""


class SamplingOptions(Struct, kw_only=True, omit_defaults=True):
    """As the client gave them; None: the engine's default."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    guided_decoding: dict[str, Any] | None = None
    """What the output must conform to, as the engine takes it. The mock engine ignores it, as it
    does everything here but `seed` and `logprobs`: it runs no model whose choice could be guided.
    """
    logprobs: int | None = None
    """How many of each token's likeliest alternatives to tell, with the log probabilities of these
    and of the token; None: nothing of that."""


class Bootstrap(Struct, frozen=True, array_like=True):
    """Where a prefill worker hands a computed prompt over, and under which number."""

    host: str
    port: Annotated[int, Meta(ge=1, le=65_535)]
    room: Annotated[int, Meta(ge=0)]
    """u64, drawn at random by the frontend for this request."""


class EngineRequest(Struct, kw_only=True, omit_defaults=True):
    """What an engine needs to serve a request."""

    request_id: str
    model: str
    token_ids: list[int]
    dp_rank: int = 0
    stop_conditions: StopConditions = msgspec.field(default_factory=StopConditions)
    sampling_options: SamplingOptions = msgspec.field(default_factory=SamplingOptions)
    eos_token_ids: list[int] = []
    annotations: list[str] = []
    priority: int = 0
    """The higher is admitted first, among those that wait."""
    bootstrap: Bootstrap | None = None
    """To a prefill worker: hand over there. To a decode worker: the prompt is handed over there."""
    disaggregated_params: dict[str, Any] | None = None
    """To a decode worker: those of the prefill worker's output."""
    multi_modal_data: dict[str, list[dict[str, str]]] | None = None
    """What the prompt's placeholders stand for, in their order: `image_url`, `audio_url` and
    `video_url`, each a list of `{"Url": …}`. Only to workers whose card has the modality."""


class Generate(Struct, frozen=True, array_like=True, tag="generate"):
    stream: int
    request: EngineRequest


class Cancel(Struct, frozen=True, array_like=True, tag="cancel"):
    """Stop this stream and free what it holds; nothing more is sent on it."""

    stream: int


class Announce(Struct, frozen=True, array_like=True, tag="announce"):
    """The log, as far as the frontend has read it, lacks what only this worker can tell.

    dp_rank: the rank whose whole cache is wanted; None: the worker's registration. epoch: announce
    the cache in a later one than this; a worker that is past it already has done so.
    """

    worker_id: int
    dp_rank: int | None
    epoch: int


class Audit(Struct, frozen=True, array_like=True, tag="audit"):
    """Answer with `Running`."""


class Pin(Struct, frozen=True, array_like=True, tag="pin"):
    """Keep what is cached of this prompt for `ttl_s` ≥ 1 seconds, and again as long from each hit.

    Nothing answers it; what the worker keeps is in the log, as `PrefixPinned`.
    """

    dp_rank: int
    token_ids: list[int]
    ttl_s: int


class Refused(Struct, frozen=True, array_like=True, tag="refused"):
    """The frontend sends this worker no requests, and `why`. Said anew on each connection."""

    worker_id: int
    frontend_id: int
    why: str


ToWorker = Generate | Cancel | Announce | Audit | Pin | Refused


class TokenLogprobs(Struct, frozen=True, array_like=True, gc=False):
    """How likely a token was, in natural logarithms: ≤ 0."""

    logprob: float
    top: list[tuple[int, float]]
    """Token id and log probability of the likeliest tokens, in falling order; the sampled one may
    be among them."""


class Output(Struct, frozen=True, array_like=True, gc=False):
    """What one stream got in a step.

    cached_tokens: prompt tokens reused from the KV cache; on the first output of a stream.
    finish_reason: stop, length or eos, on the last. error: (code, message), on the last.
    Codes: invalid_request, overloaded, shutting_down, prefill_failed (the prompt that a prefill
    worker should hand over did not come), internal.
    disaggregated_params: on the last of a prefill worker; opaque to the frontend.
    logprobs: one for each of `token_ids`, if the request asks for them.
    """

    stream: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int | None = None
    error: tuple[str, str] | None = None
    disaggregated_params: dict[str, Any] | None = None
    logprobs: list[TokenLogprobs] | None = None


class Outputs(Struct, frozen=True, array_like=True, tag="outputs"):
    items: list[Output]


class Running(Struct, frozen=True, array_like=True, tag="running"):
    """The streams of this connection that the worker runs or has in its queue, as of an `Audit`."""

    streams: list[int]


ToFrontend = Outputs | Running


class AskForRoom(Struct, frozen=True, array_like=True, tag="ask_for_room"):
    """A decode worker, at a bootstrap address: answer when the prompt of `room` is computed.

    A connection asks once, and is closed after the `RoomAnswer`.
    """

    room: Annotated[int, Meta(ge=0)]


class RoomAnswer(Struct, frozen=True, array_like=True, tag="room_answer"):
    """disaggregated_params: as on the prefill worker's output; None: `error` says why not."""

    disaggregated_params: dict[str, Any] | None
    error: str = ""


_encoder = msgspec.msgpack.Encoder()
decode_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
decode_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)
decode_ask_for_room = msgspec.msgpack.Decoder(AskForRoom)
decode_room_answer = msgspec.msgpack.Decoder(RoomAnswer)


def frame(message: ToWorker | ToFrontend | AskForRoom | RoomAnswer) -> bytes:
    """The message with its length in front."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body
