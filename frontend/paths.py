"""Where the endpoints are: those that can be moved, and those that can't."""

import re
from collections.abc import Iterable

from msgspec import Struct

BUSY_THRESHOLD = "/busy_threshold"
OPENAPI = "/openapi.json"
DOCS = "/docs"
FIXED = (BUSY_THRESHOLD, OPENAPI, DOCS)

_PATH = re.compile(r"/|(/[\w.~:@!$&'()*+,;=-]+)+", re.ASCII)


class Paths(Struct, frozen=True, kw_only=True):
    """Of the endpoints that can be moved. Each passes `check_path`, all of them `check_apart`."""

    chat: str = "/v1/chat/completions"
    completions: str = "/v1/completions"
    models: str = "/v1/models"
    health: str = "/health"
    live: str = "/live"
    metrics: str = "/metrics"

    @property
    def model(self) -> str:
        """The route of one model, whose name may have slashes."""
        return self.models.rstrip("/") + "/{model:.+}"


def check_path(path: str) -> None:
    """Raises ValueError for what no route can be made of."""
    if not path.startswith("/"):
        raise ValueError(f"{path!r} does not begin with /")
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not a path such as /v2/models")


def check_apart(paths: Iterable[str]) -> None:
    """Raises ValueError where two endpoints have one path."""
    taken = set(FIXED)
    for path in paths:
        if path in taken:
            raise ValueError(f"two endpoints can't both be at {path}")
        taken.add(path)
