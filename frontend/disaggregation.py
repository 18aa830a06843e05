"""When a model with decode workers has its prompts computed elsewhere, and when not."""

from msgspec import Struct

from router.decision import RoutedRequest
from router.errors import RouterError
from router.router import Router


class Disaggregation(Struct, frozen=True, kw_only=True):
    """decode_fallback: decode workers compute prompts while there is no prefill worker.
    short_isl, short_ratio: a prompt of which fewer tokens than the one, and a smaller share than
    the other, are not cached on the best decode worker is computed there (the peer's policy
    `isl_bounding`); None: none is."""

    decode_fallback: bool = False
    short_isl: int | None = None
    short_ratio: float = 0.7

    def is_short(self, router: Router, request: RoutedRequest) -> bool:
        """Whether a decode worker had better compute this prompt too. A busy one had not."""
        if self.short_isl is None:
            return False
        try:
            routed = router.potential(request)
        except RouterError:
            return False
        uncached = request.isl - routed.overlap_blocks * request.block_size
        return uncached < self.short_isl and uncached < self.short_ratio * request.isl
