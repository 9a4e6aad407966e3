"""The verifier does what its own description says: Schemathesis reads it, and asks what it allows and what not."""

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


def _short(body: Any) -> Any:
    """Texts that nobody reads need not be long, and what a schema cannot say about a round is kept."""
    body = whole(body)
    if not isinstance(body, dict):
        return body
    for played in (body, body.get("first")):
        if isinstance(played, dict) and isinstance(played.get("n"), int) and 8 < played["n"] <= 512:
            played["n"] = 8
    return body


def _fitting(body: Any) -> None:
    """Drops what no schema can refuse: siblings of nobody, or too many."""
    for played in (body, body.get("first") or {}) if isinstance(body, dict) else ():
        draft, siblings = played.get("draft") or [], played.get("siblings") or {}
        fitting = {index: ids for index, ids in siblings.items() if int(index) < len(draft)}
        room = MAX_TREE_NODES - 1 - len(draft)
        if siblings:
            played["siblings"] = {index: ids[: room // max(1, len(fitting))] for index, ids in fitting.items()}


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/{session}/rounds"])
def test_schemathesis(url: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    names = itertools.count()
    counted: Counter[int] = Counter()

    def prepare(case: schemathesis.Case) -> None:
        case.body = _short(case.body)
        if mode == GenerationMode.NEGATIVE:
            return
        _fitting(case.body)
        # Such that most of them are played.
        if "first" in case.body:
            case.body["first"] |= {"round": 0, "position": len(case.body["prompt"]), "expects": []}
            case.body |= {"key": f"{next(names):08}", "model": "", "vocabulary": "", "draft": ""}
        else:
            asked = messages.encode(opening(sampling=Sampling(ignore_eos=True)), JSON)
            opened = httpx.post(f"{url}/v1/sessions", content=asked, headers={"content-type": JSON})
            case.path_parameters["session"] = opened.json()["session"]
            case.body |= {"round": 1, "position": 5, "expects": []}

    def heed(response: schemathesis.Response) -> None:
        counted[response.status_code] += 1

    fuzz(schema[path]["post"], mode, prepare, heed)
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert counted.keys() <= ({200} if mode == GenerationMode.POSITIVE else {400, 404, 409})


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_what_takes_no_arguments_conforms(url: str, path: str) -> None:
    case = schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["get"].Case()
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_closing_conforms(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    fuzz(schema["/v1/sessions/{session}"]["delete"], GenerationMode.POSITIVE, lambda case: None)


def test_the_document_is_what_the_structs_say() -> None:
    described = build_document(300, 512, 1 << 20, tokens=True)
    schemas = described["components"]["schemas"]
    assert schemas["OpenRequest"]["required"] == ["v", "key", "prompt", "first"]
    assert schemas["OpenRequest"]["properties"]["prompt"]["maxItems"] == 511
    assert schemas["RoundRequest"]["properties"]["draft"]["items"]["exclusiveMaximum"] == 300
    assert schemas["RoundRequest"]["additionalProperties"] is False
    assert schemas["ErrorReply"]["properties"]["code"]["enum"] == list(ErrorCode)
    operations = {
        path: item.get("post") or item.get("get") or item["delete"] for path, item in described["paths"].items()
    }
    assert operations["/v1/sessions"]["security"] == operations["/metrics"]["security"] == [{"token": []}]
    assert "security" not in operations["/healthz"]
    assert "securitySchemes" not in build_document(300, 512, 1 << 20, tokens=False)["components"]
    assert set(operations["/v1/sessions"]["responses"]["429"]["headers"]) == {"Retry-After"}
