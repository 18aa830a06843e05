"""One rank's engine in real time: requests in, steps at their pace, tokens and KV events out.

The engine says how long a step takes, and what it has brought about is told when that time is over.
Steps follow a schedule, not one another: what a timer oversleeps, the next step sleeps less.
"""

import asyncio
from collections.abc import Callable

from workers.engine import MockEngine
from workers.kv_cache import KvEvent
from workers.protocol import EngineRequest, Output
from workers.tcp_server import Connection

LAG_MAX_S = 0.1
"""How far a loaded machine may fall behind the schedule before the schedule waits for it."""


class RankRunner:
    """Runs `engine` and knows whom its requests belong to."""

    def __init__(self, engine: MockEngine, on_kv_events: Callable[[list[KvEvent]], None]) -> None:
        self.engine = engine
        self._on_kv_events = on_kv_events
        self._streams: dict[str, tuple[Connection, int]] = {}
        """By the id that the engine knows a request by. A frontend's own ids may repeat, as when a
        request comes again before its first attempt is cancelled."""
        self._work = asyncio.Event()
        self.idle = asyncio.Event()
        """Set while there is no request."""
        self.idle.set()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def streams_of(self, connection: Connection) -> list[int]:
        """The connection's streams that are worked on or wait here."""
        return [number for owner, number in self._streams.values() if owner is connection]

    def generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        """Take a request. Raises RequestRefused."""
        request.request_id = _key(connection, stream)
        self.engine.submit(request)
        self._streams[request.request_id] = connection, stream
        self._work.set()
        self.idle.clear()

    def cancel(self, connection: Connection, stream: int) -> None:
        """Drop a request, if it is here, and free what it holds."""
        key = _key(connection, stream)
        if self._streams.pop(key, None) is not None:
            self.engine.cancel(key)
            self._note_idle()

    def end_streams(self, code: str, message: str) -> None:
        """End all requests with an error."""
        for connection, stream in list(self._streams.values()):
            self.cancel(connection, stream)
            connection.send([Output(stream, [], error=(code, message))])

    async def run(self) -> None:
        """Step while there is work, until cancelled."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            result = self.engine.step()
            if result is None:
                self._work.clear()
                await self._work.wait()
                due_s = loop.time()
                continue
            due_s = max(due_s, loop.time() - LAG_MAX_S) + result.duration_ms / 1000
            # Also a step that is due already gives the connections their turn.
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self._on_kv_events(result.kv_events)
            answers: dict[Connection, list[Output]] = {}
            for output in result.outputs:
                owner = self._streams.get(output.request_id)
                if owner is None:  # cancelled during the step
                    continue
                connection, stream = owner
                answers.setdefault(connection, []).append(
                    Output(stream, output.token_ids, output.finish_reason, output.cached_tokens)
                )
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
            for connection, outputs in answers.items():
                connection.send(outputs)
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams:
            self.idle.set()


def _key(connection: Connection, stream: int) -> str:
    return f"{connection.number}.{stream}"
