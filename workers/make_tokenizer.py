"""Makes `workers/model/`, the tokenizer and chat template that the mock worker serves.

    python -m workers.make_tokenizer [DIRECTORY]

Byte-level BPE, trained on the docstrings of the running Python's standard library: English prose
and code, on every machine, with nothing to download. The same Python gives the same bytes; another
one has other docstrings, so the files are kept in the repository and made anew only by choice.
"""

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

VOCAB_SIZE = 8192
CONTEXT_LENGTH = 131072
WORD_OR_SPACES = r"Ġ+(?=Ġ)|Ġ[^Ġ]*"
"""Where a text is cut: before every space but in a run of them. Ġ is a space in byte-level form."""
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools that may be called, one JSON object a line:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}
        {{- '<|im_start|>system\\n' }}
    {%- elif message.role == 'function' %}
        {{- '<|im_start|>tool\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the mock worker's tokenizer.")
    default = Path(__file__).parent / "model"
    parser.add_argument("directory", nargs="?", type=Path, default=default)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(train(docstrings(Path(sysconfig.get_path("stdlib"))))).items():
        (directory / name).write_bytes(content)
        print(f"{directory / name}: {len(content)} bytes")


def docstrings(library: Path) -> Iterator[str]:
    """Every docstring of the library's own modules and packages, in order of path."""
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        if path.parent.name in ("site-packages", "test"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def train(corpus: Iterator[str]) -> Tokenizer:
    """A tokenizer for which a word of the vocabulary, with its space, is one token anywhere.

    It learns from words, numbers and punctuation apart, as GPT-2's does, so that no token spans
    two of them. With that learned, cutting at spaces alone finds nearly the same tokens, in half
    the time.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = [
        AddedToken(text, special=True, normalized=False)
        for text in (END_OF_TEXT, TURN_START, TURN_END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        # All 256 bytes, so that any text can be encoded; sorted, for the set has no order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.normalizer = normalizers.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_OR_SPACES), "isolated")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def model_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name → content, as the Hugging Face layout has them."""
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT_LENGTH,
            "chat_template": CHAT_TEMPLATE,
        },
        "config.json": {
            "model_type": "reckon_mock",
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": CONTEXT_LENGTH,
            "eos_token_id": turn_end,
            "pad_token_id": end_of_text,
        },
        "generation_config.json": {"eos_token_id": [turn_end], "pad_token_id": end_of_text},
    }
    contents = {
        name: msgspec.json.format(msgspec.json.encode(content)) + b"\n"
        for name, content in files.items()
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), **contents}


if __name__ == "__main__":
    main()
