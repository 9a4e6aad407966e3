"""Batteries and mains power."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.probes.battery import Battery, Supply, read_supply
from edge_runtime.probes.reader import Reader

Make = Callable[..., Reader]


def supplies(**entries: dict[str, str]) -> dict[str, str]:
    return {
        f"sysfs/class/power_supply/{name}/{attribute}": value + "\n"
        for name, attributes in entries.items()
        for attribute, value in attributes.items()
    }


def test_energy_in_microwatt_hours(reader: Make) -> None:
    supply = read_supply(
        reader(
            supplies(
                BAT0={
                    "type": "Battery",
                    "status": "Charging",
                    "capacity": "50",
                    "energy_now": "10000000",
                    "energy_full": "20000000",
                    "power_now": "15000000",
                }
            )
        )
    )
    assert supply == Supply(
        [Battery(name="BAT0", state="charging", percent=50.0, joules_left=36_000.0, joules_full=72_000.0, watts=15.0)],
        None,
    )
    assert supply.on_battery is False
    assert supply.joules_left == 36_000.0
    # What flows in is not what the board draws.
    assert supply.watts is None


def test_charge_in_microampere_hours_under_any_name_and_sign(reader: Make) -> None:
    gauge = {
        "type": "Battery",
        "status": "Discharging",
        "charge_now": "2000000",
        "charge_full": "4000000",
        "voltage_now": "3700000",
        "current_now": "-1000000",
    }
    at = reader(supplies(**{"max17055-battery": gauge}))
    supply = read_supply(at)
    assert supply is not None and at.errors == []
    assert supply.joules_left == pytest.approx(2.0 * 3.7 * 3600)
    assert supply.batteries[0].joules_full == pytest.approx(4.0 * 3.7 * 3600)
    assert supply.watts == pytest.approx(3.7)
    assert supply.on_battery is True


def test_percent_of_a_known_capacity(reader: Make) -> None:
    supply = read_supply(reader(supplies(b={"type": "Battery", "capacity": "25", "energy_full": "8000000"})))
    assert supply is not None and supply.joules_left == pytest.approx(2.0 * 3600)


def test_percent_alone_gives_no_energy(reader: Make) -> None:
    supply = read_supply(reader(supplies(b={"type": "Battery", "status": "Full", "capacity": "100"})))
    assert supply is not None and supply.joules_left is None
    assert supply.on_battery is False


@pytest.mark.parametrize(
    ("status", "online", "on_battery"),
    [
        ("Discharging", "1", True),
        ("Charging", "0", False),
        ("Unknown", "0", True),
        ("Unknown", "1", False),
        ("Unknown", None, None),
        ("Not charging", None, False),
    ],
)
def test_on_battery(status: str, online: str | None, on_battery: bool | None, reader: Make) -> None:
    mains = {} if online is None else {"AC": {"type": "Mains", "online": online}}
    supply = read_supply(reader(supplies(BAT0={"type": "Battery", "status": status}, **mains)))
    assert supply is not None and supply.on_battery is on_battery


def test_impossible_values_are_unknown(reader: Make) -> None:
    gauge = {"type": "Battery", "status": "Discharging", "capacity": "255", "energy_now": "-1", "energy_full": "0"}
    gauge |= {"voltage_now": "3700000", "current_now": str(0x7FFFFFFF)}
    supply = read_supply(reader(supplies(b=gauge)))
    assert supply == Supply([Battery("b", "discharging")], None)


def test_peripheral_batteries_are_ignored(reader: Make) -> None:
    mouse = {"type": "Battery", "scope": "Device", "capacity": "3"}
    bay = {"type": "Battery", "present": "0", "energy_now": "1"}
    assert read_supply(reader(supplies(hid=mouse, BAT1=bay))) is None


def test_one_silent_gauge_makes_the_sum_unknown(reader: Make) -> None:
    known = {"type": "Battery", "status": "Discharging", "energy_now": "1000000", "power_now": "2000000"}
    supply = read_supply(reader(supplies(BAT0=known, BAT1={"type": "Battery", "status": "Discharging"})))
    assert supply is not None
    assert supply.joules_left is None and supply.watts is None and supply.on_battery is True


def test_mains_alone(reader: Make) -> None:
    supply = read_supply(reader(supplies(AC={"type": "Mains", "online": "1"})))
    assert supply == Supply([], True)
    assert supply.on_battery is False and supply.joules_left is None


CLIENTS = """
import psutil
from edge_runtime.probes.battery import read_supply
from edge_runtime.probes.reader import Reader, Roots
supply = read_supply(Reader(Roots(), 0.0))
theirs = psutil.sensors_battery()
print(theirs.percent, supply.batteries[0].percent)
print(float(theirs.secsleft), supply.joules_left / supply.watts)
print(not theirs.power_plugged, supply.on_battery)
"""


@pytest.mark.skipif(shutil.which("umockdev-run") is None, reason="needs umockdev")
def test_psutil_reads_the_same_from_a_mocked_sysfs(tmp_path: Path) -> None:
    """psutil and this probe both read /sys, which umockdev replaces."""
    device = tmp_path / "battery.umockdev"
    attributes = {
        "type": "Battery",
        "status": "Discharging",
        "present": "1",
        "capacity": "64",
        "energy_now": "32000000",
        "energy_full": "50000000",
        "power_now": "8000000",
    }
    lines = ["P: /devices/platform/battery/power_supply/BAT0", "E: SUBSYSTEM=power_supply"]
    lines += [f"A: {name}={value}\\n" for name, value in attributes.items()]
    device.write_text("\n".join(lines) + "\n")
    command = ["umockdev-run", "--device", str(device), "--", sys.executable, "-c", CLIENTS]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert said.split() == ["64.0", "64.0", "14400.0", "14400.0", "True", "True"]
