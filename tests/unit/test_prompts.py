"""Prompts that have exactly the prefix structure of the trace they are made from."""

import itertools
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from simulations.prompts import (
    WORDS_MIN,
    PromptMaker,
    UnusableTokenizer,
    Word,
    find_words,
)
from simulations.trace import TRACE_BLOCK_TOKENS


def byte_level_tokenizer(words: list[str]) -> Tokenizer:
    """A byte-level BPE that knows the alphabet and merges its way up to each of `words`."""
    merges: dict[tuple[str, str], None] = {}
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for word in words:
        left = "Ġ"
        for letter in word:
            merges[left, letter] = None
            left += letter
            tokens[left] = None
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


WORDS = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
TOKENIZER = byte_level_tokenizer(WORDS)
FOUND = find_words(TOKENIZER)


def tokens_of(form: str, hash_ids: list[int], input_length: int, seed: int = 0) -> list[int]:
    maker = PromptMaker(FOUND, "text" if form == "text" else "tokens", seed)
    prompt = json.loads(maker.prompt_json(hash_ids, input_length))
    return TOKENIZER.encode(prompt).ids if form == "text" else prompt


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], int]:
    hash_ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    short = draw(st.integers(0, TRACE_BLOCK_TOKENS - 1))
    return hash_ids, len(hash_ids) * TRACE_BLOCK_TOKENS - short


def test_words_are_the_entries_that_stay_one_token_each() -> None:
    assert len(FOUND) == 26 + 26 * 26  # " a" … " z" on the way to " aa" … " zz"
    tokens = [TOKENIZER.id_to_token(word.token_id) for word in FOUND]
    assert [word.text.replace(" ", "Ġ") for word in FOUND] == tokens
    assert {"Ġa", "Ġz", "Ġab"} <= {*tokens}


def test_an_entry_that_encoding_never_reaches_is_no_word() -> None:
    """A vocabulary may hold tokens that no merge makes."""
    tokenizer = byte_level_tokenizer(WORDS)
    model = json.loads(tokenizer.to_str())
    model["model"]["vocab"]["Ġunreachable"] = len(model["model"]["vocab"])
    words = find_words(Tokenizer.from_str(json.dumps(model)))
    assert [word.text for word in words] == [word.text for word in FOUND]


def test_a_tokenizer_of_few_words_is_refused() -> None:
    few = [f"{letter}" for letter in string.ascii_lowercase]
    with pytest.raises(UnusableTokenizer, match=f"has 26 words .* need {WORDS_MIN}"):
        find_words(byte_level_tokenizer(few))


@given(prompts())
def test_text_and_token_prompts_are_the_same_tokens_and_of_exact_length(
    prompt: tuple[list[int], int],
) -> None:
    hash_ids, input_length = prompt
    tokens = tokens_of("tokens", hash_ids, input_length)
    assert len(tokens) == input_length
    assert tokens_of("text", hash_ids, input_length) == tokens


@given(prompts(), prompts())
def test_two_prompts_agree_exactly_as_far_as_their_hash_ids(
    one: tuple[list[int], int], other: tuple[list[int], int]
) -> None:
    """Of whole blocks, and of a shorter partial one as far as it goes."""
    shared = len(
        list(
            itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(one[0], other[0], strict=False)
            )
        )
    )
    a, b = tokens_of("tokens", *one), tokens_of("tokens", *other)
    end = min(shared * TRACE_BLOCK_TOKENS, len(a), len(b))
    assert a[:end] == b[:end]
    # Where the ids part, so do the tokens, within the smallest block size in use.
    if end == shared * TRACE_BLOCK_TOKENS and min(len(a), len(b)) >= end + 16:
        assert a[end : end + 16] != b[end : end + 16]


def test_the_seed_changes_every_block_and_keeps_the_structure() -> None:
    first, second = tokens_of("tokens", [1, 2], 1024, 0), tokens_of("tokens", [1, 2], 1024, 1)
    assert first[:16] != second[:16]
    assert first[512:528] != second[512:528]
    assert tokens_of("tokens", [1, 3], 1024, 1)[:512] == second[:512]


def test_a_seed_means_the_same_prompt_for_ever() -> None:
    """Caches filled in one run must be found by the next, also of another version."""
    words = [Word(f" w{number}", number) for number in range(1000)]
    prompt = PromptMaker(words, "tokens", seed=7).prompt_json([42], 6)
    assert prompt == b"[226,805,602,375,100,566]"
