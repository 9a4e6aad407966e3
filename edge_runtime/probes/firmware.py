"""Raspberry Pi firmware: throttling flags, and the rails of a Pi 5's power management chip (PMIC)."""

from __future__ import annotations

import math
import re

import msgspec

from edge_runtime.probes.power import PowerReading, Rail
from edge_runtime.probes.processor import read_model
from edge_runtime.probes.reader import ProbeError, Reader, excerpt

# Bits of get_throttled: the low ones for now, the same shifted by 16 for since boot. Under-voltage alone does not
# throttle.
UNDER_VOLTAGE = 0x1
FLAGS = {UNDER_VOLTAGE: "under-voltage", 0x2: "frequency capped", 0x4: "throttled", 0x8: "soft temperature limit"}
SINCE_BOOT = 16
# Boards whose PMIC measures its rails.
PMIC_BOARDS = ("Raspberry Pi 5", "Raspberry Pi Compute Module 5")

_FLAGS = re.compile(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", re.ASCII)
_CHANNEL = re.compile(r"\s*(\w+)_([AV]) (?:current|volt)\([0-9]{1,3}\)=([0-9]{1,5}\.[0-9]{1,12})([AV])", re.ASCII)


class Firmware(msgspec.Struct, frozen=True):
    """Readings of a Raspberry Pi's firmware.

    Attributes:
        throttled: flags as in `vcgencmd get_throttled`; None if sysfs has them, which is cheaper to read.
        power: a Pi 5's rails. Their sum is less than the power of the board: consumers on the 5 V input (USB, fan,
            hats) and the losses of the PMIC are missing.
    """

    throttled: int | None
    power: PowerReading | None


def parse_throttled(text: str) -> int:
    """Parse `vcgencmd get_throttled` or the sysfs file: `throttled=0x50005` or `50005`. Raises ProbeError."""
    match = _FLAGS.fullmatch(text)
    if match is None:
        raise ProbeError(f"not flags of get_throttled: {excerpt(text)}")
    return int(match[1], 16)


def parse_pmic(text: str) -> PowerReading:
    """Parse `vcgencmd pmic_read_adc`: a current line and a voltage line for each rail. Raises ProbeError."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        match = _CHANNEL.fullmatch(line)
        if match is None or match[2] != match[4]:
            raise ProbeError(f"not a channel of the PMIC: {excerpt(line)}")
        values[match[1], match[2]] = float(match[3])
    # EXT5V and BATT have only a voltage.
    rails = [
        Rail("pmic", rail, amperes * values[rail, "V"])
        for (rail, unit), amperes in values.items()
        if unit == "A" and (rail, "V") in values
    ]
    if not rails:
        raise ProbeError(f"no rail of the PMIC: {excerpt(text)}")
    return PowerReading(math.fsum(rail.watts for rail in rails), False, "pmic", rails)


def flags_file(reader: Reader) -> str | None:
    """Path of the flags in sysfs; None if there is none."""
    # On a Pi 5 `soc` has an address suffix: soc@107c000000.
    platform = f"{reader.sysfs}/devices/platform"
    for soc in reader.names(platform, "soc"):
        for directory in (soc, f"{soc}/{soc}:firmware", f"{soc}/soc:firmware"):
            path = f"{platform}/{directory}/get_throttled"
            if reader.exists(path):
                return path
    return None


def reasons(flags: int) -> list[str]:
    """Names of the low four bits that are set."""
    return [name for bit, name in FLAGS.items() if flags & bit]


def read_firmware(reader: Reader) -> Firmware | None:
    """Run `vcgencmd` for what sysfs does not have; None if this is no Raspberry Pi or there is nothing to read."""
    model = read_model(reader) or ""
    if not model.startswith("Raspberry Pi"):
        return None
    flags = None if flags_file(reader) else reader.program(parse_throttled, "vcgencmd", "get_throttled")
    power = reader.program(parse_pmic, "vcgencmd", "pmic_read_adc") if model.startswith(PMIC_BOARDS) else None
    return None if flags is None and power is None else Firmware(flags, power)
