"""The options about choosing a worker: those of the peer's page, by their names there, and ours."""

from typing import Annotated, Literal

from eventstore.options import Option
from eventstore.settings import SettingsError
from router.decision import RouterOptions
from router.queue import QueuePolicy
from router.selection import RouterMode
from router.settings import SnapshotSettings

TTL_MAX_SECS = 31_536_000
"""A year."""


class RoutingSettings(SnapshotSettings, frozen=True, kw_only=True):
    """Base of the tables of the processes that route requests."""

    router_mode: Annotated[
        Literal["round-robin", "random", "power-of-two", "least-loaded", "kv", "direct"],
        Option(
            "DYN_ROUTER_MODE",
            "How a worker is chosen: in turn, at random, the one with fewer requests of two drawn "
            "at random, the one with the fewest, by prefix and load, or by the client.",
            group="Router",
            use="Kv wherever prompts share beginnings; least-loaded or power-of-two where "
            "they do not; direct where something in front of the router chooses.",
        ),
    ] = "round-robin"
    router_kv_overlap_score_weight: Annotated[
        float,
        Option(
            "DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT",
            "Weight of the blocks to prefill in a worker's cost. Higher keeps prefixes together, "
            "lower spreads the load.",
            aliases=("--kv-overlap-score-weight",),
            ge=0,
            le=1e6,
            use="Above 1 for shorter times to the first token, below 1 for steadier output; 0 "
            "to choose by load alone.",
        ),
    ] = 1.0
    router_temperature: Annotated[
        float,
        Option(
            "DYN_ROUTER_TEMPERATURE",
            "Temperature of the draw among the workers by cost; 0 always takes the lowest.",
            ge=0,
            le=1e6,
            use="Above 0 if one worker draws too much, for example because several frontends "
            "without --router-replica-sync choose alike.",
        ),
    ] = 0.0
    router_cost: Annotated[
        Literal["blocks", "time"],
        Option(
            "RECKON_ROUTER_COST",
            "What the kv mode counts in: blocks, by the peer's formula, or the time that a choice "
            "costs, in milliseconds, by what was learned of each worker. A request that brings its "
            "own weight is counted in blocks.",
            use="Time where workers are unequal or prompts are long; docs/policy.md has figures.",
        ),
    ] = "blocks"
    router_kv_events: Annotated[
        bool,
        Option(
            "DYN_ROUTER_USE_KV_EVENTS",
            "Follow the workers' KV cache events, instead of guessing what they hold.",
            aliases=("--kv-events",),
            use="Off for engines that announce nothing.",
        ),
    ] = True
    router_ttl_secs: Annotated[
        float,
        Option(
            "DYN_ROUTER_TTL_SECS",
            "Without KV events: how long a block is believed to stay cached.",
            aliases=("--router-ttl",),
            unit="seconds",
            gt=0,
            le=TTL_MAX_SECS,
            use="About as long as the engines keep a block that is not used again.",
        ),
    ] = 120.0
    router_max_tree_size: Annotated[
        int,
        Option(
            "DYN_ROUTER_MAX_TREE_SIZE",
            "Without KV events: how many blocks are believed cached at most.",
            unit="blocks",
            ge=1,
            le=1_000_000_000,
            use="About as many blocks as all workers can hold together.",
        ),
    ] = 1_048_576
    router_prune_target_ratio: Annotated[
        float,
        Option(
            "DYN_ROUTER_PRUNE_TARGET_RATIO",
            "Without KV events: the share of --router-max-tree-size that pruning leaves.",
            ge=0,
            le=1,
            use="Lower to prune less often, and more at once.",
        ),
    ] = 0.8
    router_predicted_ttl_secs: Annotated[
        float | None,
        Option(
            "DYN_ROUTER_PREDICTED_TTL_SECS",
            "With KV events: how long the blocks of a request count as cached where it was sent, "
            "before the worker has announced them. Keeps bursts of equal prompts together.",
            unit="seconds",
            unset="only what is announced counts",
            gt=0,
            le=TTL_MAX_SECS,
            use="A few seconds, if equal prompts come in bursts: as long as a prompt takes to "
            "be computed and announced.",
        ),
    ] = None
    router_replica_sync: Annotated[
        bool,
        Option(
            "DYN_ROUTER_REPLICA_SYNC",
            "Count the requests that other frontends routed in the load that this one sees.",
            use="On where several frontends share workers.",
        ),
    ] = False
    router_snapshot_threshold: Annotated[
        int | None,
        Option(
            "DYN_ROUTER_SNAPSHOT_THRESHOLD",
            "Messages in the log after the last snapshot that make the next one due.",
            use="Lower for faster starts, higher for fewer snapshots.",
            unit="messages",
            unset="only the bytes count",
            ge=1,
        ),
    ] = 1_000_000
    router_reset_states: Annotated[
        bool,
        Option(
            "DYN_ROUTER_RESET_STATES",
            "Empty the router's state at the start. It is an event in the log, so every replica "
            "empties its own at the same place; caches and running requests are told anew.",
            use=(
                "Once, after the picture is known to be wrong; not in a service definition, "
                "where every restart would do it."
            ),
        ),
    ] = False
    router_track_active_blocks: Annotated[
        bool,
        Option(
            "DYN_ROUTER_TRACK_ACTIVE_BLOCKS",
            "Count the blocks of running requests in a worker's cost.",
            aliases=("--track-active-blocks",),
            use="Off for workers that only compute prompts.",
        ),
    ] = True
    router_assume_kv_reuse: Annotated[
        bool,
        Option(
            "DYN_ROUTER_ASSUME_KV_REUSE",
            "Count an active block that several requests share once.",
            aliases=("--assume-kv-reuse",),
            use="Off for engines that share no blocks between running requests.",
        ),
    ] = True
    router_track_output_blocks: Annotated[
        bool,
        Option(
            "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
            "Count the blocks that a request's output fills while it grows, less and less towards "
            "the length that its client expects. Needs --router-track-active-blocks.",
            aliases=("--track-output-blocks",),
            use="On where outputs are long beside their prompts.",
        ),
    ] = False
    router_event_threads: Annotated[
        int,
        Option(
            "DYN_ROUTER_EVENT_THREADS",
            "With 1 the event loop that serves HTTP also receives the events of the log. With "
            "more, a process of its own receives them and the loop applies them in short slices; "
            "more than 2 do no more than 2.",
            use="1 on small machines, or with few KV events.",
            ge=1,
        ),
    ] = 4
    router_queue_threshold: Annotated[
        float | None,
        Option(
            "DYN_ROUTER_QUEUE_THRESHOLD",
            "A worker takes no more requests while its active prefill tokens are above this many "
            "times what it can batch.",
            unset="no queue",
            ge=0,
            use="Lower to keep more requests back, where their order matters; unset to send "
            "all on at once.",
        ),
    ] = 2.0
    router_queue_policy: Annotated[
        Literal["fcfs", "wspt"],
        Option(
            "DYN_ROUTER_QUEUE_POLICY",
            "Order of the queue: first come, first served, for the slowest TTFTs; or by weighted "
            "shortest prefill, for the mean TTFT.",
            use="Wspt where short prompts should not wait for long ones.",
        ),
    ] = "fcfs"
    router_queue_len_max: Annotated[
        int,
        Option(
            "RECKON_ROUTER_QUEUE_LEN_MAX",
            "Requests of a model that may wait in the queue; one more is refused.",
            unit="requests",
            ge=1,
            use="Lower to refuse early, where clients can go elsewhere.",
        ),
    ] = 1024
    router_queue_wait_max_secs: Annotated[
        float,
        Option(
            "RECKON_ROUTER_QUEUE_WAIT_MAX_SECS",
            "How long a request may wait in the queue; then it is refused.",
            unit="seconds",
            gt=0,
            use="As long as your clients wait.",
        ),
    ] = 60.0
    router_session_affinity_ttl_secs: Annotated[
        float | None,
        Option(
            "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
            "Send the requests of a session (header x-dynamo-session-id, or nvext.session_id) to "
            "one worker, until it has been idle for so long.",
            unit="seconds",
            unset="sessions are not bound",
            ge=1,
            le=TTL_MAX_SECS,
            use="For agents and chats whose turns come minutes apart: a little longer than "
            "their pauses.",
        ),
    ] = None
    router_session_affinity_mode: Annotated[
        Literal["hard", "soft"],
        Option(
            "DYN_ROUTER_SESSION_AFFINITY_MODE",
            "What to do while the session's worker lives and can take no request: refuse (hard), "
            "or bind the session to another (soft).",
            use="Hard where a session has state on its worker that no other can serve.",
        ),
    ] = "soft"
    enable_cache_control: Annotated[
        bool,
        Option(
            "DYN_ENABLE_CACHE_CONTROL",
            "Let clients pin a prefix in the cache for a time. Needs the kv mode.",
            use="On where clients know which prompts come back, and the engines can pin.",
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.router_track_output_blocks and not self.router_track_active_blocks:
            raise SettingsError("--router-track-output-blocks needs --router-track-active-blocks")

    @property
    def router_options(self) -> RouterOptions:
        return RouterOptions(
            mode=RouterMode(self.router_mode),
            overlap_weight=self.router_kv_overlap_score_weight,
            temperature=self.router_temperature,
            cost=self.router_cost,
            replica_sync=self.router_replica_sync,
            kv_events=self.router_kv_events,
            ttl_secs=self.router_ttl_secs,
            predicted_ttl_secs=self.router_predicted_ttl_secs,
            max_tree_size=self.router_max_tree_size,
            prune_target_ratio=self.router_prune_target_ratio,
            track_active_blocks=self.router_track_active_blocks,
            assume_kv_reuse=self.router_assume_kv_reuse,
            track_output_blocks=self.router_track_output_blocks,
            queue_threshold=self.router_queue_threshold,
            queue_policy=QueuePolicy(self.router_queue_policy),
            queue_len_max=self.router_queue_len_max,
            queue_wait_max_secs=self.router_queue_wait_max_secs,
            session_ttl_secs=self.router_session_affinity_ttl_secs,
            session_mode=self.router_session_affinity_mode,
        )
