"""When a model with decode workers has its prompts computed elsewhere, and which roles it needs."""

from collections.abc import Callable, Collection

from msgspec import Struct

from router.decision import RoutedRequest
from router.errors import RouterError
from router.router import Router
from workers.card import AGGREGATED, DECODE, PREFILL


class Disaggregation(Struct, frozen=True, kw_only=True):
    """decode_fallback: decode workers compute prompts while there is no prefill worker, and those
    that a prefill worker failed to compute. short_isl, short_ratio: a prompt of which fewer tokens
    than the one, and a smaller share than the other, are not cached on the best decode worker is
    computed there (the peer's policy `isl_bounding`); None: none is."""

    decode_fallback: bool = False
    short_isl: int | None = None
    short_ratio: float = 0.7

    def missing_roles(
        self, counts: Callable[[str], bool], listed: Callable[[], Collection[str]]
    ) -> tuple[str, ...]:
        """The roles without which a model can't be served and that nobody has; none: it is ready.

        counts: whether a worker with the role can be chosen. listed: the roles of those that are
        there, usable or not yet; they tell how a model that nobody serves is meant to be served.
        """
        if counts(AGGREGATED):
            return ()
        if not (counts(PREFILL) or counts(DECODE)) and not {PREFILL, DECODE} & set(listed()):
            return (AGGREGATED,)
        needed = (DECODE,) if self.decode_fallback else (PREFILL, DECODE)
        return tuple(role for role in needed if not counts(role))

    def is_short(self, router: Router, request: RoutedRequest) -> bool:
        """Whether a decode worker had better compute this prompt too. A busy one had not."""
        if self.short_isl is None:
            return False
        try:
            if router.must_wait(request, *router.eligible(request)):
                return False
            routed = router.potential(request)
        except RouterError:
            return False
        uncached = request.isl - routed.overlap_blocks * request.block_size
        return uncached < self.short_isl and uncached < self.short_ratio * request.isl
