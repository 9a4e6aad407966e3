"""Bounds on connections, on the real server over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from edge_runtime.common import connections, http_server
from edge_runtime.common.connections import (
    Connection,
    ConnectionLimits,
    accepted_sockets,
    allow_connections,
    choose_closed,
    client_network,
)
from edge_runtime.common.http_server import HttpServer, ListenOptions

# A client that opens an HTTP/2 connection and leaves it at that: preface and empty SETTINGS.
IDLE_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04\x00" + bytes(4)
ATTACKER, HONEST = "127.0.0.66", "127.0.0.77"
NEVER = 600.0


looks: list[int] = []


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers look at their connections often, and record in `looks` how many they saw."""

    def choose(seen: list[Connection], limits: ConnectionLimits, now: float) -> Any:
        chosen = choose_closed(seen, limits, now)
        looks.append(len(seen))
        return chosen

    monkeypatch.setattr(connections, "choose_closed", choose)
    for name in ("RELAXED_SECONDS", "BUSY_SECONDS"):
        monkeypatch.setattr(connections, name, 0.02)


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another thread
            await asyncio.sleep(0.01)


async def wait_for_look() -> None:
    """Wait until the server has looked at all connections of now."""
    before = len(looks)
    await wait_until(lambda: len(looks) > before + 1)


class Application:
    """Answers at once, except for /wait, which waits for `released`."""

    def __init__(self) -> None:
        self.waiting = 0
        self.released = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/wait":
            self.waiting += 1
            await self.released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})


class RunningServer:
    """A server, its application, and clients of it from different addresses of loopback."""

    def __init__(self, port: int, app: Application) -> None:
        self.port, self.app = port, app
        self.url = f"http://127.0.0.1:{port}"
        self._sockets: list[socket.socket] = []

    def connect(self, address: str, sent: bytes = IDLE_HTTP2) -> socket.socket:
        """Open a connection from `address` and send something."""
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(address, 0))
        self._sockets.append(opened)
        opened.sendall(sent)
        return opened

    async def get(self, address: str, path: str = "/", *, http2: bool = False) -> str:
        """Ask as a client with one new connection."""
        transport = httpx.AsyncHTTPTransport(local_address=address, http1=not http2, http2=http2)
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
            return (await client.get(self.url + path)).text

    def count(self, address: str) -> int:
        """Return how many connections from `address` the server holds."""
        return sum(peer[0] == address for _, peer in accepted_sockets(self.port))

    async def wait_for_count(self, address: str, count: int) -> None:
        await wait_until(lambda: self.count(address) == count)

    def close(self) -> None:
        for opened in self._sockets:
            opened.close()


@contextlib.asynccontextmanager
async def running(**limits: Any) -> AsyncIterator[RunningServer]:
    """A server with these `ConnectionLimits`, to which all of loopback but 127.0.0.1 is the network."""
    app = Application()
    fields = {"total": 1000, "per_address": 0, "idle_seconds": NEVER, "shared": ("127.0.0.1/32",)} | limits
    server = HttpServer(app, ListenOptions(port=0, connections=ConnectionLimits(**fields)))
    await server.start()
    running_server = RunningServer(int(server.url.rsplit(":", 1)[1]), app)
    try:
        yield running_server
    finally:
        app.released.set()
        running_server.close()
        await server.stop()


async def test_idle_http2_connections_are_closed() -> None:
    async with running(idle_seconds=0.2) as server:
        idle = [server.connect(ATTACKER) for _ in range(20)]
        waiting = asyncio.create_task(server.get(HONEST, "/wait", http2=True))
        await server.wait_for_count(ATTACKER, 0)
        for each in idle:
            while await asyncio.to_thread(each.recv, 1000):
                pass
        # A request in progress keeps its connection for as long as it takes.
        assert server.count(HONEST) == 1
        server.app.released.set()
        assert await waiting == "answer"
        async with httpx.AsyncClient(http1=False, http2=True) as client:
            assert (await client.get(server.url)).text == "answer"
            await server.wait_for_count("127.0.0.1", 0)


async def test_peers_that_answer_no_ping_are_closed_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "PING_MILLISECONDS", 50)
    # The least that granian takes.
    monkeypatch.setattr(http_server, "PING_ANSWER_SECONDS", 1)
    async with running() as server:
        silent, answering = server.connect(ATTACKER), server.connect(HONEST)
        await server.wait_for_count(ATTACKER, 1)
        answering.setblocking(False)
        peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        peer.initiate_connection()
        peer.clear_outbound_data_buffer()
        loop, pings = asyncio.get_running_loop(), 0
        while server.count(ATTACKER):
            for event in peer.receive_data(await loop.sock_recv(answering, 1000)):
                pings += isinstance(event, h2.events.PingReceived)
            await loop.sock_sendall(answering, peer.data_to_send())
        assert pings > 1
        assert server.count(HONEST) == 1
        assert silent.recv(1000)[:3] is not None


