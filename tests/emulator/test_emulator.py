"""Tests of the emulator: the link conforms to its conditions, measured by sockets at its ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edge_runtime.simulation.links import BURSTY_GOOD, PRESET_NAMES, LinkParameters
from tests.emulator.link_conditions import LinkConditions, preset_conditions, recorded_conditions, steady_conditions
from tests.emulator.measurement import (
    PAYLOAD_SHARE,
    measure_loss,
    measure_round_trips,
    measure_throughput,
    open_udp_socket,
)
from tests.emulator.network import ADDRESSES, Network, missing_requirement
from tests.emulator.relay import Counters, Direction


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    reason = missing_requirement()
    if reason:
        pytest.skip(reason)
    with Network(seed=7) as network:
        yield network


def retry(check: Callable[[], None], tries: int = 3) -> None:
    """Run a check up to `tries` times: a busy machine spoils one measurement, a wrong link all of them."""
    for attempt in range(tries):
        try:
            check()
            return
        except AssertionError:
            if attempt == tries - 1:
                raise


@pytest.mark.slow
@pytest.mark.parametrize("rtt", [0.005, 0.06, 0.3])
def test_round_trip_time(network: Network, rtt: float) -> None:
    def check() -> None:
        trips = measure_round_trips(network, 6)
        assert rtt <= trips.median < rtt + 0.004
        assert trips.low >= rtt

    network.set_conditions(steady_conditions(rtt))
    retry(check)


@pytest.mark.slow
def test_jitter_has_the_configured_width(network: Network) -> None:
    def check() -> None:
        trips = measure_round_trips(network, 60, pause=0.0)
        assert 0.020 < trips.low < 0.033 < trips.median < 0.048
        assert 0.047 < trips.high < 0.064

    network.set_conditions(steady_conditions(0.040, jitter=0.020))
    retry(check)


@pytest.mark.slow
@pytest.mark.parametrize(("up", "down"), [(1e6, 5e6), (20e6, 10e6)])
def test_rates(network: Network, up: float, down: float) -> None:
    network.set_conditions(
        LinkConditions(
            LinkParameters(name="uneven", radio="lte", rtt_seconds=0.01, jitter_seconds=0.0, up_rate=up, down_rate=down)
        )
    )
    retry(lambda: _is_near(measure_throughput(network, "board", 0.8, warm_up=0.4), up))
    retry(lambda: _is_near(measure_throughput(network, "cloud", 0.8, warm_up=0.4), down))


def _is_near(rate: float, expected: float) -> None:
    assert 0.9 * expected < rate < 1.1 * expected


@pytest.mark.slow
def test_share_of_lost_packets(network: Network) -> None:
    network.set_conditions(steady_conditions(0.002, loss=0.05))
    before = network.counters()
    lost = measure_loss(network, 2000)
    # Within four standard deviations of 2000 draws. The receiver may drop more if it is busy, hence no upper bound for
    # it.
    assert lost.lost >= 61
    assert 61 <= network.counters().lost - before.lost <= 139


@pytest.mark.parametrize(("burst", "low", "high"), [(1.0, 1.0, 1.2), (5.0, 4.5, 5.5)])
def test_mean_length_of_loss_bursts(burst: float, low: float, high: float) -> None:
    direction = Direction(-1, -1, 3, counters := Counters(), up=True)
    direction.set_conditions(LinkConditions(steady_conditions(loss=0.05).link, burst=burst), 0.0)
    runs, losing, count = 0, False, 40_000
    for index in range(count):
        before = counters.lost
        direction.take(b"packet", float(index))
        runs += counters.lost > before and not losing
        losing = counters.lost > before
    assert 0.045 < counters.lost / count < 0.055
    assert low < counters.lost / runs < high


def test_same_seed_gives_the_same_fates() -> None:
    def fates(seed: int) -> list[tuple[float, bytes]]:
        direction = Direction(-1, -1, seed, Counters(), up=True)
        direction.set_conditions(steady_conditions(0.1, jitter=0.05, loss=0.1), 0.0)
        for index in range(500):
            direction.take(b"%d" % index, index / 100)
        return list(direction.flying)

    assert fates(1) == fates(1) != fates(2)
    times = [due for due, _ in fates(1)]
    assert times == sorted(times)


def test_full_queue_drops_packets() -> None:
    direction = Direction(-1, -1, 0, counters := Counters(), up=True)
    direction.set_conditions(msgspec.structs.replace(steady_conditions(0.0, rate=8e6), queue_bytes=10_000), 0.0)
    for _ in range(30):
        direction.take(bytes(1000), 1.0)
    assert (len(direction.flying), counters.dropped) == (10, 20)
    assert [due for due, _ in direction.flying] == pytest.approx([1 + (index + 1) / 1000 for index in range(10)])
    # Half of the queue has been sent by then.
    for _ in range(30):
        direction.take(bytes(1000), 1.0051)
    assert (len(direction.flying), counters.dropped) == (15, 45)


@pytest.mark.slow
def test_trace_sets_the_delivery_times(network: Network, tmp_path: Path) -> None:
    up, down = tmp_path / "x.up", tmp_path / "x.down"
    # One packet every 20 ms up, and every 2 ms down except for a gap of 100 ms.
    up.write_text("".join(f"{time}\n" for time in range(20, 1001, 20)))
    down.write_text("".join(f"{time}\n" for time in [*range(2, 900, 2), 1000]))
    network.set_conditions(recorded_conditions(up, down, 0.01))
    rate = measure_throughput(network, "board", 1.0, warm_up=0.5)
    # Acknowledgements use delivery opportunities, too, so only the upload is checked.
    assert 0.8 * 50 * 1500 * 8 < rate < 1.1 * 50 * 1500 * 8


@pytest.mark.slow
def test_presets_match_the_simulator(network: Network) -> None:
    for name in PRESET_NAMES:
        network.set_conditions(*preset_conditions(name))
    assert [conditions.link.rtt_seconds for conditions in preset_conditions("bursty")] == [0.04, 0.25]
    good, bad = (
        LinkConditions(BURSTY_GOOD, seconds=0.5),
        LinkConditions(msgspec.structs.replace(BURSTY_GOOD, rtt_seconds=0.2), seconds=0.5),
    )

    def check() -> None:
        network.set_conditions(good, bad)
        assert measure_round_trips(network, 3).high < 0.1
        time.sleep(0.5)
        assert measure_round_trips(network, 1).median > 0.15

    retry(check)


@pytest.mark.slow
def test_unplugged_link_drops_packets_silently(network: Network) -> None:
    network.set_conditions(steady_conditions(0.002))
    with network.inside("cloud"):
        listener = socket.create_server((ADDRESSES["cloud"], 0))
    with network.inside("board"):
        board = socket.create_connection(listener.getsockname(), timeout=300)
    with listener, board, listener.accept()[0] as cloud:
        network.unplug()
        board.sendall(b"first")
        cloud.settimeout(0.3)
        with pytest.raises(TimeoutError):
            cloud.recv(10)
        network.replug()
        cloud.settimeout(300)
        assert cloud.recv(10) == b"first"
        # A NAT that lost its state: the connection is dead, and neither end is notified.
        network.forget_connections()
        board.sendall(b"second")
        cloud.settimeout(0.5)
        with pytest.raises(TimeoutError):
            cloud.recv(10)
        with network.inside("board"):
            another = socket.create_connection(listener.getsockname(), timeout=300)
        with another, listener.accept()[0] as accepted:
            another.sendall(b"third")
            accepted.settimeout(300)
            assert accepted.recv(10) == b"third"


def test_packets_are_at_most_1500_bytes(network: Network) -> None:
    network.set_conditions(steady_conditions(0.002))
    with open_udp_socket(network, "board") as board, open_udp_socket(network, "cloud") as cloud:
        board.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO: do not fragment
        board.sendto(bytes(1472), cloud.getsockname())
        assert len(cloud.recv(2000)) == 1472
        with pytest.raises(OSError, match="too long"):
            board.sendto(bytes(1473), cloud.getsockname())
    assert PAYLOAD_SHARE < 1


CRASHING = """
import os, signal, subprocess
from tests.emulator.network import Network
network = Network().__enter__()
command = network.command("board", ["sh", "-c", "echo running; exec sleep 600"])
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, network.relay.process.pid, *network._holders.values(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_crash_leaves_no_processes(network: Network) -> None:
    crashed = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True, timeout=300)
    assert crashed.returncode == -signal.SIGKILL
    alive = {int(pid) for pid in crashed.stdout.split()}
    assert len(alive) == 4
    end = time.monotonic() + 300
    while alive := {pid for pid in alive if _is_alive(pid)}:
        assert time.monotonic() < end, f"{alive} still running"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_see_only_their_own_end(network: Network) -> None:
    network.set_conditions(steady_conditions(0.002))
    shown = subprocess.run(network.command("board", ["ip", "-brief", "address"]), capture_output=True, text=True)
    assert ADDRESSES["board"] in shown.stdout
    assert ADDRESSES["cloud"] not in shown.stdout
    here = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True).stdout
    assert ADDRESSES["board"] not in here
