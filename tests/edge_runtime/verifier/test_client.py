from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import BrokenAnswer
from edge_runtime.verifier.session import VerifierSession
from tests.conftest import serving

PROMPT = [40, 41, 42, 43]


async def text_of(session: VerifierSession, rounds: int = 6, **plan: object) -> list[int]:
    for _ in range(rounds):
        async for _ in session.run_round([], **plan):
            pass
    return session.ids


async def expected(target: Target, rounds: int = 6, n: int = 1) -> list[int]:
    async with serving(target) as server, VerifierClient(server.url) as client:
        return await text_of(VerifierSession(client, PROMPT, Sampling(ignore_eos=True)), rounds, n=n)


@pytest.mark.parametrize("url", ["", "verifier", "ftp://verifier", "http://", "http://[::1"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:8500|is not a URL"):
        VerifierClient(url)


async def test_requests_carry_the_token_and_no_other_header() -> None:
    heard: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers)
        body = messages.encode(messages.ModelList([]), messages.MSGPACK)
        return httpx.Response(200, stream=httpx.ByteStream(body))

    for token in ("", "s3cret"):
        async with VerifierClient("http://x", token=token, transport=httpx.MockTransport(answer)) as client:
            await client.models()
    assert [headers.get("authorization") for headers in heard] == [None, "Bearer s3cret"]
    assert set(heard[0]) <= {"host", "accept", "accept-encoding"}


def test_invalid_certificate_authorities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot trust the authorities in"):
        VerifierClient("https://x", authorities=tmp_path / "none.pem")


@pytest.mark.slow
async def test_an_unreachable_verifier_is_reported() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        started = time.monotonic()
        async with VerifierClient(f"http://127.0.0.1:{bound.getsockname()[1]}", deadline=0.5) as client:
            with pytest.raises(VerifierUnreachable, match=r"within [\d.]+ s .*is it running"):
                await text_of(VerifierSession(client, PROMPT, Sampling()))
            assert client.retries > 0
        assert time.monotonic() - started < 60


@pytest.mark.slow
async def test_a_silent_peer_cannot_exceed_the_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = time.monotonic()
    async with VerifierClient(f"http://127.0.0.1:{port}", deadline=0.5) as client:
        with pytest.raises(VerifierUnreachable):
            await text_of(VerifierSession(client, PROMPT, Sampling()))
    assert time.monotonic() - started < 60
    server.close()


async def test_another_http_server_is_not_taken_for_a_verifier() -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nlogin")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with VerifierClient(f"http://127.0.0.1:{port}", deadline=5) as client:
        with pytest.raises(VerifierRefused, match="is this the URL of a verifier"):
            await text_of(VerifierSession(client, PROMPT, Sampling()))
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("http", ["1", "2", "auto"])
@pytest.mark.parametrize("http2", [True, False])
async def test_every_http_version(tiny: Target, http: str, http2: bool) -> None:
    wanted = await expected(tiny)
    async with serving(tiny, http=http) as server, VerifierClient(server.url, http2=http2) as client:
        if http == "2" and not http2:
            client.deadline = 1.0
            with pytest.raises(VerifierUnreachable):
                await text_of(VerifierSession(client, PROMPT, Sampling(ignore_eos=True)))
            return
        assert await text_of(VerifierSession(client, PROMPT, Sampling(ignore_eos=True))) == wanted
        sent, received = client.meter.take()
        assert 300 < sent < 6000
        assert 300 < received < 6000
        assert client.meter.rtt_seconds is not None


async def test_an_unknown_model_and_an_incompatible_draft_are_refused(tiny: Target) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        for wrong, code in (
            ({"model": "gpt"}, "unknown_model"),
            ({"vocabulary": "0" * 16}, "vocabulary_mismatch"),
            ({"draft": "anchor/1/" + "0" * 16}, "draft_mismatch"),
        ):
            with pytest.raises(VerifierRefused) as refused:
                await text_of(VerifierSession(client, PROMPT, Sampling(), **wrong))
            assert refused.value.code == code


async def test_a_session_is_pinned_to_its_version(tiny: Target) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        session = VerifierSession(client, PROMPT, Sampling(), model="tiny")
        await text_of(session, 1)
        assert session.version == tiny.version
        session.close()
        await text_of(session, 1)
        assert session._opening.model == tiny.version


class Faulty(httpx.AsyncBaseTransport):
    """A transport that corrupts or truncates some of the answers."""

    def __init__(self, spoil: Callable[[int, bytes], list[bytes | Exception]]) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._spoil = spoil
        self.requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        body = await response.aread()
        if request.method == "DELETE":
            return httpx.Response(response.status_code, request=request)
        self.requests += 1
        pieces = self._spoil(self.requests, body)

        async def stream() -> AsyncIterator[bytes]:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        headers = {name: value for name, value in response.headers.items() if name == "content-type"}
        return httpx.Response(response.status_code, headers=headers, content=stream(), request=request)

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.mark.slow
@settings(max_examples=15)
@given(data=st.data(), n=st.sampled_from([1, 4, 12]))
def test_truncated_or_corrupted_answers_are_retried(tiny: Target, data: st.DataObject, n: int) -> None:
    plan = data.draw(
        st.lists(st.tuples(st.sampled_from(["cut", "break", "flip", "double"]), st.floats(0, 1)), max_size=4)
    )

    def spoil(number: int, body: bytes) -> list[bytes | Exception]:
        # Every other answer stays intact, so that the deadline does not decide.
        if number % 2 == 0 or number // 2 >= len(plan) or not body:
            return [body]
        how, where = plan[number // 2]
        place = min(int(where * len(body)), len(body) - 1)
        if how == "cut":
            return [body[:place]]
        if how == "break":
            return [body[:place], httpx.ReadError("the link went away")]
        if how == "double":
            return [body, body]
        # Corruption invisible to msgpack would change tokens; TCP and TLS detect it. The frame's first byte is visible.
        return [bytes([body[0] ^ 0xFF]) + body[1:]]

    async def play() -> tuple[list[int], list[int]]:
        async with serving(tiny) as server, VerifierClient(server.url, deadline=20) as good:
            wanted = await text_of(VerifierSession(good, PROMPT, Sampling(ignore_eos=True)), 3, n=n, stream=n > 1)
            async with VerifierClient(server.url, transport=Faulty(spoil), deadline=20) as client:
                session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True))
                return wanted, await text_of(session, 3, n=n, stream=n > 1)

    wanted, got = asyncio.run(play())
    assert got == wanted


