"""Every fact the log can hold, and nothing else.

An event is a past-tense, frozen record of something that happened. Its tag is permanent: a tag is
never reused or renamed, new fields go at the end and have a default, and a fact whose meaning
changes gets a new tag. The log supplies position and time (`eventstore.log.Record`), and the batch
supplies the producer (`eventstore.codec.Batch`), so an event carries only the fact itself.

Ids: `worker_id` is a u64 drawn afresh at every start of a worker process, so it also names the
worker's incarnation; `request_id` is the frontend's id of a request. `sequence_hashes` are the
chained block hashes of `indexer.blocks`, in prompt order.
"""

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

U64: TypeAlias = Annotated[int, Meta(ge=0)]
"""MessagePack has no integers beyond 2^64 - 1, so this is a u64 on the wire."""


class Event(Struct, frozen=True, array_like=True, tag_field="type", gc=False):
    """A fact. Later facts may correct it; nothing removes it."""


# --- kv.<worker>.<dp_rank>: what happened to a rank's KV cache (written by the worker) ----------


class BlockStored(Event, frozen=True, tag="kv.block_stored"):
    """A rank now holds these blocks, a chain in order, below `parent_hash` (None: at the root)."""

    worker_id: U64
    dp_rank: int
    parent_hash: U64 | None
    sequence_hashes: list[U64]


class BlockRemoved(Event, frozen=True, tag="kv.block_removed"):
    """A rank no longer holds these blocks (evicted)."""

    worker_id: U64
    dp_rank: int
    sequence_hashes: list[U64]


class AllBlocksCleared(Event, frozen=True, tag="kv.all_blocks_cleared"):
    """A rank emptied its cache."""

    worker_id: U64
    dp_rank: int


class KvRebased(Event, frozen=True, tag="kv.rebased"):
    """A rank's history starts again: forget its blocks; the stores that follow are its whole cache.

    Opens every epoch of a KV publisher, so that nothing of an earlier epoch can linger.
    """

    worker_id: U64
    dp_rank: int
    reason: str


class PrefixPinned(Event, frozen=True, tag="kv.prefix_pinned"):
    """A rank keeps these blocks, a chain from the root, at least `ttl_s` after this record's time.

    A chain of many blocks may come in several records, parents first. Hits renew the time without
    a further record. Where a `BlockRemoved` or `kv.rebased` takes a block, its pin is over too.
    """

    worker_id: U64
    dp_rank: int
    sequence_hashes: list[U64]
    ttl_s: int


# --- worker.<worker>: who serves ------------------------------------------------------------------


class WorkerRegistered(Event, frozen=True, tag="worker.registered"):
    """A worker process serves `model` with ranks `dp_start … dp_start + dp_size - 1`.

    Sizes are per rank; None where the engine does not tell.
    """

    worker_id: U64
    model: str
    worker_type: str
    """aggregated, prefill or decode."""
    block_size: int
    dp_start: int = 0
    dp_size: int = 1
    total_kv_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    context_length: int | None = None


class WorkerRemoved(Event, frozen=True, tag="worker.removed"):
    """A worker is gone for good, with its blocks and bookings. Written once per worker."""

    worker_id: U64
    cause: str
    """shutdown (its own word) or lease_expired (seen by a frontend)."""


# --- frontend.<frontend>: who accepts requests ----------------------------------------------------


class FrontendRemoved(Event, frozen=True, tag="frontend.removed"):
    """A frontend is gone, and its unfinished requests with it. Written once per lease."""

    frontend_id: U64
    cause: str
    """lease_expired (seen by another frontend, or by itself when it comes back)."""


# --- request.<frontend>: the life of a request (written by the frontend that serves it) ----------


class RequestAccepted(Event, frozen=True, tag="request.accepted"):
    """A valid request came in at a frontend: `isl` prompt tokens for `model`."""

    request_id: str
    frontend_id: U64
    """u64, drawn afresh at every start of a frontend process."""
    model: str
    endpoint: str
    isl: int
    max_tokens: int | None
    streaming: bool


class RequestQueued(Event, frozen=True, tag="request.queued"):
    """A request waits because every candidate has more prefill ahead than the queue's threshold."""

    request_id: str
    priority: float
    """Seconds by which it counts as having come earlier."""
    role: str = "aggregated"
    """Of the workers it waits for: aggregated, prefill or decode."""
    strict_priority: int = 0
    """Its tier: the higher goes first, whatever the priorities."""
    uncached_tokens: int = 0
    """Prompt tokens that the best candidate would have to compute."""
    depth: int = 0
    """Requests that waited at this frontend already."""


class Candidate(Struct, frozen=True, array_like=True, gc=False):
    """One rank as the decision saw it. Lowest `cost` wins at temperature 0."""

    worker_id: U64
    dp_rank: int
    overlap_blocks: int
    prefill_tokens: int
    """Active prefill tokens with this request's uncached tokens added."""
    decode_blocks: int
    """Active blocks with this request's blocks not yet active there added."""
    cost: float
    """In blocks or milliseconds, as `RequestRouted.cost_unit` says."""
    active_requests: int = 0


class Prediction(Struct, frozen=True, array_like=True, gc=False):
    """The chosen rank is believed to cache the prompt's blocks for `ttl_ms` from the log's time of
    this record; when there are more than `blocks_max` of such blocks, `blocks_kept` stay."""

    ttl_ms: int
    blocks_max: int
    blocks_kept: int


class SessionBinding(Struct, frozen=True, array_like=True, gc=False):
    """The session belongs to the chosen rank until `ttl_ms` have passed without a request of it."""

    session_id: str
    ttl_ms: int


