"""What does the text of a request cost: decoding, template, tokens in and out, chunks?

    python -m benchmarks.bench_text [--model DIRECTORY] [--out FILE]

One thread of plain calls, no server; with the model that ships with the mock worker unless another
directory is named. Times are µs per the unit that each line names, median and spread of the rounds.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

from tokenizers.decoders import DecodeStream

import workers
from benchmarks.processes import machine, row
from frontend.chunks import ChatChunks, Choice, chat_body
from frontend.detokenize import IncrementalDetokenizer
from frontend.openai import decode_chat, sampling_options, stop_conditions
from frontend.template import ChatTemplate
from frontend.tokenizer import Tokenizer, read_files
from frontend.usage import Usage

ROUNDS = 9
ROUND_NS = 50_000_000
STOPS = ["\n\n\0", "the\0", "self.\0", "    \0"]
"""They begin often and never match."""


def rounds_us(run: Callable[[], object], units: int) -> list[float]:
    """µs per unit, by round; `run` does `units` of them and is repeated to fill a round."""
    run()
    start_ns = perf_counter_ns()
    run()
    repeats = max(1, ROUND_NS // max(1, perf_counter_ns() - start_ns))
    rounds = []
    for _ in range(ROUNDS):
        start_ns = perf_counter_ns()
        for _ in range(repeats):
            run()
        rounds.append((perf_counter_ns() - start_ns) / 1e3 / repeats / units)
    return rounds


def corpus(characters: int) -> str:
    """English prose and code: this project's own, the same in every run."""
    root = Path(workers.__file__).parent.parent
    text = "\n".join(path.read_text() for path in sorted(root.glob("[a-z]*/*.py")))
    return (text * (characters // len(text) + 1))[:characters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    shipped = Path(workers.__file__).parent / "model"
    parser.add_argument(
        "--model", type=Path, default=shipped, help="a directory of tokenizer files"
    )
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    lines = [machine("tokenizers", "jinja2", "msgspec"), "", *results(arguments.model)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


def results(model: Path) -> list[str]:
    files = read_files(model)
    tokenizer = Tokenizer.from_files(files)
    template = ChatTemplate.from_files(files)
    assert template is not None, "the model has no chat template"
    prose = corpus(200_000)
    ids = tokenizer.encode(prose, add_special_tokens=False)
    words = [
        text
        for token_id in range(tokenizer.vocab_size)
        if (text := tokenizer.decode([token_id], skip_special_tokens=True))[:1] == " "
        and text[1:].isascii()
        and text[1:].isalpha()
    ]
    joined = "".join(random.Random(1).choices(words, k=10_000))
    joined_tokens = len(tokenizer.encode(joined, add_special_tokens=False))

    short = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hello there"}]
    talk = [{"role": ("user", "assistant")[i % 2], "content": prose[:200]} for i in range(100)]
    body = json.dumps(
        {"model": "m", "messages": short, "max_tokens": 64, "temperature": 0.5, "stream": True}
    ).encode()
    large = json.dumps({"model": "m", "messages": [{"role": "user", "content": prose}]}).encode()
    chunks, usage = ChatChunks("chatcmpl-0123456789abcdef", 1_700_000_000, "m"), Usage(9, 1, 0)
    choices = [Choice(prose[:200], "stop")]

    def request() -> None:
        decoded = decode_chat(body)
        stop_conditions(decoded)
        sampling_options(decoded)

    def encode(text: str) -> Callable[[], object]:
        return lambda: tokenizer.encode(text, add_special_tokens=False)

    def detokenize(stop: list[str]) -> Callable[[], object]:
        def run() -> None:
            push = IncrementalDetokenizer(tokenizer, stop=stop).push
            for token_id in ids:
                push((token_id,))

        return run

    def stream_of_the_library() -> None:
        stream, inner = DecodeStream(skip_special_tokens=True), tokenizer._tokenizer
        for token_id in ids:
            stream.step(inner, token_id)

    return [
        f"load tokenizer and template: {len(files['tokenizer.json']):,} bytes",
        row("load, once", rounds_us(lambda: Tokenizer.from_files(files), 1), "µs"),
        row("compile the template, once",
            rounds_us(lambda: ChatTemplate.from_files(files), 1), "µs"),
        "",
        "a request",
        row("decode and validate, small", rounds_us(request, 1), "µs"),
        row("decode and validate, per 1k tokens of text",
            rounds_us(lambda: decode_chat(large), len(ids) // 1000), "µs"),
        row("render, 2 messages", rounds_us(lambda: template.render(short, now_ns=0), 1), "µs"),
        row("render, per message of 100",
            rounds_us(lambda: template.render(talk, now_ns=0), 100), "µs"),
        row(f"encode, per 1k tokens of {len(prose) / len(ids):.1f} characters",
            rounds_us(encode(prose), len(ids) // 1000), "µs", "aim < 1,000"),
        row("encode, per 1k tokens of a word each",
            rounds_us(encode(joined), joined_tokens // 1000), "µs", "aim < 1,000"),
        "",
        "an answer",
        row("detokenize, per token", rounds_us(detokenize([]), len(ids)), "µs", "aim ≤ 6"),
        row("detokenize with 4 stop strings, per token",
            rounds_us(detokenize(STOPS), len(ids)), "µs", "aim ≤ 6"),
        row("  the library's own DecodeStream", rounds_us(stream_of_the_library, len(ids)), "µs"),
        row("chunk, per token", rounds_us(lambda: chunks.text(" word"), 1), "µs"),
        row("unary body", rounds_us(lambda: chat_body("i", 1, "m", choices, usage, None), 1), "µs"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
