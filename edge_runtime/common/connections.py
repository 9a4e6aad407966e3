"""Bounds the connections to a server: how many are open, from whom, and for how long without a request.

The HTTP server accepts connections in compiled code that offers no such bounds, so a thread looks after the sockets of
this process from outside: it lists them several times a second and shuts down those over a bound. Which of them have
requests in progress is known from the ASGI application, which `ConnectionGuard` wraps.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import ipaddress
import logging
import os
import resource
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

# `cloud-verifier --help` reads the defaults below.
if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

# Seconds between two looks at the connections: the first while fewer than half of the bound are open, the second
# otherwise. A new client may have to wait this long until a place is made for it. A look costs about 15 us per
# descriptor.
RELAXED_SECONDS, BUSY_SECONDS = 1.0, 0.1
# Share of a processor that the looks may take at most; with very many connections they become rarer. Chosen.
DUTY = 0.05
# A connection without a request is closed after this time. Chosen: a new one costs a client two or three round trips.
IDLE_SECONDS = 60.0
# Connections that the server accepts beyond `ConnectionLimits.total`, as a share of it, until the next look closes as
# many: meanwhile a new client is served instead of left in the queue. Chosen.
BURST = 0.25
# Approximate number of file descriptors that a process needs in addition to its connections.
RESERVED_FILES = 100
FEWEST_CONNECTIONS = 16
# Share of `ConnectionLimits.total` that is free after connections had to be closed, as far as that cuts no request: a
# client that reopens its closed connections at once would otherwise take each place before others do. Chosen.
SPARE = 0.5
# Seconds between two log lines about connections that were closed because of a bound.
LOG_SECONDS = 60.0
# Neighbors in an IPv6 network of this prefix length are usually one client, which can use every address in it.
IPV6_CLIENT_BITS = 64

# This machine.
DEFAULT_SHARED = ("127.0.0.0/8", "::1/128")

Peer = tuple[str, int]


class ConnectionLimits(msgspec.Struct, frozen=True):
    """Bounds on the connections to a server.

    Attributes:
        total: connections at once; fewer if this process may not open as many files.
        per_address: connections at once from one IPv4 address or one IPv6 network of 64 bits; 0 for no such bound.
        idle_seconds: a connection without a request in progress is closed after this time.
        shared: networks whose addresses stand for many clients, so that `per_address` does not apply to them and no
            request of theirs is cut: by default this machine, where a reverse proxy may run.
    """

    total: int
    per_address: int
    idle_seconds: float = IDLE_SECONDS
    shared: tuple[str, ...] = DEFAULT_SHARED


# For a verifier; a board has its settings. Chosen: a fleet of which many boards share an address (NAT). An idle HTTP/2
# connection takes 15 KB.
DEFAULT_CONNECTIONS = ConnectionLimits(total=2048, per_address=256)


class Connection(msgspec.Struct, frozen=True):
    """One accepted connection at the time of a look.

    Attributes:
        peer: address and port of the other end.
        inode: of the socket; tells it from an earlier connection of the same peer.
        opened: when it was first seen, on the monotonic clock.
        used: when its last request ended; `opened` if there was none.
        requests: those in progress.
    """

    peer: Peer
    inode: int
    opened: float
    used: float
    requests: int


class _Activity:
    """Requests of one peer: those in progress, and when the last one ended."""

    def __init__(self) -> None:
        self.requests = 0
        self.used = 0.0


class ConnectionGuard:
    """An ASGI application around another one that closes connections over their bounds while it watches a port."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits) -> None:
        self._app = app
        self._limits = limits
        # Held only for a few instructions: the event loop takes it twice per request.
        self._lock = threading.Lock()
        self._activities: dict[Peer, _Activity] = {}
        self._opened: dict[tuple[Peer, int], float] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._logged = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] != "http" or not client:
            await self._app(scope, receive, send)
            return
        with self._lock:
            activity = self._activities.setdefault((client[0], int(client[1])), _Activity())
            activity.requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            with self._lock:
                activity.requests -= 1
                activity.used = time.monotonic()

    def watch(self, port: int) -> None:
        """Start to look after the connections that this process accepts on `port`."""
        self._thread = threading.Thread(target=self._run, args=(port,), name=f"connections-{port}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def enforce(self, port: int) -> int:
        """Close the connections on `port` that are over a bound. Return how many are open."""
        now = time.monotonic()
        connections = []
        for accepted, peer in accepted_sockets(port):
            inode = os.fstat(accepted.fileno()).st_ino
            opened = self._opened.setdefault((peer, inode), now)
            activity = self._activities.get(peer)
            requests, used = (activity.requests, activity.used) if activity else (0, 0.0)
            connections.append(Connection(peer, inode, opened, max(opened, used), requests))
        self._forget_closed(connections)
        idle, excess = choose_closed(connections, self._limits, now)
        closed = {(each.peer, each.inode) for each in (*idle, *excess)}
        if closed:
            for accepted, peer in accepted_sockets(port):
                if (peer, os.fstat(accepted.fileno()).st_ino) in closed:
                    # The peer may have closed it meanwhile.
                    with contextlib.suppress(OSError):
                        accepted.shutdown(socket.SHUT_RDWR)
        if excess and now - self._logged > LOG_SECONDS:
            self._logged = now
            limits = self._limits
            log.warning(
                "closed %d connections, the last one from %s: at most %d are open at once, %d from one address",
                len(excess),
                excess[-1].peer[0],
                limits.total,
                limits.per_address or limits.total,
            )
        return len(connections) - len(closed)

    def _forget_closed(self, connections: list[Connection]) -> None:
        present = {(each.peer, each.inode) for each in connections}
        self._opened = {key: opened for key, opened in self._opened.items() if key in present}
        peers = {peer for peer, _ in present}
        with self._lock:
            for peer in [peer for peer, each in self._activities.items() if not each.requests and peer not in peers]:
                del self._activities[peer]

    def _run(self, port: int) -> None:
        pause = BUSY_SECONDS
        while not self._stopping.wait(pause):
            started = time.thread_time()
            try:
                busy = 2 * self.enforce(port) > self._limits.total
            except Exception:
                # Without the thread there would be no bounds until the next restart.
                log.exception("could not look after the connections")
                busy = False
            pause = max(BUSY_SECONDS if busy else RELAXED_SECONDS, (time.thread_time() - started) / DUTY)


def choose_closed(
    connections: list[Connection], limits: ConnectionLimits, now: float
) -> tuple[list[Connection], list[Connection]]:
    """Return the connections that have been idle for too long, and those that are too many.

    Of an address over its bound, the connections without a request are closed first, the one that has been idle for
    longest before the others, then the newest ones. If there are too many in total, the address that holds most loses
    one, and so on until there is room to spare, so that one client cannot keep others out; requests are cut only if
    every connection has one.
    """
    idle, groups = [], defaultdict(list)
    for each in connections:
        if not each.requests and now - each.used >= limits.idle_seconds:
            idle.append(each)
        else:
            groups[client_network(each.peer[0])].append(each)
    excess: list[Connection] = []
    # Of each network: how many connections stay, and which of these would be closed next, the first one last.
    stay, unused, in_use = {}, {}, {}
    for network, group in groups.items():
        is_shared = _is_shared(network, limits.shared)
        unused[network] = sorted((each for each in group if not each.requests), key=lambda each: -each.used)
        in_use[network] = sorted(
            (each for each in group if each.requests and not is_shared), key=lambda each: each.opened
        )
        stay[network] = len(group)
        while not is_shared and limits.per_address and stay[network] > limits.per_address:
            excess.append((unused[network] or in_use[network]).pop())
            stay[network] -= 1
    too_many, before = sum(stay.values()) - limits.total, len(excess)
    spare = int(limits.total * SPARE) if too_many > 0 else 0
    for candidates, wanted in ((unused, too_many + spare), (in_use, too_many)):
        heap = [(-stay[network], network) for network, group in candidates.items() if group]
        heapq.heapify(heap)
        while len(excess) < before + wanted and heap:
            _, network = heap[0]
            excess.append(candidates[network].pop())
            stay[network] -= 1
            if candidates[network]:
                heapq.heapreplace(heap, (-stay[network], network))
            else:
                heapq.heappop(heap)
    return idle, excess


def accepted_sockets(port: int) -> Iterator[tuple[socket.socket, Peer]]:
    """Yield the connections that this process has accepted on `port`; each is valid until the next."""
    for own in own_sockets():
        # A connection that was reset has no peer.
        with contextlib.suppress(OSError):
            if own.getsockname()[1] == port:
                yield own, own.getpeername()[:2]


def own_sockets() -> Iterator[socket.socket]:
    """Yield all TCP sockets of this process; each is valid until the next.

    They are duplicates: what is done to one reaches the socket that was looked at, even if its owner, in another
    thread, closes it and the number of its descriptor is used again.
    """
    for link in Path("/proc/self/fd").iterdir():
        try:
            # To close a duplicate of a locked file would drop this process's locks on it (fcntl(2)).
            if not str(link.readlink()).startswith("socket:"):
                continue
            own = _duplicate_socket(int(link.name))
        except OSError:
            # It is closed already.
            continue
        with own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                yield own


def _duplicate_socket(number: int) -> socket.socket:
    duplicate = os.dup(number)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def allow_connections(wanted: int) -> int:
    """Let this process open enough files for `wanted` connections. Return how many it can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + RESERVED_FILES:
        soft = wanted + RESERVED_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + RESERVED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted + RESERVED_FILES:
            log.warning("%d connections need more files than this process may open (%d): fewer", wanted, soft)
    return wanted if soft == resource.RLIM_INFINITY else max(FEWEST_CONNECTIONS, min(wanted, soft - RESERVED_FILES))


@functools.lru_cache(4096)
def client_network(address: str) -> str:
    """Return the addresses that `address` counts with: itself, or its IPv6 network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return f"{ip.ipv4_mapped}/32"
        bits = 128 if ip.is_loopback else IPV6_CLIENT_BITS
        return str(ipaddress.IPv6Network((ip, bits), strict=False))
    return f"{ip}/32"


def client_group(peer: Peer, shared: tuple[str, ...]) -> str:
    """Return what a connection counts with: its network, or itself if that network stands for many clients."""
    network = client_network(peer[0])
    return f"{peer[0]} {peer[1]}" if _is_shared(network, shared) else network


@functools.lru_cache(4096)
def _is_shared(network: str, shared: tuple[str, ...]) -> bool:
    one = ipaddress.ip_network(network)
    networks = map(ipaddress.ip_network, shared)
    return any(one.version == each.version and one.subnet_of(each) for each in networks)  # type: ignore[arg-type]
