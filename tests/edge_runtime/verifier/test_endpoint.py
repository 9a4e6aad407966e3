"""Endpoint and transport: bounded HTTP/2 state, first requests that are cancelled or break."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from h2.connection import H2Connection

from cloud_verifier.model.target import Target
from edge_runtime.verifier import http_transport
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import LinkFailure
from tests.conftest import serving


def test_the_memory_for_closed_streams_is_bounded() -> None:
    assert http_transport.LEAN_HEADERS.client_side
    connection = H2Connection(http_transport.LEAN_HEADERS)
    connection.initiate_connection()
    for _ in range(1500):
        stream = connection.get_next_available_stream_id()
        connection.send_headers(
            stream, [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "x")], end_stream=True
        )
        connection.reset_stream(stream)
        connection.data_to_send()
    assert connection.open_outbound_streams == 0
    assert len(connection._closed_streams) == 1024


async def test_after_a_cancelled_first_request_failures_are_typed_and_pass(tiny: Target) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        [endpoint] = client.endpoints
        original_trace = endpoint._trace
        with anyio.CancelScope() as scope:

            async def trace(event: str, info: dict[str, Any]) -> None:
                await original_trace(event, info)
                if event == "http2.send_connection_init.complete":
                    scope.cancel()

            endpoint._trace = trace  # type: ignore[method-assign]
            async with endpoint.exchange("GET", "/v1/models", None):
                pass
        assert scope.cancelled_caught
        endpoint._trace = original_trace  # type: ignore[method-assign]
        failures = 0
        for _ in range(4):
            try:
                async with endpoint.exchange("GET", "/v1/models", None) as response:
                    assert response.status_code == 200
            except LinkFailure:
                failures += 1
        assert failures < 4


async def test_trying_another_http_version_reads_no_authorities() -> None:
    """That would take longer than an event loop may be held, for connections without TLS."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with VerifierClient(f"http://127.0.0.1:{port}") as client:
            [endpoint] = client.endpoints
            first = endpoint._pool
            with pytest.raises(LinkFailure):
                async with endpoint.exchange("GET", "/v1/models", None):
                    pass
            assert endpoint._pool is not first
            for pool in (first, endpoint._pool):
                assert pool._ssl_context.cert_store_stats()["x509_ca"] == 0
