"""`python -m simulations compare`: a trace under several router configurations, side by side."""

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from random import Random

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eventstore.settings import from_command_line
from simulations.compare_config import Configuration, parse_configurations
from simulations.compare_fleet import NS_PER_MS, Fleet
from simulations.compare_jobs import Done, JobFailed, Workload, run_all
from simulations.compare_plot import write_plot
from simulations.compare_report import LEGEND, Compared, Report, headline, table
from simulations.generate import generate
from simulations.settings import CompareSettings
from simulations.shapes import SHAPES
from simulations.trace import TraceError, TraceRequest, read_trace

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
_REFRESH_PER_S = 4


class _CannotCompare(Exception):
    """Why there is nothing to show, in one line, and the exit code."""

    def __init__(self, code: int, problem: str) -> None:
        super().__init__(code, problem)
        self.code = code
        self.problem = problem


def compare(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Returns the exit code. The table or JSON goes to stdout, the progress bars to stderr."""
    settings = from_command_line(CompareSettings, argv, env)
    try:
        return _compare(settings)
    except _CannotCompare as error:
        print(f"Error: {error.problem}", file=sys.stderr)
        return error.code
    except JobFailed as error:
        print(f"Error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _compare(settings: CompareSettings) -> int:
    try:
        configurations = parse_configurations(settings.config)
        fleet = _fleet(settings)
    except ValueError as error:
        raise _CannotCompare(MISUSED, str(error)) from error
    name, requests = _load(settings)
    workload = Workload(requests=requests, fleet=fleet, speed=settings.speed, seed=settings.seed)
    jobs = settings.jobs or os.cpu_count() or 1
    done = _run(configurations, workload, jobs)
    report = Report(
        trace=name,
        requests=len(requests),
        speed=settings.speed,
        seed=settings.seed,
        fleet=fleet,
        configurations=[
            Compared(
                name=configuration.name,
                options=msgspec.to_builtins(configuration.options),
                result=each.run.result,
                cpu_s=each.cpu_s,
            )
            for configuration, each in zip(configurations, done, strict=True)
        ],
    )
    if settings.json:
        print(report.to_json())
    else:
        Console().print(headline(report), table(report), LEGEND, sep="\n", highlight=False)
    if settings.plot is not None:
        samples = zip(configurations, done, strict=True)
        try:
            write_plot(settings.plot, report, {c.name: each.run.ttft_ms for c, each in samples})
        except OSError as error:
            raise _CannotCompare(FAILED, f"{settings.plot}: {error.strerror}") from error
    return 0


def _fleet(settings: CompareSettings) -> Fleet:
    return Fleet(
        workers=settings.workers,
        blocks=settings.blocks,
        slow_workers=settings.slow_workers,
        slow_factor=settings.slow_factor,
        event_delay_ns=round(settings.event_delay_ms * NS_PER_MS),
    )


def _load(settings: CompareSettings) -> tuple[str, list[TraceRequest]]:
    """The trace's name, and the requests of it that are asked for."""
    end = None if settings.requests is None else settings.skip + settings.requests
    if (settings.file is None) == (settings.shape is None):
        raise _CannotCompare(MISUSED, "either FILE or --shape is needed")
    if settings.shape is not None:
        name = f"{settings.shape}, seed {settings.seed}"
        requests = generate(SHAPES[settings.shape], Random(settings.seed))[settings.skip : end]
    else:
        assert settings.file is not None
        name = settings.file.name
        try:
            with settings.file.open("rb") as lines:
                requests = list(islice(read_trace(lines), settings.skip, end))
        except OSError as error:
            raise _CannotCompare(FAILED, f"{settings.file}: {error.strerror}") from error
        except TraceError as error:
            raise _CannotCompare(FAILED, f"{settings.file} is not a trace: {error}") from error
    if not requests:
        raise _CannotCompare(FAILED, f"{name} has no request after the first {settings.skip}")
    return name, requests


def _run(configurations: Sequence[Configuration], workload: Workload, jobs: int) -> list[Done]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        refresh_per_second=_REFRESH_PER_S,
    ) as progress:
        total = len(workload.requests)
        bars = [progress.add_task(each.name, total=total) for each in configurations]
        return run_all(
            configurations,
            workload,
            jobs,
            lambda index, ended: progress.update(bars[index], completed=ended),
        )
