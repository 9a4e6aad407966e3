"""Batteries and mains power, from /sys/class/power_supply.

psutil reads the same directory, but only entries named BAT*, only below /sys, and raises FileNotFoundError if the
directory is missing. Fuel gauges on UPS hats are named after their chip.
"""

from __future__ import annotations

import msgspec

from edge_runtime.probes.reader import Reader, within

JOULES_PER_MICROWATT_HOUR = 3600e-6
# Upper bounds of a battery of a board or laptop: 10 kWh, 1 kW and 1 kV. Chosen: gauges report unknown values far above.
MAX_JOULES, MAX_WATTS, MAX_VOLTS = 36e6, 1e3, 1e3

STATES = {"Charging": "charging", "Discharging": "discharging", "Not charging": "idle", "Full": "full"}


class Battery(msgspec.Struct, frozen=True):
    """One battery; None for what its fuel gauge does not report.

    Attributes:
        state: `charging`, `discharging`, `idle` (neither), `full` or `unknown`.
        percent: state of charge.
        joules_left: energy left, at the present voltage if the gauge reports charge instead of energy.
        joules_full: energy when full.
        watts: power into or out of it, by `state`.
    """

    name: str
    state: str
    percent: float | None = None
    joules_left: float | None = None
    joules_full: float | None = None
    watts: float | None = None


class Supply(msgspec.Struct, frozen=True):
    """The power supplies of the board.

    Attributes:
        batteries: those that supply the board, not those of peripherals.
        mains: whether another source is connected; None if there is no sensor for it.
    """

    batteries: list[Battery]
    mains: bool | None

    @property
    def on_battery(self) -> bool | None:
        """Whether the board runs on battery; None if unknown."""
        states = {battery.state for battery in self.batteries}
        if "discharging" in states:
            return True
        if "charging" in states:
            return False
        if self.mains is not None:
            return bool(states) and not self.mains
        # A battery that is full or idle does not discharge, so the board has external power.
        return False if states & {"full", "idle"} else None

    @property
    def joules_left(self) -> float | None:
        """Energy in all batteries; None if a gauge does not report it."""
        return _sum([battery.joules_left for battery in self.batteries])

    @property
    def percent(self) -> float | None:
        """Mean state of charge; None if a gauge does not report it."""
        total = _sum([battery.percent for battery in self.batteries])
        return None if total is None else total / len(self.batteries)

    @property
    def watts(self) -> float | None:
        """Total discharge, which is the power of the whole board; None unless it runs on battery."""
        discharging = [battery.watts for battery in self.batteries if battery.state == "discharging"]
        return _sum(discharging) if self.on_battery else None


def read_supply(reader: Reader) -> Supply | None:
    """Read all power supplies; None if the kernel lists none."""
    classes = f"{reader.sysfs}/class/power_supply"
    names = reader.names(classes)
    batteries: list[Battery] = []
    online: list[bool] = []
    for name in names:
        path = f"{classes}/{name}"
        # A supply with scope Device belongs to a peripheral such as a mouse.
        if reader.text(f"{path}/scope") == "Device":
            continue
        if reader.text(f"{path}/type") in ("Battery", "UPS"):
            if reader.integer(f"{path}/present") != 0:
                batteries.append(_battery(reader, path, name))
        elif (state := reader.integer(f"{path}/online")) is not None:
            # USB-C ports report 1 for a fixed and 2 for a programmable supply.
            online.append(state > 0)
    return Supply(batteries, any(online) if online else None) if batteries or online else None


def _battery(reader: Reader, path: str, name: str) -> Battery:
    percent = within(reader.integer(f"{path}/capacity"), 0, 100)
    volts = within(_micro(reader.integer(f"{path}/voltage_now")), 0.1, MAX_VOLTS)
    full = _joules(reader, path, "full", volts)
    left = _joules(reader, path, "now", volts)
    if left is None and full is not None and percent is not None:
        left = full * percent / 100
    watts = _micro(reader.integer(f"{path}/power_now"))
    if watts is None:
        amperes = _micro(reader.integer(f"{path}/current_now"))
        watts = None if amperes is None or volts is None else amperes * volts
    state = STATES.get(reader.text(f"{path}/status") or "", "unknown")
    # Drivers disagree on the sign of a discharge; `state` gives the direction.
    return Battery(
        name=name,
        state=state,
        percent=percent,
        joules_left=left,
        joules_full=full,
        watts=None if watts is None else within(abs(watts), 0.0, MAX_WATTS),
    )


def _joules(reader: Reader, path: str, quantity: str, volts: float | None) -> float | None:
    energy: float | None = reader.integer(f"{path}/energy_{quantity}")
    if energy is None:
        charge = reader.integer(f"{path}/charge_{quantity}")
        energy = None if charge is None or volts is None else charge * volts
    # An empty battery has an energy of 0, but no battery is full at 0.
    lowest = 0.0 if quantity == "now" else 1.0
    return None if energy is None else within(energy * JOULES_PER_MICROWATT_HOUR, lowest, MAX_JOULES)


def _micro(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
