"""Prior speed and power of a board with its draft, which the planner starts from before it has measured anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_runtime.planning.plan import Surroundings

if TYPE_CHECKING:
    from edge_runtime.planning.board_profile import BoardProfile, MeasuredDraft

# Drafting joules count double at 10 degrees above HOT_CELSIUS, and THROTTLED_FACTOR times on a throttled board. Chosen.
HOT_CELSIUS = 75.0
THROTTLED_FACTOR = 2.0
# Context length, in tokens, at which a profile is sampled for the slope of the step time and for the prefill rate.
LONG_CONTEXT = 1024


class DeviceModel(msgspec.Struct, frozen=True):
    """Modeled or published figures of one board with one draft; the planner corrects the times by measurements.

    Attributes:
        step_seconds: one draft step on an empty context.
        step_seconds_per_token: increase of that per token of context.
        prefill_seconds: prefill time per token.
        overhead_seconds: the board's own work per round.
        idle_watts: power draw of the idle board.
        busy_watts: power draw while drafting.
        radio_watts: draw above idle during an exchange.
        joules_per_byte: on the link, in either direction.
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
        """Return the seconds of a draft step after `position` tokens."""
        return self.step_seconds + self.step_seconds_per_token * position

    @classmethod
    def from_measurement(cls, entry: MeasuredDraft, prior: DeviceModel) -> DeviceModel:
        """Return `prior` with the times of a draft that was measured on this board, with its number of threads."""
        step = entry.seconds(0)
        return msgspec.structs.replace(
            prior,
            step_seconds=step,
            step_seconds_per_token=max(0.0, entry.seconds(LONG_CONTEXT) - step) / LONG_CONTEXT,
            prefill_seconds=1.0 / entry.prefill_tokens_per_second,
        )

    @classmethod
    def from_profile(
        cls, profile: BoardProfile, weight_bytes: int, *, radio: str = "", cache_bytes: int = 0
    ) -> DeviceModel:
        """Return the figures of the board in `profile` with a draft of `weight_bytes`.

        Args:
            weight_bytes: size of the draft's weights.
            radio: `wifi`, `ethernet`, `lte` or `5g`; empty counts no energy for transfers.
            cache_bytes: KV cache bytes of one token in all layers.
        """
        step = profile.draft_seconds(weight_bytes)
        later = profile.draft_seconds(weight_bytes, LONG_CONTEXT, cache_bytes)
        defaults = cls()
        idle = defaults.idle_watts if profile.power is None else profile.power.idle_watts
        above_idle = profile.draft_joules(weight_bytes)
        return cls(
            step_seconds=step,
            step_seconds_per_token=max(0.0, later - step) / LONG_CONTEXT,
            prefill_seconds=profile.prefill_seconds(weight_bytes, LONG_CONTEXT) / LONG_CONTEXT,
            idle_watts=idle,
            busy_watts=defaults.busy_watts if above_idle is None else idle + above_idle / step,
            radio_watts=profile.transfer_joules(radio, 0, 0, 1.0) or 0.0,
            joules_per_byte=(profile.transfer_joules(radio, 1, 1, 0.0) or 0.0) / 2,
        )


def heat_factor(surroundings: Surroundings) -> float:
    """Return the factor on the price of drafting joules on a hot or throttled board, because drafting heats it."""
    factor = THROTTLED_FACTOR if surroundings.throttled else 1.0
    if surroundings.celsius is not None:
        factor *= 1.0 + max(0.0, surroundings.celsius - HOT_CELSIUS) / 10.0
    return factor
