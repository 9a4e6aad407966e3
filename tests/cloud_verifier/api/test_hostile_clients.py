"""Whatever comes in: a typed refusal or a proper answer, and never anything to the harm of other sessions."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model.target import Target
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
CALM = VerifierLimits(max_sessions=100_000, max_own=8)


class Besieged:
    """A verifier under fire, one of its sessions that is the aim, and one that stands by."""

    def __init__(self, client: ProtocolClient) -> None:
        self.client = client
        self.aim = client.open([7, 7, 7])
        self.bystander = client.open(sampling=Sampling(0.8, seed=3))

    def fire(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        path = path.replace("FUZZED", self.aim.path)
        response = self.client.http.request(method, path, content=body, headers=headers)
        assert response.status_code < 300 or 400 <= response.status_code < 500, response.text
        if response.status_code >= 400:
            refusal = decode_error(response)
            assert refusal.code in set(ErrorCode)
            assert refusal.message


@pytest.fixture(scope="module")
def besieged(tiny: Target, reference_text: ReferenceText) -> Iterator[Besieged]:
    """After all the fire, the bystander's text goes on as if nothing had happened."""
    with running(tiny, CALM) as url, ProtocolClient(url) as client:
        siege = Besieged(client)
        yield siege
        siege.bystander.run_round(n=8)
        assert siege.bystander.ids == PROMPT + reference_text(PROMPT, 9, Sampling(0.8, seed=3))


bodies = st.binary(max_size=80) | st.binary(max_size=80).map(messages.add_checksum)
types = st.sampled_from(CONTENT_TYPES).map(lambda kind: {"content-type": kind})


@given(st.sampled_from(["POST", "DELETE", "GET", "PUT", "PATCH"]), st.sampled_from(PATHS), bodies, types)
@settings(max_examples=700, deadline=None)
def test_random_bodies(besieged: Besieged, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    if (method, path) != ("DELETE", "FUZZED"):
        besieged.fire(method, path, body, headers)


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


@given(st.one_of(any_round, any_opening), st.sampled_from([MSGPACK, JSON]), st.data())
@settings(max_examples=1300, deadline=None)
def test_damaged_messages(
    besieged: Besieged, message: RoundRequest | OpenRequest, media_type: str, data: st.DataObject
) -> None:
    body = bytearray(messages.encode(message, media_type))
    if media_type == MSGPACK:
        del body[-messages.CHECKSUM_BYTES :]
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(body)))
        body[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path, session = ("FUZZED", besieged.aim.id) if isinstance(message, RoundRequest) else ("/v1/sessions", "")
    content = messages.add_checksum(bytes(body), session) if media_type == MSGPACK else bytes(body)
    besieged.fire("POST", path, content, {"content-type": media_type})


@given(any_opening, any_round, st.sampled_from([MSGPACK, JSON]))
@settings(max_examples=700, deadline=None)
def test_well_formed_messages_with_wrong_contents(
    besieged: Besieged, first: OpenRequest, later: RoundRequest, media_type: str
) -> None:
    fitting = msgspec.structs.replace(first.first, round=0, position=len(first.prompt))
    headers = {"content-type": media_type}
    besieged.fire("POST", "/v1/sessions", messages.encode(first, media_type), headers)
    opening_that_may_work = msgspec.structs.replace(first, first=fitting)
    besieged.fire("POST", "/v1/sessions", messages.encode(opening_that_may_work, media_type), headers)
    besieged.fire("POST", "FUZZED", messages.encode(later, media_type, besieged.aim.id), headers)
