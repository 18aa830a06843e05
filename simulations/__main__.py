"""`python -m simulations send-trace …`, `… generate-trace …`, `… compare …` and `… cluster …`."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from eventstore.settings import from_command_line
from simulations.compare import compare
from simulations.generate import generate_trace
from simulations.prompts import PromptMaker, UnusableTokenizer, find_words
from simulations.report import Outcome, table
from simulations.seeds import cluster
from simulations.send import Sender, SendError, find_model
from simulations.settings import SHIPPED_MODEL, SendTraceSettings
from simulations.trace import TraceError, TraceRequest, read_trace

FAILED, INTERRUPTED = 1, 130
_REFRESH_PER_S = 4


class CannotStart(Exception):
    """Why a command did nothing, in one line."""


def main() -> int:
    """Run the command that the command line names; returns the exit code."""
    commands: dict[str, Callable[[Sequence[str], Mapping[str, str]], int]] = {
        "send-trace": send_trace,
        "generate-trace": generate_trace,
        "compare": compare,
        "cluster": cluster,
    }
    name, *argv = sys.argv[1:] or [""]
    command = commands.get(name)
    if command is None:
        usage = f"usage: python -m simulations {{{','.join(commands)}}} [options]"
        asked = name in ("-h", "--help")
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return command(argv, os.environ)
    except CannotStart as error:
        print(f"Error: {error}", file=sys.stderr)
    except SendError as error:
        print(f"Error: {error}\nTry: {error.try_this}", file=sys.stderr)
    return FAILED


def send_trace(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """`send-trace`. The report goes to stdout, the progress bar to stderr."""
    settings = from_command_line(SendTraceSettings, argv, env)
    requests = _load_requests(settings)
    prompts = _load_prompts(settings)
    run = _Run(settings, requests, prompts)
    code = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run.main())
    except KeyboardInterrupt:
        code = INTERRUPTED
    if run.sender is None:
        return code
    report = run.sender.report()
    Console().print(table(report))
    if settings.json:
        print(report.to_json())
    return code or (FAILED if report.requests and report.errors == report.requests else 0)


def _load_requests(settings: SendTraceSettings) -> list[TraceRequest]:
    end = None if settings.requests is None else settings.skip + settings.requests
    try:
        with settings.file.open("rb") as lines:
            requests = list(islice(read_trace(lines), settings.skip, end))
    except OSError as error:
        raise CannotStart(f"{settings.file}: {error.strerror}") from error
    except TraceError as error:
        raise CannotStart(f"{settings.file} is not a trace: {error}") from error
    if not requests:
        raise CannotStart(f"{settings.file} has no request after the first {settings.skip}")
    return requests


def _load_prompts(settings: SendTraceSettings) -> PromptMaker:
    path = (settings.model_path or SHIPPED_MODEL) / "tokenizer.json"
    try:
        words = find_words(_load_tokenizer(path))
    except UnusableTokenizer as error:
        raise CannotStart(f"{path}: {error}") from error
    return PromptMaker(words, settings.prompt, settings.seed)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        text = path.read_text()
    except OSError as error:
        raise CannotStart(f"{path}: {error.strerror}") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower one
        raise CannotStart(f"{path} is not a tokenizer: {error}") from error


class _Run:
    """One run of the sender, with its progress bar.

    sender: None until the run has begun.
    """

    def __init__(
        self, settings: SendTraceSettings, requests: list[TraceRequest], prompts: PromptMaker
    ) -> None:
        self._settings = settings
        self._requests = requests
        self._prompts = prompts
        self._errors = 0
        self.sender: Sender | None = None

    async def main(self) -> None:
        """Raises SendError if the run cannot begin."""
        settings = self._settings
        urls = [url.rstrip("/") for url in settings.url]
        # The bound on open requests is the sender's, so the connector needs none.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            model = await find_model(session, urls, settings.model)
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[errors]} errors"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                refresh_per_second=_REFRESH_PER_S,
            ) as progress:
                bar = progress.add_task(model, total=len(self._requests), errors=0)

                def advance(outcome: Outcome) -> None:
                    self._errors += outcome.error is not None
                    progress.update(bar, advance=1, errors=self._errors)

                self.sender = Sender(
                    session,
                    self._requests,
                    self._prompts,
                    urls=urls,
                    model=model,
                    speedup=settings.speedup,
                    inflight_max=settings.max_inflight,
                    timeout_s=settings.timeout_secs,
                    on_outcome=advance,
                )
                await self.sender.run()


if __name__ == "__main__":
    sys.exit(main())
