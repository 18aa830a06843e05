"""The mock engine of one rank: continuous batching over a paged KV cache, as a pure step function.

    submit, cancel  →  waiting ─admit→ running (prefill, then decode)  ─step→  tokens, KV events
                           └─admit→ fetching its KV ──┘

A step is planned and counted like a real engine's, and takes the time that `workers.timing` gives
it; the caller sleeps that time or simulates it. In one step every decoding request gets a token.
What is left of the token budget goes to prefill, in arrival order within a priority, cut into
chunks; a request enters if its blocks fit. When a decoding request finds no block, the request
admitted last goes back to wait and is computed again later. No model is run: `workers.sampling`
makes up the tokens.

A request whose prompt another worker has computed (`is_remote`) is not prefilled. It gets its
blocks, then their content is transferred while steps go on, and then it decodes; its first token is
sampled here, from the last token of the prompt, so it is what this engine alone would have said.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from sortedcontainers import SortedKeyList

from eventstore.events import BlockStored, PrefixPinned
from indexer.blocks import prompt_hashes
from workers.engine_config import EngineConfig
from workers.kv_cache import BlockTable, KvCache, KvEvent
from workers.protocol import EngineRequest
from workers.sampling import TokenSource
from workers.sequence import SequenceState, StepOutput

__all__ = ["EngineConfig", "MockEngine", "RequestRefused", "StepOutput", "StepResult"]


class RequestRefused(Exception):
    """The engine does not take a request. `code` is one of those of `workers.protocol.Output`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class StepResult(NamedTuple):
    """What a step has brought about once `duration_ms` have passed."""

    duration_ms: float
    outputs: list[StepOutput]
    kv_events: list[KvEvent]
    prefill_tokens: int
    """Prompt tokens computed, and tokens computed again after a preemption."""
    preempted: int
    """Requests sent back to wait."""


