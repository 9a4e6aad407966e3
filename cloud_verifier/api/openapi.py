"""The OpenAPI 3.1 document of the verifier: its messages as JSON, with schemas derived from the structs.

Boards use the same messages in msgpack; see `messages`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec

from cloud_verifier.api.admin import ADMIN_OPERATIONS
from cloud_verifier.api.codec import ADMIN_PREFIX
from edge_runtime.common.openapi import JSON, REF, TEXT, build_operation, schema_ref
from edge_runtime.protocol import messages
from edge_runtime.protocol.sampling import MAX_BIASED_IDS, MAX_GRAMMAR_CHARACTERS, MAX_STOP_IDS

JSON_LINES = messages.STREAM_MEDIA_TYPES[JSON]

ERROR_DESCRIPTIONS = {
    "400": "The body is malformed or damaged, or the round is not a valid one.",
    "401": "The token is missing or unknown.",
    "403": "The token's role does not allow this, or the verifier is local and the request names another host.",
    "404": "The model or session does not exist, or not for this token.",
    "408": "The body did not arrive in time.",
    "409": "The round does not continue the session, the draft does not match the target, or the registry does not "
    "allow this.",
    "413": "The body or the prompt is too long.",
    "429": "A limit of this token is exceeded; try again after Retry-After.",
    "500": "Internal error of the verifier.",
    "503": "The target is still loading, too many rounds wait, or the verifier is draining; see Retry-After.",
}
ADMIN_ERRORS = ("400", "401", "403", "404", "408", "409", "413", "500", "503")
ROUND_ERRORS = ("400", "401", "403", "404", "408", "409", "413", "429", "500", "503")
# Paths that need a token; the others are public.
PROTECTED_PATHS = ("/v1/", "/metrics", ADMIN_PREFIX)


def build_document(
    vocabulary_size: int, context: int, max_body: int, tokens: bool, has_admin_api: bool = False
) -> dict[str, Any]:
    """Build the OpenAPI document of a verifier.

    Args:
        max_body: bytes of a request body.
        tokens: requests need a token.
        has_admin_api: the admin API of targets is available.
    """
    operations = ADMIN_OPERATIONS if has_admin_api else ()
    structs = [
        messages.OpenRequest,
        messages.OpenReply,
        messages.RoundRequest,
        messages.Frame,
        messages.ModelList,
        messages.ErrorReply,
    ]
    # A dict keeps the order and drops repeated structs.
    structs += dict.fromkeys(struct for admin in operations for struct in (admin.request, admin.reply) if struct)
    _, schemas = msgspec.json.schema_components(structs, ref_template=REF)
    _refine_schemas(schemas, vocabulary_size, context)
    session = {"name": "session", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    plain_text = {TEXT: {"type": "string"}}
    paths: dict[str, Any] = {
        "/v1/sessions": {
            "post": _round_operation("Open a session and execute its first round", "OpenRequest", "OpenReply")
        },
        "/v1/sessions/{session}/rounds": {
            "post": _round_operation("Verify a draft and continue", "RoundRequest", "Frame"),
            "parameters": [session],
        },
        "/v1/sessions/{session}": {
            "delete": _operation("Close the session; succeeds if it does not exist", {}, ("401", "403"), "204"),
            "parameters": [session],
        },
        "/v1/models": {
            "get": _operation("The models served", {JSON: schema_ref("ModelList")}, ("401", "403", "500", "503"))
        },
        "/healthz": {"get": _operation("Whether the process is alive", plain_text, ("403",))},
        "/readyz": {"get": _operation("Whether sessions can be opened", plain_text, ("403", "500", "503"))},
        "/metrics": {"get": _operation("Metrics for Prometheus", plain_text, ("401", "403"))},
        "/openapi.json": {"get": _operation("This document", {JSON: {"type": "object"}}, ("403", "500", "503"))},
    }
    for admin in operations:
        request = admin.request.__name__ if admin.request else ""
        if request:
            schemas[request]["properties"]["v"] = {"const": messages.PROTOCOL_VERSION}
        reply = {JSON: schema_ref(admin.reply.__name__)}
        described = _operation(admin.summary, reply, ADMIN_ERRORS, request=request)
        paths.setdefault(admin.path, {})[admin.method.lower()] = described
    components: dict[str, Any] = {"schemas": schemas}
    if tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, item in paths.items():
            for method in item.keys() & {"get", "post", "delete"} if path.startswith(PROTECTED_PATHS) else ():
                item[method]["security"] = [{"token": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FlexSpec verifier",
            "version": importlib.metadata.version("flexspec"),
            "summary": "Verifies drafted tokens with the target model and generates the tokens that follow.",
            "description": f"Bodies have at most {max_body} bytes. The header x-request-id of a request is returned "
            "with the response, and logged where the verifier logs requests.",
        },
        "paths": paths,
        "components": components,
    }


def _refine_schemas(schemas: dict[str, Any], vocabulary_size: int, context: int) -> None:
    """Add to the generated schemas the bounds that the structs' types do not express."""
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocabulary_size}
    round_fields, open_fields = schemas["RoundRequest"]["properties"], schemas["OpenRequest"]["properties"]
    for fields in (round_fields, open_fields):
        fields["v"] = {"const": messages.PROTOCOL_VERSION}
    open_fields["prompt"] = {"type": "array", "items": token, "minItems": 1, "maxItems": context - 1}
    round_fields["draft"] = {"type": "array", "items": token, "maxItems": messages.MAX_DRAFT_TOKENS, "default": []}
    round_fields["n"]["maximum"] = messages.MAX_CONTINUATION_TOKENS
    round_fields["siblings"] |= {
        "description": "Alternatives by index of `draft`; the index must exist. Draft tokens and siblings are at most "
        f"{messages.MAX_TREE_NODES - 1} together.",
        "propertyNames": {"pattern": f"^({'|'.join(map(str, range(messages.MAX_DRAFT_TOKENS)))})$"},
        "additionalProperties": {"type": "array", "items": token},
    }
    # Without prefixItems, which fewer tools support.
    pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    schemas["Frame"]["properties"]["close_calls"] = {"type": "array", "items": pair}
    schemas["TokenLogprobs"]["properties"]["top"] = {"type": "array", "items": pair, "default": []}
    sampling = schemas["Sampling"]["properties"]
    ids = {"pattern": "^(0|[1-9][0-9]*)$", "description": f"A token id below {vocabulary_size}."}
    sampling["logit_bias"] |= {"propertyNames": ids, "maxProperties": MAX_BIASED_IDS}
    sampling["stop_ids"] = {"type": "array", "items": token, "maxItems": MAX_STOP_IDS, "default": []}
    sampling["grammar"] |= {
        "maxLength": MAX_GRAMMAR_CHARACTERS,
        "description": "A grammar that llguidance compiles; empty for free text.",
    }
    sampling["seed"]["exclusiveMaximum"] = 1 << 64
    # Logits divided by a temperature close to 0 would overflow.
    sampling["temperature"]["anyOf"] = [{"const": 0}, {"minimum": 0.001}]
    schemas["ErrorReply"]["properties"]["code"] = {"enum": [str(code) for code in messages.ErrorCode]}


def _round_operation(summary: str, request: str, reply: str) -> dict[str, Any]:
    frames = {"type": "string", "description": f"With `stream`: the {reply}, then Frames, one per line."}
    return _operation(summary, {JSON: schema_ref(reply), JSON_LINES: frames}, ROUND_ERRORS, request=request)


def _operation(
    summary: str, content: dict[str, Any], errors: tuple[str, ...], success: str = "200", request: str = ""
) -> dict[str, Any]:
    """Describe an operation. `request` names the schema of its body; empty if it has none."""
    descriptions = {status: ERROR_DESCRIPTIONS[status] for status in errors}
    operation = build_operation(summary, content, descriptions, "ErrorReply", success)
    if request:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_ref(request)}}}
    return operation
