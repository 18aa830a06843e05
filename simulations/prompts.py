"""Prompts with the prefix structure of a trace: equal hash ids become equal 512-token blocks.

`simulations.trace.expand` draws the blocks; this gives it words to draw from that the model's
tokenizer encodes as exactly one token each. A prompt of n words is then a prompt of n tokens, and
its chain of KV block hashes agrees with another's for as long as their hash ids do.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from simulations.trace import expand

WORDS_MIN = 256
"""Below this, two blocks might share their beginning: 256 words leave 128 bits in 16 tokens."""

WORDS_MAX = 4096
"""More words would make prompts no more distinct, only the start slower."""

_SPACE_MARKS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write the space in front of a word."""


class UnusableTokenizer(Exception):
    """The tokenizer has too few words that stay one token each wherever they stand."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return (
            f"the tokenizer has {self.found} words that are one token each; "
            f"prompts of an exact length need {WORDS_MIN}"
        )


class Word(NamedTuple):
    """A space and ASCII letters (so it stands in JSON as it is), and the one token it becomes."""

    text: str
    token_id: int


def find_words(tokenizer: Tokenizer) -> list[Word]:
    """Up to `WORDS_MAX` words that encode to one token each, alone and joined, by token id.

    Raises UnusableTokenizer if there are fewer than `WORDS_MIN`. About 20 ms for 8,192 candidates.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    candidates = sorted(
        (token_id, " " + token[1:])
        for token, token_id in vocabulary.items()
        if token.startswith(_SPACE_MARKS) and token[1:].isascii() and token[1:].isalpha()
    )[: 2 * WORDS_MAX]
    encodings = tokenizer.encode_batch([text for _, text in candidates], add_special_tokens=False)
    words = [
        Word(text, token_id)
        for (token_id, text), encoding in zip(candidates, encodings, strict=True)
        if encoding.ids == [token_id]
    ][:WORDS_MAX]
    joined = tokenizer.encode("".join(word.text for word in words), add_special_tokens=False)
    if joined.ids != [word.token_id for word in words]:
        raise UnusableTokenizer(0)
    if len(words) < WORDS_MIN:
        raise UnusableTokenizer(len(words))
    return words


class PromptMaker:
    """Makes prompts as JSON values: a string (`text`) or a list of token ids (`tokens`).

    Another seed gives other blocks with the same structure, so that caches filled by an earlier run
    hold none of them; the same seed gives the same ones on every machine. 30 µs a block.
    """

    def __init__(self, words: Sequence[Word], form: Literal["text", "tokens"], seed: int) -> None:
        # A block is drawn by position in the vocabulary, so another order is another text.
        shuffled = sorted(
            words, key=lambda word: blake2b(b"%d %d" % (seed, word.token_id)).digest()
        )
        if form == "text":
            self._pieces = [word.text.encode() for word in shuffled]
            self._open, self._between, self._close = b'"', b"", b'"'
        else:
            self._pieces = [b"%d" % word.token_id for word in shuffled]
            self._open, self._between, self._close = b"[", b",", b"]"

    def prompt_json(self, hash_ids: Iterable[int], input_length: int) -> bytes:
        """`input_length` tokens in blocks `hash_ids`, the last one cut short where need be.

        Raises ValueError if so many blocks do not make so many tokens.
        """
        pieces = expand(hash_ids, input_length, self._pieces)
        return self._open + self._between.join(pieces) + self._close
