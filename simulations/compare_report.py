"""A comparison as a table, as JSON, and as a plot's data. Pure.

`Report` is the JSON that `--json` prints: its field names are that object's keys.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from rich.table import Table

from simulations.compare_fleet import Fleet
from simulations.compare_run import Result
from simulations.report import Spread


class Compared(Struct, frozen=True, kw_only=True):
    """One configuration and what came out. `cpu_s`: processor time that the simulation took."""

    name: str
    options: dict[str, Any]
    """Of the router, all of them."""
    result: Result
    cpu_s: float


class Report(Struct, frozen=True, kw_only=True):
    """`trace`: a file, or a shape and its seed. `speed`: arrivals are so many times as fast."""

    trace: str
    requests: int
    speed: float
    seed: int
    fleet: Fleet
    configurations: list[Compared]

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()


LEGEND = "Times as mean / p50 / p99. Imbalance: most tokens computed by a worker, over the mean."

Cell = Callable[[Compared], str]


def table(report: Report) -> Table:
    """For people: a column for each configuration, times as mean / p50 / p99."""
    result = Table()
    result.add_column("")
    for each in report.configurations:
        result.add_column(each.name, justify="right", overflow="fold")
    sections: tuple[tuple[tuple[str, Cell], ...], ...] = (
        (
            ("requests", lambda each: f"{each.result.requests:,}"),
            ("errors", lambda each: f"{each.result.errors:,}"),
        ),
        (
            ("cached", lambda each: _percent(each.result.cached_share)),
            ("cached, predicted", lambda each: _percent(each.result.predicted_share)),
        ),
        (
            ("TTFT ms", lambda each: _times(each.result.ttft_ms)),
            ("ITL ms", lambda each: _times(each.result.itl_ms, digits=2)),
            ("latency ms", lambda each: _times(each.result.latency_ms)),
            ("queue wait ms", lambda each: _times(each.result.queue_wait_ms)),
        ),
        (
            ("imbalance", lambda each: f"{each.result.imbalance:.3f}"),
            ("busiest worker", lambda each: _percent(max(_busy(each)))),
            ("CPU s", lambda each: f"{each.cpu_s:.1f}"),
        ),
    )
    for section in sections:
        result.add_section()
        for name, cell in section:
            result.add_row(name, *map(cell, report.configurations))
    return result


def _busy(each: Compared) -> list[float]:
    return [worker.busy_share for worker in each.result.workers]


def headline(report: Report) -> str:
    """What was simulated, in a sentence."""
    fleet = report.fleet
    parts = [
        f"{report.trace} at {report.speed:g} times its speed",
        f"{fleet.workers} workers of {fleet.blocks:,} blocks",
    ]
    if fleet.slow_workers:
        parts.append(f"{fleet.slow_workers} of them {fleet.slow_factor:g} times as slow")
    if fleet.event_delay_ns:
        parts.append(f"events {fleet.event_delay_ns / 1e6:g} ms late")
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _times(spread: Spread, digits: int = 0) -> str:
    values = (spread.mean, spread.p50, spread.p99)
    return " / ".join("-" if value is None else f"{value:,.{digits}f}" for value in values)
