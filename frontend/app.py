"""The HTTP application: routes, request bodies, and the one place where errors become answers."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from frontend import docs_page, infra
from frontend.boards import Boards
from frontend.busy_threshold import BusyThresholdApi
from frontend.completions import chat_completions, completions
from frontend.errors import (
    OVERLOAD_STATUS,
    BodyTooLarge,
    MethodNotAllowed,
    RouteNotFound,
    http_of,
    row_of,
)
from frontend.openapi import specification
from frontend.paths import OPENAPI, Paths
from frontend.service import FRONTEND, Frontend

_log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_KNOWN_ID = web.RequestKey("request_id", str)
REQUEST_ID_CHARS_MAX = 256

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(frontend: Frontend, paths: Paths | None = None) -> web.Application:
    """The application around `frontend`; it starts and stops nothing itself. paths: None: the
    usual ones."""
    at = paths or Paths()
    limits = frontend.limits
    boards = Boards(lambda: [service.thresholds for service in frontend.services.values()])
    app = web.Application(middlewares=[answer_errors], client_max_size=limits.body_bytes_max)
    app[FRONTEND] = frontend
    app.router.add_post(at.chat, chat_completions)
    app.router.add_post(at.completions, completions)
    app.router.add_get(at.models, infra.list_models)
    app.router.add_get(at.model, infra.one_model)
    app.router.add_get(at.health, infra.health)
    app.router.add_get(at.live, infra.live)
    app.router.add_get(at.metrics, infra.metrics)
    document = specification(at, frontend.overload_status)
    app.router.add_get(OPENAPI, infra.constant_json(document))
    app.add_routes(docs_page.routes())
    app.add_routes(BusyThresholdApi(boards, limits).routes())
    app.on_response_prepare.append(_name_request)
    return app


def request_id_of(request: web.Request) -> str:
    """The client's own x-request-id where it sent a usable one, else one of ours; the same for the
    whole request."""
    known = request.get(_KNOWN_ID)
    if known is None:
        known = request.headers.get(REQUEST_ID, "")
        if not (known.isascii() and known.isprintable() and 0 < len(known) <= REQUEST_ID_CHARS_MAX):
            known = str(uuid.uuid4())
        request[_KNOWN_ID] = known
    return known


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[REQUEST_ID] = request_id_of(request)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error leaves here, in one shape. What has no row is a bug of ours: 500, and the log."""
    try:
        return await handler(request)
    except asyncio.CancelledError:
        raise
    except web.HTTPMethodNotAllowed as error:
        return _answer(MethodNotAllowed(request.method, list(error.allowed_methods)))
    except web.HTTPNotFound:
        return _answer(RouteNotFound(request.method, request.path))
    except web.HTTPRequestEntityTooLarge:
        return _answer(BodyTooLarge(request.app[FRONTEND].limits.body_bytes_max))
    except Exception as error:  # the outermost edge of a request
        if row_of(error).label == "internal":
            _log.error(
                "request failed: %s",
                error,
                exc_info=error,
                extra={"request_id": request_id_of(request)},
            )
        return _answer(error, request.app[FRONTEND].overload_status)


def _answer(error: Exception, overload_status: int = OVERLOAD_STATUS) -> web.Response:
    status, headers, body = http_of(error, overload_status)
    response = web.Response(status=status, headers=headers, body=body)
    if headers.get("Connection") == "close":
        response.force_close()
    return response
