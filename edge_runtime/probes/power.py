"""Power of the board, from current sensors in hwmon (INA219, INA226, INA3221 and others) and ACPI power meters."""

from __future__ import annotations

import math
import re

import msgspec

from edge_runtime.probes.roots import Reader

# Labels of the input rails that supply everything else, as board makers name them.
WHOLE_BOARD = {"VDD_IN", "VIN", "VIN_SYS_5V0", "POM_5V_IN", "SYS_VIN", "TOTAL"}
# The ACPI power meter measures the whole machine at the wall.
WHOLE_MACHINE = "power_meter"

# An INA3221 has three rails; its further channels are shunt voltages and sums of currents.
RAILS = {"ina3221": 3}

_SENSOR = re.compile(r"(power|curr|in)([0-9]+)_(input|average)", re.ASCII)


class Rail(msgspec.Struct, frozen=True):
    """One measured supply rail; `label` is empty if the board names none."""

    chip: str
    label: str
    watts: float


class PowerReading(msgspec.Struct, frozen=True):
    """Present power.

    Attributes:
        watts: of the board or of the measured part; None if the rails cannot be added up.
        whole_board: whether `watts` covers the whole board; if not, the board draws more.
        source: the sensors that measured it.
        rails: each measured supply rail.
    """

    watts: float | None
    whole_board: bool
    source: str
    rails: list[Rail]


def read_sensors(reader: Reader) -> PowerReading | None:
    """Read the current sensors; None if there is none."""
    classes = f"{reader.sysfs}/class/hwmon"
    rails: list[Rail] = []
    for name in reader.names(classes):
        chip = reader.text(f"{classes}/{name}/name") or ""
        # Batteries, graphics cards and USB ports have power sensors too, but those are not the board's power.
        if chip.startswith("ina") or chip == WHOLE_MACHINE:
            rails += _rails(reader, f"{classes}/{name}", chip)
    if not rails:
        return None
    whole = [rail for rail in rails if rail.chip == WHOLE_MACHINE or rail.label.upper() in WHOLE_BOARD]
    if not whole and len(rails) == 1:
        # A single sensor on a board is wired into the board's supply.
        whole = rails
    # Without labels one rail may feed another: a sum might count the same power twice.
    watts = math.fsum(rail.watts for rail in whole) if whole else None
    source = " + ".join(f"{rail.chip} {rail.label}".strip() for rail in whole)
    return PowerReading(watts, bool(whole), source, rails)


def _rails(reader: Reader, path: str, chip: str) -> list[Rail]:
    values: dict[tuple[str, int], int] = {}
    for name in reader.names(path):
        match = _SENSOR.fullmatch(name)
        if match is not None and int(match[2]) <= RAILS.get(chip, 99):
            value = reader.integer(f"{path}/{name}")
            if value is not None:
                values[match[1], int(match[2])] = value
    rails = []
    for channel in sorted({channel for kind, channel in values if kind != "in"}):
        if ("power", channel) in values:
            watts = values["power", channel] / 1e6
        elif ("in", channel) in values:
            watts = values["curr", channel] * values["in", channel] / 1e6
        else:
            continue
        label = (
            reader.text(f"{path}/in{channel}_label")
            or reader.text(f"{path}/power{channel}_label")
            or reader.text(f"{path}/curr{channel}_label")
            or ""
        )
        rails.append(Rail(chip, label, watts))
    return rails
