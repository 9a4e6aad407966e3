"""Calls that the scheduler's thread hands over to event loops together."""

from __future__ import annotations

import asyncio
import threading

from cloud_verifier.engine.outbox import Outbox


async def test_calls_arrive_in_order_after_the_flush_only() -> None:
    outbox, received, arrived = Outbox(), list[int](), asyncio.Event()
    loop = asyncio.get_running_loop()

    def receive(number: int) -> None:
        received.append(number)
        if number == 9:
            arrived.set()

    def post() -> None:
        for number in range(10):
            outbox.post(loop, receive, number)

    thread = threading.Thread(target=post)
    thread.start()
    await asyncio.to_thread(thread.join)
    await asyncio.sleep(0)
    assert received == []
    await asyncio.to_thread(outbox.flush)
    await arrived.wait()
    assert received == list(range(10))
    outbox.flush()
    await asyncio.sleep(0)
    assert len(received) == 10


def test_every_loop_gets_its_own_calls() -> None:
    outbox, loops = Outbox(), [asyncio.new_event_loop() for _ in range(2)]
    received: list[tuple[int, int]] = []
    for number, loop in enumerate(loops * 2):
        outbox.post(loop, received.append, (loops.index(loop), number))
    outbox.flush()
    for loop in loops:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    assert received == [(0, 0), (0, 2), (1, 1), (1, 3)]
