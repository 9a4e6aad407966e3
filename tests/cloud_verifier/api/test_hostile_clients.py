"""Hostile clients: any input gets a typed error or a valid reply, and never harms other sessions."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model.target import Target
from edge_runtime.common import logs
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import JSON, MSGPACK, ErrorCode, OpenRequest, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, decode_error, running

PATHS = [
    "/v1/sessions",
    "/v1/sessions/no-such-one/rounds",
    "FUZZED",
    "/v1/models",
    "/healthz",
    "/v1/sessions/%ff%00/rounds",
]
CONTENT_TYPES = [MSGPACK, JSON, "application/json; charset=utf-8", "text/plain", ""]
LIMITS = VerifierLimits(max_sessions=100_000, max_own=8)


class FuzzedVerifier:
    """A verifier, a session that is the target of invalid requests, and another one that must not be affected."""

    def __init__(self, client: ProtocolClient) -> None:
        self.client = client
        self.attacked = client.open([7, 7, 7])
        self.bystander = client.open(sampling=Sampling(0.8, seed=3))

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        path = path.replace("FUZZED", self.attacked.path)
        try:
            response = self.client.http.request(method, path, content=body, headers=headers)
        except httpx.RemoteProtocolError:
            # A server may close a connection after an answer to a request whose body it did not read.
            response = self.client.http.request(method, path, content=body, headers=headers)
        assert response.status_code < 300 or 400 <= response.status_code < 500, response.text
        if response.status_code >= 400:
            error = decode_error(response)
            assert error.code in set(ErrorCode)
            assert error.message


@pytest.fixture(scope="module")
def fuzzed(tiny: Target, reference_text: ReferenceText) -> Iterator[FuzzedVerifier]:
    """After all requests, the other session continues unaffected."""
    with running(tiny, LIMITS) as url, ProtocolClient(url) as client:
        verifier = FuzzedVerifier(client)
        yield verifier
        verifier.bystander.run_round(n=8)
        assert verifier.bystander.ids == PROMPT + reference_text(PROMPT, 9, Sampling(0.8, seed=3))


random_bodies = st.binary(max_size=80) | st.binary(max_size=80).map(messages.add_checksum)
content_types = st.sampled_from(CONTENT_TYPES).map(lambda kind: {"content-type": kind})


@pytest.mark.slow
@given(st.sampled_from(["POST", "DELETE", "GET", "PUT", "PATCH"]), st.sampled_from(PATHS), random_bodies, content_types)
@settings(max_examples=150)
def test_random_bodies(fuzzed: FuzzedVerifier, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    if (method, path) != ("DELETE", "FUZZED"):
        fuzzed.send(method, path, body, headers)


token_lists = st.lists(st.integers(0, 400), max_size=6)
any_round = st.builds(
    RoundRequest,
    v=st.sampled_from([1, 1, 1, 2]),
    round=st.integers(0, 20),
    position=st.integers(0, 40),
    draft=token_lists,
    n=st.integers(1, 10),
    siblings=st.dictionaries(st.integers(0, 6), token_lists, max_size=3),
    stream=st.booleans(),
    expects=st.lists(st.integers(0, 310), max_size=2),
)
any_opening = st.builds(
    OpenRequest,
    v=st.just(1),
    key=st.text("ab", min_size=8, max_size=10),
    prompt=st.lists(st.integers(0, 310), min_size=1, max_size=6),
    first=any_round,
    sampling=st.builds(Sampling, temperature=st.sampled_from([0.0, 1.0]), top_k=st.integers(0, 400)),
    model=st.sampled_from(["", "", "tiny", "other"]),
    draft=st.sampled_from(["", "", "anchor/1/x", "prefix/99999999999/", "/", "anchor/-1/0"]),
)


@pytest.mark.slow
@given(st.one_of(any_round, any_opening), st.sampled_from([MSGPACK, JSON]), st.data())
@settings(max_examples=250)
def test_damaged_messages(
    fuzzed: FuzzedVerifier, message: RoundRequest | OpenRequest, media_type: str, data: st.DataObject
) -> None:
    body = bytearray(messages.encode(message, media_type))
    if media_type == MSGPACK:
        del body[-messages.CHECKSUM_BYTES :]
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(body)))
        body[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path, session = ("FUZZED", fuzzed.attacked.id) if isinstance(message, RoundRequest) else ("/v1/sessions", "")
    content = messages.add_checksum(bytes(body), session) if media_type == MSGPACK else bytes(body)
    fuzzed.send("POST", path, content, {"content-type": media_type})


@pytest.mark.slow
@given(any_opening, any_round, st.sampled_from([MSGPACK, JSON]))
@settings(max_examples=150)
def test_well_formed_messages_with_invalid_contents(
    fuzzed: FuzzedVerifier, first: OpenRequest, later: RoundRequest, media_type: str
) -> None:
    valid_round = msgspec.structs.replace(first.first, round=0, position=len(first.prompt))
    headers = {"content-type": media_type}
    fuzzed.send("POST", "/v1/sessions", messages.encode(first, media_type), headers)
    possibly_valid = msgspec.structs.replace(first, first=valid_round)
    fuzzed.send("POST", "/v1/sessions", messages.encode(possibly_valid, media_type), headers)
    fuzzed.send("POST", "FUZZED", messages.encode(later, media_type, fuzzed.attacked.id), headers)


def test_paths_cannot_write_lines_or_escape_sequences_to_the_log(fuzzed: FuzzedVerifier) -> None:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.TextFormatter())
    logger = logging.getLogger("cloud_verifier")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        fuzzed.send("POST", "/v1/sessions/%1b%0d%0aERROR%20forged/rounds", b"", {"x-request-id": "a\tb"})
        fuzzed.send("POST", "/v1/sessions/%e2%80%ae%c2%9b%0a/rounds", b"", {})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    first, second = text.getvalue().splitlines()
    assert r"session \x1b\r\nE..." in first
    assert r"session \u202e\x9b\n..." in second
