"""Router configurations as data: a name and values for fields of `RouterOptions`.

    kv                                  a mode's name: that mode, all else by default
    no-credit:overlap_weight=0          any other name: mode kv
    soft:mode=kv,temperature=0.5

The fields are those that the router has, whatever they are; nothing here knows one but `mode`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from router.decision import RouterOptions
from router.selection import RouterMode

DEFAULTS = ("round-robin", "kv")


class Configuration(Struct, frozen=True, kw_only=True):
    name: str
    options: RouterOptions


def parse_configuration(text: str) -> Configuration:
    """What `NAME` or `NAME:key=value,…` says. ValueError says what is wrong, and what would do."""
    name, _, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise ValueError(f"{text!r} has no name; NAME:key=value,… is needed")
    modes = {mode.value for mode in RouterMode} - {RouterMode.DIRECT.value}
    values = {"mode": name if name in modes else RouterMode.KV.value} | _pairs(rest)
    try:
        # Not strict, so that numbers and true, false, null are read from text.
        options = msgspec.convert(values, RouterOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}{_choices(values)}") from None
    if options.mode is RouterMode.DIRECT:
        raise ValueError(f"{name}: the requests of a trace name no worker, as mode=direct needs")
    return Configuration(name=name, options=options)


def parse_configurations(texts: Sequence[str]) -> list[Configuration]:
    """All of them, in order. ValueError as above, or for a name used twice."""
    found: dict[str, Configuration] = {}
    for text in texts:
        configuration = parse_configuration(text)
        if configuration.name in found:
            raise ValueError(f"two configurations are named {configuration.name}")
        found[configuration.name] = configuration
    return list(found.values())


def _pairs(text: str) -> dict[str, str]:
    valid = {field.encode_name for field in msgspec.structs.fields(RouterOptions)}
    pairs: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, pair.partition("="))
        if not equals:
            raise ValueError(f"{pair!r} is not key=value")
        if key not in valid:
            raise ValueError(f"unknown key {key}; the router has {', '.join(sorted(valid))}")
        if key in pairs:
            raise ValueError(f"{key} is given twice")
        pairs[key] = value
    return pairs


def _choices(values: dict[str, Any]) -> str:
    """The values that each field of a closed set takes, of those that were given."""
    told = []
    for field in msgspec.inspect.type_info(RouterOptions).fields:  # type: ignore[attr-defined]
        if field.name in values and isinstance(field.type, msgspec.inspect.EnumType):
            names = ", ".join(str(each.value) for each in field.type.cls)
            told.append(f"{field.name} is one of {names}")
    return f" ({'; '.join(told)})" if told else ""
