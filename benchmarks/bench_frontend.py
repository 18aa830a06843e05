"""What does a request, a streamed token, a thousand prompt tokens cost the frontend?

    python -m benchmarks.bench_frontend [--rounds 5] [--out FILE]

CPU time of one `python -m frontend --router-mode kv`, log on, divided by the work done; the load
comes from a second process, the tokens from a third that answers by script (`fake_worker`). A
handler of bare aiohttp, measured alike, shows what part of the price is not ours. About 70 s.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from tokenizers import Tokenizer

from benchmarks import processes
from benchmarks.fake_worker import MODEL_NAME
from benchmarks.frontend_load import Done, Job
from benchmarks.processes import row, running
from eventstore.server import EmbeddedServer
from simulations.prompts import Word, find_words
from simulations.settings import SHIPPED_MODEL
from simulations.trace import TRACE_BLOCK_TOKENS

READY_S = 30.0
NAMESPACE = "bench"
ROUNDS = 5
UNARY = {"requests": 4000, "connections": 8, "max_tokens": 8}
STREAM = {"requests": 32, "connections": 32, "max_tokens": 600, "stream": True}
PROMPT = {"requests": 100, "connections": 4, "max_tokens": 1, "prompt_blocks": 8}
PROMPT_TOKENS = TRACE_BLOCK_TOKENS * PROMPT["prompt_blocks"]


class Round(Struct, frozen=True):
    """One round of all questions. CPU time in µs per piece of work."""

    unary: float
    token: float
    wake_ups: float
    """Per streamed token; 1: each was read on its own."""
    prompt_1k: float


class Load:
    """The load process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, job: Job) -> Done:
        """Blocks until all answers are there. Raises RuntimeError if the load process fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(job).decode() + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load process ended; see its log")
        return msgspec.json.decode(line, type=Done)


class Server(Struct, frozen=True):
    """One that is measured."""

    url: str
    pid: int


def measure(load: Load, server: Server, words: Sequence[Word]) -> Round:
    """Ask all questions once."""

    def cost(options: dict[str, int]) -> tuple[float, Done]:
        fixed = {"url": server.url, "model": MODEL_NAME, "words": words}
        before_s = processes.cpu_s(server.pid)
        done = load.run(msgspec.convert(fixed | options, Job))
        return 1e6 * (processes.cpu_s(server.pid) - before_s), done

    unary_us, _ = cost(UNARY)
    woken = processes.wake_ups(server.pid)
    stream_us, streamed = cost(STREAM)
    woken = processes.wake_ups(server.pid) - woken
    prompt_us, _ = cost(PROMPT)
    return Round(
        unary=unary_us / UNARY["requests"],
        token=stream_us / streamed.output_tokens,
        wake_ups=woken / streamed.output_tokens,
        prompt_1k=1e3 * prompt_us / (PROMPT["requests"] * PROMPT_TOKENS),
    )


@contextlib.contextmanager
def servers(nats_url: str, logs: Path) -> Iterator[tuple[Server, Server]]:
    """A frontend in kv mode and the yardstick, before one scripted worker."""
    port, bare_port, worker_port = (processes.free_port() for _ in range(3))
    worker = ["benchmarks.fake_worker", nats_url, NAMESPACE, str(worker_port)]
    ours = ["frontend", "--router-mode", "kv", "--namespace", NAMESPACE, "--nats-url", nats_url]
    ours += ["--http-host", "127.0.0.1", "--http-port", str(port)]
    bare = ["benchmarks.bare_server", str(bare_port), str(worker_port)]
    with contextlib.ExitStack() as stack:
        started = []
        for argv in (worker, ours, bare):
            command = [sys.executable, "-m", *argv]
            started.append(stack.enter_context(running(command, log=logs / f"{argv[0]}.log")))
        found = [
            Server(f"http://127.0.0.1:{port}", started[1].pid),
            Server(f"http://127.0.0.1:{bare_port}", started[2].pid),
        ]
        for process, server in zip(started[1:], found, strict=True):
            processes.wait_for_text(process, f"{server.url}/v1/models", MODEL_NAME, READY_S)
        yield found[0], found[1]


async def run(rounds: int, logs: Path) -> list[str]:
    """The lines of the result."""
    words = find_words(Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json")))
    ours: list[Round] = []
    bare: list[Round] = []
    command = [sys.executable, "-m", "benchmarks.frontend_load"]
    async with EmbeddedServer(logs / "nats") as nats:
        with (
            servers(nats.url, logs) as (frontend, yardstick),
            running(command, log=logs / "load.log", pipes=True) as process,
        ):
            load = Load(process)
            for _ in range(rounds + 1):
                ours.append(await asyncio.to_thread(measure, load, frontend, words))
                bare.append(await asyncio.to_thread(measure, load, yardstick, words))
    # The first round warms up.
    return report(ours[1:], bare[1:])


def report(ours: Sequence[Round], bare: Sequence[Round]) -> list[str]:
    tick_us = processes.cpu_tick_us()
    return [
        processes.machine("aiohttp", "uvloop", "nats-py"),
        f"{len(ours)} rounds; median, lowest to highest of CPU µs, which the system counts in "
        f"steps: {tick_us / UNARY['requests']:.1f} a request, "
        f"{tick_us / (STREAM['requests'] * STREAM['max_tokens']):.1f} a token, "
        f"{1e3 * tick_us / (PROMPT['requests'] * PROMPT_TOKENS):.0f} a thousand prompt tokens",
        "",
        f"small unary request ({UNARY['connections']} connections, {UNARY['max_tokens']} tokens)",
        *rows("unary", ours, bare, "aim ≤ 400"),
        f"streamed token ({STREAM['connections']} streams, a token each 6 ms)",
        *rows("token", ours, bare, "aim ≤ 30"),
        f"1,000 prompt tokens ({PROMPT_TOKENS:,} a request, all new)",
        *rows("prompt_1k", ours, bare, "aim ≤ 2,000"),
        "wake-ups per streamed token (1: each was read on its own)",
        *rows("wake_ups", ours, bare, ""),
    ]


def rows(question: str, ours: Sequence[Round], bare: Sequence[Round], aim: str) -> list[str]:
    return [
        row("  frontend, kv mode, log on", [getattr(one, question) for one in ours], "", aim),
        row("  bare aiohttp handler", [getattr(one, question) for one in bare], ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = "\n".join(asyncio.run(run(options.rounds, Path(directory)))) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
