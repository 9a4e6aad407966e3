"""TCP_INFO of real connections, compared with `ss`."""

from __future__ import annotations

import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from edge_runtime.probes.tcp import ByteMeter, TcpInfo, tcp_info

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def needs_tcp_info() -> None:
    with socket.socket() as connection:
        if tcp_info(connection) is None and platform.machine() == "aarch64":
            pytest.skip("this kernel gives no TCP_INFO; qemu-user passes none on")


@pytest.fixture
def pair(needs_tcp_info: None) -> Iterator[Pair]:
    """Two ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            yield near, far


def exchange(near: socket.socket, far: socket.socket, rounds: int = 20) -> None:
    for _ in range(rounds):
        near.sendall(b"x" * 200)
        assert len(far.recv(200, socket.MSG_WAITALL)) == 200
        far.sendall(b"y" * 50)
        assert len(near.recv(50, socket.MSG_WAITALL)) == 50


def settled(connection: socket.socket) -> TcpInfo:
    """Wait until everything is acknowledged: at most one delayed acknowledgement."""
    for _ in range(100):
        info = tcp_info(connection)
        assert info is not None
        if info.bytes_acked >= info.bytes_sent:
            return info
        time.sleep(0.01)
    raise AssertionError(info)


def test_counts(pair: Pair) -> None:
    near, far = pair
    exchange(near, far)
    info = settled(near)
    assert (info.bytes_sent, info.bytes_received) == (4000, 1000)
    # The opening segment counts as one byte.
    assert info.bytes_acked == 4001
    assert info.retransmits == 0
    assert 0 < info.rtt_seconds < 0.5
    assert info.min_rtt_seconds is not None and 0 < info.min_rtt_seconds < 0.5
    # The kernel counts in microseconds, of which a loopback's round trips may all take one.
    assert 0 <= info.rtt_variation_seconds < 0.5
    assert info.delivery_rate is not None and info.delivery_rate > 1000
    assert info.busy_seconds >= 0


def test_the_figures_equal_those_of_ss(pair: Pair) -> None:
    if shutil.which("ss") is None:
        pytest.skip("needs ss (iproute2)")
    near, far = pair
    exchange(near, far)
    before = settled(near)
    filters = ["sport", "=", f":{near.getsockname()[1]}", "dport", "=", f":{near.getpeername()[1]}"]
    said = subprocess.run(["ss", "-tinH", *filters], capture_output=True, text=True, check=True).stdout
    # Nothing moved in between, so both saw the same.
    assert tcp_info(near) == before

    def value(pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, said)
        assert match is not None, said
        return match.groups()

    rtt, variation = (float(number) for number in value(r" rtt:([0-9.]+)/([0-9.]+)"))
    assert before.rtt_seconds * 1e3 == pytest.approx(rtt, abs=0.001)
    assert before.rtt_variation_seconds * 1e3 == pytest.approx(variation, abs=0.001)
    assert before.min_rtt_seconds is not None
    assert before.min_rtt_seconds * 1e3 == pytest.approx(float(*value(r"minrtt:([0-9.]+)")), abs=0.001)
    assert before.bytes_sent == int(*value(r"bytes_sent:(\d+)"))
    assert before.bytes_acked == int(*value(r"bytes_acked:(\d+)"))
    assert before.bytes_received == int(*value(r"bytes_received:(\d+)"))
    number, unit = value(r"delivery_rate ([0-9.]+)([KMGT]?)bps")
    assert before.delivery_rate is not None
    assert before.delivery_rate * 8 == pytest.approx(
        float(number) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit], rel=0.01
    )
    if "busy:" in said:
        assert before.busy_seconds * 1e3 == pytest.approx(float(*value(r"busy:([0-9.]+)ms")), abs=1.0)


@pytest.mark.slow
def test_retransmits_are_those_of_the_kernel() -> None:
    """Segments to a peer whose full queue makes the kernel drop the handshake's end are sent again."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        first = socket.create_connection(server.getsockname())
        second = socket.socket()
        second.setblocking(False)
        second.connect_ex(server.getsockname())
        with first, second:
            deadline = time.monotonic() + 5
            info = tcp_info(second)
            while info is not None and info.retransmits == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
                info = tcp_info(second)
    assert info is not None and info.retransmits >= 1


@pytest.mark.usefixtures("needs_tcp_info")
def test_before_anything_was_sent() -> None:
    with socket.socket() as connection:
        info = tcp_info(connection)
    assert info is not None
    assert info.min_rtt_seconds is None
    assert info.delivery_rate is None


def test_closed_and_other_sockets() -> None:
    connection = socket.socket()
    connection.close()
    assert tcp_info(connection) is None
    with socket.socket(socket.AF_UNIX) as local:
        assert tcp_info(local) is None


async def test_meter_of_an_http_client(pair: Pair) -> None:
    """The newest connection's figures and address; none once it is closed."""
    meter = ByteMeter()
    assert meter.info is None and meter.peer is None and meter.rtt_seconds is None

    class Stream:
        def get_extra_info(self, _: str) -> socket.socket:
            return pair[0]

    await meter.trace("connection.connect_tcp.complete", {"return_value": Stream()})
    exchange(*pair)
    info = meter.info
    assert info is not None and info.bytes_sent == 4000
    assert meter.peer == "127.0.0.1"
    assert meter.take() == (4000, 1000)
    assert meter.take() == (0, 0)
    pair[0].close()
    assert meter.info is None and meter.peer is None
    assert meter.take() == (0, 0)


@pytest.mark.usefixtures("needs_tcp_info")
async def test_meter_follows_a_real_client() -> None:
    import asyncio

    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    meter = ByteMeter()
    async with server, httpx.AsyncClient() as client:
        port = server.sockets[0].getsockname()[1]
        await client.get(f"http://127.0.0.1:{port}/", extensions={"trace": meter.trace})
        info = meter.info
        assert info is not None
        assert info.bytes_received == len(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        assert info.bytes_sent > 50
        assert meter.peer == "127.0.0.1"
        assert meter.rtt_seconds == info.rtt_seconds
