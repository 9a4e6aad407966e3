"""What a link really does, by plain sockets at its two ends."""

from __future__ import annotations

import itertools
import socket
import statistics
import threading
import time
from typing import NamedTuple

from tests.emulator.network import ADDRESSES, Network, Side

# Of a TCP segment with timestamps, in a packet of 1500 bytes.
PAYLOAD = 1448 / 1500


class RoundTrips(NamedTuple):
    """Seconds. `low` and `high` hold nine tenths of them between them."""

    median: float
    low: float
    high: float


class Loss(NamedTuple):
    """`run`: packets lost in a row, on average."""

    sent: int
    lost: int
    run: float


def datagrams(network: Network, side: Side) -> socket.socket:
    """A UDP socket at that end, which waits at most a second for anything."""
    with network.inside(side):
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((ADDRESSES[side], 0))
    opened.settimeout(1.0)
    return opened


def round_trips(network: Network, count: int = 100, pause: float = 0.005) -> RoundTrips:
    """Times of an echo, one after the other; those that were lost are not among them."""
    with datagrams(network, "board") as board, datagrams(network, "cloud") as cloud:
        there, times = cloud.getsockname(), []
        for number in range(count):
            message = number.to_bytes(4, "big")
            started = time.perf_counter()
            board.sendto(message, there)
            try:
                while True:
                    received, back = cloud.recvfrom(64)
                    cloud.sendto(received, back)
                    if board.recv(64) == message:
                        break
            except TimeoutError:
                continue
            times.append(time.perf_counter() - started)
            time.sleep(pause)
    *_, low = sorted(times)[: 1 + len(times) // 20]
    high, *_ = sorted(times)[-1 - len(times) // 20 :]
    return RoundTrips(statistics.median(times), low, high)


def throughput(network: Network, sender: Side, seconds: float = 2.0, *, warm_up: float = 1.0) -> float:
    """Bits per second of the link that one TCP connection fills, headers counted, once it is up to speed."""
    receiver: Side = "cloud" if sender == "board" else "board"
    with network.inside(receiver):
        listener = socket.create_server((ADDRESSES[receiver], 0))
    with listener, network.inside(sender):
        source = socket.create_connection(listener.getsockname(), timeout=10)
        sink, _ = listener.accept()
    sink.settimeout(10)
    stopping = threading.Event()

    def send() -> None:
        while not stopping.is_set():
            source.sendall(bytes(16384))

    sending = threading.Thread(target=send)
    with source, sink:
        sending.start()
        end = time.perf_counter() + warm_up
        while time.perf_counter() < end:
            sink.recv(1 << 16)
        started, received = time.perf_counter(), 0
        while time.perf_counter() < started + seconds:
            received += len(sink.recv(1 << 16))
        taken = time.perf_counter() - started
        stopping.set()
        while sending.is_alive():
            sink.recv(1 << 16)
    return 8 * received / taken / PAYLOAD


def losses(network: Network, count: int = 3000, per_second: float = 3000) -> Loss:
    """What becomes of small datagrams from the board to the cloud."""
    with datagrams(network, "board") as board, datagrams(network, "cloud") as cloud:
        there, arrived = cloud.getsockname(), set()
        started = time.perf_counter()

        def receive() -> None:
            try:
                while True:
                    arrived.add(int.from_bytes(cloud.recv(64), "big"))
            except TimeoutError:
                return

        receiving = threading.Thread(target=receive)
        receiving.start()
        for number in range(count):
            time.sleep(max(0.0, started + number / per_second - time.perf_counter()))
            board.sendto(number.to_bytes(4, "big"), there)
        receiving.join()
    runs = [len(list(run)) for lost, run in itertools.groupby(number not in arrived for number in range(count)) if lost]
    return Loss(count, count - len(arrived), statistics.mean(runs) if runs else 0.0)
