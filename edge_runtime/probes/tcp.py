"""Bytes and round-trip time of the connections in use, from the kernel (TCP_INFO)."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any, NamedTuple

# Offsets in struct tcp_info (linux/tcp.h), which only grows at its end.
BACKOFF_OFFSET = 4
RTT_OFFSET = 68
RETRANSMITS_OFFSET = 100
BYTES_ACKED_OFFSET = 120
MIN_RTT_OFFSET = 148
DELIVERY_RATE_OFFSET = 160
BYTES_SENT_OFFSET = 200
INFO_SIZE = 208

# Consecutive retransmission time-outs after which a connection counts as stalled, chosen.
STALLED_BACKOFF = 2

# Minimum round-trip time before the first sample.
NO_RTT = 0xFFFFFFFF


class TcpInfo(NamedTuple):
    """Kernel statistics of one connection.

    Attributes:
        bytes_sent, bytes_received: payload including TLS and HTTP framing; retransmissions count again.
        rtt_seconds: smoothed round-trip time.
        min_rtt_seconds: minimum round-trip time of the recent past; None before the first sample.
        rtt_variation_seconds: mean deviation of the round-trip time.
        retransmits: segments retransmitted over the connection's life.
        delivery_rate: bytes per second estimated by the kernel; None before the first estimate. Up to a hundred times
            too high for small writes such as rounds.
        bytes_acked: payload acknowledged by the peer; the SYN counts as one byte.
        busy_seconds: time during which sent data was unacknowledged.
        backoff: consecutive retransmission time-outs, each twice as long; 0 while acknowledgements arrive.
    """

    bytes_sent: int
    bytes_received: int
    rtt_seconds: float
    min_rtt_seconds: float | None = None
    rtt_variation_seconds: float = 0.0
    retransmits: int = 0
    delivery_rate: float | None = None
    bytes_acked: int = 0
    busy_seconds: float = 0.0
    backoff: int = 0


def tcp_info(connection: Any) -> TcpInfo | None:
    """Kernel statistics of a connected socket; None if it is closed or the kernel does not support TCP_INFO."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, option, INFO_SIZE)
    except OSError:
        return None
    if len(info) < INFO_SIZE:
        return None
    rtt_us, variation_us = struct.unpack_from("=II", info, RTT_OFFSET)
    (retransmits,) = struct.unpack_from("=I", info, RETRANSMITS_OFFSET)
    acked, received = struct.unpack_from("=QQ", info, BYTES_ACKED_OFFSET)
    (min_rtt_us,) = struct.unpack_from("=I", info, MIN_RTT_OFFSET)
    delivery_rate, busy_us = struct.unpack_from("=QQ", info, DELIVERY_RATE_OFFSET)
    (sent,) = struct.unpack_from("=Q", info, BYTES_SENT_OFFSET)
    return TcpInfo(
        bytes_sent=sent,
        bytes_received=received,
        rtt_seconds=rtt_us / 1e6,
        min_rtt_seconds=None if min_rtt_us == NO_RTT else min_rtt_us / 1e6,
        rtt_variation_seconds=variation_us / 1e6,
        retransmits=retransmits,
        delivery_rate=float(delivery_rate) or None,
        bytes_acked=acked,
        busy_seconds=busy_us / 1e6,
        backoff=info[BACKOFF_OFFSET],
    )


class ByteMeter:
    """Counts the bytes of all connections that an HTTP client opens.

    Pass `trace` as the `trace` extension of httpx requests. If several requests share the connections, a byte counts
    for the request that calls `take` next.

    Attributes:
        opened: number of connections so far.
    """

    def __init__(self) -> None:
        self.opened = 0
        self._sockets: list[tuple[Any, TcpInfo]] = []
        self._closed_sent = 0
        self._closed_received = 0
        self._taken = (0, 0)

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """Record new connections."""
        if event == "connection.connect_tcp.complete":
            self.opened += 1
            self._sockets.append((info["return_value"].get_extra_info("socket"), TcpInfo(0, 0, 0.0)))

    @property
    def info(self) -> TcpInfo | None:
        """The newest connection; None if all are closed."""
        self._read()
        return self._sockets[-1][1] if self._sockets else None

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time of the newest connection."""
        info = self.info
        return None if info is None else info.rtt_seconds

    @property
    def stalled(self) -> bool:
        """Whether a connection sends without being acknowledged."""
        self._read()
        return any(info.backoff >= STALLED_BACKOFF for _, info in self._sockets)

    @property
    def peer(self) -> str | None:
        """IP address at the other end of the newest connection; None if all are closed."""
        self._read()
        with contextlib.suppress(OSError, IndexError):
            return str(self._sockets[-1][0].getpeername()[0])
        return None

    @property
    def total(self) -> tuple[int, int]:
        """Bytes (sent, received) of all connections so far."""
        self._read()
        sent = self._closed_sent + sum(info.bytes_sent for _, info in self._sockets)
        received = self._closed_received + sum(info.bytes_received for _, info in self._sockets)
        return sent, received

    def take(self) -> tuple[int, int]:
        """Bytes (sent, received) since the last call."""
        before, self._taken = self._taken, self.total
        return self._taken[0] - before[0], self._taken[1] - before[1]

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
