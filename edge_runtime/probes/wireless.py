"""Wi-Fi: signal from /proc/net/wireless at every reading, bit rates from nl80211 (through `iw`) less often."""

from __future__ import annotations

import errno
import re
from functools import partial

import msgspec

from edge_runtime.probes.reader import ProbeError, Reader, decimal, excerpt, within

# Levels that a receiver can measure, in dBm: thermal noise of a 20 MHz channel is -101, and 802.11 requires no receiver
# to take more than -10. Drivers report an unknown level as -256, -1, 0 or, without dBm, on a scale of their own.
MIN_DBM, MAX_DBM = -120.0, -5.0
# `iw` exits with the kernel's errno: ENODEV for an interface that has just been removed.
IW_NO_DEVICE = 256 - errno.ENODEV

_SIGNAL = re.compile(r"signal: (\S+) dBm")
_RATE = re.compile(r"([rt]x) bitrate: (\S+) MBit/s")
_FREQUENCY = re.compile(r"freq: (\S+)")


class Wireless(msgspec.Struct, frozen=True):
    """One Wi-Fi interface, from /proc/net/wireless.

    Attributes:
        quality: on the driver's own scale, usually 0 to 70.
        signal_dbm, noise_dbm: None if the driver does not report dBm.
        retries: packets dropped after too many retries, since the interface came up.
        missed_beacons: since the interface came up.
    """

    interface: str
    quality: float
    signal_dbm: float | None
    noise_dbm: float | None
    retries: int
    missed_beacons: int


class Station(msgspec.Struct, frozen=True):
    """One Wi-Fi interface, from nl80211. Rates are those of the last frame, without protocol overhead."""

    interface: str
    connected: bool
    signal_dbm: float | None = None
    receive_bits_per_second: float | None = None
    send_bits_per_second: float | None = None
    hertz: float | None = None


def parse_wireless(text: str) -> list[Wireless]:
    """Parse /proc/net/wireless. Raises ProbeError."""
    if not text.startswith("Inter-|"):
        raise ProbeError(f"not a table of wireless interfaces: {excerpt(text)}")
    return [_wireless(line) for line in text.splitlines()[2:]]


def parse_link(interface: str, text: str) -> Station:
    """Parse `iw dev INTERFACE link`. Raises ProbeError."""
    if text.startswith("Not connected"):
        return Station(interface, False)
    if not text.startswith("Connected to"):
        raise ProbeError(f"not the state of a Wi-Fi link: {excerpt(text)}")
    signal, frequency, rates = _SIGNAL.search(text), _FREQUENCY.search(text), dict(_RATE.findall(text))
    return Station(
        interface=interface,
        connected=True,
        signal_dbm=within(decimal(signal[1]), MIN_DBM, MAX_DBM) if signal else None,
        receive_bits_per_second=decimal(rates["rx"]) * 1e6 if "rx" in rates else None,
        send_bits_per_second=decimal(rates["tx"]) * 1e6 if "tx" in rates else None,
        hertz=decimal(frequency[1]) * 1e6 if frequency else None,
    )


def read_wireless(reader: Reader) -> list[Wireless] | None:
    """All Wi-Fi interfaces that are up; None if there is none."""
    return reader.parsed(f"{reader.procfs}/net/wireless", parse_wireless) or None


def read_stations(reader: Reader) -> list[Station] | None:
    """Run `iw` for each Wi-Fi interface; None if there is none or `iw` is missing."""
    classes = f"{reader.sysfs}/class/net"
    stations = [
        reader.program(partial(parse_link, name), "iw", "dev", name, "link", no_data={IW_NO_DEVICE})
        for name in reader.names(classes)
        if reader.exists(f"{classes}/{name}/phy80211")
    ]
    return [station for station in stations if station is not None] or None


def _wireless(line: str) -> Wireless:
    interface, _, rest = line.strip().partition(":")
    try:
        # A trailing dot marks a value as updated.
        _, quality, level, noise, _, _, _, retries, _, beacons, *_ = [word.rstrip(".") for word in rest.split()]
        return Wireless(
            interface=interface,
            quality=decimal(quality),
            signal_dbm=within(decimal(level), MIN_DBM, MAX_DBM),
            noise_dbm=within(decimal(noise), MIN_DBM, MAX_DBM),
            retries=int(decimal(retries)),
            missed_beacons=int(decimal(beacons)),
        )
    except ValueError:
        raise ProbeError(f"not a wireless interface: {excerpt(line)}") from None
