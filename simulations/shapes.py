"""Made-up traffic of several shapes, for judging a policy on more than one recorded trace.

Each is sized for eight mock workers at speed 1, and keeps them busy without drowning them.
"""

from collections.abc import Mapping
from typing import Final

from simulations.generate import TrafficOptions

SHAPES: Final[Mapping[str, TrafficOptions]] = {
    # Sessions of several turns over a few system prompts.
    "conversation": TrafficOptions(duration_s=400, sessions_per_s=4.0, output_tokens_median=250),
    # Nothing to reuse, and most of a step is its fixed cost.
    "short": TrafficOptions(
        duration_s=90,
        sessions_per_s=150,
        turns_mean=1,
        system_prompts=1,
        system_tokens_median=1,
        system_tokens_sigma=0,
        user_tokens_median=120,
        user_tokens_sigma=0.5,
        output_tokens_median=60,
        output_tokens_sigma=0.5,
    ),
    # Every prompt begins alike: whoever follows the cache alone sends all to one worker.
    "hot-prefix": TrafficOptions(
        duration_s=240,
        sessions_per_s=25,
        turns_mean=1,
        system_prompts=1,
        system_tokens_median=8_192,
        system_tokens_sigma=0,
        user_tokens_median=200,
        output_tokens_median=100,
    ),
    # Sixteen equal prompts at one moment, before any of them is in a cache.
    "bursts": TrafficOptions(
        duration_s=600,
        sessions_per_s=0.5,
        turns_mean=1.5,
        copies=16,
        system_prompts=64,
        system_tokens_median=4_000,
        user_tokens_median=2_000,
        output_tokens_median=100,
    ),
    # Embedding-like: long prompts, one token out.
    "prefill-only": TrafficOptions(
        duration_s=200,
        sessions_per_s=25,
        turns_mean=1,
        system_prompts=256,
        system_tokens_median=4_000,
        user_tokens_median=4_000,
        user_tokens_sigma=0.7,
        output_tokens_median=1,
        output_tokens_sigma=0,
    ),
    # Reasoning-like: short prompts, long answers; what matters is who decodes beside whom.
    "decode-heavy": TrafficOptions(
        duration_s=300,
        sessions_per_s=8,
        turns_mean=1,
        system_prompts=4,
        system_tokens_median=600,
        user_tokens_median=200,
        output_tokens_median=1_200,
        output_tokens_sigma=0.7,
    ),
}
"""Shape → what makes it."""
