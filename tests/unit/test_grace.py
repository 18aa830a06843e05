"""The grace period of leases, by what a server says of itself and of a bucket's leader."""

import asyncio
from collections.abc import Iterator
from typing import cast

import msgspec
import pytest

from eventstore.connect import (
    Answer,
    ApiError,
    JetStreamRefused,
    Nats,
    NoResponders,
    NotPermitted,
)
from eventstore.errors import LogUnavailable
from workers import grace
from workers.grace import GracePeriod

LENGTH_S = 10.0


class Server:
    """As much of a connection as a grace period asks for. An answer is given once; the last, for
    ever."""

    def __init__(self, *answers: dict[str, object] | LogUnavailable) -> None:
        self.connected = True
        self.clustered = bool(answers)
        self.server_id = "first run"
        self.on_connected: set[object] = set()
        self.asked: list[str] = []
        self._answers = list(answers)

    async def wait_connected(self) -> None:
        if not self.connected:
            raise LogUnavailable("the connection to NATS is closed")

    async def api(
        self, verb: str, request: object, answer: type[Answer], timeout_s: float
    ) -> Answer:
        self.asked.append(verb)
        given = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(given, LogUnavailable):
            raise given
        return msgspec.convert(given, answer)


def period(server: Server) -> GracePeriod:
    return GracePeriod(cast(Nats, server), "b", LENGTH_S)


def led(since: str | None, **more: object) -> dict[str, object]:
    cluster = {"leader": "node-1"} | ({"leader_since": since} if since else {}) | more
    return {"ts": "2026-01-01T12:00:08Z", "cluster": cluster}


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grace, "ASK_AGAIN_S", 0.0)
        yield


@pytest.mark.parametrize(
    ("answer", "left_s"),
    [
        (led("2026-01-01T12:00:05.5Z"), 7.5),
        (led("2026-01-01T11:59:58Z"), 0),
        (led("2020-01-01T00:00:00Z"), 0),
        (led(None), 0),  # a single copy
        ({"ts": "2026-01-01T12:00:08Z"}, 0),
        (NotPermitted("not for you", "denied"), 0),
        (JetStreamRefused("no", ApiError(403)), 0),
    ],
)
async def test_it_is_counted_from_when_the_leader_began(
    answer: dict[str, object] | LogUnavailable, left_s: float
) -> None:
    server = Server(answer)
    of = period(server)
    assert not of.surely_over
    assert await of.left_s() == left_s
    assert server.asked == ["STREAM.INFO.KV_b"]


async def test_without_a_leader_it_has_not_begun() -> None:
    nobody = led(None) | {"cluster": {"name": "test"}}
    server = Server(
        nobody,
        LogUnavailable("no answer"),
        NoResponders("no answer"),
        JetStreamRefused("away", ApiError(503)),
        led("2026-01-01T12:00:08Z"),
    )
    assert await period(server).left_s() == LENGTH_S
    assert len(server.asked) == 5


async def test_a_server_alone_has_one_after_it_started_anew() -> None:
    server = Server()
    of = period(server)
    (reconnected,) = server.on_connected
    assert callable(reconnected)
    reconnected()
    assert of.surely_over, "the line was cut, the server ran on"
    assert await of.left_s() == 0
    server.server_id = "second run"
    reconnected()
    assert not of.surely_over
    assert 0 < await of.left_s() <= LENGTH_S
    of.close()
    of.close()
    assert not server.on_connected


async def test_it_is_told_when_the_connection_is_closed() -> None:
    server = Server()
    server.connected = False
    of = period(server)
    assert not of.surely_over
    with pytest.raises(LogUnavailable):
        await asyncio.wait_for(of.left_s(), 5)
