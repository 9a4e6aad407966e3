"""Streamed rounds over real HTTP, and boards that share the verifier."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    JSON,
    MSGPACK,
    PROTOCOL_VERSION,
    Frame,
    FrameSplitter,
    OpenReply,
    RoundRequest,
)
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, connected, opening

ENDLESS = Sampling(ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("media_type", [MSGPACK, JSON])
async def test_streamed_frames_add_up_to_the_whole_reply(
    tiny: Target, reference_text: ReferenceText, media_type: str
) -> None:
    truth = reference_text(PROMPT, 300, ENDLESS)
    async with connected(tiny, media_type=media_type) as client:
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
    async with connected(tiny) as client:
        request = messages.encode(opening(sampling=ENDLESS, n=60, stream=True), MSGPACK)
        response = await client.post("/v1/sessions", content=request)
        first, *others = FrameSplitter(MSGPACK).feed(response.content)
        reply = messages.decode(first, OpenReply, MSGPACK)
        frames = [reply.first, *(messages.decode(body, Frame, MSGPACK, reply.session) for body in others)]
        assert [token for frame in frames for token in frame.tokens] == reference_text(PROMPT, 60, ENDLESS)


@pytest.mark.slow
async def test_concurrent_boards_get_their_own_texts(tiny: Target, reference_text: ReferenceText) -> None:
    async with connected(tiny) as client:

        async def answer(seed: int) -> list[int]:
            request = opening([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True), n=20)
            body = messages.encode(request, MSGPACK)
            response = await client.post("/v1/sessions", content=body)
            return messages.decode(response.content, OpenReply, MSGPACK).first.tokens

        answers = await asyncio.gather(*map(answer, range(12)))
    assert answers == [
        reference_text([5, seed + 1], 20, Sampling(1.0, seed=seed, ignore_eos=True)) for seed in range(12)
    ]


async def test_closing_a_session_ends_its_stream(tiny: Target) -> None:
    async with connected(tiny) as client:
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
