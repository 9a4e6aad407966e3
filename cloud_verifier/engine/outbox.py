"""What the scheduler's thread has for the event loop, handed over together: each waking of the loop costs 35 us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Outbox:
    """Calls for event loops. Only one thread may use it."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[Any], object], Any]]] = {}

    def post(self, loop: asyncio.AbstractEventLoop, call: Callable[[Any], object], argument: object) -> None:
        """Let `loop` make a call after the next `flush`."""
        self._calls.setdefault(loop, []).append((call, argument))

    def flush(self) -> None:
        """Hand over all calls, in order."""
        while self._calls:
            loop, calls = self._calls.popitem()
            loop.call_soon_threadsafe(_make_calls, calls)


def _make_calls(calls: list[tuple[Callable[[Any], object], Any]]) -> None:
    for call, argument in calls:
        call(argument)
