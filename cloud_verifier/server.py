"""Runs the service until it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloud_verifier.service import Service
from edge_runtime import listening
from edge_runtime.listening import Listening, stop_requested
from edge_runtime.systemd.notifying import Notifier


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
    """Serves until SIGINT or SIGTERM, and tells systemd.

    Args:
        announce: called with the service's URL once the target is loaded and requests can come.

    Raises:
        FlexSpecError: the port is taken, or the target did not load.
    """
    stopping, notifier, engine = stop_requested(), Notifier(), service.engine
    notifier.starting("loading the target")
    server = Server(service, listening)
    await server.start()
    try:
        while engine.target is None and not stopping.is_set():
            if engine.failure:
                raise engine.failure
            await asyncio.sleep(0.02)
        if not stopping.is_set():
            announce(server.url)
            notifier.ready(service.status())
        telling = asyncio.create_task(notifier.keep_telling(service.status, lambda: engine.stalled_seconds))
        await stopping.wait()
        telling.cancel()
        notifier.stopping("rounds in progress may end")
    finally:
        await server.stop()
