"""Log probabilities of tokens in the shapes of the two endpoints.

A token that is part of a character has its bytes, and U+FFFD for a text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from frontend.tokenizer import Tokenizer
from workers.protocol import TokenLogprobs

LOGPROB_MIN = -9999.0
"""What stands for minus infinity, which JSON has no number for; OpenAI's own choice."""


class Sampled(NamedTuple):
    """A token of an output, and how likely it was."""

    token_id: int
    logprobs: TokenLogprobs


def chat_logprobs(tokenizer: Tokenizer, sampled: Sequence[Sampled]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions. About 2 µs for each token and alternative."""
    content = [
        {
            **_entry(tokenizer, token_id, logprobs.logprob),
            "top_logprobs": [_entry(tokenizer, *each) for each in logprobs.top],
        }
        for token_id, logprobs in sampled
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    content = _bytes(tokenizer, token_id)
    text = content.decode("utf-8", "replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}


class CompletionLogprobs:
    """`logprobs` of a choice of /v1/completions, piece by piece: text_offset goes on from piece to
    piece."""

    __slots__ = ("_hidden", "_offset", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> None:
        """offset: characters of the choice's text before the first token."""
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._offset = offset

    def wire(self, sampled: Sequence[Sampled]) -> dict[str, Any]:
        """Of the next tokens. Linear in the tokens and alternatives."""
        tokens: list[str] = []
        offsets: list[int] = []
        top: list[dict[str, float]] = []
        for token_id, logprobs in sampled:
            content = _bytes(self._tokenizer, token_id)
            tokens.append(content.decode("utf-8", "replace"))
            offsets.append(self._offset)
            if token_id not in self._hidden:
                # A character counts where it begins, whichever token holds the rest of it.
                self._offset += sum(byte & 0xC0 != 0x80 for byte in content)
            top.append({self._text(other): _finite(value) for other, value in logprobs.top})
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(each.logprobs.logprob) for each in sampled],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return _bytes(self._tokenizer, token_id).decode("utf-8", "replace")


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    if tokenizer.token_bytes is not None:
        return tokenizer.token_bytes[token_id]
    if not tokenizer.knows((token_id,)):
        return b""
    return tokenizer.decode((token_id,), skip_special_tokens=False).encode()


def _finite(logprob: float) -> float:
    return max(LOGPROB_MIN, logprob)  # in this order: also for NaN
