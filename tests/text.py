"""Two tokenizers of different kinds, and ways to write tokens for them."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from frontend.tokenizer import Tokenizer
from workers import make_tokenizer

MODEL = Path(make_tokenizer.__file__).parent / "model"
"""The directory of the model that ships with the mock worker."""

BYTE_LEVEL = Tokenizer.from_directory(MODEL)


def sentencepiece() -> Tokenizer:
    """Llama's kind: `▁` for a space, bytes for what has no token, one leading space stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "wor", "ld", "é", "▁a", "!", ""]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[])
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(tokenizer, (1,))


SENTENCEPIECE = sentencepiece()


def ids_of(text: str) -> list[int]:
    """Byte-level tokens."""
    return BYTE_LEVEL.encode(text, add_special_tokens=False)


def byte_ids(data: bytes) -> list[int]:
    """Byte-level tokens, one per byte; they follow the three specials."""
    return [_ID_OF_BYTE[byte] for byte in data]


def fallback_ids(data: bytes) -> list[int]:
    """SentencePiece's tokens, one per byte."""
    return [2 + byte for byte in data]


assert BYTE_LEVEL.token_bytes is not None
_ID_OF_BYTE = {BYTE_LEVEL.token_bytes[token_id][0]: token_id for token_id in range(3, 259)}
