"""What a request's tokens count as, for the client."""

from msgspec import UNSET, Struct, UnsetType


class Usage(Struct, frozen=True, gc=False):
    """Tokens of a request, over all its prompts. cached_tokens: prompt tokens that a worker reused;
    None: it did not say. reasoning_tokens: those of the output; None: nobody looks for them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """The same in the API's shape. Made by `wire_usage`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: "PromptDetails | UnsetType" = UNSET
    completion_tokens_details: "CompletionDetails | UnsetType" = UNSET


class PromptDetails(Struct, gc=False):
    cached_tokens: int


class CompletionDetails(Struct, gc=False):
    reasoning_tokens: int


def wire_usage(usage: Usage) -> WireUsage:
    cached, reasoning = usage.cached_tokens, usage.reasoning_tokens
    return WireUsage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        UNSET if cached is None else PromptDetails(cached),
        UNSET if reasoning is None else CompletionDetails(reasoning),
    )
