"""Settings from the command line and the environment, and the text of `--help`.

The tables that are read here are declared with `eventstore.options`. The command line goes before
the environment, the environment before the default. Only the value that counts is read, and it is
read the same way wherever it came from; an error names the flag or the variable that carried it.

- A bool is a pair `--x` / `--no-x`. The last one given counts, as of any option. Unambiguous
  beginnings of long flags work.
- An empty text or `None` unsets a nullable option and is an error for any other.
- An option that is not available yet takes its default, which changes nothing, and no other value.

Nothing here reads the process's own environment or arguments: its `__main__` passes them.
"""

import argparse
import difflib
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import cleandoc
from typing import Any, NoReturn, TypeVar

from eventstore.errors import EventStoreError
from eventstore.options import Declared, Option, Settings, declarations

__all__ = [
    "VERSION",
    "Declared",
    "Option",
    "Settings",
    "SettingsError",
    "Shown",
    "declarations",
    "from_command_line",
    "help_text",
    "parse",
    "read",
    "sources",
    "unknown_environment",
]

VERSION = "0.1.0"
"""Of the whole project, as in pyproject.toml."""

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
_OUR_VARIABLES = ("DYN_", "RECKON_")
_HELP_COLUMNS = 88

S = TypeVar("S", bound=Settings)


class SettingsError(Exception):
    """What is wrong with a setting, in one line that names the flag or the variable."""


class Shown(Exception):
    """The command line asked for a text (`--help`, `--version`) instead of a run."""


def parse(table: type[S], argv: Sequence[str], env: Mapping[str, str]) -> S:
    """The settings that a command line (without the program's name) and an environment make.

    Raises SettingsError, or Shown where the text is asked for instead.
    """
    given = _command_line(table, argv)
    values = {}
    for each in declarations(table):
        source, texts = given.get(each.name) or _from_environment(each, env)
        if texts:
            values[each.name] = _value(each, source, texts)
        elif each.needed:
            raise SettingsError(f"{each.flag or each.variables[0]} is needed")
    return table(**values)


