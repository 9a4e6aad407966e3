"""Regret budget of drafting: bounds what drafting may lose in total against leaving all tokens to the verifier.

Cost estimates err, and before the first rounds the acceptance is a guess. Therefore streaming is the default, and every
other round has to fit into a budget: an initial amount, plus a small share of every token, plus what drafting has saved
so far. Before a round, the most that it can lose (its cost if every draft token is rejected, and the exchange that a
return to streaming takes) is compared with what is left; a round that does not fit is not drafted, whatever it
promises. After a round, its measured cost is compared with what streaming the same tokens would have cost. As long as
no round costs more than its worst case, the total loss never exceeds

    INITIAL_TOKENS + CREDIT_PER_TOKEN * generated tokens

This is a conservative bandit (Wu, Shariff, Lattimore, Szepesvari, "Conservative Bandits", arXiv 1602.04282) with
streaming as the default arm.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.protocol.messages import MAX_CONTINUATION_TOKENS

# All amounts are in streamed tokens: the cost of a further token of a stream. Chosen.
INITIAL_TOKENS = 20.0
# Share of all generated tokens that is credited.
CREDIT_PER_TOKEN = 0.014
# Bound of the budget in both directions, so that neither savings nor a stalled round count forever.
MAX_TOKENS = 100.0
# Number of unfinished texts that are remembered; more than a board answers at once.
MAX_TEXTS = 128
# A planned round without an outcome (its answer was cancelled) blocks its share of the budget for this long.
RESERVATION_SECONDS = 60.0


class RoundReservation(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the budget that a planned round holds until its outcome is known.

    Attributes:
        position: of the text at the round's begin.
        time: of the plan, on the clock of `Conditions.now`.
        loss: the most that the round is expected to lose, in streamed tokens.
        cost: the round's cost in that case, in the objective's seconds.
        exchange: cost of a streaming round of one token beyond that of its token, in streamed tokens.
        further: cost of each further token of a stream, in the objective's seconds.
    """

    position: int
    time: float
    exchange: float
    further: float
    loss: float = 0.0
    cost: float = 0.0


class _Text(msgspec.Struct):
    """State of one text.

    Attributes:
        observed: position at the begin of its last observed round.
        continues_stream: whether that round was a stream of the maximum length, after which streaming, too, takes
            another exchange.
        reservations: of its rounds without an outcome.
    """

    observed: int = -1
    continues_stream: bool = False
    reservations: list[RoundReservation] = []


class RegretBudget:
    """The amount that drafting may still lose against streaming.

    Rounds of several texts may interleave; a text is identified by the position at which it ends at the latest.

    Attributes:
        tokens: the budget, in streamed tokens, without reservations.
        lost: total loss so far, in streamed tokens; negative if drafting has saved time.
        generated: total tokens.
    """

    def __init__(self, tokens: float = INITIAL_TOKENS) -> None:
        self.tokens = min(max(tokens, -MAX_TOKENS), MAX_TOKENS)
        self.lost = 0.0
        self.generated = 0
        self._texts: dict[int, _Text] = {}

    def begins_text(self, conditions: Conditions) -> bool:
        """Return whether no round of this text has been observed or planned yet."""
        text = self._texts.get(_end(conditions))
        if text is None or conditions.position <= text.observed:
            return True
        return text.observed < 0 and not any(held.position < conditions.position for held in text.reservations)

    def available(self, conditions: Conditions) -> float:
        """Return what is left for a round, other planned rounds deducted."""
        held = sum(reservation.loss for reservation in self._held(conditions))
        return self.tokens - held

    def reserve(self, conditions: Conditions, reservation: RoundReservation) -> None:
        """Set the budget of a planned round aside until its outcome, or a later plan for the same position."""
        end = _end(conditions)
        text = self._texts.pop(end, None)
        if text is None or conditions.position <= text.observed:
            text = _Text()
        # A plan for the same or an earlier position replaces an early round that has become void.
        text.reservations = [held for held in text.reservations if held.position < conditions.position]
        text.reservations.append(reservation)
        self._texts[end] = text
        while len(self._texts) > MAX_TEXTS:
            del self._texts[next(iter(self._texts))]

    def observe(self, outcome: Outcome, *, equivalent: float, cost: float, first: float) -> None:
        """Charge or credit a round. One that was never reserved is only credited.

        Args:
            equivalent: own tokens that the verifier streams, on average, in the time that this round's tokens would
                have taken it (`CostModel.streaming_equivalent`).
            cost: measured cost of the round, in the objective's seconds.
            first: the part of that cost until its first token.
        """
        conditions = outcome.conditions
        gained = CREDIT_PER_TOKEN * outcome.tokens
        text = self._texts.get(_end(conditions))
        held = None
        if text is not None:
            held = next((one for one in text.reservations if one.position == conditions.position), None)
        if text is not None and held is not None:
            text.reservations = [one for one in text.reservations if one.position > conditions.position]
            # Streaming needs a single exchange for a whole text.
            new_text, text.observed = text.observed < 0 or text.continues_stream, conditions.position
            text.continues_stream = new_text and not outcome.drafted and outcome.tokens >= MAX_CONTINUATION_TOKENS
            regret = 0.0
            if outcome.drafted:
                if outcome.repeated:
                    # What interrupted the connection would have interrupted a stream as well.
                    cost = min(cost, held.cost)
                regret = cost / held.further - equivalent - (held.exchange if new_text else 0.0)
            elif not new_text:
                regret = held.exchange if outcome.repeated else max(0.0, first / held.further - 1.0)
            self.lost += regret
            gained -= regret
        self.generated += outcome.tokens
        self.tokens = min(max(self.tokens + gained, -MAX_TOKENS), MAX_TOKENS)

    def _held(self, conditions: Conditions) -> Iterator[RoundReservation]:
        """Yield the reservations that a round under these conditions does not replace."""
        end, now = _end(conditions), conditions.now
        for key, text in self._texts.items():
            for held in text.reservations:
                replaced = key == end and held.position >= conditions.position
                if not replaced and now - held.time < RESERVATION_SECONDS:
                    yield held


def _end(conditions: Conditions) -> int:
    return conditions.position + conditions.left
