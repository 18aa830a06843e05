"""The request plane's messages between versions that know different fields."""

import msgspec
from msgspec import Struct

from workers.protocol import Bootstrap, EngineRequest, Output


class OldOutput(Struct, frozen=True, array_like=True):
    """An output as it was before `disaggregated_params`."""

    stream: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int | None = None
    error: tuple[str, str] | None = None


class OldRequest(Struct, kw_only=True):
    """What older versions needed of a request."""

    request_id: str
    model: str
    token_ids: list[int]


def test_older_and_newer_ends_understand_each_other() -> None:
    params = {"worker_id": 2**64 - 1, "room": None}
    new = Output(3, [1], "length", None, None, params)
    assert convert(new, OldOutput) == OldOutput(3, [1], "length")
    assert convert(OldOutput(3, [1], "length"), Output) == Output(3, [1], "length")
    asked = EngineRequest(request_id="r", model="m", token_ids=[0, 1, 2])
    asked.priority, asked.bootstrap = 3, Bootstrap("host", 80, 2**64 - 1)
    old = OldRequest(request_id="r", model="m", token_ids=[0, 1, 2])
    assert convert(asked, OldRequest) == old
    assert convert(old, EngineRequest) == EngineRequest(
        request_id="r", model="m", token_ids=[0, 1, 2]
    )
    assert convert(asked, EngineRequest) == asked


def convert(message: object, into: type[Struct]) -> object:
    """As the other end decodes it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=into)
