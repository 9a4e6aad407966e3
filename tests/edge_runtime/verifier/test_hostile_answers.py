"""What is no verifier, or a hostile one, costs a board neither memory nor an untyped error: real servers, HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import Fault
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import VerifierSession

MEBIBYTE = 1 << 20
STREAM = messages.STREAM_MEDIA_TYPES[messages.MSGPACK]

pytestmark = pytest.mark.usefixtures("short_grace")


class HostileVerifier:
    """An ASGI application that answers everything with the same pieces."""

    def __init__(self, *pieces: bytes, status: int = 200, **headers: str) -> None:
        self._pieces, self._status = pieces, status
        self._headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def client_of(app: HostileVerifier) -> AsyncIterator[VerifierClient]:
    server = HttpServer(app, ListenOptions(port=0))
    await server.start()
    try:
        async with VerifierClient(server.url, deadline=3.0) as client:
            yield client
    finally:
        await server.stop()


async def fetch_models(client: VerifierClient) -> None:
    await client.models()


async def run_round(client: VerifierClient) -> None:
    async for _ in VerifierSession(client, [5, 6, 7], Sampling()).run_round([8, 9], n=4, stream=True):
        pass


# More than all of these tests may take.
BOMB = gzip.compress(bytes(64 * MEBIBYTE), compresslevel=1)
LARGE = (bytes(MEBIBYTE // 4),) * 6
# A frame of 2^32 - 1 bytes, as LEB128, and the beginning of it.
HUGE_FRAME = messages.pack_varints([2**32 - 1]) + bytes(100)


ANSWERS = [
    (HostileVerifier(BOMB, content_encoding="gzip"), "content-encoding: gzip, unasked"),
    (HostileVerifier(BOMB, content_encoding="gzip", status=500), "content-encoding: gzip, unasked"),
    (HostileVerifier(b"x", content_encoding="br"), "content-encoding: br, unasked"),
    (HostileVerifier(*LARGE), "an answer of more than 1048576 bytes"),
    (HostileVerifier(*LARGE, status=503), "an answer of more than 1048576 bytes"),
]


@pytest.mark.parametrize("use", [fetch_models, run_round])
async def test_a_large_or_compressed_answer_is_a_typed_error(use: Any) -> None:
    """All at once, since each client tries again until its deadline."""

    async def check(app: HostileVerifier, sentence: str) -> None:
        async with client_of(app) as client:
            with pytest.raises(VerifierUnreachable, match=sentence) as caught:
                await use(client)
            assert caught.value.fault == Fault.BROKEN
            assert client.link_state.problem is not None

    tracemalloc.start()
    try:
        await asyncio.gather(*(check(*answer) for answer in ANSWERS))
        # Of each a mebibyte, twice while it is put together, and what the servers in this process hold of their own.
        assert tracemalloc.get_traced_memory()[1] < len(ANSWERS) * 8 * MEBIBYTE
    finally:
        tracemalloc.stop()


async def test_a_frame_of_any_length_is_refused_before_it_is_read() -> None:
    async with client_of(HostileVerifier(HUGE_FRAME, content_type=STREAM)) as client:
        with pytest.raises(VerifierUnreachable, match="a frame of 4294967295 bytes, and 1048576 are the most"):
            await run_round(client)
    splitter = messages.FrameSplitter(messages.MSGPACK)
    with pytest.raises(InputError, match="1048576 are the most"):
        list(splitter.feed(messages.pack_varints([messages.MAX_REPLY_BYTES + 1])))
    lines = messages.FrameSplitter(messages.JSON)
    with pytest.raises(InputError, match="1048576 are the most"):
        list(lines.feed(b" " * (messages.MAX_REPLY_BYTES + 1)))


async def test_an_endless_stream_of_frames_ends() -> None:
    """Frames that are whole but do not belong to the round, or that never say that they are the last."""
    frame = messages.Frame(messages.PROTOCOL_VERSION, 0, 0, [], more=True)
    reply = messages.OpenReply(messages.PROTOCOL_VERSION, "x", "v", 100, frame)
    body = messages.encode_frame(reply, messages.MSGPACK, index=0)
    async with client_of(HostileVerifier(body, *LARGE, content_type=STREAM)) as client:
        with pytest.raises(VerifierUnreachable):
            await run_round(client)


async def test_what_a_refusal_says_is_cut() -> None:
    error = messages.ErrorReply(messages.PROTOCOL_VERSION, "c" * 10_000, "\x1b[2J" + "m" * 100_000)
    body = messages.encode(error, messages.MSGPACK)
    async with client_of(HostileVerifier(body, status=404)) as client:
        with pytest.raises(VerifierRefused) as caught:
            await fetch_models(client)
    assert len(str(caught.value)) < 2100 and len(caught.value.code) == 64
