"""Bytes and round-trip time of the very connections in use, as the kernel counts them (TCP_INFO)."""

from __future__ import annotations

import socket
import struct
from typing import Any, NamedTuple

# Offsets in struct tcp_info of linux/tcp.h; the struct only ever grows at its end.
RTT_OFFSET = 68
BYTES_RECEIVED_OFFSET = 128
BYTES_SENT_OFFSET = 200
INFO_SIZE = 208


class TcpInfo(NamedTuple):
    """Payload bytes of a connection, TLS and HTTP framing included, and its smoothed round-trip time in seconds."""

    bytes_sent: int
    bytes_received: int
    rtt_seconds: float


def tcp_info(connection: Any) -> TcpInfo | None:
    """What the kernel knows of a connected socket; None if it is closed or the kernel does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, option, INFO_SIZE)
    except OSError:
        return None
    if len(info) < INFO_SIZE:
        return None
    (rtt_us,) = struct.unpack_from("=I", info, RTT_OFFSET)
    (received,) = struct.unpack_from("=Q", info, BYTES_RECEIVED_OFFSET)
    (sent,) = struct.unpack_from("=Q", info, BYTES_SENT_OFFSET)
    return TcpInfo(sent, received, rtt_us / 1e6)


class ByteMeter:
    """Adds up the bytes of all connections that an HTTP client opens.

    `trace` goes into the `trace` extension of httpx requests. Where several requests share the connections, a byte
    counts for the request that calls `take` first after it.
    """

    def __init__(self) -> None:
        self._sockets: list[tuple[Any, TcpInfo]] = []
        self._closed_sent = 0
        self._closed_received = 0
        self._taken = (0, 0)

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """Notes new connections."""
        if event == "connection.connect_tcp.complete":
            self._sockets.append((info["return_value"].get_extra_info("socket"), TcpInfo(0, 0, 0.0)))

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time of the newest connection."""
        self._read()
        return self._sockets[-1][1].rtt_seconds if self._sockets else None

    def take(self) -> tuple[int, int]:
        """Bytes (sent, received) since the last call."""
        self._read()
        sent = self._closed_sent + sum(info.bytes_sent for _, info in self._sockets)
        received = self._closed_received + sum(info.bytes_received for _, info in self._sockets)
        taken, self._taken = self._taken, (sent, received)
        return sent - taken[0], received - taken[1]

    def _read(self) -> None:
        still_open = []
        for connection, last in self._sockets:
            info = tcp_info(connection)
            if info is None:
                self._closed_sent += last.bytes_sent
                self._closed_received += last.bytes_received
            else:
                still_open.append((connection, info))
        self._sockets = still_open
