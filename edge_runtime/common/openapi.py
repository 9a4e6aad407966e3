"""Pieces of OpenAPI 3.1 documents: an operation, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REF = "#/components/schemas/{name}"
JSON = "application/json"
TEXT = "text/plain"
# Statuses with which a client is told when to come back.
LATER = ("429", "503")


def of(name: str) -> dict[str, str]:
    """The schema of that name."""
    return {"$ref": REF.format(name=name)}


def operation(
    summary: str, content: Mapping[str, Any], refused: Mapping[str, str], error: str, success: str = "200"
) -> dict[str, Any]:
    """An operation.

    Args:
        content: schemas of the good answer, by media type; none where it has no body.
        refused: what every other status means.
        error: name of the schema of their bodies.
        success: status of the good answer.
    """
    responses: dict[str, Any] = {success: {"description": summary}}
    if content:
        responses[success]["content"] = {kind: {"schema": schema} for kind, schema in content.items()}
    for status, text in refused.items():
        responses[status] = {"description": text, "content": {JSON: {"schema": of(error)}}}
        if status in LATER:
            seconds = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            responses[status]["headers"] = {"Retry-After": seconds}
    return {"summary": summary, "responses": responses}
