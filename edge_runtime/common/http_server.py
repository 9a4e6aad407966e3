"""Listens with an ASGI application on granian: HTTP/1.1 and HTTP/2, in clear and over TLS.

The board's service and the verifier share it, so `cloud_verifier` imports this besides `edge_runtime.protocol`: a wider
arrow than the house's rule, and cheaper than two servers to keep right.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server as Granian

from edge_runtime.protocol.errors import FlexSpecError

GRACE_SECONDS = 3.0
# For a request's headers: whoever sends none holds a connection.
HEADER_MILLISECONDS = 10_000
BACKLOG = 1024
# A client that vanished without a word holds a connection: after so many seconds of silence the kernel asks for it, so
# many times; and so long it may leave unacknowledged what it is sent.
IDLE_SECONDS, ASKING_SECONDS, ASKING_TIMES = 30, 5, 3
UNACKNOWLEDGED_SECONDS = 45
# Files that a process needs beside its connections, about.
OTHER_FILES = 100
MOST_CONNECTIONS = 10_000


class Listening(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        port: 0 picks a free one.
        certificate, key: PEM files; both or none.
        client_ca: PEM file of authorities: over TLS, whoever has no certificate of theirs gets no further. It does not
            say who it is: granian keeps the certificate to itself.
        http: `auto`, `1` or `2`.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    certificate: Path | None = None
    key: Path | None = None
    http: str = "auto"
    client_ca: Path | None = None


class Server:
    """One listening application, inside a running event loop.

    Attributes:
        url: base URL, with the port that was picked.
    """

    def __init__(self, app: Any, listening: Listening) -> None:
        """
        Args:
            app: an ASGI application; its lifespan is entered by `start`.

        Raises:
            FlexSpecError: the host is no address of this machine, or the certificate is unusable.
        """
        self._host = listening.host
        self._port = listening.port or _free_port(listening.host)
        scheme = "https" if listening.certificate else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}:{self._port}"
        try:
            # Its own methods have no annotations.
            self._granian: Any = Granian(
                app,
                address=listening.host,
                port=self._port,
                interface=Interfaces.ASGI,
                http=HTTPModes(listening.http),
                websockets=False,
                ssl_cert=listening.certificate,
                ssl_key=listening.key,
                ssl_ca=listening.client_ca,
                ssl_client_verify=listening.client_ca is not None,
                log_enabled=False,
                # Granian counts connections, idle ones too: with its own default, the 129th would wait for ever.
                backlog=BACKLOG,
                backpressure=_most_connections(),
                http1_settings=HTTP1Settings(header_read_timeout=HEADER_MILLISECONDS),
                # Windows wide enough that no round ever waits for, or pays for, a window update.
                http2_settings=HTTP2Settings(initial_stream_window_size=1 << 20),
            )
        except OSError as error:
            raise FlexSpecError(f"cannot use the certificate {listening.certificate}: {error}") from None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts listening, and waits until connections are accepted. Raises FlexSpecError if the port is taken."""
        taken = FlexSpecError(
            f"could not listen on {self._host} port {self._port}: is the port in use? choose another --port"
        )
        try:
            socket.create_server((self._host, self._port), family=_family(self._host)).close()
        except OSError:
            raise taken from None
        self._task = asyncio.create_task(self._granian.serve())
        for _ in range(200):
            if self._task.done():
                break
            try:
                _, writer = await asyncio.open_connection(self._host, self._port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                _notice_the_vanished(self._port)
                return
        raise taken

    async def stop(self) -> bool:
        """Finishes the requests in progress, for GRACE_SECONDS at most, and stops.

        Without a bound, one client with an idle HTTP/2 connection would keep the process alive for ever.

        Returns:
            Whether it ended in peace; if not, the application's lifespan has not been left.
        """
        assert self._task is not None
        self._granian.stop()
        _, unfinished = await asyncio.wait({self._task}, timeout=GRACE_SECONDS)
        if unfinished:
            self._task.cancel()
            await asyncio.wait({self._task})
        return not unfinished


def stop_requested() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set, from now on, instead of ending the process."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


def reload_requested() -> asyncio.Event:
    """An event that SIGHUP sets, from now on, instead of ending the process: to be cleared by whoever reloads."""
    asked = asyncio.Event()
    # A terminal that closes says SIGHUP, too, and means the end.
    if not os.isatty(0):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    return asked


def _notice_the_vanished(port: int) -> None:
    """Sets keep-alive for what is accepted on `port` from now on: accepted sockets are as the listening one.

    Granian makes that itself and does not hand it out, so it is looked for among this process's files.
    """
    for file in Path("/proc/self/fd").iterdir():
        try:
            found = socket.socket(fileno=int(file.name))
        except OSError:
            continue
        try:
            inet = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
            if inet and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == port:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASKING_SECONDS)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ASKING_TIMES)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNACKNOWLEDGED_SECONDS)
        finally:
            # It is granian's to close.
            found.detach()


def _most_connections() -> int:
    """How many connections there may be at once, by how many files this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(files - OTHER_FILES, MOST_CONNECTIONS))


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise FlexSpecError(f"could not listen on {host}: {error.strerror}; choose another --host") from None
        port: int = probe.getsockname()[1]
        return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
