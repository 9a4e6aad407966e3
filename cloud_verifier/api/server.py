"""Runs the service until it is told to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sized
from typing import Any, Protocol

from edge_runtime.common import http_server as listening
from edge_runtime.common.http_server import Listening, reload_requested, stop_requested
from edge_runtime.common.sd_notify import Notifier
from edge_runtime.protocol.errors import FlexSpecError

log = logging.getLogger(__name__)

# For rounds to end once this process has been told to.
GRACE_SECONDS = 10.0
# Then, for their last bytes to leave granian, which says nothing of that; and for boards in the middle of a text to ask
# for their next round, and learn that they should ask elsewhere.
LINGER_SECONDS = 0.5


class Served(Protocol):
    """What a process serves: a `service.Service`, or the `ingress.Ingress` of several."""

    app: Any

    @property
    def in_flight(self) -> Sized: ...

    @property
    def loaded(self) -> bool: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def stalled_seconds(self) -> float: ...

    @property
    def in_use(self) -> bool: ...

    def status(self) -> str: ...

    def reload(self) -> None: ...

    async def drain(self, seconds: float) -> bool: ...

    def abandon(self) -> None: ...


class Server(listening.Server):
    """One listening verifier, inside a running event loop."""

    def __init__(self, service: Served, listening: Listening) -> None:
        super().__init__(service.app, listening)
        self._service = service

    async def stop(self) -> bool:
        peaceful = await super().stop()
        if not peaceful:
            self._service.abandon()
        return peaceful


async def serve(
    service: Served, listening: Listening, announce: Callable[[str], None], grace: float = GRACE_SECONDS
) -> None:
    """Serves until SIGINT or SIGTERM, and tells systemd. At SIGHUP it reads its tokens again.

    Args:
        announce: called with the service's URL once the target is loaded and requests can come.
        grace: seconds that rounds in progress have to end, while new ones are refused.

    Raises:
        FlexSpecError: the port is taken, or the target did not load.
    """
    stopping, notifier = stop_requested(), Notifier()
    asked = reload_requested()
    notifier.starting("loading the target")
    server = Server(service, listening)
    await server.start()
    try:
        while not service.loaded and not stopping.is_set():
            if service.failure:
                raise service.failure
            await asyncio.sleep(0.02)
        if not stopping.is_set():
            announce(server.url)
            notifier.ready(service.status())
        telling = asyncio.create_task(notifier.keep_telling(service.status, lambda: service.stalled_seconds))
        reloading = asyncio.create_task(_keep_reloading(service, asked, notifier))
        await stopping.wait()
        telling.cancel()
        reloading.cancel()
        notifier.stopping("rounds in progress may end")
        if not await service.drain(grace):
            log.warning("%d rounds were not over within %g s", len(service.in_flight), grace)
        if service.in_use:
            await asyncio.sleep(LINGER_SECONDS)
    finally:
        await server.stop()


async def _keep_reloading(service: Served, asked: asyncio.Event, notifier: Notifier) -> None:
    """Reloads whenever it is asked, until cancelled."""
    while True:
        await asked.wait()
        asked.clear()
        notifier.reloading()
        try:
            await asyncio.to_thread(service.reload)
        except FlexSpecError as error:
            log.error("not reloaded, everything stays as it was: %s", error)
        except Exception:
            log.exception("not reloaded, everything stays as it was")
        notifier.ready(service.status())
