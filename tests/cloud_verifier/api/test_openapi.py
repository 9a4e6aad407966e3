"""The verifier conforms to its own OpenAPI document: Schemathesis sends valid and invalid requests."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import GenerationMode

from cloud_verifier.api.openapi import build_document
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import JSON, MAX_TREE_NODES, ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import opening
from tests.fuzzing import CHECKS, fuzz, whole


def _shorten(body: Any) -> Any:
    """Shorten continuations, so that the test is fast."""
    body = whole(body)
    if not isinstance(body, dict):
        return body
    for fields in (body, body.get("first")):
        if isinstance(fields, dict) and isinstance(fields.get("n"), int) and 8 < fields["n"] <= 512:
            fields["n"] = 8
    return body


def _drop_invalid_siblings(body: Any) -> None:
    """Drop siblings that a schema cannot rule out: without a draft token, or too many."""
    for fields in (body, body.get("first") or {}) if isinstance(body, dict) else ():
        draft, siblings = fields.get("draft") or [], fields.get("siblings") or {}
        valid = {index: ids for index, ids in siblings.items() if int(index) < len(draft)}
        room = MAX_TREE_NODES - 1 - len(draft)
        if siblings:
            fields["siblings"] = {index: ids[: room // max(1, len(valid))] for index, ids in valid.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/{session}/rounds"])
def test_schemathesis(url: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    key_numbers = itertools.count()
    statuses: Counter[int] = Counter()

    def prepare(case: schemathesis.Case) -> None:
        case.body = _shorten(case.body)
        if mode == GenerationMode.NEGATIVE:
            return
        _drop_invalid_siblings(case.body)
        # Make the requests valid, so that most rounds are executed.
        if "first" in case.body:
            case.body["first"] |= {"round": 0, "position": len(case.body["prompt"]), "expects": []}
            case.body |= {"key": f"{next(key_numbers):08}", "model": "", "vocabulary": "", "draft": "", "generated": 0}
            sampling = case.body.setdefault("sampling", {})
            bias = sampling.get("logit_bias", {})
            # A schema rules out neither names by their value as a number nor grammars that do not compile.
            sampling |= {"logit_bias": {str(int(token) % 300): value for token, value in bias.items()}, "grammar": ""}
        else:
            open_request = messages.encode(opening(sampling=Sampling(ignore_eos=True)), JSON)
            opened = httpx.post(f"{url}/v1/sessions", content=open_request, headers={"content-type": JSON})
            case.path_parameters["session"] = opened.json()["session"]
            case.body |= {"round": 1, "position": 5, "expects": []}

    def record_status(response: schemathesis.Response) -> None:
        statuses[response.status_code] += 1

    fuzz(schema[path]["post"], mode, prepare, record_status)
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert statuses.keys() <= ({200} if mode == GenerationMode.POSITIVE else {400, 404, 409})


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_requests_without_arguments_conform(url: str, path: str) -> None:
    case = schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["get"].Case()
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_closing_a_session_conforms(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    fuzz(schema["/v1/sessions/{session}"]["delete"], GenerationMode.POSITIVE, lambda case: None)


def test_the_document_matches_the_structs() -> None:
    document = build_document(300, 512, 1 << 20, tokens=True)
    schemas = document["components"]["schemas"]
    assert schemas["OpenRequest"]["required"] == ["v", "key", "prompt", "first"]
    assert schemas["OpenRequest"]["properties"]["prompt"]["maxItems"] == 511
    assert schemas["RoundRequest"]["properties"]["draft"]["items"]["exclusiveMaximum"] == 300
    assert schemas["RoundRequest"]["additionalProperties"] is False
    assert schemas["ErrorReply"]["properties"]["code"]["enum"] == list(ErrorCode)
    operations = {
        path: item.get("post") or item.get("get") or item["delete"] for path, item in document["paths"].items()
    }
    assert operations["/v1/sessions"]["security"] == operations["/metrics"]["security"] == [{"token": []}]
    assert "security" not in operations["/healthz"]
    assert "securitySchemes" not in build_document(300, 512, 1 << 20, tokens=False)["components"]
    assert set(operations["/v1/sessions"]["responses"]["429"]["headers"]) == {"Retry-After"}
