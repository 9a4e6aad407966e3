"""Power of the board, from current sensors in hwmon (INA219, INA226, INA3221 and others) and ACPI power meters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from edge_runtime.planning.board_profile import SensorLine
from edge_runtime.probes.reader import Reader

# Labels of the input rails that supply everything else, as board makers name them.
WHOLE_BOARD = {"VDD_IN", "VIN", "VIN_SYS_5V0", "POM_5V_IN", "SYS_VIN", "TOTAL"}
# The ACPI power meter measures the whole machine at the wall.
WHOLE_MACHINE = "power_meter"

# Power that every board with Linux exceeds. Chosen: an idle Raspberry Pi Zero 2 W draws 0.4 W.
MIN_BOARD_WATTS = 0.2

# An INA3221 has three rails; its further channels are shunt voltages and sums of currents.
RAILS = {"ina3221": 3}

_SENSOR = re.compile(r"(power|curr|in)([0-9]+)_(input|average)", re.ASCII)


class Rail(msgspec.Struct, frozen=True):
    """One measured supply rail.

    Attributes:
        label: empty if the board names none.
        watts: negative while the current flows against the sensor's direction.
    """

    chip: str
    label: str
    watts: float


class PowerReading(msgspec.Struct, frozen=True):
    """Present power.

    Attributes:
        watts: of the board or of the measured part; None if no rail is known to be the board's.
        whole_board: whether `watts` covers the whole board; if not, the board draws more.
        source: the sensors that measured it.
        rails: each measured supply rail.
        on_battery: whether a sensor in the battery's line sees it discharge; None without such a sensor.
        note: why `watts` is unknown, and what to do; empty if it is known.
    """

    watts: float | None
    whole_board: bool
    source: str
    rails: list[Rail]
    on_battery: bool | None = None
    note: str = ""


class PowerProbe:
    """Reads the current sensors; remembers which of them have seen current flow backwards.

    A sensor in the line of the load never does. A sensor on a UPS hat may be in the line of the battery or of the
    charger instead, which `lines` can say.
    """

    def __init__(self, lines: Mapping[str, SensorLine] | None = None) -> None:
        """
        Args:
            lines: what a sensor measures, by chip such as `ina219`, or by chip and label such as `ina3221 VBAT`.
        """
        self._lines = lines or {}
        self._two_way: set[tuple[str, str]] = set()

    def read(self, reader: Reader) -> PowerReading | None:
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
        self._two_way |= {(rail.chip, rail.label) for rail in rails if rail.watts < 0.0}
        on_battery = None
        whole = [rail for rail in rails if self._line(rail) == "board"]
        for rail in rails:
            line = self._line(rail)
            if line in ("battery", "battery-reversed"):
                discharging = -rail.watts if line == "battery" else rail.watts
                on_battery = discharging >= MIN_BOARD_WATTS
                if on_battery and not whole:
                    # All of the board's power comes from the battery.
                    whole = [Rail(rail.chip, rail.label, discharging)]
        if not whole and len(rails) == 1 and not self._line(rails[0]) and not rails[0].label:
            # A single sensor on a board is wired into the board's supply, unless its reading contradicts that.
            whole = [rail for rail in rails if self._is_load(rail)]
        # Without labels one rail may feed another: a sum might count the same power twice.
        # A sensor in the board's own line that reads negative is mounted the other way round.
        watts = math.fsum(abs(rail.watts) for rail in whole) if whole else None
        source = " + ".join(filter(None, (_name(rail) for rail in whole)))
        note = "" if whole else self._note(rails)
        return PowerReading(watts, bool(whole), source, rails, on_battery=on_battery, note=note)

    def _line(self, rail: Rail) -> SensorLine | Literal[""]:
        """What `rail` measures; empty if neither its owner nor its label says."""
        said = self._lines.get(_name(rail)) or self._lines.get(rail.chip)
        if said:
            return said
        return "board" if rail.chip == WHOLE_MACHINE or rail.label.upper() in WHOLE_BOARD else ""

    def _is_load(self, rail: Rail) -> bool:
        return (rail.chip, rail.label) not in self._two_way and rail.watts >= MIN_BOARD_WATTS

    def _note(self, rails: list[Rail]) -> str:
        advice = "say which line it measures in [sensors.lines] of the board's profile"
        lines = {_name(rail): self._line(rail) for rail in rails}
        if any(line == "charger" for line in lines.values()):
            return "the charger's line feeds board and battery, so the board's share is unknown"
        if any(line.startswith("battery") for line in lines.values()):
            return "the battery does not discharge, so something else feeds the board"
        two_way = [_name(rail) for rail in rails if (rail.chip, rail.label) in self._two_way]
        if two_way:
            return f"current flows backwards through {', '.join(two_way)}, as in the line of a battery; {advice}"
        if len(rails) == 1 and not rails[0].label:
            return f"{_name(rails[0])} reads less than a board draws, so it is not in the board's line; {advice}"
        return f"no rail is known to feed the whole board; {advice}"


def _name(rail: Rail) -> str:
    return f"{rail.chip} {rail.label}".strip()


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
        # The chips report power without a sign; the direction is that of the current.
        sign = -1.0 if values.get(("curr", channel), 0) < 0 else 1.0
        if ("power", channel) in values:
            watts = sign * abs(values["power", channel]) / 1e6
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
