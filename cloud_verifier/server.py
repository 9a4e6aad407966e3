"""Runs the service on granian: HTTP/1.1 and HTTP/2, in clear and over TLS."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP2Settings
from granian.server.embed import Server as Granian

from cloud_verifier.service import Service
from edge_runtime.contract.errors import FlexSpecError

log = logging.getLogger(__name__)

GRACE_SECONDS = 3.0


class Listening(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        port: 0 picks a free one.
        certificate, key: PEM files; both or none.
        http: `auto`, `1` or `2`.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    certificate: Path | None = None
    key: Path | None = None
    http: str = "auto"


class Server:
    """One listening service, inside a running event loop."""

    def __init__(self, service: Service, listening: Listening) -> None:
        self._service = service
        port = listening.port or _free_port(listening.host)
        scheme = "https" if listening.certificate else "http"
        self.url = f"{scheme}://{listening.host}:{port}"
        try:
            self._granian = Granian(
                service.app,
                address=listening.host,
                port=port,
                interface=Interfaces.ASGI,
                http=HTTPModes(listening.http),
                websockets=False,
                ssl_cert=listening.certificate,
                ssl_key=listening.key,
                log_enabled=False,
                # Windows wide enough that no round ever waits for, or pays for, a window update.
                http2_settings=HTTP2Settings(initial_stream_window_size=1 << 20),
            )
        except OSError as error:
            raise FlexSpecError(f"cannot use the certificate {listening.certificate}: {error}") from None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts listening, and waits until connections are accepted."""
        host, port = self.url.rsplit("/", 1)[1].rsplit(":", 1)
        try:
            socket.create_server((host, int(port))).close()
        except OSError:
            raise FlexSpecError(
                f"could not listen on {host} port {port}: is the port in use? choose another --port"
            ) from None
        self._task = asyncio.create_task(self._granian.serve())
        for _ in range(200):
            if self._task.done():
                break
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
        raise FlexSpecError(f"could not listen on {host} port {port}: is the port in use? choose another --port")

    async def stop(self) -> None:
        """Finishes the requests in progress, for GRACE_SECONDS at most, and stops.

        Without a bound, one board with an idle HTTP/2 connection would keep the process alive for ever.
        """
        assert self._task is not None
        self._granian.stop()
        _, unfinished = await asyncio.wait({self._task}, timeout=GRACE_SECONDS)
        if unfinished:
            self._task.cancel()
            await asyncio.wait({self._task})
            # Granian ends the application's lifespan only where it ends in peace.
            self._service.engine.stop()


async def serve(service: Service, listening: Listening, announce: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        announce: called with the service's URL once the target is loaded and requests can come.

    Raises:
        FlexSpecError: the port is taken, or the target did not load.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
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


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
