"""The options of the commands of `python -m simulations`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import workers
from eventstore.options import Option, Settings

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
