"""Several configurations at once, each in a process of its own that says how far it is."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from random import Random

from msgspec import Struct

from simulations.compare_config import Configuration
from simulations.compare_fleet import Fleet
from simulations.compare_run import Comparison, Run
from simulations.trace import TraceRequest

_TELL_EVERY = 100
"""Requests."""
_END_S = 5.0

FAILED = 1


class Workload(Struct, frozen=True, kw_only=True):
    """What all configurations are given."""

    requests: list[TraceRequest]
    fleet: Fleet
    speed: float
    seed: int


class Done(Struct, frozen=True, kw_only=True):
    run: Run
    cpu_s: float


class JobFailed(Exception):
    """The process of a configuration died; it has said why on stderr."""

    def __init__(self, name: str, exit_code: int | None) -> None:
        super().__init__(name, exit_code)
        self.name = name
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"the simulation of {self.name} ended with exit code {self.exit_code}"


class _Running(Struct):
    index: int
    process: BaseProcess
    pipe: Connection


def run_all(
    configurations: Sequence[Configuration],
    workload: Workload,
    jobs: int,
    on_progress: Callable[[int, int], None],
) -> list[Done]:
    """Run all, at most `jobs` at once; results in the order of the configurations.

    on_progress: (index of a configuration, requests of it that have ended). Raises JobFailed. No
    process is left behind, whatever happens.
    """
    # Not forked: whoever shows the progress may have threads.
    context = multiprocessing.get_context("spawn")
    # Started with the first process otherwise, and then it lets interrupts through in between.
    resource_tracker.ensure_running()
    done: dict[int, Done] = {}
    running: dict[Connection, _Running] = {}
    left = list(enumerate(configurations))[::-1]
    try:
        while left or running:
            while left and len(running) < jobs:
                index, configuration = left.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(configuration, workload, theirs))
                with _interrupts_held():
                    process.start()
                    theirs.close()  # so that the process's death ends the pipe
                    running[ours] = _Running(index, process, ours)
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                one = running[pipe]
                try:
                    told: int | Done = pipe.recv()
                except EOFError:
                    one.process.join()
                    code = one.process.exitcode
                    raise JobFailed(configurations[one.index].name, code) from None
                if isinstance(told, int):
                    on_progress(one.index, told)
                    continue
                done[one.index] = told
                on_progress(one.index, len(workload.requests))
                _end(running.pop(pipe))
    finally:
        for one in running.values():
            one.process.terminate()
            _end(one)
    return [done[index] for index in range(len(configurations))]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and never reaches a process that is started: we end those.

    Blocking the signal is for that process, which inherits it. It does not keep it from us: another
    thread, such as the one that shows the progress, may take it, and it is handled in this one.
    """
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _end(one: _Running) -> None:
    one.process.join(_END_S)
    if one.process.exitcode is None:
        one.process.kill()
        one.process.join()
    one.pipe.close()


def _run(configuration: Configuration, workload: Workload, pipe: Connection) -> None:
    """The whole life of a process."""
    ended = 0

    def on_ended() -> None:
        nonlocal ended
        ended += 1
        if ended % _TELL_EVERY == 0:
            pipe.send(ended)

    try:
        started_s = time.process_time()
        comparison = Comparison(
            workload.requests,
            workload.fleet,
            configuration.options,
            Random(workload.seed),
            speed=workload.speed,
            on_ended=on_ended,
        )
        run = comparison.run()
        pipe.send(Done(run=run, cpu_s=round(time.process_time() - started_s, 3)))
    except BrokenPipeError:
        raise SystemExit(FAILED) from None  # nobody listens any more
