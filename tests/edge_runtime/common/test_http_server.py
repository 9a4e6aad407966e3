"""TCP keep-alive of the shared HTTP server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from typing import Any

import pytest

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