class RequestRouted(Event, frozen=True, tag="request.routed"):
    """A rank was chosen, and why. From here on the request is booked there."""

    request_id: str
    attempt: int
    """0 for the first choice, then one more for each further one."""
    worker_id: U64
    dp_rank: int
    mode: str
    """kv, round-robin, random, power-of-two, least-loaded, direct, or session: bound to it."""
    isl: int
    overlap_blocks: int
    """Leading prompt blocks the index believed cached on the chosen rank."""
    sequence_hashes: list[U64]
    """Of the prompt's complete blocks."""
    cursor: int
    """Log position of the state that the decision was made from."""
    overlap_weight: float
    temperature: float
    candidate_count: int
    """How many ranks were considered."""
    candidates: list[Candidate]
    """The chosen rank first, then the best others: at most `router.selection.REASONS_MAX`."""
    model: str
    max_tokens: int | None = None
    role: str = "aggregated"
    """aggregated, prefill or decode. A disaggregated request holds a booking of each of the two."""
    expected_osl: int | None = None
    """Output tokens that the client expects; the booked blocks count less and less towards it."""
    books_blocks: bool = True
    """Whether the prompt's blocks count as active on the rank."""
    shares_blocks: bool = True
    """Whether blocks that several requests share there count once."""
    books_prefill: bool = True
    """Whether the prompt is computed on the rank."""
    cost_unit: str = "blocks"
    """What costs are counted in: blocks or ms."""
    queued_ms: float = 0.0
    """How long the request waited in the queue."""
    prediction: Prediction | None = None
    session: SessionBinding | None = None
    set_aside: int = 0
    """Ranks not considered, because they are busy or failed too often."""
    predicted_blocks: int = 0
    """Of `overlap_blocks`, those that no worker has announced: they are believed to be there."""
    predicted_ms: float | None = None
    """Time to the first token on the chosen rank, as the learned model has it."""


class PrefillCompleted(Event, frozen=True, tag="request.prefill_completed"):
    """The first output token arrived. `cached_tokens`: reused prompt tokens, as the worker says."""

    request_id: str
    cached_tokens: int | None
    ttft_ms: float | None = None
    """From sending the request to its worker to that token."""


class PrefillHopEnded(Event, frozen=True, tag="request.prefill_hop_ended"):
    """A prefill worker is done with a disaggregated request, or lost to it; its booking ends."""

    request_id: str
    cached_tokens: int | None
    ttft_ms: float | None
    cause: str
    """done, or why there is no result."""


class OutputGrown(Event, frozen=True, tag="request.output_grown"):
    """The request has produced `osl` tokens so far."""

    request_id: str
    osl: int


class RequestMigrated(Event, frozen=True, tag="request.migrated"):
    """The rank was lost after `osl` tokens; the booking there ends and a new choice follows, for
    the prompt with those tokens behind it."""

    request_id: str
    osl: int
    cause: str


class RequestCompleted(Event, frozen=True, tag="request.completed"):
    """All output was produced: `osl` tokens."""

    request_id: str
    osl: int
    finish_reason: str
    cached_tokens: int | None


class RequestFailed(Event, frozen=True, tag="request.failed"):
    """The request ended in an error after `osl` tokens. `code` is the client's `error.code`."""

    request_id: str
    osl: int
    code: str


class RequestCancelled(Event, frozen=True, tag="request.cancelled"):
    """The client went away after `osl` tokens."""

    request_id: str
    osl: int
    cause: str


class RequestRejected(Event, frozen=True, tag="request.rejected"):
    """The request was accepted but found no worker. `code` is the client's `error.code`."""

    request_id: str
    code: str
    status: int
    reason: str = ""
    """In words: which threshold, which value, how many workers."""


class WorkerSetAside(Event, frozen=True, tag="frontend.worker_set_aside"):
    """A frontend gives a worker that failed `failures` times in a row no requests for a while."""

    frontend_id: U64
    worker_id: U64
    failures: int
    seconds: float
    cause: str


# --- threshold.<model>, control: what operators and replicas say ----------------------------------


class BusyThresholdChanged(Event, frozen=True, tag="threshold.changed"):
    """The busy thresholds of `model` are now exactly these (None: off)."""

    model: str
    active_decode_blocks: float | None
    active_prefill_tokens: int | None
    active_prefill_tokens_frac: float | None
    source: str = ""
    """Who says so: a request to /busy_threshold or the options of a frontend, and which one."""


class StateReset(Event, frozen=True, tag="state.reset"):
    """Every replica empties its index, load and thresholds here. Registered workers stay, and
    rebase; frontends announce their unfinished requests again."""

    reason: str


class SnapshotTaken(Event, frozen=True, tag="snapshot.taken"):
    """A verified snapshot of the state at `seq` is in the object store."""

    name: str
    seq: int
    digest: str


AnyEvent: TypeAlias = (
    BlockStored
    | BlockRemoved
    | AllBlocksCleared
    | KvRebased
    | PrefixPinned
    | WorkerRegistered
    | WorkerRemoved
    | FrontendRemoved
    | RequestAccepted
    | RequestQueued
    | RequestRouted
    | PrefillCompleted
    | PrefillHopEnded
    | OutputGrown
    | RequestMigrated
    | RequestCompleted
    | RequestFailed
    | RequestCancelled
    | RequestRejected
    | WorkerSetAside
    | BusyThresholdChanged
    | StateReset
    | SnapshotTaken
)
