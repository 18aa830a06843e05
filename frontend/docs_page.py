"""/docs: Swagger UI on our own /openapi.json, from files of the package swagger-ui-py (the extra
`docs`). Nothing is fetched from elsewhere."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from aiohttp import web

from frontend.errors import RouteNotFound
from frontend.paths import DOCS

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>reckon</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="swagger-ui-bundle.js"></script>
<script src="start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "../openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null
});
"""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}


class DocsNotInstalled(RouteNotFound):
    def __str__(self) -> str:
        return (
            "the documentation's files are not installed here (pip install 'reckon[docs]'); "
            "the specification is at /openapi.json"
        )


def routes() -> list[web.RouteDef]:
    return [web.get(DOCS, _redirect), web.get(DOCS + "/", _page), web.get(DOCS + "/{file}", _file)]


async def _redirect(request: web.Request) -> web.Response:
    # Relative, for a proxy may have put something in front of our path.
    return web.Response(status=303, headers={"Location": DOCS.removeprefix("/") + "/"})


async def _page(request: web.Request) -> web.Response:
    """Raises DocsNotInstalled."""
    _folder(request)
    return _answer(_PAGE, "text/html")


async def _file(request: web.Request) -> web.StreamResponse:
    """Raises DocsNotInstalled, and RouteNotFound for what is none of the page's files."""
    folder, name = _folder(request), request.match_info["file"]
    if name == "start.js":
        return _answer(_START, "text/javascript")
    if name not in _FILES:
        raise RouteNotFound(request.method, request.path)
    return web.FileResponse(folder / name, headers=_HEADERS | {"Content-Type": _FILES[name]})


def _answer(text: str, content_type: str) -> web.Response:
    return web.Response(text=text, content_type=content_type, headers=_HEADERS)


def _folder(request: web.Request) -> Path:
    folder = _static_folder()
    if folder is None:
        raise DocsNotInstalled(request.method, request.path)
    return folder


@cache
def _static_folder() -> Path | None:
    """Of the files; None: not installed. The package itself is not imported."""
    found = find_spec("swagger_ui")
    for place in [] if found is None else found.submodule_search_locations or []:
        folder = Path(place) / "static"
        if all((folder / name).is_file() for name in _FILES):
            return folder
    return None
