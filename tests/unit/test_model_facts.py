"""What is read from a model's files, and what is wrong with them."""

import json
from pathlib import Path

import pytest
import tokenizers

import workers
from workers.errors import BadModelFile
from workers.model_facts import ModelFacts
from workers.models import read_model

SHIPPED = Path(workers.__file__).parent / "model"


def test_the_shipped_model_says_what_a_card_and_an_engine_need() -> None:
    files = read_model(SHIPPED)
    facts = ModelFacts.read(files)
    assert facts.context_length == 131_072
    tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    assert facts.eos_token_ids == [tokenizer.token_to_id("<|im_end|>")]
    assert len(facts.text_token_ids) > 1000
    assert not set(facts.eos_token_ids) & set(facts.text_token_ids)
    assert all(tokenizer.decode([each]).isprintable() for each in facts.text_token_ids)


def test_the_end_token_may_be_named_in_other_files() -> None:
    files = read_model(SHIPPED)
    expected = ModelFacts.read(files).eos_token_ids
    without = {**files, "generation_config.json": b"{}"}
    assert ModelFacts.read(without).eos_token_ids == expected
    without["config.json"] = b"{}"
    assert ModelFacts.read(without).eos_token_ids == expected
    assert ModelFacts.read(without).context_length is None
    without["tokenizer_config.json"] = json.dumps({"eos_token": {"content": "<|im_end|>"}}).encode()
    assert ModelFacts.read(without).eos_token_ids == expected
    without["tokenizer_config.json"] = b"{}"
    assert ModelFacts.read(without).eos_token_ids == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[1]", "not a JSON object"),
        ("generation_config.json", b"\xff", "not JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff", "not a tokenizer"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, why: str) -> None:
    with pytest.raises(BadModelFile, match=rf"{name}: is {why}"):
        ModelFacts.read({**read_model(SHIPPED), name: content})


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"tokenizer\.json: is missing"):
        read_model(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BadModelFile, match=r"tokenizer\.json"):
        read_model(tmp_path)
