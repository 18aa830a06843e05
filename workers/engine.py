"""The mock engine of one rank: continuous batching over a paged KV cache, as a pure step function.

    submit, cancel  →  waiting ─admit→ running (prefill, then decode)  ─step→  tokens, KV events

A step is planned and counted like a real engine's, and takes the time that `workers.timing` gives
it; the caller sleeps that time or simulates it. In one step every decoding request gets a token.
What is left of the token budget goes to prefill, in arrival order within a priority, cut into
chunks; a request enters if its blocks fit. When a decoding request finds no block, the request
admitted last goes back to wait and is computed again later. No model is run: `workers.sampling`
makes up the tokens.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct
from sortedcontainers import SortedKeyList

from eventstore.events import BlockStored
from indexer.blocks import block_hashes, prompt_hashes, sequence_hashes
from workers.kv_cache import BlockTable, KvCache, KvEvent
from workers.protocol import EngineRequest
from workers.sampling import TokenSource
from workers.timing import TimingModel


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Sizes of one rank's engine. ValueError names the field that is out of range."""

    block_size: int = 64
    """Tokens per KV block."""
    num_gpu_blocks: int = 16_384
    max_num_seqs: int = 256
    """Requests running at once."""
    max_num_batched_tokens: int = 8_192
    """Tokens computed in a step; at least `max_num_seqs`, so that prefill never starves."""
    max_num_waiting: int = 4_096
    """Requests that may wait to be admitted; one more is refused as overloaded."""
    context_length: int = 131_072
    """Prompt and output tokens of a request together, at most."""
    enable_prefix_caching: bool = True
    speedup: float = 1.0
    """Divides all step times."""
    output_token_ids: Sequence[int] = range(1_000)
    """What output tokens are drawn from."""
    output_length_mean: float = 128.0
    """Output tokens up to a natural end, its end token included."""

    def __post_init__(self) -> None:
        sizes = ("block_size", "num_gpu_blocks", "max_num_seqs", "max_num_waiting")
        for name in (*sizes, "context_length", "output_length_mean"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if not self.output_token_ids:
            raise ValueError("output_token_ids must not be empty")
        if not 0 <= min(self.output_token_ids) <= max(self.output_token_ids) < 2**32:
            raise ValueError("output_token_ids must be u32")
        TimingModel(self.speedup)  # which checks it


class RequestRefused(Exception):
    """The engine does not take a request. `code` is one of those of `workers.protocol.Output`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class StepOutput(Struct, frozen=True, gc=False):
    """What one request got in a step; the fields mean what `workers.protocol.Output` says."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int | None = None


class StepResult(NamedTuple):
    """What a step has brought about once `duration_ms` have passed."""

    duration_ms: float
    outputs: list[StepOutput]
    kv_events: list[KvEvent]
    prefill_tokens: int
    """Prompt tokens computed, and tokens computed again after a preemption."""
    preempted: int
    """Requests sent back to wait."""


class _Sequence:
    """A request that the engine has taken, with the tokens it has so far in `table.tokens`."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed_tokens",
        "context",
        "end_at",
        "ends",
        "eos_token_id",
        "isl",
        "key",
        "may_end_at",
        "priority",
        "request_id",
        "table",
    )

    def __init__(
        self, request: EngineRequest, table: BlockTable, *, priority: int, arrival: int, end_at: int
    ) -> None:
        self.request_id = request.request_id
        self.table = table
        self.priority = priority
        self.arrival = arrival
        self.isl = len(table.tokens)
        self.computed_tokens = 0
        self.cached_tokens: int | None = None
        """Prompt tokens that the cache held at the first admission."""
        self.key = self.context = 0
        stop = request.stop_conditions
        self.end_at = end_at
        """Number of tokens at which the output ends with `length`."""
        self.may_end_at = self.isl + (stop.min_tokens or 0)
        """Number of tokens from which on another one may end the output."""
        self.ends = dict.fromkeys(stop.stop_token_ids_hidden, "stop")
        """Token id → finish reason."""
        self.eos_token_id: int | None = None
        if request.eos_token_ids and not stop.ignore_eos:
            self.ends |= dict.fromkeys(request.eos_token_ids, "eos")
            self.eos_token_id = request.eos_token_ids[0]


class MockEngine:
    """The engine of one rank. A worker with several ranks has an engine for each, by `dp_rank`.

    Equal arguments and equal calls give equal results. Give all workers of a model one seed: a
    request that migrates then goes on as it would have.
    """

    def __init__(
        self, config: EngineConfig, *, seed: int = 0, worker_id: int, dp_rank: int = 0
    ) -> None:
        self.config = config
        self._timing = TimingModel(config.speedup)
        self._source = TokenSource(
            seed=seed, token_ids=config.output_token_ids, length_mean=config.output_length_mean
        )
        self._cache = KvCache(
            num_blocks=config.num_gpu_blocks,
            block_size=config.block_size,
            worker_id=worker_id,
            dp_rank=dp_rank,
            prefix_caching=config.enable_prefix_caching,
        )
        self._sequences: dict[str, _Sequence] = {}
        """All requests that wait or run."""
        self._waiting: SortedKeyList[_Sequence] = SortedKeyList(
            key=lambda sequence: (-sequence.priority, sequence.arrival)
        )
        self._running: dict[str, _Sequence] = {}
        """In order of admission."""
        self._prefilling: _Sequence | None = None
        """The running request that a step's budget left in prefill: one at most, the last."""
        self._arrivals = 0

    @property
    def active_blocks(self) -> int:
        """Blocks in use by running requests, shared ones counted once."""
        return self._cache.active_blocks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def request_ids(self) -> list[str]:
        """All requests that wait or run, in order of arrival."""
        return list(self._sequences)

    def cache_contents(self) -> list[BlockStored]:
        """The whole visible cache, parents first: what the events of all steps so far add up to."""
        return self._cache.contents()

    def submit(self, request: EngineRequest, *, priority: int = 0) -> None:
        """Take a request; the higher `priority` is admitted first. Its first step is the next one.

        Raises RequestRefused: invalid_request if it can never be served here or is here already,
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
        sequence = _Sequence(
            request, table, priority=priority, arrival=self._arrivals, end_at=end_at
        )
        sequence.key = self._source.key(request.sampling_options.seed)
        self._set_context(sequence)
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
        else:
            self._waiting.remove(sequence)
            del self._sequences[request_id]
        return True

    def step(self) -> StepResult | None:
        """Run one step; None if there is nothing to do.

        Each request gets at most one token. O(running requests + blocks allocated and computed).
        """
        if not self._sequences:
            return None
        preempted = self._grow_decoding()
        decoding = [one for one in self._running.values() if one is not self._prefilling]
        budget = self.config.max_num_batched_tokens - len(decoding)
        chunks = self._schedule_prefill(budget)
        prefill_tokens = sum(tokens for _, tokens in chunks)
        active_ratio = self._cache.active_blocks / self.config.num_gpu_blocks
        duration_ms = self._timing.step_ms(prefill_tokens, active_ratio if decoding else None)
        self._compute(decoding, chunks)
        sampling = decoding + [one for one, _ in chunks if one is not self._prefilling]
        outputs = [self._sample(sequence) for sequence in sampling]
        return StepResult(
            duration_ms, outputs, self._cache.take_events(), prefill_tokens, preempted
        )

    def check(self) -> None:
        """Assert every invariant. For tests: O(all blocks and requests)."""
        self._cache.check(sequence.table for sequence in self._running.values())
        for sequence in self._waiting:
            assert not sequence.table.shared and not sequence.table.private
            assert not sequence.computed_tokens
        assert len(self._running) + len(self._waiting) == len(self._sequences)
        block_size = self.config.block_size
        for sequence in self._running.values():
            table, computed = sequence.table, sequence.computed_tokens
            assert computed <= (table.shared + table.private) * block_size
            assert len(table.hashes) == len(table.tokens) // block_size
            if sequence is not self._prefilling:
                assert computed == len(table.tokens) - 1
                assert table.shared + table.private == -(-computed // block_size)
        if self._prefilling is not None:
            assert next(reversed(self._running.values())) is self._prefilling

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

    def _grow_decoding(self) -> int:
        """Give a block to each decoding request that needs one; how many others had to leave."""
        block_size, preempted = self.config.block_size, 0
        short = [
            sequence
            for sequence in self._running.values()
            if not sequence.computed_tokens % block_size and sequence is not self._prefilling
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

    def _schedule_prefill(self, budget: int) -> list[tuple[_Sequence, int]]:
        """Spend up to `budget` tokens on prefill, and return who computes how many."""
        chunks: list[tuple[_Sequence, int]] = []
        sequence = self._prefilling
        while budget:
            if sequence is None:
                if not self._waiting or len(self._running) >= self.config.max_num_seqs:
                    break
                if (sequence := self._admit()) is None:
                    break
            missing = len(sequence.table.tokens) - sequence.computed_tokens
            chunk = min(budget, missing)
            chunks.append((sequence, chunk))
            budget -= chunk
            self._prefilling = sequence if chunk < missing else None
            sequence = None
        return chunks

    def _admit(self) -> _Sequence | None:
        """Let the first waiting request in; None if its blocks don't fit."""
        sequence: _Sequence = self._waiting[0]
        block_size, table = self.config.block_size, sequence.table
        if not self._cache.allocate(table, -(-len(table.tokens) // block_size)):
            return None
        del self._waiting[0]
        self._running[sequence.request_id] = sequence
        # The last token is computed even if it is cached: the next one is sampled from it.
        sequence.computed_tokens = min(table.shared * block_size, len(table.tokens) - 1)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed_tokens
        return sequence

    def _compute(self, decoding: list[_Sequence], chunks: list[tuple[_Sequence, int]]) -> None:
        """Count what the step computed, and make the blocks that it filled visible."""
        block_size = self.config.block_size
        for sequence in decoding:
            sequence.computed_tokens += 1
            if not sequence.computed_tokens % block_size:
                self._cache.publish(sequence.table, sequence.computed_tokens // block_size)
        for sequence, tokens in chunks:
            sequence.computed_tokens += tokens
            self._cache.publish(sequence.table, sequence.computed_tokens // block_size)

    def _sample(self, sequence: _Sequence) -> StepOutput:
        """Append the next token; a request that ends with it leaves the engine."""
        source, tokens, context = self._source, sequence.table.tokens, sequence.context
        count = len(tokens)
        may_end = count >= sequence.may_end_at
        if may_end and sequence.eos_token_id is not None and source.ends(context):
            token = sequence.eos_token_id
        else:
            token = source.token(context)
        tokens.append(token)
        if (count + 1) % self.config.block_size:
            sequence.context = source.extended(context, token)
        else:
            self._extend_hashes(sequence)
        finish_reason = sequence.ends.get(token) if may_end else None
        if finish_reason is None and count + 1 == sequence.end_at:
            finish_reason = "length"
        if finish_reason is not None:
            self._remove(sequence)
        cached_tokens = sequence.cached_tokens if count == sequence.isl else None
        return StepOutput(sequence.request_id, [token], finish_reason, cached_tokens)

    def _extend_hashes(self, sequence: _Sequence) -> None:
        """Hash the block that the last token has filled."""
        hashes, block_size = sequence.table.hashes, self.config.block_size
        local = block_hashes(sequence.table.tokens[-block_size:], block_size)
        hashes += sequence_hashes(local, parent_hash=hashes[-1] if hashes else None)
        self._set_context(sequence)

    def _set_context(self, sequence: _Sequence) -> None:
        hashes, tokens = sequence.table.hashes, sequence.table.tokens
        tail = tokens[len(hashes) * self.config.block_size :]
        sequence.context = self._source.context(sequence.key, hashes[-1] if hashes else 0, tail)

    def _remove(self, sequence: _Sequence) -> None:
        """A running request leaves for good."""
        if sequence is self._prefilling:
            self._prefilling = None
        del self._running[sequence.request_id], self._sequences[sequence.request_id]
        self._cache.free(sequence.table)
