"""The service does what its own description says: Schemathesis reads it, and asks what it allows and what not."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from schemathesis import GenerationMode

from edge_runtime.service.openapi import build_document
from tests.fuzzing import CHECKS, fuzz, whole


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/v1/completions", GenerationMode.POSITIVE),
        ("/v1/completions", GenerationMode.NEGATIVE),
        ("/v1/chat/completions", GenerationMode.POSITIVE),
        ("/v1/chat/completions", GenerationMode.NEGATIVE),
        ("/v1/models/{model}", GenerationMode.POSITIVE),
    ],
)
def test_schemathesis(url: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path]["get" if "models" in path else "post"]

    def prepare(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            # Answers that nobody reads need not be long.
            case.body = whole({"max_tokens": 1} | case.body)

    fuzz(operation, mode, prepare)
    assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_what_takes_no_arguments_conforms(url: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    case = schema[path]["get"].Case()
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_the_document_is_what_the_structs_say() -> None:
    described = build_document(1 << 20, True, 300)
    schemas = described["components"]["schemas"]
    completion = schemas["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert completion["additionalProperties"] is False
    assert completion["properties"]["n"] == {"enum": [None, 1]}
    assert {"type": "boolean"} in completion["properties"]["speculation"]["anyOf"]
    assert described["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in described["paths"]["/healthz"]["get"]
    assert "securitySchemes" not in build_document(1 << 20, False, 300)["components"]