async def test_a_new_client_is_served_while_another_holds_all_connections() -> None:
    async with running(total=16) as server:
        opened = 0
        for _ in range(6):
            for _ in range(16):
                server.connect(ATTACKER)
                opened += 1
            assert await server.get(HONEST, http2=True) == "answer"
        kept_alive = server.connect(HONEST, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await wait_until(lambda: server.count(ATTACKER) <= 15)
        assert opened == 96
        assert b"answer" in await asyncio.to_thread(kept_alive.recv, 1000)
        assert server.count(HONEST) == 1


async def test_an_address_has_its_own_bound(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "edge_runtime.common.connections")
    async with running(per_address=5) as server:
        first = server.connect(ATTACKER)
        await server.wait_for_count(ATTACKER, 1)
        await wait_for_look()
        for _ in range(12):
            server.connect(ATTACKER)
        for _ in range(7):
            server.connect(HONEST)
            server.connect("127.0.0.1")
        await server.wait_for_count(ATTACKER, 5)
        await server.wait_for_count(HONEST, 5)
        # Of connections without a request, the one that has been idle for longest goes first.
        while first.recv(1000):
            pass
        # Behind this address there may be a proxy with many clients.
        assert server.count("127.0.0.1") == 7
        await wait_until(lambda: any("5 from one address" in message for message in caplog.messages))


async def test_requests_over_the_bound_of_an_address_are_cut_the_newest_first() -> None:
    async with running(per_address=3) as server:
        early = [asyncio.create_task(server.get(ATTACKER, "/wait")) for _ in range(3)]
        await wait_until(lambda: server.app.waiting == 3)
        await wait_for_look()
        with pytest.raises(httpx.RemoteProtocolError):
            await server.get(ATTACKER, "/wait")
        # Its connection may have been closed before the request on it was read.
        waiting = server.app.waiting
        # Requests of a shared address are never cut.
        shared = [asyncio.create_task(server.get("127.0.0.1", "/wait")) for _ in range(5)]
        await wait_until(lambda: server.app.waiting == waiting + 5)
        await wait_for_look()
        server.app.released.set()
        assert await asyncio.gather(*early, *shared) == ["answer"] * 8


def connection(address: str, opened: float, *, requests: int = 0, used: float = 0.0) -> Connection:
    return Connection((address, int(opened)), 0, opened, max(opened, used), requests)


def test_a_connection_is_idle_from_the_end_of_its_last_request() -> None:
    limits = ConnectionLimits(total=9, per_address=9, idle_seconds=60.0)
    seen = [connection("192.0.2.1", 1), connection("192.0.2.1", 2, used=50.0), connection("192.0.2.1", 3, requests=1)]
    assert choose_closed(seen, limits, 60.0) == ([], [])
    assert choose_closed(seen, limits, 62.0) == ([seen[0]], [])
    assert choose_closed(seen, limits, 1e6) == (seen[:2], [])


def test_whoever_holds_most_makes_room() -> None:
    attacker = [connection("192.0.2.1", 10 + i) for i in range(8)]
    busy = [connection("192.0.2.2", i, requests=1) for i in range(4)]
    proxy = [connection("127.0.0.1", i, requests=1) for i in range(9)] + [connection("127.0.0.1", 20)]
    limits = ConnectionLimits(total=20, per_address=0)
    idle, excess = choose_closed(attacker + busy + proxy, limits, 30.0)
    # Two are too many. Half of all places become free if they can without cutting requests. The proxy holds most, and
    # then, because its requests are not cut, the attacker.
    assert (idle, excess) == ([], [proxy[-1], *attacker])
    # What has been idle for too long makes room, too.
    assert choose_closed(attacker + busy + proxy, limits, 71.0) == (attacker[:2], [])
    # Without connections that could go, the newest requests of whoever has most of them, and no more than necessary.
    assert choose_closed(busy + proxy[:-1], ConnectionLimits(total=11, per_address=0), 5.0)[1] == [busy[3], busy[2]]


def test_nothing_is_closed_within_the_bounds() -> None:
    connections_ = [connection("192.0.2.1", i) for i in range(4)]
    assert choose_closed(connections_, ConnectionLimits(total=4, per_address=4), 5.0) == ([], [])
    # Only requests of shared addresses: nothing can be closed.
    proxy = [connection("127.0.0.1", i, requests=1) for i in range(9)]
    assert choose_closed(proxy, ConnectionLimits(total=4, per_address=4), 500.0) == ([], [])


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1/128"),
    ],
)
def test_what_counts_as_one_client(address: str, network: str) -> None:
    assert client_network(address) == network


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (700, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_may_open_the_files_that_its_connections_need(few_files: None) -> None:
    assert allow_connections(500) == 500
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 700
    assert allow_connections(900) == 900
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == 1000
    assert allow_connections(hard) == hard - connections.RESERVED_FILES
