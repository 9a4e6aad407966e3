"""All probes together: periods, reports, and the readings for the planner."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest

from edge_runtime.planning.plan import Surroundings
from edge_runtime.probes.battery import Supply
from edge_runtime.probes.reader import ProbeError, Reader, Roots
from edge_runtime.probes.route import Metering, Route
from edge_runtime.probes.snapshot import Prober, ScheduledProbe, Snapshot
from edge_runtime.probes.tcp import TcpInfo
from tests.edge_runtime.probes.conftest import BOARDS, Tree, roots_of


class Counting:
    """Runs recorded programs and counts them."""

    def __init__(self, board: Path) -> None:
        self.runs: Counter[str] = Counter()
        self._recorded = roots_of(board).run

    def __call__(self, arguments: tuple[str, ...]) -> bytes | None:
        self.runs[arguments[0]] += 1
        return self._recorded(arguments)


def test_programs_run_once_a_minute_and_files_are_read_every_time() -> None:
    board = BOARDS / "jetson-orin-nano"
    counting = Counting(board)
    now = [0.0]
    prober = Prober(Roots(board / "sysfs", board / "procfs", counting), clock=lambda: now[0])
    first = prober.take()
    assert counting.runs == {"mmcli": 2, "nmcli": 1}
    for _ in range(11):
        now[0] += 5.0
        assert prober.take().modem == first.modem
    assert counting.runs == {"mmcli": 2, "nmcli": 1}
    now[0] += 5.0
    snapshot = prober.take()
    assert counting.runs == {"mmcli": 4, "nmcli": 2}
    assert snapshot.probes["sensors"].readings == 13 and snapshot.probes["modem"].readings == 2
    assert prober.latest is snapshot


def test_a_bug_in_a_probe_is_counted_and_survived() -> None:
    def wrong(reader: Reader) -> int:
        raise KeyError("oops")

    scheduled = ScheduledProbe(Roots(), 0.0, wrong)
    assert scheduled.read(0.0) is None and scheduled.read(1.0) is None
    assert (scheduled.report.readings, scheduled.report.failures) == (2, 2)
    assert scheduled.report.errors == ["unexpected KeyError: 'oops'; please report it"]


def test_failures_add_up_and_end(tree: Tree) -> None:
    path = "sysfs/class/thermal/thermal_zone0/temp"
    prober = Prober(tree({path: "hot"}))
    prober.take()
    report = prober.take().probes["thermal"]
    assert (report.readings, report.failures) == (2, 2) and "not a whole number: 'hot'" in report.errors[0]
    tree({path: "42000"})
    report = prober.take().probes["thermal"]
    assert (report.readings, report.failures, report.errors) == (3, 2, [])


def test_a_snapshot_goes_through_json() -> None:
    snapshot = Prober(roots_of(BOARDS / "laptop")).take()
    assert msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot) == snapshot


def test_surroundings_of_a_board() -> None:
    snapshot = Prober(roots_of(BOARDS / "ups-hat")).take()
    surroundings = snapshot.surroundings(TcpInfo(1, 2, 0.055))
    assert surroundings == Surroundings(
        rtt_seconds=0.055,
        joules_left=pytest.approx(3.843 * 3.791 * 3600),
        watts=3.928,
        on_battery=True,
        throttled=False,
        celsius=48.199,
        metered=None,
        battery_percent=63.0,
    )
    assert snapshot.surroundings().rtt_seconds is None


def test_metering_of_another_interface_is_ignored() -> None:
    snapshot = msgspec.structs.replace(
        Prober(roots_of(BOARDS / "raspberry-pi-4")).take(), metering=Metering("wlan0", True)
    )
    assert snapshot.surroundings().metered is True
    moved = msgspec.structs.replace(snapshot, route=Route("wwan0", None, 4))
    assert moved.surroundings().metered is None


def test_a_route_to_the_verifier_of_its_own() -> None:
    roots = roots_of(BOARDS / "laptop")
    assert Prober(roots, host=ip_address("192.168.0.7")).take().route == Route("wlp0s20f3", None, 4)


def test_an_empty_supply_is_not_a_battery() -> None:
    assert Supply([], None).on_battery is None


async def test_run_refreshes_in_another_thread() -> None:
    threads = []
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run(arguments: tuple[str, ...]) -> bytes | None:
        threads.append(threading.current_thread())
        if len(threads) > 8:
            loop.call_soon_threadsafe(enough.set)
        raise ProbeError("no programs here")

    board = BOARDS / "raspberry-pi-4"
    prober = Prober(Roots(board / "sysfs", board / "procfs", run), period=0.01, program_period=0.0)
    task = asyncio.create_task(prober.run())
    await enough.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert threading.main_thread() not in threads
    assert prober.latest is not None
    report = prober.latest.probes["stations"]
    assert report.readings > 1 and report.failures == report.readings and report.errors == ["no programs here"]
