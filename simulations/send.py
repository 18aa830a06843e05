"""Sends a trace's requests to running frontends, at their recorded times, and listens.

Open loop: a request leaves when its time has come, whether or not earlier ones are answered; only
the bound on open requests holds it back, and the report's send lag shows when it did. Bodies are
made ahead in idle moments, for a burst must leave as a burst. Each answer is read as it comes by
`simulations.sse`; whatever goes wrong with one request becomes its outcome and stops nothing.
"""

import asyncio
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

import aiohttp
import msgspec
from msgspec import Raw

from eventstore.subjects import hex_id
from simulations.prompts import PromptMaker
from simulations.report import Outcome, Report, summarize
from simulations.sse import CompletionStream, error_code
from simulations.trace import TraceRequest

AHEAD_MAX = 64
"""Bodies made ahead: more than the largest burst of the published traces, at 60 KB each."""

PROBE_TIMEOUT_S = 10.0
"""How long a frontend may take to list its models before the run starts."""

_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}


class SendError(Exception):
    """The run can't begin; the message says why, `try_this` what may help."""

    try_this = "start a deployment (python -m reckon up), or name another (--url)"


class Unreachable(SendError):
    def __init__(self, url: str, why: str) -> None:
        super().__init__(url, why)
        self.url = url
        self.why = why

    def __str__(self) -> str:
        return f"{self.url} can't be asked for its models: {self.why}"


class NoModel(SendError):
    try_this = "start a worker, or name another model (--model)"

    def __init__(self, url: str, wanted: str | None, served: list[str]) -> None:
        super().__init__(url, wanted, served)
        self.url = url
        self.wanted = wanted
        self.served = served

    def __str__(self) -> str:
        if not self.served:
            return f"{self.url} serves no model yet"
        return f"{self.url} does not serve {self.wanted}; it serves {', '.join(self.served)}"


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


async def find_model(
    session: aiohttp.ClientSession, urls: Sequence[str], wanted: str | None
) -> str:
    """The model to ask for: `wanted`, or else the first that the first URL lists.

    Every URL must serve it. Raises Unreachable, NoModel.
    """
    for url in urls:
        served = await _models(session, url)
        wanted = wanted or next(iter(served), None)
        if wanted is None or wanted not in served:
            raise NoModel(url, wanted, served)
    assert wanted is not None, "the settings ask for at least one URL"
    return wanted


async def _models(session: aiohttp.ClientSession, url: str) -> list[str]:
    try:
        async with session.get(
            f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        ) as response:
            body = await response.read()
            if response.status != 200:
                raise Unreachable(url, f"status {response.status}")
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except TimeoutError as error:
        raise Unreachable(url, f"no answer within {PROBE_TIMEOUT_S:g} s") from error
    except aiohttp.ClientConnectorError as error:
        # asyncio words a refused connection as "Connect call failed"; a name that resolves to
        # nothing has no positive number, but a text of its own.
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror
        raise Unreachable(url, why or str(error)) from error
    except (aiohttp.ClientError, ValueError) as error:
        raise Unreachable(url, str(error)) from error


class Sender:
    """One run. `report` may be asked for at any time, also after `run` was cancelled.

    urls: without a trailing slash; request i of the run goes to number i modulo their count.
    speedup: recorded times are divided by it. inflight_max: open requests at most; at the bound the
    next one waits. on_outcome: called once per finished request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        requests: Sequence[TraceRequest],
        prompts: PromptMaker,
        *,
        urls: Sequence[str],
        model: str,
        speedup: float,
        inflight_max: int,
        timeout_s: float,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._session = session
        self._requests = requests
        self._prompts = prompts
        self._urls = urls
        self._model = model
        self._speedup = speedup
        self._inflight_max = inflight_max
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._on_outcome = on_outcome
        self._outcomes: list[Outcome] = []
        self._frame_gaps_s = array("d")
        self._started_s = self._ended_s = time.perf_counter()

    def report(self) -> Report:
        """What the run has come to so far."""
        return summarize(
            self._outcomes,
            self._frame_gaps_s,
            elapsed_s=self._ended_s - self._started_s,
            unfinished=len(self._requests) - len(self._outcomes),
        )

    async def run(self) -> None:
        """Send all requests and wait for their answers. Cancelling it gives up the open ones."""
        slots = asyncio.Semaphore(self._inflight_max)
        bodies = map(self._body, self._requests)
        ahead: deque[bytes] = deque()
        first_ms = self._requests[0].timestamp_ms if self._requests else 0
        self._started_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, request in enumerate(self._requests):
                    due_s = (
                        self._started_s + (request.timestamp_ms - first_ms) / 1e3 / self._speedup
                    )
                    while time.perf_counter() < due_s and len(ahead) < AHEAD_MAX:
                        if (body := next(bodies, None)) is None:
                            break
                        ahead.append(body)
                        await asyncio.sleep(0)
                    body = ahead.popleft() if ahead else next(bodies)
                    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    await slots.acquire()
                    url = self._urls[number % len(self._urls)]
                    task = tasks.create_task(self._send(url, request, body, due_s))
                    task.add_done_callback(lambda _: slots.release())
        finally:
            self._ended_s = time.perf_counter()

    def _body(self, request: TraceRequest) -> bytes:
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": Raw(self._prompts.prompt_json(request.hash_ids, request.input_length)),
                "max_tokens": request.output_length,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "nvext": {"extra_fields": ["worker_id", "predicted_cached_tokens"]},
            }
        )

    async def _send(self, url: str, request: TraceRequest, body: bytes, due_s: float) -> None:
        sent_s = time.perf_counter()
        stream = CompletionStream(self._frame_gaps_s)
        failure = None
        try:
            failure = await self._receive(url, body, stream)
        except TimeoutError:
            failure = "timeout"
        except aiohttp.ClientConnectorError:
            failure = "cannot_connect"
        except aiohttp.ClientError:
            failure = "connection_lost"
        except ValueError:
            failure = "unreadable"
        end = stream.end()
        first_s, last_s = end.first_token_s, end.last_token_s
        outcome = Outcome(
            url=url,
            send_lag_s=max(0.0, sent_s - due_s),
            ttft_s=None if first_s is None else first_s - sent_s,
            latency_s=None if last_s is None else last_s - sent_s,
            output_tokens=end.output_tokens,
            prompt_tokens=request.input_length if end.prompt_tokens is None else end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            predicted_cached_tokens=end.predicted_cached_tokens,
            worker=None if end.worker_id is None else f"{hex_id(end.worker_id)}.{end.dp_rank}",
            error=failure or end.error,
        )
        self._outcomes.append(outcome)
        self._on_outcome(outcome)

    async def _receive(self, url: str, body: bytes, stream: CompletionStream) -> str | None:
        """Feed the answer to `stream`; what failed, if the server answered with an error."""
        async with self._session.post(
            f"{url}/v1/completions", data=body, headers=_HEADERS, timeout=self._timeout
        ) as response:
            if response.status != 200:
                code = error_code(await response.read())
                return f"http_{response.status}" + (f"_{code}" if code else "")
            async for data in response.content.iter_any():
                stream.feed(data, time.perf_counter())
        return None
