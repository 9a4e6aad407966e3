"""Energy that may be spent, and the virtual queue that turns overspending into a price."""

from __future__ import annotations

import msgspec


class Budget(msgspec.Struct, frozen=True):
    """Joules that the board may spend, idling included.

    Attributes:
        watts: spent steadily, such as joules per hour / 3600.
    """

    watts: float
