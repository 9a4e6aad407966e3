"""The bound of what drafting may lose against streaming, on a simulated clock: any draft, any verifier, cold or warm.

The loss is not the planner's own account of it: the same texts are also streamed in the same world, and the clocks are
compared after every text.
"""

from __future__ import annotations

from random import Random

import pytest

from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import UNRANKED, FixedPlanner, Plan
from edge_runtime.planning.regret_budget import CREDIT_PER_TOKEN, INITIAL_TOKENS
from edge_runtime.simulation.links import LinkParameters, SteadyLink
from edge_runtime.simulation.recorded_texts import CONTINUATION_TOKENS, RecordedText
from edge_runtime.simulation.simulator import Simulator
from edge_runtime.simulation.verifiers import SimulatedVerifier, VerifierCost
from edge_runtime.simulation.world import World

SLOW, FAST = 0.060, 0.008
TEXTS, TOKENS = 12, 64
# The verifier reports its times in units of 0.1 ms, which is all that the planner's account may err by.
TOLERANCE = 0.05


def make_text(acceptance: float, seed: int) -> RecordedText:
    """A text on which the draft is right with this probability, however confident it is."""
    random = Random(seed)
    confidences = [random.random() ** 0.3 for _ in range(TOKENS)]
    ranks = [0 if random.random() < acceptance else UNRANKED for _ in range(TOKENS)]
    continuations = [[random.random() ** 0.3 for _ in range(CONTINUATION_TOKENS)] if rank else [] for rank in ranks]
    return RecordedText(
        target="poor",
        temperature=0.7,
        top_p=1.0,
        seed=seed,
        prompt=30,
        confidences=confidences,
        ranks=ranks,
        continuations=continuations,
    )


def make_world(forward: float, rtt: float, step: float) -> World:
    device = DeviceModel(step_seconds=step, prefill_seconds=step / 4, overhead_seconds=0.002)
    link = SteadyLink(
        LinkParameters(name="steady", radio="wifi", rtt_seconds=rtt, jitter_seconds=0.0, up_rate=1e9, down_rate=1e9), 0
    )
    cost = VerifierCost("steady", ((1, forward), (5, 1.05 * forward), (17, 1.15 * forward)), 0.0, 0.001)
    return World("steady", device, link, SimulatedVerifier(cost, 0))


def make_planner(world: World, acceptance: float | None) -> AnalyticPlanner:
    return AnalyticPlanner(Objective(), world.device, acceptance={} if acceptance is None else {"T=0.7": acceptance})


def losses(planner: AnalyticPlanner, world: World, streamed: World, acceptance: float, texts: int) -> list[float]:
    """Return the loss against streaming after each text, in streamed tokens."""
    forward = streamed.verifier.forward_seconds[1]
    planned, streaming = Simulator(world, planner), Simulator(streamed, FixedPlanner(Plan(0, 1 << 20)))
    result, lost = [], 0.0
    for seed in range(texts):
        text = make_text(acceptance, seed)
        lost += planned.run(text).latency_seconds - streaming.run(text).latency_seconds
        result.append(lost / forward)
    return result


@pytest.mark.parametrize("forward", [SLOW, FAST])
@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize(("rtt", "step"), [(0.002, 0.003), (0.02, 0.015), (0.1, 0.003)])
def test_a_cold_start_stays_within_the_bound(acceptance: float, forward: float, rtt: float, step: float) -> None:
    for promised in (None, 0.9):
        world = make_world(forward, rtt, step)
        planner = make_planner(world, promised)
        lost = losses(planner, world, make_world(forward, rtt, step), acceptance, TEXTS)
        for index, loss in enumerate(lost):
            assert loss <= INITIAL_TOKENS + CREDIT_PER_TOKEN * TOKENS * (index + 1) + TOLERANCE
        assert planner.regret.lost == pytest.approx(lost[-1], abs=0.02 * TEXTS)


@pytest.mark.parametrize("forward", [SLOW, FAST])
@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.2, 0.5])
def test_a_restart_grants_no_new_budget(acceptance: float, forward: float) -> None:
    """Five starts of two texts each may lose no more than one run of ten texts."""
    state, lost = None, 0.0
    for start in range(5):
        world = make_world(forward, 0.02, 0.003)
        planner = make_planner(world, 0.6)
        if state is not None:
            planner.restore(state)
        lost += losses(planner, world, make_world(forward, 0.02, 0.003), acceptance, 2)[-1]
        assert lost <= INITIAL_TOKENS + CREDIT_PER_TOKEN * TOKENS * 2 * (start + 1) + TOLERANCE
        state = planner.state()


def test_a_poor_draft_is_given_up_within_the_first_text() -> None:
    world = make_world(SLOW, 0.02, 0.003)
    simulator = Simulator(world, make_planner(world, 0.6), log=True)
    drafted = [sum(outcome.drafted > 0 for outcome in simulator.run(make_text(0.05, seed)).log) for seed in range(8)]
    assert 0 < drafted[0] <= 20
    assert sum(drafted[1:]) <= 4


def test_shadow_drafting_lets_a_good_draft_earn_its_place_without_a_prior() -> None:
    """The bundle promises 5 %: within its first texts, the planner drafts nearly all rounds of a good draft."""
    world = make_world(SLOW, 0.02, 0.003)
    simulator = Simulator(world, make_planner(world, 0.05), log=True)
    texts = [simulator.run(make_text(0.8, seed)) for seed in range(3)]
    assert all(outcome.plan.draft or outcome.conditions.left == 1 for outcome in texts[-1].log)
    assert texts[-1].seconds_per_token < 0.6 * SLOW