class MockEngine:
    """The engine of one rank. A worker with several ranks has an engine for each, by `dp_rank`.

    Equal arguments and equal calls give equal results. Give all workers of a model one seed: a
    request that migrates then goes on as it would have.
    """

    def __init__(
        self, config: EngineConfig, *, seed: int = 0, worker_id: int, dp_rank: int = 0
    ) -> None:
        self.config = config
        self.dp_rank = dp_rank
        self._timing = config.timing()
        self._source = TokenSource(
            seed=seed, token_ids=config.output_token_ids, length_mean=config.output_length_mean
        )
        self._cache = KvCache(
            num_blocks=config.num_gpu_blocks,
            block_size=config.block_size,
            worker_id=worker_id,
            dp_rank=dp_rank,
            prefix_caching=config.enable_prefix_caching,
            pinned_max=int(config.max_pinned_ratio * config.num_gpu_blocks),
        )
        self._sequences: dict[str, SequenceState] = {}
        """All requests that wait, fetch or run."""
        self._waiting: SortedKeyList[SequenceState] = SortedKeyList(
            key=lambda sequence: (-sequence.priority, sequence.arrival)
        )
        self._running: dict[str, SequenceState] = {}
        """In order of admission, those that fetched in the order of their transfers' ends."""
        self._fetching: dict[str, SequenceState] = {}
        """Those that have their blocks but not yet what is in them."""
        self._prefilling: SequenceState | None = None
        """The running request that a step's budget left in prefill: one at most."""
        self._arrivals = 0
        self._now_ms = 0.0

    @property
    def active_blocks(self) -> int:
        """Blocks in use by requests that run or fetch, shared ones counted once."""
        return self._cache.active_blocks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    @property
    def next_due_ms(self) -> float | None:
        """When the first transfer ends: there may be nothing to step before. None: there is none.

        O(transfers)."""
        return min((one.due_ms for one in self._fetching.values()), default=None)

    def request_ids(self) -> list[str]:
        """All requests that wait, fetch or run, in order of arrival."""
        return list(self._sequences)

    def cache_contents(self) -> list[BlockStored]:
        """The whole visible cache, parents first: what the events of all steps so far add up to."""
        return self._cache.contents()

    def pinned(self, now_ms: float) -> list[PrefixPinned]:
        """What is pinned at `now_ms`, parents first, with the whole seconds that are left to it."""
        self._advance(now_ms)
        return self._cache.pinned()

    def pin(self, token_ids: Sequence[int], ttl_ms: float, now_ms: float) -> list[int]:
        """Keep what is cached of a prompt, from its first block on, for `ttl_ms` from now on.

        Returns the sequence hashes of the blocks that are kept: the leading part for which there
        is room within `max_pinned_ratio`. A hit renews the time of what it hits. A pin only ends
        before its time for a request that nothing but pins keeps from running. Raises
        OverflowError if a token id is not u32. Hashes the prompt: O(prompt tokens).
        """
        tokens = array("I", token_ids)
        self._advance(now_ms)
        return self._cache.pin(
            BlockTable(tokens, prompt_hashes(tokens, self.config.block_size)), ttl_ms
        )

    def submit(self, request: EngineRequest, *, priority: int = 0, is_remote: bool = False) -> None:
        """Take a request; the higher `priority` is admitted first. Its first step is the next one.

        is_remote: another worker has computed the prompt, which is transferred from there. Raises
        RequestRefused: invalid_request if it can never be served here or is here already,
        overloaded if `max_num_waiting` wait. Hashes the prompt: O(prompt tokens).
        """
        end_at = self._end_at(request)
        if len(self._waiting) >= self.config.max_num_waiting:
            raise RequestRefused("overloaded", f"{len(self._waiting)} requests wait already")
        try:
            tokens = array("I", request.token_ids)
            array("I", request.eos_token_ids)
        except OverflowError as error:
            raise RequestRefused("invalid_request", f"a token id is not u32: {error}") from error
        table = BlockTable(tokens, prompt_hashes(tokens, self.config.block_size))
        sequence = SequenceState(
            request,
            table,
            self._source,
            priority=priority,
            arrival=self._arrivals,
            end_at=end_at,
            is_remote=is_remote,
            block_size=self.config.block_size,
        )
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence
        self._waiting.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its blocks; False if it is not here (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if request_id in self._running:
            self._remove(sequence)
            return True
        if self._fetching.pop(request_id, None) is not None:
            self._cache.free(sequence.table)
        else:
            self._waiting.remove(sequence)
        del self._sequences[request_id]
        return True

    def step(self, now_ms: float | None = None) -> StepResult | None:
        """Run one step; None if there is nothing to do, or nothing before `next_due_ms`.

        now_ms: when it begins, on any clock that does not go back. None: when the last one ended.
        Each request gets at most one token; a step without any may only tell, in no time, what was
        evicted for a transfer. O(running requests + blocks allocated and computed).
        """
        self._advance(self._now_ms if now_ms is None else now_ms)
        if not self._sequences:
            return None
        if self._fetching:
            self._land()
        preempted = self._grow_decoding()
        decoding = [one for one in self._running.values() if one is not self._prefilling]
        budget = self.config.max_num_batched_tokens - len(decoding)
        chunks = self._schedule_prefill(budget)
        prefill_tokens = sum(tokens for _, tokens in chunks)
        active_ratio = self._cache.active_blocks / self.config.num_gpu_blocks
        duration_ms = self._timing.step_ms(prefill_tokens, active_ratio if decoding else None)
        self._compute(decoding, chunks)
        sampling = decoding + [one for one, _ in chunks if one is not self._prefilling]
        source, block_size = self._source, self.config.block_size
        outputs = [sequence.sample(source, block_size) for sequence in sampling]
        for output in outputs:
            if output.finish_reason is not None:
                self._remove(self._running[output.request_id])
        kv_events = self._cache.take_events()
        if not (decoding or chunks or kv_events or preempted):
            return None
        self._now_ms += duration_ms
        return StepResult(duration_ms, outputs, kv_events, prefill_tokens, preempted)

    def check(self) -> None:
        """Assert every invariant. For tests: O(all blocks and requests)."""
        holding = self._running | self._fetching
        self._cache.check(sequence.table for sequence in holding.values())
        for sequence in self._waiting:
            assert not sequence.table.shared and not sequence.table.private
            assert not sequence.computed_tokens
        assert len(holding) + len(self._waiting) == len(self._sequences)
        assert len(holding) <= self.config.max_num_seqs
        assert all(one.is_remote and not one.computed_tokens for one in self._fetching.values())
        block_size = self.config.block_size
        for sequence in self._running.values():
            table, computed = sequence.table, sequence.computed_tokens
            assert computed <= (table.shared + table.private) * block_size
            assert len(table.hashes) == len(table.tokens) // block_size
            if sequence is not self._prefilling:
                assert computed == len(table.tokens) - 1
                assert table.shared + table.private == -(-computed // block_size)
        if self._prefilling is not None:
            assert self._prefilling.request_id in self._running

    def _end_at(self, request: EngineRequest) -> int:
        """The number of tokens at which the request must end. Raises RequestRefused."""
        isl, max_tokens = len(request.token_ids), request.stop_conditions.max_tokens
        context_length = self.config.context_length
        # The last output token is never computed, so it takes no room in the cache.
        room = self.config.num_gpu_blocks * self.config.block_size + 1
        if request.request_id in self._sequences:
            problem = f"request {request.request_id} is being served already"
        elif not isl:
            problem = "the prompt is empty"
        elif max_tokens is not None and max_tokens < 1:
            problem = f"max_tokens must be at least 1, got {max_tokens}"
        elif isl + (max_tokens or 1) > context_length:
            problem = (
                f"{isl} prompt and {max_tokens or 1} output tokens are more than the context "
                f"length of {context_length}"
            )
        elif isl + (max_tokens or 1) > room:
            problem = f"{isl} prompt and {max_tokens or 1} output tokens don't fit into the cache"
        elif max_tokens is not None:
            return isl + max_tokens
        else:
            return min(context_length, room)
        raise RequestRefused("invalid_request", problem)

    def _advance(self, now_ms: float) -> None:
        if now_ms > self._now_ms:
            self._now_ms = now_ms
        self._cache.advance(self._now_ms)

    def _land(self) -> None:
        """Let those run whose transfer has ended, with the whole prompt in the cache."""
        block_size = self.config.block_size
        landed = [one for one in self._fetching.values() if one.due_ms <= self._now_ms]
        for sequence in sorted(landed, key=lambda one: (one.due_ms, one.arrival)):
            del self._fetching[sequence.request_id]
            self._running[sequence.request_id] = sequence
            sequence.is_remote = False  # if it is preempted, it is computed here
            sequence.computed_tokens = sequence.isl - 1
            self._cache.publish(sequence.table, sequence.isl // block_size)

    def _grow_decoding(self) -> int:
        """Give a block to each decoding request that needs one; how many others had to leave."""
        block_size, preempted = self.config.block_size, 0
        short = [
            sequence
            for sequence in self._running.values()
            if not sequence.computed_tokens % block_size
            and sequence is not self._prefilling
            and sequence.computed_tokens == sequence.table.blocks * block_size
        ]
        for sequence in short:
            while sequence.request_id in self._running and not self._cache.grow(sequence.table):
                self._preempt_youngest()
                preempted += 1
        return preempted

    def _preempt_youngest(self) -> None:
        _, sequence = self._running.popitem()
        if sequence is self._prefilling:
            self._prefilling = None
        self._cache.free(sequence.table)
        sequence.computed_tokens = 0
        self._waiting.add(sequence)

    def _schedule_prefill(self, budget: int) -> list[tuple[SequenceState, int]]:
        """Spend up to `budget` tokens on prefill, and return who computes how many."""
        chunks: list[tuple[SequenceState, int]] = []
        sequence = self._prefilling
        while budget:
            if sequence is None:
                admitted = len(self._running) + len(self._fetching)
                if not self._waiting or admitted >= self.config.max_num_seqs:
                    break
                if (sequence := self._admit()) is None:
                    break
                if sequence.is_remote:
                    sequence = None
                    continue
            missing = len(sequence.table.tokens) - sequence.computed_tokens
            chunk = min(budget, missing)
            chunks.append((sequence, chunk))
            budget -= chunk
            self._prefilling = sequence if chunk < missing else None
            sequence = None
        return chunks

    def _admit(self) -> SequenceState | None:
        """Let the first waiting request in; None if its blocks don't fit."""
        sequence: SequenceState = self._waiting[0]
        block_size, table = self.config.block_size, sequence.table
        while not self._cache.allocate(table, -(-len(table.tokens) // block_size)):
            if self._running or self._fetching:
                return None
            # Only pins are in its way, and nothing else could end the wait before they do.
            self._cache.unpin_one()
        del self._waiting[0]
        cached_tokens = table.shared * block_size
        # The last token is computed even if it is cached: the next one is sampled from it.
        computed_tokens = min(cached_tokens, len(table.tokens) - 1)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = computed_tokens
        if sequence.is_remote:
            transfer_ms = self._timing.transfer_ms(len(table.tokens) - cached_tokens)
            sequence.due_ms = self._now_ms + transfer_ms
            self._fetching[sequence.request_id] = sequence
        else:
            sequence.computed_tokens = computed_tokens
            self._running[sequence.request_id] = sequence
        return sequence

    def _compute(
        self, decoding: list[SequenceState], chunks: list[tuple[SequenceState, int]]
    ) -> None:
        """Count what the step computed, and make the blocks that it filled visible."""
        block_size = self.config.block_size
        for sequence in decoding:
            sequence.computed_tokens += 1
            if not sequence.computed_tokens % block_size:
                self._cache.publish(sequence.table, sequence.computed_tokens // block_size)
        for sequence, tokens in chunks:
            sequence.computed_tokens += tokens
            self._cache.publish(sequence.table, sequence.computed_tokens // block_size)

    def _remove(self, sequence: SequenceState) -> None:
        """A running request leaves for good."""
        if sequence is self._prefilling:
            self._prefilling = None
        del self._running[sequence.request_id], self._sequences[sequence.request_id]
        self._cache.free(sequence.table)
