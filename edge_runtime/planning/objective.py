"""What a text should cost least of: seconds of waiting, of the verifier, joules of the board, bytes on the link.

Everything is priced in seconds of the reader's waiting, so that one number compares plans:

    cost = latency * waiting + verifier * verifier seconds + joule * joules + byte * bytes

and a plan is good if its cost per token is small.
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.protocol.errors import InputError


class Objective(msgspec.Struct, frozen=True):
    """Prices.

    Attributes:
        latency: of one second that the reader waits; the unit, unless it should count for nothing.
        verifier: of one second of the verifier's forwards, in seconds of waiting.
        joule: of one joule of the board's, in seconds of waiting.
        byte: of one byte on the link, in seconds of waiting.
    """

    latency: float = 1.0
    verifier: float = 0.0
    joule: float = 0.0
    byte: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            price = getattr(self, name)
            if not (math.isfinite(price) and price >= 0):
                raise ValueError(f"the price {name}={price} must be a number of at least 0")
        if not (self.latency or self.verifier or self.joule or self.byte):
            raise ValueError("all prices are 0, so every plan would cost the same: give one of them a price")

    def cost(self, latency: float, verifier: float, joules: float, carried: float) -> float:
        """Cost of what took `latency` seconds, `verifier` seconds of forwards, `joules` and `carried` bytes."""
        return self.latency * latency + self.verifier * verifier + self.joule * joules + self.byte * carried


# What each name stands for is a judgement; the reasons are here, and explicit prices override them.
PRESETS = {
    # The reader's time and nothing else.
    "latency": Objective(),
    # A busy verifier serves somebody else with every second spared: worth as much waiting as four readers' seconds.
    "cloud": Objective(verifier=4.0),
    # On a Pi 5, a second of drafting draws 9 J more than waiting: waiting up to 2.7 s to spare it.
    "energy": Objective(joule=0.3),
    # A verifier second as dear as a reader's, and a joule worth a tenth of what `energy` makes it.
    "balanced": Objective(verifier=1.0, joule=0.03),
}


def parse_objective(text: str) -> Objective:
    """The objective that `text` names: one of `PRESETS`, or prices such as `verifier=2,joule=0.05`.

    Prices that are not named are 0, but for latency, which is 1.

    Raises:
        InputError: neither a name nor prices.
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
            raise InputError(f"the objective {text!r} cannot be: {error}") from None
    raise InputError(
        f"{text!r} is no objective: name one of {', '.join(PRESETS)}, or prices in seconds of waiting such as "
        f"verifier=2,joule=0.05 (prices are {', '.join(Objective.__struct_fields__)})"
    )
