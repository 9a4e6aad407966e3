"""Wraps all routes: gives every request an id, and lets web pages of permitted origins read answers (CORS)."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.service.auth import AccessRules
from edge_runtime.service.field_policy import IGNORED_HEADER

REQUEST_ID_HEADER = "x-request-id"
# Chosen: an id appears in the log and in a header.
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Key of the ASGI scope.
REQUEST_ID_KEY = "flexspec.request_id"


class Middleware:
    """An ASGI application around the routes, whose rules can change.

    Each response carries `x-request-id`: the client's if it sent a usable one, else a new one.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self.apply(rules)

    def apply(self, rules: AccessRules) -> None:
        """Use other rules from now on."""
        self._inner = self._app
        if rules.origins:
            self._inner = CORSMiddleware(
                self._app,
                allow_origins=rules.origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                # A public page needs this to reach a private address; its origin is one that the owner named.
                allow_private_network=True,
                expose_headers=(REQUEST_ID_HEADER, IGNORED_HEADER, "retry-after"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if REQUEST_ID_PATTERN.fullmatch(given) else "req_" + secrets.token_hex(12)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._inner({**scope, REQUEST_ID_KEY: request_id}, receive, send_with_id)
