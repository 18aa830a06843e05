"""Settings: precedence, errors that name their source, refusals, and help."""

import tomllib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
import pytest

from eventstore.process_settings import ProcessSettings, default_data_dir, nats_servers
from eventstore.settings import (
    VERSION,
    Option,
    Settings,
    SettingsError,
    Shown,
    declarations,
    from_command_line,
    help_text,
    parse,
    unknown_environment,
)
from frontend.settings import FrontendSettings

ROOT = Path(__file__).resolve().parents[2]


def even(value: int) -> None:
    if value % 2:
        raise ValueError(f"{value} is odd")


class Base(Settings, frozen=True, kw_only=True):
    shared: Annotated[str, Option("X_SHARED", "Of the base.", group="Shared")] = "base"


class Sample(Base, frozen=True, kw_only=True):
    """A table with an option of each kind.

    And a second paragraph.
    """

    program: ClassVar[str] = "python -m sample"

    file: Annotated[Path, Option("", "The input.", group="First", positional=True)]
    port: Annotated[int, Option("X_PORT", "A number.", ge=0, le=9)] = 3
    pairs: Annotated[int, Option("X_PAIRS", "An even number.", check=even)] = 2
    ratio: Annotated[float, Option("X_RATIO", "A share.", gt=0, aliases=("--share",))] = 0.5
    wait_secs: Annotated[
        float | None, Option("X_WAIT", "A time.", group="Second", unit="seconds", unset="for ever")
    ] = 1.5
    mode: Annotated[
        Literal["red", "green"], Option("X_MODE", "A colour.", available_choices=("red",))
    ] = "red"
    talk: Annotated[bool, Option("X_TALK", "A switch.", aliases=("-t", "--chat"))] = True
    url: Annotated[tuple[str, ...], Option("X_URLS", "Many.")] = ()
    hidden: Annotated[int, Option(("X_HIDDEN", "X_OLD"), "No flag.", flag=False)] = 7
    later: Annotated[bool, Option("X_LATER", "Not built.", available=False)] = True
    later_count: Annotated[int, Option("X_LATER_COUNT", "Not built.", available=False, ge=0)] = 4


def sample(*argv: str, **env: str) -> Sample:
    return parse(Sample, ["in.txt", *argv], env)


def error_of(*argv: str, **env: str) -> str:
    with pytest.raises(SettingsError) as caught:
        sample(*argv, **env)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- where a value comes from -----------------------------------------------------------------


def test_the_command_line_goes_before_the_environment_before_the_default() -> None:
    assert sample().port == 3
    assert sample(X_PORT="5").port == 5
    assert sample("--port", "6", X_PORT="5").port == 6
    assert sample("--port", "6", X_PORT="nonsense").port == 6, "it does not count, so isn't read"


def test_the_last_one_given_counts() -> None:
    assert sample("--port", "1", "--port=2").port == 2
    assert sample("--talk", "--no-talk").talk is False
    assert sample("--no-talk", "--talk", X_TALK="0").talk is True
    assert sample("--no-chat").talk is False
    assert sample("-t", X_TALK="off").talk is True


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE", " On "])
def test_true_in_the_environment(text: str) -> None:
    assert sample(X_TALK=text).talk is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "False", " OFF "])
def test_false_in_the_environment(text: str) -> None:
    assert sample(X_TALK=text).talk is False


def test_a_beginning_of_a_flag_is_enough_if_it_is_unambiguous() -> None:
    assert sample("--por", "4").port == 4
    assert sample("--no-ta").talk is False
    assert "ambiguous" in error_of("--p", "4")


def test_an_exact_flag_is_not_ambiguous() -> None:
    assert sample("--later").later is True, "although --later-count begins so too"


def test_an_alias_is_the_same_option() -> None:
    assert sample("--share", "0.25").ratio == 0.25


@pytest.mark.parametrize("text", ["", " ", "None", "none"])
def test_a_nullable_option_can_be_unset(text: str) -> None:
    assert sample(X_WAIT=text).wait_secs is None
    assert sample(f"--wait-secs={text}").wait_secs is None


