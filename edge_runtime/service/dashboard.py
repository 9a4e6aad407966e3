"""The dashboard's files: one page that asks nobody but the board that it came from."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"
FILES = {
    "/": ("index.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/feed.js": ("feed.js", "text/javascript"),
}
HEADERS = {
    # Whatever a model writes into this page, it can neither run nor call home.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # A board that was updated must not be watched by yesterday's page.
    "cache-control": "no-cache",
}


async def file(request: Request) -> Response:
    """GET of one of the page's files. They hold no secret, so they need no key: the page asks for it."""
    name, media_type = FILES[request.scope["path"]]
    return Response(_read(name), headers=HEADERS, media_type=media_type)


@cache
def _read(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
