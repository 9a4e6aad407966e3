"""Routes and metering."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from edge_runtime.probes.reader import Reader, Roots
from edge_runtime.probes.route import Route, parse_ipv4, parse_metered, read_metering, read_route
from tests.edge_runtime.probes.conftest import BOARDS, roots_of

HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
TWO_WAYS = (
    HEADER
    + "wwan0\t00000000\t0914AD0A\t0003\t0\t0\t700\t00000000\t0\t0\t0\n"
    + "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
    + "wlan0\t0001A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0\n"
    + "eth0\t0000000A\t00000000\t0200\t0\t0\t0\t000000FF\t0\t0\t0\n"
)
V6 = (
    "20010db8a00b00000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 "
    "00000064 00000002 00000000 00000001     eth0\n"
    "00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe80000000000000a00bfffe00000001 "
    "00000064 00000003 00000000 00000003     eth0\n"
    "00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 "
    "ffffffff 00000001 00000000 00200200       lo\n"
)

Make = Callable[..., Reader]


def test_the_default_route_with_the_lower_metric_wins(reader: Make) -> None:
    assert read_route(reader({"procfs/net/route": TWO_WAYS})) == Route("wlan0", "192.168.1.1", 4)


def test_a_host_on_the_local_network_needs_no_gateway(reader: Make) -> None:
    at = reader({"procfs/net/route": TWO_WAYS})
    assert read_route(at, ip_address("192.168.1.77")) == Route("wlan0", None, 4)
    assert read_route(at, ip_address("192.168.2.77")) == Route("wlan0", "192.168.1.1", 4)


def test_a_rejecting_route_is_ignored(reader: Make) -> None:
    assert not [entry for entry in parse_ipv4(TWO_WAYS) if entry.interface == "eth0"]
    only = HEADER + TWO_WAYS.splitlines()[-1] + "\n"
    assert read_route(reader({"procfs/net/route": only}), ip_address("10.1.2.3")) is None


def test_ipv6_where_there_is_no_ipv4(reader: Make) -> None:
    at = reader({"procfs/net/route": HEADER, "procfs/net/ipv6_route": V6})
    assert read_route(at) == Route("eth0", "fe80::a00b:fffe:0:1", 6)
    assert read_route(at, ip_address("2001:db8:a00b::5")) == Route("eth0", None, 6)
    assert read_route(at, ip_address("192.0.2.7")) is None


def test_loopback_and_mapped_addresses(reader: Make) -> None:
    at = reader({"procfs/net/route": TWO_WAYS})
    assert read_route(at, ip_address("127.0.0.1")) == Route("lo", None, 4)
    assert read_route(at, ip_address("::1")) == Route("lo", None, 6)
    assert read_route(at, ip_address("::ffff:192.168.1.9")) == Route("wlan0", None, 4)


def test_a_vpn_that_splits_the_default_route() -> None:
    assert read_route(Reader(roots_of(BOARDS / "laptop"), 0.0)) == Route("wg0", None, 4)


@pytest.mark.parametrize(
    ("said", "metered"),
    [("yes", True), ("yes (guessed)", True), ("no", False), ("no (guessed)", False), ("unknown", None), ("", None)],
)
def test_metering_from_networkmanager(said: str, metered: bool | None, reader: Make) -> None:
    assert parse_metered(said) is metered
    files = {"procfs/net/route": TWO_WAYS, "bin/nmcli_-g_GENERAL.METERED_device_show_wlan0": said + "\n"}
    metering = read_metering(reader(files))
    assert metering is not None and (metering.interface, metering.metered) == ("wlan0", metered)


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (iproute2)")
def test_the_default_route_of_this_machine_equals_that_of_ip() -> None:
    said = subprocess.run(["ip", "-4", "route", "show", "default"], capture_output=True, text=True, check=True)
    words = said.stdout.split()
    route = read_route(Reader(Roots(), 0.0))
    if "dev" in words:
        assert route is not None and route.interface == words[words.index("dev") + 1]
    else:
        assert route is None or route.version == 6