def test_a_positional_option_is_needed() -> None:
    assert sample().file == Path("in.txt")
    with pytest.raises(SettingsError, match="FILE"):
        parse(Sample, [], {})


def test_a_repeated_option() -> None:
    assert sample().url == ()
    assert sample("--url", "a", "--url", "b").url == ("a", "b")
    assert sample(X_URLS=" a  b ").url == ("a", "b")
    assert sample(X_URLS="").url == ()


def test_two_spellings_of_a_variable() -> None:
    assert sample(X_HIDDEN="1").hidden == sample(X_OLD="1").hidden == 1
    assert sample(X_HIDDEN="1", X_OLD="1").hidden == 1
    assert error_of(X_HIDDEN="1", X_OLD="2") == (
        "X_HIDDEN and X_OLD are one option but say different things"
    )


# --- what is refused, and how it is said ------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "variable", "text", "reason"),
    [
        ("--port", "X_PORT", "abc", "'abc' is not a whole number"),
        ("--port", "X_PORT", "1.5", "'1.5' is not a whole number"),
        ("--port", "X_PORT", "", "a value is needed"),
        ("--port", "X_PORT", "10", "10 is out of range (0 to 9)"),
        ("--port", "X_PORT", "-1", "-1 is out of range (0 to 9)"),
        ("--port", "X_PORT", "1" + "0" * 400, f"1{'0' * 400} is out of range (0 to 9)"),
        ("--ratio", "X_RATIO", "0", "0 is out of range (above 0)"),
        ("--ratio", "X_RATIO", "much", "'much' is not a number"),
        ("--ratio", "X_RATIO", "nan", "'nan' is not a finite number"),
        ("--wait-secs", "X_WAIT", "inf", "'inf' is not a finite number"),
        ("--pairs", "X_PAIRS", "3", "3 is odd"),
        ("--mode", "X_MODE", "blue", "'blue' is not one of red, green"),
        ("--mode", "X_MODE", "green", "green is not available yet, only red"),
        ("--shared", "X_SHARED", " ", "a value is needed"),
    ],
)
def test_a_bad_value_names_the_flag_or_the_variable_that_carried_it(
    flag: str, variable: str, text: str, reason: str
) -> None:
    assert error_of(f"{flag}={text}") == f"{flag}: {reason}"
    assert error_of(**{variable: text}) == f"{variable}: {reason}"


@pytest.mark.parametrize("text", ["maybe", "", "2", "y", "None"])
def test_a_switch_takes_no_other_word(text: str) -> None:
    assert error_of(X_TALK=text).startswith("X_TALK: ")


def test_what_is_not_available_takes_its_default_only() -> None:
    assert sample("--later", "--later-count=4", X_LATER="yes").later is True
    assert sample(X_LATER_COUNT="4", X_MODE="red").later_count == 4
    assert error_of("--no-later") == "--no-later is not available yet"
    assert error_of(X_LATER="0") == "X_LATER is not available yet"
    assert error_of("--later-count", "5") == "--later-count is not available yet"
    assert error_of(X_LATER_COUNT="5") == "X_LATER_COUNT is not available yet"
    assert error_of(X_LATER_COUNT="-1").endswith("out of range (at least 0)")


def test_unknown_options_are_refused_with_a_suggestion() -> None:
    assert error_of("--prot", "1") == "unknown option --prot (did you mean --port?)"
    assert error_of("--no-tolk") == "unknown option --no-tolk (did you mean --no-talk?)"
    assert error_of("--zzzzzz=1") == "unknown option --zzzzzz"
    assert error_of("-p") == "unknown option -p"
    assert error_of("more") == "unexpected argument 'more'"
    assert error_of("--hidden", "1").startswith("unknown option --hidden")


def test_a_switch_takes_no_value_and_others_need_one() -> None:
    assert "--talk" in error_of("--talk=true")
    assert "--port" in error_of("--port")


