"""A request inside the mock engine: its tokens so far, how far they are computed, when it ends."""

from msgspec import Struct

from indexer.blocks import block_hashes, sequence_hashes
from workers.kv_cache import BlockTable
from workers.protocol import EngineRequest, TokenLogprobs
from workers.sampling import TokenSource


class StepOutput(Struct, frozen=True, gc=False):
    """What one request got in a step; the fields mean what `workers.protocol.Output` says."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] | None = None


class SequenceState:
    """The tokens, prompt and output, are in `table.tokens`."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed_tokens",
        "context",
        "due_ms",
        "end_at",
        "ends",
        "eos_token_id",
        "is_remote",
        "isl",
        "key",
        "logprobs",
        "may_end_at",
        "priority",
        "request_id",
        "table",
    )

    def __init__(
        self,
        request: EngineRequest,
        table: BlockTable,
        source: TokenSource,
        *,
        priority: int,
        arrival: int,
        end_at: int,
        is_remote: bool,
        block_size: int,
    ) -> None:
        self.request_id = request.request_id
        self.table = table
        self.priority = priority
        self.arrival = arrival
        self.is_remote = is_remote
        """Its prompt is computed elsewhere; what is not cached here is transferred. Once."""
        self.due_ms = 0.0
        """When that transfer ends."""
        self.isl = len(table.tokens)
        self.computed_tokens = 0
        self.cached_tokens: int | None = None
        """Prompt tokens that the cache held at the first admission."""
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
        self.key = source.key(request.sampling_options.seed)
        self.context = self._context(source, block_size)
        self.logprobs = request.sampling_options.logprobs
        """How many alternatives are told of each token; None: nothing of that kind."""

    def sample(self, source: TokenSource, block_size: int) -> StepOutput:
        """Append the next token."""
        tokens, context = self.table.tokens, self.context
        count = len(tokens)
        may_end = count >= self.may_end_at
        if may_end and self.eos_token_id is not None and source.ends(context):
            token = self.eos_token_id
        else:
            token = source.token(context)
        tokens.append(token)
        if (count + 1) % block_size:
            self.context = source.extended(context, token)
        else:
            self._extend_hashes(block_size)
            self.context = self._context(source, block_size)
        finish_reason = self.ends.get(token) if may_end else None
        if finish_reason is None and count + 1 == self.end_at:
            finish_reason = "length"
        cached_tokens = self.cached_tokens if count == self.isl else None
        logprobs = None
        if self.logprobs is not None:
            logprobs = [source.logprobs(context, token, self.logprobs)]
        return StepOutput(self.request_id, [token], finish_reason, cached_tokens, logprobs)

    def _extend_hashes(self, block_size: int) -> None:
        """Hash the block that the last token has filled."""
        hashes = self.table.hashes
        local = block_hashes(self.table.tokens[-block_size:], block_size)
        hashes += sequence_hashes(local, parent_hash=hashes[-1] if hashes else None)

    def _context(self, source: TokenSource, block_size: int) -> int:
        hashes, tokens = self.table.hashes, self.table.tokens
        tail = tokens[len(hashes) * block_size :]
        return source.context(self.key, hashes[-1] if hashes else 0, tail)
