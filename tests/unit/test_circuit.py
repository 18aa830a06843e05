"""The circuit breaker's life by example."""

import pytest

from router.circuit import CIRCUITS_MAX, CircuitBreaker, SetAside


def breaker(jitter: float = 0.0, failures_max: int = 5) -> CircuitBreaker:
    return CircuitBreaker(jitter=lambda: jitter, failures_max=failures_max, window_s=60.0)


def fail(circuits: CircuitBreaker, times: int, now_s: float = 0.0) -> SetAside | None:
    news = None
    for _ in range(times):
        news = circuits.failure(1, now_s)
    return news


def test_the_fifth_failure_in_a_row_sets_aside_for_a_second() -> None:
    circuits = breaker()
    assert fail(circuits, 4) is None
    assert fail(circuits, 1) == SetAside(1, failures=5, for_s=1.0)
    assert circuits.set_aside(0.9) == {1}
    assert circuits.set_aside(1.0) == frozenset()


def test_a_success_in_between_begins_a_new_row() -> None:
    circuits = breaker()
    fail(circuits, 4)
    circuits.success(1)
    assert fail(circuits, 4) is None


def test_failures_far_apart_are_no_row() -> None:
    circuits = breaker()
    fail(circuits, 4, now_s=0.0)
    assert fail(circuits, 4, now_s=61.0) is None
    assert fail(circuits, 1, now_s=121.0) is not None


def test_every_failed_trial_doubles_up_to_a_minute() -> None:
    circuits = breaker()
    news, now_s = fail(circuits, 5), 0.0
    times: list[float] = []
    while news is not None and len(times) < 9:
        times.append(news.for_s)
        now_s += news.for_s
        assert circuits.sent(1, now_s)
        news = circuits.failure(1, now_s)
    assert times == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert circuits.sent(1, now_s + 60)
    circuits.success(1)
    assert circuits.set_aside(now_s + 60) == frozenset()
    assert fail(circuits, 5, now_s + 60) == SetAside(1, failures=5, for_s=1.0)


def test_failures_of_older_requests_do_not_prolong() -> None:
    circuits = breaker()
    fail(circuits, 5)
    assert fail(circuits, 20, now_s=0.5) is None
    assert circuits.set_aside(1.0) == frozenset()
    assert circuits.sent(1, 1.0)
    assert fail(circuits, 1, now_s=1.0) == SetAside(1, failures=6, for_s=2.0)
    assert fail(circuits, 20, now_s=1.5) is None


def test_one_trial_at_a_time_and_another_if_it_is_lost() -> None:
    circuits = breaker()
    fail(circuits, 5)
    assert not circuits.sent(1, 0.5), "still set aside: sent for want of another, and no trial"
    assert circuits.sent(1, 1.0)
    assert circuits.set_aside(1.9) == {1}
    assert not circuits.sent(1, 1.9)
    assert circuits.set_aside(2.0) == frozenset()
    assert circuits.sent(1, 2.0)


def test_jitter_shortens() -> None:
    news = fail(breaker(jitter=0.5), 5)
    assert news is not None and news.for_s == 0.875


def test_who_is_set_aside_is_shown_with_the_time_left() -> None:
    circuits = breaker(failures_max=1)
    circuits.failure(2, 0.0)
    circuits.failure(1, 0.25)
    assert circuits.spells(0.5) == [SetAside(1, 1, 0.75), SetAside(2, 1, 0.5)]
    assert circuits.spells(1.0) == [SetAside(1, 1, 0.25)]
    assert circuits.sent(2, 1.0)
    assert circuits.spells(1.25) == [SetAside(2, 1, 0.75)], "on trial, for as long as before"


def test_a_worker_that_left_is_forgotten() -> None:
    circuits = breaker(failures_max=1)
    circuits.failure(1, 0.0)
    circuits.forget(1)
    circuits.forget(1)
    assert circuits.set_aside(0.0) == frozenset()
    assert not circuits.sent(1, 5.0)


def test_late_failures_of_forgotten_workers_do_not_pile_up() -> None:
    circuits = breaker(failures_max=1)
    for worker_id in range(CIRCUITS_MAX):
        circuits.failure(worker_id, 0.0)
    circuits.failure(0, 1.0)
    circuits.failure(CIRCUITS_MAX, 1.0)
    assert circuits.set_aside(0.0) == {0, *range(2, CIRCUITS_MAX + 1)}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError):
        CircuitBreaker(jitter=lambda: 0.0, failures_max=0)
    with pytest.raises(ValueError):
        CircuitBreaker(jitter=lambda: 0.0, backoff_first_s=2.0, backoff_max_s=1.0)
