"""The protocol over real HTTP: sessions, rounds, streams, evictions, and every error."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import msgspec
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
    FrameSplitter,
    ModelList,
    OpenReply,
    RoundRequest,
)
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ProtocolClient,
    Session,
    decode_error,
    opening,
    running,
)
from tests.conftest import serving

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
    "prompt outside the vocabulary": ({"prompt": [300]}, 400, ErrorCode.INVALID_TOKEN, {}),
    "prompt as long as the context": ({"prompt": [5] * 512}, 413, ErrorCode.CONTEXT_OVERFLOW, {"limit": 511}),
    "empty prompt": ({"prompt": []}, 400, ErrorCode.MALFORMED, {}),
    "round other than the first": ({"round": 1}, 409, ErrorCode.ROUND_OUT_OF_ORDER, {"expected": 0}),
    "position other than the end of the prompt": ({"position": 5}, 409, ErrorCode.WRONG_POSITION, {"expected": 4}),
    "draft outside the vocabulary": ({"draft": [300]}, 400, ErrorCode.INVALID_TOKEN, {}),
    "draft too long": ({"draft": [1] * 33}, 400, ErrorCode.DRAFT_TOO_LONG, {"limit": 32}),
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


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_client_that_sends_ten_megabytes_gets_the_error(tiny: Target, http2: bool) -> None:
    """Responding while the client still writes would reset the connection, or exhaust the stream's window."""
    async with (
        serving(tiny) as server,
        httpx.AsyncClient(base_url=server.url, http1=not http2, http2=http2, timeout=TIMEOUT_SECONDS) as client,
    ):
        response = await client.post("/v1/sessions", content=bytes(10_000_000), headers={"content-type": MSGPACK})
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
    stale = RoundRequest(PROTOCOL_VERSION, 1, len(PROMPT) + 2, [1, 2, 3], 2, {0: [7, 9]})
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
    session = Session(client, once, request)
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


@pytest.mark.parametrize("media_type", [MSGPACK, JSON])
async def test_streamed_frames_add_up_to_the_whole_reply(
    tiny: Target, reference_text: ReferenceText, media_type: str
) -> None:
    truth = reference_text(PROMPT, 300, ENDLESS)
    headers = {"content-type": media_type}
    async with (
        serving(tiny) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS) as client,
    ):
        opened = await client.post("/v1/sessions", content=messages.encode(opening(sampling=ENDLESS), media_type))
        session = messages.decode(opened.content, OpenReply, media_type).session
        path = f"/v1/sessions/{session}/rounds"
        request = RoundRequest(PROTOCOL_VERSION, 1, 5, [truth[1], 299], n=250, stream=True)
        splitter, frames = FrameSplitter(media_type), []
        async with client.stream("POST", path, content=messages.encode(request, media_type, session)) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == messages.STREAM_MEDIA_TYPES[media_type]
            async for piece in response.aiter_raw():
                frames += [messages.decode(body, Frame, media_type, session) for body in splitter.feed(piece)]
        assert not splitter.incomplete
        assert len(frames) > 1
        assert [frame.accepted for frame in frames] == [1] + [0] * (len(frames) - 1)
        assert [frame.more for frame in frames] == [True] * (len(frames) - 1) + [False]
        assert [token for frame in frames for token in frame.tokens] == truth[2:252]
        assert [frame.forward_100us for frame in frames] == sorted(frame.forward_100us for frame in frames)
        # Without server-side speculation each further token takes a forward; the last frame reports their number.
        assert [frame.further for frame in frames] == [0] * (len(frames) - 1) + [249]
        # After a lost connection the client may request the whole reply in one piece.
        again = msgspec.structs.replace(request, stream=False)
        whole = await client.post(path, content=messages.encode(again, media_type, session))
        frame = messages.decode(whole.content, Frame, media_type, session)
        assert (frame.accepted, frame.tokens, frame.more, frame.further) == (1, truth[2:252], False, 249)


async def test_a_streamed_opening_begins_with_the_open_reply(tiny: Target, reference_text: ReferenceText) -> None:
    async with serving(tiny) as server, httpx.AsyncClient(base_url=server.url) as client:
        request = messages.encode(opening(sampling=ENDLESS, n=60, stream=True), MSGPACK)
        response = await client.post("/v1/sessions", content=request, headers={"content-type": MSGPACK})
        first, *others = FrameSplitter(MSGPACK).feed(response.content)
        reply = messages.decode(first, OpenReply, MSGPACK)
        frames = [reply.first, *(messages.decode(body, Frame, MSGPACK, reply.session) for body in others)]
        assert [token for frame in frames for token in frame.tokens] == reference_text(PROMPT, 60, ENDLESS)


async def test_concurrent_boards_get_their_own_texts(tiny: Target, reference_text: ReferenceText) -> None:
    async with serving(tiny) as server, httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_SECONDS) as client:

        async def answer(seed: int) -> list[int]:
            request = opening([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True), n=20)
            body = messages.encode(request, MSGPACK)
            response = await client.post("/v1/sessions", content=body, headers={"content-type": MSGPACK})
            return messages.decode(response.content, OpenReply, MSGPACK).first.tokens

        answers = await asyncio.gather(*map(answer, range(12)))
    assert answers == [
        reference_text([5, seed + 1], 20, Sampling(1.0, seed=seed, ignore_eos=True)) for seed in range(12)
    ]


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


async def test_the_verifier_is_overloaded_if_all_sessions_are_busy(tiny: Target) -> None:
    headers = {"content-type": MSGPACK}
    async with (
        serving(tiny, VerifierLimits(max_sessions=1)) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS) as client,
    ):
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


async def test_closing_a_session_ends_its_stream(tiny: Target) -> None:
    headers = {"content-type": MSGPACK}
    async with (
        serving(tiny) as server,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS) as client,
    ):
        splitter, bodies = FrameSplitter(MSGPACK), []
        request = messages.encode(opening(sampling=ENDLESS, n=500, stream=True), MSGPACK)
        async with client.stream("POST", "/v1/sessions", content=request) as response:
            async for piece in response.aiter_raw():
                bodies += list(splitter.feed(piece))
                if len(bodies) == 1:
                    session = messages.decode(bodies[0], OpenReply, MSGPACK).session
                    assert (await client.delete(f"/v1/sessions/{session}")).status_code == 204
        # The last frame says `more`, so the client notices that the round is incomplete.
        last = messages.decode(bodies[-1], Frame, MSGPACK, session) if len(bodies) > 1 else None
        assert last is None or last.more
        assert (await client.get("/readyz")).status_code == 200


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
