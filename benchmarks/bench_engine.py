"""What does a step of the mock engine cost, and does it behave like the peer's engine?

    python -m benchmarks.bench_engine [--trace FILE] [--workers 8 4] [--out FILE]

With the Mooncake conversation trace, its hour is replayed in virtual time over engines that take
turns, beside what the peer's own replay gave. 40 s of CPU for each number of workers.
"""

import argparse
import heapq
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from statistics import fmean
from time import perf_counter_ns
from typing import NamedTuple

from benchmarks.processes import machine, row
from simulations.trace import TRACE_BLOCK_TOKENS, TraceRequest, expand, read_trace
from workers.engine import EngineConfig, MockEngine, StepOutput, StepResult
from workers.protocol import EngineRequest, StopConditions

ROUNDS = 5
STEPS = 128
VOCABULARY = range(50_000)


class Figures(NamedTuple):
    """What a replay is judged by."""

    reuse: float
    """Prompt tokens from the cache, of all."""
    ttft_mean_ms: float
    ttft_p99_ms: float
    itl_mean_ms: float
    latency_mean_ms: float


PEER = {
    8: Figures(0.0817, 321, 2048, 7.59, 2913),
    4: Figures(0.0821, 516, 2577, 10.54, 4115),
}
"""By number of workers: the conversation trace, round-robin, 16,384 blocks, as measured."""


def request(request_id: str, hash_ids: Iterable[int], isl: int, osl: int) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        model="m",
        token_ids=expand(hash_ids, isl, VOCABULARY),
        stop_conditions=StopConditions(max_tokens=osl, ignore_eos=True),
    )


def decode_us(running: int, prompt_blocks: int) -> list[float]:
    """µs of a step in which `running` requests of `prompt_blocks` trace blocks decode, by round."""
    isl = prompt_blocks * TRACE_BLOCK_TOKENS
    engine = MockEngine(EngineConfig(num_gpu_blocks=1 << 17), worker_id=1)
    for number in range(running):
        first = number * prompt_blocks
        engine.submit(request(str(number), range(first, first + prompt_blocks), isl, 10_000))
    while (result := engine.step()) is not None and result.prefill_tokens:
        pass
    rounds = []
    for _ in range(ROUNDS):
        start_ns = perf_counter_ns()
        for _ in range(STEPS):
            engine.step()
        rounds.append((perf_counter_ns() - start_ns) / 1e3 / STEPS)
    return rounds


def prefill_us() -> tuple[list[float], list[float]]:
    """µs to submit a prompt of 12k tokens, and of all its steps to a first token, by round."""
    blocks = 24
    engine = MockEngine(EngineConfig(), worker_id=1)
    submits, steps = [], []
    for number in range(16):
        first = number * blocks
        new = request(str(number), range(first, first + blocks), blocks * TRACE_BLOCK_TOKENS, 1)
        start_ns = perf_counter_ns()
        engine.submit(new)
        submitted_ns = perf_counter_ns()
        while engine.step() is not None:
            pass
        submits.append((submitted_ns - start_ns) / 1e3)
        steps.append((perf_counter_ns() - submitted_ns) / 1e3)
    return submits, steps


class Replay:
    """A trace over engines that take turns, in virtual time. Times in ms."""

    def __init__(self, workers: int) -> None:
        # No limit but the cache: the trace's longest prompts are near the usual context length.
        config = EngineConfig(context_length=1 << 20)
        self.engines = [MockEngine(config, worker_id=number) for number in range(workers)]
        self._steps: list[tuple[float, int, StepResult]] = []
        """Running steps by when they end, each with its engine; an idle engine has none."""
        self._busy: set[int] = set()
        self._arrived: dict[str, float] = {}
        self._ttfts: dict[str, float] = {}
        self._latencies: dict[str, float] = {}
        self._cached_tokens = self._prompt_tokens = self._output_tokens = 0

    def run(self, trace: Iterable[TraceRequest]) -> Figures:
        turns = cycle(range(len(self.engines)))
        for index, (recorded, number) in enumerate(zip(trace, turns, strict=False)):
            now = float(recorded.timestamp_ms)
            self._run_until(now)
            request_id, isl, osl = str(index), recorded.input_length, recorded.output_length
            self.engines[number].submit(request(request_id, recorded.hash_ids, isl, osl))
            self._arrived[request_id] = now
            self._prompt_tokens += isl
            if number not in self._busy:
                self._start(number, now)
        self._run_until(float("inf"))
        return self._figures()

    def _run_until(self, time: float) -> None:
        while self._steps and self._steps[0][0] < time:
            now, number, result = heapq.heappop(self._steps)
            for output in result.outputs:
                self._record(output, now - self._arrived[output.request_id])
            self._start(number, now)

    def _start(self, number: int, now: float) -> None:
        result = self.engines[number].step()
        if result is None:
            self._busy.discard(number)
        else:
            self._busy.add(number)
            heapq.heappush(self._steps, (now + result.duration_ms, number, result))

    def _record(self, output: StepOutput, elapsed: float) -> None:
        self._output_tokens += len(output.token_ids)
        if output.cached_tokens is not None:
            self._ttfts[output.request_id] = elapsed
            self._cached_tokens += output.cached_tokens
        if output.finish_reason is not None:
            self._latencies[output.request_id] = elapsed

    def _figures(self) -> Figures:
        ttfts = sorted(self._ttfts.values())
        decoding = sum(self._latencies.values()) - sum(ttfts)
        return Figures(
            reuse=self._cached_tokens / self._prompt_tokens,
            ttft_mean_ms=fmean(ttfts),
            ttft_p99_ms=ttfts[int(0.99 * len(ttfts))],
            itl_mean_ms=decoding / (self._output_tokens - len(ttfts)),
            latency_mean_ms=fmean(self._latencies.values()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trace", type=Path, help="the Mooncake conversation trace")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 4], help="default: 8 4")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    lines = [machine("msgspec", "sortedcontainers", "xxhash"), ""]
    for running, prompt_blocks in ((1, 1), (32, 1), (256, 1), (256, 16)):
        name = f"decode step, {running} × {prompt_blocks * TRACE_BLOCK_TOKENS} tokens"
        aim = "aim ≤ 1,000" if running == 256 else ""
        lines.append(row(name, decode_us(running, prompt_blocks), "µs", aim))
    submits, steps = prefill_us()
    lines += [row("submit, 12k tokens", submits, "µs"), row("prefill, 12k tokens", steps, "µs")]
    if arguments.trace is not None:
        with arguments.trace.open("rb") as file:
            trace = list(read_trace(file))
        for workers in arguments.workers:
            start_ns = perf_counter_ns()
            figures = Replay(workers).run(trace)
            taken_s = (perf_counter_ns() - start_ns) / 1e9
            lines += ["", f"{len(trace)} requests, {workers} workers in turn ({taken_s:.0f} s)"]
            peer = PEER.get(workers)
            for name, value in figures._asdict().items():
                line = f"  {name:<16} {value:>12,.4f}"
                if peer is not None:
                    theirs = getattr(peer, name)
                    line += f"   peer {theirs:>10,.4f}   {value / theirs - 1:+.1%}"
                lines.append(line)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
