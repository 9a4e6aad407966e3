"""Compare the configured link with what sockets at its two ends measure: `python -m tests.emulator`. Three minutes."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_runtime.simulation.links import LINK_PRESETS, LinkParameters
from tests.emulator.link_conditions import LinkConditions, steady_conditions
from tests.emulator.measurement import measure_loss, measure_round_trips, measure_throughput
from tests.emulator.network import ADDRESSES, Network, missing_requirement

CONDITIONS = (
    *(LinkConditions(link) for name, link in LINK_PRESETS.items() if name != "lan"),
    steady_conditions(0.002, rate=1e6),
    steady_conditions(0.02, rate=5e6),
    steady_conditions(0.02, rate=10e6),
    steady_conditions(0.02, rate=20e6),
    steady_conditions(0.6, rate=2e6),
    msgspec.structs.replace(steady_conditions(0.02, loss=0.05), burst=4.0),
)


def main() -> None:
    reason = missing_requirement()
    if reason:
        raise SystemExit(f"the emulator cannot run: {reason}")
    table = Table(
        "link", "RTT, ms", "measured (5 % to 95 %)", "up, Mbit/s", "measured", "down", "measured", "loss", "measured"
    )
    with Network(seed=1) as network:
        for conditions in track(CONDITIONS, "measuring"):
            table.add_row(*measure_row(network, conditions))
    Console(width=140).print(table)


def measure_row(network: Network, conditions: LinkConditions) -> list[str]:
    link: LinkParameters = conditions.link
    network.set_conditions(msgspec.structs.replace(conditions, link=msgspec.structs.replace(link, loss=0.0)))
    trips = measure_round_trips(network, 50)
    # TCP slow start takes several round trips, so the warm-up grows with the round-trip time.
    up, down = (measure_throughput(network, side, warm_up=1 + 15 * link.rtt_seconds) for side in ADDRESSES)
    network.set_conditions(conditions)
    lost = measure_loss(network, 6000, min(3000.0, link.up_rate / 8 / 100))
    jitter = f" ± {1e3 * link.jitter_seconds:g}" if link.jitter_seconds else ""
    expected_rtt = f"{1e3 * link.rtt_seconds:g}{jitter}"
    measured_rtt = f"{1e3 * trips.median:.1f} ({1e3 * trips.low:.1f} to {1e3 * trips.high:.1f})"
    measured_loss = f"{lost.lost / lost.sent:.1%}" + (f", {lost.run:.1f} in a row" if lost.lost else "")
    expected_loss = f"{link.loss:.0%}" + (f", {conditions.burst:g} in a row" if conditions.burst > 1 else "")
    rates = f"{link.up_rate / 1e6:g}", f"{up / 1e6:.2f}", f"{link.down_rate / 1e6:g}", f"{down / 1e6:.2f}"
    return [link.name, expected_rtt, measured_rtt, *rates, expected_loss, measured_loss]


if __name__ == "__main__":
    main()
