"""Text to token ids and back, with a model's own Hugging Face tokenizer files.

A tokenizer is immutable once made and may be used from several threads; `encode` releases the
interpreter lock. Output is decoded token by token in `frontend.detokenize`.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders

FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""The files of a model that a frontend reads; the first two are required."""

# The library would start a thread per core for its batch calls, which here carry one text each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class BadTokenizer(Exception):
    """A tokenizer file is missing, or is not what it should be."""

    def __init__(self, file_name: str, why: str) -> None:
        super().__init__(file_name, why)
        self.file_name = file_name
        self.why = why

    def __str__(self) -> str:
        return f"{self.file_name}: {self.why}"


def read_files(directory: Path) -> dict[str, bytes]:
    """Those of FILE_NAMES that the directory has. Raises BadTokenizer if one can't be read."""
    files: dict[str, bytes] = {}
    for name in FILE_NAMES:
        try:
            files[name] = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BadTokenizer(name, error.strerror or "can't be read") from error
    return files


class Tokenizer:
    """One model's tokenizer.

    eos_token_ids: what ends an answer, from generation_config, else config, else tokenizer_config;
    empty if none of them says. special_ids: left out of text that skips special tokens.
    vocab_size: ids are below it; the vocabulary may have holes.
    """

    __slots__ = ("_tokenizer", "eos_token_ids", "special_ids", "token_bytes", "vocab_size")

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        # A length limit belongs to training; a server must see the whole prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self.token_bytes: TokenBytes | None = None
        """The bytes that each id stands for, if the tokenizer is a byte-level one."""
        if isinstance(tokenizer.decoder, decoders.ByteLevel):
            self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """File name → content. Raises BadTokenizer. About 10 ms for a vocabulary of 8k, 0.5 s for
        one of 150k."""
        content = files.get("tokenizer.json")
        if content is None:
            raise BadTokenizer("tokenizer.json", "is missing")
        config = read_json(files, "tokenizer_config.json", required=True)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise BadTokenizer("tokenizer.json", str(error)) from error
        return cls(tokenizer, _eos_token_ids(files, config, tokenizer))

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Raises BadTokenizer."""
        return cls.from_files(read_files(directory))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text, in which special tokens are recognised.

        add_special_tokens: also those that the model puts around a bare text, such as a leading
        bos; False for rendered chat templates, which contain them. Any string is taken: what is not
        Unicode text counts as U+FFFD. About 0.5 µs a token with the shipped tokenizer.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError:
            # A lone surrogate: no JSON body can hold one, but a chat template might make one.
            mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode(mended, add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Their text; ids outside the vocabulary have none. They must fit a u32."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def knows(self, token_ids: Collection[int]) -> bool:
        """Whether every id is below `vocab_size` and not negative. About 20 ns an id."""
        return not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size)


class TokenBytes(dict[int, bytes]):
    """Token id → the bytes it stands for, looked up at first use; never more than the vocabulary.

    Byte-level vocabularies write each byte as a printable character. A token with a character that
    stands for no byte is an added one and means its own text.
    """

    __slots__ = ("_tokenizer",)

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        try:
            token = self._tokenizer.id_to_token(token_id)
        except OverflowError:  # not a u32
            token = None
        if token is None:
            return b""
        try:
            content = bytes([_BYTE_OF[character] for character in token])
        except KeyError:
            content = token.encode()
        self[token_id] = content
        return content


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 is itself, the other bytes follow in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_characters()


def read_json(
    files: Mapping[str, bytes], file_name: str, *, required: bool = False
) -> dict[str, Any]:
    """The file's JSON object; empty if an optional one is absent. Raises BadTokenizer."""
    content = files.get(file_name)
    if content is None:
        if required:
            raise BadTokenizer(file_name, "is missing")
        return {}
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadTokenizer(file_name, str(error)) from error


def token_text(file_name: str, key: str, token: object) -> str | None:
    """A token as the config files write one: text, or an object with `content`, or null."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise BadTokenizer(file_name, f"{key} is not a token")


def _eos_token_ids(
    files: Mapping[str, bytes], config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer
) -> tuple[int, ...]:
    for file_name in ("generation_config.json", "config.json"):
        found = read_json(files, file_name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in ids):
            raise BadTokenizer(file_name, "eos_token_id is neither a token id nor a list of them")
        return tuple(dict.fromkeys(ids))
    text = token_text("tokenizer_config.json", "eos_token", config.get("eos_token"))
    token_id = tokenizer.token_to_id(text) if text is not None else None
    return () if token_id is None else (token_id,)
