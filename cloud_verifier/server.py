"""Runs the service until it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloud_verifier.service import Service
from edge_runtime import listening
from edge_runtime.listening import Listening, stop_requested


class Server(listening.Server):
    """One listening verifier, inside a running event loop."""

    def __init__(self, service: Service, listening: Listening) -> None:
        super().__init__(service.app, listening)
        self._service = service

    async def stop(self) -> bool:
        peaceful = await super().stop()
        if not peaceful:
            self._service.engine.stop()
        return peaceful


async def serve(service: Service, listening: Listening, announce: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        announce: called with the service's URL once the target is loaded and requests can come.

    Raises:
        FlexSpecError: the port is taken, or the target did not load.
    """
    stopping = stop_requested()
    server = Server(service, listening)
    await server.start()
    try:
        while service.engine.target is None and not stopping.is_set():
            if service.engine.failure:
                raise service.engine.failure
            await asyncio.sleep(0.02)
        if not stopping.is_set():
            announce(server.url)
        await stopping.wait()
    finally:
        await server.stop()
