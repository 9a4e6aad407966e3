"""The last minutes of what the board did, for any number of late, slow and absent watchers.

Events wait in two rings: moments and gauges, so that many tokens do not push the gauges' history out. A watcher is no
more than a place in the rings, so nothing is kept for it; one that falls behind the rings is dropped. What an event
says is worked out when the first watcher asks for it, and not at all where nobody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable

from edge_runtime.service.errors import RATE_LIMIT, ApiError
from edge_runtime.service.monitoring.events import Event, GaugeSample
from edge_runtime.service.sse import encode_event

# Events that are kept: two or three a round; and one each second.
MAX_EVENTS = 4000
MAX_GAUGES = 600
MAX_WATCHERS = 16
RETRY_SECONDS = 10
# Events that are a hundredth of a second apart go out together.
BATCH_SECONDS = 0.03
# Something is said so often, so that both ends learn when the other has gone.
KEEPALIVE_SECONDS = 15.0
# Events of one write.
MAX_EVENTS_PER_WRITE = 200
# A watcher that takes nothing for so long is dropped.
SEND_TIMEOUT_SECONDS = 20.0


class _Kept:
    """An event in a ring: what makes it until it is read, and its bytes from then on."""

    __slots__ = ("_bytes", "_make", "number")

    def __init__(self, number: int, make: Callable[[], Event]) -> None:
        self.number = number
        self._make: Callable[[], Event] | None = make
        self._bytes = b""

    def bytes(self, feed: str) -> bytes:
        if self._make is not None:
            self._bytes = encode_log_event(self._make(), f"{feed}-{self.number}")
            self._make = None
        return self._bytes


class EventLog:
    """Everything that happened of late. On the event loop only.

    Attributes:
        name: of this feed, no other's.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(4)
        self._moments: deque[_Kept] = deque(maxlen=MAX_EVENTS)
        self._gauges: deque[_Kept] = deque(maxlen=MAX_GAUGES)
        self._last = 0
        # The newest moment that is in the ring no more.
        self._forgotten = 0
        self._watchers: set[asyncio.Event] = set()
        self._dismissals = 0
        self._closed = False

    def add(self, make: Callable[[], Event]) -> None:
        """Something happened: `make` says what, if anybody wants to know. It must say the same whenever it is asked."""
        if len(self._moments) == MAX_EVENTS:
            self._forgotten = self._moments[0].number
        self._add(self._moments, make)

    def add_gauges(self, gauges: GaugeSample) -> None:
        """How the board does now."""
        self._add(self._gauges, lambda: gauges)

    def dismiss(self) -> None:
        """Ends all streams at once: who may watch still will come again."""
        self._dismissals += 1
        self._wake()

    def close(self) -> None:
        """Ends all streams, once they have said what there was."""
        self._closed = True
        self._wake()

    def check_room(self) -> None:
        """Raises Refusal (429) where too many watch already."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise ApiError(
                429,
                f"{MAX_WATCHERS} watch this board already: close one of its pages",
                kind=RATE_LIMIT,
                code="rate_limit_exceeded",
                retry_after=RETRY_SECONDS,
            )

    async def stream(self, greeting: Event, after: str, gone: asyncio.Future[None]) -> AsyncIterator[bytes]:
        """Server-sent events: `greeting`, the history, and what happens from now on.

        Ends when the feed is closed, when `gone` is done, when all are dismissed, or when the next event is forgotten:
        it is read too slowly.

        Args:
            after: id of the last event that is known already; of another feed, it means nothing.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        gone.add_done_callback(lambda _: changed.set())
        try:
            yield encode_log_event(greeting)
            feed, _, number = after.partition("-")
            known = int(number) if feed == self.name and number.isdecimal() else 0
            first, dismissals = True, self._dismissals
            while not gone.done() and dismissals == self._dismissals:
                changed.clear()
                if self._forgotten > known and not first:
                    return
                first = False
                news = self._since(known)
                for start in range(0, len(news), MAX_EVENTS_PER_WRITE):
                    together = news[start : start + MAX_EVENTS_PER_WRITE]
                    yield b"".join(kept.bytes(self.name) for kept in together)
                    known = together[-1].number
                if self._closed and known == self._last:
                    return
                if known == self._last:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(KEEPALIVE_SECONDS):
                            await changed.wait()
                    if not changed.is_set():
                        yield b": still here\n\n"
                    await asyncio.sleep(BATCH_SECONDS)
        finally:
            self._watchers.discard(changed)

    def _add(self, ring: deque[_Kept], make: Callable[[], Event]) -> None:
        self._last += 1
        ring.append(_Kept(self._last, make))
        self._wake()

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _since(self, number: int) -> list[_Kept]:
        """What came behind `number` and is still known, in order."""
        found = []
        for ring in (self._moments, self._gauges):
            for kept in reversed(ring):
                if kept.number <= number:
                    break
                found.append(kept)
        return sorted(found, key=lambda kept: kept.number)


def encode_log_event(news: Event, name: str = "") -> bytes:
    """One server-sent event."""
    return (f"id: {name}\n".encode() if name else b"") + encode_event(news)
