"""Serves the static files of the dashboard, a page that talks to no host but the board it was loaded from."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

STATIC_DIRECTORY = Path(__file__).parent / "static"
# File name and media type by path.
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/feed.js": ("feed.js", "text/javascript"),
}
HEADERS = {
    # Text that a model writes into this page can neither run as a script nor contact another host.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # After an update, browsers must not keep showing the previous page.
    "cache-control": "no-cache",
}


async def serve_file(request: Request) -> Response:
    """GET one of `PAGE_FILES`. The files contain no secrets and need no API key; the page asks for one if required."""
    name, media_type = PAGE_FILES[request.scope["path"]]
    return Response(_read(name), headers=HEADERS, media_type=media_type)


@cache
def _read(name: str) -> bytes:
    return (STATIC_DIRECTORY / name).read_bytes()
