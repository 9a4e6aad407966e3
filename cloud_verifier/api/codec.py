"""Decodes request bodies into messages and encodes replies, in the encoding that the client uses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from cloud_verifier.engine.sessions import RoundReply
from edge_runtime.common.request_body import read_body
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import BodyRefused, InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, Message, OpenReply

M = TypeVar("M", bound=Message)
T = TypeVar("T")

# Retry-After if the error names no time.
DEFAULT_RETRY_SECONDS = 1
# Statuses that carry Retry-After.
RETRY_STATUSES = (429, 503)
# Bodies from this size on are decoded in a thread. Chosen: decoding this much takes 2 ms.
LARGE_BODY_BYTES = 1 << 15
# Paths whose bodies are always JSON.
ADMIN_PREFIX = "/admin/"


async def read_message(request: Request, kind: type[M], limit: int, session: str = "") -> M:
    """Decode a body of at most `limit` bytes; see `messages.decode` for `session`. Raises VerifierRefused."""
    body = await read_request_body(request, limit)
    try:
        decode = functools.partial(messages.decode, body, kind, request_media_type(request), session)
        # The event loop serves others meanwhile.
        message = decode() if len(body) < LARGE_BODY_BYTES else await asyncio.to_thread(decode)
    except InputError as error:
        if isinstance(error, messages.DamagedMessage):
            raise VerifierRefused(ErrorCode.DAMAGED, f"{error}; send it again") from None
        _check_protocol_version(messages.peek_version(body, request_media_type(request)))
        code = ErrorCode.INVALID_SAMPLING if "$.sampling" in str(error) else ErrorCode.MALFORMED
        raise VerifierRefused(code, str(error)) from None
    # The field is declared by every kind of message, but not by their base.
    _check_protocol_version(getattr(message, "v", None))
    return message


async def reply_to_round(
    request: Request,
    reply: RoundReply,
    *,
    stream: bool,
    session: str,
    open_reply: Callable[[Frame], OpenReply] | None = None,
) -> Response:
    """Respond with the frames of a round, streamed or merged into one.

    Args:
        session: id of the session that the round belongs to.
        open_reply: for an opening: wraps the first frame.

    Raises:
        VerifierRefused: the round failed before its first frame.
    """
    if not stream:
        result = await reply.result()
        if open_reply:
            return message_response(request, open_reply(result))
        return message_response(request, result, session=session)
    media_type = _reply_media_type(request)
    frames = reply.frames()
    # Await the first frame here, so that an error still gets its own status.
    first = await anext(frames)

    async def body() -> AsyncIterator[bytes]:
        if open_reply:
            yield messages.encode_frame(open_reply(first), media_type, index=0)
        else:
            yield messages.encode_frame(first, media_type, session, index=0)
        index = 0
        # A round that fails from here on ends the stream early; the client notices, since the last frame says `more`.
        with contextlib.suppress(VerifierRefused):
            async for frame in frames:
                index += 1
                yield messages.encode_frame(frame, media_type, session, index=index)

    return StreamingResponse(body(), media_type=messages.STREAM_MEDIA_TYPES[media_type])


def message_response(request: Request, message: Message, status: int = 200, session: str = "") -> Response:
    """Respond with one message."""
    media_type = _reply_media_type(request)
    # A client that names no type, as boards do, expects msgpack (see `messages`): every header costs it bytes.
    names_type = {"accept", "content-type"} & set(request.headers.keys()) or request.url.path.startswith(ADMIN_PREFIX)
    body = messages.encode(message, media_type, session)
    return Response(body, status, media_type=media_type if names_type else None)


def error_response(request: Request, error: VerifierRefused) -> Response:
    """Respond with an `ErrorReply` and the headers that belong to its status."""
    sentence = str(error).removesuffix(f" [{error.code}]")
    message = messages.ErrorReply(messages.PROTOCOL_VERSION, error.code, sentence, error.detail)
    response = message_response(request, message, error.status)
    if error.status in RETRY_STATUSES:
        response.headers["retry-after"] = str(error.retry_after or DEFAULT_RETRY_SECONDS)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def await_while_connected(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await `coroutine` and return its result. Raises ClientDisconnect if the client disconnects first."""
    awaited, disconnected = asyncio.ensure_future(coroutine), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({awaited, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            raise ClientDisconnect
        return awaited.result()
    finally:
        awaited.cancel()
        disconnected.cancel()


async def read_request_body(request: Request, limit: int) -> bytes:
    """Read a body; see `read_body`. Raises VerifierRefused (`too_large` or `too_slow`)."""
    try:
        return await read_body(request, limit)
    except BodyRefused as error:
        code = ErrorCode.TOO_SLOW if error.limit is None else ErrorCode.TOO_LARGE
        raise VerifierRefused(code, str(error), detail={} if error.limit is None else {"limit": error.limit}) from None


def _check_protocol_version(version: int | None) -> None:
    if version not in (None, messages.PROTOCOL_VERSION):
        raise VerifierRefused(
            ErrorCode.UNSUPPORTED_VERSION,
            f"this verifier uses protocol version {messages.PROTOCOL_VERSION}; upgrade the older of the two ends",
        )


def request_media_type(request: Request) -> str:
    """The encoding of the request body."""
    # People call the admin API with curl, which sends another content type by default.
    if request.url.path.startswith(ADMIN_PREFIX):
        return messages.JSON
    return messages.JSON if "json" in request.headers.get("content-type", "") else messages.MSGPACK


def _reply_media_type(request: Request) -> str:
    """The encoding of the reply: what the client accepts, else what it sends; JSON for a GET without either."""
    accepted = request.headers.get("accept", "")
    if request.url.path.startswith(ADMIN_PREFIX):
        return messages.JSON
    if "json" in accepted or "msgpack" in accepted:
        return messages.JSON if "json" in accepted else messages.MSGPACK
    if request.method == "GET" and "content-type" not in request.headers:
        return messages.JSON
    return request_media_type(request)
