"""Loading a model's tokenizer files, and the tokenizer that ships with the mock worker."""

import random
import re
from pathlib import Path

import msgspec
import pytest
import tokenizers
from tokenizers import AddedToken, processors

from frontend.tokenizer import FILE_NAMES, BadTokenizer, TokenBytes, Tokenizer, read_files
from tests.text import MODEL
from workers import make_tokenizer

FILES = read_files(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(FILES)


def shipped() -> tokenizers.Tokenizer:
    """The library's own tokenizer, ours to change."""
    return tokenizers.Tokenizer.from_buffer(FILES["tokenizer.json"])


def with_config(**changes: object) -> dict[str, bytes]:
    config = msgspec.json.decode(FILES["tokenizer_config.json"], type=dict[str, object])
    files = {name: FILES[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    return {**files, "tokenizer_config.json": msgspec.json.encode({**config, **changes})}


# --- the shipped model ----------------------------------------------------------------------------


def test_the_shipped_files_are_those_of_the_script() -> None:
    assert make_tokenizer.model_files(shipped()) == FILES


def test_a_text_of_shipped_words_is_one_token_per_word(tokenizer: Tokenizer) -> None:
    vocabulary = shipped().get_vocab()
    words = {" " + token[1:]: id for token, id in vocabulary.items() if re.match("Ġ[a-z]+$", token)}
    assert len(words) >= 1500
    chosen = random.Random(1).choices(sorted(words), k=20_000)
    ids = [words[word] for word in chosen]
    text = "".join(chosen)
    assert tokenizer.encode(text, add_special_tokens=True) == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for before in ("", "\n", "<|im_start|>user\n", "x.", "9", "\t \n", "x"):
        head = tokenizer.encode(before, add_special_tokens=False)
        assert tokenizer.encode(before + text, add_special_tokens=False) == head + ids


def test_the_shipped_tokenizer_is_small() -> None:
    assert len(FILES["tokenizer.json"]) < 500_000
    assert Tokenizer.from_files(FILES).vocab_size == make_tokenizer.VOCAB_SIZE


def test_training_twice_gives_the_same_bytes() -> None:
    corpus = ["a library of words", "words of a library"] * 50
    first, second = (make_tokenizer.train(iter(corpus)).to_str() for _ in range(2))
    assert first == second


def test_the_corpus_is_the_docstrings_of_modules(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('"""One."""\n\ndef f():\n    """Two."""\n\nx = "no"\n')
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "left_out.py").write_text('"""Not this."""\n')
    assert list(make_tokenizer.docstrings(tmp_path)) == ["One.", "Two."]


# --- encoding -------------------------------------------------------------------------------------


def test_special_tokens_in_a_text_are_recognised(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"


def test_added_specials_follow_the_models_own_configuration() -> None:
    changed = shipped()
    changed.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ours = Tokenizer(changed, ())
    assert ours.encode("hi", add_special_tokens=True) == [
        0,
        *ours.encode("hi", add_special_tokens=False),
    ]


def test_a_length_limit_in_the_file_is_not_ours() -> None:
    changed = shipped()
    changed.enable_truncation(3)
    changed.enable_padding(length=64)
    ours = Tokenizer.from_files({**FILES, "tokenizer.json": changed.to_str().encode()})
    text = "one two three four five six"
    ids = ours.encode(text, add_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["", "\x00", "a\x00b", "é漢🙂", "e\u0301", "\u2028\ufeff", "\n" * 99]
)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_lone_surrogates_count_as_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\ud800b\udc00", add_special_tokens=False)
    assert ids == tokenizer.encode("a\ufffdb\ufffd", add_special_tokens=False)


def test_knows_tells_ids_from_numbers(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    assert tokenizer.knows([])
    assert tokenizer.knows([0, last])
    assert not tokenizer.knows([0, last + 1])
    assert not tokenizer.knows([-1])
    assert not tokenizer.knows([2**70])


# --- files ----------------------------------------------------------------------------------------


def test_the_end_tokens_come_from_the_first_file_that_names_them() -> None:
    generation, config = b'{"eos_token_id": [2, 0, 2]}', b'{"eos_token_id": 7}'
    base = with_config()
    named = {**base, "config.json": config, "generation_config.json": generation}
    assert Tokenizer.from_files(named).eos_token_ids == (2, 0)
    silent = {**base, "config.json": config, "generation_config.json": b'{"eos_token_id": null}'}
    assert Tokenizer.from_files(silent).eos_token_ids == (7,)
    assert Tokenizer.from_files(base).eos_token_ids == (2,)
    as_object = with_config(eos_token={"content": "<|endoftext|>", "special": True})
    assert Tokenizer.from_files(as_object).eos_token_ids == (0,)
    assert Tokenizer.from_files(with_config(eos_token=None)).eos_token_ids == ()
    assert Tokenizer.from_files(with_config(eos_token="nowhere")).eos_token_ids == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"{" * 5000),
        ("config.json", b"nonsense"),
        ("config.json", b'{"eos_token_id": "2"}'),
        ("generation_config.json", b'{"eos_token_id": [-1]}'),
        ("generation_config.json", b'{"eos_token_id": [true]}'),
        ("generation_config.json", b'{"eos_token_id": 4294967296}'),
    ],
)
def test_a_missing_or_broken_file_is_named(name: str, content: bytes | None) -> None:
    files = {**FILES, name: content} if content is not None else dict(FILES)
    if name != "generation_config.json":
        files.pop("generation_config.json")
    if content is None:
        del files[name]
    with pytest.raises(BadTokenizer) as raised:
        Tokenizer.from_files({key: value for key, value in files.items() if value is not None})
    assert raised.value.file_name == name
    assert str(raised.value).startswith(name + ": ")


def test_a_wrong_end_token_is_named() -> None:
    with pytest.raises(BadTokenizer, match="eos_token"):
        Tokenizer.from_files(with_config(eos_token=3))


def test_a_directory_gives_the_files_it_has(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "weights.bin").write_bytes(b"no")
    assert read_files(tmp_path) == {"tokenizer.json": b"{}"}
    assert set(read_files(MODEL)) <= set(FILE_NAMES)
    with pytest.raises(BadTokenizer, match=r"tokenizer_config\.json: is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadTokenizer, match=r"^config\.json: "):
        read_files(tmp_path)


# --- token bytes ----------------------------------------------------------------------------------


def test_token_bytes_are_those_the_library_decodes() -> None:
    changed = shipped()
    changed.add_tokens([" with space", "é", "Ġmark", AddedToken("x y", special=True)])
    token_bytes = TokenBytes(changed)
    for token_id in range(changed.get_vocab_size()):
        expected = changed.decode([token_id], skip_special_tokens=False)
        assert token_bytes[token_id].decode("utf-8", "replace") == expected


@pytest.mark.parametrize("token_id", [-1, 8192, 2**32, -(2**70)])
def test_an_id_without_a_token_stands_for_nothing(tokenizer: Tokenizer, token_id: int) -> None:
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes[token_id] == b""
    assert token_id not in tokenizer.token_bytes
