"""The options of `reckon up`.

Where the frontend has the same option the variable is the frontend's own, so that one environment
means the same to `reckon up` and to `python -m frontend`. Some defaults differ, because this is a
deployment to look at, on one machine. Options that up does not have reach the frontends by their
`DYN_*` variables.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from eventstore.options import Option, Settings
from eventstore.process_settings import NAMESPACE_DEFAULT
from eventstore.subjects import check_namespace

RouterMode = Literal["kv", "round-robin", "random", "power-of-two", "least-loaded", "direct"]


def _folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")


class UpSettings(Settings, frozen=True, kw_only=True):
    """Start a whole deployment on this machine: an embedded nats-server, frontend replicas and mock
    workers, each a process of its own. Ctrl-C ends it; the log stays in the data directory, and the
    next start carries on from it. Further DYN_* variables reach the frontends.
    """

    program: ClassVar[str] = "reckon up"

    frontends: Annotated[
        int,
        Option("RECKON_FRONTENDS", "Frontend replicas to start.", group="Deployment", ge=1, le=64),
    ] = 2
    workers: Annotated[int, Option("RECKON_WORKERS", "Mock workers to start.", ge=1, le=256)] = 4
    data_dir: Annotated[
        Path | None,
        Option(
            "RECKON_DATA_DIR",
            "Where the log and the children's own logs are kept. One deployment at a time uses it.",
            unset="reckon in XDG_STATE_HOME, which is ~/.local/state unless set",
        ),
    ] = None
    namespace: Annotated[
        str,
        Option("DYN_NAMESPACE", "Namespace of frontends and workers.", check=check_namespace),
    ] = NAMESPACE_DEFAULT
    nats_server_binary: Annotated[
        Path | None,
        Option(
            "RECKON_NATS_SERVER_BINARY",
            "The nats-server to run.",
            aliases=("--nats-server",),
            unset="the one on PATH if it is 2.12 or newer, else the one installed with this",
        ),
    ] = None
    start_timeout: Annotated[
        float,
        Option(
            "RECKON_START_TIMEOUT",
            "How long everything together may take to become ready; a long log takes longer.",
            unit="seconds",
            gt=0,
            le=86_400,
        ),
    ] = 120.0

    http_host: Annotated[
        str,
        Option(
            "DYN_HTTP_HOST",
            "Address that the frontends listen on. Unlike a frontend alone, this machine only.",
            group="Frontends",
        ),
    ] = "127.0.0.1"
    http_port: Annotated[
        int,
        Option(
            "DYN_HTTP_PORT",
            "Port of the first frontend; each further one takes the next.",
            ge=1,
            le=65_535,
        ),
    ] = 8000
    router_mode: Annotated[
        RouterMode,
        Option("DYN_ROUTER_MODE", "How workers are chosen. A frontend alone uses round-robin."),
    ] = "kv"
    router_replica_sync: Annotated[
        bool,
        Option(
            "DYN_ROUTER_REPLICA_SYNC",
            "Replicas count each other's requests. Off in a frontend alone.",
        ),
    ] = True

    model_path: Annotated[
        Path | None,
        Option(
            "RECKON_MODEL_PATH",
            "Directory with the model's tokenizer.json and tokenizer_config.json.",
            group="Mock workers",
            unset="the small model that comes with the mock worker",
            check=_folder,
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Option("RECKON_MODEL_NAME", "Name that clients ask for.", unset="the mock worker's own"),
    ] = None
    speedup_ratio: Annotated[
        float | None,
        Option(
            "RECKON_SPEEDUP_RATIO",
            "Speed of the mock engine; 2 is twice as fast as the engine that it models.",
            unset="the mock worker's own",
            gt=0,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        Option(
            "RECKON_BLOCK_SIZE",
            "Size of a KV block.",
            unit="tokens",
            unset="the mock worker's own",
            ge=1,
        ),
    ] = None
    num_gpu_blocks: Annotated[
        int | None,
        Option(
            "RECKON_NUM_GPU_BLOCKS",
            "KV blocks of each worker rank.",
            unit="blocks",
            unset="the mock worker's own",
            ge=1,
        ),
    ] = None

    def ports(self) -> range:
        """The frontends' ports. May reach beyond 65,535."""
        return range(self.http_port, self.http_port + self.frontends)
