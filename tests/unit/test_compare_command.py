"""Configurations, shapes, report and plot of `python -m simulations compare`, by example."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import pytest
from rich.console import Console

from eventstore.settings import declarations
from router.decision import RouterOptions
from router.selection import RouterMode
from simulations import compare_plot
from simulations.compare_config import (
    DEFAULTS,
    Configuration,
    parse_configuration,
    parse_configurations,
)
from simulations.compare_fleet import Fleet
from simulations.compare_jobs import JobFailed, Workload, run_all
from simulations.compare_plot import check_plot, write_plot
from simulations.compare_report import Compared, Report, headline, table
from simulations.compare_run import Comparison
from simulations.generate import generate
from simulations.settings import CompareSettings
from simulations.shapes import SHAPES
from simulations.trace import TraceRequest

REQUESTS = [
    TraceRequest(timestamp_ms=at, input_length=100, output_length=3, hash_ids=[at])
    for at in range(0, 60, 10)
]


# --- configurations -------------------------------------------------------------------------------


def test_a_mode_is_a_configuration_and_any_other_name_is_kv() -> None:
    assert parse_configuration("random").options == RouterOptions(mode=RouterMode.RANDOM)
    assert parse_configuration("mine").options == RouterOptions(mode=RouterMode.KV)
    assert [each.name for each in parse_configurations(DEFAULTS)] == ["round-robin", "kv"]


def test_keys_are_fields_of_the_router_options() -> None:
    found = parse_configuration(
        "soft: mode = kv, temperature=0.5,overlap_weight=2,replica_sync=true"
    )
    assert found == Configuration(
        name="soft",
        options=RouterOptions(
            mode=RouterMode.KV, temperature=0.5, overlap_weight=2.0, replica_sync=True
        ),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no name"),
        (":mode=kv", "no name"),
        ("a:mode", "'mode' is not key=value"),
        ("a:weight=2", r"unknown key weight; the router has .*mode.*overlap_weight.*temperature"),
        ("a:temperature=1,temperature=2", "given twice"),
        ("a:temperature=warm", r"a: Expected `float`.*temperature"),
        ("a:mode=best", "Invalid enum value 'best'.*mode is one of .*round-robin.*kv"),
        ("a:mode=direct", "names? no worker"),
    ],
)
def test_what_is_wrong_with_a_configuration(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_configuration(text)


def test_names_are_different() -> None:
    with pytest.raises(ValueError, match="two configurations are named kv"):
        parse_configurations(["kv", "kv:temperature=1"])


# --- shapes ---------------------------------------------------------------------------------------


def test_every_shape_can_be_asked_for() -> None:
    (shape,) = (each for each in declarations(CompareSettings) if each.name == "shape")
    assert shape.choices == tuple(SHAPES)


def made(shape: str) -> list[TraceRequest]:
    return generate(msgspec.structs.replace(SHAPES[shape], duration_s=20), Random(0))


def test_a_shape_is_what_its_name_says() -> None:
    assert max(each.input_length for each in made("short")) < 1_000
    prefixes = {tuple(each.hash_ids[:16]) for each in made("hot-prefix")}
    assert len(prefixes) == 1
    assert {each.output_length for each in made("prefill-only")} == {1}
    decode_heavy = made("decode-heavy")
    assert sum(each.output_length for each in decode_heavy) > sum(
        each.input_length for each in decode_heavy
    )
    bursts = Counter((each.timestamp_ms, tuple(each.hash_ids)) for each in made("bursts"))
    assert set(bursts.values()) == {16}
    assert any(len(each.hash_ids) > 8 for each in made("conversation"))


# --- report and plot ------------------------------------------------------------------------------


def report(*texts: str) -> tuple[Report, dict[str, list[float]]]:
    compared, samples = [], {}
    for each in parse_configurations(texts):
        run = Comparison(REQUESTS, Fleet(workers=2), each.options, Random(0)).run()
        options = msgspec.to_builtins(each.options)
        compared.append(Compared(name=each.name, options=options, result=run.result, cpu_s=0.5))
        samples[each.name] = run.ttft_ms
    made = Report(
        trace="few.jsonl",
        requests=len(REQUESTS),
        speed=2.0,
        seed=0,
        fleet=Fleet(workers=2, slow_workers=1, event_delay_ns=2_000_000),
        configurations=compared,
    )
    return made, samples


def test_the_table_has_a_column_for_each_configuration() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(report("round-robin", "soft:temperature=1")[0]))
    shown = capture.get()
    for text in ("round-robin", "soft", "TTFT ms", "ITL ms", "imbalance", "0.00 %", "0.5"):
        assert text in shown


def test_the_headline_says_what_was_simulated() -> None:
    assert headline(report("kv")[0]) == (
        "few.jsonl at 2 times its speed, 2 workers of 16,384 blocks, "
        "1 of them 2 times as slow, events 2 ms late"
    )


def test_the_json_has_what_was_asked_and_what_came_out() -> None:
    found = json.loads(report("kv")[0].to_json())
    (only,) = found["configurations"]
    assert only["options"]["mode"] == "kv"
    assert only["result"]["requests"] == 6
    assert found["fleet"]["workers"] == 2


def test_a_plot_has_a_name_that_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg"):
        check_plot(Path("plot.pdf"))
    monkeypatch.setattr(compare_plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reckon\[plot\]"):
        check_plot(Path("plot.svg"))


def test_equal_data_make_equal_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made, samples = report("round-robin", "kv")
    paths = [tmp_path / name for name in ("one.svg", "two.svg", "three.png")]
    for path in paths:
        check_plot(path)
        write_plot(path, made, samples)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


# --- processes ------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_configurations() -> None:
    workload = Workload(requests=REQUESTS, fleet=Fleet(workers=2), speed=1.0, seed=0)
    told: dict[int, int] = {}
    configurations = parse_configurations(["kv", "round-robin"])
    done = run_all(configurations, workload, 2, lambda index, ended: told.update({index: ended}))
    for configuration, each in zip(configurations, done, strict=True):
        comparison = Comparison(REQUESTS, Fleet(workers=2), configuration.options, Random(0))
        assert each.run == comparison.run()
    assert told == {0: 6, 1: 6}


def test_a_process_that_dies_is_named() -> None:
    nothing = Workload(requests=[], fleet=Fleet(workers=2), speed=1.0, seed=0)
    with pytest.raises(JobFailed, match="simulation of kv ended with exit code 1"):
        run_all(parse_configurations(["kv"]), nothing, 1, lambda index, ended: None)
