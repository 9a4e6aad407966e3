"""The service, described in OpenAPI 3.1; the schemas are those of the structs that are read and written."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec

from edge_runtime.common.openapi import JSON, REF, TEXT, build_operation, schema_ref
from edge_runtime.service import openai_schema, requests
from edge_runtime.service.auth import GUARDED_PATHS
from edge_runtime.service.errors import ErrorBody
from edge_runtime.service.monitoring import events

EVENTS = "text/event-stream"
HTML = "text/html"

REFUSED = {
    "400": "The request is malformed, asks for what is not done here, or does not fit the model.",
    "401": "No API key, or a wrong one.",
    "403": "The service is local, and the request is for another host's name.",
    "404": "No such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
    "415": "The body is not JSON by its content type.",
    "429": "Too many wait or watch already; come back after Retry-After.",
    "500": "A fault of the service.",
    "502": "The verifier refuses this board.",
    "503": "The draft is still loading, the service is stopping, or the verifier cannot be reached.",
}
NEWS = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Sent back as Last-Event-ID, the stream goes on behind it."},
        "data": {
            "type": "string",
            "description": "A Board, Begun, Planned, Tokens, Round, Ended or Gauges.",
        },
    },
    "required": ["data"],
    "description": "One event of the stream.",
}
ASKING = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "502", "503")
LISTING = ("401", "403", "404", "500", "502", "503")


def build_document(max_body: int, keys: bool, vocabulary_size: int) -> dict[str, Any]:
    """The description of a service that takes bodies of `max_body` bytes, and wants API keys or not."""
    kinds = [
        requests.CompletionRequest,
        requests.ChatRequest,
        openai_schema.Completion,
        openai_schema.CompletionChunk,
        openai_schema.ChatCompletion,
        openai_schema.ChatChunk,
        openai_schema.OpenAIModel,
        openai_schema.OpenAIModelList,
        events.AnyEvent,
        ErrorBody,
    ]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    for name, neutral in (
        ("CompletionRequest", requests.NEUTRAL_VALUES),
        ("ChatRequest", requests.NEUTRAL_VALUES),
        ("ChatMessage", requests.NEUTRAL_MESSAGE_VALUES),
    ):
        properties = schemas[name]["properties"]
        for field in properties.keys() & neutral.keys():
            properties[field] = {"enum": neutral[field]}
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocabulary_size}
    schemas["TokenIds"] = {"type": "array", "items": token, "minItems": 1}
    schemas["CompletionRequest"]["properties"]["prompt"] = requests.PROMPT_SCHEMA
    paths: dict[str, Any] = {
        "/v1/completions": {"post": _asking("Continue a text", "CompletionRequest", "Completion", "CompletionChunk")},
        "/v1/chat/completions": {"post": _asking("The next message", "ChatRequest", "ChatCompletion", "ChatChunk")},
        "/v1/models": {"get": _operation("What the verifier serves", {JSON: schema_ref("ModelList")}, LISTING)},
        "/v1/models/{model}": {
            "get": _operation("One of them", {JSON: schema_ref("Model")}, LISTING),
            "parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ],
        },
        "/healthz": {"get": _operation("Whether the process lives", {TEXT: {"type": "string"}}, ("403",))},
        "/readyz": {"get": _operation("Whether answers can begin", {TEXT: {"type": "string"}}, ("403", "503"))},
        "/metrics": {"get": _operation("For Prometheus", {TEXT: {"type": "string"}}, ("403",))},
        "/events": {"get": _operation("What the board did of late, and does", {EVENTS: NEWS}, ("401", "403", "429"))},
        "/": {"get": _operation("The dashboard", {HTML: {"type": "string"}}, ("403",))},
        "/openapi.json": {"get": _operation("This document", {JSON: {"type": "object"}}, ("403",))},
    }
    components: dict[str, Any] = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in paths.items():
            if path.startswith(GUARDED_PATHS):
                item["post" if "post" in item else "get"]["security"] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FlexSpec on this board",
            "version": importlib.metadata.version("flexspec"),
            "summary": "OpenAI's surface over a local draft and a verifier in the cloud.",
            "description": f"Bodies have at most {max_body} bytes.",
        },
        "paths": paths,
        "components": components,
    }


def _asking(summary: str, body: str, answer: str, chunk: str) -> dict[str, Any]:
    data = f"A {chunk} in JSON; an ErrorBody in the event `error`, which ends the stream; at its other end, [DONE]."
    event = {
        "type": "object",
        "properties": {"event": {"enum": ["message", "error"]}, "data": {"type": "string", "description": data}},
        "required": ["data"],
        "description": "One event of the stream.",
    }
    content = {JSON: schema_ref(answer), EVENTS: event}
    asking = _operation(summary, content, ASKING)
    asking["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_ref(body)}}}
    return asking


def _operation(summary: str, content: dict[str, Any], refused: tuple[str, ...]) -> dict[str, Any]:
    return build_operation(summary, content, {status: REFUSED[status] for status in refused}, "ErrorBody")
