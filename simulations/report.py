"""What a run of requests came to: percentiles, token rates, cache shares. Pure.

`Report` is also the JSON that `--json` prints: its field names are that object's keys.

How the times are counted, as benchmarks of the field do:
- TTFT: from sending a request to its first output frame.
- ITL: per request, (last - first output frame) / (output tokens - 1), so that it does not depend on
  how many tokens share a frame; the percentiles run over requests of two tokens or more.
- frame gap: between successive output frames, over all requests together; shows stalls that an
  average over a request hides. Frames that arrive in one read have a gap of 0.
- latency: from sending a request to its last output frame.
- send lag: by how much a request left later than its recorded time. A large one means that the
  sender, not the server, was the bottleneck, or that it held back at its bound of open requests.
Failed requests count as errors and in nothing else but the send lag.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct
from rich.table import Table


class Outcome(Struct, frozen=True, kw_only=True, gc=False):
    """One finished request. Times in seconds; tokens None where nobody told."""

    url: str
    send_lag_s: float
    ttft_s: float | None = None
    latency_s: float | None = None
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    predicted_cached_tokens: int | None = None
    worker: str | None = None
    error: str | None = None
    """None: the answer is complete."""

    @property
    def itl_s(self) -> float | None:
        if self.ttft_s is None or self.latency_s is None or self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


class Spread(Struct, frozen=True, kw_only=True):
    """Percentiles and mean of a sample, in ms; all None if it is empty."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None


class Report(Struct, frozen=True, kw_only=True):
    """The run in numbers. Shares are in 0 … 1, None if no answer told."""

    requests: int
    """Sent and finished, in an answer or an error."""
    errors: int
    ttft_ms: Spread
    itl_ms: Spread
    latency_ms: Spread
    output_tokens_per_s: float
    cached_share_reported: float | None
    """Prompt tokens that workers took from their cache, of all prompt tokens."""
    cached_share_predicted: float | None
    """Prompt tokens that the router believed cached where it sent them, of all prompt tokens."""
    frame_gap_ms: Spread
    send_lag_ms: Spread
    prompt_tokens: int
    output_tokens: int
    elapsed_s: float
    unfinished: int
    """Given up when the run was interrupted, or never sent."""
    errors_by_kind: dict[str, int]
    requests_by_worker: dict[str, int]
    requests_by_url: dict[str, int]

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` (0 … 100) of a sorted sample lies, between ranks linearly.

    ordered: ascending, not empty.
    """
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread_ms(seconds: Iterable[float]) -> Spread:
    """The spread of a sample in seconds, as milliseconds rounded to a microsecond."""
    ordered = sorted(seconds)
    if not ordered:
        return Spread(p50=None, p90=None, p99=None, mean=None)
    p50, p90, p99 = (round(1e3 * percentile(ordered, percent), 3) for percent in (50, 90, 99))
    return Spread(p50=p50, p90=p90, p99=p99, mean=round(1e3 * sum(ordered) / len(ordered), 3))


def summarize(
    outcomes: Sequence[Outcome],
    frame_gaps_s: Iterable[float],
    *,
    elapsed_s: float,
    unfinished: int = 0,
) -> Report:
    """The report of a run that took `elapsed_s`. O(n log n)."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    output_tokens = sum(outcome.output_tokens for outcome in answered)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in answered)
    return Report(
        requests=len(outcomes),
        errors=len(outcomes) - len(answered),
        ttft_ms=spread_ms(o.ttft_s for o in answered if o.ttft_s is not None),
        itl_ms=spread_ms(itl_s for o in answered if (itl_s := o.itl_s) is not None),
        latency_ms=spread_ms(o.latency_s for o in answered if o.latency_s is not None),
        output_tokens_per_s=round(output_tokens / elapsed_s, 3) if elapsed_s > 0 else 0.0,
        cached_share_reported=_share([o.cached_tokens for o in answered], prompt_tokens),
        cached_share_predicted=_share([o.predicted_cached_tokens for o in answered], prompt_tokens),
        frame_gap_ms=spread_ms(frame_gaps_s),
        send_lag_ms=spread_ms(o.send_lag_s for o in outcomes),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        elapsed_s=round(elapsed_s, 3),
        unfinished=unfinished,
        errors_by_kind=_counted(o.error for o in outcomes),
        requests_by_worker=_counted(o.worker for o in outcomes),
        requests_by_url=_counted(o.url for o in outcomes),
    )


def _share(tokens: Sequence[int | None], prompt_tokens: int) -> float | None:
    """None if no answer told; answers that did not tell, among others that did, count as 0."""
    told = [count for count in tokens if count is not None]
    return round(sum(told) / prompt_tokens, 6) if told and prompt_tokens else None


def _counted(names: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name is not None).items()))


def table(report: Report) -> Table:
    """The report for people."""
    result = Table(title=_headline(report), title_justify="left")
    result.add_column("")
    for column in ("p50", "p90", "p99", "mean"):
        result.add_column(column, justify="right")
    for name, spread in (
        ("TTFT ms", report.ttft_ms),
        ("ITL ms", report.itl_ms),
        ("latency ms", report.latency_ms),
        ("frame gap ms", report.frame_gap_ms),
        ("send lag ms", report.send_lag_ms),
    ):
        values = (spread.p50, spread.p90, spread.p99, spread.mean)
        result.add_row(name, *("-" if value is None else f"{value:,.1f}" for value in values))
    result.add_section()
    result.add_row("output tokens/s", f"{report.output_tokens_per_s:,.1f}")
    result.add_row("prompt tokens", f"{report.prompt_tokens:,}")
    result.add_row("cached, reported", _percent(report.cached_share_reported))
    result.add_row("cached, predicted", _percent(report.cached_share_predicted))
    for section, counts in (
        ("error", report.errors_by_kind),
        ("worker", report.requests_by_worker),
        ("url", report.requests_by_url),
    ):
        result.add_section()
        for name, count in counts.items():
            result.add_row(f"{section} {name}", f"{count:,}")
    return result


def _headline(report: Report) -> str:
    headline = (
        f"{report.requests:,} requests, {report.errors:,} errors in {report.elapsed_s:,.1f} s"
    )
    return f"{headline}, {report.unfinished:,} unfinished" if report.unfinished else headline


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
