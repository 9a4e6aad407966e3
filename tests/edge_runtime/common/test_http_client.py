"""Answers are bounded and uncompressed, whatever a server sends: real servers, HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from edge_runtime.cli.top import ServiceUnreachable, _events
from edge_runtime.common import http_client
from edge_runtime.common.http_client import MAX_ANSWER_BYTES, UnusableAnswer, read_answer, read_lines
from edge_runtime.common.http_server import HttpServer, ListenOptions

MEBIBYTE = 1 << 20
# Endless bodies end here, or a failing test would not.
LONGEST_BODY_BYTES = 4 * MEBIBYTE


class HostileServer:
    """An ASGI application that sends `body`, again and again if it is endless.

    Attributes:
        accepted: the client's accept-encoding header.
    """

    def __init__(self, body: bytes, *, endless: bool = False, headers: dict[str, str] | None = None) -> None:
        self.accepted: bytes | None = None
        self._body, self._endless, self._headers = body, endless, headers or {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.accepted = dict(scope["headers"]).get(b"accept-encoding")
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        with contextlib.suppress(Exception):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for _ in range(LONGEST_BODY_BYTES // len(self._body) if self._endless else 0):
                await send({"type": "http.response.body", "body": self._body, "more_body": True})
            await send({"type": "http.response.body", "body": self._body})


@contextlib.asynccontextmanager
async def answer_of(app: HostileServer, *, http2: bool) -> AsyncIterator[httpx.Response]:
    server = HttpServer(app, ListenOptions(port=0))
    await server.start()
    try:
        async with (
            httpx.AsyncClient(http1=not http2, http2=http2, headers=http_client.UNCOMPRESSED) as client,
            client.stream("GET", server.url) as response,
        ):
            yield response
    finally:
        await server.stop()


pytestmark = pytest.mark.parametrize("http2", [False, True])


async def test_an_endless_body_is_left_at_its_limit(http2: bool) -> None:
    app = HostileServer(bytes(MEBIBYTE // 16), endless=True)
    async with answer_of(app, http2=http2) as response:
        with pytest.raises(UnusableAnswer, match="more than 1048576 bytes"):
            await read_answer(response)
        assert response.num_bytes_downloaded < 2 * MAX_ANSWER_BYTES
    assert app.accepted == b"identity"


async def test_a_body_within_its_limit_is_read(http2: bool) -> None:
    async with answer_of(HostileServer(b"x" * MEBIBYTE), http2=http2) as response:
        assert await read_answer(response) == b"x" * MEBIBYTE


async def test_a_body_that_says_that_it_is_too_long_is_not_read(http2: bool) -> None:
    headers = {"content-length": str(100 * MAX_ANSWER_BYTES)}
    app = HostileServer(bytes(MEBIBYTE // 16), endless=True, headers=headers)
    async with answer_of(app, http2=http2) as response:
        with pytest.raises(UnusableAnswer, match="more than 1048576 bytes"):
            await read_answer(response)
        assert response.num_bytes_downloaded == 0


async def test_compressed_answers_are_refused_and_not_unpacked(http2: bool) -> None:
    bomb = gzip.compress(bytes(16 * MEBIBYTE), compresslevel=1)
    headers = {"content-encoding": "gzip"}
    async with answer_of(HostileServer(bomb, headers=headers), http2=http2) as response:
        tracemalloc.start()
        try:
            with pytest.raises(UnusableAnswer, match="content-encoding: gzip, unasked"):
                await read_answer(response)
            assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
        finally:
            tracemalloc.stop()


async def test_lines_of_an_endless_stream(http2: bool) -> None:
    body = "data: {}\r\n: größer\n".encode() * 3000
    async with answer_of(HostileServer(body, endless=True), http2=http2) as response:
        lines = read_lines(response)
        assert [await anext(lines) for _ in range(4)] == ["data: {}", ": größer"] * 2
    async with answer_of(HostileServer(bytes(MEBIBYTE // 16), endless=True), http2=http2) as response:
        with pytest.raises(UnusableAnswer, match="a line of more than 1048576 bytes"):
            await anext(read_lines(response))
        assert response.num_bytes_downloaded < 2 * MAX_ANSWER_BYTES


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"content-encoding": "gzip", "content-type": "text/event-stream"}, "content-encoding: gzip, unasked"),
        ({"content-type": "text/event-stream"}, "a line of more than 1048576 bytes"),
    ],
)
async def test_top_refuses_such_streams(http2: bool, headers: dict[str, str], sentence: str) -> None:
    server = HttpServer(HostileServer(bytes(MEBIBYTE // 16), endless=True, headers=headers), ListenOptions(port=0))
    await server.start()
    try:
        async with httpx.AsyncClient(http1=not http2, http2=http2) as client:
            with pytest.raises(ServiceUnreachable, match=sentence):
                await anext(_events(client, server.url))
    finally:
        await server.stop()
