"""The board's power sensor as a function, for calibration. Same sources and preference as the probes."""

from __future__ import annotations

import time
from collections.abc import Mapping

from edge_runtime.planning.board_profile import SensorLine
from edge_runtime.probes import (
    PowerProbe,
    PowerReading,
    RaplProbe,
    Reader,
    Roots,
    best_power,
    read_firmware,
    read_supply,
)


class Wattmeter:
    """Call it for the present power in watts; None without a sensor. A battery counts only while it discharges.

    Attributes:
        source: name of the sensor, for the profile's sources; empty without a sensor.
    """

    def __init__(self, roots: Roots | None = None, lines: Mapping[str, SensorLine] | None = None) -> None:
        """
        Args:
            roots: where to read; None for this machine.
            lines: what the board's current sensors measure; see `PowerProbe`.
        """
        self._roots = roots or Roots()
        self._sensors = PowerProbe(lines)
        self._rapl = RaplProbe()
        # RAPL counts joules, so power needs two readings.
        self._read()
        power = self._read()
        self.source = ""
        if power is not None and power.watts is not None:
            part = "" if power.whole_board else ", which measures only a part of the board"
            self.source = f"{power.source}{part}"

    def __call__(self) -> float | None:
        power = self._read()
        return None if power is None else power.watts

    def _read(self) -> PowerReading | None:
        reader = Reader(self._roots, time.monotonic())
        firmware = read_firmware(reader)
        return best_power(self._sensors.read(reader), read_supply(reader), firmware, self._rapl.read(reader))
