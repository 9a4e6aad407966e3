"""Building blocks of OpenAPI 3.1 documents, and the cache from which a server answers with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

REF = "#/components/schemas/{name}"
JSON = "application/json"
TEXT = "text/plain"
# Statuses that carry a Retry-After header.
RETRY_STATUSES = ("429", "503")


class DocumentCache:
    """The documents of one server as JSON, each built once, in a thread: that takes milliseconds."""

    def __init__(self, build: Callable[..., dict[str, Any]]) -> None:
        self._build = build
        self._documents: dict[tuple[object, ...], asyncio.Task[bytes]] = {}

    async def get(self, *arguments: Any) -> bytes:
        """Return the document that `build(*arguments)` builds."""
        if arguments not in self._documents:
            self._documents[arguments] = asyncio.create_task(asyncio.to_thread(self._encode, *arguments))
        # A client that disconnects meanwhile must not cancel the build for the others.
        return await asyncio.shield(self._documents[arguments])

    def _encode(self, *arguments: Any) -> bytes:
        return msgspec.json.encode(self._build(*arguments))


def schema_ref(name: str) -> dict[str, str]:
    """Return a reference to the schema component `name`."""
    return {"$ref": REF.format(name=name)}


def build_operation(
    summary: str, content: Mapping[str, Any], errors: Mapping[str, str], error_schema: str, success: str = "200"
) -> dict[str, Any]:
    """Build an operation object.

    Args:
        content: schema of the success response by media type; empty if it has no body.
        errors: description of every error response by status.
        error_schema: name of the schema component of their bodies.
        success: status of the success response.
    """
    responses: dict[str, Any] = {success: {"description": summary}}
    if content:
        responses[success]["content"] = {media_type: {"schema": schema} for media_type, schema in content.items()}
    for status, description in errors.items():
        responses[status] = {
            "description": description,
            "content": {JSON: {"schema": schema_ref(error_schema)}},
        }
        if status in RETRY_STATUSES:
            seconds = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            responses[status]["headers"] = {"Retry-After": seconds}
    return {"summary": summary, "responses": responses}
