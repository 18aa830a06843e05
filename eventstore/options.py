"""How an option is declared: a field of a `Settings` table, annotated with one `Option`.

    class FrontendSettings(Settings, frozen=True, kw_only=True):
        '''What the process does, in a sentence.'''

        program: ClassVar[str] = "python -m frontend"

        http_port: Annotated[
            int, Option("DYN_HTTP_PORT", "Port to listen on.", group="HTTP", ge=0, le=65535)
        ] = 8000

The field `http_port` is `--http-port`. Its type is bool, int, float, str, Path or a Literal of
strings; each of them also `| None`, or `tuple[T, ...]` for an option that may be given several
times (in the environment: words). A field without a default is needed.
"""

from collections.abc import Callable
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Struct


class Option(Struct, frozen=True):
    """What a field's name, type and default do not say about an option."""

    env: str | tuple[str, ...]
    """The variable, or several spellings of it; empty: the environment cannot set it."""
    help: str
    """One or two sentences."""
    use: str = ""
    """When to set it to something else, for the docs: a sentence."""
    group: str = ""
    """Heading that begins at this option; empty: the heading of the option before."""
    flag: bool = True
    """False: only the environment sets it."""
    positional: bool = False
    aliases: tuple[str, ...] = ()
    """Further flags, such as `-i` or an older spelling."""
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    unset: str = ""
    """What None means, for the help."""
    available: bool = True
    """False: the machinery is not built, so only the default is taken."""
    available_choices: tuple[str, ...] = ()
    """Choices that are built, where others are not; empty: all."""
    check: Callable[[Any], object] | None = None
    """Called with each value but None; raises ValueError or EventStoreError with the reason."""


class Settings(Struct, frozen=True, kw_only=True):
    """Base of the tables. A table's docstring says what its process does."""

    program: ClassVar[str] = ""
    """How the process is started; empty for a table that only others are built on."""


class Declared(Struct, frozen=True):
    """An option as its field declares it, taken apart."""

    name: str
    option: Option
    group: str
    kind: type
    """bool, int, float, str or Path: of one value."""
    choices: tuple[str, ...]
    """Empty: any value."""
    nullable: bool
    repeated: bool
    default: Any
    """msgspec.NODEFAULT: needed."""

    @property
    def flag(self) -> str:
        """`--http-port`; the name in capitals of a positional one; empty if it has no flag."""
        if self.option.positional:
            return self.name.upper()
        return "--" + self.name.replace("_", "-") if self.option.flag else ""

    @property
    def negated(self) -> str:
        """`--no-x` of a bool's `--x`; empty if there is none."""
        return f"--no-{self.flag[2:]}" if self.kind is bool and self.flag else ""

    @property
    def variables(self) -> tuple[str, ...]:
        """Its environment variables, the documented spelling first."""
        env = self.option.env
        return (env,) if env and isinstance(env, str) else tuple(env)

    @property
    def needed(self) -> bool:
        return self.default is msgspec.NODEFAULT

    @property
    def range(self) -> str:
        """The bounds in words; empty if there are none."""
        ge, gt, le = self.option.ge, self.option.gt, self.option.le
        if ge is not None and le is not None:
            return f"{ge:.10g} to {le:.10g}"
        words = ("at least", ge), ("above", gt), ("at most", le)
        return ", ".join(f"{word} {bound:.10g}" for word, bound in words if bound is not None)

    def contains(self, value: float) -> bool:
        """Whether `value` is within the bounds."""
        ge, gt, le = self.option.ge, self.option.gt, self.option.le
        return (
            (ge is None or value >= ge)
            and (gt is None or value > gt)
            and (le is None or value <= le)
        )

    @property
    def default_text(self) -> str:
        """The default as one would write it."""
        if self.needed:
            return "needed"
        if self.default is None:
            return f"unset ({self.option.unset})" if self.option.unset else "unset"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return " ".join(str(item) for item in self.default) or "none"
        return str(self.default)


def declarations(table: type[Settings]) -> tuple[Declared, ...]:
    """The options of `table` in order of declaration, a base's after its subclass's own.

    Raises TypeError where a field is not declared as this module's docstring says.
    """
    fields = {field.name: field for field in msgspec.structs.fields(table)}
    found: list[Declared] = []
    for owner in table.__mro__:
        group = ""
        for name in get_annotations(owner):
            field = fields.pop(name, None)
            if field is not None:
                found.append(_declared(name, field.type, field.default, group))
                group = found[-1].group
    return tuple(found)


def _declared(name: str, annotation: Any, default: Any, group: str) -> Declared:
    options = [each for each in get_args(annotation)[1:] if isinstance(each, Option)]
    if get_origin(annotation) is not Annotated or len(options) != 1:
        raise TypeError(f"{name}: not Annotated with one Option")
    group = options[0].group or group
    if not group:
        raise TypeError(f"{name}: the first option of a table begins a group")
    kind = get_args(annotation)[0]
    repeated = get_origin(kind) is tuple
    if repeated:
        kind = get_args(kind)[0]
    nullable = get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)
    if nullable:
        kind = next(each for each in get_args(kind) if each is not NoneType)
    choices: tuple[str, ...] = ()
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    if kind not in (bool, int, float, str, Path):
        raise TypeError(f"{name}: no option can be a {kind}")
    return Declared(name, options[0], group, kind, choices, nullable, repeated, default)