def test_errors_and_help_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_command_line(Sample, ["in.txt", "--port=x"], {})
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err == "Error: --port: 'x' is not a whole number\n"

    with pytest.raises(SystemExit) as end:
        from_command_line(Sample, ["--version"], {})
    assert (end.value.code, capsys.readouterr().out) == (0, f"reckon {VERSION}\n")

    with pytest.raises(SystemExit) as end:
        from_command_line(Sample, ["--port=x", "-h"], {})
    assert (end.value.code, capsys.readouterr().out) == (0, help_text(Sample) + "\n")

    assert from_command_line(Sample, ["in.txt"], {}) == sample()


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


# --- declarations and help --------------------------------------------------------------------


def test_a_base_comes_after_its_own_options() -> None:
    declared = declarations(Sample)
    assert [declared[0].name, declared[-1].name] == ["file", "shared"]
    assert [each.group for each in declared if each.name in ("port", "wait_secs", "mode")] == [
        "First",
        "Second",
        "Second",
    ]


def test_help_says_all_of_an_option() -> None:
    with pytest.raises(Shown) as shown:
        parse(Sample, ["--help"], {"X_PORT": "nonsense"})
    text = str(shown.value)
    entry = " ".join(text.split())
    assert "usage: python -m sample FILE [options]" in entry
    assert "A table with an option of each kind." in entry
    assert "env var: X_PORT | default: 3 | range: 0 to 9" in entry
    assert "--wait-secs SECONDS A time. env var: X_WAIT | default: 1.5 | unit: seconds" in entry
    assert "--ratio FLOAT" in entry
    assert "range: above 0 | also: --share" in entry
    assert "--mode {red,green}" in entry
    assert "available now: red" in entry
    assert "-t, --talk / --no-talk A switch." in entry
    assert "X_HIDDEN No flag. env var: X_HIDDEN or X_OLD | default: 7" in entry
    assert "--later / --no-later (not available yet)" in entry
    assert "may be given several times" in entry
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        Annotated[int, "no option"],
        Annotated[int, Option("X", "No group.")],
        Annotated[bytes, Option("X", "Not a kind of option.", group="G")],
    ],
)
def test_a_wrong_declaration_is_a_type_error(annotation: object) -> None:
    table = msgspec.defstruct("Wrong", [("x", annotation, 1)], bases=(Settings,), kw_only=True)
    assert issubclass(table, Settings)
    with pytest.raises(TypeError, match="x: "):
        declarations(table)


# --- what all processes share -----------------------------------------------------------------


def test_nats_addresses() -> None:
    one = "nats://127.0.0.1:4222"
    assert nats_servers(one) == (one,)
    assert nats_servers("a:4222, tls://b:4223") == ("a:4222", "tls://b:4223")
    assert parse(ProcessSettings, [], {}).nats_addresses() == ()
    assert parse(ProcessSettings, [], {"NATS_SERVER": one}).nats_addresses() == (one,)


@pytest.mark.parametrize("text", ["a,,b", "http://a:1", "nats://", "a:port", "a:70000", "a:-1"])
def test_what_is_no_nats_address(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^NATS_SERVER: "):
        parse(ProcessSettings, [], {"NATS_SERVER": text})


def test_the_data_directory_is_below_the_users_state_directory() -> None:
    assert default_data_dir({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/reckon")
    assert default_data_dir({"HOME": "/h"}) == Path("/h/.local/state/reckon")
    assert default_data_dir({"XDG_STATE_HOME": "rel", "HOME": "/h"}) == Path(
        "/h/.local/state/reckon"
    ), "a relative path is to be ignored, says the specification"


def test_a_bad_log_filter_is_refused_at_the_start() -> None:
    with pytest.raises(SettingsError, match=r"^DYN_LOG: 'loud' is not a level"):
        parse(ProcessSettings, [], {"DYN_LOG": "info,router=loud"})


def test_variables_that_nobody_declared() -> None:
    env = {"DYN_ROUTER_MOD": "kv", "RECKON_X": "1", "DYN_LOG": "info", "HOME": "/", "DYNAMIC": "1"}
    assert unknown_environment(env, FrontendSettings) == ["DYN_ROUTER_MOD", "RECKON_X"]
    assert unknown_environment(env, Sample) == ["DYN_LOG", "DYN_ROUTER_MOD", "RECKON_X"]
    assert unknown_environment({"DYN_LOG": ""}, Sample, FrontendSettings) == []
