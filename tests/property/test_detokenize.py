"""However an output is cut, its text is the same, and ends where the first stop string is."""

from collections.abc import Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from frontend.detokenize import IncrementalDetokenizer, StopMatcher
from tests.text import BYTE_LEVEL, SENTENCEPIECE, fallback_ids

# Byte tokens meet in all ways, words are mostly whole characters, specials come now and then.
byte_tokens = st.integers(3, 258)
byte_level_ids = st.lists(
    st.one_of(byte_tokens, st.integers(0, BYTE_LEVEL.vocab_size - 1)), max_size=40
)
# For a decoder that looks at neighbours, texts of whole characters.
sentencepiece_ids = st.lists(
    st.one_of(
        st.integers(258, 265).map(lambda token_id: [token_id]),
        st.just([1]),
        st.characters(codec="utf-8").map(lambda character: fallback_ids(character.encode())),
    ),
    max_size=20,
).map(lambda groups: list(chain.from_iterable(groups)))
small_texts = st.text(alphabet="ab\ufffd", max_size=30)
stop_strings = st.lists(
    st.text(alphabet="ab\ufffd", min_size=1, max_size=5), min_size=1, max_size=4
)


def cut(data: st.DataObject, ids: Sequence[int]) -> list[Sequence[int]]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]


def until_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The text up to the match that is complete first, the longest of those; and the match."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


@given(st.data(), byte_level_ids, st.booleans())
def test_the_pieces_of_a_byte_level_output_are_its_text(
    data: st.DataObject, ids: list[int], skip: bool
) -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, [5, 6], skip_special_tokens=skip)
    texts = [detokenizer.push(piece) for piece in cut(data, ids)]
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(texts) + detokenizer.finish() == whole
    assert detokenizer.token_count == len(ids)


@given(st.data(), sentencepiece_ids, st.lists(st.integers(259, 265), max_size=7), st.booleans())
def test_the_pieces_of_a_sentencepiece_output_are_its_text_after_the_prompt(
    data: st.DataObject, ids: list[int], prompt: list[int], skip: bool
) -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE, prompt, skip_special_tokens=skip)
    texts = [detokenizer.push(piece) for piece in cut(data, ids)]
    before = SENTENCEPIECE.decode(prompt, skip_special_tokens=skip)
    whole = SENTENCEPIECE.decode([*prompt, *ids], skip_special_tokens=skip)
    assert before + "".join(texts) + detokenizer.finish() == whole


@given(byte_level_ids)
def test_no_piece_ends_inside_a_character(ids: list[int]) -> None:
    """What is sent never changes later, and what is held back is no character yet."""
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    sent = ""
    for count, token_id in enumerate(ids, start=1):
        sent += detokenizer.push([token_id])
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=True).startswith(sent)
        whole = BYTE_LEVEL.decode(ids[:count], skip_special_tokens=True)
        assert whole.startswith(sent)
        assert whole[len(sent) :] in ("", "\ufffd", "\ufffd" * 2)


@given(st.data(), small_texts, stop_strings, st.booleans())
def test_a_matcher_ends_at_the_first_match(
    data: st.DataObject, text: str, stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    sent = ""
    for piece in cut(data, [ord(character) for character in text]):
        sent += matcher.feed("".join(map(chr, piece)))
        if matcher.matched is not None:
            break
    expected, matched = until_stop(text, stops, include)
    assert matcher.matched == matched
    assert (sent if matched else sent + matcher.take_held()) == expected


@given(small_texts, stop_strings)
def test_a_matcher_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include=False)
    sent = "".join(matcher.feed(character) for character in text if matcher.matched is None)
    if matcher.matched is None:
        begun = (
            text[at:] for at in range(len(text)) if any(s.startswith(text[at:]) for s in stops)
        )
        assert text[len(sent) :] == next(begun, "")


@given(
    st.data(),
    st.lists(st.one_of(st.sampled_from([67, 68, 69, 2]), byte_tokens), max_size=30),
    stop_strings,
    st.booleans(),
    st.integers(0, 6),
)
def test_an_output_with_stops_is_its_text_up_to_the_first(
    data: st.DataObject, ids: list[int], stops: list[str], include: bool, min_tokens: int
) -> None:
    detokenizer = IncrementalDetokenizer(
        BYTE_LEVEL, stop=stops, include_stop=include, min_tokens=min_tokens
    )
    text = "".join(detokenizer.push(piece) for piece in cut(data, ids)) + detokenizer.finish()

    unstopped = IncrementalDetokenizer(BYTE_LEVEL)
    first = unstopped.push(ids[:min_tokens])
    rest = unstopped.push(ids[min_tokens:]) + unstopped.finish()
    if len(ids) <= min_tokens:
        assert (text, detokenizer.stop_reason) == (first + rest, None)
    else:
        expected, matched = until_stop(rest, stops, include)
        assert (text, detokenizer.stop_reason) == (first + expected, matched)
