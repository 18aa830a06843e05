"""The life of a request, as one table: which event may follow in which phase.

A pair that is not in the table is an anomaly: the fold counts it and changes nothing. Requests in
a terminal phase are forgotten, so their late events are anomalies too.

The hop of a disaggregated request to a prefill worker is no phase: it runs before the decode
worker's booking or beside it (`router.fold` says when it may begin and end).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from eventstore.events import (
    Event,
    OutputGrown,
    PrefillCompleted,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    RequestRejected,
    RequestRouted,
)


class Phase(StrEnum):
    ABSENT = "absent"
    """Never heard of, or ended."""
    ACCEPTED = "accepted"
    QUEUED = "queued"
    PREFILL = "prefill"
    """Booked on a rank; no token yet."""
    DECODE = "decode"
    ENDED = "ended"


LIVE: Final = (Phase.ACCEPTED, Phase.QUEUED, Phase.PREFILL, Phase.DECODE)
ENDINGS: Final = (RequestCompleted, RequestFailed, RequestCancelled, RequestRejected)

LIFECYCLE: Final[Mapping[tuple[Phase, type[Event]], Phase]] = {
    (Phase.ABSENT, RequestAccepted): Phase.ACCEPTED,
    (Phase.ACCEPTED, RequestQueued): Phase.QUEUED,
    # Its worker's end was in the log before it moved on.
    (Phase.ACCEPTED, RequestMigrated): Phase.ACCEPTED,
    (Phase.ACCEPTED, RequestRouted): Phase.PREFILL,
    (Phase.QUEUED, RequestRouted): Phase.PREFILL,
    (Phase.PREFILL, PrefillCompleted): Phase.DECODE,
    (Phase.PREFILL, RequestMigrated): Phase.ACCEPTED,
    (Phase.DECODE, OutputGrown): Phase.DECODE,
    (Phase.DECODE, RequestMigrated): Phase.ACCEPTED,
    **{(phase, ending): Phase.ENDED for phase in LIVE for ending in ENDINGS},
}


def next_phase(phase: Phase, event: type[Event]) -> Phase | None:
    """Where `event` leads from `phase`; None if it may not happen there."""
    return LIFECYCLE.get((phase, event))
