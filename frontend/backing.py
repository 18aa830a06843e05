"""What a frontend finds outside its process: the namespaces there are, and what each is made of."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import Struct
from prometheus_client.registry import Collector

from eventstore.log import EventLog
from eventstore.marks import ReadingMarks
from frontend.served import Download
from router.snapshot_trigger import Snapshots
from workers.card import FrontendInstance
from workers.discovery import Discovery, Leases


class Backing(Struct, frozen=True, kw_only=True):
    """One namespace's."""

    namespace: str
    log: EventLog
    discovery: Discovery
    """The list of its workers."""
    frontends: Leases[FrontendInstance]
    download: Download
    """Of its models' files."""
    snapshots: Snapshots | None = None
    """None: none are looked for, and none taken."""
    marks: ReadingMarks | None = None
    """None: nobody trims the log."""
    close: Callable[[], Awaitable[None]]
    """Give the log up."""


class Backings(Protocol):
    """All that there are."""

    @property
    def collectors(self) -> Sequence[Collector]:
        """Metrics of what they share."""

    async def find(self, prefix: str) -> list[str]:
        """The namespaces that have a log and begin so, in order. Raises LogUnavailable."""

    async def open(self, namespace: str, *, create: bool) -> Backing:
        """create: make the log if there is none. Raises LogUnavailable, and BadSubject for what is
        not a namespace."""
