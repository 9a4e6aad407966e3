"""The admission queue is bounded and first-in-first-out, and slots are returned."""

from __future__ import annotations

import asyncio

import pytest

from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.errors import ApiError


class QueuedRequests:
    """Requests that hold their slots until they are released.

    Attributes:
        admitted: names of the requests that got a slot, in order.
    """

    def __init__(self, queue: AdmissionQueue) -> None:
        self.queue = queue
        self.admitted: list[int] = []
        self.released: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def add(self, *names: int) -> None:
        for name in names:
            self.released[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold_slot(name))
        await asyncio.sleep(0.01)

    async def release(self, name: int) -> None:
        self.released[name].set()
        await self.tasks[name]
        await asyncio.sleep(0.01)

    async def _hold_slot(self, name: int) -> None:
        async with self.queue.reserve()[0]:
            self.admitted.append(name)
            await self.released[name].wait()


async def test_requests_are_admitted_in_order_of_arrival() -> None:
    queue = AdmissionQueue(2, 4)
    requests = QueuedRequests(queue)
    await requests.add(0, 1, 2, 3, 4)
    assert (requests.admitted, queue.running, queue.waiting) == ([0, 1], 2, 3)
    await requests.release(1)
    # A new request does not overtake those that wait.
    await requests.add(5)
    assert requests.admitted == [0, 1, 2]
    for name in (0, 2, 3, 4, 5):
        await requests.release(name)
    assert (requests.admitted, queue.running, queue.waiting) == ([0, 1, 2, 3, 4, 5], 0, 0)


async def test_a_full_queue_refuses_with_retry_after() -> None:
    queue = AdmissionQueue(1, 1)
    requests = QueuedRequests(queue)
    await requests.add(0, 1)
    with pytest.raises(ApiError) as caught:
        queue.reserve()
    assert (caught.value.status, caught.value.body.error.code) == (429, "rate_limit_exceeded")
    assert 1 <= (caught.value.retry_after or 0) <= 60
    await requests.release(0)
    await requests.release(1)
    async with queue.reserve()[0]:
        assert queue.running == 1


async def test_no_request_waits_in_a_queue_of_size_zero() -> None:
    queue = AdmissionQueue(1, 0)
    async with queue.reserve()[0]:
        with pytest.raises(ApiError):
            queue.reserve()
    queue.reserve()[0].leave()


async def test_the_answers_of_one_request_get_places_together_or_not_at_all() -> None:
    queue = AdmissionQueue(2, 2)
    places = queue.reserve(3)
    with pytest.raises(ApiError) as caught:
        queue.reserve(2)
    assert (caught.value.status, queue.waiting) == (429, 3)
    with pytest.raises(ApiError) as caught:
        queue.reserve(5)
    assert (caught.value.status, caught.value.body.error.param) == (400, "n")
    async with places[0]:
        assert (queue.running, queue.waiting) == (1, 2)
    for place in places:
        place.leave()
        place.leave()
    assert (queue.running, queue.waiting) == (0, 0)


async def test_refused_requests_are_told_to_come_back_one_after_the_other() -> None:
    queue = AdmissionQueue(2, 6)
    queue.reserve(8)
    delays = []
    for _ in range(20):
        with pytest.raises(ApiError) as caught:
            queue.reserve()
        delays.append(caught.value.retry_after)
    # Two slots, an assumed duration of two seconds: one place a second, and after eight all are free.
    assert delays == [1, 2, 3, 4, 5, 6, 7, *[8] * 13]


async def test_a_long_running_answer_raises_the_estimated_duration() -> None:
    queue = AdmissionQueue(1, 0)
    async with queue.reserve()[0]:
        before = queue.mean_seconds()
        started = next(iter(queue._started))
        queue._started[started] -= 100
        assert queue.mean_seconds() > 99 > before


async def test_a_cancelled_request_leaves_the_queue() -> None:
    queue = AdmissionQueue(1, 2)
    requests = QueuedRequests(queue)
    await requests.add(0, 1, 2)
    requests.tasks[1].cancel()
    await asyncio.sleep(0.01)
    assert (queue.running, queue.waiting) == (1, 1)
    await requests.release(0)
    assert requests.admitted == [0, 2]
    await requests.release(2)
    assert (queue.running, queue.waiting) == (0, 0)


async def test_a_failed_answer_returns_its_slot() -> None:
    queue = AdmissionQueue(1, 0)
    with pytest.raises(RuntimeError):
        async with queue.reserve()[0]:
            raise RuntimeError
    assert queue.running == 0


async def test_resizing_up_admits_at_once_and_down_as_answers_end() -> None:
    queue = AdmissionQueue(1, 3)
    requests = QueuedRequests(queue)
    await requests.add(0, 1, 2, 3)
    queue.resize(3, 1)
    await asyncio.sleep(0.01)
    assert (requests.admitted, queue.running, queue.waiting) == ([0, 1, 2], 3, 1)
    with pytest.raises(ApiError):
        queue.reserve()
    queue.resize(1, 3)
    for name, admitted in ((0, 3), (1, 3), (2, 4)):
        await requests.release(name)
        assert len(requests.admitted) == admitted
    # A request that was in the queue before the limits shrank still gets a slot.
    await requests.release(3)
    assert (queue.running, queue.waiting) == (0, 0)
