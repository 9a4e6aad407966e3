"""A lower bound that nobody reaches: what a text would cost somebody who knows every token's fate beforehand.

Dynamic programming backwards over the text's positions, for a link and a verifier that always take their mean times.
The clairvoyant drafts only what will be accepted, names a sibling only where it is the target's token, reads prompts
for nothing, and may draft ahead and have two rounds in flight as far as physics allows. Where rounds follow each other
in flight, two limits hold and either alone gives a bound: the board makes every guess one step after the other
(`BOARD_LIMIT`), and no more than two rounds are on their way at once (`FLIGHT_LIMIT`). The larger of both is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from edge_runtime.planning.objective import Objective
from edge_runtime.protocol.messages import MAX_DRAFT_TOKENS
from edge_runtime.simulation.recorded_texts import UNRANKED, RecordedText, accepted_runs
from edge_runtime.simulation.world import ID_BYTES, ROUND_BYTES, World

BOARD_LIMIT, FLIGHT_LIMIT = "board", "flight"


def compute_lower_bound(texts: list[RecordedText], world: World, objective: Objective) -> float:
    """Least cost per token, of any plans whatsoever."""
    least = sum(
        max(_lower_bound_of_text(text, world, objective, limit) for limit in (BOARD_LIMIT, FLIGHT_LIMIT))
        for text in texts
    )
    return least / sum(map(len, texts))


class UnitCosts(NamedTuple):
    """Cost of one second, or of one byte, of each kind.

    Attributes:
        second: of waiting, while the board idles.
        step: added by a second of drafting.
        flight: added by a second in which a round is on its way.
        forward: added by a second of the verifier.
        byte: on the link.
    """

    second: float
    step: float
    flight: float
    forward: float
    byte: float

    @classmethod
    def of(cls, world: World, objective: Objective) -> UnitCosts:
        device, joule = world.device, objective.joule
        return cls(
            objective.latency + joule * device.idle_watts,
            joule * (device.busy_watts - device.idle_watts),
            joule * device.radio_watts,
            objective.verifier,
            objective.byte + joule * device.joules_per_byte,
        )


def _lower_bound_of_text(text: RecordedText, world: World, objective: Objective, limit: str) -> float:
    """Least cost of the whole text under one of the limits.

    Cost to go from each position in four states:
        alone     nothing is in flight and nothing is guessed
        hidden    nothing is in flight; the guesses for the next round were made while the last one was
        chained   the last round is still in flight, and its text is guessed
        streamed  the verifier may say more tokens in the round that brought us here
    """
    prices = UnitCosts.of(world, objective)
    device, verifier = world.device, world.verifier
    step = device.step_at(text.prompt)
    exchange = device.overhead_seconds + world.link.mean(ROUND_BYTES, ROUND_BYTES) + verifier.cost.queue_seconds
    fixed_bytes = 2 * ROUND_BYTES * prices.byte
    # A round within a chain takes at least this long by the limit on rounds in flight, or by its forward alone.
    between = max((exchange + verifier.forward_seconds[1]) / 2, verifier.forward_seconds[1])
    run, length = accepted_runs(text.ranks), len(text)
    far = float("inf")
    alone, hidden, chained, streamed = ([0.0] * (length + 1) for _ in range(4))
    for position in range(length - 1, -1, -1):
        left = length - position
        best = {"alone": far, "hidden": far, "chained": far}
        for drafted, siblings, said in _useful_rounds(text.ranks, run, position, left):
            forward = verifier.forward_seconds[1 + drafted + siblings]
            after = position + said
            paid = prices.forward * forward + fixed_bytes + prices.byte * ID_BYTES * (drafted + siblings)
            drafting = drafted * step
            whole = (prices.second + prices.flight) * (exchange + forward)
            guessed = not siblings and run[position] > drafted and after < length
            for state in best:
                if state == "chained" and not drafted:
                    # Only drafted rounds are sent before the last one is answered.
                    continue
                extra = prices.step * (drafting if state == "alone" else drafting + step)
                ended = whole
                if state == "alone":
                    start = prices.second * drafting
                elif state == "chained" and limit == BOARD_LIMIT:
                    start = prices.second * (drafting + step)
                else:
                    start = 0.0
                if state == "chained" and limit == FLIGHT_LIMIT:
                    ended = prices.second * between
                go_on = ended + min(alone[after], streamed[after] if state != "chained" else far)
                if guessed and state == "hidden":
                    go_on = min(go_on, ended + hidden[after])
                if guessed and drafted:
                    leaving = prices.second * between if limit == FLIGHT_LIMIT else 0.0
                    go_on = min(go_on, ended + hidden[after], leaving + chained[after])
                best[state] = min(best[state], paid + extra + start + go_on)
        alone[position], hidden[position], chained[position] = best.values()
        streamed[position] = alone[position]
        most = min(verifier.draft_tokens, run[position], left - 1)
        for guesses in range(most + 1):
            seconds = verifier.forward_seconds[1 + guesses] + guesses * verifier.cost.draft_seconds
            cost = (prices.second + prices.flight + prices.forward) * seconds + streamed[position + guesses + 1]
            streamed[position] = min(streamed[position], cost)
    return alone[0]


def _useful_rounds(ranks: list[int], run: list[int], position: int, left: int) -> list[tuple[int, int, int]]:
    """(tokens drafted, siblings named, tokens said) of every round worth playing."""
    right = min(run[position], left - 1, MAX_DRAFT_TOKENS)
    rounds = [(drafted, 0, drafted + 1) for drafted in range(right + 1)]
    missed = position + run[position]
    # One wrong guess more, whose sibling is right, and what follows it.
    if run[position] + 2 <= left and run[position] < MAX_DRAFT_TOKENS and ranks[missed] != UNRANKED:
        rounds.append((run[position] + 1, ranks[missed], run[position] + 2))
    return rounds
