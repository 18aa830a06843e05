"""The options of `python -m workers mock`.

Where `reckon up` has the same option the variable is the same, so that one environment means the
same to both.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from eventstore.options import Option
from eventstore.process_settings import NAMESPACE_DEFAULT, ProcessSettings
from eventstore.subjects import check_namespace
from workers.bootstrap import WAIT_S
from workers.leases import check_component
from workers.timing import KV_BYTES_PER_TOKEN, KV_TRANSFER_GBPS

SHIPPED_MODEL = Path(__file__).parent / "model"
MODEL_NAME_DEFAULT = "reckon-mock"


class MockWorkerSettings(ProcessSettings, frozen=True, kw_only=True):
    """A worker with a simulated engine: real requests, real KV cache bookkeeping, made-up tokens at
    the pace of a real engine. It registers, uploads its tokenizer, and serves frontends.

    SIGTERM or SIGINT: it leaves the list, finishes what runs, and ends; a second one ends it at
    once. Exit: 0 after an orderly end; 1 if it could not start; 2 for a wrong option.
    """

    program: ClassVar[str] = "python -m workers mock"

    namespace: Annotated[
        str,
        Option(
            "DYN_NAMESPACE",
            "Namespace to serve in.",
            group="Worker",
            check=check_namespace,
        ),
    ] = NAMESPACE_DEFAULT
    component: Annotated[
        str, Option("DYN_COMPONENT", "Component to register as.", check=check_component)
    ] = "backend"
    host: Annotated[
        str,
        Option("DYN_TCP_RPC_HOST", "Address to listen on for frontends. 0.0.0.0: all of IPv4."),
    ] = "127.0.0.1"
    port: Annotated[
        int, Option("DYN_TCP_RPC_PORT", "Port to listen on; 0 takes a free one.", ge=0, le=65_535)
    ] = 0
    advertise_host: Annotated[
        str | None,
        Option(
            "RECKON_ADVERTISE_HOST",
            "Host that frontends are told to connect to.",
            unset="--host, or where that is all addresses, the one of this machine's name",
        ),
    ] = None
    lease_ttl_secs: Annotated[
        int | None,
        Option(
            "RECKON_LEASE_TTL_SECS",
            "How long a worker that vanished without a word stays listed.",
            unit="seconds",
            unset="5, and 15 where the NATS server is one of a cluster",
            ge=1,
            le=3600,
        ),
    ] = None
    drain_secs: Annotated[
        float,
        Option(
            "RECKON_DRAIN_SECS",
            "How long running requests may go on after SIGTERM.",
            unit="seconds",
            ge=0,
        ),
    ] = 5.0

    role: Annotated[
        Literal["aggregated", "prefill", "decode"],
        Option(
            "RECKON_ROLE",
            "aggregated: serves requests from prompt to answer. prefill: computes prompts and "
            "hands them over. decode: fetches computed prompts and answers. Either serves a whole "
            "request where a frontend sends one.",
            group="Disaggregation",
        ),
    ] = "aggregated"
    bootstrap: Annotated[
        bool,
        Option(
            "RECKON_BOOTSTRAP",
            "With --role prefill: decode workers ask here for prompts, so that a frontend can send "
            "a request to both at once.",
        ),
    ] = False
    bootstrap_port: Annotated[
        int,
        Option(
            "RECKON_BOOTSTRAP_PORT",
            "Port for that, on the same address as --port; 0 takes a free one.",
            ge=0,
            le=65_535,
        ),
    ] = 0
    bootstrap_timeout_secs: Annotated[
        float,
        Option(
            "RECKON_BOOTSTRAP_TIMEOUT_SECS",
            "How long a decode worker waits for a prompt that it asked for, and a prefill worker "
            "for somebody to ask.",
            unit="seconds",
            gt=0,
        ),
    ] = WAIT_S
    kv_bytes_per_token: Annotated[
        int,
        Option(
            "RECKON_KV_BYTES_PER_TOKEN",
            "KV cache of a token, which a decode worker fetches unless it has it. The default is "
            "that of Llama 3.1 8B.",
            unit="bytes",
            ge=0,
        ),
    ] = KV_BYTES_PER_TOKEN
    kv_transfer_gbps: Annotated[
        float,
        Option(
            "RECKON_KV_TRANSFER_GBPS",
            "Speed at which it does; --speedup-ratio multiplies it. The default is a port of NDR "
            "InfiniBand.",
            unit="Gbit/s",
            gt=0,
        ),
    ] = KV_TRANSFER_GBPS

    model_name: Annotated[
        str, Option("RECKON_MODEL_NAME", "Name that clients ask for.", group="Model")
    ] = MODEL_NAME_DEFAULT
    model_path: Annotated[
        Path | None,
        Option(
            "RECKON_MODEL_PATH",
            "Directory with the model's tokenizer.json and tokenizer_config.json.",
            unset="the small model that comes with the mock worker",
        ),
    ] = None
    context_length: Annotated[
        int | None,
        Option(
            "RECKON_CONTEXT_LENGTH",
            "Prompt and output tokens of a request together, at most.",
            unit="tokens",
            unset="what the model's config.json says, else 131072",
            ge=2,
        ),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Option(
            "DYN_TOOL_CALL_PARSER",
            "Format in which the model writes tool calls, such as hermes. A frontend that does not "
            "know it does not use this worker.",
            unset="tool calls stay in the text",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(
            "DYN_REASONING_PARSER",
            "Format in which the model writes its reasoning, such as deepseek_r1. Likewise.",
            unset="reasoning stays in the text",
        ),
    ] = None
    modalities: Annotated[
        tuple[Literal["image", "audio", "video"], ...],
        Option(
            "RECKON_MODALITIES",
            "What the model takes besides text; may be given several times. The mock engine looks "
            "at none of it.",
        ),
    ] = ()

    speedup_ratio: Annotated[
        float,
        Option(
            "RECKON_SPEEDUP_RATIO",
            "Speed of the engine; 2 is twice as fast as the one that it models.",
            group="Engine",
            gt=0,
        ),
    ] = 1.0
    block_size: Annotated[
        int, Option("RECKON_BLOCK_SIZE", "Size of a KV block.", unit="tokens", ge=1)
    ] = 64
    num_gpu_blocks: Annotated[
        int, Option("RECKON_NUM_GPU_BLOCKS", "KV blocks of each rank.", unit="blocks", ge=1)
    ] = 16_384
    max_num_seqs: Annotated[
        int, Option("RECKON_MAX_NUM_SEQS", "Requests that run at once on a rank.", ge=1)
    ] = 256
    max_num_batched_tokens: Annotated[
        int,
        Option(
            "RECKON_MAX_NUM_BATCHED_TOKENS",
            "Tokens computed in a step of a rank; at least --max-num-seqs.",
            unit="tokens",
            ge=1,
        ),
    ] = 8_192
    max_num_waiting: Annotated[
        int,
        Option(
            "RECKON_MAX_NUM_WAITING",
            "Requests that may wait on a rank; further ones are refused as overloaded.",
            ge=1,
        ),
    ] = 4_096
    max_pinned_ratio: Annotated[
        float,
        Option(
            "RECKON_MAX_PINNED_RATIO",
            "Share of a rank's KV blocks that requests may keep from being evicted; 0: none.",
            ge=0,
            le=1,
        ),
    ] = 0.5
    data_parallel_size: Annotated[
        int,
        Option(
            "RECKON_DATA_PARALLEL_SIZE",
            "Ranks, each with an engine and a KV cache of its own.",
            ge=1,
            le=64,
        ),
    ] = 1
    seed: Annotated[
        int,
        Option(
            "RECKON_SEED",
            "Of the made-up tokens. Workers of one model should share it: a request that moves "
            "then goes on as it would have.",
            ge=0,
        ),
    ] = 0
    output_tokens_mean: Annotated[
        float,
        Option(
            "RECKON_OUTPUT_TOKENS_MEAN",
            "Average length of an answer that nothing else ends.",
            unit="tokens",
            ge=1,
        ),
    ] = 128.0
