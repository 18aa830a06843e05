"""The options about what happens when workers are missing, busy, slow or lost."""

from typing import Annotated

from eventstore.options import Option
from eventstore.settings import SettingsError
from frontend.disaggregation import Disaggregation
from frontend.service import Deadlines
from router.busy import Thresholds
from router.routing_settings import RoutingSettings


class ToleranceSettings(RoutingSettings, frozen=True, kw_only=True):
    """Base of the frontend's table."""

    decode_fallback: Annotated[
        bool,
        Option(
            "DYN_DECODE_FALLBACK",
            "Prefill on a decode worker while there is no prefill worker, and where one failed.",
            use="On where a slow answer is better than none while prefill workers are missing.",
            group="Disaggregated serving",
        ),
    ] = False
    conditional_disagg_isl: Annotated[
        int | None,
        Option(
            "RECKON_CONDITIONAL_DISAGG_ISL",
            "A prompt of which fewer tokens than this are not cached on the best decode worker is "
            "computed there, if they are a small share of it too. The peer's figure is 2048.",
            use="2048, where short prompts wait longer for a transfer than for being computed.",
            unit="tokens",
            unset="every prompt is computed by a prefill worker",
            ge=1,
        ),
    ] = None
    conditional_disagg_ratio: Annotated[
        float,
        Option(
            "RECKON_CONDITIONAL_DISAGG_RATIO",
            "What is a small share of the prompt, for --conditional-disagg-isl.",
            use="Lower where decode workers should compute next to nothing.",
            gt=0,
            le=1,
        ),
    ] = 0.7

    migration_limit: Annotated[
        int,
        Option(
            "DYN_MIGRATION_LIMIT",
            "How many times a request may move on after it lost its worker; 0 is never.",
            use="1 to 3 where workers are restarted or preempted while they serve.",
            group="Fault tolerance",
            ge=0,
            le=2**32 - 1,
        ),
    ] = 0
    active_decode_blocks_threshold: Annotated[
        float | None,
        Option(
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
            "A worker is busy above this share of its KV blocks.",
            use="0.85 to 0.95, where full caches make every request slow.",
            ge=0,
            le=1,
        ),
    ] = None
    active_prefill_tokens_threshold: Annotated[
        int | None,
        Option(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
            "A worker is busy above this many active prefill tokens.",
            use=(
                "Where a bound on the time to first token matters more than taking every request."
            ),
            unit="tokens",
            ge=0,
        ),
    ] = None
    active_prefill_tokens_threshold_frac: Annotated[
        float | None,
        Option(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
            "A worker is busy above this many times its max_num_batched_tokens in active prefill "
            "tokens. Either of the two prefill thresholds is enough.",
            use="The same, for workers that batch differently.",
            ge=0,
        ),
    ] = None
    request_first_token_timeout_secs: Annotated[
        float | None,
        Option(
            "RECKON_REQUEST_FIRST_TOKEN_TIMEOUT_SECS",
            "How long a worker may take to begin its answer; then the request moves on, or fails.",
            use="Above the slowest honest prefill, to leave workers that hang.",
            unit="seconds",
            unset="as long as it takes",
            gt=0,
        ),
    ] = None
    request_inter_token_timeout_secs: Annotated[
        float | None,
        Option(
            "RECKON_REQUEST_INTER_TOKEN_TIMEOUT_SECS",
            "How long a worker may take from one token to the next; then the request moves on, or "
            "fails.",
            use="Above the slowest honest step, to leave workers that hang in the middle.",
            unit="seconds",
            unset="as long as it takes",
            gt=0,
        ),
    ] = None
    request_timeout_secs: Annotated[
        float | None,
        Option(
            "RECKON_REQUEST_TIMEOUT_SECS",
            "How long a request may take in all.",
            use="Where an answer after that is of no use.",
            unit="seconds",
            unset="as long as it takes",
            gt=0,
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_cache_control and self.router_mode != "kv":
            # The peer takes it and does nothing: then every pin is for a worker that the next
            # request of its prefix may not go to.
            raise SettingsError("pinning (--enable-cache-control) needs --router-mode kv")

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(
            first_token_s=self.request_first_token_timeout_secs,
            inter_token_s=self.request_inter_token_timeout_secs,
            total_s=self.request_timeout_secs,
        )

    @property
    def disaggregation(self) -> Disaggregation:
        return Disaggregation(
            decode_fallback=self.decode_fallback,
            short_isl=self.conditional_disagg_isl,
            short_ratio=self.conditional_disagg_ratio,
        )

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(
            self.active_decode_blocks_threshold,
            self.active_prefill_tokens_threshold,
            self.active_prefill_tokens_threshold_frac,
        )
