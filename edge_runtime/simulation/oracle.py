"""Baselines that planners are compared with: the best static plan in hindsight, for the same world.

    best single plan     the best Plan for all rounds of all texts, given the true calibration, chosen afterwards
    best fixed draft     the same among plain draft lengths: K tokens, n = 1, nothing else

`tests.benchmarks.lower_bound` has the bound that no plan reaches.

Without drafting ahead, the rounds of a static plan do not depend on link, board or verifier. So every plan of a coarse
space is simulated once for its `PlanFootprint`, which gives its cost in any world from mean delays. Only the cheapest
few, these with drafting ahead, and then their neighbors are simulated in the world itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.messages import MAX_TREE_NODES
from edge_runtime.simulation.links import LINK_PRESETS, SteadyLink
from edge_runtime.simulation.recorded_texts import MAX_SIBLINGS, RecordedText
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.verifiers import VERIFIERS, SimulatedVerifier
from edge_runtime.simulation.world import ROUND_BYTES, World

CALIBRATION_BINS = 10
# Prefilling this many tokens is treated as free: it costs no more than the decode step that it replaces.
FREE_PREFILL_TOKENS = 4
WHOLE_TEXT = 1 << 20
FIXED_PLANS = tuple(Plan(count, reason=f"fixed {count}") for count in range(17))
# Number of plans, the cheapest by their footprints, that are simulated in the world itself; and of those, number that
# are simulated with drafting ahead too. Chosen: enough to include the best, few enough to stay fast.
SIMULATED_PLANS, SIMULATED_AHEAD_PLANS = 6, 2
AHEAD_TOKENS = (2, 4, 8, 16)
# Rounds of local search from the best plan of the coarse space.
REFINEMENT_PASSES = 2


class PlanFootprint(msgspec.Struct, frozen=True):
    """What a static plan does to a set of texts, whatever the world.

    Attributes:
        rounds, tokens: how many.
        steps: decode steps of the draft.
        prefill: tokens that the draft prefills before the first step of a round, beyond FREE_PREFILL_TOKENS.
        position: mean text length at a step.
        widths: (MAX_TREE_NODES + 1,) number of verifying forwards by their nodes.
        own: number of forwards that continue the text, on a verifier that does not speculate and on one that does;
            there a forward with fewer draft tokens counts as less than one.
        sent, received: bytes.
    """

    plan: Plan
    rounds: int
    tokens: int
    steps: int
    prefill: int
    position: float
    widths: list[int]
    own: tuple[float, float]
    sent: int
    received: int


def measure_calibration(texts: list[RecordedText]) -> tuple[float, ...]:
    """Return the share of correct guesses in each tenth of confidence, smoothed by one guess at its middle."""
    right, seen = [0] * CALIBRATION_BINS, [0] * CALIBRATION_BINS
    for text in texts:
        for confidence, rank in zip(text.confidences, text.ranks, strict=True):
            index = min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)
            seen[index] += 1
            right[index] += rank == 0
    return tuple((r + (i + 0.5) / CALIBRATION_BINS) / (s + 1) for i, (r, s) in enumerate(zip(right, seen, strict=True)))


def make_static_plans(true_calibration: tuple[float, ...]) -> list[Plan]:
    """Return the coarse plan space: draft lengths, stop thresholds, siblings, own tokens."""
    plans = [Plan(0, own) for own in (1, 2, 4, 8, 16, 32, WHOLE_TEXT)]
    lengths = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24)
    stops = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
    sibling_rules = ((0, 0.0), (1, 0.8), (3, 0.8), (7, 0.6), (7, 0.9))
    for length, stop, (siblings, sibling_confidence) in product(lengths, stops, sibling_rules):
        # The stop rule does not affect a draft of one token.
        if length > 1 or not stop:
            plans.append(
                Plan(
                    length,
                    siblings=siblings,
                    sibling_confidence=sibling_confidence,
                    min_survival=stop,
                    calibration=true_calibration,
                )
            )
    for length, stop, own in product((2, 4, 8), (0.0, 0.3, 0.6), (2, 4, 8, 16)):
        plans.append(Plan(length, own, min_survival=stop, calibration=true_calibration))
    return plans


def _neighbors(plan: Plan) -> list[Plan]:
    """Return plans between this one and the next ones of the coarse space, along every dimension that it uses."""
    if not plan.draft:
        return []
    changes: list[dict[str, float | int]] = [
        {"draft": max(1, plan.draft - 1 - plan.draft // 6)},
        {"draft": plan.draft + 1 + plan.draft // 6},
        {"min_survival": max(0.0, plan.min_survival - 0.05)},
        {"min_survival": plan.min_survival + 0.05},
    ]
    if plan.siblings:
        changes += [{"siblings": max(1, plan.siblings - 2)}, {"siblings": min(MAX_SIBLINGS, plan.siblings + 2)}]
        changes += [{"sibling_confidence": plan.sibling_confidence + step} for step in (-0.1, 0.05)]
    if plan.draft_ahead:
        changes += [{"draft_ahead": max(1, plan.draft_ahead * 3 // 4)}, {"draft_ahead": plan.draft_ahead * 3 // 2}]
    return [msgspec.structs.replace(plan, **change) for change in changes]


def describe_plan(plan: Plan) -> str:
    """Return a short description of the plan."""
    own = "all" if plan.continuation >= WHOLE_TEXT else plan.continuation
    text = f"K={plan.draft} n={own}"
    if plan.min_survival:
        text += f", stop below {plan.min_survival:g}"
    if plan.siblings:
        text += f", {plan.siblings} siblings below {plan.sibling_confidence:g}"
    if plan.draft_ahead:
        text += f", {plan.draft_ahead} ahead, {plan.in_flight} in flight"
    return text


class PlanFootprints:
    """Footprints of many plans on one set of texts, to compare the plans in any world."""

    def __init__(self, texts: list[RecordedText], plans: list[Plan]) -> None:
        self.plans = plans
        self._texts = texts
        footprints = [measure_footprint(texts, plan) for plan in plans]
        names = [name for name in PlanFootprint.__struct_fields__ if name != "plan"]
        # By field of `PlanFootprint`: one row for each plan.
        self._rows = {name: np.array([getattr(footprint, name) for footprint in footprints], float) for name in names}

    def estimate_costs(self, world: World, objective: Objective) -> npt.NDArray[np.float64]:
        """Return the costs per token from mean delays, (plans,)."""
        device, verifier, rows = world.device, world.verifier, self._rows
        step = device.step_seconds + device.step_seconds_per_token * rows["position"]
        drafting = step * rows["steps"] + device.prefill_seconds * rows["prefill"]
        own = rows["own"][:, 1 if verifier.draft_tokens else 0]
        forwards = rows["widths"] @ np.array(verifier.forward_seconds) + own * verifier.continuation_seconds
        exchange = device.overhead_seconds + verifier.cost.queue_seconds + world.link.mean(ROUND_BYTES, ROUND_BYTES)
        latency = drafting + rows["rounds"] * exchange + forwards
        traffic = rows["sent"] + rows["received"]
        joules = device.idle_watts * latency + (device.busy_watts - device.idle_watts) * drafting
        joules += device.radio_watts * (latency - drafting) + device.joules_per_byte * traffic
        cost: npt.NDArray[np.float64] = (
            objective.latency * latency
            + objective.verifier * forwards
            + objective.joule * joules
            + objective.byte * traffic
        ) / rows["tokens"]
        return cost

    def find_best(
        self, make: Callable[[], World], objective: Objective, *, ahead: bool
    ) -> tuple[Plan, SimulationResult]:
        """Return the plan with the least simulated cost, and its result.

        Args:
            make: makes the world anew for each simulation.
            ahead: also try drafting ahead.
        """
        world = make()
        order = np.argsort(self.estimate_costs(world, objective), kind="stable")
        ranked = [self.plans[int(index)] for index in order]
        drafting = [plan for plan in ranked if plan.draft and plan.continuation == 1]
        # The cheapest plan of each kind is tried too, because the mean describes an irregular link poorly.
        candidates = [*ranked[:SIMULATED_PLANS], *drafting[:1], *[plan for plan in ranked if not plan.draft][:1]]
        if ahead:
            candidates += [
                msgspec.structs.replace(plan, draft_ahead=count, in_flight=in_flight)
                for plan, count, in_flight in product(drafting[:SIMULATED_AHEAD_PLANS], AHEAD_TOKENS, (1, 2))
            ]
        results: dict[Plan, SimulationResult] = {}

        def cheapest(plans: list[Plan]) -> Plan:
            for plan in plans:
                if plan not in results:
                    results[plan] = simulate(self._texts, FixedPlanner(plan), make())
            return min(results, key=lambda plan: results[plan].cost(objective))

        best = cheapest(candidates)
        if ahead:
            for _ in range(REFINEMENT_PASSES):
                best = cheapest(_neighbors(best))
        return best, results[best]


def measure_footprint(texts: list[RecordedText], plan: Plan) -> PlanFootprint:
    """Simulate `plan`, which must not draft ahead, and return its footprint."""
    plain = _simulate_neutral(texts, plan, "7b")
    # With n = 1 no forward continues the text, so there is nothing to speculate on.
    speculating = _simulate_neutral(texts, plan, "7b+spec") if plan.continuation > 1 else plain
    widths = [0] * (MAX_TREE_NODES + 1)
    prefill = 0
    positions: list[int] = []
    for outcome in plain.log:
        widths[outcome.nodes] += 1
        if outcome.drafted:
            prefill += max(0, outcome.conditions.unread - FREE_PREFILL_TOKENS)
            positions.append(outcome.conditions.position)
    verifier = SimulatedVerifier(VERIFIERS["7b+spec"], 0)
    verifying = sum(count * seconds for count, seconds in zip(widths, verifier.forward_seconds, strict=True))
    own = (plain.forwards - plain.rounds, (speculating.verifier_seconds - verifying) / verifier.continuation_seconds)
    position = sum(positions) / len(positions) if positions else 0.0
    return PlanFootprint(
        plan=plan,
        rounds=plain.rounds,
        tokens=plain.tokens,
        steps=plain.drafted,
        prefill=prefill,
        position=position,
        widths=widths,
        own=own,
        sent=plain.sent,
        received=plain.received,
    )


def _simulate_neutral(texts: list[RecordedText], plan: Plan, verifier: str) -> SimulationResult:
    neutral = World("any", DeviceModel(), SteadyLink(LINK_PRESETS["lan"], 0), SimulatedVerifier(VERIFIERS[verifier], 0))
    return simulate(texts, FixedPlanner(plan), neutral, log=True)
