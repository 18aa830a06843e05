"""How long a step of the mock engine takes: the measured timing of the field's simulated engine.

    prefill(x) = 4.209989e-07·x² + 0.01518344·x + 16.50142 ms    x: prompt tokens of the step
    decode(p)  = 5.74 + 54.01·p − 25.74·p² ms                    p: active blocks / all blocks

Fitted to one request alone on a peer engine. A step that does both costs both; a step that only
prefills, also when it ends with a first token, costs no decode time.
"""

from msgspec import Struct


class TimingModel(Struct, frozen=True):
    """Step times in milliseconds. `speedup` > 0 divides all of them."""

    speedup: float = 1.0

    def __post_init__(self) -> None:
        if not self.speedup > 0:
            raise ValueError(f"speedup must be above 0, got {self.speedup}")

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
