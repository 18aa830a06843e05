"""What a client is told when something goes wrong, and the one table that says how.

    FrontendError
    ├── BadRequest                  the request breaks a rule; `param` names the field
    │   ├── ContextLengthExceeded   prompt and output do not fit the model's context
    │   ├── NotAvailableYet         a field of the API whose machinery is not built
    │   └── TemplateFailed          the chat template refused these messages
    ├── ModelNotFound
    ├── RouteNotFound
    ├── MethodNotAllowed
    ├── BodyTooLarge
    ├── UnsupportedMediaType
    ├── RequestTimeout              the client did not send its request in time
    ├── ClientTooSlow               the client does not read its answer; its connection is closed
    ├── NotReady                    still starting, or the state is still being read
    ├── ShuttingDown
    ├── DeadlineExceeded            the output did not come in the time that this server gives it
    └── EngineError                 what an engine said instead of output; see `engine_error`
        ├── EngineRefused           this request, for what it asks
        ├── EngineOverloaded
        ├── EngineShutDown
        └── EnginePrefillFailed     the prompt that another worker should hand over did not come

The rooms below raise errors of their own (`router.errors`, `workers.errors`, `eventstore.errors`);
they stand in the same table. An error's row is that of the nearest class in its MRO that has one;
an error without a row is a bug of ours, and the client is told no more than that.

What an engine, a worker or the log says never reaches the client: those rows have a fixed text.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from eventstore.errors import BufferFull, LogUnavailable
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

SHOWN_CHARS_MAX = 100
"""A client's own words are repeated to it up to this length."""
OVERLOAD_STATUS = 503
"""Unless DYN_HTTP_OVERLOAD_STATUS_CODE says otherwise."""


def shown(text: str) -> str:
    """A client's text for use in a message: in quotes, cut where it gets long."""
    return repr(text if len(text) <= SHOWN_CHARS_MAX else text[:SHOWN_CHARS_MAX] + "…")


class FrontendError(Exception):
    """Base of what the frontend itself finds wrong. `str(error)` is meant for the client."""

    param: str | None = None
    """The request field at fault, such as `messages[0].content`."""
    code: str | None = None
    """Overrides the code of the table's row."""


