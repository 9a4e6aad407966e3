"""Server-sent events: answers as a stream of chunks, for as long as the client is connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_runtime.service.answer import NO_CHANGE, TextChange
from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.errors import ApiError, to_api_error

# A comment that keeps idle connections open while an answer waits for its slot or for the link. Period: chosen.
WAITING_COMMENT = b": waiting\n\n"
WAITING_SECONDS = 10.0
# Number of tokens with log-probabilities from which on a change is described and encoded in a thread, so that the event
# loop serves others. Chosen: with 20 alternatives each, they take 2 ms.
MANY_TOKENS = 64
# Line separators of Unicode that JSON does not escape.
LINE_SEPARATORS = "\x85\u2028\u2029"


class ServerEvent(NamedTuple):
    """One event: its JSON data, and its name if it has one."""

    data: msgspec.Struct
    name: str = ""


class AnswerFormatter(Protocol):
    """Formats the answers of one request to one endpoint, whole or as a stream.

    Attributes:
        end_mark: encoded event after the last one of a complete stream.
    """

    id: str
    end_mark: bytes

    def format_response(self, group: AnswerGroup) -> msgspec.Struct:
        """Format a complete response."""

    def begin_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        """Return the events before any text."""

    def stream_change(self, group: AnswerGroup, index: int, change: TextChange, *, first: bool) -> list[ServerEvent]:
        """Format a change of one kind of the text of one answer; `first` of its changes or not."""

    def end_choice(self, group: AnswerGroup, index: int) -> list[ServerEvent]:
        """Return the events at the end of one answer."""

    def end_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        """Return the events at the end of all answers."""

    def stream_error(self, error: ApiError) -> ServerEvent:
        """Return the event of an error, which ends the stream."""


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


async def stream_answers(group: AnswerGroup, formatter: AnswerFormatter) -> AsyncIterator[bytes]:
    """Yield the events of a response. An error ends the stream with an event of its own, without the end mark."""
    begun: set[int] = set()
    try:
        for event in formatter.begin_stream(group):
            yield encode_event(*event)
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
                arguments = formatter, group, index, part, index not in begun
                if len(part.tokens) > MANY_TOKENS:
                    yield await asyncio.to_thread(_encode_change, *arguments)
                else:
                    yield _encode_change(*arguments)
                begun.add(index)
            if change is None:
                for event in formatter.end_choice(group, index):
                    yield encode_event(*event)
    except ClientDisconnect:
        return
    except Exception as error:
        yield encode_event(*formatter.stream_error(to_api_error(error)))
        return
    for event in formatter.end_stream(group):
        yield encode_event(*event)
    if formatter.end_mark:
        yield formatter.end_mark


def _encode_change(
    formatter: AnswerFormatter, group: AnswerGroup, index: int, change: TextChange, first: bool
) -> bytes:
    return b"".join(encode_event(*event) for event in formatter.stream_change(group, index, change, first=first))


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encode_event(message: msgspec.Struct, name: str = "") -> bytes:
    """Encode one event. Unicode line separators are escaped, because many clients split lines there as well."""
    data = msgspec.json.encode(message)
    for character in LINE_SEPARATORS:
        data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"
