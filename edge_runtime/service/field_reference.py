"""Prints the README's reference of all request fields: `python -m edge_runtime.service.field_reference`."""

from __future__ import annotations

import textwrap

import msgspec

from edge_runtime.service.field_policy import IGNORED_FIELDS, REFUSED_FIELDS
from edge_runtime.service.requests import ChatRequest, CompletionRequest, GenerationRequest

# Columns of the README's text.
WIDTH = 130


def render_reference() -> str:
    """Return the reference in Markdown. A field's meaning is the description of its annotation."""
    endpoints: dict[tuple[str, str], list[str]] = {}
    kinds: tuple[type[GenerationRequest], ...] = (CompletionRequest, ChatRequest)
    for kind in kinds:
        for field in msgspec.structs.fields(kind):
            metadata = getattr(field.type, "__metadata__", ())
            meaning = next(item.description for item in metadata if getattr(item, "description", None))
            endpoints.setdefault((field.encode_name, meaning), []).append(kind.endpoint)
    rows = ["| field | endpoint | meaning |", "|---|---|---|"]
    for (name, meaning), where in endpoints.items():
        rows.append(f"| `{name}` | {'both' if len(where) == len(kinds) else where[0]} | {meaning} |")
    ignored = "Accepted and ignored: " + ", ".join(f"`{name}`" for name in sorted(IGNORED_FIELDS)) + "."
    refused = ", ".join(f"`{name}`" for name in sorted(REFUSED_FIELDS)) + "."
    refused = f"Refused by name, unless the value changes nothing: {refused}"
    fill = textwrap.TextWrapper(WIDTH, break_on_hyphens=False).fill
    return "\n".join([*rows, "", fill(ignored), "", fill(refused)])


if __name__ == "__main__":
    print(render_reference())
