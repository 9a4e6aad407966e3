"""Places: bounded, in order, and given back."""

from __future__ import annotations

import asyncio

import pytest

from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.errors import ApiError


class Guests:
    """Requests that hold their places until they are told to go."""

    def __init__(self, queue: AdmissionQueue) -> None:
        self.queue = queue
        self.served: list[int] = []
        self.leave: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def arrive(self, *names: int) -> None:
        for name in names:
            self.leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
        await asyncio.sleep(0.01)

    async def depart(self, name: int) -> None:
        self.leave[name].set()
        await self.tasks[name]
        await asyncio.sleep(0.01)

    async def _stay(self, name: int) -> None:
        async with self.queue.slot():
            self.served.append(name)
            await self.leave[name].wait()


async def test_first_come_first_served() -> None:
    queue = AdmissionQueue(2, 4)
    guests = Guests(queue)
    await guests.arrive(0, 1, 2, 3, 4)
    assert (guests.served, queue.running, queue.waiting) == ([0, 1], 2, 3)
    await guests.depart(1)
    # Who comes now does not overtake who waits.
    await guests.arrive(5)
    assert guests.served == [0, 1, 2]
    for name in (0, 2, 3, 4, 5):
        await guests.depart(name)
    assert (guests.served, queue.running, queue.waiting) == ([0, 1, 2, 3, 4, 5], 0, 0)


async def test_too_many_are_told_when_to_come_back() -> None:
    queue = AdmissionQueue(1, 1)
    guests = Guests(queue)
    await guests.arrive(0, 1)
    with pytest.raises(ApiError) as caught:
        async with queue.slot():
            pass
    assert (caught.value.status, caught.value.body.error.code) == (429, "rate_limit_exceeded")
    assert 1 <= (caught.value.retry_after or 0) <= 60
    await guests.depart(0)
    await guests.depart(1)
    async with queue.slot():
        assert queue.running == 1


async def test_none_may_wait_where_none_may() -> None:
    queue = AdmissionQueue(1, 0)
    async with queue.slot():
        with pytest.raises(ApiError):
            queue.check_capacity()
    queue.check_capacity()


async def test_who_leaves_while_waiting_leaves_room() -> None:
    queue = AdmissionQueue(1, 2)
    guests = Guests(queue)
    await guests.arrive(0, 1, 2)
    guests.tasks[1].cancel()
    await asyncio.sleep(0.01)
    assert (queue.running, queue.waiting) == (1, 1)
    await guests.depart(0)
    assert guests.served == [0, 2]
    await guests.depart(2)
    assert (queue.running, queue.waiting) == (0, 0)


async def test_a_failed_answer_gives_its_place_back() -> None:
    queue = AdmissionQueue(1, 0)
    with pytest.raises(RuntimeError):
        async with queue.slot():
            raise RuntimeError
    assert queue.running == 0


async def test_more_places_are_taken_at_once_and_fewer_as_answers_end() -> None:
    queue = AdmissionQueue(1, 3)
    guests = Guests(queue)
    await guests.arrive(0, 1, 2, 3)
    queue.resize(3, 1)
    await asyncio.sleep(0.01)
    assert (guests.served, queue.running, queue.waiting) == ([0, 1, 2], 3, 1)
    with pytest.raises(ApiError):
        queue.check_capacity()
    queue.resize(1, 3)
    for name, served in ((0, 3), (1, 3), (2, 4)):
        await guests.depart(name)
        assert len(guests.served) == served
    # Who waited while there were more places still has one.
    await guests.depart(3)
    assert (queue.running, queue.waiting) == (0, 0)
