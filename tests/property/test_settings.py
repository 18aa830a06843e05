"""Laws of settings: the command line and the environment say the same things in the same way."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventstore.settings import (
    Declared,
    Option,
    Settings,
    SettingsError,
    Shown,
    declarations,
    parse,
)
from frontend.settings import FrontendSettings


class Kinds(Settings, frozen=True, kw_only=True):
    program: ClassVar[str] = "python -m kinds"

    whole: Annotated[int, Option("X_WHOLE", "", group="Kinds", ge=-5, le=10**9)] = 0
    any_whole: Annotated[int | None, Option("X_ANY_WHOLE", "")] = None
    real: Annotated[float, Option("X_REAL", "", gt=-1)] = 0.0
    any_real: Annotated[float | None, Option("X_ANY_REAL", "")] = None
    text: Annotated[str, Option("X_TEXT", "")] = "x"
    any_text: Annotated[str | None, Option("X_ANY_TEXT", "")] = None
    path: Annotated[Path, Option("X_PATH", "")] = Path(".")
    choice: Annotated[Literal["a", "b"], Option("X_CHOICE", "", available_choices=("a",))] = "a"
    later: Annotated[int, Option("X_LATER", "", available=False)] = 1


KINDS = declarations(Kinds)
SWITCHES = [each for each in declarations(FrontendSettings) if each.negated]
TEXTS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["", " ", "None", "a", "b", "1", "true", "-1", "--x", "1e3", "0x10", "=", "a b"]
    ),
)


def outcome(table: type[Settings], argv: list[str], env: dict[str, str], name: str) -> Any:
    """The value of an option, or the reason why there is none without the source's name."""
    try:
        return getattr(parse(table, argv, env), name)
    except SettingsError as error:
        message = str(error)
        for source in (*argv, *env):
            message = message.removeprefix(source.partition("=")[0])
        return SettingsError, message


@given(st.sampled_from(KINDS), TEXTS)
def test_a_text_means_the_same_on_the_command_line_and_in_the_environment(
    each: Declared, text: str
) -> None:
    """outcome(--x=text) == outcome(X=text)"""
    flag = outcome(Kinds, [f"{each.flag}={text}"], {}, each.name)
    assert flag == outcome(Kinds, [], {each.variables[0]: text}, each.name)


@given(st.sampled_from(SWITCHES), st.booleans(), st.sampled_from(["true", "1", "yes", "ON"]))
def test_a_switch_means_the_same_on_the_command_line_and_in_the_environment(
    each: Declared, value: bool, yes: str
) -> None:
    """outcome(--x) == outcome(X=yes), outcome(--no-x) == outcome(X=no)"""
    flag = outcome(FrontendSettings, [each.flag if value else each.negated], {}, each.name)
    no = {"true": "false", "1": "0", "yes": "no", "ON": "OFF"}[yes]
    env = {each.variables[0]: yes if value else no}
    assert flag == outcome(FrontendSettings, [], env, each.name)


@given(st.integers(-5, 10**9), st.floats(-0.5, 1e300), st.text(min_size=1))
def test_a_value_written_out_is_read_back(whole: int, real: float, text: str) -> None:
    """parse(str(v)) == v for every value within the bounds"""
    env = {"X_WHOLE": str(whole), "X_REAL": repr(real)}
    settings = parse(Kinds, [], env)
    assert (settings.whole, settings.real) == (whole, real)
    if text.strip():
        assert parse(Kinds, [f"--text={text}"], {}).text == text


@given(st.integers(), st.integers(), st.integers())
def test_precedence(default: int, variable: int, flag: int) -> None:
    """flag > variable > default, whatever the values"""

    class Table(Settings, frozen=True, kw_only=True):
        x: Annotated[int, Option("X", "", group="G")] = default

    assert parse(Table, [], {}).x == default
    assert parse(Table, [], {"X": str(variable)}).x == variable
    assert parse(Table, [f"--x={flag}"], {"X": str(variable)}).x == flag


ARGUMENTS = st.one_of(
    TEXTS,
    st.sampled_from([name for each in KINDS for name in (each.flag, each.flag[:4])]),
    st.builds("{}={}".format, st.sampled_from([each.flag for each in KINDS]), TEXTS),
)


@given(st.lists(ARGUMENTS, max_size=6))
def test_any_command_line_gives_settings_or_one_line(argv: list[str]) -> None:
    """parse never raises anything else than SettingsError or Shown"""
    try:
        parse(Kinds, argv, {})
    except SettingsError as error:
        assert str(error)
    except Shown:
        assert any(argument.startswith(("-h", "--h", "--v")) for argument in argv)


def test_every_option_of_the_kinds_is_tried() -> None:
    assert {each.kind for each in KINDS} == {int, float, str, Path}
    with pytest.raises(SettingsError):
        parse(Kinds, ["--later=2"], {})
