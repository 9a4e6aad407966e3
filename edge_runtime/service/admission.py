"""Admission control: a bounded number of answers at once, a bounded FIFO queue for the rest."""

from __future__ import annotations

import math
import time

import anyio

from edge_runtime.service.errors import ApiError

# Bounds of Retry-After in seconds (OpenAI's clients ignore more than 60), and the assumed duration of an answer before
# the first has finished; chosen.
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 60
INITIAL_MEAN_SECONDS = 2.0
# Weight of the newest answer in the moving average of durations; chosen.
MEAN_WEIGHT = 0.25


class AdmissionQueue:
    """Slots for running answers, granted in order of arrival.

    Attributes:
        waiting: answers that wait for a slot.
    """

    def __init__(self, max_concurrent: int, max_waiting: int) -> None:
        """
        Args:
            max_concurrent: slots; each answer has a KV cache of its own in the draft model, which is what the board's
                memory bounds.
            max_waiting: answers in the queue, from before their prompts are tokenized; each holds only its prompt.
        """
        self.waiting = 0
        self._max_waiting = max_waiting
        # Wakes waiting tasks in the order of their arrival.
        self._slots = anyio.CapacityLimiter(max_concurrent)
        self._mean_seconds = INITIAL_MEAN_SECONDS
        # Time at which each running answer got its slot.
        self._started: dict[Place, float] = {}
        # Time at which the last refused request was told to come back.
        self._promised = 0.0

    @property
    def running(self) -> int:
        """Answers that hold a slot."""
        return len(self._started)

    @property
    def _max_concurrent(self) -> int:
        return int(self._slots.total_tokens)

    @property
    def capacity(self) -> int:
        """Answers that fit at most, running and waiting."""
        return self._max_concurrent + self._max_waiting

    def resize(self, max_concurrent: int, max_waiting: int) -> None:
        """Change both limits. Answers that hold a slot or a place in the queue keep it."""
        self._max_waiting = max_waiting
        self._slots.total_tokens = max_concurrent

    def reserve(self, count: int = 1) -> list[Place]:
        """Take places for the answers of one request, all or none.

        Raises:
            ApiError: 429 if they do not fit now, 400 if they would not fit into an empty queue.
        """
        if count > self.capacity:
            message = (
                f"{count} answers in one request, and this service runs or queues {self.capacity}: send several "
                "requests, or raise service.max_waiting"
            )
            raise ApiError(400, message, param="n")
        if self.running + self.waiting + count > self.capacity:
            message = f"{self.running} answers are running and {self.waiting} are waiting: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=self._retry_after(count))
        return [Place(self) for _ in range(count)]

    def mean_seconds(self) -> float:
        """Estimated duration of an answer; answers that have run for longer already raise it."""
        now = time.monotonic()
        running = [now - started for started in self._started.values()]
        return max(self._mean_seconds, sum(running) / len(running) if running else 0.0)

    def _retry_after(self, count: int) -> int:
        """Estimated seconds until `count` more answers fit, after those that were refused before and will come back."""
        now = time.monotonic()
        seconds_per_place = self.mean_seconds() / self._max_concurrent
        # Once the whole queue has been worked off, everyone fits.
        drained = now + seconds_per_place * (self.running + self.waiting)
        self._promised = min(max(now, self._promised) + seconds_per_place * count, drained)
        return min(max(MIN_RETRY_SECONDS, math.ceil(self._promised - now)), MAX_RETRY_SECONDS)


class Place:
    """A place in the queue and then a slot, for one answer: an async context manager that waits for the slot."""

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue = queue
        self._waiting = True
        queue.waiting += 1

    async def __aenter__(self) -> None:
        queue = self._queue
        try:
            await queue._slots.acquire_on_behalf_of(self)
        finally:
            self.leave()
        queue._started[self] = time.monotonic()

    async def __aexit__(self, *_: object) -> None:
        queue = self._queue
        seconds = time.monotonic() - queue._started.pop(self)
        queue._slots.release_on_behalf_of(self)
        queue._mean_seconds += MEAN_WEIGHT * (seconds - queue._mean_seconds)

    def leave(self) -> None:
        """Give up the place in the queue, if the answer still has it."""
        self._queue.waiting -= self._waiting
        self._waiting = False
