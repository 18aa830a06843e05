"""Wherever a request is cut, and however often: its tokens are those of an undisturbed run."""

import asyncio
from collections.abc import Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.integration.harness import TOKENIZER, ScriptedWorker, card, frontend
from tests.integration.mock_workers import ENGINE, Answer, complete
from workers.engine import MockEngine
from workers.protocol import EngineRequest
from workers.tcp_server import Connection

PROMPT = list(range(700, 740))
MAX_TOKENS = 20
MIGRATIONS_MAX = 4

cuts = st.lists(st.integers(0, 9), max_size=MIGRATIONS_MAX)
"""How many tokens come from each worker before it dies; the one after the last lives."""


class DyingWorker(ScriptedWorker):
    """A mock engine that sends a token at a time. cuts: shared by all; each attempt takes one."""

    def __init__(self, worker_id: int, cuts: Iterator[int]) -> None:
        super().__init__(worker_id)
        self._cuts = cuts

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        super().on_generate(connection, stream, request)
        left = next(self._cuts, 2 * MAX_TOKENS)
        engine = MockEngine(ENGINE, seed=7, worker_id=0)
        engine.submit(request)
        while left and (step := engine.step()) is not None:
            for output in step.outputs:
                left -= len(output.token_ids)
                finish = output.finish_reason
                if not left and finish == "length":
                    finish = None  # its last word is lost, too
                self.streams[-1].send(ids=output.token_ids, finish=finish)
        if not left:
            connection.close()  # behind what was sent


async def answered(cut_after: list[int], seed: int, *, stream: bool) -> tuple[Answer, int]:
    """The answer, and by how many workers."""
    async with frontend(migration_limit=MIGRATIONS_MAX, router_track_output_blocks=True) as here:
        left = iter(cut_after)
        for index in range(MIGRATIONS_MAX + 1):
            worker = DyingWorker(1 + index, left)
            here.workers.append(worker)
            await worker.start(here.log, here.discovery, "test", card())
        await here.until_served(aggregated=MIGRATIONS_MAX + 1)
        answer = await complete(here, PROMPT, max_tokens=MAX_TOKENS, seed=seed, stream=stream)
        await here.assert_nothing_left()
        return answer, sum(len(worker.streams) for worker in here.workers)


def undisturbed(seed: int) -> list[int]:
    """What one engine says."""
    engine = MockEngine(ENGINE, seed=7, worker_id=0)
    request = EngineRequest(request_id="r", model="m", token_ids=PROMPT)
    request.stop_conditions.max_tokens = MAX_TOKENS
    request.sampling_options.seed = seed
    request.eos_token_ids = card().eos_token_ids
    engine.submit(request)
    tokens: list[int] = []
    while (step := engine.step()) is not None:
        for output in step.outputs:
            tokens += output.token_ids
    return tokens


@settings(max_examples=25, deadline=None)
@given(cuts, st.integers(0, 2**32), st.booleans())
@example([0, 1, 9, 9], 1, True)
@example([MAX_TOKENS], 2, False)
def test_the_parts_are_the_whole(cut_after: list[int], seed: int, stream: bool) -> None:
    tokens = undisturbed(seed)
    answer, workers = asyncio.run(answered(cut_after, seed, stream=stream))
    assert answer.status == 200
    assert answer.text == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert answer.usage["completion_tokens"] == len(tokens)
    assert answer.usage["prompt_tokens"] == len(PROMPT)
    # One more for each cut that came before the end; where only the end itself was lost, none.
    used, sent = 1, 0
    for cut in cut_after:
        sent += cut
        if sent >= len(tokens):
            break
        used += 1
    assert workers == used
