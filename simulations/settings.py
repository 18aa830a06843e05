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
