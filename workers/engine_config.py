"""The sizes and the pace of one rank's mock engine."""

from collections.abc import Sequence

from msgspec import Struct

from workers.timing import KV_BYTES_PER_TOKEN, KV_TRANSFER_GBPS, TimingModel


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Sizes of one rank's engine. ValueError names the field that is out of range."""

    block_size: int = 64
    """Tokens per KV block."""
    num_gpu_blocks: int = 16_384
    max_num_seqs: int = 256
    """Requests running at once."""
    max_num_batched_tokens: int = 8_192
    """Tokens computed in a step; at least `max_num_seqs`, so that prefill never starves."""
    max_num_waiting: int = 4_096
    """Requests that may wait to be admitted; one more is refused as overloaded."""
    context_length: int = 131_072
    """Prompt and output tokens of a request together, at most."""
    enable_prefix_caching: bool = True
    speedup: float = 1.0
    """Divides all times of steps and transfers."""
    kv_bytes_per_token: int = KV_BYTES_PER_TOKEN
    """What is transferred for a token that another worker has computed."""
    kv_transfer_gbps: float = KV_TRANSFER_GBPS
    max_pinned_ratio: float = 0.5
    """Share of the blocks that may be pinned; 0: pins are off."""
    output_token_ids: Sequence[int] = range(1_000)
    """What output tokens are drawn from."""
    output_length_mean: float = 128.0
    """Output tokens up to a natural end, its end token included."""

    def __post_init__(self) -> None:
        sizes = ("block_size", "num_gpu_blocks", "max_num_seqs", "max_num_waiting")
        for name in (*sizes, "context_length", "output_length_mean"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if not self.output_token_ids:
            raise ValueError("output_token_ids must not be empty")
        if not 0 <= min(self.output_token_ids) <= max(self.output_token_ids) < 2**32:
            raise ValueError("output_token_ids must be u32")
        if not 0 <= self.max_pinned_ratio <= 1:
            raise ValueError(f"max_pinned_ratio must be within 0 … 1, got {self.max_pinned_ratio}")
        self.timing()

    def timing(self) -> TimingModel:
        return TimingModel(self.speedup, self.kv_bytes_per_token, self.kv_transfer_gbps)
