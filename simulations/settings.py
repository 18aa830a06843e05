"""The options of the commands of `python -m simulations`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import workers
from eventstore.options import Option, Settings
from simulations.compare_config import DEFAULTS, parse_configuration
from simulations.compare_plot import check_plot

SHIPPED_MODEL = Path(workers.__file__).parent / "model"
"""The model that the mock worker serves unless told otherwise."""


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is the root of an HTTP server."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if scheme not in ("http", "https") or not host or path.strip("/"):
        raise ValueError(f"{url!r} is not http://host:port")


class SendTraceSettings(Settings, frozen=True, kw_only=True):
    """Send the requests of a trace to running frontends at their recorded times, and report.

    The trace has one JSON object a line (Mooncake's form): timestamp in ms, input_length and
    output_length in tokens, hash_ids of the prompt's 512-token blocks. Prompts get exactly that
    prefix structure. Ctrl-C reports what there is so far.

    Exit: 0 with a report, also of failed requests; 1 if all failed, or the run could not begin;
    2 for a wrong option; 130 after Ctrl-C.
    """

    program: ClassVar[str] = "python -m simulations send-trace"

    file: Annotated[Path, Option("", "The trace.", group="Trace", positional=True)]
    requests: Annotated[
        int | None, Option("", "Send this many.", ge=1, unset="all that the trace has")
    ] = None
    skip: Annotated[int, Option("", "Leave out this many first.", ge=0)] = 0
    speedup: Annotated[
        float, Option("", "Recorded times are divided by this: 2 sends twice as fast.", gt=0)
    ] = 1.0

    url: Annotated[
        tuple[str, ...],
        Option(
            "",
            "A frontend's root; given several times, requests go round all of them.",
            group="Frontends",
            check=check_url,
        ),
    ] = ("http://127.0.0.1:8000",)
    model: Annotated[
        str | None, Option("", "The model to ask for.", unset="the first that is listed")
    ] = None
    timeout_secs: Annotated[
        float, Option("", "A request not answered by then is an error.", gt=0, unit="seconds")
    ] = 600.0
    max_inflight: Annotated[
        int,
        Option(
            "",
            "Open requests at most. At the bound the next one waits, which shows as send lag.",
            ge=1,
            le=10_000,
        ),
    ] = 1000

    prompt: Annotated[
        Literal["text", "tokens"],
        Option("", "Send prompts as text or as token ids.", group="Prompts"),
    ] = "text"
    model_path: Annotated[
        Path | None,
        Option(
            "",
            "Folder of the served model's tokenizer.json, for words of exactly one token each.",
            unset="the model that ships with the mock worker",
        ),
    ] = None
    seed: Annotated[
        int,
        Option("", "Another seed makes other prompts, which no cache holds from an earlier run."),
    ] = 0

    json: Annotated[
        bool, Option("", "Print the report once more, as one JSON object, last.", group="Report")
    ] = False


class ClusterSettings(Settings, frozen=True, kw_only=True):
    """Simulate a whole deployment in virtual time, with faults, and check it.

    The real replicas, publishers, snapshots, leases, request plane and mock workers run in one
    process over a log in memory. What goes wrong, and when, follows from the seed: equal seeds and
    sizes make equal runs. A failure names the check, the record and the command that repeats it.

    Exit: 0 if all checks held; 1 if one did not; 2 for a wrong option; 130 after Ctrl-C.
    """

    program: ClassVar[str] = "python -m simulations cluster"

    seed: Annotated[
        int | None, Option("", "The run.", group="Seeds", positional=True, unset="a random one")
    ] = None
    seeds: Annotated[int, Option("", "Run so many seeds, from SEED on.", ge=1)] = 1
    jobs: Annotated[
        int | None, Option("", "Seeds that run at once.", ge=1, unset="as many as processors")
    ] = None

    replicas: Annotated[
        int, Option("", "Frontends, each with a router replica.", group="Sizes", ge=1, le=100)
    ] = 3
    workers: Annotated[int, Option("", "Mock workers.", ge=1, le=100)] = 4
    requests: Annotated[int, Option("", "Sent within the time.", ge=0)] = 2000
    seconds: Annotated[
        float, Option("", "Virtual time with traffic and faults.", gt=0, unit="seconds")
    ] = 60.0

    log_lines: Annotated[
        bool,
        Option("", "Show what the processes of a single seed log.", group="Report"),
    ] = False
    json: Annotated[bool, Option("", "Print what came out as one JSON object per seed.")] = False


class CompareSettings(Settings, frozen=True, kw_only=True):
    """Simulate a trace in virtual time under several router configurations, side by side.

    The real router decides, from real events through the real fold; mock engines serve, each with
    the timing of a measured one. Nothing sleeps: an hour of traffic takes half a minute. Equal
    options give equal results.

    Exit: 0 with a report; 1 if there is no trace to read, or a simulation failed; 2 for a wrong
    option; 130 after Ctrl-C.
    """

    program: ClassVar[str] = "python -m simulations compare"

    file: Annotated[
        Path | None,
        Option(
            "",
            "The trace, in the form that send-trace takes.",
            group="Trace",
            positional=True,
            unset="--shape says which to make",
        ),
    ] = None
    shape: Annotated[
        Literal["conversation", "short", "hot-prefix", "bursts", "prefill-only", "decode-heavy"]
        | None,
        Option("", "Make up a trace of this shape, from the seed.", unset="FILE is the trace"),
    ] = None
    requests: Annotated[
        int | None, Option("", "Take this many.", ge=1, unset="all that the trace has")
    ] = None
    skip: Annotated[int, Option("", "Leave out this many first.", ge=0)] = 0
    speed: Annotated[
        float,
        Option("", "Recorded times are divided by this: at 2 requests come twice as fast.", gt=0),
    ] = 1.0
    seed: Annotated[
        int, Option("", "Of the router's random choices, and of a trace that is made up.")
    ] = 0

    config: Annotated[
        tuple[str, ...],
        Option(
            "",
            "A configuration: NAME:key=value,… sets fields of the router's options. Without mode=, "
            "the mode is NAME if that is one, else kv. May be given several times.",
            group="Configurations",
            check=parse_configuration,
        ),
    ] = DEFAULTS

    workers: Annotated[int, Option("", "Mock workers.", group="Workers", ge=1, le=1000)] = 8
    blocks: Annotated[int, Option("", "KV blocks of each, of 64 tokens.", ge=1, unit="blocks")] = (
        16_384
    )
    slow_workers: Annotated[int, Option("", "So many of them are slow.", ge=0)] = 0
    slow_factor: Annotated[
        float, Option("", "A slow worker's steps take so many times as long.", gt=0)
    ] = 2.0
    event_delay_ms: Annotated[
        float,
        Option("", "From an event to its effect on the router's state.", ge=0, unit="milliseconds"),
    ] = 0.0

    jobs: Annotated[
        int | None,
        Option(
            "",
            "Configurations that are simulated at once.",
            group="Report",
            ge=1,
            unset="as many as processors",
        ),
    ] = None
    json: Annotated[bool, Option("", "Print one JSON object instead of the table.")] = False
    plot: Annotated[
        Path | None,
        Option(
            "",
            "Draw to this file, .png or .svg. Needs the extra `plot`.",
            unset="no plot",
            check=check_plot,
        ),
    ] = None
