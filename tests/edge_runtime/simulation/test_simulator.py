"""Simulated rounds: consistent outcomes, determinism, and times that are computed by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import UNRANKED, FixedPlanner, Plan
from edge_runtime.simulation.links import LinkPhase, ScheduledLink
from edge_runtime.simulation.recorded_texts import RecordedText, accepted_runs, read_texts
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.world import ROUND_BYTES, World
from edge_runtime.simulation.world import make_world as shipped_world
from tests.conftest import TRACES
from tests.edge_runtime.simulation.worlds import (
    FORWARD,
    HALF_TRIP,
    NODE,
    PROMPT,
    STEP,
    CyclingPlanner,
    make_text,
    make_world,
    plans,
    texts,
)

ROUND_TRIP = 2 * HALF_TRIP


def run(ranks: str, plan: Plan, world: World | None = None) -> SimulationResult:
    return simulate([make_text(ranks)], FixedPlanner(plan), world or make_world(), log=True)


@pytest.mark.slow
@given(st.lists(texts, min_size=1, max_size=3), st.lists(plans, min_size=1, max_size=4), st.booleans())
def test_every_plan_yields_the_whole_text_and_consistent_outcomes(
    texts: list[RecordedText], plans: list[Plan], speculates: bool
) -> None:
    planner = CyclingPlanner(plans)
    world = make_world(queue=0.004, speculates=speculates, overhead=0.001)
    result = simulate(texts, planner, world, log=True)
    assert result.tokens == sum(map(len, texts)) == sum(outcome.tokens for outcome in planner.outcomes)
    assert result.rounds == len(planner.outcomes) and planner.outcomes == result.log
    assert result.accepted == sum(outcome.accepted for outcome in result.log) <= result.drafted
    assert result.sent == sum(outcome.sent for outcome in result.log)
    assert result.received == sum(outcome.received for outcome in result.log)
    assert result.verifier_seconds == pytest.approx(sum(outcome.forward_seconds for outcome in result.log), abs=1e-2)
    assert result.latency_seconds > 0 and result.forwards >= result.rounds
    remaining = iter(texts)
    text, done = next(remaining), 0
    for outcome in result.log:
        if done == len(text):
            text, done = next(remaining), 0
        conditions, plan = outcome.conditions, outcome.plan
        assert (conditions.left, conditions.position) == (len(text) - done, PROMPT + done)
        assert 0 <= conditions.unread <= conditions.position and conditions.ready >= 0
        assert outcome.drafted <= min(plan.draft, max(0, conditions.left - 1))
        assert outcome.accepted == min(outcome.drafted, accepted_runs(text.ranks)[done])
        assert outcome.own_tokens <= max(plan.continuation, 2) and len(outcome.offered) == outcome.drafted
        assert 0 <= outcome.ready <= outcome.drafted
        assert 0 <= outcome.first_seconds <= outcome.exchange_seconds + 1e-12
        assert len(outcome.shadow_guesses) <= (outcome.own_tokens if plan.shadow and not outcome.drafted else 0)
        for (confidence, rank), index in zip(outcome.shadow_guesses, range(done, len(text)), strict=False):
            assert confidence == text.confidences[index]
            assert (rank == 0) == (text.ranks[index] == 0) and (rank <= plan.siblings or rank == UNRANKED)
        if outcome.sibling:
            assert text.ranks[done + outcome.accepted] == outcome.sibling
        done += outcome.tokens
    assert done == len(text)


@pytest.mark.slow
@given(st.lists(texts, min_size=1, max_size=2), st.lists(plans, min_size=1, max_size=3))
def test_the_same_seed_gives_the_same_result(texts: list[RecordedText], plans: list[Plan]) -> None:
    first, again = (
        simulate(
            texts, CyclingPlanner(plans), shipped_world("weak-4g", "raspberry-pi-5", "7b-16+spec", seed=5), log=True
        )
        for _ in range(2)
    )
    assert first == again


def test_other_seeds_give_other_times() -> None:
    results = {
        simulate([make_text("." * 20)], FixedPlanner(Plan(2)), shipped_world("4g", "server", "7b", seed=seed)).joules
        for seed in range(3)
    }
    assert len(results) == 3


def test_without_drafting_every_token_takes_a_round_trip() -> None:
    result = run("." * 6, Plan(0))
    assert result.latency_seconds == pytest.approx(6 * (ROUND_TRIP + FORWARD))
    assert (result.rounds, result.forwards, result.drafted) == (6, 6, 0)
    assert result.verifier_seconds == pytest.approx(6 * FORWARD)


def test_streaming_pays_one_round_trip() -> None:
    result = run("." * 6, Plan(0, continuation=100))
    assert result.latency_seconds == pytest.approx(ROUND_TRIP + 6 * FORWARD)
    assert result.first_token_seconds == pytest.approx(ROUND_TRIP + FORWARD)
    assert (result.rounds, result.forwards) == (1, 6)


def test_streaming_with_server_side_speculation() -> None:
    # The first forward yields one token; the others draft 5, or one fewer than are still wanted.
    result = run("." * 12, Plan(0, continuation=100), make_world(speculates=True))
    five, four = (FORWARD + count * (NODE + 0.001) for count in (5, 4))
    assert result.latency_seconds == pytest.approx(ROUND_TRIP + FORWARD + five + four)
    missed = run(".xxx", Plan(0, continuation=100), make_world(speculates=True))
    two, one, none = (FORWARD + count * (NODE + 0.001) for count in (2, 1, 0))
    assert missed.latency_seconds == pytest.approx(ROUND_TRIP + FORWARD + two + one + none)


def test_a_drafted_round() -> None:
    # 3 drafted, 2 accepted, 1 own; then all but the last of the remaining tokens are drafted and accepted.
    result = run("..x...", Plan(3))
    assert [(o.drafted, o.accepted, o.own_tokens) for o in result.log] == [(3, 2, 1), (2, 2, 1)]
    steps, nodes = 3 + 2, 3 + 2
    assert result.latency_seconds == pytest.approx(2 * (ROUND_TRIP + FORWARD) + steps * STEP + nodes * NODE)
    assert [o.draft_seconds for o in result.log] == pytest.approx([3 * STEP, 2 * STEP])
    assert [o.conditions.unread for o in result.log] == [PROMPT, 1]


def test_energy_is_that_of_idling_drafting_radio_and_bytes() -> None:
    result = run("..x...", Plan(3))
    bytes_ = result.sent + result.received
    assert 4 * ROUND_BYTES < bytes_ < 4 * ROUND_BYTES + 12
    exchanges = result.latency_seconds - 5 * STEP
    expected = 2.0 * result.latency_seconds + 5.0 * 5 * STEP + 1.0 * exchanges + 0.001 * bytes_
    assert result.joules == pytest.approx(expected)
    prices = Objective(verifier=2.0, joule=3.0, byte=0.5)
    cost = result.latency_seconds + 2 * result.verifier_seconds + 3 * result.joules + 0.5 * bytes_
    assert result.cost(prices) == pytest.approx(cost / 6)


def test_a_long_prompt_costs_its_prefill() -> None:
    world = make_world()
    world.device = type(world.device)(step_seconds=STEP, prefill_seconds=0.02, overhead_seconds=0.0)
    result = run("...", Plan(2), world)
    assert result.log[0].draft_seconds == pytest.approx(PROMPT * 0.02 + STEP)


def test_a_sibling_saves_a_token() -> None:
    siblings = run(".2..", Plan(2, siblings=2, sibling_confidence=1.0))
    # 1 accepted, the sibling and the token after it; then the last token.
    assert [(o.accepted, o.own_tokens, o.sibling) for o in siblings.log] == [(1, 2, 2), (0, 1, 0)]
    assert siblings.log[0].forward_seconds == pytest.approx(FORWARD + 6 * NODE)
    assert [o.tokens for o in run(".2..", Plan(2, siblings=1, sibling_confidence=1.0)).log] == [2, 2]
    assert [o.tokens for o in run(".2..", Plan(2, siblings=2, sibling_confidence=0.8)).log] == [2, 2]


def test_with_several_own_tokens_the_sibling_counts_among_them() -> None:
    result = run(".2....", Plan(2, continuation=3, siblings=2, sibling_confidence=1.0))
    assert (result.log[0].accepted, result.log[0].own_tokens) == (1, 3)
    # The verifying forward yields two of the three.
    assert result.log[0].forward_seconds == pytest.approx(FORWARD + 6 * NODE + FORWARD)


def test_drafting_stops_at_low_survival() -> None:
    text = make_text("....x.....", confidence=0.8, continuation=0.1)
    for plan, drafted in (
        (Plan(8, min_survival=0.5), 4),  # .8 .64 .51 .41
        (Plan(8, min_survival=0.2), 6),  # ... .33, and after the wrong guess .03
        (Plan(8, min_survival=0.5, calibration=(0.1, 0.5)), 2),
        (Plan(8, min_confidence=0.9), 1),
    ):
        result = simulate([text], FixedPlanner(plan), make_world(), log=True)
        assert result.log[0].drafted == drafted


def test_rounds_stay_within_what_a_verifier_takes() -> None:
    result = run("." * 80, Plan(60, siblings=3, sibling_confidence=1.0))
    assert result.log[0].drafted == 32
    assert result.log[0].offered == [3] * 13 + [0] * 19
    assert result.log[0].forward_seconds == pytest.approx(FORWARD + 71 * NODE)


def test_drafting_ahead_hides_steps() -> None:
    # While the first round is in flight (100 + 22 ms) the board guesses the bonus token and the 2 after it.
    result = run("." * 6, Plan(2, draft_ahead=2))
    assert [(o.drafted, o.ready, o.accepted, o.own_tokens) for o in result.log] == [(2, 0, 2, 1), (2, 2, 2, 1)]
    assert result.latency_seconds == pytest.approx(2 * STEP + 2 * (ROUND_TRIP + FORWARD + 2 * NODE))
    # In the second round, no token follows the bonus token: only that is guessed.
    assert result.draft_seconds == pytest.approx((2 + 3 + 1) * STEP)


def test_a_wrong_guess_ahead_costs_energy_and_the_rest_of_a_step() -> None:
    world = make_world(step=0.050)
    result = run("..x...", Plan(2, draft_ahead=5), world)
    # The reply arrives 122 ms after the request; the third step ahead ends at 150 ms.
    assert result.log[0].exchange_seconds == pytest.approx(0.150)
    assert result.log[0].first_seconds == pytest.approx(0.122)
    assert result.log[1].ready == 0 and result.log[1].conditions.unread == 1


def test_two_rounds_in_flight() -> None:
    # The first round opens the session, so no other is in flight with it.
    plan = Plan(2, draft_ahead=2, in_flight=2)
    result = run("." * 9, plan)
    assert [o.early for o in result.log] == [False, False, True] and not any(o.repeated for o in result.log)
    first = 2 * STEP + ROUND_TRIP + FORWARD + 2 * NODE
    # The second round is sent at once, because its tokens are drafted. The third is sent 30 ms later, after 3 more
    # steps, and its reply arrives 30 ms after the second's.
    second = ROUND_TRIP + FORWARD + 2 * NODE
    assert result.latency_seconds == pytest.approx(first + second + 3 * STEP)
    assert result.early_rounds == 1 and result.void_rounds == 0
    # If the verifier is slower than the board, early rounds wait for it.
    fast = run("." * 9, plan, make_world(step=0.001))
    assert fast.log[2].exchange_seconds == pytest.approx(FORWARD + 2 * NODE)


def test_an_early_round_carries_the_siblings_that_were_drafted_during_the_round_before() -> None:
    one, three = (Plan(2, siblings=siblings, sibling_confidence=1.0, draft_ahead=2, in_flight=2) for siblings in (1, 3))
    log = simulate([make_text("." * 20)], CyclingPlanner([one, three]), make_world(), log=True).log
    early = [(before, after) for before, after in pairwise(log) if after.early]
    assert any(before.plan.siblings != after.plan.siblings for before, after in early)
    for before, after in early:
        assert after.offered == [before.plan.siblings] * after.drafted


def test_a_void_round_costs_its_bytes() -> None:
    plain = run("......x..", Plan(2, draft_ahead=2))
    early = run("......x..", Plan(2, draft_ahead=2, in_flight=2))
    assert [o.tokens for o in plain.log] == [o.tokens for o in early.log]
    assert early.early_rounds == 1 and early.void_rounds == 0
    # If the bonus token is guessed wrong, the early round is void although its other guesses are correct.
    void = run(".....x...", Plan(2, draft_ahead=2, in_flight=2))
    again = run(".....x...", Plan(2, draft_ahead=2))
    assert void.early_rounds == 0 and void.void_rounds == 1
    assert void.latency_seconds == pytest.approx(again.latency_seconds)
    assert void.sent > again.sent and void.verifier_seconds == again.verifier_seconds


def test_the_board_prefills_while_the_target_streams() -> None:
    planner = CyclingPlanner([Plan(2), Plan(0, continuation=3, draft_ahead=1)])
    result = simulate([make_text("." * 6)], planner, make_world(), log=True)
    assert [o.conditions.unread for o in result.log] == [PROMPT, 3]


def test_shadow_drafting_predicts_what_it_has_time_for() -> None:
    plan = Plan(0, continuation=6, siblings=1, shadow=True)
    # A token takes the verifier 20 ms and the draft 10; the last one arrives at the end of the stream.
    (stream,) = run("..1x..", plan).log
    assert stream.shadow_guesses == [(0.9, 0), (0.9, 0), (0.9, 1), (0.9, UNRANKED), (0.9, 0)]
    assert stream.ahead_seconds == pytest.approx(6 * STEP)  # including the prompt
    assert run("..1x..", plan).latency_seconds == run("..1x..", Plan(0, continuation=6)).latency_seconds
    # A board that takes 50 ms per token falls behind, and the stream does not wait for it.
    slow = make_world(step=0.05)
    assert len(run("..1x..", plan, slow).log[0].shadow_guesses) == 2
    assert run("..1x..", plan, slow).latency_seconds == run("..1x..", Plan(0, continuation=6)).latency_seconds


def test_an_outage_is_bridged_by_retries() -> None:
    world = make_world()
    link = world.link
    world.link = ScheduledLink([LinkPhase(0.15, link), LinkPhase(5.0, None), LinkPhase(1.0, link)])
    result = run("." * 4, Plan(0), world)
    assert [o.repeated for o in result.log] == [False, True, False, False]
    assert 5.0 < result.log[1].exchange_seconds < 5.0 + 2.0 + 2 * ROUND_TRIP + FORWARD


def test_the_clock_continues_across_texts() -> None:
    simulator = Simulator(make_world(), FixedPlanner(Plan(0)))
    results = simulator.run_all([make_text(".."), make_text("...")])
    assert simulator.now == pytest.approx(sum(result.latency_seconds for result in results))
    assert [result.tokens for result in results] == [2, 3]


def test_recorded_drafts_save_rounds() -> None:
    texts = read_texts(TRACES, target="target-v1", temperature=0.7)[:4]
    alone, siblings = (
        simulate(texts, FixedPlanner(Plan(4, siblings=count)), make_world(), log=True) for count in (0, 3)
    )
    assert siblings.rounds < alone.rounds < alone.tokens / 1.5
    assert (
        siblings.sibling_hits > 0
        and siblings.verifier_seconds / siblings.rounds > alone.verifier_seconds / alone.rounds
    )
