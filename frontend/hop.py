"""The prefill worker's part in a disaggregated request."""

from random import getrandbits
from typing import Any

from eventstore.events import RequestRouted
from indexer.radix import WorkerRank
from workers.protocol import Bootstrap
from workers.sockets import parse_address
from workers.tcp_client import StreamHandle


def a_room_at(address: str) -> Bootstrap:
    """A meeting of two workers at a prefill worker's bootstrap address."""
    return Bootstrap(*parse_address(address), getrandbits(64))


class PrefillHop:
    """One prompt's computing by one prefill worker.

    bootstrap: where its decode worker asks for the prompt; None: the decode worker is chosen when
    the prompt is computed, and told by `params`.
    """

    __slots__ = ("bootstrap", "cached_tokens", "params", "rank", "routed", "sent_s", "stream")

    def __init__(self, routed: RequestRouted, bootstrap: Bootstrap | None, sent_s: float) -> None:
        self.routed = routed
        self.rank = WorkerRank(routed.worker_id, routed.dp_rank)
        self.bootstrap = bootstrap
        self.sent_s = sent_s
        self.stream: StreamHandle | None = None
        """None before it is sent, and when it has ended."""
        self.cached_tokens: int | None = None
        """Prompt tokens that it reused; None: it has not said."""
        self.params: dict[str, Any] | None = None
        """What the decode worker must be told."""

    @property
    def is_running(self) -> bool:
        return self.stream is not None

    def close(self) -> None:
        """Stop the work, if it goes on."""
        if self.stream is not None:
            self.stream.cancel()
            self.stream = None
