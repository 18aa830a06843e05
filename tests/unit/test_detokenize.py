"""What is sent, what is held back, and what stops an output."""

import pytest

from frontend.detokenize import HELD_TOKENS_MAX, IncrementalDetokenizer, StopMatcher
from frontend.tokenizer import Tokenizer
from tests.text import BYTE_LEVEL, SENTENCEPIECE, byte_ids, fallback_ids, ids_of

# --- characters -----------------------------------------------------------------------------------


def test_half_a_character_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    texts = [detokenizer.push([token_id]) for token_id in byte_ids("a🙂b".encode())]
    assert texts == ["a", "", "", "", "🙂", "b"]
    assert detokenizer.finish() == ""
    assert detokenizer.token_count == 6


def test_what_never_becomes_a_character_comes_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert detokenizer.push(byte_ids(b"a\xf0\x9f")) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_broken_bytes_hold_nothing_up() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert detokenizer.push(byte_ids(b"\xff\xff\xffa")) == "\ufffd\ufffd\ufffda"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [1, *ids_of("hi"), 2]
    assert IncrementalDetokenizer(BYTE_LEVEL).push(ids) == "hi"
    shown = IncrementalDetokenizer(BYTE_LEVEL, skip_special_tokens=False)
    assert shown.push(ids) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_ids_without_a_token_have_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([-1, 10**6, 2**32, 2**70]) == ""
    assert detokenizer.finish() == ""


def test_a_sentencepiece_output_goes_on_from_its_prompt() -> None:
    hello, world = 259, 260
    assert SENTENCEPIECE.decode([hello, world], skip_special_tokens=True) == "hello world"
    alone = IncrementalDetokenizer(SENTENCEPIECE)
    assert [alone.push([hello]), alone.push([world])] == ["hello", " world"]
    after = IncrementalDetokenizer(SENTENCEPIECE, [world] * 9)
    assert [after.push([hello]), after.push([world])] == [" hello", " world"]
    after_special = IncrementalDetokenizer(SENTENCEPIECE, [world, 1])
    assert after_special.push([hello]) == " hello"


def test_sentencepiece_bytes_are_held_until_they_are_a_character() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE)
    texts = [detokenizer.push([id]) for id in [259, *fallback_ids("漢".encode()), 265]]
    assert texts == ["hello", "", "", "漢", "!"]
    assert detokenizer.push(fallback_ids("漢".encode())[:2]) == ""
    assert detokenizer.finish() == "\ufffd\ufffd"


def test_endless_broken_bytes_are_sent_in_the_end() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE)
    held = 0
    for _ in range(10 * HELD_TOKENS_MAX):
        held = held + 1 - len(detokenizer.push(fallback_ids(b"\xff")))
        assert 0 <= held < HELD_TOKENS_MAX


def test_endless_tokens_without_text_are_forgotten() -> None:
    hello, nothing = 259, 266
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE)
    assert detokenizer.push([hello, *[nothing] * 10 * HELD_TOKENS_MAX, hello]) == "hello hello"


# --- stops ----------------------------------------------------------------------------------------


def pieces(detokenizer: IncrementalDetokenizer, text: str) -> list[str]:
    """What comes out when each byte of the text is a token, and at the end."""
    out = [detokenizer.push([token_id]) for token_id in byte_ids(text.encode())]
    return [*out, detokenizer.finish()]


def test_a_stop_string_is_found_across_tokens_and_cut_off() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["STOP"])
    assert pieces(detokenizer, "aSTxSTOPb") == ["a", "", "", "STx", "", "", "", "", "", ""]
    assert detokenizer.stop_reason == "STOP"
    assert detokenizer.token_count == 8


def test_a_stop_string_may_be_kept() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["STOP"], include_stop=True)
    assert "".join(pieces(detokenizer, "aSTxSTOPb")) == "aSTxSTOP"


def test_what_only_looked_like_a_stop_string_comes_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["STOP"])
    assert pieces(detokenizer, "aSTO") == ["a", "", "", "", "STO"]
    assert detokenizer.stop_reason is None


def test_the_match_that_is_complete_first_counts_and_the_longest_of_those() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["bcd", "c", "bc"])
    assert "".join(pieces(detokenizer, "abcd")) == "a"
    assert detokenizer.stop_reason == "bc"


def test_after_a_stop_nothing_more_comes() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["b"])
    assert detokenizer.push(ids_of("abc")) == "a"
    assert detokenizer.push(ids_of("abc")) == ""
    assert detokenizer.finish() == ""


def test_a_stop_token_ends_the_text_and_frees_what_was_held() -> None:
    end = ids_of("!")[0]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["STOP"], stop_token_ids={end})
    assert detokenizer.push([*byte_ids(b"aST"), end, *byte_ids(b"b")]) == "aST"
    assert detokenizer.stop_reason == end
    assert detokenizer.token_count == 4
    assert detokenizer.finish() == ""


def test_the_first_tokens_stop_nothing() -> None:
    end = ids_of("!")[0]
    ids = byte_ids(b"b!bcb")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["b"], stop_token_ids={end}, min_tokens=3)
    assert detokenizer.push(ids) == "b!bc"
    assert (detokenizer.stop_reason, detokenizer.token_count) == ("b", 5)


def test_text_of_the_first_tokens_begins_no_match() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["ab"], min_tokens=1)
    assert detokenizer.push(byte_ids(b"abab")) == "ab"
    assert detokenizer.token_count == 4


def test_an_output_shorter_than_its_minimum_is_sent_whole() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["\ufffd"], min_tokens=9)
    assert detokenizer.push(byte_ids(b"a\xf0")) + detokenizer.finish() == "a\ufffd"


def test_half_a_character_at_the_end_can_still_be_a_match() -> None:
    end = ids_of("!")[0]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["\ufffd"], stop_token_ids={end})
    assert detokenizer.push([*byte_ids(b"a\xf0"), end]) == "a"
    assert detokenizer.stop_reason == "\ufffd"


def test_a_matcher_falls_back_to_every_shorter_beginning() -> None:
    matcher = StopMatcher(["aabaaa", "baab"], include=False)
    assert "".join(matcher.feed(character) for character in "aabaabaab") == "aa"
    assert matcher.matched == "baab"
