"""Access to the service: API keys, or without keys a check that the request does not come from a foreign web page."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.requests import Request

from edge_runtime.common.network import is_loopback
from edge_runtime.service.errors import ApiError

# Path prefixes that give access to prompts and answers, and therefore require a key.
GUARDED_PATHS = ("/v1/", "/events")


class RequestGuard:
    """Admits or refuses requests by their headers."""

    def __init__(self, keys: Collection[str], local: bool) -> None:
        """
        Args:
            keys: requests under `GUARDED_PATHS` must carry one of them as bearer token; empty admits every request.
            local: the service listens on loopback only, so a request whose Host header names another host comes from
                a web page (DNS rebinding) and is refused. Not checked if there are keys.
        """
        self._keys = [key.encode() for key in keys]
        self._local = local and not keys

    def check(self, request: Request) -> None:
        """Raise ApiError (401 or 403) unless the request may be served."""
        host = _host_without_port(request.headers.get("host", ""))
        if self._local and not _is_loopback_host(host):
            raise ApiError(403, f"this service is local and does not answer for the host {host[:80]!r}")
        if not self._keys or not request.scope["path"].startswith(GUARDED_PATHS):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self._keys):
            message = "this service requires one of its API keys: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")


def _host_without_port(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_loopback_host(host: str) -> bool:
    return not host or host.endswith(".localhost") or is_loopback(host)
