"""Every error a client can meet: its status, its body, and that it says nothing of the engine."""

import json
from collections.abc import Iterator

import pytest

from eventstore.errors import BufferFull, LogGap, LogUnavailable
from frontend.body import UnsupportedEncoding
from frontend.docs_page import DocsNotInstalled
from frontend.errors import (
    ROWS,
    BadRequest,
    BodyTooLarge,
    ClientTooSlow,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    EngineOverloaded,
    EnginePrefillFailed,
    EngineRefused,
    EngineShutDown,
    FrontendError,
    MethodNotAllowed,
    ModelNotFound,
    NotAvailableYet,
    NotReady,
    RequestTimeout,
    RouteNotFound,
    ShuttingDown,
    TemplateFailed,
    UnsupportedMediaType,
    code_of,
    engine_error,
    error_body,
    http_of,
    row_of,
    status_of,
)
from router.busy import Busy
from router.errors import (
    AllWorkersBusy,
    LogBacklogFull,
    NoWorkers,
    QueueFull,
    QueueTimeout,
    ReplicaNotReady,
    RouterError,
    SessionUnavailable,
    UnknownRank,
    UnknownWorker,
    WorkerRequired,
)
from workers.errors import CannotConnect, FrameTooLarge, WorkerBacklogged, WorkerError, WorkerLost

BUSY = Busy("active_prefill_tokens_threshold", 1000, 1777)
SECRET = "10.0.0.7:9999 Traceback"

CASES: list[tuple[Exception, int, str]] = [
    (BadRequest("no", "stop"), 400, "invalid_value"),
    (ContextLengthExceeded(9, 1, 8, "messages"), 400, "context_length_exceeded"),
    (NotAvailableYet("n > 1", "n"), 400, "not_available_yet"),
    (TemplateFailed("no"), 400, "template_failed"),
    (ModelNotFound("gpt", ["tiny"]), 404, "model_not_found"),
    (RouteNotFound("GET", "/nope"), 404, "route_not_found"),
    (MethodNotAllowed("GET", ["POST"]), 405, "method_not_allowed"),
    (RequestTimeout(30), 408, "request_timeout"),
    (ClientTooSlow(5_000_000), 408, "client_too_slow"),
    (BodyTooLarge(1024), 413, "body_too_large"),
    (UnsupportedMediaType("text/plain"), 415, "unsupported_media_type"),
    (UnsupportedMediaType(None), 415, "unsupported_media_type"),
    (UnsupportedEncoding("br"), 415, "unsupported_media_type"),
    (DocsNotInstalled("GET", "/docs"), 404, "route_not_found"),
    (NotReady(), 503, "not_ready"),
    (ShuttingDown(), 503, "shutting_down"),
    (DeadlineExceeded("first_token", 30), 504, "first_token_timeout"),
    (DeadlineExceeded("inter_token", 2.5), 504, "inter_token_timeout"),
    (DeadlineExceeded("total", 600), 504, "total_timeout"),
    (EngineError(SECRET), 500, "engine_error"),
    (EngineRefused(SECRET), 400, "refused_by_engine"),
    (EngineOverloaded(SECRET), 503, "overloaded"),
    (EngineShutDown(SECRET), 502, "worker_lost"),
    (EnginePrefillFailed(SECRET), 502, "prefill_failed"),
    (RouterError(SECRET), 500, "routing_failed"),
    (NoWorkers("tiny"), 503, "no_workers"),
    (UnknownWorker(7, "tiny"), 400, "unknown_worker"),
    (UnknownRank(3, "tiny"), 400, "unknown_rank"),
    (SessionUnavailable("s", 7), 503, "session_unavailable"),
    (WorkerRequired(), 400, "worker_required"),
    (AllWorkersBusy("tiny", 3, BUSY), 503, "all_workers_busy"),
    (QueueFull(10), 503, "queue_full"),
    (QueueTimeout(30.0), 503, "queue_timeout"),
    (ReplicaNotReady(5, 9), 503, "not_ready"),
    (LogBacklogFull(100), 503, "log_unavailable"),
    (WorkerError(SECRET), 500, "worker_error"),
    (WorkerLost(7, SECRET), 502, "worker_lost"),
    (CannotConnect(7, SECRET, SECRET), 502, "worker_lost"),
    (WorkerBacklogged(7, 100), 503, "overloaded"),
    (FrameTooLarge(2, 1), 400, "request_too_large"),
    (LogUnavailable(SECRET), 503, "log_unavailable"),
    (BufferFull(SECRET, 1), 503, "log_unavailable"),
    (LogGap(1, 3), 500, "internal_error"),
    (ZeroDivisionError(SECRET), 500, "internal_error"),
]


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


