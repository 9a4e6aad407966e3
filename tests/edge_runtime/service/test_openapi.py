"""The service does what its own description says: Schemathesis reads it, and asks what it allows and what not."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from edge_runtime.service.openapi import document

CHECKS = [
    checks.positive_data_acceptance,
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
QUICK = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


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
    strategy = operation.as_strategy(generation_mode=mode)

    @QUICK
    @given(case=strategy)
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            # Answers that nobody reads need not be long; and 5.0 is an integer to JSON Schema only.
            case.body = {"max_tokens": 1} | {field: _whole(value) for field, value in case.body.items()}
        case.call_and_validate(checks=CHECKS)

    ask()
    assert httpx.get(f"{url}/readyz").status_code == 200


def _whole(value: object) -> object:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_what_takes_no_arguments_conforms(url: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    case = schema[path]["get"].Case()
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_the_document_is_what_the_structs_say() -> None:
    described = document(1 << 20, True, 300)
    schemas = described["components"]["schemas"]
    completion = schemas["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert completion["additionalProperties"] is False
    assert completion["properties"]["n"] == {"enum": [None, 1]}
    assert {"type": "boolean"} in completion["properties"]["speculation"]["anyOf"]
    assert described["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in described["paths"]["/healthz"]["get"]
    assert "securitySchemes" not in document(1 << 20, False, 300)["components"]
