"""What a worker says of itself: its model card and its instance record.

An instance is one running worker process. Its record lives in discovery under a lease and carries
the model card; the model's files (tokenizer and templates) travel in the object store, named by
their SHA-256, so a frontend in another container needs no shared disk.
"""

import hashlib
from typing import ClassVar, Protocol

import msgspec
from msgspec import Struct


class Listed(Protocol):
    """What discovery can list: a record of a process, under an id that is never used again."""

    LISTED_UNDER: ClassVar[str]

    @property
    def listed_id(self) -> int:
        """u64, unique in its kind."""

    @property
    def listed_group(self) -> str:
        """Part of its key, one token."""


AGGREGATED = "aggregated"
PREFILL = "prefill"
DECODE = "decode"


class ModelCard(Struct, frozen=True, kw_only=True):
    """A model as its workers serve it. Sizes are per rank; None: the engine does not tell."""

    name: str
    block_size: int
    """Tokens per KV block."""
    context_length: int
    """Prompt and output tokens together, at most."""
    files: dict[str, str]
    """File name → SHA-256 (hex): tokenizer.json, tokenizer_config.json, …"""
    model_types: list[str] = msgspec.field(default_factory=lambda: ["chat", "completions"])
    worker_type: str = AGGREGATED
    """aggregated (serves whole requests), prefill or decode (serves its part, and a whole request
    where it is asked for one)."""
    eos_token_ids: list[int] = []
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tool_call_parser: str | None = None
    """Format in which the model writes tool calls, a name of `frontend.parsers`; None: as text."""
    reasoning_parser: str | None = None
    """Format in which it writes reasoning, likewise."""
    modalities: list[str] = msgspec.field(default_factory=lambda: ["text"])
    """What it takes: text, image, audio, video."""

    def checksum(self) -> str:
        """Names what a frontend must treat alike: name, block size, context, files, end tokens,
        parsers and modalities."""
        identity = (
            self.name,
            self.block_size,
            self.context_length,
            sorted(self.files.items()),
            sorted(self.eos_token_ids),
            self.tool_call_parser,
            self.reasoning_parser,
            sorted(self.modalities),
        )
        return hashlib.blake2b(msgspec.json.encode(identity), digest_size=16).hexdigest()


class Instance(Struct, frozen=True, kw_only=True):
    """One running worker process."""

    worker_id: int
    """u64, drawn afresh at every start."""
    namespace: str
    component: str
    endpoint: str
    address: str
    """host:port of its request plane."""
    card: ModelCard
    dp_start: int = 0
    dp_size: int = 1
    registered_seq: int = 0
    """Log position of its `worker.registered`; 0: not known."""
    bootstrap_address: str | None = None
    """host:port where decode workers ask a prefill worker for a prompt; None: it hands over by
    `disaggregated_params` only."""

    LISTED_UNDER: ClassVar[str] = "v1.instances"

    @property
    def listed_id(self) -> int:
        return self.worker_id

    @property
    def listed_group(self) -> str:
        return self.component

    def ranks(self) -> range:
        return range(self.dp_start, self.dp_start + self.dp_size)


class FrontendInstance(Struct, frozen=True, kw_only=True):
    """One running frontend process, for as long as its `lease` lasts."""

    frontend_id: int
    """u64, drawn afresh at every start."""
    address: str
    """URL of its HTTP server."""
    lease: int = 1
    """Counts the leases that this process has had: one that was taken for dead gets another."""
    removed_seq: int = 0
    """Log position of the `frontend.removed` of its lease before; 0: there was none."""

    LISTED_UNDER: ClassVar[str] = "v1.frontends"

    @property
    def listed_id(self) -> int:
        return self.frontend_id

    @property
    def listed_group(self) -> str:
        return "http"