@pytest.mark.parametrize(("error", "status", "code"), CASES, ids=lambda case: type(case).__name__)
def test_every_error_has_one_shape(error: Exception, status: int, code: str) -> None:
    answer = http_of(error)
    body = json.loads(answer.body)
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], code_of(error)) == (code, code)
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert SECRET not in answer.body.decode()
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert (body["error"]["type"] == "invalid_request_error") == (status < 500 and status != 408)


def test_the_cases_above_cover_the_tree_and_the_table() -> None:
    covered = {type(error) for error, _, _ in CASES}
    assert set(subclasses(FrontendError)) | set(ROWS) - {Exception} <= covered


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (BadRequest("no", "stop"), "stop"),
        (BadRequest("no"), None),
        (ModelNotFound("gpt", []), "model"),
        (ContextLengthExceeded(9, None, 8, "prompt"), "prompt"),
        (NoWorkers("tiny"), None),
    ],
)
def test_the_field_at_fault_is_named(error: Exception, param: str | None) -> None:
    assert json.loads(error_body(error))["error"]["param"] == param


def test_headers_that_go_with_a_status() -> None:
    assert http_of(MethodNotAllowed("GET", ["POST", "HEAD"])).headers["Allow"] == "HEAD, POST"
    closing = [type(error) for error, _, _ in CASES if "Connection" in http_of(error).headers]
    assert closing == [RequestTimeout, ClientTooSlow, BodyTooLarge, ShuttingDown]


def test_a_refusal_for_load_says_which_threshold_which_value_and_how_many_workers() -> None:
    message = json.loads(error_body(AllWorkersBusy("tiny", 3, BUSY)))["error"]["message"]
    assert message.startswith(
        "Service temporarily unavailable: All workers are busy, please retry later; "
    )
    for fact in ("active_prefill_tokens_threshold", "1000", "1777", "3 workers", "tiny"):
        assert fact in message


def test_only_what_says_busy_has_the_status_that_is_chosen_for_it() -> None:
    chosen = {
        type(error)
        for error, status, _ in CASES
        if status_of(error, 529) != status_of(error) == status
    }
    busy = {AllWorkersBusy, QueueFull, QueueTimeout, EngineOverloaded, WorkerBacklogged}
    assert chosen == busy
    answer = http_of(QueueFull(10), 529)
    assert (answer.status, answer.headers["Retry-After"]) == (529, "1")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", EngineRefused),
        ("overloaded", EngineOverloaded),
        ("shutting_down", EngineShutDown),
        ("internal", EngineError),
        ("something new", EngineError),
    ],
)
def test_what_an_engine_says(code: str, kind: type[EngineError]) -> None:
    error = engine_error(code, SECRET)
    assert type(error) is kind
    assert error.detail == SECRET


def test_an_errors_row_is_that_of_the_nearest_class_above() -> None:
    class Stricter(BadRequest):
        pass

    class Unheard(Exception):
        pass

    assert row_of(Stricter("no")) is ROWS[BadRequest]
    assert row_of(Unheard()) is ROWS[Exception]
    assert row_of(EngineRefused("no")) is ROWS[EngineRefused]


@pytest.mark.parametrize(
    "error",
    [
        ModelNotFound("x" * 1_000_000, ["tiny"] * 1000),
        RouteNotFound("GET", "/" + "x" * 1_000_000),
        MethodNotAllowed("x" * 1_000_000, ["POST"]),
        UnsupportedMediaType("x" * 1_000_000),
    ],
)
def test_a_clients_own_words_are_cut_short(error: Exception) -> None:
    assert len(error_body(error)) < 1000


def test_what_is_not_unicode_is_still_answered_in_utf8() -> None:
    for error in (RouteNotFound("GET", "/\udcff"), BadRequest("\ud800")):
        json.loads(http_of(error).body.decode())


def test_models_that_exist_are_listed() -> None:
    assert str(ModelNotFound("gpt", ["a", "b"])).endswith("served now: a, b")
    assert str(ModelNotFound("gpt", [])).endswith("served now: none")
