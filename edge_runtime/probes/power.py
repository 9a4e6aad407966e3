"""What the board draws now, from current sensors that the kernel shows as hwmon: INA219, INA226, INA3221 and the like,
and the power meters of servers."""

from __future__ import annotations

import math
import re

import msgspec

from edge_runtime.probes.roots import Reader

# Rails that everything else hangs on, by the names that board makers give them.
WHOLE_BOARD = {"VDD_IN", "VIN", "VIN_SYS_5V0", "POM_5V_IN", "SYS_VIN", "TOTAL"}
# The ACPI power meter stands between the wall and the whole machine.
WHOLE_MACHINE = "power_meter"

# An INA3221 has three rails; its further channels are shunt voltages, and sums of currents.
RAILS = {"ina3221": 3}

_SENSOR = re.compile(r"(power|curr|in)([0-9]+)_(input|average)", re.ASCII)


class Rail(msgspec.Struct, frozen=True):
    """One measured supply; `label` is empty where the board names none."""

    chip: str
    label: str
    watts: float


class Power(msgspec.Struct, frozen=True):
    """Watts now.

    Attributes:
        watts: of the board, or of the part of it that is measured; None where the rails cannot be added up.
        whole_board: whether it is all that the board draws; if not, the board draws more.
        source: what measured it.
        rails: each supply that is measured by itself.
    """

    watts: float | None
    whole_board: bool
    source: str
    rails: list[Rail]


def read_sensors(reader: Reader) -> Power | None:
    """None if there is no such sensor."""
    classes = f"{reader.sysfs}/class/hwmon"
    rails: list[Rail] = []
    for name in reader.names(classes):
        chip = reader.text(f"{classes}/{name}/name") or ""
        # Batteries, graphics cards and USB ports show power too, and it is not the board's.
        if chip.startswith("ina") or chip == WHOLE_MACHINE:
            rails += _rails(reader, f"{classes}/{name}", chip)
    if not rails:
        return None
    whole = [rail for rail in rails if rail.chip == WHOLE_MACHINE or rail.label.upper() in WHOLE_BOARD]
    if not whole and len(rails) == 1:
        # Who wires a single sensor to a board wires it into the board's supply.
        whole = rails
    # Without labels, rails may feed one another: adding them up might count the same watt twice.
    watts = math.fsum(rail.watts for rail in whole) if whole else None
    source = " + ".join(f"{rail.chip} {rail.label}".strip() for rail in whole)
    return Power(watts, bool(whole), source, rails)


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
