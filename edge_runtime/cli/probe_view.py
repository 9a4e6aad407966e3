"""Renders probe snapshots as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from edge_runtime.planning.plan import Surroundings
from edge_runtime.probes import Snapshot, TcpInfo

# Name and value.
Line = tuple[str, str]


def render_snapshot(snapshot: Snapshot, tcp: TcpInfo | None) -> Group:
    """Render a snapshot: the readings, the inputs of the planner, and the probes that failed."""
    readings = Table(box=None, show_header=False, pad_edge=False)
    for title, lines in (
        ("board", _board(snapshot)),
        ("energy", _energy(snapshot)),
        ("link", _link(snapshot, tcp)),
        ("planner", _planner(snapshot.surroundings(tcp))),
    ):
        for index, (name, value) in enumerate(lines):
            readings.add_row(Text("" if index else title, style="bold"), Text(name, style="dim"), value)
    failures = Table("probe", "failed", "error", box=None, pad_edge=False, header_style="bold red")
    for name, report in snapshot.probes.items():
        for error in report.errors:
            failures.add_row(name, f"{report.failures} of {report.readings}", error)
    seconds = sum(report.seconds for report in snapshot.probes.values())
    failing = sum(bool(report.errors) for report in snapshot.probes.values())
    summary = f"{len(snapshot.probes)} probes, {failing} with errors, {1e3 * seconds:.1f} ms for the last readings"
    return Group(readings, *([failures] if failures.row_count else []), Text(summary, style="dim"))


def _board(snapshot: Snapshot) -> Iterator[Line]:
    processor, thermal, throttling = snapshot.processor, snapshot.thermal, snapshot.throttling
    if processor is not None:
        if processor.model is not None:
            yield _line("model", processor.model)
        parts = (
            _format_unit(processor.cores, "cores"),
            _format_unit(processor.hertz, "Hz"),
            _format_unit(processor.most_hertz, "Hz maximum"),
            None if processor.busy is None else f"{processor.busy:.0%} busy",
            None if processor.load is None else f"load {processor.load:g}",
        )
        yield _line("processor", *parts)
    if thermal is not None:
        yield _line("temperature", *(f"{zone.name} {zone.celsius:.1f} °C" for zone in thermal.zones))
    if throttling is not None:
        now = {True: "yes", False: "no", None: "unknown"}[throttling.now]
        since_boot = f"since boot: {', '.join(throttling.since_boot)}" if throttling.since_boot else None
        yield _line("throttled", now, *throttling.reasons, since_boot)


def _energy(snapshot: Snapshot) -> Iterator[Line]:
    if (power := snapshot.power) is not None:
        part = "whole board" if power.whole_board else "part of the board only"
        if power.watts is None:
            yield _line("power", "unknown", power.note)
        else:
            yield _line("power", _format_unit(power.watts, "W"), f"from {power.source}" if power.source else None, part)
        for rail in power.rails if power.watts is None or len(power.rails) > 1 else []:
            yield _line("", f"{_format_unit(rail.watts, 'W')} {rail.chip} {rail.label}")
    if snapshot.supply is not None:
        for battery in snapshot.supply.batteries:
            parts = (
                battery.state,
                None if battery.percent is None else f"{battery.percent:.0f} %",
                _format_unit(battery.joules_left, "J left"),
                _format_unit(battery.joules_full, "J when full"),
                _format_unit(battery.watts, "W"),
            )
            yield _line(battery.name, *parts)
        if snapshot.supply.mains is not None:
            yield _line("mains", "yes" if snapshot.supply.mains else "no")


def _link(snapshot: Snapshot, tcp: TcpInfo | None) -> Iterator[Line]:
    route, metering = snapshot.route, snapshot.metering
    if tcp is not None:
        yield _line(
            "connection",
            f"RTT {_format_unit(tcp.rtt_seconds, 's')} ± {_format_unit(tcp.rtt_variation_seconds, 's')}",
            None if tcp.min_rtt_seconds is None else f"minimum {_format_unit(tcp.min_rtt_seconds, 's')}",
            f"{tcp.bytes_sent} bytes sent, {tcp.bytes_acked} acknowledged, {tcp.bytes_received} received",
            f"{tcp.retransmits} retransmits",
        )
    if route is not None:
        metered = None if metering is None else {True: "metered", False: "not metered", None: None}[metering.metered]
        yield _line("route", route.interface, None if route.gateway is None else f"via {route.gateway}", metered)
    for interface in snapshot.interfaces or []:
        up = {True: "up", False: "down", None: None}[interface.up]
        parts = (
            interface.kind,
            up,
            _format_unit(interface.bits_per_second, "bit/s"),
            _format_traffic("received", interface.received_bytes, interface.received_bytes_per_second),
            _format_traffic("sent", interface.sent_bytes, interface.sent_bytes_per_second),
            f"{interface.lost} lost",
        )
        yield _line(interface.name, *parts)
    for wireless in snapshot.wireless or []:
        signal, quality = _format_unit(wireless.signal_dbm, "dBm"), f"quality {wireless.quality:g}"
        yield _line(f"{wireless.interface} signal", signal, quality, f"{wireless.retries} given up")
    for station in snapshot.stations or []:
        if station.connected:
            yield _line(
                f"{station.interface} nl80211",
                _format_unit(station.signal_dbm, "dBm"),
                f"down {_format_unit(station.receive_bits_per_second, 'bit/s')}",
                f"up {_format_unit(station.send_bits_per_second, 'bit/s')}",
                _format_unit(station.hertz, "Hz"),
            )
    if (modem := snapshot.modem) is not None:
        roaming = {True: "roaming", False: "at home", None: None}[modem.roaming]
        percent = None if modem.quality_percent is None else f"quality {modem.quality_percent:.0f} %"
        yield _line("modem", modem.state, *modem.technologies, roaming, percent)
        if (radio := modem.radio) is not None:
            values = {"RSRP": (radio.rsrp_dbm, "dBm"), "RSRQ": (radio.rsrq_db, "dB"), "SINR": (radio.sinr_db, "dB")}
            known = (f"{name} {_format_unit(*value)}" for name, value in values.items() if value[0] is not None)
            yield _line("", radio.technology, *known)


def _planner(surroundings: Surroundings) -> Iterator[Line]:
    known = {name: value for name, value in msgspec.structs.asdict(surroundings).items() if value is not None}
    for name, value in known.items():
        yield _line(name, f"{value:.4g}" if isinstance(value, float) else ("yes" if value else "no"))
    if unknown := [name for name in surroundings.__struct_fields__ if name not in known]:
        yield _line("unknown", *unknown)


def _line(name: str, *parts: str | None) -> Line:
    """Return a line whose value has these parts; those that are None or empty are left out."""
    return name, ", ".join(filter(None, parts))


def _format_traffic(direction: str, count: int | None, rate: float | None) -> str:
    return f"{direction} {_format_unit(count, 'B')}, {_format_unit(rate, 'B/s')}"


def _format_unit(value: float | None, unit: str) -> str | None:
    """Format with an SI prefix and four significant digits, such as 1.2 GHz or 300 µs."""
    if value is None:
        return None
    if unit.startswith(("dB", "cores")) or value == 0:
        return f"{value:g} {unit}"
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6)):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"
