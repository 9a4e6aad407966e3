"""Network interfaces: kind, speed and traffic counters."""

from __future__ import annotations

from typing import Any

import msgspec
import psutil

from edge_runtime.probes.reader import Reader, within
from edge_runtime.probes.route import Address, read_route

# Speed of the fastest Ethernet, 1.6 Tbit/s. A driver that does not know the speed reports -1, signed or not.
MAX_MEGABITS = 1_600_000
KINDS = {"wlan": "wifi", "wwan": "modem"}


class Interface(msgspec.Struct, frozen=True):
    """One network interface. Counters start when it comes up; rates are since the last reading, None at the first.

    Attributes:
        kind: `ethernet`, `wifi`, `modem`, `virtual`, or the kernel's name for another type: `bridge`, `wireguard`,
            `ppp`.
        up: whether it has a link; None if the driver does not report it, as for tunnels.
        bits_per_second: negotiated wire speed; None for radio and virtual interfaces.
        lost: packets with errors or dropped, both directions.
    """

    name: str
    kind: str
    up: bool | None
    bits_per_second: float | None
    received_bytes: int | None
    sent_bytes: int | None
    lost: int
    received_bytes_per_second: float | None = None
    sent_bytes_per_second: float | None = None


class InterfaceProbe:
    """Reads the hardware interfaces and the one that the route uses; keeps the last counters for rates.

    On the real machine psutil reads the counters, because it compensates the wrap at 4 GB of 32-bit kernels.
    """

    def __init__(self, host: Address | None = None) -> None:
        """
        Args:
            host: destination of the route; None for the default route.
        """
        self._host = host
        self._last: dict[str, tuple[float, Interface]] = {}

    def read(self, reader: Reader) -> list[Interface] | None:
        """Read the interfaces; None if there is none."""
        classes = f"{reader.sysfs}/class/net"
        route = read_route(Reader(reader.roots, reader.now), self._host)
        routed = "" if route is None else route.interface
        interfaces = [
            _interface(reader, f"{classes}/{name}", name)
            for name in reader.names(classes)
            if name == routed or reader.exists(f"{classes}/{name}/device")
        ]
        if reader.roots.is_this_machine:
            counted = psutil.net_io_counters(pernic=True, nowrap=True)
            interfaces = [_counted(found, counted[found.name]) for found in interfaces if found.name in counted]
        interfaces = [self._with_rates(found, reader.now) for found in interfaces]
        self._last = {interface.name: (reader.now, interface) for interface in interfaces}
        return interfaces or None

    def _with_rates(self, interface: Interface, now: float) -> Interface:
        then, last = self._last.get(interface.name, (now, interface))
        return msgspec.structs.replace(
            interface,
            received_bytes_per_second=_rate(last.received_bytes, interface.received_bytes, now - then),
            sent_bytes_per_second=_rate(last.sent_bytes, interface.sent_bytes, now - then),
        )


def _interface(reader: Reader, path: str, name: str) -> Interface:
    event = reader.text(f"{path}/uevent") or ""
    kind = next((line[8:] for line in event.splitlines() if line.startswith("DEVTYPE=")), "")
    if not kind:
        kind = "ethernet" if reader.exists(f"{path}/device") else "virtual"
    state = reader.text(f"{path}/operstate")
    megabits = within(reader.integer(f"{path}/speed"), 1, MAX_MEGABITS)
    counters = {
        counter: reader.integer(f"{path}/statistics/{counter}")
        for counter in ("rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped")
    }
    return Interface(
        name=name,
        kind=KINDS.get(kind, kind),
        up={"up": True, "down": False, "lowerlayerdown": False, "dormant": False, "notpresent": False}.get(state or ""),
        bits_per_second=None if megabits is None else megabits * 1e6,
        received_bytes=counters.pop("rx_bytes"),
        sent_bytes=counters.pop("tx_bytes"),
        lost=sum(count or 0 for count in counters.values()),
    )


def _counted(interface: Interface, counters: Any) -> Interface:
    """`interface` with psutil's counters."""
    return msgspec.structs.replace(
        interface,
        received_bytes=counters.bytes_recv,
        sent_bytes=counters.bytes_sent,
        lost=counters.errin + counters.errout + counters.dropin + counters.dropout,
    )


def _rate(before: int | None, after: int | None, seconds: float) -> float | None:
    # An interface that was removed and re-added counts from zero.
    if before is None or after is None or seconds <= 0 or after < before:
        return None
    return (after - before) / seconds
