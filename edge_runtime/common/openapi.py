"""Building blocks of OpenAPI 3.1 documents: a schema reference, and an operation with its error responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REF = "#/components/schemas/{name}"
JSON = "application/json"
TEXT = "text/plain"
# Statuses that carry a Retry-After header.
RETRY_STATUSES = ("429", "503")


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
