"""The emulator itself: a link holds what it is asked for, measured by sockets at its ends."""

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

from edge_runtime.simulation.links import GOOD_SPELL, PRESETS, Conduct
from tests.emulator.measuring import PAYLOAD, datagrams, losses, round_trips, throughput
from tests.emulator.network import ADDRESSES, Network, lacking
from tests.emulator.relay import Counters, Direction
from tests.emulator.weather import Spell, recorded, steady, weather


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    reason = lacking()
    if reason:
        pytest.skip(reason)
    with Network(seed=7) as made:
        yield made


def patiently(check: Callable[[], None], tries: int = 3) -> None:
    """A machine that is busy for a moment makes one measurement wrong; a wrong link makes all of them wrong."""
    for last in range(tries):
        try:
            check()
            return
        except AssertionError:
            if last == tries - 1:
                raise


@pytest.mark.parametrize("rtt", [0.005, 0.06, 0.3])
def test_the_round_trip_time_holds(network: Network, rtt: float) -> None:
    def check() -> None:
        trips = round_trips(network, 12)
        assert rtt <= trips.median < rtt + 0.004
        assert trips.low >= rtt

    network.become(steady(rtt))
    patiently(check)


def test_jitter_is_as_wide_as_asked_for(network: Network) -> None:
    def check() -> None:
        trips = round_trips(network, 60, pause=0.0)
        assert 0.020 < trips.low < 0.033 < trips.median < 0.048
        assert 0.047 < trips.high < 0.064

    network.become(steady(0.040, jitter=0.020))
    patiently(check)


@pytest.mark.slow
@pytest.mark.parametrize(("up", "down"), [(1e6, 5e6), (10e6, 20e6), (20e6, 10e6)])
def test_the_rates_hold(network: Network, up: float, down: float) -> None:
    network.become(Spell(Conduct("uneven", "lte", 0.01, 0.0, up, down)))
    patiently(lambda: _is_near(throughput(network, "board", 0.8, warm_up=0.4), up))
    patiently(lambda: _is_near(throughput(network, "cloud", 0.8, warm_up=0.4), down))


def _is_near(rate: float, wanted: float) -> None:
    assert 0.9 * wanted < rate < 1.1 * wanted


def test_packets_are_lost_by_the_share(network: Network) -> None:
    network.become(steady(0.002, loss=0.05))
    before = network.counters()
    lost = losses(network, 2000)
    # Four standard deviations of 2000 draws; what a busy receiver drops is not the link's.
    assert lost.lost >= 61
    assert 61 <= network.counters().lost - before.lost <= 139


@pytest.mark.parametrize(("burst", "low", "high"), [(1.0, 1.0, 1.2), (5.0, 4.5, 5.5)])
def test_losses_come_in_a_row(burst: float, low: float, high: float) -> None:
    direction = Direction(-1, -1, 3, counters := Counters(), up=True)
    direction.become(Spell(steady(loss=0.05).conduct, burst=burst), 0.0)
    runs, losing, count = 0, False, 40_000
    for index in range(count):
        before = counters.lost
        direction.take(b"packet", float(index))
        runs += counters.lost > before and not losing
        losing = counters.lost > before
    assert 0.045 < counters.lost / count < 0.055
    assert low < counters.lost / runs < high


def test_the_same_seed_treats_packets_the_same() -> None:
    def fates(seed: int) -> list[tuple[float, bytes]]:
        direction = Direction(-1, -1, seed, Counters(), up=True)
        direction.become(steady(0.1, jitter=0.05, loss=0.1), 0.0)
        for index in range(500):
            direction.take(b"%d" % index, index / 100)
        return list(direction.flying)

    assert fates(1) == fates(1) != fates(2)
    times = [due for due, _ in fates(1)]
    assert times == sorted(times)


