"""A worker that costs next to nothing: it answers by script instead of running an engine.

    python -m benchmarks.fake_worker NATS_URL NAMESPACE PORT

It registers as a real worker does, in the log and in discovery, with the mock worker's model. A
request for up to `AT_ONCE_MAX` tokens is answered at once, in one frame. A longer one gets a token
every `TOKEN_S`, each in a frame of its own, with those of several streams evenly spread in between:
every token wakes the frontend on its own, as the tokens of many engines would. It has no KV cache.
"""

import asyncio
import heapq
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from queue import SimpleQueue

import uvloop
from msgspec.structs import replace
from tokenizers import Tokenizer

from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from simulations.prompts import find_words
from simulations.settings import SHIPPED_MODEL
from workers.card import Instance, ModelCard
from workers.discovery_nats import NatsDiscovery
from workers.models import ModelStore, read_model
from workers.protocol import Announce, EngineRequest, Output, Pin, Refused
from workers.registry import SHUTDOWN, record_registered, record_removed
from workers.tcp_server import Connection, WorkerServer

MODEL_NAME = "scripted"
AT_ONCE_MAX = 16
TOKEN_S = 0.006
SPREAD_OVER = 32
"""Streams that share an interval of TOKEN_S."""

Emit = Callable[[Connection, Output], object]


class Pacer(threading.Thread):
    """Hands out the tokens of paced streams, each at its time.

    A thread, because an event loop's timers come in whole milliseconds: five tokens of 32 streams
    would fall due together, and the frontend would read them in one go.
    """

    def __init__(self, emit: Emit, token_id: int) -> None:
        super().__init__(daemon=True)
        self._emit = emit
        self._token_id = token_id
        self._new: SimpleQueue[tuple[Connection, int, int]] = SimpleQueue()

    def add(self, connection: Connection, stream: int, tokens: int) -> None:
        self._new.put((connection, stream, tokens))

    def run(self) -> None:
        numbers = count()
        # (time of the next token, tie-break, connection, stream, tokens left)
        due: list[tuple[float, int, Connection, int, int]] = []
        while True:
            while not due or not self._new.empty():
                connection, stream, left = self._new.get()
                number = next(numbers)
                offset_s = TOKEN_S * (number % SPREAD_OVER) / SPREAD_OVER
                heapq.heappush(due, (time.monotonic() + offset_s, number, connection, stream, left))
            due_s, number, connection, stream, left = due[0]
            time.sleep(max(0.0, due_s - time.monotonic()))
            finish_reason = "length" if left == 1 else None
            self._emit(connection, Output(stream, [self._token_id], finish_reason))
            if left > 1:
                heapq.heapreplace(due, (due_s + TOKEN_S, number, connection, stream, left - 1))
            else:
                heapq.heappop(due)


class Script:
    """The request plane's handler. A cancelled stream's tokens go on and are dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, token_id: int) -> None:
        self._token_id = token_id
        self._pacer = Pacer(
            lambda connection, output: loop.call_soon_threadsafe(connection.send, [output]),
            token_id,
        )
        self._pacer.start()

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        tokens = request.stop_conditions.max_tokens or 1
        if tokens > AT_ONCE_MAX:
            self._pacer.add(connection, stream, tokens)
            return
        connection.send([Output(stream, [self._token_id] * tokens, "length", cached_tokens=0)])

    def on_cancel(self, connection: Connection, stream: int) -> None:
        pass

    def on_announce(self, message: Announce) -> None: ...

    def on_pin(self, message: Pin) -> None: ...

    def on_refused(self, message: Refused) -> None: ...

    def running(self, connection: Connection) -> list[int]:
        return sorted(connection.streams)

    def on_disconnect(self, connection: Connection, streams: frozenset[int]) -> None:
        pass


@asynccontextmanager
async def registered(nats_url: str, namespace: str, address: str) -> AsyncIterator[None]:
    """A worker at `address`, in the log and in discovery while the block runs."""
    connection = await Nats.connect([nats_url], name="fake worker")
    log = await JetStreamLog.open(connection, namespace)
    discovery = NatsDiscovery(connection, namespace)
    instance = Instance(
        worker_id=int.from_bytes(os.urandom(8), "big"),
        namespace=namespace,
        component="backend",
        endpoint="generate",
        address=address,
        card=ModelCard(
            name=MODEL_NAME,
            block_size=64,
            context_length=131_072,
            files=await ModelStore(connection, namespace).upload(read_model(SHIPPED_MODEL)),
            total_kv_blocks=16_384,
            max_num_seqs=256,
            max_num_batched_tokens=8_192,
        ),
    )
    instance = replace(instance, registered_seq=await record_registered(log, instance))
    lease = await discovery.register(instance, on_lost=lambda cause: sys.exit(cause))
    try:
        yield
    finally:
        await lease.release()
        await record_removed(
            log, namespace, instance.worker_id, SHUTDOWN, instance.registered_seq, within_s=2
        )
        await discovery.close()
        await log.close()
        await connection.close()


async def main() -> None:
    nats_url, namespace, port = sys.argv[1:]
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    word = find_words(Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json")))[0]
    server = WorkerServer(Script(loop, word.token_id))
    await server.start("127.0.0.1", int(port))
    async with registered(nats_url, namespace, f"127.0.0.1:{port}"):
        await stop.wait()
    await server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
