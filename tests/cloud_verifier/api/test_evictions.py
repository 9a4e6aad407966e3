"""Sessions are evicted within the limits over real HTTP, and those with a round in progress are not."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.model import kv_cache
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import MSGPACK, ErrorCode
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ObservedTarget,
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


def test_by_default_memory_bounds_the_tokens(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "CPU_SHARE", 1e-12)
    with running(tiny, VerifierLimits(max_tokens=0)) as url, ProtocolClient(url) as client:
        client.expect_error(client.post("/v1/sessions", opening([5] * 200)), 413, ErrorCode.CONTEXT_OVERFLOW)
    monkeypatch.undo()
    with running(tiny, VerifierLimits(max_tokens=0)) as url, ProtocolClient(url) as client:
        client.open([5] * 200).run_round()
        assert f"flexspec_cache_token_limit {float(kv_cache.CACHE_TOKENS)}" in client.http.get("/metrics").text


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
        assert response.status_code == 200 or decode_error(response).code == ErrorCode.CONTEXT_OVERFLOW


def test_a_prompt_that_can_never_fit_evicts_no_session(tiny: Target) -> None:
    with running(tiny, VerifierLimits(max_tokens=100)) as url, ProtocolClient(url) as client:
        session = client.open()
        assert client.post("/v1/sessions", opening([5] * 200)).status_code in (413, 503)
        session.run_round()


async def test_an_opening_waits_for_a_place_and_is_refused_in_the_end(tiny: Target) -> None:
    observed = ObservedTarget(tiny)
    async with connected(observed, VerifierLimits(max_sessions=1, max_queue_seconds=0.2)) as client:

        def start(n: int = 1) -> asyncio.Task[httpx.Response]:
            content = messages.encode(opening(sampling=ENDLESS, n=n), MSGPACK)
            return asyncio.create_task(client.post("/v1/sessions", content=content))

        observed.hold()
        busy = start(n=20)
        await asyncio.to_thread(observed.reached.wait, TIMEOUT_SECONDS)
        refused = await start()
        assert (refused.status_code, decode_error(refused).code) == (503, ErrorCode.OVERLOADED)
        assert refused.headers["retry-after"] == "1"
        observed.release()
        assert (await busy).status_code == 200
        assert (await start()).status_code == 200


async def test_openings_that_wait_for_a_place_are_served(tiny: Target) -> None:
    observed = ObservedTarget(tiny)
    async with connected(observed, VerifierLimits(max_sessions=1, max_queue_seconds=600)) as client:
        observed.hold()
        tasks = [
            asyncio.create_task(client.post("/v1/sessions", content=messages.encode(opening(), MSGPACK)))
            for _ in range(3)
        ]
        while "requests_waiting_for_room 2" not in (await client.get("/metrics")).text:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.01)
        observed.release()
        assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * 3
