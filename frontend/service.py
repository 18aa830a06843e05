"""What the handlers share: the parts of one frontend, made in `frontend.process` and in tests."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web
from msgspec import Struct
from prometheus_client import CollectorRegistry

from frontend.disaggregation import Disaggregation
from frontend.errors import OVERLOAD_STATUS
from frontend.metrics import FrontendMetrics
from frontend.served import ServedModels
from router.metrics import RouterMetrics
from router.replica import Replica
from router.router import Router
from router.snapshot_trigger import SnapshotTrigger
from workers.clients import WorkerClients

if TYPE_CHECKING:
    from frontend.busy_threshold import ThresholdBoard
    from frontend.generation import Generation

MIB = 1024 * 1024


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds on what one client may take."""

    body_bytes_max: int = 192 * MIB
    body_idle_s: float = 30.0
    """A body that stops coming for this long is answered with 408."""
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


class Service(Struct, kw_only=True):
    """One frontend. `draining` is set when it shuts down: what runs may finish, no more begins."""

    models: ServedModels
    clients: WorkerClients
    router: Router
    replica: Replica
    metrics: FrontendMetrics
    router_metrics: RouterMetrics
    registry: CollectorRegistry
    limits: Limits
    clock: Callable[[], float]
    """Seconds, monotonic."""
    now_s: Callable[[], float]
    """Unix time."""
    draining: asyncio.Event
    live: set["Generation"]
    """Started and not ended."""
    thresholds: "ThresholdBoard"
    overload_status: int = OVERLOAD_STATUS
    migration_limit: int = 0
    cache_control: bool = False
    """Whether clients may have prefixes pinned."""
    deadlines: Deadlines = Deadlines()
    disaggregation: Disaggregation = Disaggregation()
    snapshots: SnapshotTrigger | None
    """None: this frontend has none taken."""


SERVICE = web.AppKey("service", Service)
