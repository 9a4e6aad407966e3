"""Power of an x86 processor, from its energy counters (RAPL, /sys/class/powercap).

This covers processor packages and memory, not the whole machine. Since 2020 only root may read the counters.
"""

from __future__ import annotations

import math
import re

from edge_runtime.probes.power import PowerReading, Rail
from edge_runtime.probes.reader import Reader

_ZONE = re.compile(r"intel-rapl:[0-9]+(:[0-9]+)?", re.ASCII)


class RaplProbe:
    """Reads RAPL; keeps the last counters, because power is the energy between two readings."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}

    def read(self, reader: Reader) -> PowerReading | None:
        """Power since the last reading; None without counters and at the first reading."""
        classes = f"{reader.sysfs}/class/powercap"
        rails = []
        for zone in reader.names(classes, "intel-rapl:"):
            if not _ZONE.fullmatch(zone):
                continue
            name = reader.text(f"{classes}/{zone}/name") or ""
            # Core and graphics zones are part of their package; memory is not.
            if name.startswith("package") or name == "dram":
                watts = self._watts(reader, f"{classes}/{zone}")
                if watts is not None:
                    rails.append(Rail("rapl", name, watts))
        return PowerReading(math.fsum(rail.watts for rail in rails), False, "rapl", rails) if rails else None

    def _watts(self, reader: Reader, path: str) -> float | None:
        counter = reader.integer(f"{path}/energy_uj")
        if counter is None:
            self._last.pop(path, None)
            return None
        then, last = self._last.get(path, (reader.now, counter))
        self._last[path] = reader.now, counter
        if reader.now <= then:
            return None
        if counter < last:
            # Counter overflow: at 100 W a counter of 262 kJ wraps every 44 minutes.
            most = reader.integer(f"{path}/max_energy_range_uj")
            if most is None or most < last:
                return None
            counter += most
        return (counter - last) / 1e6 / (reader.now - then)
