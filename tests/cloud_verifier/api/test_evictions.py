"""Sessions are evicted within the limits over real HTTP, and those with a round in progress are not."""

from __future__ import annotations

import pytest

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import MSGPACK, ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ProtocolClient,
    connected,
    decode_error,
    opening,
    running,
)

ENDLESS = Sampling(ignore_eos=True)


def test_the_least_recently_used_session_is_evicted(tiny: Target, reference_text: ReferenceText) -> None:
    with running(tiny, VerifierLimits(max_sessions=2)) as url, ProtocolClient(url) as client:
        first, second = client.open(), client.open([9, 9])
        first.run_round()
        third = client.open([8, 8])
        client.expect_error(client.post(second.path, second.next_round()), 404, ErrorCode.SESSION_LOST)
        first.run_round()
        assert first.ids == PROMPT + reference_text(PROMPT, 3)
        assert third.run_round().load == 100


def test_sessions_are_evicted_to_bound_the_tokens(tiny: Target) -> None:
    with running(tiny, VerifierLimits(max_tokens=300)) as url, ProtocolClient(url) as client:
        first, second = client.open([1] * 150), client.open([2] * 150)
        client.expect_error(client.post(first.path, first.next_round()), 404, ErrorCode.SESSION_LOST)
        second.run_round()


def test_idle_sessions_are_evicted(tiny: Target) -> None:
    with running(tiny, VerifierLimits(idle_seconds=0.0)) as url, ProtocolClient(url) as client:
        first = client.open()
        client.open()
        client.expect_error(client.post(first.path, first.next_round()), 404, ErrorCode.SESSION_LOST)


def test_a_session_does_not_evict_itself(tiny: Target) -> None:
    with running(tiny, VerifierLimits(max_tokens=100)) as url, ProtocolClient(url) as client:
        client.http.timeout = TIMEOUT_SECONDS
        session = client.open([5] * 60, ENDLESS)
        response = client.post(session.path, session.next_round(n=50))
        assert response.status_code == 200 or decode_error(response).code == ErrorCode.OVERLOADED


def test_a_prompt_that_can_never_fit_evicts_no_session(tiny: Target) -> None:
    with running(tiny, VerifierLimits(max_tokens=100)) as url, ProtocolClient(url) as client:
        session = client.open()
        assert client.post("/v1/sessions", opening([5] * 200)).status_code in (413, 503)
        session.run_round()


@pytest.mark.slow
async def test_the_verifier_is_overloaded_if_all_sessions_are_busy(tiny: Target) -> None:
    async with connected(tiny, VerifierLimits(max_sessions=1)) as client:
        busy = messages.encode(opening(sampling=ENDLESS, n=500, stream=True), MSGPACK)
        async with client.stream("POST", "/v1/sessions", content=busy) as response:
            pieces = response.aiter_raw()
            await anext(pieces)
            refused = await client.post("/v1/sessions", content=messages.encode(opening(), MSGPACK))
            assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
            assert refused.headers["retry-after"] == "1"
            async for _ in pieces:
                pass
        assert (await client.post("/v1/sessions", content=messages.encode(opening(), MSGPACK))).status_code == 200
