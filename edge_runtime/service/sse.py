"""An answer as server-sent events, for as long as its reader is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_runtime.service.answer import Answer, TextChange
from edge_runtime.service.errors import to_api_error
from edge_runtime.service.openai_schema import ResponseFormatter

DONE_EVENT = b"data: [DONE]\n\n"
# A comment, for whatever gives up on connections where nothing comes: the answer waits for its turn, or for the link.
WAITING_COMMENT = b": waiting\n\n"
WAITING_SECONDS = 10.0
# Those that JSON lets stand as they are.
LINE_ENDS = "\x85\u2028\u2029"


class EventStream(Response):
    """Server-sent events, until they end or the client has gone.

    Args:
        stream: the events, as bytes.
        gone: ends when the client goes; cancelled when the events have ended.
        patience: seconds that the client may take nothing; None bears with it.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncIterator[bytes], gone: asyncio.Task[None], patience: float | None = None) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._gone = gone
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._stream:
                async with asyncio.timeout(self._patience):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            # Without its end, the answer counts as broken off.
            return
        finally:
            self._gone.cancel()


async def stream_answer(answer: Answer, form: ResponseFormatter, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream. An error ends it, without `[DONE_EVENT]`."""
    try:
        first, over = True, False
        while not over:
            try:
                change = await answer.news(WAITING_SECONDS)
            except TimeoutError:
                yield WAITING_COMMENT
                continue
            over = change is None
            if change or first:
                yield encode_event(form.chunk(answer, change or TextChange(""), first=first))
            first = False
    except ClientDisconnect:
        return
    except Exception as error:
        yield b"event: error\n" + encode_event(to_api_error(error).body)
        return
    yield encode_event(form.last(answer))
    if usage:
        yield encode_event(form.usage(answer))
    yield DONE_EVENT


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encode_event(message: msgspec.Struct) -> bytes:
    """One event. What Unicode calls a line's end is escaped: many a client splits lines there, too."""
    data = msgspec.json.encode(message)
    for character in LINE_ENDS:
        data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return b"data: " + data + b"\n\n"
