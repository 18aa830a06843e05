"""What the options make of a worker's card, and which workers they keep out."""

from pathlib import Path

import pytest

import workers
from frontend.model_options import BadModelPath, ModelOptions
from workers.card import ModelCard

SHIPPED = Path(workers.__file__).parent / "model"
CARD = ModelCard(
    name="own", block_size=16, context_length=64, files={"tokenizer.json": "x"}, eos_token_ids=[3]
)


def test_nothing_said_changes_nothing() -> None:
    options = ModelOptions.read(None, None, None)
    assert options.applied(CARD) == CARD
    assert options.refusal(CARD, ["another"]) is None


def test_a_name_goes_in_place_of_the_workers() -> None:
    options = ModelOptions.read("alias", None, None)
    assert options.applied(CARD).name == "alias"
    assert options.refusal(CARD, []) is None
    assert options.refusal(CARD, ["own"]) is None
    why = options.refusal(CARD, ["another"])
    assert why == "it serves own, and --model-name is for one model, which is another"


def test_files_go_in_place_of_those_that_workers_bring() -> None:
    options = ModelOptions.read(None, SHIPPED, None)
    applied = options.applied(CARD)
    assert applied.files.keys() == {path.name for path in SHIPPED.iterdir()}
    assert applied.eos_token_ids == list(options.eos_token_ids) != CARD.eos_token_ids
    other = ModelCard(name="own", block_size=16, context_length=64, files={}, eos_token_ids=[4])
    assert options.applied(other) == applied, "what their own files are does not matter"
    assert "--model-path" in (options.refusal(CARD, ["another"]) or "")


def test_a_folder_without_the_files_is_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(BadModelPath) as caught:
        ModelOptions.read(None, tmp_path, None)
    assert str(caught.value) == f"--model-path {tmp_path}: tokenizer.json: is missing"


def test_a_broken_chat_template_is_found_at_the_start(tmp_path: Path) -> None:
    for path in SHIPPED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadModelPath, match="template"):
        ModelOptions.read(None, tmp_path, None)


def test_a_worker_of_another_block_size_is_kept_out() -> None:
    options = ModelOptions.read(None, None, 32)
    assert options.applied(CARD).block_size == 16, "its blocks are no longer for that"
    assert options.refusal(CARD, []) == "its block_size is 16, --kv-cache-block-size 32"
    assert ModelOptions.read(None, None, 16).refusal(CARD, ["another"]) is None
