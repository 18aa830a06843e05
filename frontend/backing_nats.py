"""Namespaces on NATS: a stream, buckets and object stores each."""

from functools import partial

from msgspec.structs import replace

from eventstore.claims import SNAPSHOT_CLAIM
from eventstore.claims_nats import NatsClaims
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from eventstore.marks_nats import NatsMarks
from eventstore.metrics import ConnectionMetrics
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.stream import find_namespaces
from frontend.backing import Backing, Backings
from frontend.settings import FrontendSettings
from router.snapshot_trigger import Snapshots
from router.snapshotter import take_in_process
from workers.discovery_nats import NatsDiscovery, NatsFrontends
from workers.models import ModelStore


class NatsBackings(Backings):
    """All over one connection, which it does not own."""

    def __init__(self, connection: Nats, settings: FrontendSettings) -> None:
        self._nats = connection
        self._settings = settings

    @property
    def collectors(self) -> tuple[ConnectionMetrics, ...]:
        return (ConnectionMetrics(self._nats),)

    async def find(self, prefix: str) -> list[str]:
        return await find_namespaces(self._nats, prefix)

    async def open(self, namespace: str, *, create: bool) -> Backing:
        nats, settings = self._nats, self._settings
        replicas = settings.log_replicas
        log = await JetStreamLog.open(
            nats, namespace, replicas=replicas, create=create, wait_s=settings.nats_wait_secs
        )
        own_settings = replace(settings, namespace=namespace, namespace_prefix=None)
        return Backing(
            namespace=namespace,
            log=log,
            discovery=NatsDiscovery(nats, namespace, replicas=replicas),
            frontends=NatsFrontends(nats, namespace, replicas=replicas),
            download=ModelStore(nats, namespace).download,
            snapshots=Snapshots(
                NatsSnapshots(nats, namespace, replicas=replicas),
                NatsClaims(nats, namespace, SNAPSHOT_CLAIM, replicas=replicas),
                take=partial(take_in_process, own_settings),
            ),
            marks=NatsMarks(nats, namespace, replicas=replicas),
            close=log.close,
        )
