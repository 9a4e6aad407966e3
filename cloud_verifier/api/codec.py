"""From a request's bytes to a message, and from an answer back to bytes, in the encoding that the client speaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from cloud_verifier.engine.sessions import Answer
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, Message, OpenReply

M = TypeVar("M", bound=Message)

# Seconds after which another attempt is worth while, where a refusal does not say.
MOMENT_SECONDS = 1
# Statuses with which a client is told when to come back.
LATER = (429, 503)
# Paths where everything is JSON.
ADMIN = "/admin/"


async def message_of(request: Request, kind: type[M], limit: int, session: str = "") -> M:
    """The message in a body of at most `limit` bytes; for `session` see `wire.decode`. Raises VerifierRefused."""
    body = await body_of(request, limit)
    try:
        message = messages.decode(body, kind, media_type_of(request), session)
    except InputError as error:
        if isinstance(error, messages.Damaged):
            raise VerifierRefused(ErrorCode.DAMAGED, f"{error}; send it again", 400) from None
        _check_version(messages.version_of(body, media_type_of(request)))
        code = ErrorCode.INVALID_SAMPLING if "$.sampling" in str(error) else ErrorCode.MALFORMED
        raise VerifierRefused(code, str(error), 400) from None
    _check_version(message.v)
    return message


async def reply(
    request: Request,
    answer: Answer,
    stream: bool,
    session: str,
    introduce: Callable[[Frame], OpenReply] | None = None,
) -> Response:
    """The frames of `answer`, one by one or as one, for `session`; `introduce` dresses the first of an opening."""
    if not stream:
        whole = await answer.whole()
        return respond(request, introduce(whole)) if introduce else respond(request, whole, session=session)
    media_type = _answer_type(request)
    frames = answer.frames()
    # The first frame is awaited here, so that a refusal still has its own status.
    first = await anext(frames)

    async def body() -> AsyncIterator[bytes]:
        if introduce:
            yield messages.encode_frame(introduce(first), media_type)
        else:
            yield messages.encode_frame(first, media_type, session)
        # A round that fails from here on ends the body in mid-stream: its last frame still says `more`.
        with contextlib.suppress(VerifierRefused):
            async for frame in frames:
                yield messages.encode_frame(frame, media_type, session)

    return StreamingResponse(body(), media_type=messages.STREAMS[media_type])


def respond(request: Request, message: Message, status: int = 200, session: str = "") -> Response:
    """One message."""
    media_type = _answer_type(request)
    # Who names no type, as boards do not, expects msgpack (see `wire`): they pay for every header.
    known = {"accept", "content-type"} & set(request.headers.keys()) or request.url.path.startswith(ADMIN)
    said = media_type if known else None
    return Response(messages.encode(message, media_type, session), status, media_type=said)


def refuse(request: Request, error: VerifierRefused) -> Response:
    """A refusal, with what HTTP wants to be told besides."""
    sentence = str(error).removesuffix(f" [{error.code}]")
    response = respond(request, messages.Refusal(messages.VERSION, error.code, sentence, error.detail), error.status)
    if error.status in LATER:
        response.headers["retry-after"] = str(error.retry_after or MOMENT_SECONDS)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def while_connected(request: Request, waiting: Coroutine[None, None, None]) -> None:
    """Awaits `waiting`, but no longer than the client does. Raises ClientDisconnect."""
    over, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            raise ClientDisconnect
    finally:
        over.cancel()
        gone.cancel()


async def body_of(request: Request, limit: int) -> bytes:
    """A request's body of at most `limit` bytes. Raises VerifierRefused."""
    body = bytearray()
    size = 0
    # Read to the end even so: a client that is still writing would not read our answer.
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            body += piece
    if size > limit:
        raise VerifierRefused(ErrorCode.TOO_LARGE, f"the body is over {limit} bytes", 413, {"limit": limit})
    return bytes(body)


def _check_version(version: int | None) -> None:
    if version not in (None, messages.VERSION):
        raise VerifierRefused(
            ErrorCode.UNSUPPORTED_VERSION,
            f"this verifier speaks protocol {messages.VERSION}; upgrade the older of the two ends",
            400,
        )


def media_type_of(request: Request) -> str:
    """What the client writes in."""
    # Admins are people with curl, which names another type unless it is told.
    if request.url.path.startswith(ADMIN):
        return messages.JSON
    return messages.JSON if "json" in request.headers.get("content-type", "") else messages.MSGPACK


def _answer_type(request: Request) -> str:
    """What the client wants to read: what it says, else what it writes; a browser's or curl's GET gets JSON."""
    accepts = request.headers.get("accept", "")
    if request.url.path.startswith(ADMIN):
        return messages.JSON
    if "json" in accepts or "msgpack" in accepts:
        return messages.JSON if "json" in accepts else messages.MSGPACK
    if request.method == "GET" and "content-type" not in request.headers:
        return messages.JSON
    return media_type_of(request)
