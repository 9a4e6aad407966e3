"""One of several verifiers behind one door: the same application, asked through Ray Serve instead of over HTTP.

It holds its sessions and its engine, as a verifier by itself does, and knows of no other replica.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ray import serve

if TYPE_CHECKING:
    from starlette.types import Message

    from cloud_verifier.api.app import Service

# So long the engine may be at one step before Ray is told to replace this replica.
STALLED_SECONDS = 60.0


class Replica:
    """A verifier's service; the class of the deployment. All methods run on the event loop that Ray gives it.

    Args:
        build: makes the service, in the replica's process.

    Raises:
        TargetError: the target does not load.
    """

    async def __init__(self, build: Callable[[], Service]) -> None:
        self._service = build()
        self._app = self._service.app
        self._lifespan = self._app.router.lifespan_context(self._app)
        # Applications that are still being told that their client has gone.
        self._running: set[asyncio.Task[None]] = set()
        await self._lifespan.__aenter__()
        while not self._service.loaded:
            if self._service.failure:
                raise self._service.failure
            await asyncio.sleep(0.02)

    async def exchange(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The application's answer to one request, as ASGI messages: several at once where they come at once."""
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in asked:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self._app(scope, receive, said.put))
        task.add_done_callback(lambda _: said.put_nowait(None))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            more = True
            while more:
                messages = [await said.get()]
                # Its head alone says nothing: it goes with what follows.
                if messages[0] is not None and messages[0]["type"] == "http.response.start":
                    messages.append(await said.get())
                while not said.empty():
                    messages.append(said.get_nowait())
                more = None not in messages
                if fresh := [message for message in messages if message is not None]:
                    yield fresh
                    more = more and fresh[-1].get("more_body", True)
            if task.done():
                task.result()
        finally:
            # As over HTTP: a round goes on, and who comes back gets its answer.
            gone.set()

    async def page(self) -> tuple[str, bytes]:
        """What this replica is called, and what it would tell Prometheus."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.page()

    async def reload(self) -> None:
        """Reads the tokens again; sessions stay. Raises InputError, and then everything stays as it was."""
        await asyncio.to_thread(self._service.reload)

    async def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self._service.failure:
            raise self._service.failure
        stalled = self._service.stalled_seconds
        if stalled > STALLED_SECONDS:
            raise RuntimeError(f"the engine has been at one step for {stalled:.0f} s")

    async def __del__(self) -> None:
        # Called by Ray when all requests are over, and by nobody when the process is killed.
        with contextlib.suppress(AttributeError):
            await self._lifespan.__aexit__(None, None, None)