def test_what_does_not_fit_the_queue_is_dropped() -> None:
    direction = Direction(-1, -1, 0, counters := Counters(), up=True)
    direction.become(msgspec.structs.replace(steady(0.0, rate=8e6), queue_bytes=10_000), 0.0)
    for _ in range(30):
        direction.take(bytes(1000), 1.0)
    assert (len(direction.flying), counters.dropped) == (10, 20)
    assert [due for due, _ in direction.flying] == pytest.approx([1 + (index + 1) / 1000 for index in range(10)])
    # Half of them have left by then.
    for _ in range(30):
        direction.take(bytes(1000), 1.0051)
    assert (len(direction.flying), counters.dropped) == (15, 45)


def test_a_recording_lets_packets_pass_when_it_did(network: Network, tmp_path: Path) -> None:
    up, down = tmp_path / "x.up", tmp_path / "x.down"
    # One packet every 20 ms up; every 2 ms down, but for a gap of 100 ms.
    up.write_text("".join(f"{time}\n" for time in range(20, 1001, 20)))
    down.write_text("".join(f"{time}\n" for time in [*range(2, 900, 2), 1000]))
    network.become(recorded(up, down, 0.01))
    rate = throughput(network, "board", 1.0, warm_up=0.5)
    # Acknowledgements take their turns, too, so the way up is all that counts.
    assert 0.8 * 50 * 1500 * 8 < rate < 1.1 * 50 * 1500 * 8


def test_presets_are_those_of_the_simulator(network: Network) -> None:
    for name in PRESETS:
        network.become(*weather(name))
    assert [spell.conduct.rtt_seconds for spell in weather("bursty")] == [0.04, 0.25]
    good, bad = Spell(GOOD_SPELL, seconds=0.5), Spell(msgspec.structs.replace(GOOD_SPELL, rtt_seconds=0.2), seconds=0.5)

    def check() -> None:
        network.become(good, bad)
        assert round_trips(network, 3).high < 0.1
        time.sleep(0.5)
        assert round_trips(network, 1).median > 0.15

    patiently(check)


def test_a_pulled_cable_passes_nothing_and_tells_nobody(network: Network) -> None:
    network.become(steady(0.002))
    with network.inside("cloud"):
        listener = socket.create_server((ADDRESSES["cloud"], 0))
    with network.inside("board"):
        board = socket.create_connection(listener.getsockname(), timeout=2)
    with listener, board, listener.accept()[0] as cloud:
        network.pull()
        board.sendall(b"first")
        cloud.settimeout(0.3)
        with pytest.raises(TimeoutError):
            cloud.recv(10)
        network.plug()
        cloud.settimeout(5)
        assert cloud.recv(10) == b"first"
        # A NAT that forgets: this connection is over, and neither end knows.
        network.forget()
        board.sendall(b"second")
        cloud.settimeout(0.5)
        with pytest.raises(TimeoutError):
            cloud.recv(10)
        with network.inside("board"):
            another = socket.create_connection(listener.getsockname(), timeout=2)
        with another, listener.accept()[0] as welcome:
            another.sendall(b"third")
            welcome.settimeout(2)
            assert welcome.recv(10) == b"third"


def test_packets_are_at_most_1500_bytes(network: Network) -> None:
    network.become(steady(0.002))
    with datagrams(network, "board") as board, datagrams(network, "cloud") as cloud:
        board.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO: do not fragment
        board.sendto(bytes(1472), cloud.getsockname())
        assert len(cloud.recv(2000)) == 1472
        with pytest.raises(OSError, match="too long"):
            board.sendto(bytes(1473), cloud.getsockname())
    assert PAYLOAD < 1


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


def test_nothing_is_left_behind_by_a_crash(network: Network) -> None:
    crashed = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True, timeout=30)
    assert crashed.returncode == -signal.SIGKILL
    left = {int(pid) for pid in crashed.stdout.split()}
    assert len(left) == 4
    end = time.monotonic() + 10
    while left := {pid for pid in left if _is_alive(pid)}:
        assert time.monotonic() < end, f"{left} live on"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_see_their_own_end_only(network: Network) -> None:
    network.become(steady(0.002))
    shown = subprocess.run(network.command("board", ["ip", "-brief", "address"]), capture_output=True, text=True)
    assert ADDRESSES["board"] in shown.stdout
    assert ADDRESSES["cloud"] not in shown.stdout
    here = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True).stdout
    assert ADDRESSES["board"] not in here
