"""Temperatures, from thermal zones and from processor sensors in hwmon."""

from __future__ import annotations

import msgspec

from edge_runtime.probes.reader import Reader

# hwmon chips of processors. Thermal zones also appear in hwmon and are read as zones.
PROCESSOR_CHIPS = ("coretemp", "k10temp", "zenpower")
# Zone names of processors, best first. `tj` is the hottest point of a Jetson's chip.
PROCESSOR_ZONES = ("cpu", "x86_pkg_temp", *PROCESSOR_CHIPS, "soc", "tj")
# Plausible range; a disabled sensor reports -273.
MIN_CELSIUS, MAX_CELSIUS = -60.0, 200.0


class Zone(msgspec.Struct, frozen=True):
    """One temperature sensor."""

    name: str
    celsius: float


class Thermal(msgspec.Struct, frozen=True):
    """All sensors; `celsius` is the hottest processor sensor, None if no sensor is known to be the processor's."""

    zones: list[Zone]
    celsius: float | None


def read_thermal(reader: Reader) -> Thermal | None:
    """Read all temperature sensors; None if there is none."""
    classes = f"{reader.sysfs}/class/thermal"
    zones = [
        _zone(reader, reader.text(f"{classes}/{name}/type") or name, f"{classes}/{name}/temp")
        for name in reader.names(classes, "thermal_zone")
    ]
    classes = f"{reader.sysfs}/class/hwmon"
    for name in reader.names(classes):
        chip = reader.text(f"{classes}/{name}/name") or ""
        if chip in PROCESSOR_CHIPS:
            zones.append(_zone(reader, chip, f"{classes}/{name}/temp1_input"))
    known = [zone for zone in zones if zone is not None]
    for kind in PROCESSOR_ZONES:
        celsius = [zone.celsius for zone in known if zone.name.lower().startswith(kind)]
        if celsius:
            return Thermal(known, max(celsius))
    return Thermal(known, None) if known else None


def _zone(reader: Reader, name: str, path: str) -> Zone | None:
    millidegrees = reader.integer(path)
    if millidegrees is None:
        return None
    celsius = millidegrees / 1e3
    if not MIN_CELSIUS <= celsius <= MAX_CELSIUS:
        reader.errors.append(f"{path}: {celsius:g} degrees Celsius is implausible; the sensor is off or broken")
        return None
    return Zone(name, celsius)
