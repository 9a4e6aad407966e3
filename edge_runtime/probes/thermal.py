"""Temperatures, from thermal zones and from the sensors in processors."""

from __future__ import annotations

import msgspec

from edge_runtime.probes.roots import Reader

# hwmon chips that sit in processors; most boards' thermal zones are shown as hwmon too, and are read as zones.
PROCESSOR_CHIPS = ("coretemp", "k10temp", "zenpower")
# What zones of processors are called, best first: `tj` is the hottest point of a Jetson's whole chip.
PROCESSOR_ZONES = ("cpu", "x86_pkg_temp", *PROCESSOR_CHIPS, "soc", "tj")
# Degrees beyond which a sensor is broken: a disabled one says -273.
COLDEST, HOTTEST = -60.0, 200.0


class Zone(msgspec.Struct, frozen=True):
    """One sensor."""

    name: str
    celsius: float


class Thermal(msgspec.Struct, frozen=True):
    """All sensors; `celsius` is the hottest of the processor's own, None if none is known to be."""

    zones: list[Zone]
    celsius: float | None


def read_thermal(reader: Reader) -> Thermal | None:
    """None if there is no sensor."""
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
    if not COLDEST <= celsius <= HOTTEST:
        reader.errors.append(f"{path}: {celsius:g} degrees Celsius cannot be; the sensor is off or broken")
        return None
    return Zone(name, celsius)
