"""HTTP server for an ASGI application, on granian: HTTP/1.1 and HTTP/2, in clear text or over TLS.

The board's service and the verifier share it: one server to maintain instead of two.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server as Granian

from edge_runtime.common.connections import (
    BURST,
    DEFAULT_CONNECTIONS,
    ConnectionGuard,
    ConnectionLimits,
    allow_connections,
    own_sockets,
)
from edge_runtime.common.request_gate import RequestGate
from edge_runtime.protocol.errors import FlexSpecError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# How long `HttpServer.stop` waits for requests in progress. Chosen.
GRACE_SECONDS = 3.0
# Time limit for a request's headers: a client that sends none occupies a connection. Chosen.
HEADER_TIMEOUT_MILLISECONDS = 10_000
# An HTTP/2 connection that is silent for the first of these times gets a PING, and is closed if there is no answer
# within the second. Chosen: outages of a radio link are shorter, and together it is less than the time after which an
# idle connection is closed.
PING_MILLISECONDS = 20_000
PING_ANSWER_SECONDS = 20
# Bytes of a request's headers over HTTP/2, where a few bytes can stand for all of them. Chosen: what proxies accept.
MAX_HEADER_BYTES = 1 << 14
# Requests in progress on one HTTP/2 connection: what RFC 9113, section 6.5.2, recommends at least.
MAX_STREAMS = 100
BACKLOG = 1024
# For how long one thread keeps others from running Python (a tenth of the default): the server's thread hands each
# request over to the event loop, and would wait this long for each while the event loop is busy. Measured: with 6,000
# requests at once, /healthz of a verifier took 0.3 s instead of 2 s, on two busy cores.
SWITCH_SECONDS = 5e-4
# TCP keep-alive, to close connections of clients that vanished without a FIN: the idle time before the first probe, the
# time between probes (both in seconds), and the number of unanswered probes; and for how many milliseconds sent data
# may stay unacknowledged. Chosen.
TCP_OPTIONS = {
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 45_000,
}


class ListenOptions(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        port: 0 picks a free one.
        certificate, key: PEM files; both or none.
        http: `auto`, `1` or `2`.
        client_ca: PEM file of certificate authorities: over TLS, only clients with a certificate of theirs are served.
            The application does not learn which client it is: granian does not pass the certificate on.
        connections: bounds on the connections.
        allowed_hosts: further names under which a verifier without tokens answers on loopback; see `HostNames`.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    certificate: Path | None = None
    key: Path | None = None
    http: str = "auto"
    client_ca: Path | None = None
    connections: ConnectionLimits = DEFAULT_CONNECTIONS
    allowed_hosts: tuple[str, ...] = ()


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
        self._lifespan = LifespanKeeper(app)
        accepted = allow_connections(int(options.connections.total * (1 + BURST)))
        total = min(options.connections.total, int(accepted / (1 + BURST)))
        gate = RequestGate(self._lifespan, total, options.connections.shared)
        self._guard = ConnectionGuard(gate, msgspec.structs.replace(options.connections, total=total))
        try:
            # Typed as Any: its methods have no annotations.
            self._granian: Any = Granian(
                self._guard,
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
                # Granian counts all connections, idle ones too: by default, the 129th would wait forever.
                backlog=BACKLOG,
                backpressure=accepted,
                http1_settings=HTTP1Settings(header_read_timeout=HEADER_TIMEOUT_MILLISECONDS),
                http2_settings=HTTP2Settings(
                    # Wide enough that no round waits for a window update, or carries the bytes of one.
                    initial_stream_window_size=1 << 20,
                    keep_alive_interval=PING_MILLISECONDS,
                    keep_alive_timeout=PING_ANSWER_SECONDS,
                    max_headers_size=MAX_HEADER_BYTES,
                    max_concurrent_streams=MAX_STREAMS,
                ),
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
        sys.setswitchinterval(SWITCH_SECONDS)
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
                self._guard.watch(self._port)
                return
        raise in_use

    async def stop(self) -> None:
        """Stop after the requests in progress, waiting at most GRACE_SECONDS for them, and exit the lifespan.

        Without a limit, a client with an idle HTTP/2 connection would keep the process alive forever.
        """
        assert self._task is not None
        self._guard.stop()
        self._granian.stop()
        _, unfinished = await asyncio.wait({self._task}, timeout=GRACE_SECONDS)
        if unfinished:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._lifespan.exit()


class LifespanKeeper:
    """An ASGI application around another one whose lifespan it can exit.

    Granian forgets the lifespan's task if it is cancelled while it waits for connections. Nothing would refer to that
    task any more, and whichever thread next collects garbage would close its coroutines while their event loop, in
    another thread, resumes them: CPython crashes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._task: asyncio.Task[Any] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._task = asyncio.current_task()
        await self._app(scope, receive, send)

    async def exit(self) -> None:
        """Exit the application's lifespan unless that is done."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})


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
    for own in own_sockets():
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and own.getsockname()[1] == port:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_OPTIONS.items():
                own.setsockopt(socket.IPPROTO_TCP, option, value)


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
