"""Write the pages that are made from declarations: settings.md, events.md and metrics.md.

    python docs/generate.py            write them
    python docs/generate.py --check    exit 1 if one is not up to date

Tables of settings are found in `<package>/settings.py`, metrics in `<package>/metrics.py`; a new
package of ours that has them needs its name in PACKAGES and nothing else.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import get_args

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # run as a script, only docs/ is on the path

from eventstore import events  # noqa: E402
from eventstore.metrics import Metric, full_name  # noqa: E402
from eventstore.settings import Declared, Settings, declarations  # noqa: E402

PACKAGES = ("reckon", "frontend", "workers", "router", "indexer", "eventstore", "simulations")
SUBJECTS: Mapping[str, str] = {
    "kv": "kv.<worker>.<dp_rank>",
    "worker": "worker.<worker>",
    "frontend": "frontend.<frontend>",
    "request": "request.<frontend>",
    "threshold": "threshold.<model>",
    "state": "control",
    "snapshot": "control",
}
"""Where an event goes, behind `reckon.<namespace>.`, by the first part of its tag."""

NOTE = "<!-- Made by docs/generate.py from the declarations in the code; do not edit. -->"

SETTINGS_INTRO = """\
The command line goes before the environment, the environment before the default. A value is checked
in the same way wherever it comes from; a bad one ends the start with one line and exit code 2.

- Switches are pairs, `--x` and `--no-x`, of which the last one given counts. In the environment
  they are true, 1, yes, on or false, 0, no, off, in any case. Unambiguous beginnings of long
  options work.
- An option that can be unset takes an empty text or `None` for that.
- *Not available yet*: the peer has the option, but what it would switch is not built here. It
  is refused, unless it is given its default, which changes nothing.
- `DYN_*` and `RECKON_*` variables that name no option are warned about."""

METRICS_INTRO = """\
What `/metrics` shows, in Prometheus's text form. `--metrics-prefix` replaces the `dynamo_frontend`
of the frontend's own metrics; the other names are fixed."""


def settings_page() -> str:
    lines = ["# Settings", "", NOTE, "", SETTINGS_INTRO]
    for table in settings_tables():
        lines += ["", f"## `{table.program}`", "", inspect.cleandoc(table.__doc__ or "")]
        by_group: dict[str, list[Sequence[str]]] = {}
        for each in declarations(table):
            by_group.setdefault(each.group, []).append(_option_row(each))
        for group, rows in by_group.items():
            lines += ["", f"### {group}", ""]
            lines += markdown_table(("Option", "Environment", "Default", "Meaning"), rows)
    return "\n".join(lines) + "\n"


def settings_tables() -> Iterator[type[Settings]]:
    """Every table that starts a process, in the order of PACKAGES and then of its file."""
    for module in _modules("settings"):
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Settings) and value.program:
                yield value


def _option_row(each: Declared) -> Sequence[str]:
    option = each.option
    flags = [f"`{flag}`" for flag in (each.flag, each.negated) if flag]
    meaning = [option.help]
    if each.choices:
        meaning.append("One of " + ", ".join(f"`{choice}`" for choice in each.choices) + ".")
    if each.range:
        meaning.append(f"Range: {each.range}.")
    if option.unit:
        meaning.append(f"Unit: {option.unit}.")
    if each.repeated:
        meaning.append("May be given several times.")
    if option.aliases:
        meaning.append("Also " + ", ".join(f"`{alias}`" for alias in option.aliases) + ".")
    if option.available_choices:
        built = ", ".join(f"`{choice}`" for choice in option.available_choices)
        meaning.append(f"*Available now: {built}.*")
    if option.use:
        meaning.append(f"*When:* {option.use}")
    if not option.available:
        meaning.append("*Not available yet.*")
    return (
        " / ".join(flags),
        ", ".join(f"`{name}`" for name in each.variables),
        each.default_text if each.needed or each.default is None else f"`{each.default_text}`",
        " ".join(meaning),
    )


def events_page() -> str:
    classes = _classes(events)
    lines = ["# Events", "", NOTE, "", inspect.cleandoc(events.__doc__ or "")]
    lines += ["", "Subjects are below `reckon.<namespace>.`; one producer writes to one of them."]
    subject = ""
    for event in get_args(events.AnyEvent):
        tag = event.__struct_config__.tag
        if SUBJECTS[tag.partition(".")[0]] != subject:
            subject = SUBJECTS[tag.partition(".")[0]]
            lines += ["", f"## `{subject}`"]
        lines += ["", f"### `{tag}`", "", *_class_entry(classes.pop(event.__name__))]
    del classes[events.Event.__name__]
    lines += ["", "## Values in events"]
    for name, node in classes.items():
        lines += ["", f"### `{name}`", "", *_class_entry(node)]
    return "\n".join(lines) + "\n"


def _classes(module: ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _class_entry(node: ast.ClassDef) -> Iterator[str]:
    """The docstring of a Struct and a table of its fields, in their order on the wire."""
    yield ast.get_docstring(node) or ""
    rows = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = inspect.cleandoc(str(after.value.value))
        rows.append(
            (
                f"`{ast.unparse(field.target)}`",
                f"`{ast.unparse(field.annotation)}`",
                f"`{ast.unparse(field.value)}`" if field.value is not None else "",
                meaning,
            )
        )
    yield ""
    yield from markdown_table(("Field", "Type", "Default", "Meaning"), rows)


def metrics_page() -> str:
    lines = ["# Metrics", "", NOTE, "", METRICS_INTRO]
    for module in _modules("metrics"):
        metrics: Sequence[Metric] = getattr(module, "METRICS", ())
        if not metrics:
            continue
        prefix = getattr(module, "PREFIX", "")
        lines += ["", f"## {module.__name__.partition('.')[0]}", ""]
        lines += markdown_table(
            ("Metric", "Type", "Labels", "Meaning"),
            [
                (
                    f"`{full_name(prefix, each.name)}`",
                    each.kind,
                    ", ".join(f"`{label}`" for label in each.labels),
                    each.help + _buckets(each),
                )
                for each in metrics
            ],
        )
    return "\n".join(lines) + "\n"


def _buckets(metric: Metric) -> str:
    bounds = ", ".join(f"{bound:.6g}" for bound in metric.buckets)
    return f" Buckets: {bounds}." if bounds else ""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; a line break or a bar in a cell cannot break it."""
    for row in (head, ["---"] * len(head), *rows):
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"


def _modules(name: str) -> Iterator[ModuleType]:
    """The modules of this name that there are in our packages."""
    for package in PACKAGES:
        if importlib.util.find_spec(f"{package}.{name}") is not None:
            yield importlib.import_module(f"{package}.{name}")


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "events.md": events_page,
    "metrics.md": metrics_page,
}


def main(argv: Sequence[str]) -> int:
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in argv:
            path.write_text(text, encoding="utf-8")
    verb = "not up to date" if "--check" in argv else "written"
    print("\n".join(f"docs/{name}: {verb}" for name in stale) or "docs: up to date")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
