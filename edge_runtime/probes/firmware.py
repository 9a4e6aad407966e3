"""What a Raspberry Pi's firmware knows: whether it holds the processor back, and what a Pi 5's power chip delivers."""

from __future__ import annotations

import math
import re

import msgspec

from edge_runtime.probes.power import Power, Rail
from edge_runtime.probes.processor import read_model
from edge_runtime.probes.roots import ProbeError, Reader, shown

# Bits of get_throttled: now; 16 bits further up, since boot. Low voltage alone slows nothing.
UNDER_VOLTAGE = 0x1
FLAGS = {UNDER_VOLTAGE: "under-voltage", 0x2: "frequency capped", 0x4: "throttled", 0x8: "soft temperature limit"}
SINCE_BOOT = 16
# Boards with the power chip that measures.
PMIC_BOARDS = ("Raspberry Pi 5", "Raspberry Pi Compute Module 5")

_FLAGS = re.compile(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", re.ASCII)
_CHANNEL = re.compile(r"\s*(\w+)_([AV]) (?:current|volt)\([0-9]{1,3}\)=([0-9]{1,5}\.[0-9]{1,12})([AV])", re.ASCII)


class Firmware(msgspec.Struct, frozen=True):
    """Of a Raspberry Pi.

    Attributes:
        throttled: flags as in `vcgencmd get_throttled`; None where the file in sysfs says the same more cheaply.
        power: a Pi 5's rails. Their sum is known to be less than the board draws: what hangs on the 5 V input (USB,
            fan, hats) and the power chip's own losses are not in it.
    """

    throttled: int | None
    power: Power | None


def parse_throttled(text: str) -> int:
    """`vcgencmd get_throttled`, or the file of the same name: `throttled=0x50005`, `50005`. Raises ProbeError."""
    match = _FLAGS.fullmatch(text)
    if match is None:
        raise ProbeError(f"not flags of get_throttled: {shown(text)}")
    return int(match[1], 16)


def parse_pmic(text: str) -> Power:
    """`vcgencmd pmic_read_adc`: a line with the current and one with the voltage of each rail. Raises ProbeError."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        match = _CHANNEL.fullmatch(line)
        if match is None or match[2] != match[4]:
            raise ProbeError(f"not a channel of the power chip: {shown(line)}")
        values[match[1], match[2]] = float(match[3])
    # EXT5V and BATT have a voltage only.
    rails = [
        Rail("pmic", rail, amperes * values[rail, "V"])
        for (rail, unit), amperes in values.items()
        if unit == "A" and (rail, "V") in values
    ]
    if not rails:
        raise ProbeError(f"no rail of the power chip: {shown(text)}")
    return Power(math.fsum(rail.watts for rail in rails), False, "pmic", rails)


def flags_file(reader: Reader) -> str | None:
    """Where the kernel shows the flags; None if it does not."""
    # `soc` has an address behind it on a Pi 5: soc@107c000000.
    platform = f"{reader.sysfs}/devices/platform"
    for soc in reader.names(platform, "soc"):
        for directory in (soc, f"{soc}/{soc}:firmware", f"{soc}/soc:firmware"):
            path = f"{platform}/{directory}/get_throttled"
            if reader.exists(path):
                return path
    return None


def reasons(flags: int) -> list[str]:
    """What the low four bits mean."""
    return [name for bit, name in FLAGS.items() if flags & bit]


def read_firmware(reader: Reader) -> Firmware | None:
    """Runs `vcgencmd` for what nothing else tells; None if this is no Raspberry Pi, or it tells nothing."""
    model = read_model(reader) or ""
    if not model.startswith("Raspberry Pi"):
        return None
    flags = None if flags_file(reader) else reader.program(parse_throttled, "vcgencmd", "get_throttled")
    power = reader.program(parse_pmic, "vcgencmd", "pmic_read_adc") if model.startswith(PMIC_BOARDS) else None
    return None if flags is None and power is None else Firmware(flags, power)
