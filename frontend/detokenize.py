"""Token ids to text while they arrive: whole characters only, and nothing past a stop string.

A token may hold part of a character, and a stop string may begin in one chunk and end in another.
What could still turn out to be either is held back; the rest goes out at once. The work per token
does not grow with what was sent before.

Two decoders, for exactness. Byte-level tokenizers map every token to bytes, so an incremental UTF-8
decoder gives just what decoding all tokens at once gives. Other tokenizers decode a token with a
view to its neighbours: there a window of the latest tokens is decoded again with each new one, and
what is new at its end goes out.
"""

import codecs
from collections.abc import Sequence, Set
from typing import Protocol

from frontend.tokenizer import TokenBytes, Tokenizer

REPLACEMENT = "\ufffd"

CONTEXT_TOKENS = 5
"""Prompt tokens that the window begins with: enough to tell whether a word goes on."""

HELD_TOKENS_MAX = 8
"""A character is at most four byte tokens; after this many the text is not going to get better."""


class IncrementalDetokenizer:
    """The text of one output.

    Whatever way the tokens are divided over calls of `push`, the concatenation of what `push` and
    finally `finish` return is the text of all tokens, up to what stopped it.

    stop_reason: the stop string or the token id that ended the text; None as long as nothing has.
    token_count: tokens taken, the one that stopped the text included, none after it.
    """

    __slots__ = (
        "_decoder",
        "_matcher",
        "_min_tokens",
        "_stop_token_ids",
        "stop_reason",
        "token_count",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        stop_token_ids: Set[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """stop: non-empty strings; the text ends before the first match, or after it if
        include_stop. The match that is complete first counts, of those the longest.
        stop_token_ids: end the text and are not part of it. min_tokens: the first so many tokens
        and their text stop nothing."""
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder: _Decoder
        if tokenizer.token_bytes is not None:
            self._decoder = _ByteDecoder(tokenizer.token_bytes, skipped)
        else:
            self._decoder = _WindowDecoder(tokenizer, prompt_ids, skipped)
        self._matcher = StopMatcher(stop, include_stop) if stop else None
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self.stop_reason: str | int | None = None
        self.token_count = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; often all of theirs, at times none.

        After a stop: no text, and the tokens are not counted. About 0.5 µs a token, 1 µs with
        stop strings.
        """
        if self.stop_reason is not None:
            return ""
        texts: list[str] = []
        for token_id in token_ids:
            self.token_count += 1
            if self.token_count <= self._min_tokens:
                texts.append(self._decoder.feed(token_id))
                continue
            if token_id in self._stop_token_ids:
                texts.append(self.finish())
                # What was held back may have been the end of a stop string: that came first.
                if self.stop_reason is None:
                    self.stop_reason = token_id
                break
            text = self._decoder.feed(token_id)
            texts.append(text if self._matcher is None else self._match(text, self._matcher))
            if self.stop_reason is not None:
                break
        return "".join(texts)

    def finish(self) -> str:
        """What was held back, now that no more tokens come; empty after a stop."""
        if self.stop_reason is not None:
            return ""
        text = self._decoder.finish()
        matcher = self._matcher
        if matcher is None or self.token_count <= self._min_tokens:
            return text
        text = self._match(text, matcher)
        return text if self.stop_reason is not None else text + matcher.take_held()

    def _match(self, text: str, matcher: "StopMatcher") -> str:
        certain = matcher.feed(text)
        self.stop_reason = matcher.matched
        return certain


class StopMatcher:
    """Finds the first of several strings in a text that comes in pieces (Aho and Corasick, 1975).

    A state is the longest end of the text so far that begins some stop string; its length is what
    must be held back. O(1) per character, whatever the stop strings are; memory for one state per
    character of theirs.
    """

    __slots__ = (
        "_complete",
        "_depth",
        "_fallback",
        "_held",
        "_include",
        "_next",
        "_state",
        "matched",
    )

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """stops: non-empty. include: the match belongs to the text."""
        self._include = include
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._complete: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._fallback = self._fallbacks()
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._complete.append(None)
            state = following
        self._complete[state] = stop

    def _fallbacks(self) -> list[int]:
        """For every state the longest proper end of it that is a state too; breadth first, since a
        state's own depends on shorter ones. A state complete in its fallback is complete."""
        fallback = [0] * len(self._next)
        states = list(self._next[0].values())
        for state in states:
            for character, following in self._next[state].items():
                states.append(following)
                shorter = fallback[state]
                while shorter and character not in self._next[shorter]:
                    shorter = fallback[shorter]
                fallback[following] = self._next[shorter].get(character, 0)
                if self._complete[following] is None:
                    self._complete[following] = self._complete[fallback[following]]
        return fallback

    def feed(self, text: str) -> str:
        """The text that is certain now; up to the match once `matched` is set, and no more then."""
        state, following, fallback = self._state, self._next, self._fallback
        for index, character in enumerate(text):
            while state and character not in following[state]:
                state = fallback[state]
            state = following[state].get(character, 0)
            stop = self._complete[state]
            if stop is not None:
                self.matched = stop
                matched = self._held + text[: index + 1]
                self._held = ""
                return matched if self._include else matched[: len(matched) - len(stop)]
        self._state = state
        if not self._held and not state:
            return text
        text = self._held + text
        certain = len(text) - self._depth[state]
        self._held = text[certain:]
        return text[:certain]

    def take_held(self) -> str:
        """What was held back, which matches nothing after all."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Decoder(Protocol):
    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Holds back at most the three bytes of an incomplete character."""

    __slots__ = ("_decode", "_skipped", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes, skipped: Set[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decode(self._token_bytes[token_id])

    def finish(self) -> str:
        return self._decode(b"", True)


class _WindowDecoder:
    """Decodes a window: tokens whose text was sent, as context, then those whose text was not.

    Exact as long as the text is whole characters: byte tokens that make none may come out one by
    one as U+FFFD, earlier or later than in a decoding of all tokens at once.
    """

    __slots__ = ("_sent", "_sent_text", "_skipped", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window = [
            token_id for token_id in prompt_ids[-CONTEXT_TOKENS:] if token_id not in skipped
        ]
        self._sent = len(self._window)
        self._sent_text = self._text()

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped or not 0 <= token_id < self._tokenizer.vocab_size:
            return ""
        self._window.append(token_id)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._window) - self._sent < HELD_TOKENS_MAX:
            return ""
        return self._send(text)

    def _send(self, text: str) -> str:
        new = text[len(self._sent_text) :]
        if new:
            del self._window[: self._sent]
            self._sent = len(self._window)
            self._sent_text = self._text()
        elif len(self._window) - self._sent >= HELD_TOKENS_MAX:
            # Tokens without text of their own may matter to the next one, but not so many.
            del self._window[self._sent :]
        return new

    def finish(self) -> str:
        return self._send(self._text())
