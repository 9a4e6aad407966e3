"""A middlebox process between board and verifier that refuses requests and damages replies.

    python -m tests.emulator.middlebox HOST PORT VERIFIER SEED

Two proxies in a row: a TCP proxy at HOST:PORT, and an HTTP/1.1 and HTTP/2 proxy between it and the verifier. Every line
of standard input sets the `FaultRates`; the reply is the `FaultCounts` so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import httpx
import msgspec

from edge_runtime.common.http_server import HttpServer, ListenOptions

# Headers that are needed to decode a body; all other headers are the middlebox's own.
FORWARDED_HEADERS = (b"content-type", b"accept", b"retry-after")
UNAVAILABLE = b"<html><body><h1>503 Service Unavailable</h1></body></html>"


class FaultRates(msgspec.Struct, frozen=True):
    """The share of the traffic that each fault is injected into.

    Attributes:
        refuse: requests answered with 503 and an HTML page, as by a load balancer without backends.
        cut: responses whose body ends in the middle.
        corrupt: responses with one bit of the body flipped.
        cut_raw: chunks of the TCP stream to the board in the middle of which the connection is reset.
        corrupt_raw: chunks of that stream with one bit flipped.
    """

    refuse: float = 0.0
    cut: float = 0.0
    corrupt: float = 0.0
    cut_raw: float = 0.0
    corrupt_raw: float = 0.0


class FaultCounts(msgspec.Struct):
    """The number of times that each fault was injected."""

    refuse: int = 0
    cut: int = 0
    corrupt: int = 0
    cut_raw: int = 0
    corrupt_raw: int = 0

    @property
    def total(self) -> int:
        return sum(msgspec.structs.astuple(self))


class FaultInjector:
    """Decides at random which traffic to damage; shared by both proxies."""

    def __init__(self, seed: int) -> None:
        self.fault_rates = FaultRates()
        self.counts = FaultCounts()
        self._random = Random(seed)

    def should_inject(self, name: str) -> bool:
        """Decide at random whether to inject fault `name`, and count it if so."""
        hit = self._random.random() < getattr(self.fault_rates, name)
        setattr(self.counts, name, getattr(self.counts, name) + hit)
        return hit

    def flip_bit(self, chunk: bytes) -> bytes:
        """Return `chunk` with one random bit flipped."""
        damaged = bytearray(chunk)
        damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)


class HttpProxy:
    """The HTTP proxy: an ASGI application."""

    def __init__(self, injector: FaultInjector, verifier: str) -> None:
        self._injector = injector
        self._verifier = verifier
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.AsyncClient(http1=False, http2=True, limits=unlimited, timeout=httpx.Timeout(120, connect=1))
        for name in ("accept", "accept-encoding", "connection", "user-agent"):
            del self._http.headers[name]

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if self._injector.should_inject("refuse"):
            await _send_page(send, 503, UNAVAILABLE)
            return
        headers = [(name, value) for name, value in scope["headers"] if name in FORWARDED_HEADERS]
        url = self._verifier + scope["path"]
        request = self._http.build_request(scope["method"], url, content=body or None, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TransportError:
            await _send_page(send, 502, b"<html><body><h1>502 Bad Gateway</h1></body></html>")
            return
        try:
            await self._forward(response, send)
        except httpx.TransportError:
            raise RuntimeError("the verifier's response was cut off, so this one is cut off too") from None
        finally:
            await response.aclose()

    async def _forward(self, response: httpx.Response, send: Callable[[Any], Awaitable[None]]) -> None:
        headers = [(name, value) for name, value in response.headers.raw if name.lower() in FORWARDED_HEADERS]
        cut, corrupt = self._injector.should_inject("cut"), self._injector.should_inject("corrupt")
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        async for chunk in response.aiter_raw():
            if corrupt and chunk:
                chunk, corrupt = self._injector.flip_bit(chunk), False
            await send(
                {"type": "http.response.body", "body": chunk[: len(chunk) // 2 if cut else None], "more_body": True}
            )
            if cut:
                raise RuntimeError("cut")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class TcpProxy:
    """The TCP proxy."""

    def __init__(self, injector: FaultInjector, port: int) -> None:
        self._injector = injector
        self._port = port

    async def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            verifier_reader, verifier_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._copy(reader, verifier_writer, False), self._copy(verifier_reader, writer, True))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, damage: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if damage and self._injector.should_inject("corrupt_raw"):
                    chunk = self._injector.flip_bit(chunk)
                if damage and self._injector.should_inject("cut_raw"):
                    writer.write(chunk[: len(chunk) // 2])
                    await writer.drain()
                    writer.transport.abort()
                    return
                writer.write(chunk)
                await writer.drain()
        writer.close()


async def _send_page(send: Callable[[Any], Awaitable[None]], status: int, page: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": page, "more_body": False})


async def main() -> None:
    host, port, verifier, seed = sys.argv[1:]
    injector = FaultInjector(int(seed))
    http_proxy = HttpServer(HttpProxy(injector, verifier), ListenOptions(port=0))
    await http_proxy.start()
    listener = await asyncio.start_server(
        TcpProxy(injector, int(http_proxy.url.rsplit(":", 1)[1])).handle_connection, host, int(port)
    )
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        injector.fault_rates = msgspec.json.decode(line, type=FaultRates)
        os.write(1, msgspec.json.encode(injector.counts) + b"\n")
    listener.close()
    # Exit at once: there is nothing to shut down cleanly.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
