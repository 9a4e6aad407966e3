"""What rounds teach about the link, the verifier and the draft."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edge_runtime.planning.board_profile import shipped_profiles
from edge_runtime.planning.cost_model import Costs
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.plan import Conditions, Surroundings
from tests.edge_runtime.planning.rounds import make_outcome, outcomes

DEVICE = Device(step_seconds=0.008, prefill_seconds=0.002, overhead_seconds=0.003, idle_watts=2.0, busy_watts=7.0)


def test_a_drafted_round_is_taken_apart() -> None:
    costs = Costs(DEVICE)
    for _ in range(5):
        costs.observe(make_outcome([0.9] * 4, 4, step=0.016, link=0.055, forward=0.026), 3.0)
    assert costs.link.now.value == pytest.approx(0.055, rel=1e-6)
    assert costs.forward.at(5) == pytest.approx(0.026, rel=0.02)
    # The device says 8 ms, rounds say 16.
    assert costs.step_seconds(50) == pytest.approx(0.016, rel=0.12)


def test_a_draft_that_guesses_along_shows_its_pace() -> None:
    costs = Costs(DEVICE)
    for _ in range(3):
        stream = make_outcome([], 0, own=20, asked=20)
        costs.observe(msgspec.structs.replace(stream, watched=[(0.9, 0)] * 12, ahead_seconds=12 * 0.016), 3.0)
    assert costs.step_seconds(50) == pytest.approx(0.016, rel=0.12)


def test_a_stream_is_taken_apart() -> None:
    costs = Costs(DEVICE)
    costs.observe(make_outcome([], 0, own=7, asked=7, link=0.02, forward=0.03, each=0.03), 3.0)
    assert costs.own_seconds(3.0) == pytest.approx(0.03)
    assert costs.forward.at(1) == pytest.approx(0.03)
    assert costs.link.now.value == pytest.approx(0.02)
    assert not costs.speculates


def test_a_verifier_that_speculates_is_known_by_its_forwards() -> None:
    costs = Costs(DEVICE)
    assert costs.own_hoped(3.0) < costs.own_seconds(3.0)
    stream = make_outcome([], 0, own=40, asked=40, link=0.02, forward=0.03, each=0.011)
    costs.observe(msgspec.structs.replace(stream, further=13), 3.0)
    # Thirteen forwards for 39 tokens, the last of which may have brought fewer: a little better than three each.
    assert costs.speculates and costs.own.value == pytest.approx(0.033)
    assert 0.009 < costs.own_seconds(3.0) < 0.011 and costs.own_hoped(3.0) == costs.own_seconds(3.0)
    # Where the draft is accepted more often, such a verifier is faster, too.
    assert costs.own_seconds(4.0) < costs.own_seconds(3.0) < costs.own_seconds(2.0)


def test_who_counts_no_forwards_has_one_for_each_token() -> None:
    costs = Costs(DEVICE)
    costs.observe(make_outcome([], 0, own=40, asked=40, link=0.02, forward=0.03, each=0.011), 3.0)
    assert not costs.speculates and costs.own_seconds(3.0) == pytest.approx(0.011)


def test_what_a_drafted_round_would_have_cost_the_cloud() -> None:
    costs = Costs(DEVICE)
    round_ = make_outcome([0.9] * 12, 7)
    assert costs.streamed(round_, 3.0) == 8
    stream = make_outcome([], 0, own=40, asked=40, link=0.02, forward=0.03, each=0.011)
    costs.observe(msgspec.structs.replace(stream, further=13), 3.0)
    brings = 3.0 * costs.brings.value
    # Seven right guesses and a wrong one: five and the target's own, then two and the target's own.
    assert costs.streamed(round_, 3.0) == pytest.approx(2 * brings)
    assert costs.streamed(make_outcome([0.9] * 12, 0), 3.0) == pytest.approx(brings)
    assert costs.streamed(make_outcome([0.9] * 11, 11), 3.0) == pytest.approx(2 * brings)


def test_load_moves_what_was_not_seen_under_it() -> None:
    costs = Costs(DEVICE)
    costs.observe(make_outcome([], 0, own=30, asked=30, forward=0.02, each=0.02), 3.0)
    for _ in range(4):
        costs.observe(make_outcome([0.9] * 4, 4, forward=0.022), 3.0)
    for _ in range(3):
        costs.observe(make_outcome([0.9] * 4, 4, forward=0.088), 3.0)
    assert costs.own_seconds(3.0) == pytest.approx(0.08, rel=0.15)


def test_repeated_rounds_say_nothing_of_the_link() -> None:
    costs = Costs(DEVICE)
    costs.observe(make_outcome([0.9], 1, link=0.05), 3.0)
    slow = make_outcome([0.9], 1, link=9.0)
    before = costs.link.now.value
    costs.observe(msgspec.structs.replace(slow, repeated=True), 3.0)
    assert costs.link.now.value == before


def test_the_kernel_s_round_trip_counts_until_a_round_was_seen() -> None:
    costs = Costs(DEVICE)
    costs.listen(Conditions(10, 10, 0, surroundings=Surroundings(rtt_seconds=0.3)))
    assert costs.link.at(0.0) == 0.3
    costs.observe(make_outcome([0.9], 1, link=0.05), 3.0)
    costs.listen(Conditions(10, 10, 0, surroundings=Surroundings(rtt_seconds=0.3)))
    assert costs.link.at(0.0) == pytest.approx(0.05)


def test_joules_above_idle() -> None:
    costs = Costs(Device(idle_watts=2.0, busy_watts=7.0, radio_watts=1.0, joules_per_byte=0.001))
    outcome = make_outcome([0.9] * 5, 5, step=0.01, link=0.05, forward=0.02)
    expected = 5 * 0.01 * 5.0 + outcome.exchange_seconds * 1.0 + 160 * 0.001
    assert costs.joules_of(outcome) == pytest.approx(expected)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(outcomes(), st.floats(1.0, 6.0)), max_size=25))
def test_estimates_are_always_positive_numbers(rounds: list) -> None:
    costs = Costs(DEVICE)
    for outcome, bringing in rounds:
        costs.observe(outcome, bringing)
        figures = {
            "link": costs.link.at(outcome.conditions.now + 1.0),
            "quick link": costs.link_quantile(0.3),
            "narrow forward": costs.forward.at(1),
            "wide forward": costs.forward.at(30),
            "own": costs.own_seconds(bringing),
            "hoped": costs.own_hoped(bringing),
            "step": costs.step_seconds(100),
        }
        assert not {name: figure for name, figure in figures.items() if not (math.isfinite(figure) and figure >= 0)}
        assert costs.own_hoped(bringing) <= costs.own_seconds(bringing) * (1 + 1e-9)
        assert costs.joules_of(outcome) >= 0
        assert costs.queue.value >= 0 and costs.round_bytes.value >= 0


def test_devices_come_from_profiles() -> None:
    for profile in shipped_profiles():
        device = Device.of(profile, 40_000_000, radio="wifi", cache_bytes=1000)
        assert device.step_seconds == pytest.approx(profile.draft_seconds(40_000_000))
        assert device.step_seconds_per_token > 0
        assert 0 < device.prefill_seconds <= device.step_seconds
        assert device.busy_watts > device.idle_watts
