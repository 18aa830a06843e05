"""One rank's engine in real time: requests in, steps at their pace, tokens and KV events out.

The engine says how long a step takes, and what it has brought about is told when that time is over.
Steps follow a schedule, not one another: what a timer oversleeps, the next step sleeps less.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from eventstore.events import PrefixPinned
from eventstore.tasks import end
from workers.bootstrap import WAIT_S, BootstrapServer, fetch
from workers.card import AGGREGATED, DECODE, PREFILL
from workers.engine import MockEngine, RequestRefused
from workers.errors import PrefillFailed
from workers.kv_cache import KvEvent
from workers.protocol import Bootstrap, EngineRequest, Output
from workers.tcp_server import Connection

LAG_MAX_S = 0.1
"""How far a loaded machine may fall behind the schedule before the schedule waits for it."""
TICK_S = 1e-6
"""Added to the end of a transfer, so that no rounding wakes us just before it."""


class _Stream:
    """Whom a request belongs to, and what its prompt is handed over as."""

    __slots__ = ("connection", "isl", "number", "room")

    def __init__(self, connection: Connection, number: int, request: EngineRequest) -> None:
        self.connection = connection
        self.number = number
        self.isl = len(request.token_ids)
        self.room = None if request.bootstrap is None else request.bootstrap.room


class RankRunner:
    """Runs `engine` and knows whom its requests belong to."""

    def __init__(
        self,
        engine: MockEngine,
        on_kv_events: Callable[[list[KvEvent]], None],
        worker_id: Callable[[], int],
        *,
        role: str = AGGREGATED,
        bootstrap: BootstrapServer | None = None,
        bootstrap_wait_s: float = WAIT_S,
    ) -> None:
        """worker_id: the worker's present one. bootstrap: where a prefill worker hands over.
        bootstrap_wait_s: how long a decode worker waits for a prompt there.
        """
        self.engine = engine
        self._on_kv_events = on_kv_events
        self._worker_id = worker_id
        self._role = role
        self._bootstrap = bootstrap
        self._bootstrap_wait_s = bootstrap_wait_s
        self._streams: dict[str, _Stream] = {}
        """By the id that the engine knows a request by. A frontend's own ids may repeat, as when a
        request comes again before its first attempt is cancelled."""
        self._fetches: dict[asyncio.Task[None], str] = {}
        """Those whose prompt is awaited, with the id of their request."""
        self._pinned: list[KvEvent] = []
        """Pins that are to be told after the step that is under way."""
        self._work = asyncio.Event()
        self.idle = asyncio.Event()
        """Set while there is no request."""
        self.idle.set()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def streams_of(self, connection: Connection) -> list[int]:
        """The connection's streams that are worked on or wait here."""
        streams = self._streams.values()
        return [stream.number for stream in streams if stream.connection is connection]

    def generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        """Take a request. Raises RequestRefused."""
        key = request.request_id = _key(connection, stream)
        if self._role == DECODE and request.disaggregated_params is not None:
            self._submit(request, is_remote=True)
        elif self._role == DECODE and request.bootstrap is not None:
            self._await_prompt(key, request, request.bootstrap)
        else:
            self._submit(request, is_remote=False)
        self._streams[key] = _Stream(connection, stream, request)
        self.idle.clear()

    def cancel(self, connection: Connection, stream: int) -> None:
        """Drop a request, if it is here, and free what it holds."""
        key = _key(connection, stream)
        dropped = self._streams.pop(key, None)
        if dropped is None:
            return
        self.engine.cancel(key)
        for task in [task for task, awaiting in self._fetches.items() if awaiting == key]:
            task.cancel()
        if self._bootstrap is not None and dropped.room is not None:
            self._bootstrap.fail(dropped.room, "its prefill was cancelled")
        self._note_idle()

    def end_streams(self, code: str, message: str) -> None:
        """End all requests with an error."""
        for stream in list(self._streams.values()):
            self.cancel(stream.connection, stream.number)
            stream.connection.send([Output(stream.number, [], error=(code, message))])

    def pin(self, token_ids: Sequence[int], ttl_s: int) -> int:
        """Keep what is cached of a prompt, and tell the log; how many blocks that are.

        Raises OverflowError if a token id is not u32.
        """
        now_s = asyncio.get_running_loop().time()
        hashes = self.engine.pin(token_ids, ttl_s * 1000, now_s * 1000)
        if hashes:
            self._pinned.append(PrefixPinned(0, self.engine.dp_rank, hashes, ttl_s))
            self._work.set()
        return len(hashes)

    def pinned(self) -> list[PrefixPinned]:
        """All that is pinned now."""
        return self.engine.pinned(asyncio.get_running_loop().time() * 1000)

    async def run(self) -> None:
        """Step while there is work, until cancelled."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            start_s = max(due_s, loop.time() - LAG_MAX_S)
            result = self.engine.step(start_s * 1000)
            if result is None:
                self._tell([])
                await self._wait_for_work()
                due_s = loop.time()
                continue
            due_s = start_s + result.duration_ms / 1000
            # Also a step that is due already gives the connections their turn.
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self._tell(result.kv_events)
            answers: dict[Connection, list[Output]] = {}
            for output in result.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:  # cancelled during the step
                    continue
                handed_over = None
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                    handed_over = self._hand_over(stream)
                answers.setdefault(stream.connection, []).append(
                    Output(
                        stream.number,
                        output.token_ids,
                        output.finish_reason,
                        output.cached_tokens,
                        disaggregated_params=handed_over,
                        logprobs=output.logprobs,
                    )
                )
            for connection, outputs in answers.items():
                connection.send(outputs)
            self._note_idle()

    async def close(self) -> None:
        """Wait for nobody's prompt any more."""
        for task in list(self._fetches):
            await end(task)

    def _submit(self, request: EngineRequest, *, is_remote: bool) -> None:
        self.engine.submit(request, priority=request.priority, is_remote=is_remote)
        self._work.set()

    def _await_prompt(self, key: str, request: EngineRequest, bootstrap: Bootstrap) -> None:
        """Submit a request once its prompt is handed over."""
        if len(self._fetches) >= self.engine.config.max_num_waiting:
            awaited = len(self._fetches)
            raise RequestRefused("overloaded", f"{awaited} requests wait for their prompt already")

        async def submit_later() -> None:
            try:
                await fetch(bootstrap, self._bootstrap_wait_s)
                self._submit(request, is_remote=True)
            except PrefillFailed as error:
                self._end_stream(key, "prefill_failed", str(error))
            except RequestRefused as refusal:
                self._end_stream(key, refusal.code, refusal.message)

        task = asyncio.create_task(submit_later(), name=f"fetch {key}")
        self._fetches[task] = key
        task.add_done_callback(self._fetches.pop)

    def _end_stream(self, key: str, code: str, message: str) -> None:
        stream = self._streams.pop(key, None)
        if stream is not None:
            stream.connection.send([Output(stream.number, [], error=(code, message))])
            self._note_idle()

    def _hand_over(self, stream: _Stream) -> dict[str, Any] | None:
        """What a prefill worker says of a prompt that is computed; also to who waits for it."""
        if self._role != PREFILL:
            return None
        params = {
            "worker_id": self._worker_id(),
            "room": stream.room,
            "blocks": -(-stream.isl // self.engine.config.block_size),
            "tokens": stream.isl,
        }
        if self._bootstrap is not None and stream.room is not None:
            self._bootstrap.hand_over(stream.room, params)
        return params

    async def _wait_for_work(self) -> None:
        """Return when there may be something to step: a request, or a transfer that has ended."""
        due_ms = self.engine.next_due_ms
        self._work.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(None if due_ms is None else due_ms / 1000 + TICK_S):
                await self._work.wait()

    def _tell(self, kv_events: list[KvEvent]) -> None:
        # A pin may be of blocks that the step under way has stored: it is told after them.
        pinned, self._pinned = self._pinned, []
        if kv_events or pinned:
            self._on_kv_events([*kv_events, *pinned])

    def _note_idle(self) -> None:
        if not self._streams:
            self.idle.set()


def _key(connection: Connection, stream: int) -> str:
    return f"{connection.number}.{stream}"
