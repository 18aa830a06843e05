"""How many files the frontend lets itself open."""

import resource

import pytest

from frontend.connections import OPEN_FILES, allow_open_files

ANY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "allowed"),
    [
        (1024, 4096, 4096),
        (1024, 10**6, OPEN_FILES),
        (1024, ANY, OPEN_FILES),
        (4096, 4096, 4096),
        (10**6, 10**6, 10**6),
        (ANY, ANY, OPEN_FILES),
    ],
)
def test_the_limit_is_raised_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int
) -> None:
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: calls.append(limits))
    assert allow_open_files() == allowed
    assert calls == ([(allowed, hard)] if 0 < soft < allowed else [])
