"""An answer as server-sent events, for as long as its reader is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_runtime.service.completions import Answer, Change
from edge_runtime.service.errors import refusal_of
from edge_runtime.service.openai_schema import Form

DONE = b"data: [DONE]\n\n"
# A comment, for whatever gives up on connections where nothing comes: the answer waits for its turn, or for the link.
WAITING = b": waiting\n\n"
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


async def events(answer: Answer, form: Form, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream. An error ends it, without `[DONE]`."""
    try:
        first, over = True, False
        while not over:
            try:
                change = await answer.news(WAITING_SECONDS)
            except TimeoutError:
                yield WAITING
                continue
            over = change is None
            if change or first:
                yield event_of(form.chunk(answer, change or Change(""), first=first))
            first = False
    except ClientDisconnect:
        return
    except Exception as error:
        yield b"event: error\n" + event_of(refusal_of(error).body)
        return
    yield event_of(form.last(answer))
    if usage:
        yield event_of(form.usage(answer))
    yield DONE


async def gone_from(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_of(message: msgspec.Struct) -> bytes:
    """One event. What Unicode calls a line's end is escaped: many a client splits lines there, too."""
    data = msgspec.json.encode(message)
    for character in LINE_ENDS:
        data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return b"data: " + data + b"\n\n"
