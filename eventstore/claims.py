"""A claim: at most one process of a namespace does a piece of work at a time.

It is kept by renewing it and ends by itself when its holder dies. A holder that was paused for too
long may find that another has taken it over: it asks with `check` before each step that others
should not do at the same time. That leaves a moment in between, so such a step must do no harm if
it is done twice; the claim saves work and is not what safety rests on.
"""

from collections.abc import Callable
from typing import Protocol

from eventstore.errors import EventStoreError

SNAPSHOT_CLAIM = "snapshot"
"""The work that is claimed by who takes a snapshot."""
CLAIM_TTL_S = 15.0
"""How long the work waits for a holder that died."""


class ClaimTaken(EventStoreError):
    """Somebody else holds it."""

    def __init__(self, what: str, holder: str) -> None:
        super().__init__(what, holder)
        self.what = what
        self.holder = holder

    def __str__(self) -> str:
        return f"the claim {self.what} is held by {self.holder}"


class ClaimLost(EventStoreError):
    """It was not renewed in time, and somebody else may have it now."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"the claim {self.what} was lost"


class Claim(Protocol):
    """A claim that is held."""

    def check(self) -> None:
        """Raises ClaimLost if it may not be held any more."""

    async def release(self) -> None:
        """Let others have it. Never raises; what cannot be released expires. Safe to call twice."""


class Claims(Protocol):
    """One kind of work of one namespace. Every method raises LogUnavailable."""

    async def holder(self) -> str | None:
        """Who holds the claim now."""

    async def take(self, holder: str) -> Claim:
        """Take it. holder: a name that nobody else uses. Raises ClaimTaken."""


class MemoryClaims(Claims):
    """Claims in memory, for tests and simulations. A claim is renewed at every `check`."""

    def __init__(self, now_s: Callable[[], float], ttl_s: float = CLAIM_TTL_S) -> None:
        self.now_s = now_s
        self.ttl_s = ttl_s
        self.held: tuple[str, float] | None = None
        """Holder, and when the claim ends."""

    async def holder(self) -> str | None:
        return None if self.held is None or self.held[1] <= self.now_s() else self.held[0]

    async def take(self, holder: str) -> Claim:
        other = await self.holder()
        if other is not None:
            raise ClaimTaken("in memory", other)
        self.held = (holder, self.now_s() + self.ttl_s)
        return _MemoryClaim(self, holder)


class _MemoryClaim(Claim):
    def __init__(self, claims: MemoryClaims, holder: str) -> None:
        self._claims = claims
        self._holder = holder

    def check(self) -> None:
        held, now_s = self._claims.held, self._claims.now_s()
        if held is None or held[0] != self._holder or held[1] <= now_s:
            raise ClaimLost("in memory")
        self._claims.held = (self._holder, now_s + self._claims.ttl_s)

    async def release(self) -> None:
        if self._claims.held is not None and self._claims.held[0] == self._holder:
            self._claims.held = None
