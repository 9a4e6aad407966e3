"""How true the emulator is, by sockets at its two ends: `python -m tests.emulator`. Three minutes."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_runtime.simulation.links import CONDUCTS, Conduct
from tests.emulator.measuring import losses, round_trips, throughput
from tests.emulator.network import ADDRESSES, Network, lacking
from tests.emulator.weather import Spell, steady

SPELLS = (
    *(Spell(conduct) for name, conduct in CONDUCTS.items() if name != "lan"),
    steady(0.002, rate=1e6),
    steady(0.02, rate=5e6),
    steady(0.02, rate=10e6),
    steady(0.02, rate=20e6),
    steady(0.6, rate=2e6),
    msgspec.structs.replace(steady(0.02, loss=0.05), burst=4.0),
)


def main() -> None:
    reason = lacking()
    if reason:
        raise SystemExit(f"no emulator: {reason}")
    table = Table(
        "link", "RTT, ms", "measured (90 % within)", "up, Mbit/s", "measured", "down", "measured", "loss", "measured"
    )
    with Network(seed=1) as network:
        for spell in track(SPELLS, "measuring"):
            table.add_row(*row(network, spell))
    Console(width=140).print(table)


def row(network: Network, spell: Spell) -> list[str]:
    conduct: Conduct = spell.conduct
    network.become(msgspec.structs.replace(spell, conduct=msgspec.structs.replace(conduct, loss=0.0)))
    trips = round_trips(network, 50)
    # Slow start takes round trips.
    up, down = (throughput(network, side, warm_up=1 + 15 * conduct.rtt_seconds) for side in ADDRESSES)
    network.become(spell)
    lost = losses(network, 6000, min(3000.0, conduct.up_rate / 8 / 100))
    jitter = f" ± {1e3 * conduct.jitter_seconds:g}" if conduct.jitter_seconds else ""
    wanted = f"{1e3 * conduct.rtt_seconds:g}{jitter}"
    within = f"{1e3 * trips.median:.1f} ({1e3 * trips.low:.1f} to {1e3 * trips.high:.1f})"
    share = f"{lost.lost / lost.sent:.1%}" + (f", {lost.run:.1f} in a row" if lost.lost else "")
    asked = f"{conduct.loss:.0%}" + (f", {spell.burst:g} in a row" if spell.burst > 1 else "")
    rates = f"{conduct.up_rate / 1e6:g}", f"{up / 1e6:.2f}", f"{conduct.down_rate / 1e6:g}", f"{down / 1e6:.2f}"
    return [conduct.name, wanted, within, *rates, asked, share]


if __name__ == "__main__":
    main()
