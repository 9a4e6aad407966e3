"""What the planner is told of the board before it has measured anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_runtime.planning.plan import Surroundings

if TYPE_CHECKING:
    from edge_runtime.planning.board_profile import Profile

# Joules of drafting count double ten degrees above this, and so many times where the board is throttled already.
HOT_CELSIUS = 75.0
THROTTLED = 2.0


class Device(msgspec.Struct, frozen=True):
    """Modelled or published figures of one board with one draft; the planner corrects the times by what it sees.

    Attributes:
        step_seconds: one draft step behind an empty text.
        step_seconds_per_token: what each token of the text adds to that.
        prefill_seconds: per token that the draft reads and does not guess.
        overhead_seconds: the board's own work per round.
        idle_watts: what the board draws doing nothing.
        busy_watts: what it draws drafting.
        radio_watts: above idle, for as long as an exchange lasts.
        joules_per_byte: on the link, either way.
    """

    step_seconds: float = 0.01
    step_seconds_per_token: float = 0.0
    prefill_seconds: float = 0.0025
    overhead_seconds: float = 0.003
    idle_watts: float = 3.0
    busy_watts: float = 8.0
    radio_watts: float = 0.0
    joules_per_byte: float = 0.0

    def step_at(self, position: float) -> float:
        """Seconds of a draft step behind `position` tokens."""
        return self.step_seconds + self.step_seconds_per_token * position

    @classmethod
    def of(
        cls,
        profile: Profile,
        weight_bytes: int,
        *,
        radio: str = "",
        cache_bytes: int = 0,
        threads: int = 0,
        overhead_seconds: float = 0.003,
    ) -> Device:
        """The board of `profile` with a draft of `weight_bytes`.

        Args:
            radio: `wifi`, `ethernet`, `lte` or `5g`; empty counts no energy for talking.
            cache_bytes: keys and values of one token in all layers.
            threads: CPU threads of a step; 0 takes the fastest measured.
            overhead_seconds: the board's own work per round; no profile knows it.
        """
        far = 1024
        step = profile.draft_seconds(weight_bytes, 0, cache_bytes=cache_bytes, threads=threads)
        later = profile.draft_seconds(weight_bytes, far, cache_bytes=cache_bytes, threads=threads)
        unknown = cls()
        idle = unknown.idle_watts if profile.power is None else profile.power.idle_watts
        above = profile.draft_joules(weight_bytes, 0, cache_bytes=cache_bytes, threads=threads)
        return cls(
            step_seconds=step,
            step_seconds_per_token=max(0.0, later - step) / far,
            prefill_seconds=profile.prefill_seconds(weight_bytes, far, threads=threads) / far,
            overhead_seconds=overhead_seconds,
            idle_watts=idle,
            busy_watts=unknown.busy_watts if above is None else idle + above / step,
            radio_watts=profile.transfer_joules(radio, 0, 0, 1.0) or 0.0,
            joules_per_byte=(profile.transfer_joules(radio, 1, 1, 0.0) or 0.0) / 2,
        )


def heat_of(surroundings: Surroundings) -> float:
    """How many times dearer a joule of drafting is on a board that is hot or throttled: heat is what it makes."""
    factor = THROTTLED if surroundings.throttled else 1.0
    if surroundings.celsius is not None:
        factor *= 1.0 + max(0.0, surroundings.celsius - HOT_CELSIUS) / 10.0
    return factor
