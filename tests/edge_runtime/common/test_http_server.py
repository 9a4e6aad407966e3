"""The shared HTTP server: TCP keep-alive, and the application's lifespan."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from typing import Any

import pytest

from edge_runtime.common import http_server
from edge_runtime.common.http_server import HttpServer, ListenOptions


async def nothing(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An ASGI application without routes."""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_accepted_connections_have_tcp_keepalive(host: str) -> None:
    server = HttpServer(nothing, ListenOptions(host, 0))
    await server.start()
    try:
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            # A connection may be accepted only later; send a request and look while it is open.
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            client.settimeout(5)
            command = ["ss", "--tcp", "--numeric", "--options", "--no-header", f"sport = :{port}"]
            shown = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
            assert b"timer:(keepalive" in shown.stdout
    finally:
        await server.stop()


@pytest.mark.parametrize("request_stays", [False, True])
async def test_the_lifespan_is_exited_even_while_a_request_goes_on(
    request_stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    begun, never = asyncio.Event(), asyncio.Event()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            begun.set()
            await never.wait()
            return
        await receive()
        events.append("entered")
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            # The cleanup of background tasks takes turns of the event loop.
            await asyncio.sleep(0)
            events.append("exited")
        await send({"type": "lifespan.shutdown.complete"})

    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2 if request_stays else 60)
    server = HttpServer(app, ListenOptions(port=0))
    await server.start()
    address, port = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
    with socket.create_connection((address, port), timeout=60) as client:
        if request_stays:
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await begun.wait()
        else:
            client.close()
        await server.stop()
    assert events == ["entered", "exited"]
    never.set()
