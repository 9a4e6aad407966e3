"""The event log: bounded, built on demand, and ending the streams of slow or disconnected subscribers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from edge_runtime.service.errors import ApiError
from edge_runtime.service.monitoring import event_log
from edge_runtime.service.monitoring.event_log import MAX_EVENTS, MAX_SUBSCRIBERS, RETRY_SECONDS, EventLog
from edge_runtime.service.monitoring.events import PlanChosen
from edge_runtime.service.sse import EventStream
from tests.edge_runtime.service.monitoring.event_stream import parse_events


def make_event(number: int) -> PlanChosen:
    return PlanChosen(at=float(number), answer=number, draft=0, own=1, reason="")


def open_stream(log: EventLog) -> tuple[AsyncIterator[bytes], asyncio.Future[None]]:
    """Return a stream, and the future that disconnects its subscriber."""
    disconnected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    return log.stream(make_event(0), "", disconnected), disconnected


async def test_events_are_built_once_and_only_when_they_are_read() -> None:
    log, built = EventLog(), []
    for number in (1, 2):
        log.append(lambda number=number: built.append(number) or make_event(number))
    assert built == []
    for _ in range(2):
        stream, _ = open_stream(log)
        await anext(stream)
        assert [item.event.answer for item in parse_events((await anext(stream)).decode())] == [1, 2]
        await stream.aclose()
    assert built == [1, 2]


async def test_the_history_is_bounded_and_slow_subscribers_are_disconnected() -> None:
    log = EventLog()
    slow, _ = open_stream(log)
    await anext(slow)
    log.append(lambda: make_event(1))
    await anext(slow)
    for number in range(2, MAX_EVENTS + 10):
        log.append(lambda number=number: make_event(number))
    with pytest.raises(StopAsyncIteration):
        while True:
            await anext(slow)
    late, _ = open_stream(log)
    await anext(late)
    received = []
    while len(received) < MAX_EVENTS:
        received += parse_events((await anext(late)).decode())
    assert [item.event.answer for item in received] == list(range(10, MAX_EVENTS + 10))
    assert len(log._events) == MAX_EVENTS
    await late.aclose()


async def test_subscribers_are_limited_and_disconnected_ones_are_forgotten() -> None:
    log = EventLog()
    streams = [open_stream(log) for _ in range(MAX_SUBSCRIBERS)]
    for stream, _ in streams:
        log.check_capacity()
        await anext(stream)
    with pytest.raises(ApiError, match="already watch this board") as refused:
        log.check_capacity()
    assert (refused.value.status, refused.value.retry_after) == (429, RETRY_SECONDS)
    ends = [asyncio.create_task(anext(stream, b"end")) for stream, _ in streams]
    await asyncio.sleep(0)
    for _, disconnected in streams:
        disconnected.set_result(None)
    assert await asyncio.gather(*ends) == [b"end"] * len(streams)
    log.check_capacity()
    assert not log._subscribers


async def test_a_client_that_takes_no_data_is_dropped() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def stalled(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    disconnected = asyncio.create_task(asyncio.sleep(3600))
    async with asyncio.timeout(300):
        await EventStream(endless(), disconnected, 0.05)({}, None, stalled)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert disconnected.cancelled()


async def test_idle_streams_get_keep_alive_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEEPALIVE_SECONDS", 0.01)
    stream, _ = open_stream(EventLog())
    await anext(stream)
    assert await anext(stream) == b": still here\n\n"
