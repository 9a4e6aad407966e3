"""The verifier, described in OpenAPI 3.1: its messages in JSON, with the schemas of the structs themselves.

Boards speak the same messages in msgpack, see `wire`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec

from cloud_verifier.api.admin import OPERATIONS
from cloud_verifier.api.codec import ADMIN
from edge_runtime.common.openapi import JSON, REF, TEXT, of, operation
from edge_runtime.protocol import messages

LINES = messages.STREAMS[JSON]

REFUSED = {
    "400": "The body is malformed or damaged, or asks for what no round can be.",
    "401": "No token, or one that is not known.",
    "403": "The token's role does not allow this.",
    "404": "No such model, or no such session of this token's (any more).",
    "409": "The round does not fit what the session has played, or the draft not the target; or the registry does not "
    "allow this.",
    "413": "The body is too long, or the prompt.",
    "429": "Over a limit of this token's; come back after Retry-After.",
    "500": "A fault of the verifier.",
    "503": "The target is still loading, too many rounds wait, or the verifier is about to end; see Retry-After.",
}
ADMINISTERING = ("400", "401", "403", "404", "409", "413", "500", "503")
PLAYING = ("400", "401", "403", "404", "409", "413", "429", "500", "503")
# What needs a role, by path; the rest is for everybody.
GUARDED = ("/v1/", "/metrics", ADMIN)


def document(vocabulary_size: int, context: int, max_body: int, *, tokens: bool, admin: bool = False) -> dict[str, Any]:
    """The description of a verifier of targets with so many tokens and so long texts.

    Args:
        tokens: it asks for some.
        admin: it has the admin API of targets.
    """
    operations = OPERATIONS if admin else ()
    kinds = [
        messages.OpenRequest,
        messages.OpenReply,
        messages.RoundRequest,
        messages.Frame,
        messages.ModelList,
        messages.Refusal,
    ]
    kinds += {kind: None for one in operations for kind in (one.asked, one.told) if kind}
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocabulary_size}
    played, opened = schemas["RoundRequest"]["properties"], schemas["OpenRequest"]["properties"]
    for request in (played, opened):
        request["v"] = {"const": messages.VERSION}
    opened["prompt"] = {"type": "array", "items": token, "minItems": 1, "maxItems": context - 1}
    played["draft"] = {"type": "array", "items": token, "maxItems": messages.MOST_DRAFT, "default": []}
    played["n"]["maximum"] = messages.MOST_OWN
    played["siblings"] |= {
        "description": f"By index of `draft`, which has to have one. Draft tokens and siblings are at most "
        f"{messages.MOST_NODES - 1} together.",
        "propertyNames": {"pattern": f"^({'|'.join(map(str, range(messages.MOST_DRAFT)))})$"},
        "additionalProperties": {"type": "array", "items": token},
    }
    # Without prefixItems, which fewer readers understand.
    pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    schemas["Frame"]["properties"]["close_calls"] = {"type": "array", "items": pair}
    sampling = schemas["Sampling"]["properties"]
    sampling["seed"]["exclusiveMaximum"] = 1 << 64
    # Hardly any is none: what it would divide by it would overflow.
    sampling["temperature"]["anyOf"] = [{"const": 0}, {"minimum": 0.001}]
    schemas["Refusal"]["properties"]["code"] = {"enum": [str(code) for code in messages.ErrorCode]}
    named = {"name": "session", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths: dict[str, Any] = {
        "/v1/sessions": {"post": _playing("Open a session, and play its first round", "OpenRequest", "OpenReply")},
        "/v1/sessions/{session}/rounds": {
            "post": _playing("Verify a draft, and continue", "RoundRequest", "Frame"),
            "parameters": [named],
        },
        "/v1/sessions/{session}": {
            "delete": _operation("Free it; one that is gone is no error", {}, ("401", "403"), "204"),
            "parameters": [named],
        },
        "/v1/models": {"get": _operation("What is served", {JSON: of("ModelList")}, ("401", "403", "500", "503"))},
        "/healthz": {"get": _operation("Whether the process lives", {TEXT: {"type": "string"}}, ())},
        "/readyz": {"get": _operation("Whether sessions can be opened", {TEXT: {"type": "string"}}, ("500", "503"))},
        "/metrics": {"get": _operation("For Prometheus", {TEXT: {"type": "string"}}, ("401", "403"))},
        "/openapi.json": {"get": _operation("This document", {JSON: {"type": "object"}}, ("500", "503"))},
    }
    for one in operations:
        described = _operation(one.summary, {JSON: of(one.told.__name__)}, ADMINISTERING)
        if one.asked:
            schemas[one.asked.__name__]["properties"]["v"] = {"const": messages.VERSION}
            described["requestBody"] = {"required": True, "content": {JSON: {"schema": of(one.asked.__name__)}}}
        paths.setdefault(one.path, {})[one.method.lower()] = described
    components: dict[str, Any] = {"schemas": schemas}
    if tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, item in paths.items():
            for method in item.keys() & {"get", "post", "delete"} if path.startswith(GUARDED) else ():
                item[method]["security"] = [{"token": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FlexSpec verifier",
            "version": importlib.metadata.version("flexspec"),
            "summary": "Says of drafted tokens which ones its target would have said, and what comes next.",
            "description": f"Bodies have at most {max_body} bytes. A request may have a name of its own, in the header "
            "x-request-id: its answer and the log then have it, too.",
        },
        "paths": paths,
        "components": components,
    }


def _playing(summary: str, body: str, answer: str) -> dict[str, Any]:
    frames = {"type": "string", "description": f"With `stream`: the {answer}, then Frames, a line each."}
    playing = _operation(summary, {JSON: of(answer), LINES: frames}, PLAYING)
    playing["requestBody"] = {"required": True, "content": {JSON: {"schema": of(body)}}}
    return playing


def _operation(summary: str, content: dict[str, Any], refused: tuple[str, ...], success: str = "200") -> dict[str, Any]:
    return operation(summary, content, {status: REFUSED[status] for status in refused}, "Refusal", success)
