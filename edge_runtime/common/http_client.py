"""Limits on the answers that our HTTP clients accept from any peer: uncompressed, and of bounded size.

httpx decompresses whatever a peer sends, and a gigabyte of zeros takes a megabyte on the wire. Answers are therefore
read as they arrive, and compressed ones are refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

# Commands that need no HTTP import this module, too.
if TYPE_CHECKING:
    import httpx

# Asks for uncompressed answers. Without the header, a peer might choose any compression (RFC 9110, section 12.5.3).
UNCOMPRESSED = {"accept-encoding": "identity"}
# Bytes of an answer, of a whole stream or of one line of it, if the caller sets no other limit. Chosen: ten times the
# largest that a verifier or a board sends.
MAX_ANSWER_BYTES = 1 << 20


class UnusableAnswer(Exception):
    """An answer that was not read to its end: it is compressed, or larger than its limit."""


async def read_pieces(response: httpx.Response, limit: int = MAX_ANSWER_BYTES) -> AsyncIterator[bytes]:
    """Yield the body of a streamed response in the pieces in which it arrives.

    Args:
        limit: size of the body at most, in bytes.

    Raises:
        UnusableAnswer: the body is compressed or larger. What was yielded before is within the limit.
    """
    _check_encoding(response)
    too_large = UnusableAnswer(f"{response.url} sends an answer of more than {limit} bytes")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and len(length) > len(str(limit)):
        raise too_large
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > limit:
            raise too_large
        yield piece


async def read_answer(response: httpx.Response, limit: int = MAX_ANSWER_BYTES) -> bytes:
    """Return the whole body of a streamed response; arguments and errors are those of `read_pieces`."""
    return b"".join([piece async for piece in read_pieces(response, limit)])


async def read_lines(response: httpx.Response, limit: int = MAX_ANSWER_BYTES) -> AsyncIterator[str]:
    """Yield the lines of an endless response, decoded from UTF-8.

    Args:
        limit: size of one line at most, in bytes.

    Raises:
        UnusableAnswer: the response is compressed, or a line is longer.
    """
    _check_encoding(response)
    buffer = bytearray()
    async for piece in response.aiter_raw():
        *lines, rest = (buffer + piece).split(b"\n")
        if max(map(len, (*lines, rest))) > limit:
            raise UnusableAnswer(f"{response.url} sends a line of more than {limit} bytes")
        buffer = rest
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")


def _check_encoding(response: httpx.Response) -> None:
    """Raise UnusableAnswer if the body is compressed."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise UnusableAnswer(f"{response.url} sends an answer with content-encoding: {encoding[:40]}, unasked")
