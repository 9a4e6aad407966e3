"""Prints the README's reference of all request fields: `python -m edge_runtime.service.field_reference`."""

from __future__ import annotations

import textwrap
from typing import get_args

import msgspec

from edge_runtime.service.field_policy import IGNORED_FIELDS, REFUSED_FIELDS, EndpointName
from edge_runtime.service.requests import ChatRequest, CompletionRequest, EndpointRequest
from edge_runtime.service.responses.requests import ResponsesRequest

# Columns of the README's text.
WIDTH = 130


def render_reference() -> str:
    """Return the reference in Markdown. A field's meaning is the description of its annotation."""
    endpoints: dict[tuple[str, str], list[str]] = {}
    kinds: tuple[type[EndpointRequest], ...] = (CompletionRequest, ChatRequest, ResponsesRequest)
    for kind in kinds:
        for field in msgspec.structs.fields(kind):
            metadata = getattr(field.type, "__metadata__", ())
            meaning = next(item.description for item in metadata if getattr(item, "description", None))
            endpoints.setdefault((field.encode_name, meaning), []).append(kind.endpoint)
    rows = ["| field | endpoint | meaning |", "|---|---|---|"]
    for (name, meaning), where in endpoints.items():
        rows.append(f"| `{name}` | {'all' if len(where) == len(kinds) else ', '.join(where)} | {meaning} |")
    ignored = ", ".join(f"`{name}`" for name in sorted(IGNORED_FIELDS)) + "."
    ignored = f"Accepted and ignored by endpoints that the table does not name: {ignored}"
    refused = ", ".join(_refused_name(name) for name in sorted(REFUSED_FIELDS)) + "."
    refused = f"Refused by name, unless the value changes nothing: {refused}"
    fill = textwrap.TextWrapper(WIDTH, break_on_hyphens=False).fill
    return "\n".join([*rows, "", fill(ignored), "", fill(refused)])


def _refused_name(name: str) -> str:
    endpoints = REFUSED_FIELDS[name].endpoints
    where = "" if len(endpoints) == len(get_args(EndpointName)) else f" ({', '.join(endpoints)})"
    return f"`{name}`{where}"


if __name__ == "__main__":
    print(render_reference())
