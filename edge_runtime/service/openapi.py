"""Builds the OpenAPI 3.1 document of the service. Its schemas are generated from the request and response structs."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec

from edge_runtime.common.openapi import JSON, REF, TEXT, build_operation, schema_ref
from edge_runtime.service import conversation, field_policy, openai_schema, requests
from edge_runtime.service.auth import GUARDED_PATHS
from edge_runtime.service.errors import ErrorBody
from edge_runtime.service.monitoring import events
from edge_runtime.service.responses import requests as responses_requests
from edge_runtime.service.responses import schema as responses_schema

EVENTS = "text/event-stream"
HTML = "text/html"
STRING = {"type": "string"}

ERROR_DESCRIPTIONS = {
    "400": "The request is malformed, uses an unsupported feature, or does not fit the model.",
    "401": "The API key is missing or wrong.",
    "403": "The service is local, and the request names another host.",
    "404": "No such model, or no such response.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The content type is not JSON.",
    "429": "Too many requests are waiting, or too many clients are watching; retry after Retry-After.",
    "500": "Internal error of the service.",
    "502": "The verifier refuses this board.",
    "503": "The draft model is still loading, the service is stopping, or the verifier cannot be reached.",
}
BOARD_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Send it back as Last-Event-ID to resume the stream after this event."},
        "data": {
            "type": "string",
            "description": "JSON of one of the schemas of `type` board, begun, planned, tokens, "
            "round, ended or gauges.",
        },
    },
    "required": ["data"],
    "description": "One event of the stream.",
}
COMPLETION_EVENTS = "JSON of a {}; [DONE] at the end; or, in the event `error`, an ErrorBody, which ends the stream."
RESPONSE_EVENTS = (
    "JSON of the schema with the event's name as `type`; response.completed, response.incomplete or error is the last."
)
GENERATION_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "502", "503")
EVENT_ERRORS = ("401", "403", "429")
RESPONSE_ERRORS = ("401", "403", "404")
MODEL_ERRORS = ("401", "403", "404", "500", "502", "503")


def build_document(max_body: int, keys: bool, vocabulary_size: int, has_template: bool) -> dict[str, Any]:
    """Build the document of a service.

    Args:
        max_body: accepted size of a request body in bytes.
        keys: the service requires API keys.
        has_template: the model has a chat template; without one there are no documents.
    """
    schema_types = [
        requests.CompletionRequest,
        requests.ChatRequest,
        responses_requests.ResponsesRequest,
        *responses_requests.INPUT_ITEMS.values(),
        openai_schema.Completion,
        openai_schema.CompletionChunk,
        openai_schema.ChatCompletion,
        openai_schema.ChatChunk,
        responses_schema.ResponseObject,
        responses_schema.AnyStreamedEvent,
        responses_schema.DeletedResponse,
        openai_schema.OpenAIModel,
        openai_schema.OpenAIModelList,
        events.AnyEvent,
        ErrorBody,
    ]
    _, schemas = msgspec.json.schema_components(schema_types, ref_template=REF)
    for kind in (requests.CompletionRequest, requests.ChatRequest, responses_requests.ResponsesRequest):
        properties = schemas[kind.__name__]["properties"]
        for field in field_policy.IGNORED_FIELDS - properties.keys():
            properties[field] = {"description": "Accepted and ignored."}
        for field, refused in field_policy.REFUSED_FIELDS.items():
            if kind.endpoint in refused.endpoints:
                properties.setdefault(field, field_policy.refused_schema(refused))
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocabulary_size}
    schemas["TokenIds"] = {"type": "array", "items": token, "minItems": 1}
    schemas["CompletionRequest"]["properties"]["prompt"] = requests.PROMPT_SCHEMA
    schemas["ResponsesRequest"]["properties"]["input"] = responses_requests.INPUT_SCHEMA
    schemas["ChatMessage"] |= conversation.MESSAGE_SCHEMA
    schemas["ChatRequest"] |= requests.CHAT_SCHEMA
    schemas["CompletionRequest"] |= requests.COMPLETION_SCHEMA
    if not has_template:
        schemas["ChatRequest"]["properties"]["documents"] = {"enum": [None, []]}
    message = "Generate the next message of a conversation"
    model_name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    response_id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths: dict[str, Any] = {
        "/v1/completions": _generation(
            "Continue a text", "CompletionRequest", "Completion", COMPLETION_EVENTS.format("CompletionChunk")
        ),
        "/v1/chat/completions": _generation(
            message, "ChatRequest", "ChatCompletion", COMPLETION_EVENTS.format("ChatChunk")
        ),
        "/v1/responses": _generation(
            "Generate a response, as a message of a conversation", "ResponsesRequest", "ResponseObject", RESPONSE_EVENTS
        ),
        "/v1/responses/{id}": {
            **_get("Get a response that is kept", JSON, schema_ref("ResponseObject"), *RESPONSE_ERRORS),
            "delete": _operation("Forget a response", {JSON: schema_ref("DeletedResponse")}, RESPONSE_ERRORS),
            "parameters": [response_id],
        },
        "/v1/models": _get("List the verifier's models", JSON, schema_ref("OpenAIModelList"), *MODEL_ERRORS),
        "/v1/models/{model}": {
            **_get("Get one model", JSON, schema_ref("OpenAIModel"), *MODEL_ERRORS),
            "parameters": [model_name],
        },
        "/healthz": _get("Check that the process is alive", TEXT, STRING, "403"),
        "/health": _get("The same as /healthz", TEXT, STRING, "403"),
        "/readyz": _get("Check that answers can start", TEXT, STRING, "403", "503"),
        "/metrics": _get("Prometheus metrics", TEXT, STRING, "403"),
        "/events": _get("Recent and live events of the board", EVENTS, BOARD_EVENT, *EVENT_ERRORS),
        "/": _get("The page: a chat beside a live view", HTML, STRING, "403"),
        "/openapi.json": _get("This document", JSON, {"type": "object"}, "403"),
    }
    components: dict[str, Any] = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in paths.items():
            if path.startswith(GUARDED_PATHS):
                for method in item.keys() & {"get", "post", "delete"}:
                    item[method]["security"] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FlexSpec on this board",
            "version": importlib.metadata.version("flexspec"),
            "summary": "OpenAI's HTTP API over a local draft model and a verifier in the cloud.",
            "description": f"Request bodies are limited to {max_body} bytes.",
        },
        "paths": paths,
        "components": components,
    }


def _generation(summary: str, body: str, answer: str, data: str) -> dict[str, Any]:
    """Build the item of a path whose POST generates text.

    Args:
        body, answer: names of schemas.
        data: what the data of an event is.
    """
    event = {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": data}},
        "required": ["data"],
        "description": "One event of the stream.",
    }
    built = _operation(summary, {JSON: schema_ref(answer), EVENTS: event}, GENERATION_ERRORS)
    built["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_ref(body)}}}
    return {"post": built}


def _get(summary: str, media_type: str, schema: dict[str, Any], *statuses: str) -> dict[str, Any]:
    """Build the item of a path whose GET returns `media_type`, or an error of these statuses."""
    return {"get": _operation(summary, {media_type: schema}, statuses)}


def _operation(summary: str, content: dict[str, Any], statuses: tuple[str, ...]) -> dict[str, Any]:
    return build_operation(summary, content, {status: ERROR_DESCRIPTIONS[status] for status in statuses}, "ErrorBody")
