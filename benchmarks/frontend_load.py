"""The client side of `bench_frontend`: a process of its own, told by JSON lines what to send.

Reads one `Job` a line from stdin and answers each with one `Done` on stdout, when all its requests
are answered. Requests are chat completions; every prompt of a job is new to every cache.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator

import aiohttp
import msgspec
import uvloop
from msgspec import Raw, Struct

from simulations.prompts import PromptMaker, Word
from simulations.trace import TRACE_BLOCK_TOKENS


class Job(Struct, frozen=True, kw_only=True):
    """What to send: `requests` in all, over `connections` that each send the next when answered."""

    url: str
    model: str
    requests: int
    connections: int
    max_tokens: int
    stream: bool = False
    prompt_blocks: int = 0
    """512-token blocks of the prompt; 0: one short sentence."""
    words: list[tuple[str, int]] = []


class Done(Struct, frozen=True, kw_only=True):
    """What came back."""

    seconds: float
    prompt_tokens: int
    output_tokens: int


class _Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class _Answer(Struct, frozen=True):
    usage: _Usage


class Load:
    """Runs jobs on one session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._hash_ids = itertools.count()

    async def run(self, job: Job) -> Done:
        """Raises aiohttp.ClientError, or ValueError for an answer that is none."""
        prompts = PromptMaker([Word(*word) for word in job.words], "text", seed=time.time_ns())
        self._prompt_tokens = self._output_tokens = 0
        left = iter(range(job.requests))
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(job.connections):
                tasks.create_task(self._keep_sending(job, prompts, left))
        return Done(
            seconds=time.perf_counter() - started_s,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
        )

    async def _keep_sending(self, job: Job, prompts: PromptMaker, left: Iterator[int]) -> None:
        for _ in left:
            body = self._body(job, prompts)
            headers = {"Content-Type": "application/json"}
            url = f"{job.url}/v1/chat/completions"
            async with self._session.post(url, data=body, headers=headers) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {await response.text()}")
                answer = await self._read_stream(response) if job.stream else await response.read()
            usage = msgspec.json.decode(answer, type=_Answer).usage
            self._prompt_tokens += usage.prompt_tokens
            self._output_tokens += usage.completion_tokens

    async def _read_stream(self, response: aiohttp.ClientResponse) -> bytes:
        """The JSON of the frame before `[DONE]`, which carries the usage."""
        tail = b""
        async for data in response.content.iter_any():
            tail = (tail + data)[-4096:]
        *_, usage, done, rest = tail.split(b"\n\n")
        if done != b"data: [DONE]" or rest:
            raise ValueError(f"the stream ended with {tail[-200:]!r}")
        return usage.removeprefix(b"data: ")

    def _body(self, job: Job, prompts: PromptMaker) -> bytes:
        content = Raw(b'"What is dead reckoning?"')
        if job.prompt_blocks:
            hash_ids = list(itertools.islice(self._hash_ids, job.prompt_blocks))
            content = Raw(prompts.prompt_json(hash_ids, TRACE_BLOCK_TOKENS * job.prompt_blocks))
        request = {
            "model": job.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": job.max_tokens,
            "ignore_eos": True,
        }
        if job.stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(request)


async def main() -> None:
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        load = Load(session)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            done = await load.run(msgspec.json.decode(line, type=Job))
            print(msgspec.json.encode(done).decode(), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
