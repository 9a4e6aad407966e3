"""HTTP server for an ASGI application, on granian: HTTP/1.1 and HTTP/2, in clear text or over TLS.

The board's service and the verifier share it: one server to maintain instead of two.
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

# How long `HttpServer.stop` waits for requests in progress. Chosen.
GRACE_SECONDS = 3.0
# Time limit for a request's headers: a client that sends none occupies a connection. Chosen.
HEADER_TIMEOUT_MILLISECONDS = 10_000
BACKLOG = 1024
# TCP keep-alive, to close connections of clients that vanished without a FIN: the idle time before the first probe, the
# time between probes (both in seconds), and the number of unanswered probes; and for how many milliseconds sent data
# may stay unacknowledged. Chosen.
TCP_OPTIONS = {
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 45_000,
}
# Approximate number of file descriptors that a process needs in addition to its connections.
RESERVED_FILES = 100
MAX_CONNECTIONS = 10_000


class ListenOptions(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        port: 0 picks a free one.
        certificate, key: PEM files; both or none.
        http: `auto`, `1` or `2`.
        client_ca: PEM file of certificate authorities: over TLS, only clients with a certificate of theirs are served.
            The application does not learn which client it is: granian does not pass the certificate on.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    certificate: Path | None = None
    key: Path | None = None
    http: str = "auto"
    client_ca: Path | None = None


class HttpServer:
    """Serves one ASGI application inside a running event loop.

    Attributes:
        url: base URL, with the actual port.
    """

    def __init__(self, app: Any, options: ListenOptions) -> None:
        """
        Args:
            app: an ASGI application; `start` enters its lifespan.

        Raises:
            FlexSpecError: the host is not an address of this machine, or the certificate is unusable.
        """
        self._host = options.host
        self._port = options.port or _free_port(options.host)
        scheme = "https" if options.certificate else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}:{self._port}"
        try:
            # Typed as Any: its methods have no annotations.
            self._granian: Any = Granian(
                app,
                address=options.host,
                port=self._port,
                interface=Interfaces.ASGI,
                http=HTTPModes(options.http),
                websockets=False,
                ssl_cert=options.certificate,
                ssl_key=options.key,
                ssl_ca=options.client_ca,
                ssl_client_verify=options.client_ca is not None,
                log_enabled=False,
                # Granian counts all connections, idle ones too: with its default, the 129th would wait forever.
                backlog=BACKLOG,
                backpressure=_max_connections(),
                http1_settings=HTTP1Settings(header_read_timeout=HEADER_TIMEOUT_MILLISECONDS),
                # Wide enough that no round waits for a window update, or carries the bytes of one.
                http2_settings=HTTP2Settings(initial_stream_window_size=1 << 20),
            )
        except OSError as error:
            raise FlexSpecError(f"cannot use the certificate {options.certificate}: {error}") from None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start listening and wait until connections are accepted. Raises FlexSpecError if the port is in use."""
        in_use = FlexSpecError(
            f"could not listen on {self._host} port {self._port}: is the port in use? choose another --port"
        )
        try:
            socket.create_server((self._host, self._port), family=_family(self._host)).close()
        except OSError:
            raise in_use from None
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
                _enable_keepalive(self._port)
                return
        raise in_use

    async def stop(self) -> bool:
        """Stop after the requests in progress, waiting at most GRACE_SECONDS for them.

        Without a limit, a client with an idle HTTP/2 connection would keep the process alive forever.

        Returns:
            Whether the shutdown was clean; if not, the application's lifespan has not been exited.
        """
        assert self._task is not None
        self._granian.stop()
        _, unfinished = await asyncio.wait({self._task}, timeout=GRACE_SECONDS)
        if unfinished:
            self._task.cancel()
            await asyncio.wait({self._task})
        return not unfinished


def watch_stop_signals() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set from now on, instead of ending the process."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def watch_reload_signal() -> asyncio.Event:
    """Return an event that SIGHUP sets from now on, instead of ending the process. The caller clears it on reload."""
    reload = asyncio.Event()
    # On a terminal SIGHUP means that the terminal was closed, and must end the process.
    if not os.isatty(0):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    return reload


def _enable_keepalive(port: int) -> None:
    """Enable TCP keep-alive on the socket that listens on `port`; the sockets that it accepts inherit the options.

    Granian creates the listening socket and does not expose it, so look for it among this process's descriptors.
    """
    for file in Path("/proc/self/fd").iterdir():
        try:
            candidate = socket.socket(fileno=int(file.name))
        except OSError:
            continue
        try:
            is_tcp = candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.type == socket.SOCK_STREAM
            is_listening = is_tcp and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listening and candidate.getsockname()[1] == port:
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in TCP_OPTIONS.items():
                    candidate.setsockopt(socket.IPPROTO_TCP, option, value)
        finally:
            # Granian owns the descriptor and closes it.
            candidate.detach()


def _max_connections() -> int:
    """Limit of concurrent connections, from the number of files that this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(files - RESERVED_FILES, MAX_CONNECTIONS))


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
