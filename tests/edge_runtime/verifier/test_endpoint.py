"""What a connection keeps."""

from __future__ import annotations

from typing import Any

import anyio
from h2.connection import H2Connection

from cloud_verifier.model.target import Target
from edge_runtime.verifier import endpoint
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import LinkFailure
from tests.conftest import serving


def test_a_connection_forgets_streams_that_are_long_over() -> None:
    assert endpoint.LEAN.client_side
    connection = H2Connection(endpoint.LEAN)
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


async def test_a_first_request_that_is_cancelled_leaves_typed_failures_at_worst(tiny: Target) -> None:
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        [one] = client.endpoints
        told = one._trace
        with anyio.CancelScope() as scope:

            async def trace(event: str, info: dict[str, Any]) -> None:
                await told(event, info)
                if event == "http2.send_connection_init.complete":
                    scope.cancel()

            one._trace = trace  # type: ignore[method-assign]
            async with one.exchange("GET", "/v1/models", None):
                pass
        assert scope.cancelled_caught
        one._trace = told  # type: ignore[method-assign]
        failures = 0
        for _ in range(4):
            try:
                async with one.exchange("GET", "/v1/models", None) as response:
                    assert response.status_code == 200
            except LinkFailure:
                failures += 1
        assert failures < 4
