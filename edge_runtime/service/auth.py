"""Access to the service: API keys, or without keys a check that the request does not come from a foreign web page."""

from __future__ import annotations

import hmac

import msgspec
from starlette.requests import Request

from edge_runtime.common.network import HostNames
from edge_runtime.service.errors import ApiError

# Path prefixes that give access to prompts and answers, and therefore require a key.
GUARDED_PATHS = ("/v1/", "/events")


class AccessRules(msgspec.Struct, frozen=True):
    """Who may use the service.

    Attributes:
        keys: requests under `GUARDED_PATHS` must carry one of them as bearer token; empty admits every request.
        local: the service listens on loopback only, so a request whose Host header names another host comes from a web
            page (DNS rebinding), or through a proxy, and is refused. Not checked if there are keys.
        hosts: further names under which such a service answers.
        origins: web pages of these origins may use the service from browsers (CORS); `*` for all.
    """

    keys: frozenset[str] = frozenset()
    local: bool = True
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class RequestGuard:
    """Admits or refuses requests by their headers."""

    def __init__(self, rules: AccessRules) -> None:
        self._keys = [key.encode() for key in rules.keys]
        self._hosts = HostNames(rules.hosts) if rules.local and not rules.keys else None

    def check(self, request: Request) -> None:
        """Raise ApiError (401 or 403) unless the request may be served."""
        name = self._hosts.foreign_name(request.headers.get("host", "")) if self._hosts else None
        if name is not None:
            raise ApiError(
                403,
                f"this service is local and does not answer for the host {name[:80]!a}: add the name to "
                "service.allowed_hosts (--allowed-hosts), or require API keys (service.api_key_file)",
                code="host_not_allowed",
            )
        if not self._keys or not request.scope["path"].startswith(GUARDED_PATHS):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self._keys):
            message = "this service requires one of its API keys: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
