"""Tasks that run in the background of a block."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine


@contextlib.asynccontextmanager
async def background_task(coroutine: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run a coroutine during the block; cancel it at its end and wait until it has stopped."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
