"""The plot of a comparison: how TTFT is distributed, and bars of what is compared most.

matplotlib is an extra, `plot`, and is looked for only when a plot is asked for.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simulations.compare_report import Compared, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise ValueError unless a plot can be written as `path` says."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed; pip install 'reckon[plot]' brings it")


def write_plot(path: Path, report: Report, ttft_ms: Mapping[str, Sequence[float]]) -> None:
    """Draw to `path`. ttft_ms: by configuration, ascending. Raises OSError.

    An SVG of equal data is equal to the byte.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "reckon", "font.size": 9}):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        figure.suptitle(f"{report.trace}, {report.fleet.workers} workers, speed {report.speed:g}")
        grid = figure.add_gridspec(4, 2, width_ratios=(3, 2))
        _draw_distribution(figure.add_subplot(grid[:, 0]), report, ttft_ms)
        for row, (title, values) in enumerate(_bars(report.configurations)):
            _draw_bars(figure.add_subplot(grid[row, 1]), report, title, values)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=144, metadata=metadata)


def _bars(configurations: Sequence[Compared]) -> list[tuple[str, list[float]]]:
    results = [each.result for each in configurations]
    return [
        ("TTFT mean, ms", [result.ttft_ms.mean or 0.0 for result in results]),
        ("TTFT p99, ms", [result.ttft_ms.p99 or 0.0 for result in results]),
        ("ITL mean, ms", [result.itl_ms.mean or 0.0 for result in results]),
        ("prompt tokens from cache, %", [100 * result.cached_share for result in results]),
    ]


def _draw_distribution(
    axes: "Axes", report: Report, ttft_ms: Mapping[str, Sequence[float]]
) -> None:
    for index, each in enumerate(report.configurations):
        sample = ttft_ms[each.name]
        if sample:
            axes.ecdf(sample, label=each.name, color=f"C{index}")
    axes.set_xscale("log")
    axes.set_xlabel("TTFT, ms")
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")


def _draw_bars(axes: "Axes", report: Report, title: str, values: Sequence[float]) -> None:
    names = [each.name for each in report.configurations]
    bars = axes.barh(names, values, color=[f"C{index}" for index in range(len(names))])
    axes.bar_label(bars, fmt="{:,.4g}", padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
