"""Runs a verifier until it is stopped: readiness, systemd notifications, reload, and drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_verifier.api.codec import error_response
from cloud_verifier.engine.admission import AdmissionController
from cloud_verifier.engine.auth import Authenticator
from edge_runtime.common.http_server import HttpServer, ListenOptions, watch_reload_signal, watch_stop_signals
from edge_runtime.common.memory import freeze_objects
from edge_runtime.common.network import HostNames, is_loopback
from edge_runtime.common.sd_notify import Notifier
from edge_runtime.protocol.errors import FlexSpecError, TargetError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

# How long rounds in progress may take to end after SIGTERM. Default of --grace.
GRACE_SECONDS = 10.0
# After that: time for granian, which does not report it, to send the last bytes, and for boards in the middle of a text
# to send their next round and learn that they must go elsewhere.
LINGER_SECONDS = 0.5
# How often `serve` checks whether the target is loaded, and later whether the engine still lives.
LOAD_POLL_SECONDS, FAILURE_POLL_SECONDS = 0.02, 1.0


class ServedApplication(Protocol):
    """What a process serves: an `app.VerifierService`, or the `ingress.Ingress` of several replicas."""

    app: Any

    @property
    def authenticator(self) -> Authenticator: ...

    @property
    def admission(self) -> AdmissionController: ...

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


class HostCheck:
    """An ASGI application around another one that refuses requests whose Host header has a foreign name."""

    def __init__(self, app: ASGIApp, hosts: HostNames) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            name = self._hosts.foreign_name(request.headers.get("host", ""))
            if name is not None:
                refused = VerifierRefused(
                    ErrorCode.FORBIDDEN,
                    f"this verifier is local and does not answer for the host {name[:80]!a}: add the name with "
                    "--allowed-hosts, or require tokens with --tokens",
                )
                await error_response(request, refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class VerifierServer(HttpServer):
    """A listening verifier, inside a running event loop.

    Attributes:
        service: what it serves.
    """

    def __init__(self, service: ServedApplication, listening: ListenOptions) -> None:
        app = service.app
        if is_loopback(listening.host) and service.authenticator.file is None:
            app = HostCheck(app, HostNames(listening.allowed_hosts))
        super().__init__(app, listening)
        self.service = service


async def serve(
    service: ServedApplication, listening: ListenOptions, announce: Callable[[str], None], grace: float = GRACE_SECONDS
) -> None:
    """Serve until SIGINT or SIGTERM, and notify systemd. SIGHUP reloads the token file.

    Args:
        announce: called with the service's URL once the target is loaded and requests are accepted.
        grace: seconds for rounds in progress to end, while new ones are refused.

    Raises:
        FlexSpecError: the port is in use, the target did not load, or its device was lost.
    """
    stop_requested, notifier = watch_stop_signals(), Notifier()
    reload_requested = watch_reload_signal()
    # Before the target is loaded, so that retired versions can be collected.
    freeze_objects()
    notifier.starting("loading the target")
    server = VerifierServer(service, listening)
    await server.start()
    try:
        while not service.loaded and not stop_requested.is_set():
            if service.failure:
                raise service.failure
            await asyncio.sleep(LOAD_POLL_SECONDS)
        if not stop_requested.is_set():
            announce(server.url)
            notifier.ready(service.status())
        notifying = asyncio.create_task(notifier.run(service.status, lambda: service.stalled_seconds))
        reloading = asyncio.create_task(_reload_on_request(service, reload_requested, notifier))
        while not stop_requested.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop_requested.wait(), FAILURE_POLL_SECONDS)
            if service.stalled_seconds == float("inf"):
                # Whoever waits for an answer has it by now: the engine ends after it has failed all rounds.
                await service.admission.drain(grace)
                raise service.failure or TargetError("the engine has ended")
        notifying.cancel()
        reloading.cancel()
        notifier.stopping("draining: rounds in progress may end")
        if not await service.admission.drain(grace):
            log.warning("%d rounds did not end within %g s", len(service.admission), grace)
        if service.in_use:
            await asyncio.sleep(LINGER_SECONDS)
    finally:
        await server.stop()


async def _reload_on_request(service: ServedApplication, requested: asyncio.Event, notifier: Notifier) -> None:
    while True:
        await requested.wait()
        requested.clear()
        notifier.reloading()
        try:
            await asyncio.to_thread(service.reload)
        except FlexSpecError as error:
            log.error("reload failed, nothing has changed: %s", error)
        except Exception:
            log.exception("reload failed, nothing has changed")
        notifier.ready(service.status())