@pytest.mark.slow
async def test_an_answer_to_another_round_is_rejected(tiny: Target) -> None:
    def spoil(number: int, body: bytes) -> list[bytes | Exception]:
        # Byte 2 of a frame is its round number.
        return [body[:2] + b"\x05" + body[3:]] if number == 2 else [body]

    async with serving(tiny) as server, VerifierClient(server.url, transport=Faulty(spoil)) as client:
        assert await text_of(VerifierSession(client, PROMPT, Sampling(ignore_eos=True))) == await expected(tiny)
        assert client.retries == 1


@pytest.mark.slow
async def test_a_frame_lost_within_a_stream_is_noticed(tiny: Target) -> None:
    """A damaged HTTP/2 frame can lose a whole message; the messages after it are intact."""
    lost = 0

    def lose_the_second_message(number: int, body: bytes) -> list[bytes | Exception]:
        nonlocal lost
        size = len(body) and body[0] + 1
        # Every message is shorter than 128 bytes, so that its length takes one byte.
        second = size + (body[size] + 1 if size < len(body) else 0)
        if number % 2 == 0 or second >= len(body):
            return [body]
        lost += 1
        return [body[:size] + body[second:]]

    wanted = await expected(tiny, rounds=3, n=20)
    async with (
        serving(tiny) as server,
        VerifierClient(server.url, transport=Faulty(lose_the_second_message)) as client,
    ):
        # A verifier that is slow to send has all tokens of a round in one message, which cannot lose its second one.
        while not lost:
            session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True))
            assert await text_of(session, 3, n=20, stream=True) == wanted
        assert client.retries == lost


async def test_a_lost_session_is_reopened_mid_round(tiny: Target) -> None:
    """The connection breaks after the first frames of a stream, and the session is gone afterwards."""
    wanted = await expected(tiny, rounds=1, n=20)
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        session = VerifierSession(client, PROMPT, Sampling(ignore_eos=True))
        got = []
        async for said in session.run_round([], n=20, stream=True):
            got += said.own
            if len(got) == len(said.own):
                server.service.sessions.remove(session._id)
        assert PROMPT + got == session.ids == wanted
        assert session.recoveries == 1


async def test_closing_frees_the_session(tiny: Target) -> None:
    async with serving(tiny) as server:
        async with VerifierClient(server.url) as client:
            session = VerifierSession(client, PROMPT, Sampling())
            await text_of(session, 1)
            assert len(server.service.sessions) == 1
            session.close()
        assert len(server.service.sessions) == 0


async def test_a_broken_answer_discards_only_tokens_not_yet_yielded() -> None:
    """After a BrokenAnswer, tokens that were not yielded are requested again."""

    async def portal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack\r\ncontent-length: 2\r\n\r\n\x93\x01")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(portal, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with VerifierClient(url, http2=False, deadline=0.3) as client:
        session = VerifierSession(client, PROMPT, Sampling())
        with pytest.raises(BrokenAnswer):
            await session._start([], {}, 1, False).next_update()
        with pytest.raises(VerifierUnreachable):
            await text_of(session, 1)
        assert session.ids == PROMPT
    server.close()
