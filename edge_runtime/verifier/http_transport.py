"""How connections to a verifier are made: time-outs, TCP options, and HTTP/2 with as few header bytes as possible."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import httpx
from h2.config import H2Configuration
from h2.connection import H2Connection

# Time-outs of one attempt, chosen: to connect, and between two pieces of an answer.
CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
# TCP_USER_TIMEOUT: a slow peer still acknowledges within this time, a vanished one does not.
ACKNOWLEDGE_SECONDS = 5.0
# TCP keep-alive: first probe after this much silence, then one per interval. Nothing else detects a connection that a
# NAT has dropped while an answer is awaited.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS = 5, 2

# h2's outbound normalization marks the authorization header as never-indexed, so that a token costs its full length in
# every round: 33 bytes of 93. That protects a secret from being guessed through its compressed size next to
# attacker-chosen headers; here no other party chooses headers, and tokens are random. Our headers need no other
# normalization.
LEAN_HEADERS = H2Configuration(validate_inbound_headers=False, normalize_outbound_headers=False)

# h2 remembers the last 65536 closed streams of a connection (100 bytes each) to tell late frames from protocol errors.
# On a board that is hours of answers and 8 MB; here frames are late by a few streams.
H2Connection.MAX_CLOSED_STREAMS = 1024


def trust_nobody() -> ssl.SSLContext:
    """A TLS context for plain HTTP, of which httpx wants one, too.

    Its default reads the system's authorities, for 30 ms on a laptop: too long for an event loop.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def new_transport(trust: ssl.SSLContext, *, http1: bool, http2: bool, proxy: str = "") -> httpx.AsyncHTTPTransport:
    """A connection pool that detects vanished peers.

    Args:
        trust: TLS context.
        proxy: URL of an HTTP proxy; empty for none.
    """
    options = [
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * ACKNOWLEDGE_SECONDS)),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS),
    ]
    return httpx.AsyncHTTPTransport(verify=trust, http1=http1, http2=http2, socket_options=options, proxy=proxy or None)


def use_lean_headers(pool: Any) -> None:
    """Apply `LEAN_HEADERS` to the HTTP/2 connections of an httpcore pool.

    There is no public way, so this reads private attributes of httpcore. If they vanish, rounds only cost more bytes.
    """
    for connection in pool.connections:
        state = getattr(getattr(connection, "_connection", None), "_h2_state", None)
        if state is not None:
            state.config = LEAN_HEADERS
