"""Serves the files of the web page: a chat beside a live view. It talks to no host but the board it comes from."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

STATIC_DIRECTORY = Path(__file__).parent / "static"
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "json": "application/json"}
SCRIPTS = ("page", "charts", "chat", "dom", "feed", "live", "markdown", "message", "origins", "store")
NAMES = ("page.css", "words.json", *(f"{name}.js" for name in SCRIPTS))
# File name by path.
PAGE_FILES = {"/": "index.html", **{f"/{name}": name for name in NAMES}}
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
    name = PAGE_FILES[request.scope["path"]]
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    headers = {**HEADERS, "vary": "accept-encoding", **({"content-encoding": "gzip"} if zipped else {})}
    return Response(_read(name, zipped=zipped), headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])


@cache
def _read(name: str, *, zipped: bool) -> bytes:
    contents = (STATIC_DIRECTORY / name).read_bytes()
    return gzip.compress(contents) if zipped else contents
