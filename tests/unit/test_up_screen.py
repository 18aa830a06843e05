"""What `reckon up` shows, and what it measures for that."""

import json
import shlex

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from reckon.monitor import Odometer
from reckon.probe import Requests, parse_requests
from reckon.screen import (
    CURSORS_MAX,
    Digests,
    Overview,
    Place,
    Replica,
    Status,
    curl,
    first_screen,
    happened,
    status_line,
)
from reckon.screen import Verdict as DigestVerdict
from reckon.supervisor import BecameReady, Died

# --- what is shown --------------------------------------------------------------------------------


def shown(what: object) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(what, soft_wrap=True)
    return capture.get()


def test_the_first_screen_says_what_runs_where_and_what_to_try() -> None:
    overview = Overview(
        places=[
            Place("worker-1", 11, "127.0.0.1:5000", "logs/worker-1.log"),
            Place("frontend-1", 12, "http://127.0.0.1:8000", "logs/frontend-1.log"),
        ],
        data_dir="/data",
        messages_before=1234,
        frontend_url="http://127.0.0.1:8000",
        model="it's a model",
        log_options=("--nats-url", "nats://127.0.0.1:4567", "--namespace", "mine"),
        command=".venv/bin/reckon",
        victim=Place("frontend-1", 12, "http://127.0.0.1:8000", "logs/frontend-1.log"),
    )
    text = shown(first_screen(overview))
    for part in (
        *("worker-1", "11", "127.0.0.1:5000", "logs/worker-1.log", "http://127.0.0.1:8000"),
        *(
            "carries on from 1,234 messages",
            "/data",
            "kill -9 12",
            ".venv/bin/reckon log tail --nats-url nats://127.0.0.1:4567 --namespace mine ",
        ),
    ):
        assert part in text
    assert f"  {curl(overview.frontend_url, overview.model)}\n" in text


def test_the_curl_line_can_be_pasted() -> None:
    """Whatever the model is called, a shell makes one JSON body of it."""
    words = shlex.split(curl("http://127.0.0.1:8000", """it's "a" $model"""))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == """it's "a" $model""" and body["stream"] is True


def test_the_status_line() -> None:
    replicas = (
        Replica("frontend-1", cursor=1200, head=1200, lag=0, done=10, in_flight=1),
        Replica("frontend-2", cursor=1190, head=1200, lag=10, done=5, in_flight=2),
    )
    status = Status(3723.9, 4, 4, replicas, DigestVerdict(1190, True))
    assert shown(status_line(status)) == (
        "1:02:03 · 4/4 workers · 2/2 frontends · 15 requests done, 3 running · "
        "log 1,200, lag 0, 10 · digests equal\n"
    )


def test_the_status_line_of_trouble() -> None:
    replicas = (Replica("frontend-1", done=10), Replica("frontend-2", 7, 9, 2))
    status = Status(0, 3, 4, replicas, DigestVerdict(7, False))
    assert shown(status_line(status)) == (
        "0:00:00 · 3/4 workers · 1/2 frontends · 10 requests done, 0 running · "
        "log 9, lag -, 2 · DIGESTS DIFFER at 7\n"
    )


def test_what_happens_is_told_in_a_line() -> None:
    assert happened(BecameReady("worker-1", 5, 1)) == "worker-1 is ready (pid 5)"
    assert happened(BecameReady("worker-1", 6, 2)) == "worker-1 is back (pid 6)"
    assert happened(Died("worker-1", 5, "was killed by SIGKILL", 0.2)) == (
        "worker-1 (pid 5) was killed by SIGKILL; starting it again in 0.2 s"
    )


# --- what is measured -----------------------------------------------------------------------------


def test_digests_are_compared_at_equal_cursors_only() -> None:
    digests = Digests()
    digests.saw("a", 5, "x")
    digests.saw("b", 6, "y")
    assert digests.verdict is None
    digests.saw("a", 6, "z")
    assert digests.verdict == DigestVerdict(6, False)
    digests.saw("a", 7, "w")
    digests.saw("b", 7, "w")
    assert digests.verdict == DigestVerdict(7, True)


def test_a_log_that_begins_anew_is_not_compared_with_the_one_before() -> None:
    digests = Digests()
    digests.saw("a", 5, "x")
    digests.saw("b", 4, "y")
    digests.saw("b", 0, "")
    digests.saw("b", 5, "of another log")
    assert digests.verdict is None


def test_digests_of_the_past_are_forgotten() -> None:
    digests = Digests()
    for cursor in range(CURSORS_MAX + 1):
        digests.saw("a", cursor, "x")
    digests.saw("b", 0, "x")
    assert digests.verdict is None
    digests.saw("b", 1, "x")
    assert digests.verdict == DigestVerdict(1, True)


def test_requests_are_summed_over_labels() -> None:
    page = b"""\
# HELP dynamo_frontend_requests_total Requests by outcome.
# TYPE dynamo_frontend_requests_total counter
dynamo_frontend_requests_total{model="a",status="success"} 3.0
dynamo_frontend_requests_total{model="b,} 1",status="error"} 2.0
dynamo_frontend_requests_created{model="a"} 1.7e+09
dynamo_frontend_inflight_requests{model="a"} 1.0
other_requests_total 7.0
"""
    assert parse_requests(page, "dynamo_frontend") == Requests(5, 1)
    assert parse_requests(page, "other") == Requests(7, 0)
    assert parse_requests(b"", "dynamo_frontend") == Requests(0, 0)


@given(st.lists(st.lists(st.integers(0, 100), min_size=1)))
def test_an_odometer_adds_the_lives_of_a_counter(lives: list[list[int]]) -> None:
    """A counter that fell has begun anew from 0; one that is seen at 0 first always shows."""
    odometer, total = Odometer(), 0
    for growths in lives:
        counter = 0
        odometer.read(counter)
        for growth in growths:
            counter += growth
            odometer.read(counter)
        total += counter
    assert odometer.total == total
