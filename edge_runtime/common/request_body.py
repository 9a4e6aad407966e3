"""Reads the body of a request within a limit of bytes and of time, on the board and on the verifier."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from edge_runtime.protocol.errors import BodyRefused

# A body must have arrived within this time. Chosen: 100,000 token ids at 13 KB/s.
BODY_SECONDS = 30.0
# An oversized body is read to its end, because a client does not read the answer while it is still sending; but no
# further than this, since a client that sends more hardly reads answers. Chosen.
DISCARDED_BYTES = 1 << 24


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes, whether its length is announced or it comes in chunks.

    Raises:
        BodyRefused: it is longer, or does not arrive within `BODY_SECONDS`.
        ClientDisconnect: the client disconnects first.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    body += chunk
                elif size > limit + DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise BodyRefused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    if size > limit:
        raise BodyRefused(413, f"the body is longer than {limit} bytes", limit)
    return bytes(body)
