"""Temperatures, throttling, speed and load."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from edge_runtime.probes.processor import ProcessorProbe, parse_times
from edge_runtime.probes.reader import Reader, Roots
from edge_runtime.probes.thermal import Zone, read_thermal
from edge_runtime.probes.throttling import Throttling, ThrottlingProbe, merged, throttling_of

Make = Callable[..., Reader]
FLAGS = "sysfs/devices/platform/{}/get_throttled"


def zone(number: int, kind: str, millidegrees: int) -> dict[str, str]:
    base = f"sysfs/class/thermal/thermal_zone{number}"
    return {f"{base}/type": kind + "\n", f"{base}/temp": f"{millidegrees}\n"}


def test_the_processor_is_the_hottest_of_its_own_zones(reader: Make) -> None:
    at = reader(zone(0, "gpu-thermal", 90_000) | zone(1, "cpu0-thermal", 50_000) | zone(2, "cpu1-thermal", 60_500))
    thermal = read_thermal(at)
    assert thermal is not None and thermal.celsius == 60.5 and len(thermal.zones) == 3


def test_unknown_zones_are_not_taken_for_the_processor(reader: Make) -> None:
    thermal = read_thermal(reader(zone(0, "battery", 31_000)))
    assert thermal is not None and thermal.celsius is None and thermal.zones == [Zone("battery", 31.0)]


def test_an_implausible_reading_is_counted_as_an_error(reader: Make) -> None:
    at = reader(zone(0, "cpu-thermal", -273_000))
    assert read_thermal(at) is None
    assert "-273 degrees" in at.errors[0]


@pytest.mark.parametrize("place", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware", "soc:firmware"])
def test_throttling_flags_at_every_known_path(place: str, reader: Make) -> None:
    throttling = ThrottlingProbe().read(reader({FLAGS.format(place): "e0008\n"}))
    assert throttling == Throttling(
        True, ["soft temperature limit"], ["frequency capped", "throttled", "soft temperature limit"]
    )


def test_under_voltage_alone_does_not_throttle() -> None:
    assert throttling_of(0x10001) == Throttling(False, ["under-voltage"], ["under-voltage"])


def test_a_voltage_alarm_does_not_say_whether_it_throttles(reader: Make) -> None:
    base = "sysfs/class/hwmon/hwmon1"
    throttling = ThrottlingProbe().read(reader({f"{base}/name": "rpi_volt\n", f"{base}/in0_lcrit_alarm": "1\n"}))
    assert throttling == Throttling(None, ["under-voltage"], [])


def test_fans_do_not_throttle(reader: Make) -> None:
    base = "sysfs/class/thermal/cooling_device"
    fan = {f"{base}0/type": "pwm-fan\n", f"{base}0/cur_state": "3\n"}
    assert ThrottlingProbe().read(reader(fan)) is None
    clock = {f"{base}1/type": "cpufreq-cpu0\n", f"{base}1/cur_state": "1\n"}
    assert ThrottlingProbe().read(reader(fan | clock)) == Throttling(True, ["cooling by cpufreq-cpu0"], [])


def test_a_processor_that_throttled_since_the_last_reading(reader: Make) -> None:
    path = "sysfs/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
    probe = ThrottlingProbe()
    assert probe.read(reader({path: "7\n"})) == Throttling(False, [], ["processor too hot"])
    assert probe.read(reader({path: "9\n"})) == Throttling(True, ["processor too hot"], ["processor too hot"])
    assert probe.read(reader({path: "9\n"})) == Throttling(False, [], ["processor too hot"])


def test_one_throttling_source_is_enough() -> None:
    no, unknown, yes = Throttling(False, [], []), Throttling(None, ["a"], []), Throttling(True, ["a", "b"], ["c"])
    assert merged([None, None]) is None
    assert merged([no, unknown, None]) == Throttling(False, ["a"], [])
    assert merged([no, unknown, yes]) == Throttling(True, ["a", "b"], ["c"])


def stat(busy: int, idle: int) -> dict[str, str]:
    return {"procfs/stat": f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 {busy} 0 0 {idle} 0 0 0 0 0 0\nintr 1\n"}


def test_busy_is_the_share_since_the_last_reading(reader: Make) -> None:
    probe = ProcessorProbe()
    assert probe.read(reader(stat(100, 900))).busy is None
    assert probe.read(reader(stat(130, 970))).busy == pytest.approx(0.3)
    assert probe.read(reader(stat(130, 970))).busy is None
    # Idle time may go back when a core comes online.
    assert probe.read(reader(stat(150, 965))).busy == 1.0


def test_clock_domains(reader: Make) -> None:
    base = "sysfs/devices/system/cpu/cpufreq/policy"
    files = {f"{base}0/scaling_cur_freq": "600000", f"{base}4/scaling_cur_freq": "1000000"}
    files |= {f"{base}0/cpuinfo_max_freq": "1500000", f"{base}4/cpuinfo_max_freq": "2200000"}
    processor = ProcessorProbe().read(reader(files))
    assert (processor.hertz, processor.most_hertz) == (800e6, 2200e6)


def test_psutil_counts_the_same_times_here() -> None:
    before = psutil.cpu_times()
    times = Reader(Roots(), 0.0).parsed("/proc/stat", parse_times)
    after = psutil.cpu_times()
    assert times is not None and times.cores == psutil.cpu_count()
    # Waiting for a disk is known to go back a little.
    tick = 5 / 100
    assert before.idle + before.iowait - tick <= times.idle / 100 <= after.idle + after.iowait + tick
