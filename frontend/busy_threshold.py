"""GET, POST and DELETE /busy_threshold: the busy thresholds in force, and changing them.

A threshold is a fact in the log: what is set here is in force on every frontend, and survives them
all. Answers have the peer's shape, and say as much as the log knows of who set what and when. They
differ from the peer's where it is better that they do:

- An explicit null clears a threshold, and DELETE clears all of a model; there a null says nothing,
  so that a threshold once set stays until the process ends.
- A field that is not known is refused, for a misspelt threshold is one that does not act.
- Every error is `{"error": "…"}`, malformed JSON and a missing content type included.
"""

import asyncio
import logging
import math
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from eventstore.errors import BufferFull, LogUnavailable
from eventstore.show import iso_time
from frontend.body import read_json_body
from frontend.errors import SHOWN_CHARS_MAX, FrontendError, http_of, message_of, shown
from frontend.service import Limits
from router.busy import Thresholds

PATH = "/busy_threshold"
TOKENS_MAX = 2**63 - 1
CHANGE_S = 10.0
"""How long a change may take, the changes before it included."""
RETRY_AFTER_S = 2

_log = logging.getLogger(__name__)


class Setting(Struct, frozen=True):
    """The thresholds of a model as the log has them."""

    thresholds: Thresholds
    seq: int
    """Of the record that set them."""
    time_ns: int
    """The log's time of that record, UTC nanoseconds."""
    source: str


class ThresholdBoard(Protocol):
    """The thresholds as this replica has folded them, and the way to change them."""

    def models(self) -> list[str]:
        """Those that this frontend knows of, in order: served here, or with thresholds set."""

    def get(self, model: str) -> Setting | None:
        """None: nothing was ever set for it."""

    async def change(self, model: str, new: Thresholds, source: str) -> int:
        """Append that the thresholds of `model` are exactly these from now on.

        Returns the record's seq once this replica has applied it, so that `get` tells it. Raises
        LogUnavailable or BufferFull if the log does not take it. Cancelled, the change may still
        be made.
        """


class ThresholdChange(Struct, forbid_unknown_fields=True):
    """UNSET: leave it as it is."""

    model: str
    active_decode_blocks_threshold: float | UnsetType | None = UNSET
    active_prefill_tokens_threshold: int | UnsetType | None = UNSET
    active_prefill_tokens_threshold_frac: float | UnsetType | None = UNSET


class ThresholdClear(Struct, forbid_unknown_fields=True):
    model: str


class _Field(NamedTuple):
    """name: that of `Thresholds`. The least value of each is 0."""

    name: str
    largest: float
    range: str


_FIELDS = {
    "active_decode_blocks_threshold": _Field("active_decode_blocks", 1.0, "between 0.0 and 1.0"),
    "active_prefill_tokens_threshold": _Field(
        "active_prefill_tokens", TOKENS_MAX, f"an integer from 0 to {TOKENS_MAX}"
    ),
    "active_prefill_tokens_threshold_frac": _Field(
        "active_prefill_tokens_frac", math.inf, "0.0 or more"
    ),
}

_T = TypeVar("_T")

_change_decoder = msgspec.json.Decoder(ThresholdChange)
_clear_decoder = msgspec.json.Decoder(ThresholdClear)

_CLEARED: dict[str, Any] = dict.fromkeys(field.name for field in _FIELDS.values())


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


class BusyThresholdApi:
    """The handlers. Changes through one frontend follow one another, so that two that each set one
    threshold both last. Of two frontends' changes at the same moment the later record counts."""

    def __init__(self, board: ThresholdBoard, limits: Limits) -> None:
        self._board = board
        self._limits = limits
        self._changing = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(PATH, self.get),
            web.post(PATH, self.post),
            web.delete(PATH, self.delete),
        ]

    async def get(self, request: web.Request) -> web.Response:
        """Every model's thresholds, and since when they are in force."""
        listed = []
        for model in self._board.models():
            setting = self._board.get(model)
            since: dict[str, object] = {"since_seq": None, "since_time": None, "source": None}
            if setting is not None:
                time = iso_time(setting.time_ns, 3)
                since = {"since_seq": setting.seq, "since_time": time, "source": setting.source}
            listed.append(_fields(model, setting) | since)
        return _answer(200, {"thresholds": listed})

    async def post(self, request: web.Request) -> web.Response:
        """Set the thresholds that the body names, or tell them if it names none."""
        try:
            asked = _decode(await read_json_body(request, self._limits), _change_decoder)
            changes = {
                field.name: _in_range(key, value)
                for key, field in _FIELDS.items()
                if (value := getattr(asked, key)) is not UNSET
            }
            if changes:
                await self._change(asked.model, changes, request)
            return _answer(200, _fields(asked.model, self._board.get(asked.model)))
        except (_Refused, FrontendError, LogUnavailable, BufferFull) as error:
            return _failed(error)

    async def delete(self, request: web.Request) -> web.Response:
        """Clear the thresholds of the model that `?model=` or the body names."""
        try:
            model = request.query.get("model")
            if model is None:
                model = _decode(await read_json_body(request, self._limits), _clear_decoder).model
            await self._change(model, _CLEARED, request)
            return _answer(200, _fields(model, self._board.get(model)))
        except (_Refused, FrontendError, LogUnavailable, BufferFull) as error:
            return _failed(error)

    async def _change(self, model: str, changes: dict[str, Any], request: web.Request) -> None:
        """changes: fields of `Thresholds`; the others stay as they are in force."""
        if model not in self._board.models():
            raise _Refused(
                404,
                f"Model {shown(model)} not found. "
                "Thresholds can only be set for models that have been discovered.",
            )
        source = f"{request.method} {PATH} from {request.remote or 'a local socket'}"
        try:
            async with asyncio.timeout(CHANGE_S), self._changing:
                setting = self._board.get(model)
                before = Thresholds() if setting is None else setting.thresholds
                new = msgspec.structs.replace(before, **changes)
                seq = await self._board.change(model, new, source)
        except TimeoutError:
            raise _Refused(
                503, f"The log did not confirm the change in {CHANGE_S:g} s; it may be made yet."
            ) from None
        _log.info("busy thresholds changed model=%s seq=%d source=%s", model, seq, source)


def _decode(body: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _Refused(422, str(error)[: 3 * SHOWN_CHARS_MAX]) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(400, f"The body is not valid JSON: {error}") from error


def _in_range(key: str, value: float | None) -> float | None:
    field = _FIELDS[key]
    if value is not None and not 0 <= value <= field.largest:
        raise _Refused(400, f"{key} must be {field.range}, got {str(value)[:SHOWN_CHARS_MAX]}")
    return value


def _fields(model: str, setting: Setting | None) -> dict[str, object]:
    thresholds = Thresholds() if setting is None else setting.thresholds
    return {"model": model} | {
        key: getattr(thresholds, field.name) for key, field in _FIELDS.items()
    }


def _answer(
    status: int, content: dict[str, object], headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(content),
        headers={"Content-Type": "application/json"} | (headers or {}),
    )


def _failed(error: Exception) -> web.Response:
    if isinstance(error, _Refused):
        retry = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}
        return _answer(error.status, {"error": error.message}, retry)
    status, headers, _ = http_of(error)
    response = _answer(status, {"error": message_of(error)}, headers)
    if headers.get("Connection") == "close":
        response.force_close()
    return response
