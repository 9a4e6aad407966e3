"""Who is served: whoever has a key; without keys, whoever does not come through somebody else's web page."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.requests import Request

from edge_runtime.service.errors import Refusal
from edge_runtime.settings.validators import is_loopback

# Paths below which prompts and answers pass by: who has no key reads none.
GUARDED = ("/v1/", "/events")


class Callers:
    """Decides by a request's headers."""

    def __init__(self, keys: Collection[str], local: bool) -> None:
        """
        Args:
            keys: one of them must come as bearer token with requests below `GUARDED`; none: everybody is served.
            local: only loopback is listened on, so that a request for another host's name comes from a web page that
                has no business here. Not checked where there are keys.
        """
        self._keys = [key.encode() for key in keys]
        self._local = local and not keys

    def check(self, request: Request) -> None:
        """Raises Refusal (401, 403) unless the request may be served."""
        host = _host(request.headers.get("host", ""))
        if self._local and not _is_loopback(host):
            raise Refusal(403, f"this service is local, and no host of the name {host[:80]!r}")
        if not self._keys or not request.scope["path"].startswith(GUARDED):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self._keys):
            raise Refusal(
                401,
                "this service wants one of its API keys: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
            )


def _host(header: str) -> str:
    """The name or address in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_loopback(host: str) -> bool:
    return not host or host.endswith(".localhost") or is_loopback(host)
