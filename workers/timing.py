"""How long a step of the mock engine takes: the measured timing of the field's simulated engine.

    prefill(x) = 4.209989e-07·x² + 0.01518344·x + 16.50142 ms    x: prompt tokens of the step
    decode(p)  = 5.74 + 54.01·p − 25.74·p² ms                    p: active blocks / all blocks

Fitted to one request alone on a peer engine. A step that does both costs both; a step that only
prefills, also when it ends with a first token, costs no decode time.

    transfer(x) = x · bytes per token · 8 / (Gbit/s · 10⁶) ms    x: tokens whose KV is moved

Each transfer is counted as if it had the link to itself.
"""

from msgspec import Struct

KV_BYTES_PER_TOKEN = 131_072
"""KV cache of a token in a model of 8 billion parameters with grouped-query attention, such as
Llama 3.1 8B: keys and values of 32 layers · 8 heads · 128 numbers of 2 bytes."""
KV_TRANSFER_GBPS = 400.0
"""One port of NDR InfiniBand, what servers of accelerators are usually connected with."""


class TimingModel(Struct, frozen=True):
    """Times in milliseconds. ValueError names the field that is out of range."""

    speedup: float = 1.0
    """Divides all of them."""
    kv_bytes_per_token: int = KV_BYTES_PER_TOKEN
    kv_transfer_gbps: float = KV_TRANSFER_GBPS
    """Gigabits (10⁹ bits) a second."""

    def __post_init__(self) -> None:
        for name in ("speedup", "kv_transfer_gbps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.kv_bytes_per_token < 0:
            raise ValueError(f"kv_bytes_per_token must not be below 0: {self.kv_bytes_per_token}")

    def prefill_ms(self, new_tokens: int) -> float:
        """Time to compute `new_tokens` ≥ 1 prompt tokens that were not cached, in one step."""
        return ((4.209989e-07 * new_tokens + 0.01518344) * new_tokens + 16.50142) / self.speedup

    def decode_ms(self, active_ratio: float) -> float:
        """Time for one token of every decoding request.

        active_ratio: blocks in use by admitted requests over all blocks, 0 … 1.
        """
        return ((54.01 - 25.74 * active_ratio) * active_ratio + 5.74) / self.speedup

    def step_ms(self, prefill_tokens: int, active_ratio: float | None) -> float:
        """Time of a step that computes `prefill_tokens` (0: none) and decodes (None: nobody)."""
        prefill = self.prefill_ms(prefill_tokens) if prefill_tokens else 0.0
        decode = self.decode_ms(active_ratio) if active_ratio is not None else 0.0
        return prefill + decode

    def transfer_ms(self, tokens: int) -> float:
        """Time until the KV of `tokens` ≥ 0 tokens has come from another worker."""
        bits = tokens * self.kv_bytes_per_token * 8
        return bits / (self.kv_transfer_gbps * 1e6) / self.speedup
