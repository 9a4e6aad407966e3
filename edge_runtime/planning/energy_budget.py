"""Energy that may be spent, and the virtual queue that turns overspending into a price.

What the board spends beyond its budget waits in a queue, and the queue's length is the price of a joule (Lyapunov
optimisation: minimise time + price * (joules - budgeted joules)). So plans get thriftier exactly as long as too much is
being spent, whatever the link, the board and the texts are like, and without a model of any of them.
"""

from __future__ import annotations

import datetime
import math
import re

import msgspec

from edge_runtime.planning.device_model import Device
from edge_runtime.planning.plan import Outcome, Surroundings
from edge_runtime.protocol.errors import InputError

# Overspending worth so many seconds of the budget makes waiting free: the most that a price can do.
FULL_SECONDS = 5.0
# Waiting never becomes cheaper than this share of its own price.
LEAST_WAITING = 0.02
# What is saved counts for so many seconds of the budget at most.
SAVED_SECONDS = 5.0
# What an empty battery still allows, so that there is a price.
LEAST_WATTS = 1e-3
# Share of a new reading of the power sensor in how far it is from what is modelled.
SENSED = 0.1


class Budget(msgspec.Struct, frozen=True):
    """Joules that the board may spend, idling included: either steadily, or what the battery holds until a time.

    Attributes:
        watts: spent on average; None for what is left of the battery.
        until: when the battery may be empty, on the clock of `Conditions.now`.
    """

    watts: float | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        if (self.watts is None) == (self.until is None):
            raise ValueError("a budget is either so many watts, or lasts until a time")
        if self.watts is not None and not (math.isfinite(self.watts) and self.watts > 0):
            raise ValueError(f"a budget of {self.watts} watts must be a number above 0")

    def allowance(self, now: float, surroundings: Surroundings) -> float | None:
        """Watts that may be drawn from `now` on; None if nobody knows what is in the battery."""
        if self.watts is not None:
            return self.watts
        if surroundings.joules_left is None or self.until is None:
            return None
        return max(surroundings.joules_left / max(self.until - now, 1.0), LEAST_WATTS)


def parse_budget(text: str, wall: datetime.datetime, clock: float) -> Budget:
    """The budget that `text` names: joules per hour such as `18000`, or a time of day such as `18:00`.

    Args:
        wall: what a clock on the wall shows now.
        clock: what the clock of `Conditions.now` shows now.

    Raises:
        InputError: neither.
    """
    time = re.fullmatch(r"(?:until )?([01]?\d|2[0-3]):([0-5]\d)", text.strip())
    if time:
        end = wall.replace(hour=int(time[1]), minute=int(time[2]), second=0, microsecond=0)
        if end <= wall:
            end += datetime.timedelta(days=1)
        return Budget(until=clock + (end - wall).total_seconds())
    try:
        return Budget(watts=float(text) / 3600.0)
    except ValueError:
        raise InputError(
            f"{text!r} is no energy budget: give joules per hour, such as 18000, or until when the battery must last, "
            "such as 18:00"
        ) from None


class EnergyQueue:
    """What was spent beyond a budget.

    Attributes:
        backlog: joules spent too much; negative if there were some to spare.
        allowed: watts that may be drawn; None if the budget cannot be known.
        spent: joules in all, modelled, and corrected by the power sensor where there is one.
    """

    def __init__(self, budget: Budget, device: Device) -> None:
        self.backlog = 0.0
        self.spent = 0.0
        self.allowed = budget.watts
        self._budget = budget
        self._device = device
        self._time: float | None = None
        self._correction = 1.0

    def advance(self, now: float, surroundings: Surroundings) -> None:
        """Counts the time up to `now`, in which the board idled at least."""
        self.allowed = self._budget.allowance(now, surroundings)
        if self._time is None:
            self._time = now
        seconds = max(0.0, now - self._time)
        self._time += seconds
        self._spend(self._device.idle_watts * seconds)
        if self.allowed is not None:
            # What is saved up is bounded: a budget is not for hoarding.
            self.backlog = max(self.backlog - self.allowed * seconds, -SAVED_SECONDS * self.allowed)

    def observe(self, outcome: Outcome, joules: float) -> None:
        """Counts a round that is modelled to have taken `joules` above idle."""
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        sensed = outcome.conditions.surroundings.watts
        if sensed is not None and seconds > 0.0:
            modelled = self._device.idle_watts + joules / seconds
            self._correction += SENSED * (sensed / modelled - self._correction)
        self._spend(joules)

    def price(self) -> float:
        """Of a joule, as a share of what makes waiting free."""
        if self.allowed is None or self.backlog <= 0.0:
            return 0.0
        return min(1.0, self.backlog / (FULL_SECONDS * self.allowed))

    def waiting(self, second: float) -> tuple[float, float]:
        """The prices of a second and of a joule above idle, where a second without a budget costs `second`.

        Waiting draws less than is allowed, so it pays off what was spent too much.
        """
        share = self.price()
        if not share or self.allowed is None:
            return second, 0.0
        saved = max(self.allowed - self._device.idle_watts, 0.1 * self._device.idle_watts)
        return second * max(1.0 - share, LEAST_WAITING), second * share / saved

    def _spend(self, joules: float) -> None:
        self.spent += joules * self._correction
        self.backlog += joules * self._correction
