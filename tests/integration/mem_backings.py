"""Namespaces within the test's own process."""

import time

from eventstore.errors import LogUnavailable
from eventstore.memory import MemoryLog
from frontend.backing import Backing, Backings
from frontend.served import Download
from router.snapshot_trigger import Snapshots
from workers.card import FrontendInstance
from workers.discovery import MemDiscovery, MemLeases


class MemNamespace:
    """What one is made of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = MemoryLog(time.time_ns)
        self.discovery = MemDiscovery()
        self.frontends = MemLeases[FrontendInstance]()


class MemBackings(Backings):
    """`namespaces`: those that there are; `broken`: those among them that can't be opened."""

    collectors = ()

    def __init__(self, download: Download, snapshots: Snapshots | None = None) -> None:
        self.namespaces: dict[str, MemNamespace] = {}
        self.broken: set[str] = set()
        self.unreachable = False
        """Set: nobody tells which there are."""
        self._download = download
        self._snapshots = snapshots

    def add(self, name: str) -> MemNamespace:
        made = self.namespaces[name] = MemNamespace(name)
        return made

    async def find(self, prefix: str) -> list[str]:
        if self.unreachable:
            raise LogUnavailable("nobody answers")
        return sorted(name for name in self.namespaces if name.startswith(prefix))

    async def open(self, namespace: str, *, create: bool) -> Backing:
        if namespace in self.broken:
            raise LogUnavailable(f"{namespace} is broken")
        made = self.namespaces[namespace]
        return Backing(
            namespace=namespace,
            log=made.log,
            discovery=made.discovery,
            frontends=made.frontends,
            download=self._download,
            snapshots=self._snapshots,
            close=_nothing,
        )


async def _nothing() -> None:
    """The logs are the test's."""
