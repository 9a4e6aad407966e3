"""Every error of the protocol over real HTTP; a refused request changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import JSON, ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, connected, decode_error, opening

ENDLESS = Sampling(ignore_eos=True)


BAD_ROUNDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "draft outside the vocabulary": ({"draft": [5, 300]}, 400, ErrorCode.INVALID_TOKEN),
    "sibling outside the vocabulary": ({"draft": [5], "siblings": {0: [300]}}, 400, ErrorCode.INVALID_TOKEN),
    "too many draft tokens": ({"draft": [5] * 33}, 400, ErrorCode.DRAFT_TOO_LONG),
    "too many siblings": ({"draft": [5] * 32, "siblings": {0: list(range(40))}}, 400, ErrorCode.DRAFT_TOO_LONG),
    "too many continuation tokens": ({"n": 513}, 400, ErrorCode.DRAFT_TOO_LONG),
    "siblings of a missing draft token": ({"draft": [5], "siblings": {1: [6]}}, 400, ErrorCode.MALFORMED),
    "siblings without a draft": ({"siblings": {0: [6]}}, 400, ErrorCode.MALFORMED),
    "position too large": ({"position": 99}, 409, ErrorCode.WRONG_POSITION),
    "position too small": ({"position": 0}, 409, ErrorCode.WRONG_POSITION),
    "first round with other contents": ({"round": 0, "position": 4, "n": 9}, 409, ErrorCode.ROUND_CONFLICT),
    "skipped round": ({"round": 2}, 409, ErrorCode.ROUND_OUT_OF_ORDER),
    "other protocol version": ({"v": 2}, 400, ErrorCode.UNSUPPORTED_VERSION),
}


@pytest.mark.parametrize(("changes", "status", "code"), BAD_ROUNDS.values(), ids=BAD_ROUNDS.keys())
def test_a_refused_round_does_not_change_the_session(
    client: ProtocolClient, reference_text: ReferenceText, changes: dict[str, Any], status: int, code: str
) -> None:
    session = client.open(n=2)
    error = client.expect_error(client.post(session.path, session.next_round(**changes)), status, code)
    match code:
        case ErrorCode.WRONG_POSITION:
            assert error.detail == {"expected": len(session.ids)}
        case ErrorCode.ROUND_OUT_OF_ORDER:
            assert error.detail == {"expected": 1}
        case ErrorCode.DRAFT_TOO_LONG:
            assert error.detail["limit"] in (32, messages.MAX_TREE_NODES - 1, 512)
    session.run_round(draft=[5], n=3)
    assert session.ids == PROMPT + reference_text(PROMPT, len(session.ids) - len(PROMPT))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"nonsense", b"[]", b"{}", b"\x93\x01\x01"], ids=repr)
def test_an_invalid_body_does_not_change_the_session(
    client: ProtocolClient, reference_text: ReferenceText, body: bytes
) -> None:
    session = client.open(n=2)
    if client.media_type != JSON:
        client.expect_error(client.post(session.path, body), 400, ErrorCode.DAMAGED)
        body = messages.add_checksum(body, session.id)
    client.expect_error(client.post(session.path, body), 400, ErrorCode.MALFORMED)
    session.run_round(n=3)
    assert session.ids == PROMPT + reference_text(PROMPT, 5)


BAD_OPENINGS: dict[str, tuple[dict[str, Any], int, str, dict[str, Any]]] = {
    "unknown model": ({"model": "gpt-5"}, 404, ErrorCode.UNKNOWN_MODEL, {"available": ["VERSION"]}),
    "older version": ({"model": "tiny@000000000000"}, 404, ErrorCode.UNKNOWN_MODEL, {"available": ["VERSION"]}),
    "other vocabulary": ({"vocabulary": "0123456789abcdef"}, 409, ErrorCode.VOCABULARY_MISMATCH, {}),
    "other tensors": ({"identity": "anchor/1/0123456789abcdef"}, 409, ErrorCode.DRAFT_MISMATCH, {}),
    "identity without a layout": ({"identity": "nonsense"}, 409, ErrorCode.DRAFT_MISMATCH, {}),
    "identity without blocks": ({"identity": "anchor//x"}, 409, ErrorCode.DRAFT_MISMATCH, {}),
    "blocks that are not ASCII digits": ({"identity": "anchor/²/x"}, 409, ErrorCode.DRAFT_MISMATCH, {}),
    "too many blocks": ({"identity": "anchor/" + "9" * 5000}, 409, ErrorCode.DRAFT_MISMATCH, {}),
    "prompt outside the vocabulary": ({"prompt": [300]}, 400, ErrorCode.INVALID_TOKEN, {"field": "prompt"}),
    "prompt as long as the context": ({"prompt": [5] * 512}, 413, ErrorCode.CONTEXT_OVERFLOW, {"limit": 511}),
    "empty prompt": ({"prompt": []}, 400, ErrorCode.MALFORMED, {}),
    "round other than the first": ({"round": 1}, 409, ErrorCode.ROUND_OUT_OF_ORDER, {"expected": 0}),
    "position other than the end of the prompt": ({"position": 5}, 409, ErrorCode.WRONG_POSITION, {"expected": 4}),
    "draft outside the vocabulary": ({"draft": [300]}, 400, ErrorCode.INVALID_TOKEN, {"field": "draft"}),
    "draft too long": ({"draft": [1] * 33}, 400, ErrorCode.DRAFT_TOO_LONG, {"limit": 32}),
    "bias outside the vocabulary": (
        {"sampling": Sampling(logit_bias={300: 1.0})},
        400,
        ErrorCode.INVALID_TOKEN,
        {"field": "logit_bias"},
    ),
    "stop id outside the vocabulary": (
        {"sampling": Sampling(stop_ids=[300])},
        400,
        ErrorCode.INVALID_TOKEN,
        {"field": "stop_ids"},
    ),
    "short key": ({"key": "short"}, 400, ErrorCode.MALFORMED, {}),
    "other protocol version": ({"v": 2}, 400, ErrorCode.UNSUPPORTED_VERSION, {}),
}


@pytest.mark.parametrize(("changes", "status", "code", "detail"), BAD_OPENINGS.values(), ids=BAD_OPENINGS.keys())
def test_a_refused_opening(
    client: ProtocolClient, tiny: Target, changes: dict[str, Any], status: int, code: str, detail: dict[str, Any]
) -> None:
    error = client.expect_error(client.post("/v1/sessions", opening(**changes)), status, code)
    assert error.detail == ({"available": [tiny.version]} if "available" in detail else detail)


@pytest.mark.parametrize("field", ["model", "vocabulary", "identity"])
def test_an_opening_with_matching_model_vocabulary_or_draft(client: ProtocolClient, tiny: Target, field: str) -> None:
    matching = {"model": tiny.version, "vocabulary": tiny.vocabulary, "identity": tiny.shared_identity("anchor", 1)}
    assert client.open(**{field: matching[field]}).reply.version == tiny.version
    assert client.open(model=tiny.name, identity=tiny.shared_identity("standalone", 0)).reply.version == tiny.version


def test_invalid_sampling_has_its_own_code(client: ProtocolClient) -> None:
    body = msgspec.json.encode(msgspec.to_builtins(opening()) | {"sampling": {"temperature": -1}})
    response = client.http.post("/v1/sessions", content=body, headers={"content-type": JSON})
    assert (response.status_code, decode_error(response).code) == (400, ErrorCode.INVALID_SAMPLING)


def test_a_message_of_another_protocol_version_is_recognized_despite_unknown_fields(client: ProtocolClient) -> None:
    later = msgspec.to_builtins(opening(), str_keys=True) | {"v": 2, "unknown": "field"}
    body = msgspec.json.encode(later)
    if client.media_type != JSON:
        body = messages.add_checksum(msgspec.msgpack.encode([2, *range(12)]))
    client.expect_error(client.post("/v1/sessions", body), 400, ErrorCode.UNSUPPORTED_VERSION)


def test_a_long_prompt_that_fits(client: ProtocolClient, reference_text: ReferenceText) -> None:
    prompt = [(7 * index) % 299 + 1 for index in range(505)]
    session = client.open(prompt, ENDLESS, n=3)
    assert session.ids == prompt + reference_text(prompt, 3, ENDLESS)


def test_a_body_that_is_too_large(client: ProtocolClient) -> None:
    response = client.post("/v1/sessions", opening([299] * 600_000))
    assert client.expect_error(response, 413, ErrorCode.TOO_LARGE).detail == {"limit": 1 << 20}


@pytest.mark.slow
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_client_that_sends_ten_megabytes_gets_the_error(tiny: Target, http2: bool) -> None:
    """Responding while the client still writes would reset the connection, or exhaust the stream's window."""
    async with connected(tiny, http1=not http2, http2=http2) as client:
        response = await client.post("/v1/sessions", content=bytes(10_000_000))
        assert (response.status_code, decode_error(response).code) == (413, ErrorCode.TOO_LARGE)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/sessions/a/b/c", 404),
        ("GET", "/v1/sessions", 405),
        ("PUT", "/v1/sessions/a/rounds", 405),
        ("POST", "/healthz", 405),
        ("BREW", "/v1/models", 405),
        pytest.param("POST", "/v1/sessions/", 404),
    ],
)
def test_unknown_routes_and_methods(client: ProtocolClient, method: str, path: str, status: int) -> None:
    error = client.expect_error(client.http.request(method, path), status, ErrorCode.UNKNOWN_ROUTE)
    assert f"{method} {path}" in error.message
