"""Admission control: a bounded number of answers at once, a bounded FIFO queue for the rest."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator

import anyio

from edge_runtime.service.errors import ApiError

# Bounds of Retry-After in seconds, and the assumed duration of an answer before the first has finished; all chosen.
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 60
INITIAL_MEAN_SECONDS = 2.0
# Weight of the newest answer in the moving average of durations; chosen.
MEAN_WEIGHT = 0.25


class AdmissionQueue:
    """Slots for running answers, granted in order of arrival.

    Attributes:
        running: answers that hold a slot.
        waiting: requests that wait for one.
    """

    def __init__(self, max_concurrent: int, max_waiting: int) -> None:
        """
        Args:
            max_concurrent: slots; each answer has a KV cache of its own in the draft model, which is what the board's
                memory bounds.
            max_waiting: requests in the queue; each holds only its prompt.
        """
        self.running = 0
        self.waiting = 0
        self._max_waiting = max_waiting
        # Wakes waiting tasks in the order of their arrival.
        self._slots = anyio.CapacityLimiter(max_concurrent)
        self._mean_seconds = INITIAL_MEAN_SECONDS

    @property
    def _max_concurrent(self) -> int:
        return int(self._slots.total_tokens)

    def resize(self, max_concurrent: int, max_waiting: int) -> None:
        """Change both limits. Requests that hold a slot or a place in the queue keep it."""
        self._max_waiting = max_waiting
        self._slots.total_tokens = max_concurrent

    def check_capacity(self) -> None:
        """Raise ApiError (429) if no slot is free and the queue is full."""
        if self.running + self.waiting >= self._max_concurrent + self._max_waiting:
            message = f"{self.running} answers are running and {self.waiting} requests are waiting: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=self._retry_after())

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises ApiError (429) if the queue is full."""
        self.check_capacity()
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._slots.release()
            self._mean_seconds += MEAN_WEIGHT * (time.monotonic() - started - self._mean_seconds)

    def _retry_after(self) -> int:
        """Estimated seconds until the first request in the queue gets a slot."""
        return min(max(MIN_RETRY_SECONDS, math.ceil(self._mean_seconds / self._max_concurrent)), MAX_RETRY_SECONDS)
