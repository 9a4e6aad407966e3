"""Server-sent events: answers as a stream of chunks, for as long as the client is connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.errors import to_api_error
from edge_runtime.service.response_formatter import NO_CHANGE, ResponseFormatter

DONE_EVENT = b"data: [DONE]\n\n"
# A comment that keeps idle connections open while an answer waits for its slot or for the link. Period: chosen.
WAITING_COMMENT = b": waiting\n\n"
WAITING_SECONDS = 10.0
# Line separators of Unicode that JSON does not escape.
LINE_SEPARATORS = "\x85\u2028\u2029"


class EventStream(Response):
    """A response of server-sent events that ends with the stream or when the client disconnects.

    Args:
        stream: encoded events.
        disconnected: completes when the client disconnects; cancelled at the end of the stream.
        send_timeout: seconds after which a client that takes no data is dropped; None waits for it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, stream: AsyncIterator[bytes], disconnected: asyncio.Task[None], send_timeout: float | None = None
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._disconnected = disconnected
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._stream:
                async with asyncio.timeout(self._send_timeout):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            # Without a final message the server closes the connection, and the response counts as incomplete.
            return
        finally:
            self._disconnected.cancel()


async def stream_answers(group: AnswerGroup, formatter: ResponseFormatter, include_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a response. An error ends the stream with an `error` event, without `[DONE]`."""
    begun: set[int] = set()
    try:
        while True:
            try:
                update = await group.read(WAITING_SECONDS)
            except TimeoutError:
                yield WAITING_COMMENT
                continue
            if update is None:
                break
            index, change = update
            for part in (change or NO_CHANGE).parts() if change or index not in begun else ():
                yield encode_event(formatter.format_chunk(group, index, part, first=index not in begun))
                begun.add(index)
            if change is None:
                yield encode_event(formatter.format_last_chunk(group, index))
    except ClientDisconnect:
        return
    except Exception as error:
        yield b"event: error\n" + encode_event(to_api_error(error).body)
        return
    if include_usage:
        yield encode_event(formatter.format_usage_chunk(group))
    yield DONE_EVENT


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encode_event(message: msgspec.Struct) -> bytes:
    """Encode one event. Unicode line separators are escaped, because many clients split lines there as well."""
    data = msgspec.json.encode(message)
    for character in LINE_SEPARATORS:
        data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return b"data: " + data + b"\n\n"
