"""Energy budgets, and the virtual queue that turns overspending into a price per joule.

Energy spent beyond the budget accumulates in a virtual queue, and the queue's length sets the price of a joule
(Lyapunov drift-plus-penalty: minimize time + price * (joules - budgeted joules)). Plans therefore save energy exactly
as long as too much is being spent, without a model of the link, the board or the texts.
"""

from __future__ import annotations

import datetime
import math
import re

import msgspec

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.plan import Outcome, Surroundings
from edge_runtime.protocol.errors import InputError

# All values are chosen.
# Overspending by this many seconds' worth of the budget gives the maximum price, at which waiting is nearly free.
MAX_BACKLOG_SECONDS = 5.0
# Lower bound of the price of a second, as a share of its price without a budget.
MIN_SECOND_SHARE = 0.02
# Unspent energy is credited for at most this many seconds' worth of the budget.
MAX_SAVED_SECONDS = 5.0
# Lower bound of the allowance, so that an empty battery still gives a price.
MIN_ALLOWED_WATTS = 1e-3
# Weight of a new power reading in the moving average of measured to modeled power.
SENSOR_WEIGHT = 0.1


class EnergyBudget(msgspec.Struct, frozen=True):
    """Energy that the board may spend, idling included: a steady power, or the battery's charge until a time.

    Attributes:
        watts: average power; None to spend what is left in the battery.
        until: when the battery may be empty, on the clock of `Conditions.now`.
    """

    watts: float | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        if (self.watts is None) == (self.until is None):
            raise ValueError("an energy budget needs either watts or a time until which the battery must last")
        if self.watts is not None and not (math.isfinite(self.watts) and self.watts > 0):
            raise ValueError(f"an energy budget of {self.watts} watts is invalid: it must be a finite number above 0")

    def allowance(self, now: float, surroundings: Surroundings) -> float | None:
        """Return the power that may be drawn from `now` on; None if the battery's charge is unknown."""
        if self.watts is not None:
            return self.watts
        if surroundings.joules_left is None or self.until is None:
            return None
        return max(surroundings.joules_left / max(self.until - now, 1.0), MIN_ALLOWED_WATTS)


def parse_energy_budget(text: str, wall: datetime.datetime, clock: float) -> EnergyBudget:
    """Parse an energy budget: joules per hour such as `18000`, or a time of day such as `18:00`.

    Args:
        text: as given by the user.
        wall: current wall-clock time.
        clock: current time on the clock of `Conditions.now`.

    Raises:
        InputError: `text` is neither.
    """
    time = re.fullmatch(r"(?:until )?([01]?\d|2[0-3]):([0-5]\d)", text.strip())
    if time:
        end = wall.replace(hour=int(time[1]), minute=int(time[2]), second=0, microsecond=0)
        if end <= wall:
            end += datetime.timedelta(days=1)
        return EnergyBudget(until=clock + (end - wall).total_seconds())
    try:
        return EnergyBudget(watts=float(text) / 3600.0)
    except ValueError:
        raise InputError(
            f"{text!r} is not an energy budget: give joules per hour, such as 18000, or the time of day until which "
            "the battery must last, such as 18:00"
        ) from None


class EnergyQueue:
    """The virtual queue of energy spent beyond a budget.

    Attributes:
        backlog: overspent joules; negative after saving.
        allowed: watts that may be drawn; None if that is unknown.
        spent: total joules, modeled, and corrected by the power sensor if there is one.
    """

    def __init__(self, budget: EnergyBudget, device: DeviceModel) -> None:
        self.backlog = 0.0
        self.spent = 0.0
        self.allowed = budget.watts
        self._budget = budget
        self._device = device
        self._time: float | None = None
        self._sensor_ratio = 1.0

    def advance(self, now: float, surroundings: Surroundings) -> None:
        """Account for the idle energy and the allowance up to `now`."""
        self.allowed = self._budget.allowance(now, surroundings)
        if self._time is None:
            self._time = now
        seconds = max(0.0, now - self._time)
        self._time += seconds
        self._spend(self._device.idle_watts * seconds)
        if self.allowed is not None:
            # Savings are bounded, so that a long idle time does not permit a long burst.
            self.backlog = max(self.backlog - self.allowed * seconds, -MAX_SAVED_SECONDS * self.allowed)

    def observe(self, outcome: Outcome, joules: float) -> None:
        """Account for a round with modeled energy `joules` above idle."""
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        measured_watts = outcome.conditions.surroundings.watts
        if measured_watts is not None and seconds > 0.0:
            modeled_watts = self._device.idle_watts + joules / seconds
            self._sensor_ratio += SENSOR_WEIGHT * (measured_watts / modeled_watts - self._sensor_ratio)
        self._spend(joules)

    def pressure(self) -> float:
        """Return the backlog as a share of the one that gives the maximum price, from 0 to 1."""
        if self.allowed is None or self.backlog <= 0.0:
            return 0.0
        return min(1.0, self.backlog / (MAX_BACKLOG_SECONDS * self.allowed))

    def prices(self, second: float) -> tuple[float, float]:
        """Return the prices of a second and of a joule above idle.

        Idling draws less than the allowance, so waiting pays off the backlog and becomes cheaper as it grows.

        Args:
            second: price of a second without a budget.
        """
        pressure = self.pressure()
        if not pressure or self.allowed is None:
            return second, 0.0
        spare_watts = max(self.allowed - self._device.idle_watts, 0.1 * self._device.idle_watts)
        return second * max(1.0 - pressure, MIN_SECOND_SHARE), second * pressure / spare_watts

    def _spend(self, joules: float) -> None:
        self.spent += joules * self._sensor_ratio
        self.backlog += joules * self._sensor_ratio
