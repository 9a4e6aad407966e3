"""The watchdog itself: it finds what computes on an event loop, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from tests.event_loop_watchdog import LIMIT_SECONDS, ROOT, WATCHDOG, Hold

# Stands for a module of a server: what is elsewhere does not count.
SERVER = f"""
import asyncio, gc, time

def compute():
    end = time.thread_time() + {2 * LIMIT_SECONDS}
    while time.thread_time() < end:
        pass

async def handle_request():
    await asyncio.sleep(0)
    compute()

async def handle_request_in_turn():
    await handle_request()
    await asyncio.sleep(0)

async def wait_in_a_system_call():
    time.sleep({2 * LIMIT_SECONDS})

async def compute_in_pieces():
    for _ in range(8):
        end = time.thread_time() + {LIMIT_SECONDS / 4}
        while time.thread_time() < end:
            pass
        await asyncio.sleep(0)

async def collect_garbage():
    for _ in range(3):
        gc.collect()

async def compute_in_a_thread():
    await asyncio.to_thread(compute)
"""
server: dict[str, Any] = {}
FILE = f"{ROOT}/edge_runtime/imaginary.py"
exec(compile(SERVER, FILE, "exec"), server)


@pytest.fixture
def holds() -> Iterator[list[Hold]]:
    """What the watchdog finds; it does not count against the test."""
    yield WATCHDOG.holds
    WATCHDOG.holds.clear()


async def test_a_task_that_computes_is_found(holds: list[Hold]) -> None:
    await asyncio.create_task(server["handle_request"]())
    (hold,) = holds
    assert hold.where == f"handle_request ({FILE})"
    assert hold.seconds > LIMIT_SECONDS
    assert "of processor time in handle_request" in str(hold)


async def test_a_callback_that_computes_is_found(holds: list[Hold]) -> None:
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(server["compute"])
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()
    assert [hold.where for hold in holds] == [f"compute ({FILE})"]


async def test_a_task_of_a_task_group_that_computes_is_found(holds: list[Hold]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(server["handle_request_in_turn"])
    assert [hold.where for hold in holds] == [f"handle_request_in_turn ({FILE})"]


@pytest.mark.parametrize(
    "name", ["wait_in_a_system_call", "compute_in_pieces", "collect_garbage", "compute_in_a_thread"]
)
async def test_nothing_else_is_found(holds: list[Hold], name: str) -> None:
    await asyncio.create_task(server[name]())
    assert holds == []


async def test_what_a_test_computes_does_not_count(holds: list[Hold]) -> None:
    server["compute"]()
    await asyncio.sleep(0)
    assert holds == []
