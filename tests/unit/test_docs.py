"""The generated pages are those that the declarations make now."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from eventstore.events import AnyEvent

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("name", ["settings.md", "events.md", "metrics.md"])
def test_a_page_is_up_to_date(generate: ModuleType, name: str) -> None:
    stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert generate.PAGES[name]() == stored, "run python docs/generate.py"


def test_every_event_and_its_subject_are_on_the_page(generate: ModuleType) -> None:
    page = generate.events_page()
    for event in get_args(AnyEvent):
        assert f"### `{event.__struct_config__.tag}`" in page
        assert all(f"| `{field}` |" in page for field in event.__struct_fields__)
    assert all(f"## `{subject}`" in page for subject in generate.SUBJECTS.values())


def test_the_tables_of_settings_are_found(generate: ModuleType) -> None:
    programs = [table.program for table in generate.settings_tables()]
    assert "python -m frontend" in programs
    assert len(set(programs)) == len(programs)


def test_a_cell_cannot_break_its_table(generate: ModuleType) -> None:
    lines = list(generate.markdown_table(("A", "B"), [("x | y", "one\ntwo")]))
    assert lines == ["| A | B |", "| --- | --- |", "| x \\| y | one two |"]


def test_check_writes_nothing_and_says_what_is_stale(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"a.md": lambda: "text\n"})
    assert generate.main(["--check"]) == 1
    assert not (tmp_path / "a.md").exists()
    assert "docs/a.md" in capsys.readouterr().out
    assert generate.main([]) == 0
    assert (tmp_path / "a.md").read_text() == "text\n"
    assert generate.main(["--check"]) == 0
