"""Who writes now and who waits: so many answers at once, so many waiting, first come, first served."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator

import anyio

from edge_runtime.service.errors import LIMIT, Refusal

# Bounds of what is said in Retry-After, in seconds; a guess at an answer's duration before there was one.
SOONEST, LATEST = 1, 60
FIRST_GUESS = 2.0
# Weight of the newest answer in their mean duration.
NEWEST = 0.25


class Queue:
    """Places for answers.

    Attributes:
        running: answers that are being written.
        waiting: requests that wait for a place.
    """

    def __init__(self, max_concurrent: int, max_waiting: int) -> None:
        """
        Args:
            max_concurrent: each has keys and values of its own in the draft, which is what a board's memory bounds.
            max_waiting: each holds its prompt only.
        """
        self.running = 0
        self.waiting = 0
        self._max_waiting = max_waiting
        # Wakes those who wait in the order in which they came.
        self._places = anyio.CapacityLimiter(max_concurrent)
        self._mean_seconds = FIRST_GUESS

    @property
    def _max_concurrent(self) -> int:
        return int(self._places.total_tokens)

    def resize(self, max_concurrent: int, max_waiting: int) -> None:
        """From now on so many; whoever has a place, or waits for one, keeps it."""
        self._max_waiting = max_waiting
        self._places.total_tokens = max_concurrent

    def check_room(self) -> None:
        """Raises Refusal (429) unless there is a place, or room to wait for one."""
        if self.running + self.waiting >= self._max_concurrent + self._max_waiting:
            raise Refusal(
                429,
                f"{self.running} answers are being written and {self.waiting} requests wait: try again later",
                kind=LIMIT,
                code="rate_limit_exceeded",
                retry_after=self._retry_after(),
            )

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place, and holds it. Raises Refusal (429) where too many wait already."""
        self.check_room()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
            self._mean_seconds += NEWEST * (time.monotonic() - started - self._mean_seconds)

    def _retry_after(self) -> int:
        """Seconds until the one who waits longest has a place, as far as the last answers tell."""
        return min(max(SOONEST, math.ceil(self._mean_seconds / self._max_concurrent)), LATEST)
