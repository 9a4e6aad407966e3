"""Reads and checks the event stream of a service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import httpx
import msgspec

from edge_runtime.service.monitoring.events import AnyEvent, Event, GaugeSample


class ReceivedEvent(msgspec.Struct):
    """An event and its id in the stream."""

    id: str
    event: Event


def parse_events(text: str) -> Iterator[ReceivedEvent]:
    """Parse a stream of complete events strictly."""
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    for block in blocks:
        if block.startswith(": "):
            continue
        *id_lines, data = block.split("\n")
        assert len(id_lines) <= 1
        event_id = id_lines[0].removeprefix("id: ") if id_lines else ""
        yield ReceivedEvent(event_id, msgspec.json.decode(data.removeprefix("data: "), type=AnyEvent))


@contextlib.contextmanager
def open_stream(url: str, headers: dict[str, str] | None = None) -> Iterator[Iterator[ReceivedEvent]]:
    """Open the event stream of the service at `url`."""

    def read(response: httpx.Response) -> Iterator[ReceivedEvent]:
        rest = ""
        for piece in response.iter_text():
            *blocks, rest = (rest + piece).split("\n\n")
            for block in blocks:
                yield from parse_events(block + "\n\n")

    with httpx.stream("GET", f"{url}/events", headers=headers, timeout=300) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read(response)


def read_until(stream: Iterator[ReceivedEvent], event_type: type[Event]) -> list[ReceivedEvent]:
    """Read up to the first event of this type."""
    received = []
    for item in stream:
        received.append(item)
        if isinstance(item.event, event_type):
            return received
    raise AssertionError(f"the stream ended without {event_type.__name__}")


def read_history(stream: Iterator[ReceivedEvent]) -> list[ReceivedEvent]:
    """Read everything that happened before now."""
    now, received = time.time(), []
    while not received or received[-1].event.at < now:
        received += read_until(stream, GaugeSample)
    return received


async def collect_events(client: httpx.AsyncClient, url: str, *event_types: type[Event]) -> list[ReceivedEvent]:
    """Read events up to one of each of `event_types`, in this order."""
    text = ""
    async with client.stream("GET", f"{url}/events") as response:
        async for piece in response.aiter_text():
            text += piece
            received, wanted = list(parse_events(text[: text.rfind("\n\n") + 2])), list(event_types)
            for index, item in enumerate(received):
                if isinstance(item.event, wanted[0]):
                    wanted.pop(0)
                if not wanted:
                    return received[: index + 1]
    raise AssertionError("the stream ended")
