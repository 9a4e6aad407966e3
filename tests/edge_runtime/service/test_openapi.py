"""The service conforms to its OpenAPI document: Schemathesis sends requests that it allows and that it forbids."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from schemathesis import GenerationMode

from edge_runtime.service.openapi import build_document
from tests.fuzzing import CHECKS, fuzz, whole

GRAMMAR_FIELDS = {
    *("response_format", "structured_outputs", "grammar", "json_schema"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/v1/completions", GenerationMode.POSITIVE),
        ("/v1/completions", GenerationMode.NEGATIVE),
        ("/v1/chat/completions", GenerationMode.POSITIVE),
        ("/v1/chat/completions", GenerationMode.NEGATIVE),
        ("/v1/responses", GenerationMode.POSITIVE),
        ("/v1/responses", GenerationMode.NEGATIVE),
        ("/v1/responses/{id}", GenerationMode.POSITIVE),
        ("/v1/models/{model}", GenerationMode.POSITIVE),
    ],
)
def test_service_conforms_to_its_document(url: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path]["get" if "{" in path else "post"]

    def prepare(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            # One token per answer and few answers keep this fast, and fit into the queue.
            body = whole({"max_output_tokens" if path == "/v1/responses" else "max_tokens": 1} | case.body)
            body |= {name: min(body[name], 2) for name in ("n", "best_of") if type(body.get(name)) is int}
            if isinstance(body.get("best_of"), int) and type(body.get("n")) is int:
                body["best_of"] = max(body["best_of"], body["n"])
            if isinstance(body.get("prompt"), list):
                body["prompt"] = body["prompt"][:20]
            if mode == GenerationMode.POSITIVE and path == "/v1/chat/completions":
                # Everything is part of the prompt, which must fit into the context.
                body["messages"] = body["messages"][:3]
                for message in body["messages"]:
                    message["tool_calls"] = (message.get("tool_calls") or [])[:1] or None
                    for call in message["tool_calls"] or []:
                        call["function"]["arguments"] = str(call["function"].get("arguments", ""))[:100]
                    if not message["tool_calls"]:
                        message["content"] = message.get("content") or "x"
            if mode == GenerationMode.POSITIVE and path == "/v1/responses":
                # What is kept, a schema cannot say.
                body.pop("previous_response_id", None)
                if isinstance(body["input"], list):
                    body["input"] = body["input"][:3]
                    # Reasoning alone is no message, and no reference is known.
                    body["input"] += [{"role": "user", "content": "x"}]
                    body["input"] = [item for item in body["input"] if item.get("type") != "item_reference"]
            if mode == GenerationMode.POSITIVE and body.get("stop_token_ids"):
                # Nor how large the vocabulary is.
                body["stop_token_ids"] = [token % 2048 for token in body["stop_token_ids"]]
            if mode == GenerationMode.POSITIVE and path != "/v1/completions" and body.get("tools"):
                # That names differ, and which of them a choice may name, a schema cannot say.
                for index, tool in enumerate(body["tools"]):
                    function = tool["function"] if path == "/v1/chat/completions" else tool
                    function |= {"name": f"{function['name'][:100]}{index}", "parameters": None, "description": None}
                    function.pop("strict", None)
                body["tool_choice"] = "required" if isinstance(body.get("tool_choice"), str) else None
            elif mode == GenerationMode.POSITIVE and body.get("tool_choice") not in ("auto", "none"):
                body.pop("tool_choice", None)
            # Whether a text is a grammar or a regular expression, a schema cannot say.
            dropped = GRAMMAR_FIELDS if mode is GenerationMode.POSITIVE else ()
            case.body = {name: value for name, value in body.items() if name not in dropped}

    fuzz(operation, mode, prepare)
    assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/health", "/readyz", "/metrics", "/openapi.json"])
def test_routes_without_arguments_conform(url: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    case = schema[path]["get"].Case()
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_the_document_describes_the_structs() -> None:
    document = build_document(1 << 20, True, 300, has_template=True)
    schemas = document["components"]["schemas"]
    completion = schemas["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert completion["properties"]["use_beam_search"]["enum"] == [None, False]
    assert completion["properties"]["user"] == {"description": "Accepted and ignored."}
    assert {"type": "integer", "minimum": 1, "maximum": 128} in completion["properties"]["best_of"]["anyOf"]
    assert schemas["ChatRequest"]["properties"]["best_of"]["enum"] == [None, 1]
    assert {"type": "boolean"} in completion["properties"]["speculation"]["anyOf"]
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "securitySchemes" not in build_document(1 << 20, False, 300, has_template=True)["components"]
