"""Interfaces, Wi-Fi and modems."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edge_runtime.probes.interface import InterfaceProbe
from edge_runtime.probes.modem import ModemSignal, parse_modem, parse_signal, read_modem
from edge_runtime.probes.reader import ProbeError, Reader, Roots
from edge_runtime.probes.wireless import Station, parse_link, parse_wireless, read_stations
from tests.edge_runtime.probes.conftest import BOARDS, roots_of

Make = Callable[..., Reader]


def interface(name: str, received: int, sent: int, device: bool = True) -> dict[str, str]:
    base = f"sysfs/class/net/{name}"
    files = {f"{base}/statistics/rx_bytes": f"{received}\n", f"{base}/statistics/tx_bytes": f"{sent}\n"}
    return files | ({f"{base}/device/uevent": ""} if device else {})


def test_rates_are_between_readings(reader: Make) -> None:
    interfaces = InterfaceProbe()
    first = interfaces.read(reader(interface("eth0", 1000, 50), now=0.0))
    assert first is not None and first[0].received_bytes_per_second is None
    second = interfaces.read(reader(interface("eth0", 6000, 60), now=5.0))
    assert second is not None
    assert (second[0].received_bytes_per_second, second[0].sent_bytes_per_second) == (1000.0, 2.0)
    # Pulled out and put back: counted from zero again.
    third = interfaces.read(reader(interface("eth0", 10, 70), now=10.0))
    assert third is not None
    assert (third[0].received_bytes_per_second, third[0].sent_bytes_per_second) == (None, 2.0)


def test_virtual_interfaces_only_if_the_route_uses_them(reader: Make) -> None:
    files = interface("tun0", 1, 1, device=False) | interface("veth1", 1, 1, device=False)
    assert InterfaceProbe().read(reader(files)) is None
    header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    files["procfs/net/route"] = header + "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n"
    read = InterfaceProbe().read(reader(files))
    assert read is not None and [(found.name, found.kind) for found in read] == [("tun0", "virtual")]


def test_psutil_counts_the_same_bytes_here() -> None:
    """The kernel's files agree with psutil, which the probe uses on the real machine."""
    before = psutil.net_io_counters(pernic=True, nowrap=False)
    files = Roots(Path("/proc/self/root/sys"), Path("/proc/self/root/proc"))
    assert not files.is_this_machine
    mine = [*(InterfaceProbe().read(Reader(files, 0.0)) or []), *(InterfaceProbe().read(Reader(Roots(), 0.0)) or [])]
    after = psutil.net_io_counters(pernic=True, nowrap=False)
    for found in mine:
        assert found.received_bytes is not None and found.sent_bytes is not None
        assert before[found.name].bytes_recv <= found.received_bytes <= after[found.name].bytes_recv
        assert before[found.name].bytes_sent <= found.sent_bytes <= after[found.name].bytes_sent


HEAD = "Inter-| sta-|   Quality        |   Discarded packets\n face | tus | link level noise |  nwid  crypt\n"


def test_wireless_levels_of_old_and_new_drivers() -> None:
    new, old = parse_wireless(
        HEAD
        + " wlan0: 0000   58.  -52.  -95.       0      0      0      7      0        3\n"
        + " wlan1: 0000   43   187    0         0      0      0      0      0        0\n"
    )
    for level in ("-256.", "-1.", "0"):
        (unknown,) = parse_wireless(HEAD + f" wlan0: 0000   58.  {level}  {level}  0 0 0 7 0 3\n")
        assert (unknown.signal_dbm, unknown.noise_dbm, unknown.quality) == (None, None, 58.0)
    assert (new.signal_dbm, new.noise_dbm, new.retries, new.missed_beacons) == (-52.0, -95.0, 7, 3)
    assert (old.signal_dbm, old.noise_dbm) == (None, None)
    assert parse_wireless(HEAD) == []


def test_a_link_without_rates() -> None:
    assert parse_link("wlan0", "Connected to 02:00:5e:10:20:30\n\tsignal: -1 dBm") == Station("wlan0", True)
    assert parse_link("wlan0", "Connected to 02:00:5e:10:20:30 (on wlan0)") == Station("wlan0", True)
    with pytest.raises(ProbeError):
        parse_link("wlan0", "Connected to 02:00:5e:10:20:30 (on wlan0)\n\tsignal: loud dBm")


def test_without_iw_nothing_is_known(reader: Make) -> None:
    at = reader({"sysfs/class/net/wlan0/phy80211/index": "0"})
    assert read_stations(at) is None and at.errors == []


def recorded(name: str) -> dict[str, dict[str, dict[str, object]]]:
    answer: dict[str, dict[str, dict[str, object]]] = json.loads((BOARDS / "jetson-orin-nano/bin" / name).read_text())
    return answer


def test_a_modem_that_searches() -> None:
    answer = recorded("mmcli_-m_any_-J")
    answer["modem"]["generic"] |= {"state": "searching", "access-technologies": [], "signal-quality": {"value": "0"}}
    answer["modem"]["3gpp"]["registration-state"] = "--"
    modem = parse_modem(json.dumps(answer))
    assert (modem.state, modem.technologies, modem.quality_percent, modem.roaming) == ("searching", [], 0.0, None)


def test_5g_before_lte_and_none_before_measuring() -> None:
    answer = recorded("mmcli_-m_any_--signal-get_-J")
    signal = answer["modem"]["signal"]
    assert isinstance(signal["lte"], dict)
    signal["5g"] = {"rsrp": "-98.00", "rsrq": "-12.00", "snr": "--"}
    assert parse_signal(json.dumps(answer)) == ModemSignal("5g", None, -98.0, -12.0, None)
    signal["5g"] = {"rsrp": "-32768.00", "rsrq": "-32768.00", "snr": "-3276.80"}
    radio = parse_signal(json.dumps(answer))
    assert radio is not None and radio.technology == "lte"
    for technology in ("5g", "lte"):
        signal[technology] = {"rsrp": "--", "rsrq": "--", "snr": "--"}
    assert parse_signal(json.dumps(answer)) is None


def test_programs_are_not_run_without_the_hardware(reader: Make) -> None:
    def run(arguments: tuple[str, ...]) -> bytes | None:
        raise AssertionError(arguments)

    roots = roots_of(BOARDS / "ups-hat")
    assert read_modem(Reader(Roots(roots.sysfs, roots.procfs, run), 0.0)) is None
