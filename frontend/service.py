"""What the handlers share: a frontend, and in it one service for each namespace it serves.

Made in `frontend.space` and `frontend.process`, and in tests.
"""

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from aiohttp import web
from msgspec import Struct
from prometheus_client import CollectorRegistry

from frontend.disaggregation import Disaggregation
from frontend.errors import OVERLOAD_STATUS, ModelNotFound, NotReady
from frontend.metrics import FrontendMetrics
from frontend.served import ServedModels
from frontend.spread import draw
from router.metrics import RouterMetrics
from router.replica import Replica
from router.router import Router
from router.snapshot_trigger import SnapshotTrigger
from workers.card import AGGREGATED, DECODE
from workers.clients import WorkerClients

if TYPE_CHECKING:
    from frontend.busy_threshold import ThresholdBoard
    from frontend.generation import Generation
    from frontend.hints import RoutingHints

MIB = 1024 * 1024


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds on what one client may take."""

    body_bytes_max: int = 192 * MIB
    body_idle_s: float = 30.0
    """A body that stops coming for this long is answered with 408."""
    body_bytes_per_s_min: int = 1024
    """So is one that comes slower than this on average, once it has come for `body_idle_s`."""
    head_s: float = 10.0
    """A request's line and headers take no longer from their first byte on, nor a TLS handshake."""
    head_bytes_max: int = 64 * 1024
    """Of line and headers, where they come in several pieces."""
    idle_s: float = 75.0
    """How long an idle connection is kept: longer than the 60 s of common load balancers."""
    linger_s: float = 1.0
    """How long the rest of a refused body is read, so that the client sees why."""
    connections_max: int = 16_384
    """One more closes an idle one."""
    unread_bytes_max: int = 4 * MIB
    """A client with this much of its stream unread is cut off."""
    unread_s: float = 60.0
    """So is one that has not taken the end of its answer after this long."""


class Deadlines(Struct, frozen=True, kw_only=True):
    """How long a request may take; None: as long as it takes."""

    first_token_s: float | None = None
    """From sending it to a worker, or from its coming in while it waits, to the first output."""
    inter_token_s: float | None = None
    total_s: float | None = None

    @property
    def are_set(self) -> bool:
        return self != Deadlines()


class Shared(Struct, kw_only=True):
    """What the namespaces of a frontend have in common."""

    limits: Limits
    clock: Callable[[], float]
    """Seconds, monotonic."""
    now_s: Callable[[], float]
    """Unix time."""
    draining: asyncio.Event
    """Set when the frontend shuts down: what runs may finish, no more begins."""
    live: set["Generation"]
    """Started and not ended."""
    overload_status: int = OVERLOAD_STATUS
    migration_limit: int = 0
    cache_control: bool = False
    """Whether clients may have prefixes pinned."""
    deadlines: Deadlines = Deadlines()
    disaggregation: Disaggregation = Disaggregation()


class Service(Shared, kw_only=True):
    """One namespace of a frontend: all that it takes to serve a request to one of its models."""

    namespace: str
    is_late: bool = False
    """Found when the frontend was serving already, which does not wait for it."""
    models: ServedModels
    clients: WorkerClients
    router: Router
    replica: Replica
    metrics: FrontendMetrics
    router_metrics: RouterMetrics
    registry: CollectorRegistry
    """Where its metrics are."""
    thresholds: "ThresholdBoard"
    snapshots: SnapshotTrigger | None
    """None: this frontend has none taken."""

    def ranks_of(self, model: str) -> int:
        """The ranks that an answer of the model can come from now."""
        if not self.replica.is_ready:
            return 0
        return sum(len(self.router.candidates(model, role).ranks) for role in (AGGREGATED, DECODE))


class Frontend(Shared, kw_only=True):
    """One frontend: its namespaces, and what it counts of requests that reach none of them."""

    prefix: str | None = None
    """It serves all namespaces that begin so; None: one."""
    metrics: FrontendMetrics
    registry: CollectorRegistry
    services: dict[str, Service]
    """By namespace, in the order in which they were found."""
    unusable: dict[str, str]
    """Namespaces that can't be served, and why."""
    has_looked: bool = False
    """Whether it is known which namespaces there are."""

    def serving(self, model: str, model_type: str) -> list[Service]:
        """The services that have the model; at least one.

        Raises ModelNotFound, which lists the models there are; NotReady for one that workers are
        listed for and whose files are not loaded yet, and while it is not known what there is.
        """
        services = list(self.services.values())
        named = [each for each in services if each.models.find(model) is not None]
        if not named:
            if not self.has_looked or any(each.models.is_awaited(model) for each in services):
                raise NotReady()
            known = {served.card.name for each in services for served in each.models.models()}
            raise ModelNotFound(model, sorted(known))
        found = [each for each in named if model_type in each.models.get(model).card.model_types]
        if not found:
            raise ModelNotFound(model, [])
        return found


def service_for(
    services: Collection[Service], model: str, hints: "RoutingHints", request_id: str
) -> Service:
    """The one of the services that a request goes to.

    A worker that the client names decides. Otherwise each gets a share by the number of its ranks,
    and the requests of a session go to the same one. services: not empty.
    """
    if len(services) == 1:
        return next(iter(services))
    for named in (hints.worker_id, hints.decode_worker_id, hints.prefill_worker_id):
        for service in services:
            if named is not None and service.models.lists(named):
                return service
    by_name = {service.namespace: service for service in services}
    weights = {name: service.ranks_of(model) for name, service in by_name.items()}
    return by_name[draw(weights, hints.session_id or request_id)]


FRONTEND = web.AppKey("frontend", Frontend)
