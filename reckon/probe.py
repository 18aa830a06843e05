"""What a frontend says of itself over HTTP: `/health`, `/metrics` and `/v1/models`, in short."""

import asyncio
from typing import TypeVar

import aiohttp
import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from eventstore.metrics import full_name

METRICS_PREFIX = "dynamo_frontend"
ANSWER_S = 2.0

T = TypeVar("T")


class _Log(Struct, frozen=True):
    cursor: int = 0
    head: int = 0
    lag: int = 0


class _Replica(Struct, frozen=True):
    digest: str | None = None


class _Instance(Struct, frozen=True):
    instance_id: int


class Health(Struct, frozen=True):
    """`/health`. `replica.digest` is of the state at `log.cursor`."""

    status: str
    instances: list[_Instance] = []
    log: _Log = _Log()
    replica: _Replica = _Replica()

    def worker_ids(self) -> set[int]:
        return {instance.instance_id for instance in self.instances}


class Requests(Struct, frozen=True):
    """Counted since the frontend started."""

    done: int = 0
    in_flight: int = 0


class _Model(Struct, frozen=True):
    id: str


class _Models(Struct, frozen=True):
    data: list[_Model]


class Frontend:
    """One frontend as seen from outside. Whatever keeps it from answering, the answer is None."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, metrics_prefix: str = METRICS_PREFIX
    ) -> None:
        self.url = url
        self._session = session
        self._metrics_prefix = metrics_prefix

    async def health(self) -> Health | None:
        """Its health, whatever the HTTP status."""
        body = await self._get("/health")
        return _decoded(body, Health) if body is not None else None

    async def is_healthy(self) -> bool:
        health = await self.health()
        return health is not None and health.status == "healthy"

    async def requests(self) -> Requests | None:
        body = await self._get("/metrics")
        return parse_requests(body, self._metrics_prefix) if body is not None else None

    async def model(self) -> str | None:
        """The first model that it serves."""
        body = await self._get("/v1/models")
        models = _decoded(body, _Models) if body is not None else None
        return models.data[0].id if models is not None and models.data else None

    async def _get(self, path: str) -> bytes | None:
        try:
            async with asyncio.timeout(ANSWER_S), self._session.get(self.url + path) as response:
                return await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None


def parse_requests(metrics: bytes, prefix: str) -> Requests:
    """Sum the frontend's counters over models, endpoints and outcomes.

    metrics: a page in the Prometheus text format. Series that are not there count nothing.
    """
    done, in_flight = full_name(prefix, "requests_total"), full_name(prefix, "inflight_requests")
    # The page's histograms are many times longer than what is needed of it.
    lines = metrics.decode(errors="replace").splitlines(keepends=True)
    ours = "".join(line for line in lines if line.startswith((done, in_flight)))
    sums = {done: 0.0, in_flight: 0.0}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return Requests(int(sums[done]), int(sums[in_flight]))


def _decoded(body: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
