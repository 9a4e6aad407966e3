"""A bounded log of recent events that any number of late or slow subscribers can read without costing memory.

Events are kept in two ring buffers, gauges and all others, so that many tokens do not push out the history of the
gauges. A subscriber is only a position in the log; one that falls behind the ring is disconnected. An event is built
and encoded when the first subscriber reads it, and never if there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable

from edge_runtime.service.errors import ApiError
from edge_runtime.service.monitoring.events import Event, GaugeSample
from edge_runtime.service.sse import encode_event

# All values below are chosen. History: two or three events per round, and one gauge sample per second.
MAX_EVENTS = 4000
MAX_GAUGES = 600
MAX_SUBSCRIBERS = 16
RETRY_SECONDS = 10
# Events within this time are sent in one write.
BATCH_SECONDS = 0.03
# Interval of keep-alive comments, from which both ends notice a lost connection.
KEEPALIVE_SECONDS = 15.0
MAX_EVENTS_PER_WRITE = 200
# A subscriber that takes no data for this long is disconnected.
SEND_TIMEOUT_SECONDS = 20.0


class _LogEntry:
    """An event: the function that builds it until it is first read, its bytes afterwards."""

    __slots__ = ("_build", "_bytes", "number")

    def __init__(self, number: int, build: Callable[[], Event]) -> None:
        self.number = number
        self._build: Callable[[], Event] | None = build
        self._bytes = b""

    def encode(self, log_id: str) -> bytes:
        if self._build is not None:
            self._bytes = encode_log_event(self._build(), f"{log_id}-{self.number}")
            self._build = None
        return self._bytes


class EventLog:
    """Recent events. Used on the event loop only.

    Attributes:
        id: random id of this log, the prefix of its event ids.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(4)
        self._events: deque[_LogEntry] = deque(maxlen=MAX_EVENTS)
        self._gauges: deque[_LogEntry] = deque(maxlen=MAX_GAUGES)
        self._last_number = 0
        # Number of the newest event that has been dropped from `_events`.
        self._last_dropped = 0
        self._subscribers: set[asyncio.Event] = set()
        self._disconnects = 0
        self._closed = False

    def append(self, build: Callable[[], Event]) -> None:
        """Append an event. `build` is called at most once, at any later time, and must not depend on when."""
        if len(self._events) == MAX_EVENTS:
            self._last_dropped = self._events[0].number
        self._append_to(self._events, build)

    def append_gauges(self, gauges: GaugeSample) -> None:
        """Append a gauge sample."""
        self._append_to(self._gauges, lambda: gauges)

    def disconnect_all(self) -> None:
        """End all streams at once; subscribers may reconnect."""
        self._disconnects += 1
        self._wake()

    def close(self) -> None:
        """End all streams after they have delivered every event."""
        self._closed = True
        self._wake()

    def check_capacity(self) -> None:
        """Raise ApiError (429) if there are too many subscribers."""
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            message = f"{MAX_SUBSCRIBERS} clients already watch this board: close one of its pages"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=RETRY_SECONDS)

    async def stream(
        self, greeting: Event, last_event_id: str, disconnected: asyncio.Future[None]
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events: `greeting`, the history, and everything that happens from now on.

        Ends when the log is closed, `disconnected` completes, all subscribers are disconnected, or the subscriber has
        fallen so far behind that its next event is no longer in the log.

        Args:
            last_event_id: the last event that the subscriber has received; ignored if it is of another log.
        """
        changed = asyncio.Event()
        self._subscribers.add(changed)
        disconnected.add_done_callback(lambda _: changed.set())
        try:
            yield encode_log_event(greeting)
            log_id, _, number = last_event_id.partition("-")
            position = int(number) if log_id == self.id and number.isdecimal() else 0
            first, disconnects = True, self._disconnects
            while not disconnected.done() and disconnects == self._disconnects:
                changed.clear()
                if self._last_dropped > position and not first:
                    return
                first = False
                entries = self._entries_after(position)
                for start in range(0, len(entries), MAX_EVENTS_PER_WRITE):
                    batch = entries[start : start + MAX_EVENTS_PER_WRITE]
                    yield b"".join(entry.encode(self.id) for entry in batch)
                    position = batch[-1].number
                if self._closed and position == self._last_number:
                    return
                if position == self._last_number:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(KEEPALIVE_SECONDS):
                            await changed.wait()
                    if not changed.is_set():
                        yield b": still here\n\n"
                    await asyncio.sleep(BATCH_SECONDS)
        finally:
            self._subscribers.discard(changed)

    def _append_to(self, ring: deque[_LogEntry], build: Callable[[], Event]) -> None:
        self._last_number += 1
        ring.append(_LogEntry(self._last_number, build))
        self._wake()

    def _wake(self) -> None:
        for changed in self._subscribers:
            changed.set()

    def _entries_after(self, number: int) -> list[_LogEntry]:
        """Return the entries of both rings after `number`, in order."""
        found = []
        for ring in (self._events, self._gauges):
            for entry in reversed(ring):
                if entry.number <= number:
                    break
                found.append(entry)
        return sorted(found, key=lambda entry: entry.number)


def encode_log_event(event: Event, event_id: str = "") -> bytes:
    """Encode one server-sent event, with an id if it is part of the log."""
    return (f"id: {event_id}\n".encode() if event_id else b"") + encode_event(event)
