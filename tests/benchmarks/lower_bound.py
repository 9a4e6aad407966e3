"""A lower bound of the cost of any plans: that of a clairvoyant who knows in advance which tokens will be accepted.

Dynamic programming backwards over the positions of a text, for a link and a verifier that always take their mean times.
The clairvoyant drafts only tokens that will be accepted, sends a sibling only if it is the target's token, prefills
prompts for free, and drafts ahead and pipelines two rounds as far as physically possible. For pipelined rounds two
limits hold, and either alone gives a bound: the board drafts one token after the other (`BOARD_LIMIT`), and at most two
rounds are in flight (`FLIGHT_LIMIT`). The larger of the two bounds is used.
"""

from __future__ import annotations

from typing import NamedTuple

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import UNRANKED
from edge_runtime.protocol.messages import MAX_DRAFT_TOKENS
from edge_runtime.simulation.recorded_texts import RecordedText, accepted_runs
from edge_runtime.simulation.world import ID_BYTES, ROUND_BYTES, World

BOARD_LIMIT, FLIGHT_LIMIT = "board", "flight"


def compute_lower_bound(texts: list[RecordedText], world: World, objective: Objective) -> float:
    """Return a lower bound of the cost per token of any plans."""
    total = sum(
        max(_lower_bound_of_text(text, world, objective, limit) for limit in (BOARD_LIMIT, FLIGHT_LIMIT))
        for text in texts
    )
    return total / sum(map(len, texts))


class UnitCosts(NamedTuple):
    """Cost of one second, or one byte, of each kind.

    Attributes:
        second: waiting while the board idles.
        step: surcharge of a second of drafting.
        flight: surcharge of a second in which a round is in flight.
        forward: surcharge of a second of the verifier.
        byte: one byte on the link.
    """

    second: float
    step: float
    flight: float
    forward: float
    byte: float

    @classmethod
    def from_world(cls, world: World, objective: Objective) -> UnitCosts:
        device, joule = world.device, objective.joule
        return cls(
            objective.latency + joule * device.idle_watts,
            joule * (device.busy_watts - device.idle_watts),
            joule * device.radio_watts,
            objective.verifier,
            objective.byte + joule * device.joules_per_byte,
        )


def _lower_bound_of_text(text: RecordedText, world: World, objective: Objective, limit: str) -> float:
    """Minimum cost of the whole text under one of the limits.

    Cost to go from each position in four states:
        idle      nothing is in flight and nothing is drafted
        hidden    nothing is in flight; the next round was drafted while the last one was in flight
        chained   the last round is still in flight, and its tokens are guessed
        streamed  the verifier may generate more tokens in the round that led here
    """
    prices = UnitCosts.from_world(world, objective)
    device, verifier = world.device, world.verifier
    step = device.step_at(text.prompt)
    exchange = device.overhead_seconds + world.link.mean(ROUND_BYTES, ROUND_BYTES) + verifier.cost.queue_seconds
    fixed_bytes = 2 * ROUND_BYTES * prices.byte
    # Minimum time per pipelined round: by the limit on rounds in flight, and by its forward alone.
    between = max((exchange + verifier.forward_seconds[1]) / 2, verifier.forward_seconds[1])
    run, length = accepted_runs(text.ranks), len(text)
    infinity = float("inf")
    idle, hidden, chained, streamed = ([0.0] * (length + 1) for _ in range(4))
    for position in range(length - 1, -1, -1):
        left = length - position
        best = {"idle": infinity, "hidden": infinity, "chained": infinity}
        for drafted, siblings, tokens in _useful_rounds(text.ranks, run, position, left):
            forward = verifier.forward_seconds[1 + drafted + siblings]
            after = position + tokens
            paid = prices.forward * forward + fixed_bytes + prices.byte * ID_BYTES * (drafted + siblings)
            drafting = drafted * step
            exchanged = (prices.second + prices.flight) * (exchange + forward)
            guessed = not siblings and run[position] > drafted and after < length
            for state in best:
                if state == "chained" and not drafted:
                    # Only drafted rounds are sent before the previous one is answered.
                    continue
                extra = prices.step * (drafting if state == "idle" else drafting + step)
                ended = exchanged
                if state == "idle":
                    start = prices.second * drafting
                elif state == "chained" and limit == BOARD_LIMIT:
                    start = prices.second * (drafting + step)
                else:
                    start = 0.0
                if state == "chained" and limit == FLIGHT_LIMIT:
                    ended = prices.second * between
                go_on = ended + min(idle[after], streamed[after] if state != "chained" else infinity)
                if guessed and state == "hidden":
                    go_on = min(go_on, ended + hidden[after])
                if guessed and drafted:
                    leaving = prices.second * between if limit == FLIGHT_LIMIT else 0.0
                    go_on = min(go_on, ended + hidden[after], leaving + chained[after])
                best[state] = min(best[state], paid + extra + start + go_on)
        idle[position], hidden[position], chained[position] = best.values()
        streamed[position] = idle[position]
        max_guesses = min(verifier.draft_tokens, run[position], left - 1)
        for guesses in range(max_guesses + 1):
            seconds = verifier.forward_seconds[1 + guesses] + guesses * verifier.cost.draft_seconds
            cost = (prices.second + prices.flight + prices.forward) * seconds + streamed[position + guesses + 1]
            streamed[position] = min(streamed[position], cost)
    return idle[0]


def _useful_rounds(ranks: list[int], run: list[int], position: int, left: int) -> list[tuple[int, int, int]]:
    """Return (tokens drafted, siblings sent, tokens gained) of every round that can be optimal."""
    correct = min(run[position], left - 1, MAX_DRAFT_TOKENS)
    rounds = [(drafted, 0, drafted + 1) for drafted in range(correct + 1)]
    missed = position + run[position]
    # One more guess, which is wrong but has a correct sibling, and the token after it.
    if run[position] + 2 <= left and run[position] < MAX_DRAFT_TOKENS and ranks[missed] != UNRANKED:
        rounds.append((run[position] + 1, ranks[missed], run[position] + 2))
    return rounds
