"""Bodies of requests that are too long or too slow, over real sockets, in both versions of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edge_runtime.common import request_body
from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.common.request_body import read_body
from edge_runtime.protocol.errors import BodyRefused

LIMIT = 1000


async def answer(request: Request) -> Response:
    """Answer with the length of the body."""
    try:
        return PlainTextResponse(str(len(await read_body(request, LIMIT))))
    except BodyRefused as error:
        return PlainTextResponse(str(error), error.status)


@contextlib.asynccontextmanager
async def connected(http2: bool) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(Starlette(routes=[Route("/", answer, methods=["POST"])]), ListenOptions(port=0))
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=server.url, http1=not http2, http2=http2, timeout=60) as client:
            yield client
    finally:
        await server.stop()


async def in_chunks(size: int, count: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(size)
        await asyncio.sleep(pause)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_body_has_at_most_its_limit_also_in_chunks(http2: bool) -> None:
    async with connected(http2) as client:
        assert (await client.post("/", content=bytes(LIMIT))).text == str(LIMIT)
        assert (await client.post("/", content=in_chunks(100, LIMIT // 100))).text == str(LIMIT)
        for body in (bytes(LIMIT + 1), in_chunks(100, LIMIT // 100 + 1), in_chunks(1 << 16, 40)):
            refused = await client.post("/", content=body)
            assert (refused.status_code, refused.text) == (413, "the body is longer than 1000 bytes")


async def test_a_body_must_arrive_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.2)
    async with connected(http2=True) as client:
        refused = await client.post("/", content=in_chunks(1, 60, 0.01))
        assert (refused.status_code, refused.text) == (408, "the body did not arrive within 0.2 s")
        # Over HTTP/1.1, a client that sends while the server closes may lose the answer: this one stops in the middle.
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\nfive.")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_an_endless_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "DISCARDED_BYTES", 1 << 20)
    async with connected(http2=False) as client:
        url = httpx.URL(client.base_url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(60):
                while b"413" not in await _read_now(reader):
                    writer.write(chunk)
                    await writer.drain()
                    sent += len(chunk)
        # What is sent and not read is in buffers on the way.
        assert sent < 1 << 26
        writer.close()


async def _read_now(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(1000), 0.001)
    except TimeoutError:
        return b""
