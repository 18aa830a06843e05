"""What an output is to the client, where that is more than its text.

A choice may be a message of several parts, have log probabilities, or begin with its prompt.
Requests that want none of this are plain; nothing here runs for their tokens.
"""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from frontend.chunks import Choice, Chunks, Usage
from frontend.legs import Job
from frontend.logprobs import CompletionLogprobs, Sampled, chat_logprobs
from frontend.message import MessageFormat, Piece, members, wire


class Form(Struct, frozen=True, kw_only=True):
    """How the answer shall look."""

    id: str
    created_s: int
    model: str
    chat: bool
    n: int = 1
    """Choices of each prompt: number `i` of the answer is of prompt `i // n`."""
    include_usage: bool = False
    continuous_usage: bool = False
    extra_fields: frozenset[str] = frozenset()
    message: MessageFormat | None = None
    """None: the text is the message."""
    logprobs: bool = False
    echoes: tuple[str, ...] = ()
    """The prompts' texts, which their choices begin with; empty: they don't."""

    @property
    def is_plain(self) -> bool:
        return self.message is None and not self.logprobs and not self.echoes


def whole_choice(
    form: Form, job: Job, index: int, text: str, sampled: Sequence[Sampled], reason: str
) -> Choice:
    """A finished output. index: its number in the answer."""
    parts: dict[str, Any] = {}
    echo = form.echoes[index // form.n] if form.echoes else ""
    logprobs = _Logprobs(form, job, len(echo)).wire(sampled)
    if form.message is not None:
        reader = form.message.reader(index)
        pieces: list[Piece] = [*reader.push(text), *reader.finish()]
        text, parts = members(pieces)
        reason = reader.finish_reason(reason)
    return Choice(echo + text, reason, logprobs, parts)


class ChoiceFrames:
    """The frames of one choice of a stream."""

    __slots__ = ("_chat", "_chunks", "_echo", "_index", "_logprobs", "_reader", "_sampled")

    def __init__(self, form: Form, job: Job, index: int, chunks: Chunks) -> None:
        self._chat = form.chat
        self._chunks = chunks
        self._index = index
        self._echo = form.echoes[index // form.n] if form.echoes else ""
        self._reader = None if form.message is None else form.message.reader(index)
        self._logprobs = _Logprobs(form, job, len(self._echo))
        self._sampled: list[Sampled] = []

    def frames(
        self, text: str, sampled: Sequence[Sampled], reason: str | None, usage: Usage | None
    ) -> bytes:
        """What this text and these tokens make certain; empty while they are held back."""
        self._sampled += sampled
        reader = self._reader
        if reader is None:
            text, self._echo = self._echo + text, ""
            return self._frame(self._text(text), reason, usage)
        pieces = reader.push(text)
        if reason is not None:
            pieces += reader.finish()
            reason = reader.finish_reason(reason)
        frames = [self._frame(wire(piece), None, usage) for piece in pieces]
        if reason is not None:
            frames.append(self._frame({}, reason, usage))
        return b"".join(frames)

    def _text(self, text: str) -> dict[str, Any]:
        if not self._chat:
            return {"text": text}
        return {"content": text} if text else {}

    def _frame(self, found: dict[str, Any], reason: str | None, usage: Usage | None) -> bytes:
        """The first one has the tokens that came."""
        logprobs = self._logprobs.wire(self._sampled) if self._sampled else None
        self._sampled.clear()
        return self._chunks.parts(found, self._index, logprobs, reason, usage)


class _Logprobs:
    """In the endpoint's shape."""

    __slots__ = ("_completion", "_form", "_tokenizer")

    def __init__(self, form: Form, job: Job, offset: int) -> None:
        self._form = form
        self._tokenizer = job.served.tokenizer
        self._completion = CompletionLogprobs(
            self._tokenizer, skip_special_tokens=job.skip_special_tokens, offset=offset
        )

    def wire(self, sampled: Sequence[Sampled]) -> dict[str, Any] | None:
        """None: they were not asked for."""
        if not self._form.logprobs:
            return None
        if self._form.chat:
            return chat_logprobs(self._tokenizer, sampled)
        return self._completion.wire(sampled)
