"""The process on the way that answers for the verifier, or spoils what it says.

    python -m tests.emulator.middlebox HOST PORT VERIFIER SEED

Two in a row: one that knows TCP only, at HOST:PORT, and behind it one that knows HTTP/1.1 and 2. Told what to do on its
standard input (`Mischief`), it answers each time with what it has done so far.
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

from edge_runtime.common.http_server import Listening, Server

# Headers that a body cannot be understood without; the rest is the box's own.
PASSED_ON = (b"content-type", b"accept", b"retry-after")
UNAVAILABLE = b"<html><body><h1>503 Service Unavailable</h1></body></html>"


class Mischief(msgspec.Struct, frozen=True):
    """What is done from now on, each to a share of what passes.

    Attributes:
        refuse: requests that are answered 503 with a page, as by a load balancer whose backends are gone.
        cut: answers whose body ends in the middle.
        corrupt: answers in whose body one bit is flipped.
        cut_raw: pieces of the TCP stream to the board in whose middle the connection is reset.
        corrupt_raw: pieces of it in which one bit is flipped.
    """

    refuse: float = 0.0
    cut: float = 0.0
    corrupt: float = 0.0
    cut_raw: float = 0.0
    corrupt_raw: float = 0.0


class Done(msgspec.Struct):
    """How often each was done."""

    refuse: int = 0
    cut: int = 0
    corrupt: int = 0
    cut_raw: int = 0
    corrupt_raw: int = 0

    @property
    def total(self) -> int:
        return sum(msgspec.structs.astuple(self))


class Box:
    """What both layers go by."""

    def __init__(self, seed: int) -> None:
        self.mischief = Mischief()
        self.done = Done()
        self._random = Random(seed)

    def strikes(self, name: str) -> bool:
        """Whether this one is hit; it is counted."""
        hit = self._random.random() < getattr(self.mischief, name)
        setattr(self.done, name, getattr(self.done, name) + hit)
        return hit

    def flip(self, piece: bytes) -> bytes:
        """`piece` with one bit the other way round."""
        spoilt = bytearray(piece)
        spoilt[self._random.randrange(len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)


class Gateway:
    """The half that knows HTTP: an ASGI application."""

    def __init__(self, box: Box, verifier: str) -> None:
        self._box = box
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
        if self._box.strikes("refuse"):
            await _answer(send, 503, UNAVAILABLE)
            return
        headers = [(name, value) for name, value in scope["headers"] if name in PASSED_ON]
        url = self._verifier + scope["path"]
        request = self._http.build_request(scope["method"], url, content=body or None, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TransportError:
            await _answer(send, 502, b"<html><body><h1>502 Bad Gateway</h1></body></html>")
            return
        try:
            await self._pass_on(response, send)
        except httpx.TransportError:
            raise RuntimeError("the verifier's answer broke off, so this one does") from None
        finally:
            await response.aclose()

    async def _pass_on(self, response: httpx.Response, send: Callable[[Any], Awaitable[None]]) -> None:
        headers = [(name, value) for name, value in response.headers.raw if name.lower() in PASSED_ON]
        cut, corrupt = self._box.strikes("cut"), self._box.strikes("corrupt")
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        async for piece in response.aiter_raw():
            if corrupt and piece:
                piece, corrupt = self._box.flip(piece), False
            await send(
                {"type": "http.response.body", "body": piece[: len(piece) // 2 if cut else None], "more_body": True}
            )
            if cut:
                raise RuntimeError("cut")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Pipe:
    """The half that knows TCP."""

    def __init__(self, box: Box, port: int) -> None:
        self._box = box
        self._port = port

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._carry(reader, there, False), self._carry(back, writer, True))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoil: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if spoil and self._box.strikes("corrupt_raw"):
                    piece = self._box.flip(piece)
                if spoil and self._box.strikes("cut_raw"):
                    writer.write(piece[: len(piece) // 2])
                    await writer.drain()
                    writer.transport.abort()
                    return
                writer.write(piece)
                await writer.drain()
        writer.close()


async def _answer(send: Callable[[Any], Awaitable[None]], status: int, page: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": page, "more_body": False})


async def main() -> None:
    host, port, verifier, seed = sys.argv[1:]
    box = Box(int(seed))
    gateway = Server(Gateway(box, verifier), Listening(port=0))
    await gateway.start()
    listener = await asyncio.start_server(Pipe(box, int(gateway.url.rsplit(":", 1)[1])).connected, host, int(port))
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        box.mischief = msgspec.json.decode(line, type=Mischief)
        os.write(1, msgspec.json.encode(box.done) + b"\n")
    listener.close()
    # Nothing of it is worth a farewell.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
