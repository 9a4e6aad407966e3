"""The routes over real HTTP: sessions, repeated requests, the end of a text, and readiness."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.api.server import VerifierServer
from cloud_verifier.model.target import Target
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    JSON,
    MSGPACK,
    PROTOCOL_VERSION,
    ErrorCode,
    Frame,
    ModelList,
    OpenReply,
    RoundRequest,
)
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ClientSession,
    ProtocolClient,
    decode_error,
    opening,
)

ENDLESS = Sampling(ignore_eos=True)


def test_open_run_rounds_and_delete(client: ProtocolClient, tiny: Target, reference_text: ReferenceText) -> None:
    truth = reference_text(PROMPT, 12)
    session = client.open(n=2)
    assert session.reply.version == tiny.version
    assert session.reply.context == tiny.context
    assert session.frame.tokens == truth[:2]

    frame = session.run_round(draft=[*truth[2:4], 299], n=3)
    assert (frame.round, frame.accepted, frame.tokens) == (1, 2, truth[4:7])
    assert (frame.finish, frame.more) == ("", False)
    assert frame.forward_100us > 0

    assert session.run_round(draft=truth[7:10]).accepted == 3
    assert session.ids == PROMPT + truth[:11]

    assert client.http.delete(f"/v1/sessions/{session.id}").status_code == 204
    assert client.http.delete(f"/v1/sessions/{session.id}").status_code == 204
    error = client.expect_error(client.post(session.path, session.next_round()), 404, ErrorCode.SESSION_LOST)
    assert "open a new one with all ids so far" in error.message


def test_a_lost_session_continues_in_another(client: ProtocolClient, reference_text: ReferenceText) -> None:
    sampling = Sampling(0.9, top_p=0.95, seed=5)
    first = client.open(sampling=sampling, n=5)
    client.http.delete(f"/v1/sessions/{first.id}")
    second = client.open(first.ids, sampling, n=5)
    assert second.ids == PROMPT + reference_text(PROMPT, 10, sampling)


def test_the_list_of_models(client: ProtocolClient, tiny: Target) -> None:
    listed = client.decode_reply(client.http.get("/v1/models"), ModelList)
    assert listed.object == "list"
    [model] = listed.data
    assert (model.id, model.version, model.object) == (tiny.name, tiny.version, "model")
    assert (model.vocabulary, model.vocabulary_size) == (tiny.vocabulary, tiny.vocabulary_size)
    assert (model.context, model.max_draft, model.max_nodes) == (512, 32, messages.MAX_TREE_NODES - 1)


def test_health_and_readiness(url: str) -> None:
    assert httpx.get(f"{url}/healthz").text == "ok\n"
    assert httpx.get(f"{url}/readyz").text == "ready\n"


def test_models_are_listed_as_in_openais_api(url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()
    assert (listed["object"], listed["data"][0]["object"]) == ("list", "model")


def test_a_plain_get_is_answered_in_json(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["vocabulary_size"] == 300
    assert httpx.get(f"{url}/nowhere").json()["code"] == "unknown_route"


@pytest.mark.parametrize("accepts", [MSGPACK, JSON])
def test_the_reply_is_in_the_accepted_encoding(client: ProtocolClient, accepts: str) -> None:
    response = client.http.post("/v1/sessions", content=b"", headers={"accept": accepts})
    assert response.headers["content-type"] == accepts
    assert decode_error(response).code == (ErrorCode.MALFORMED if client.media_type == JSON else ErrorCode.DAMAGED)


def test_a_repeated_round_gets_the_recorded_reply(client: ProtocolClient, reference_text: ReferenceText) -> None:
    session = client.open(n=2)
    request = session.next_round(draft=[1, 2, 3], siblings={0: [7, 9]}, n=2)
    once, again = (client.decode_reply(client.post(session.path, request), Frame) for _ in range(2))
    assert once == again
    streamed = client.post(session.path, session.next_round(draft=[1, 2, 3], siblings={0: [7, 9]}, n=2, stream=True))
    assert streamed.status_code == 200
    session.run_round(draft=[1, 2, 3], siblings={0: [7, 9]}, n=2)
    session.run_round(n=4)
    assert session.ids == PROMPT + reference_text(PROMPT, len(session.ids) - len(PROMPT))
    stale = RoundRequest(
        v=PROTOCOL_VERSION, round=1, position=len(PROMPT) + 2, draft=[1, 2, 3], n=2, siblings={0: [7, 9]}
    )
    error = client.expect_error(client.post(session.path, stale), 409, ErrorCode.ROUND_OUT_OF_ORDER)
    assert error.detail == {"expected": 3}


@pytest.mark.parametrize("change", [{"n": 3}, {"draft": [1]}, {"siblings": {0: [8]}}], ids=str)
def test_the_same_round_with_other_contents_is_a_conflict(client: ProtocolClient, change: dict[str, Any]) -> None:
    session = client.open()
    contents = {"draft": [1, 2], "siblings": {0: [7]}, "n": 2}
    request = session.next_round(**contents)
    recorded = client.decode_reply(client.post(session.path, request), Frame)
    other = client.post(session.path, session.next_round(**contents | change))
    client.expect_error(other, 409, ErrorCode.ROUND_CONFLICT)
    assert client.decode_reply(client.post(session.path, request), Frame) == recorded


def test_the_same_key_opens_the_same_session(client: ProtocolClient) -> None:
    request = opening(n=3)
    once, again = (client.decode_reply(client.post("/v1/sessions", request), OpenReply) for _ in range(2))
    assert once == again
    session = ClientSession(client, once, request)
    session.run_round()
    error = client.expect_error(client.post("/v1/sessions", request), 409, ErrorCode.ROUND_OUT_OF_ORDER)
    assert error.detail == {"expected": 2}
    session.run_round()


def test_a_key_used_with_another_prompt_is_a_conflict(client: ProtocolClient) -> None:
    request = opening([10, 20, 30, 40])
    client.decode_reply(client.post("/v1/sessions", request), OpenReply)
    other = opening([40, 30, 20, 10], key=request.key)
    assert client.post("/v1/sessions", other).status_code == 409


def test_a_key_may_be_reused_after_its_session_was_closed(client: ProtocolClient) -> None:
    request = opening()
    first = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
    client.http.delete(f"/v1/sessions/{first.session}")
    second = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
    assert second.session != first.session
    assert second.first.tokens == first.first.tokens


def sampling_with_an_end(reference_text: ReferenceText) -> tuple[Sampling, list[int]]:
    """Sampling parameters whose text ends soon, but not at once; and that text."""
    for seed in range(1000):
        sampling = Sampling(2.0, seed=seed)
        text = reference_text(PROMPT, 12, sampling)
        if 3 < len(text) < 12:
            return sampling, text
    raise AssertionError("no seed ends early")


def test_the_text_ends_at_an_end_of_text_token(client: ProtocolClient, reference_text: ReferenceText) -> None:
    sampling, text = sampling_with_an_end(reference_text)
    session = client.open(sampling=sampling, n=512)
    assert session.frame.finish == "stop"
    assert session.ids == PROMPT + text
    error = client.expect_error(client.post(session.path, session.next_round()), 409, ErrorCode.SESSION_FINISHED)
    assert "stop" in error.message

    drafted = client.open(sampling=sampling)
    assert drafted.run_round(draft=[*text[1:], 5, 6]).finish == "stop"
    assert drafted.ids == PROMPT + text

    ignoring_eos = client.open(sampling=Sampling(2.0, seed=sampling.seed, ignore_eos=True), n=12)
    assert ignoring_eos.frame.finish == ""
    assert ignoring_eos.ids[: len(session.ids)] == session.ids


@pytest.mark.parametrize("draft", [0, 3, 32])
def test_a_full_context_ends_the_text(client: ProtocolClient, reference_text: ReferenceText, draft: int) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(500)]
    truth = reference_text(prompt, 60, ENDLESS)
    session = client.open(prompt, ENDLESS)
    while not session.frame.finish:
        known = len(session.ids) - len(prompt)
        session.run_round(draft=truth[known : known + draft], n=2)
    assert session.frame.finish == "length"
    assert len(session.ids) == 512
    assert session.ids == prompt + truth[:12]
    client.expect_error(client.post(session.path, session.next_round()), 409, ErrorCode.SESSION_FINISHED)


def test_a_siblings_bonus_token_that_exceeds_the_context_is_dropped(
    client: ProtocolClient, reference_text: ReferenceText
) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(510)]
    truth = reference_text(prompt, 3, ENDLESS)
    session = client.open(prompt, ENDLESS)
    frame = session.run_round(draft=[], n=1)
    assert (frame.finish, session.ids) == ("length", prompt + truth[:2])
    other = client.open(prompt[:509], ENDLESS)
    truth = reference_text(prompt[:509], 3, ENDLESS)
    wrong = (truth[1] + 1) % 300
    frame = other.run_round(draft=[wrong], siblings={0: [truth[1]]})
    assert (frame.finish, other.ids) == ("length", prompt[:509] + truth)


async def test_requests_are_refused_while_the_target_loads(tiny: Target) -> None:
    loaded = threading.Event()

    def load() -> Target:
        loaded.wait(TIMEOUT_SECONDS)
        return tiny

    server = VerifierServer(VerifierService(load, VerifierLimits()), ListenOptions(port=0))
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=server.url, headers={"content-type": MSGPACK}) as client:
            for response in (
                await client.get("/readyz"),
                await client.get("/v1/models"),
                await client.post("/v1/sessions", content=messages.encode(opening(), MSGPACK)),
            ):
                assert (response.status_code, decode_error(response).code) == (503, ErrorCode.STARTING)
                assert response.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            loaded.set()
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - set in another thread
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/sessions", content=messages.encode(opening(), MSGPACK))).status_code == 200
    finally:
        loaded.set()
        await server.stop()