class BadRequest(FrontendError):
    def __init__(
        self, message: str, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class ContextLengthExceeded(BadRequest):
    """max_tokens: what the request asks for besides its prompt; None if it does not say."""

    def __init__(
        self, prompt_tokens: int, max_tokens: int | None, context_length: int, param: str
    ) -> None:
        asked = f"the prompt has {prompt_tokens}"
        if max_tokens is not None:
            asked += f" and {max_tokens} more are asked for"
        super().__init__(
            f"the model's context is {context_length} tokens; {asked}",
            param,
            "context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


class NotAvailableYet(BadRequest):
    """what: the field, with its value where only that is at fault, such as `n > 1`."""

    def __init__(self, what: str, param: str) -> None:
        super().__init__(f"{what} is not available yet", param, "not_available_yet")


class TemplateFailed(BadRequest):
    def __init__(self, why: str) -> None:
        super().__init__(
            f"the chat template can't render this request: {why}", "messages", "template_failed"
        )
        self.why = why


class ModelNotFound(FrontendError):
    """known: the names there are."""

    KNOWN_MAX = 20

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(name, tuple(known))
        self.name = name
        self.known = tuple(known)
        self.param = "model"

    def __str__(self) -> str:
        listed = ", ".join(self.known[: self.KNOWN_MAX])
        if len(self.known) > self.KNOWN_MAX:
            listed += ", …"
        return f"there is no model {shown(self.name)}; served now: {listed or 'none'}"


class RouteNotFound(FrontendError):
    def __init__(self, method: str, path: str) -> None:
        super().__init__(method, path)
        self.method = method
        self.path = path

    def __str__(self) -> str:
        return f"there is no route {shown(self.method + ' ' + self.path)}"


class MethodNotAllowed(FrontendError):
    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__(method, tuple(allowed))
        self.method = method
        self.allowed = tuple(sorted(allowed))

    def __str__(self) -> str:
        return f"this route takes {', '.join(self.allowed)}, not {shown(self.method)}"


class BodyTooLarge(FrontendError):
    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"the body is over the limit of {self.max_bytes} bytes (DYN_HTTP_BODY_LIMIT_MB)"


class UnsupportedMediaType(FrontendError):
    def __init__(self, content_type: str | None) -> None:
        super().__init__(content_type)
        self.content_type = content_type

    def __str__(self) -> str:
        got = shown(self.content_type) if self.content_type else "none was given"
        return f"the content-type must be application/json; {got}"


class RequestTimeout(FrontendError):
    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"the request was not complete after {self.timeout_s:g} s"


class ClientTooSlow(FrontendError):
    """There is nobody to tell; it ends what runs for the client, and names the end in the log."""

    def __init__(self, unread_bytes: int) -> None:
        super().__init__(unread_bytes)
        self.unread_bytes = unread_bytes

    def __str__(self) -> str:
        return f"the client does not read: {self.unread_bytes} bytes wait for it"


class NotReady(FrontendError):
    def __str__(self) -> str:
        return "this frontend is still starting; try again soon"


class ShuttingDown(FrontendError):
    def __str__(self) -> str:
        return "this frontend is shutting down; try another"


Deadline: TypeAlias = Literal["first_token", "inter_token", "total"]

_DEADLINES: dict[Deadline, str] = {
    "first_token": "there was no output {0:g} s after the request",
    "inter_token": "there was no further output for {0:g} s",
    "total": "the answer was not complete {0:g} s after the request",
}


class DeadlineExceeded(FrontendError):
    """kind: what was late; `error.code` names it. limit_s: how long it may take."""

    def __init__(self, kind: Deadline, limit_s: float) -> None:
        super().__init__(kind, limit_s)
        self.kind = kind
        self.limit_s = limit_s
        self.code = f"{kind}_timeout"

    def __str__(self) -> str:
        return _DEADLINES[self.kind].format(self.limit_s)


class EngineError(FrontendError):
    """detail: the engine's own words, for the log only."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class EngineRefused(EngineError):
    pass


class EngineOverloaded(EngineError):
    pass


class EngineShutDown(EngineError):
    pass


class EnginePrefillFailed(EngineError):
    """Said by a decode worker; it is not to blame."""


_ENGINE_CODES: dict[str, type[EngineError]] = {
    "invalid_request": EngineRefused,
    "overloaded": EngineOverloaded,
    "shutting_down": EngineShutDown,
    "prefill_failed": EnginePrefillFailed,
}


def engine_error(code: str, detail: str) -> EngineError:
    """The error for `workers.protocol.Output.error`; an unknown code is the engine's failure."""
    return _ENGINE_CODES.get(code, EngineError)(detail)


class Row(NamedTuple):
    """How a kind of error looks from outside.

    message: the fixed text; None: the error's own, after `lead`. label: `error_type` in the request
    metrics. closes: the connection is of no further use, for the rest of the request was not read.
    """

    status: int
    type: str
    code: str
    label: str
    message: str | None = None
    retry_after_s: int | None = None
    closes: bool = False
    lead: str = ""


_INVALID, _UNAVAILABLE, _FAILED = "invalid_request_error", "service_unavailable", "server_error"
_OVERLOAD = "overload"
_ALL_BUSY = "Service temporarily unavailable: All workers are busy, please retry later"
"""What clients of the peer may look for."""
_BUSY = "the workers are busy; try again soon"
_LOST = "the worker was lost before the answer was complete; try again"
_NO_PROMPT = "the worker that should compute the prompt failed; try again"
_LOG = "the event log can't take the request at the moment; try again soon"

ROWS: dict[type[Exception], Row] = {
    BadRequest: Row(400, _INVALID, "invalid_value", "validation"),
    ModelNotFound: Row(404, _INVALID, "model_not_found", "not_found"),
    RouteNotFound: Row(404, _INVALID, "route_not_found", "not_found"),
    MethodNotAllowed: Row(405, _INVALID, "method_not_allowed", "validation"),
    RequestTimeout: Row(408, "timeout_error", "request_timeout", "cancelled", closes=True),
    ClientTooSlow: Row(408, "timeout_error", "client_too_slow", "cancelled", closes=True),
    BodyTooLarge: Row(413, _INVALID, "body_too_large", "validation", closes=True),
    UnsupportedMediaType: Row(415, _INVALID, "unsupported_media_type", "validation"),
    NotReady: Row(503, _UNAVAILABLE, "not_ready", "unavailable", retry_after_s=1),
    ShuttingDown: Row(503, _UNAVAILABLE, "shutting_down", "unavailable", None, 1, closes=True),
    DeadlineExceeded: Row(504, "timeout_error", "timeout", "timeout"),
    EngineError: Row(500, _FAILED, "engine_error", "internal", "the engine failed"),
    EngineRefused: Row(
        400, _INVALID, "refused_by_engine", "validation", "the engine refused the request"
    ),
    EngineOverloaded: Row(503, _UNAVAILABLE, "overloaded", _OVERLOAD, _BUSY, 1),
    EngineShutDown: Row(502, _FAILED, "worker_lost", "internal", _LOST),
    EnginePrefillFailed: Row(502, _FAILED, "prefill_failed", "internal", _NO_PROMPT),
    # router.errors
    RouterError: Row(500, _FAILED, "routing_failed", "internal", "the request can't be routed"),
    NoWorkers: Row(503, _UNAVAILABLE, "no_workers", "unavailable", retry_after_s=1),
    UnknownWorker: Row(400, _INVALID, "unknown_worker", "validation"),
    UnknownRank: Row(400, _INVALID, "unknown_rank", "validation"),
    WorkerRequired: Row(400, _INVALID, "worker_required", "validation"),
    ReplicaNotReady: Row(503, _UNAVAILABLE, "not_ready", "unavailable", retry_after_s=1),
    AllWorkersBusy: Row(
        503, _UNAVAILABLE, "all_workers_busy", _OVERLOAD, None, 1, lead=f"{_ALL_BUSY}; "
    ),
    QueueFull: Row(503, _UNAVAILABLE, "queue_full", _OVERLOAD, None, 1, lead=f"{_ALL_BUSY}; "),
    QueueTimeout: Row(
        503, _UNAVAILABLE, "queue_timeout", _OVERLOAD, None, 1, lead=f"{_ALL_BUSY}; "
    ),
    SessionUnavailable: Row(
        503, _UNAVAILABLE, "session_unavailable", "unavailable", retry_after_s=1
    ),
    LogBacklogFull: Row(503, _UNAVAILABLE, "log_unavailable", "unavailable", _LOG, 2),
    # workers.errors
    WorkerError: Row(500, _FAILED, "worker_error", "internal", "the worker failed"),
    WorkerLost: Row(502, _FAILED, "worker_lost", "internal", _LOST),
    CannotConnect: Row(502, _FAILED, "worker_lost", "internal", _LOST),
    WorkerBacklogged: Row(503, _UNAVAILABLE, "overloaded", _OVERLOAD, _BUSY, 1),
    FrameTooLarge: Row(
        400, _INVALID, "request_too_large", "validation", "the request is too large for a worker"
    ),
    # eventstore.errors
    LogUnavailable: Row(503, _UNAVAILABLE, "log_unavailable", "unavailable", _LOG, 2),
    BufferFull: Row(503, _UNAVAILABLE, "log_unavailable", "unavailable", _LOG, 2),
    Exception: Row(500, _FAILED, "internal_error", "internal", "an internal error"),
}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def row_of(error: Exception) -> Row:
    return next(ROWS[kind] for kind in type(error).__mro__ if kind in ROWS)


def code_of(error: Exception) -> str:
    """`error.code` on the wire and in the log's facts."""
    own = error.code if isinstance(error, FrontendError) else None
    return own or row_of(error).code


def message_of(error: Exception) -> str:
    """What the client is told. A path or a header may hold what is not text; this always is."""
    row = row_of(error)
    message = row.lead + str(error) if row.message is None else row.message
    return message.encode("utf-8", "replace").decode()


def status_of(error: Exception, overload_status: int = OVERLOAD_STATUS) -> int:
    """overload_status: of all errors that say "busy, try again soon"."""
    return overload_status if is_overload(error) else row_of(error).status


def is_overload(error: Exception) -> bool:
    """Whether it says that the workers are busy."""
    return row_of(error).label == _OVERLOAD


def error_body(error: Exception) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`, the same for every status and route."""
    content = {
        "message": message_of(error),
        "type": row_of(error).type,
        "param": error.param if isinstance(error, FrontendError) else None,
        "code": code_of(error),
    }
    return msgspec.json.encode({"error": content})


def http_of(error: Exception, overload_status: int = OVERLOAD_STATUS) -> Answer:
    """Status, headers and body that answer `error`. A row that `closes` says so in its headers."""
    row = row_of(error)
    headers = {"Content-Type": "application/json"}
    if row.retry_after_s is not None:
        headers["Retry-After"] = str(row.retry_after_s)
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if row.closes:
        headers["Connection"] = "close"
    return Answer(status_of(error, overload_status), headers, error_body(error))
