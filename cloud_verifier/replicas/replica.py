"""One of several replicas: the verifier's ASGI application, called through Ray Serve instead of over HTTP.

A replica has its own sessions and scheduler, as a single verifier does, and knows of no other replica.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ray import serve

if TYPE_CHECKING:
    from starlette.types import Message

    from cloud_verifier.api.app import VerifierService

# Longest scheduler step before Ray is made to replace this replica.
MAX_STALL_SECONDS = 60.0
LOAD_POLL_SECONDS = 0.02


class Replica:
    """The class of the Ray Serve deployment. All methods run on the event loop that Ray gives it.

    Args:
        build_service: builds the service, in the replica's process.

    Raises:
        TargetError: the target does not load.
    """

    # Ray awaits it.
    async def __init__(self, build_service: Callable[[], VerifierService]) -> None:  # type: ignore[misc]
        self._service = build_service()
        self._app = self._service.app
        self._lifespan = self._app.router.lifespan_context(self._app)
        # Keeps references to application tasks whose client has disconnected.
        self._tasks: set[asyncio.Task[None]] = set()
        await self._lifespan.__aenter__()
        while not self._service.loaded:
            if self._service.failure:
                raise self._service.failure
            await asyncio.sleep(LOAD_POLL_SECONDS)

    async def exchange(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """Yield the application's response to one request, as ASGI messages, in batches of those available at once."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        disconnected = asyncio.Event()
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in requests:
                return message
            await disconnected.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self._app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            more = True
            while more:
                messages = [await sent.get()]
                # The response head is useless alone: send it together with the first part of the body.
                if messages[0] is not None and messages[0]["type"] == "http.response.start":
                    messages.append(await sent.get())
                while not sent.empty():
                    messages.append(sent.get_nowait())
                more = None not in messages
                if batch := [message for message in messages if message is not None]:
                    yield batch
                    more = more and batch[-1].get("more_body", True)
            if task.done():
                task.result()
        finally:
            # As over HTTP: the round goes on, and a client that repeats the request gets its reply.
            disconnected.set()

    async def page(self) -> tuple[str, bytes]:
        """Ray's id of this replica, and its metrics in Prometheus' text format."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.render()

    async def reload(self) -> None:
        """Read the token file again; sessions stay. On InputError nothing changes."""
        await asyncio.to_thread(self._service.reload)

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if self._service.failure:
            raise self._service.failure
        stalled = self._service.stalled_seconds
        if stalled > MAX_STALL_SECONDS:
            raise RuntimeError(f"the scheduler has been in one step for {stalled:.0f} s")

    async def __del__(self) -> None:
        # Ray calls this when all requests have ended; a killed process skips it.
        with contextlib.suppress(AttributeError):
            await self._lifespan.__aexit__(None, None, None)
