"""The cost model: what outcomes reveal about the link, the verifier and the draft."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edge_runtime.planning.board_profile import shipped_profiles
from edge_runtime.planning.cost_model import CostModel
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.plan import Conditions, Surroundings
from tests.edge_runtime.planning.rounds import make_outcome, outcomes

DEVICE = DeviceModel(step_seconds=0.008, prefill_seconds=0.002, overhead_seconds=0.003, idle_watts=2.0, busy_watts=7.0)


def test_decomposes_a_drafted_round() -> None:
    costs = CostModel(DEVICE)
    for _ in range(5):
        costs.observe(make_outcome([0.9] * 4, 4, step=0.016, link=0.055, forward=0.026), 3.0)
    assert costs.link.now.value == pytest.approx(0.055, rel=1e-6)
    assert costs.forward.at(5) == pytest.approx(0.026, rel=0.02)
    # 8 ms according to the device model, 16 ms measured.
    assert costs.step_seconds(50) == pytest.approx(0.016, rel=0.12)


def test_shadow_drafting_measures_the_draft_step() -> None:
    costs = CostModel(DEVICE)
    for _ in range(3):
        stream = make_outcome([], 0, own=20, planned_own=20)
        costs.observe(msgspec.structs.replace(stream, shadow_guesses=[(0.9, 0)] * 12, ahead_seconds=12 * 0.016), 3.0)
    assert costs.step_seconds(50) == pytest.approx(0.016, rel=0.12)


def test_decomposes_a_stream() -> None:
    costs = CostModel(DEVICE)
    costs.observe(make_outcome([], 0, own=7, planned_own=7, link=0.02, forward=0.03, own_seconds=0.03), 3.0)
    assert costs.own_token_seconds(3.0) == pytest.approx(0.03)
    assert costs.forward.at(1) == pytest.approx(0.03)
    assert costs.link.now.value == pytest.approx(0.02)
    assert not costs.verifier_speculates


def test_detects_a_speculative_verifier_by_its_forwards() -> None:
    costs = CostModel(DEVICE)
    assert costs.optimistic_own_token_seconds(3.0) < costs.own_token_seconds(3.0)
    stream = make_outcome([], 0, own=40, planned_own=40, link=0.02, forward=0.03, own_seconds=0.011)
    costs.observe(msgspec.structs.replace(stream, further_forwards=13), 3.0)
    # 13 forwards for 39 tokens, the last of which may have been truncated: slightly more than 3 tokens each.
    assert costs.verifier_speculates and costs.own_forward.value == pytest.approx(0.033)
    assert 0.009 < costs.own_token_seconds(3.0) < 0.011
    assert costs.optimistic_own_token_seconds(3.0) == costs.own_token_seconds(3.0)
    # A speculative verifier is faster where the draft is accepted more often.
    assert costs.own_token_seconds(4.0) < costs.own_token_seconds(3.0) < costs.own_token_seconds(2.0)


def test_verifier_that_reports_no_forwards_uses_one_per_token() -> None:
    costs = CostModel(DEVICE)
    costs.observe(make_outcome([], 0, own=40, planned_own=40, link=0.02, forward=0.03, own_seconds=0.011), 3.0)
    assert not costs.verifier_speculates and costs.own_token_seconds(3.0) == pytest.approx(0.011)


def test_streaming_equivalent_of_a_drafted_round() -> None:
    costs = CostModel(DEVICE)
    round_ = make_outcome([0.9] * 12, 7)
    assert costs.streaming_equivalent(round_, 3.0) == 8
    stream = make_outcome([], 0, own=40, planned_own=40, link=0.02, forward=0.03, own_seconds=0.011)
    costs.observe(msgspec.structs.replace(stream, further_forwards=13), 3.0)
    per_forward = 3.0 * costs.yield_ratio.value
    # Seven accepted and one rejected: a forward with five accepted and one with two, each with an own token.
    assert costs.streaming_equivalent(round_, 3.0) == pytest.approx(2 * per_forward)
    assert costs.streaming_equivalent(make_outcome([0.9] * 12, 0), 3.0) == pytest.approx(per_forward)
    assert costs.streaming_equivalent(make_outcome([0.9] * 11, 11), 3.0) == pytest.approx(2 * per_forward)


def test_load_change_scales_the_cost_of_own_tokens() -> None:
    costs = CostModel(DEVICE)
    costs.observe(make_outcome([], 0, own=30, planned_own=30, forward=0.02, own_seconds=0.02), 3.0)
    for _ in range(4):
        costs.observe(make_outcome([0.9] * 4, 4, forward=0.022), 3.0)
    for _ in range(3):
        costs.observe(make_outcome([0.9] * 4, 4, forward=0.088), 3.0)
    assert costs.own_token_seconds(3.0) == pytest.approx(0.08, rel=0.15)


def test_retried_rounds_do_not_measure_the_link() -> None:
    costs = CostModel(DEVICE)
    costs.observe(make_outcome([0.9], 1, link=0.05), 3.0)
    slow = make_outcome([0.9], 1, link=9.0)
    before = costs.link.now.value
    costs.observe(msgspec.structs.replace(slow, repeated=True), 3.0)
    assert costs.link.now.value == before


def test_kernel_rtt_is_used_until_a_round_was_measured() -> None:
    costs = CostModel(DEVICE)
    costs.use_kernel_rtt(Conditions(10, 10, 0, surroundings=Surroundings(rtt_seconds=0.3)))
    assert costs.link.forecast(0.0) == 0.3
    costs.observe(make_outcome([0.9], 1, link=0.05), 3.0)
    costs.use_kernel_rtt(Conditions(10, 10, 0, surroundings=Surroundings(rtt_seconds=0.3)))
    assert costs.link.forecast(0.0) == pytest.approx(0.05)


def test_round_joules_are_above_idle() -> None:
    costs = CostModel(DeviceModel(idle_watts=2.0, busy_watts=7.0, radio_watts=1.0, joules_per_byte=0.001))
    outcome = make_outcome([0.9] * 5, 5, step=0.01, link=0.05, forward=0.02)
    expected = 5 * 0.01 * 5.0 + outcome.exchange_seconds * 1.0 + 160 * 0.001
    assert costs.round_joules(outcome) == pytest.approx(expected)


@pytest.mark.slow
@settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(outcomes(), st.floats(1.0, 6.0)), max_size=25))
def test_estimates_are_always_finite_and_not_negative(rounds: list) -> None:
    costs = CostModel(DEVICE)
    for outcome, tokens_per_forward in rounds:
        costs.observe(outcome, tokens_per_forward)
        figures = {
            "link": costs.link.forecast(outcome.conditions.now + 1.0),
            "link quantile": costs.link_quantile(0.3),
            "narrow forward": costs.forward.at(1),
            "wide forward": costs.forward.at(30),
            "own token": costs.own_token_seconds(tokens_per_forward),
            "optimistic own token": costs.optimistic_own_token_seconds(tokens_per_forward),
            "step": costs.step_seconds(100),
        }
        assert not {name: figure for name, figure in figures.items() if not (math.isfinite(figure) and figure >= 0)}
        own_token = costs.own_token_seconds(tokens_per_forward)
        assert costs.optimistic_own_token_seconds(tokens_per_forward) <= own_token * (1 + 1e-9)
        assert costs.round_joules(outcome) >= 0
        assert costs.queue.value >= 0 and costs.round_bytes.value >= 0


def test_device_models_from_shipped_profiles() -> None:
    for profile in shipped_profiles():
        device = DeviceModel.from_profile(profile, 40_000_000, radio="wifi", cache_bytes=1000)
        assert device.step_seconds == pytest.approx(profile.draft_seconds(40_000_000))
        assert device.step_seconds_per_token > 0
        assert 0 < device.prefill_seconds <= device.step_seconds
        assert device.busy_watts > device.idle_watts
