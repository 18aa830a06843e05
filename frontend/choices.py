"""What an output is to the client, where that is more than its text.

A choice may be a message of several parts, have log probabilities, or begin with its prompt.
Requests that want none of this are plain; nothing here runs for their tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from frontend.chunks import Choice, Chunks
from frontend.legs import Job
from frontend.logprobs import CompletionLogprobs, Sampled, chat_logprobs
from frontend.message import Call, MessageFormat, MessageReader, Piece, members, wire
from frontend.parsers import Reasoning
from frontend.usage import Usage


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
        """Its choices are their text."""
        return self.message is None and not self.logprobs and not self.echoes

    @property
    def finds_reasoning(self) -> bool:
        return self.message is not None and self.message.reasoning_as is not None


class WholeChoice:
    """One choice that is answered when it is finished."""

    __slots__ = ("_logprobs", "_pieces", "_reading", "_texts")

    def __init__(self, form: Form, job: Job, index: int) -> None:
        """index: its number in the answer."""
        echo = _echo(form, index)
        self._logprobs = _Logprobs(form, job, len(echo))
        self._reading = _reading(form, index)
        self._pieces: list[Piece] = []
        self._texts = [echo]

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._reading is None else self._reading.reasoning_tokens

    def add(self, text: str, osl: int, is_last: bool) -> None:
        """osl: tokens of the output up to here."""
        if self._reading is None:
            self._texts.append(text)
        else:
            self._pieces += self._reading.pieces(text, osl, is_last)

    def finished(self, sampled: Sequence[Sampled], reason: str) -> Choice:
        """Once the last text has been added. sampled: all its tokens."""
        logprobs = self._logprobs.wire(sampled)
        if self._reading is None:
            return Choice("".join(self._texts), reason, logprobs)
        text, parts = members(self._pieces)
        return Choice(text, self._reading.reader.finish_reason(reason), logprobs, parts)


class ChoiceFrames:
    """The frames of one choice of a stream."""

    __slots__ = ("_chat", "_chunks", "_echo", "_index", "_logprobs", "_reading", "_sampled")

    def __init__(self, form: Form, job: Job, index: int, chunks: Chunks) -> None:
        """index: its number in the answer."""
        self._chat = form.chat
        self._chunks = chunks
        self._index = index
        self._echo = _echo(form, index)
        self._reading = _reading(form, index)
        self._logprobs = _Logprobs(form, job, len(self._echo))
        self._sampled: list[Sampled] = []

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._reading is None else self._reading.reasoning_tokens

    def frames(
        self,
        text: str,
        osl: int,
        sampled: Sequence[Sampled],
        reason: str | None,
        usage: Callable[[], Usage | None],
    ) -> bytes:
        """What this text and these tokens make certain; empty while they are held back.

        osl: tokens of the output up to here. usage: asked once the text has been read.
        """
        self._sampled += sampled
        reading = self._reading
        if reading is None:
            text, self._echo = self._echo + text, ""
            return self._frame(self._text(text), reason, usage())
        pieces = reading.pieces(text, osl, reason is not None)
        used = usage()
        frames = [self._frame(wire(piece), None, used) for piece in pieces]
        if reason is not None:
            frames.append(self._frame({}, reading.reader.finish_reason(reason), used))
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


def _echo(form: Form, index: int) -> str:
    return form.echoes[index // form.n] if form.echoes else ""


def _reading(form: Form, index: int) -> "_Reading | None":
    return None if form.message is None else _Reading(form.message.reader(index))


class _Reading:
    """A message as it is read, and how many tokens its reasoning took.

    Tokens count as what they made certain, with what was held back before. Exact where tokens come
    one by one; of several that come together each kind gets its share of the characters.
    """

    __slots__ = ("_osl", "reader", "reasoning_tokens")

    def __init__(self, reader: MessageReader) -> None:
        self.reader = reader
        self.reasoning_tokens = 0
        self._osl = 0

    def pieces(self, text: str, osl: int, is_last: bool) -> list[Piece]:
        found = self.reader.push(text)
        if is_last:
            found += self.reader.finish()
        if found:
            reasoning = sum(_chars(piece) for piece in found if isinstance(piece, Reasoning))
            share = reasoning / sum(map(_chars, found))
            self.reasoning_tokens += round(share * (osl - self._osl))
            self._osl = osl
        return found


def _chars(piece: Piece) -> int:
    if isinstance(piece, Call):
        return len(piece.name) + len(piece.arguments)
    return len(piece.text)
