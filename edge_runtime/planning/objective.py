"""The planner's objective: a price for latency, verifier time, energy and traffic.

All prices are in seconds of the user's waiting time, so that one number compares plans:

    cost = latency * waiting seconds + verifier * forward seconds + joule * joules + byte * bytes

The planner minimizes the cost per token.
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.protocol.errors import InputError


class Objective(msgspec.Struct, frozen=True):
    """Prices in seconds of waiting time, all at least 0 and not all 0.

    Attributes:
        latency: of a second of waiting; 1 unless latency does not matter.
        verifier: of a second of the verifier's forwards.
        joule: of a joule of the board's energy.
    """

    latency: float = 1.0
    verifier: float = 0.0
    joule: float = 0.0
    byte: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            price = getattr(self, name)
            if not (math.isfinite(price) and price >= 0):
                raise ValueError(f"the price {name}={price} must be a finite number of at least 0")
        if not (self.latency or self.verifier or self.joule or self.byte):
            raise ValueError("all prices are 0, so all plans would cost the same: set at least one price")

    def cost(self, latency: float, verifier: float, joules: float, carried: float) -> float:
        """Return the cost of `latency` seconds, `verifier` forward seconds, `joules`, and `carried` bytes."""
        return self.latency * latency + self.verifier * verifier + self.joule * joules + self.byte * carried


# The prices of the presets are chosen as stated; explicit prices override them.
PRESETS = {
    # Latency alone.
    "latency": Objective(),
    # A verifier second saved serves other users: it is worth four seconds of waiting.
    "cloud": Objective(verifier=4.0),
    # On a Pi 5, a second of drafting draws 9 J more than waiting: wait up to 2.7 s to save it.
    "energy": Objective(joule=0.3),
    # A verifier second costs as much as a second of waiting, and a joule a tenth of its price in `energy`.
    "balanced": Objective(verifier=1.0, joule=0.03),
}


def parse_objective(text: str) -> Objective:
    """Parse an objective: the name of a preset, or prices such as `verifier=2,joule=0.05`.

    Prices that are not given are 0, except latency, which is 1.

    Raises:
        InputError: `text` is neither a preset nor valid prices.
    """
    preset = PRESETS.get(text.strip())
    if preset is not None:
        return preset
    prices: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            prices[name.strip()] = float(value)
        except ValueError:
            prices[""] = 0.0
    if prices.keys() <= set(Objective.__struct_fields__) and len(prices) == text.count(",") + 1:
        try:
            return Objective(**prices)
        except ValueError as error:
            raise InputError(f"the objective {text!r} is invalid: {error}") from None
    raise InputError(
        f"{text!r} is not an objective: use one of {', '.join(PRESETS)}, or prices in seconds of waiting such as "
        f"verifier=2,joule=0.05 (prices are {', '.join(Objective.__struct_fields__)})"
    )
