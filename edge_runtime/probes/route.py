"""Network interface of the route, from the kernel's main routing tables, and whether it is metered.

Policy routing (`ip rule`, used by some VPNs) is not followed.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import msgspec

from edge_runtime.probes.reader import ProbeError, Reader, excerpt

# Longest prefix in bits that counts as a default route: VPNs that keep the real default route add two routes of one
# bit, and 2000::/3 is the whole IPv6 Internet.
DEFAULT_PREFIX = 3

UP = 0x1
REJECT = 0x200

# Exit codes of nmcli(1): NetworkManager is not running; it does not know the interface.
NMCLI_NO_DATA = {8, 10}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RoutingEntry(NamedTuple):
    """One line of a routing table; addresses are integers of 32 or 128 bits."""

    interface: str
    destination: int
    prefix: int
    gateway: int
    metric: int


class Route(msgspec.Struct, frozen=True):
    """The route to a host.

    Attributes:
        interface: outgoing interface.
        gateway: next hop; None if the host is on the local network.
        version: IP version, 4 or 6.
    """

    interface: str
    gateway: str | None
    version: int


class Metering(msgspec.Struct, frozen=True):
    """Whether `interface` is metered, as configured or guessed by NetworkManager; None if unknown."""

    interface: str
    metered: bool | None


def parse_ipv4(text: str) -> list[RoutingEntry]:
    """Parse /proc/net/route; routes that are up and not rejecting. Raises ProbeError."""
    header, *lines = text.splitlines() or [""]
    if not header.startswith("Iface"):
        raise ProbeError(f"not a routing table: {excerpt(header)}")
    entries = []
    for line in lines:
        try:
            interface, destination, gateway, flags, _, _, metric, mask, *_ = line.split()
            prefix = _little_endian(mask).bit_count()
            entry = RoutingEntry(interface, _little_endian(destination), prefix, _little_endian(gateway), int(metric))
            if int(flags, 16) & (UP | REJECT) == UP:
                entries.append(entry)
        except ValueError:
            raise ProbeError(f"not a route: {excerpt(line)}") from None
    return entries


def parse_ipv6(text: str) -> list[RoutingEntry]:
    """Parse /proc/net/ipv6_route; routes that are up and not rejecting. Raises ProbeError."""
    entries = []
    for line in text.splitlines():
        try:
            destination, length, _, _, gateway, metric, _, _, flags, interface = line.split()
            prefix = min(128, _number(length, 1))
            entry = RoutingEntry(interface, _number(destination, 16), prefix, _number(gateway, 16), int(metric, 16))
            if int(flags, 16) & (UP | REJECT) == UP:
                entries.append(entry)
        except ValueError:
            raise ProbeError(f"not a route: {excerpt(line)}") from None
    return entries


def parse_metered(text: str) -> bool | None:
    """Parse `nmcli -g GENERAL.METERED device show`. Raises ProbeError."""
    word = text.partition(" ")[0]
    if word in ("", "--", "unknown"):
        return None
    if word not in ("yes", "no"):
        raise ProbeError(f"neither yes nor no: {excerpt(text)}")
    return word == "yes"


def read_route(reader: Reader, host: Address | None = None) -> Route | None:
    """The route to `host`, or the default route, preferring IPv4; None if there is none."""
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        host = host.ipv4_mapped
    if host is not None and host.is_loopback:
        return Route("lo", None, host.version)
    route = None
    if host is None or host.version == 4:
        entries = reader.parsed(f"{reader.procfs}/net/route", parse_ipv4) or []
        route = _best(entries, ipaddress.IPv4Address, host)
    if route is None and (host is None or host.version == 6):
        entries = reader.parsed(f"{reader.procfs}/net/ipv6_route", parse_ipv6) or []
        route = _best(entries, ipaddress.IPv6Address, host)
    return route


def read_metering(reader: Reader, host: Address | None = None) -> Metering | None:
    """Ask NetworkManager about the interface of the route to `host`; None if there is no route."""
    route = read_route(reader, host)
    if route is None:
        return None
    arguments = ("nmcli", "-g", "GENERAL.METERED", "device", "show", route.interface)
    return Metering(route.interface, reader.program(parse_metered, *arguments, no_data=NMCLI_NO_DATA))


def _best(
    entries: list[RoutingEntry], kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], host: Address | None
) -> Route | None:
    """The matching route with the longest prefix, and among those the lowest metric."""
    if host is None:
        matching = [entry for entry in entries if entry.prefix <= DEFAULT_PREFIX]
    else:
        width, number = host.max_prefixlen, int(host)
        matching = [entry for entry in entries if (entry.destination ^ number) >> (width - entry.prefix) == 0]
    if not matching:
        return None
    entry = max(matching, key=lambda entry: (entry.prefix, -entry.metric))
    gateway = kind(entry.gateway) if entry.gateway else None
    return Route(entry.interface, str(gateway) if gateway else None, kind(0).version)


def _little_endian(text: str) -> int:
    # The kernel prints an address in network order as a native integer; all supported boards are little-endian.
    return int.from_bytes(_number(text, 4).to_bytes(4, "little"), "big")


def _number(text: str, size: int) -> int:
    # Exactly `size` bytes in hexadecimal: int() would also accept "0x1", "+1" and "1_0".
    content = bytes.fromhex(text)
    if len(content) != size:
        raise ValueError(text)
    return int.from_bytes(content, "big")