def sources(table: type[Settings], argv: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The flag or the variable that each value is from; an option that is not here has its default.

    Raises as `parse` does, but reads no value.
    """
    given = _command_line(table, argv)
    found = {
        each.name: (given.get(each.name) or _from_environment(each, env))[0]
        for each in declarations(table)
    }
    return {name: source for name, source in found.items() if source}


def from_command_line(table: type[S], argv: Sequence[str], env: Mapping[str, str]) -> S:
    """`parse` for a `__main__`: prints and exits, with 0 after `--help`, with 2 after an error."""
    try:
        return parse(table, argv, env)
    except Shown as shown:
        try:
            print(shown, flush=True)
        except BrokenPipeError:
            # Whoever reads has seen enough, such as `head`; nothing may be written at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SettingsError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def unknown_environment(env: Mapping[str, str], *tables: type[Settings]) -> list[str]:
    """Variables that look like ours but set nothing in `tables`, sorted. For a warning."""
    known = {name for table in tables for each in declarations(table) for name in each.variables}
    return sorted(name for name in env if name.startswith(_OUR_VARIABLES) and name not in known)


def read(declared: Declared, text: str) -> Any:
    """The one value that `text` says. Raises ValueError or EventStoreError with the reason."""
    bare = text.strip()
    if declared.nullable and bare.lower() in ("", "none"):
        return None
    if not bare:
        raise ValueError("a value is needed")
    value: Any
    if declared.kind is bool:
        if bare.lower() not in TRUE + FALSE:
            raise ValueError(f"{text!r} is not one of {', '.join(TRUE + FALSE)}")
        value = bare.lower() in TRUE
    elif declared.kind in (int, float):
        value = _number(declared, bare)
    elif declared.choices:
        if bare not in declared.choices:
            raise ValueError(f"{text!r} is not one of {', '.join(declared.choices)}")
        value = bare
    else:
        value = declared.kind(text)
    if declared.option.check is not None:
        declared.option.check(value)
    return value


def _number(declared: Declared, text: str) -> int | float:
    try:
        value: int | float = declared.kind(text)
    except ValueError:
        what = "a whole number" if declared.kind is int else "a number"
        raise ValueError(f"{text!r} is not {what}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    if not declared.contains(value):
        raise ValueError(f"{text} is out of range ({declared.range})")
    return value


def _value(declared: Declared, source: str, texts: Sequence[str]) -> Any:
    try:
        if declared.repeated:
            value: Any = tuple(read(declared, text) for text in texts)
        else:
            value = read(declared, texts[-1])
    except (ValueError, EventStoreError) as error:
        raise SettingsError(f"{source}: {error}") from None
    if value != declared.default:
        if not declared.option.available:
            raise SettingsError(f"{source} is not available yet")
        built = declared.option.available_choices
        if built and value not in built:
            raise SettingsError(f"{source}: {value} is not available yet, only {', '.join(built)}")
    return value


def _from_environment(declared: Declared, env: Mapping[str, str]) -> tuple[str, list[str]]:
    found = [name for name in declared.variables if name in env]
    if not found:
        return "", []
    first = found[0]
    for other in found[1:]:
        if env[other] != env[first]:
            raise SettingsError(f"{first} and {other} are one option but say different things")
    return first, env[first].split() if declared.repeated else [env[first]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


class _Show(argparse.Action):
    def __init__(
        self, option_strings: Sequence[str], dest: str, default: str, text: Callable[[], str]
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, default=default)
        self.text = text

    def __call__(self, *_: object) -> None:
        raise Shown(self.text())


def _command_line(table: type[Settings], argv: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Per option that was given: how to name it in an error, and its texts in order."""
    parser = _Parser(prog=table.program, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action=_Show, text=lambda: help_text(table))
    parser.add_argument("--version", action=_Show, text=lambda: f"reckon {VERSION}")
    by_name = {each.name: each for each in declarations(table)}
    for each in by_name.values():
        flags = (each.flag, *each.option.aliases)
        if each.option.positional:
            many, one = ("+", None) if each.needed else ("*", "?")
            nargs = many if each.repeated else one
            parser.add_argument(each.name, metavar=each.flag, nargs=nargs)
        elif each.negated:
            parser.add_argument(*flags, dest=each.name, action=argparse.BooleanOptionalAction)
        elif each.flag:
            parser.add_argument(*flags, dest=each.name, action="append")
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise SettingsError(_unknown(unknown[0], by_name.values()))
    given: dict[str, tuple[str, list[str]]] = {}
    for name, value in vars(namespace).items():
        each = by_name[name]
        if isinstance(value, bool):
            given[name] = (each.flag, ["true"]) if value else (each.negated, ["false"])
        else:
            given[name] = (each.flag, value if isinstance(value, list) else [value])
    return given


def _unknown(argument: str, declared: Iterable[Declared]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    flags = ["--help", "--version"]
    for each in declared:
        flags += [each.flag, each.negated, *each.option.aliases]
    given = argument.partition("=")[0]
    close = difflib.get_close_matches(given, flags, n=1)
    return f"unknown option {given}" + (f" (did you mean {close[0]}?)" if close else "")


def help_text(table: type[Settings]) -> str:
    """What `--help` shows."""
    declared = declarations(table)
    positional = [each.flag for each in declared if each.option.positional]
    lines = [" ".join(["usage:", table.program, *positional, "[options]"]), ""]
    lines += [*cleandoc(table.__doc__ or "").splitlines(), ""]
    lines += ["The command line goes before the environment, the environment before the default."]
    group = ""
    for each in declared:
        if each.group != group:
            group = each.group
            lines += ["", group]
        lines.append(f"  {_help_heading(each)}")
        lines += _indented(each.option.help)
        lines += _indented(" | ".join(_help_facts(each)))
    lines += ["", "Other", "  -h, --help", "  --version"]
    return "\n".join(lines)


def _help_heading(each: Declared) -> str:
    short = [f"{alias}, " for alias in each.option.aliases if not alias.startswith("--")]
    heading = "".join(short) + (each.flag or each.variables[0])
    if each.negated:
        heading += f" / {each.negated}"
    elif each.flag and not each.option.positional:
        heading += f" {_placeholder(each)}"
    return heading if each.option.available else f"{heading}  (not available yet)"


def _placeholder(each: Declared) -> str:
    if each.choices:
        return f"{{{','.join(each.choices)}}}"
    return (each.option.unit or each.kind.__name__).upper().replace(" ", "_")


def _help_facts(each: Declared) -> list[str]:
    facts = {
        "env var": " or ".join(each.variables),
        "default": each.default_text,
        "range": each.range,
        "unit": each.option.unit,
        "available now": ", ".join(each.option.available_choices),
        "also": ", ".join(alias for alias in each.option.aliases if alias.startswith("--")),
    }
    told = [f"{what}: {text}" for what, text in facts.items() if text]
    return [*told, "may be given several times"] if each.repeated else told


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _HELP_COLUMNS,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )
