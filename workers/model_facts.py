"""What a model's own files say that a card and an engine need."""

import json
from collections.abc import Mapping
from typing import Self

import tokenizers
from msgspec import Struct

from workers.errors import BadModelFile

TEXT_IDS_MAX = 8192
"""More words than this make no better nonsense, and every one of them is decoded at start."""


class ModelFacts(Struct, frozen=True):
    """Read from the model's files.

    context_length: None if config.json does not say. eos_token_ids: may be empty.
    text_token_ids: up to TEXT_IDS_MAX ids, rising, each of which is printable text by itself.
    """

    context_length: int | None
    eos_token_ids: list[int]
    text_token_ids: list[int]

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> Self:
        """files: contents by name, tokenizer.json among them. Raises BadModelFile."""
        config = _json_object("config.json", files)
        generation = _json_object("generation_config.json", files)
        tokenizer = _tokenizer(files)
        context_length = config.get("max_position_embeddings")
        return cls(
            context_length=context_length if isinstance(context_length, int) else None,
            eos_token_ids=_ids(generation.get("eos_token_id"))
            or _ids(config.get("eos_token_id"))
            or _named_eos(tokenizer, _json_object("tokenizer_config.json", files)),
            text_token_ids=_text_token_ids(tokenizer),
        )


def _json_object(name: str, files: Mapping[str, bytes]) -> dict[str, object]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise BadModelFile(name, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadModelFile(name, "is not a JSON object")
    return value


def _tokenizer(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    name = "tokenizer.json"
    if name not in files:
        raise BadModelFile(name, "is missing")
    try:
        return tokenizers.Tokenizer.from_buffer(files[name])
    except Exception as error:  # the library raises nothing more specific
        raise BadModelFile(name, f"is not a tokenizer: {error}") from error


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int)]


def _named_eos(tokenizer: tokenizers.Tokenizer, config: dict[str, object]) -> list[int]:
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return _ids(tokenizer.token_to_id(token)) if isinstance(token, str) else []


def _text_token_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    plain = sorted(tokenizer.get_vocab(with_added_tokens=False).values())[: 2 * TEXT_IDS_MAX]
    added = tokenizer.get_added_tokens_decoder()
    texts = tokenizer.decode_batch([[token_id] for token_id in plain], skip_special_tokens=False)
    # The character that stands for undecodable bytes counts as printable.
    found = [
        token_id
        for token_id, text in zip(plain, texts, strict=True)
        if text and text.isprintable() and "\ufffd" not in text and token_id not in added
    ]
    if not found:
        raise BadModelFile("tokenizer.json", "has no token that is text by itself")
    return found[:TEXT_IDS_MAX]
