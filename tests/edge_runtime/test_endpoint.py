"""What a connection keeps."""

from __future__ import annotations

from h2.connection import H2Connection

from edge_runtime import endpoint


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
