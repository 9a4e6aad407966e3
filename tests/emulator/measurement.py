"""Measures round-trip time, throughput and loss of a link with plain sockets at its two ends."""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import threading
import time
from typing import NamedTuple

from tests.emulator.control import on_time
from tests.emulator.network import ADDRESSES, Network, Side

# Share of payload in a full TCP segment with timestamps: 1448 of 1500 bytes.
PAYLOAD_SHARE = 1448 / 1500


class RoundTrips(NamedTuple):
    """Round-trip times in seconds: the median, and the 5 % and 95 % quantiles."""

    median: float
    low: float
    high: float


class Loss(NamedTuple):
    """Number of packets sent and lost. `run`: mean number of packets lost in a row."""

    sent: int
    lost: int
    run: float


def open_udp_socket(network: Network, side: Side) -> socket.socket:
    """Open a UDP socket with a timeout of one second at one end."""
    with network.inside(side):
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((ADDRESSES[side], 0))
    opened.settimeout(1.0)
    return opened


def measure_round_trips(network: Network, count: int = 100, pause: float = 0.005) -> RoundTrips:
    """Measure `count` echoes one after the other; lost ones are left out."""
    with open_udp_socket(network, "board") as board, open_udp_socket(network, "cloud") as cloud, on_time():
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


def measure_throughput(network: Network, sender: Side, seconds: float = 2.0, *, warm_up: float = 1.0) -> float:
    """Return the rate in bits per second, headers included, of one TCP connection after `warm_up` seconds."""
    receiver: Side = "cloud" if sender == "board" else "board"
    with network.inside(receiver):
        listener = socket.create_server((ADDRESSES[receiver], 0))
    with listener, network.inside(sender):
        source = socket.create_connection(listener.getsockname(), timeout=300)
        sink, _ = listener.accept()
    sink.settimeout(300)
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
    return 8 * received / taken / PAYLOAD_SHARE


def measure_packet_rate(network: Network, sender: Side, start: float, end: float, per_second: float) -> float:
    """Return how many packets arrive in a second between two times (`time.monotonic`) if more are sent than can pass.

    TCP does not fill a link whose rate changes, so that it says little about one.
    """
    receiver: Side = "cloud" if sender == "board" else "board"
    arrived = 0
    with open_udp_socket(network, sender) as source, open_udp_socket(network, receiver) as sink:
        there, began = sink.getsockname(), time.monotonic()

        def send() -> None:
            for number in itertools.count():
                time.sleep(max(0.0, began + number / per_second - time.monotonic()))
                if time.monotonic() > end:
                    return
                source.sendto(bytes(1400), there)

        sending = threading.Thread(target=send)
        sending.start()
        while (now := time.monotonic()) < end:
            # Recorded links may let nothing pass for seconds.
            with contextlib.suppress(TimeoutError):
                sink.recv(2048)
                arrived += start <= now
        sending.join()
    return arrived / (end - start)


def measure_loss(network: Network, count: int = 3000, per_second: float = 3000) -> Loss:
    """Count the small datagrams that are lost on their way from the board to the cloud."""
    with open_udp_socket(network, "board") as board, open_udp_socket(network, "cloud") as cloud:
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
