"""What drafts are worth: learned by full information, and what follows for every draft length and threshold."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_model import FIFTHS, RUNNING, Survival, Survivals, temperature_class
from edge_runtime.planning.acceptance_table import BINS, LEVELS, LONGEST, SPECULATED, STAGES, THRESHOLDS, Stage, Table
from edge_runtime.planning.plan import Conditions
from tests.edge_runtime.planning.rounds import make_outcome, outcomes


def teach(survival: Survival, rounds: int, acceptance: float, seed: int = 0, length: int = 6) -> None:
    """Rounds of one confidence whose tokens are accepted with one chance."""
    chance = random.Random(seed).random
    for _ in range(rounds):
        accepted = 0
        while accepted < length and chance() < acceptance:
            accepted += 1
        survival.observe(make_outcome([0.62] * length, accepted))


def check(table: Table) -> None:
    assert np.isfinite(table.drafted).all() and np.isfinite(table.accepted).all()
    assert all(0 < low <= high < 1 for low, high in zip(table.calibration, table.calibration[1:], strict=False))
    # Longer drafts and lower thresholds draft more and have more accepted, but never more than they draft.
    assert (np.diff(table.drafted, axis=0) >= -1e-12).all() and (np.diff(table.drafted, axis=1) >= -1e-12).all()
    assert (np.diff(table.accepted, axis=0) >= -1e-12).all() and (np.diff(table.accepted, axis=1) >= -1e-12).all()
    assert (table.accepted <= table.drafted + 1e-12).all()
    assert (table.intact <= table.going + 1e-12).all() and (table.going <= 1 + 1e-12).all()
    assert (np.diff(table.sibling_hits) >= 0).all() and table.sibling_hits[-1] <= 1
    assert table.sureness.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("acceptance", [None, 0.0, 0.3, 0.58, 0.9, 1.0])
def test_priors_are_sound(kind: int, acceptance: float | None) -> None:
    check(Survival(kind, acceptance).table())


def test_the_prior_without_an_evaluation_is_the_family_s() -> None:
    for kind, stages in enumerate(FIFTHS):
        survival = Survival(kind)
        for fifths, table in ((stages[0], survival.fresh_table()), (stages[-1], survival.running_table())):
            expected = sum(right for _, right in fifths) / len(fifths)
            assert table.acceptance == pytest.approx(expected, abs=0.03)
        assert survival.running(100) == pytest.approx(RUNNING[kind])


def test_a_better_evaluation_is_a_better_prior() -> None:
    tables = [Survival(0, acceptance).table().acceptance for acceptance in (0.3, 0.5, 0.7, 0.9)]
    assert tables == sorted(tables)


@settings(max_examples=40, deadline=None)
@given(st.lists(outcomes(), max_size=30))
def test_tables_are_sound_whatever_was_seen(rounds: list) -> None:
    survival = Survival(0)
    for outcome in rounds:
        survival.observe(outcome)
        assert 0.0 <= survival.doubt <= 1.0
        survival.follow(outcome.conditions)
        for table in (survival.table(), survival.fresh_table(), survival.running_table()):
            check(table)
        assert 0.0 <= survival.running(outcome.conditions.left) <= 1.0
        assert 1.0 <= survival.speculated(outcome.conditions.left) <= 1.0 + SPECULATED


def test_acceptance_and_its_survival_are_learned() -> None:
    survival = Survival(0)
    teach(survival, 2000, 0.7)
    table = survival.fresh_table()
    assert table.calibration[int(0.62 * BINS)] == pytest.approx(0.7, abs=0.08)
    # Nearly all mass is in one bin, so that survival is nearly geometric.
    expected = sum(0.7**k for k in range(1, 7))
    assert table.accepted[6, -1] == pytest.approx(expected, rel=0.15)


def test_old_evidence_is_forgotten() -> None:
    survival = Survival(0)
    teach(survival, 300, 0.9)
    before = survival.fresh_table().acceptance
    teach(survival, 4000, 0.3, seed=1)
    assert survival.fresh_table().acceptance < before - 0.3
    assert survival.doubt < 0.1


def test_only_judged_tokens_teach() -> None:
    """Behind the first miss nobody knows, so that a long draft teaches no more than its judged part."""
    one, other = Survival(0), Survival(0)
    for _ in range(50):
        one.observe(make_outcome([0.9, 0.3], 1))
        other.observe(make_outcome([0.9, 0.3, 0.99, 0.99, 0.01], 1))
    assert one.table().calibration == other.table().calibration
    assert one.judged == other.judged


def test_watching_teaches_what_drafting_would_have() -> None:
    drafted, watched = Survival(0), Survival(0)
    for _ in range(60):
        drafted.observe(make_outcome([0.9, 0.8, 0.3], 2, siblings=2, sibling=2))
        stream = make_outcome([], 0, own=3, asked=3, siblings=2)
        watched.observe(msgspec.structs.replace(stream, watched=[(0.9, 0), (0.8, 0), (0.3, 2)]))
    assert watched.judged == drafted.judged > 150
    one, other = drafted.table(), watched.table()
    assert one.calibration == other.calibration and one.sibling_hits.tolist() == other.sibling_hits.tolist()


def test_a_stream_that_was_watched_to_its_end_leaves_its_streak() -> None:
    survival = Survival(0)
    survival.follow(Conditions(150, 50, 1))
    stream = make_outcome([], 0, own=40, asked=40, left=150)
    right = [(0.9, 0)] * 40
    survival.observe(msgspec.structs.replace(stream, watched=right))
    assert survival.streak == 40
    # What nobody saw may have been anything.
    survival.observe(msgspec.structs.replace(stream, watched=right[:39]))
    assert survival.streak == 0


def test_texts_that_run_on_are_known_by_their_streak() -> None:
    """Behind many right guesses in a row, the next is right far more often than behind a miss, and both are learned."""
    survival = Survival(1)
    survival.follow(Conditions(1000, 50, 1))
    for index in range(400):
        # Eight rounds of six right guesses, then as many in which every other guess is wrong.
        survival.observe(make_outcome([0.62] * 6, 6 if index % 16 < 8 else index % 2))
        if index % 16 == 7:
            assert survival.streak == 48 and survival.table() is survival.running_table()
        if index % 16 == 9:
            assert survival.streak < STAGES[1] and survival.table() is survival.fresh_table()
    assert survival.running_table().calibration[12] > 0.9
    assert survival.fresh_table().calibration[12] < 0.8
    assert survival.running(10) > RUNNING[1] + 0.2
    before = survival.running_table().accepted[12, -1]
    assert before > 2 * survival.fresh_table().accepted[12, -1]
    # Another text begins behind no streak.
    survival.observe(make_outcome([0.62] * 20, 20))
    survival.follow(Conditions(90, 50, 1))
    assert survival.streak == 0 and survival.table() is survival.fresh_table()


def test_siblings_are_learned() -> None:
    survival = Survival(0)
    for index in range(300):
        survival.observe(make_outcome([0.4], 0, siblings=3, sibling=(1, 0, 2, 0)[index % 4]))
    hits = survival.table().sibling_hits
    assert hits[1] == pytest.approx(0.25, abs=0.06)
    assert hits[2] == pytest.approx(0.5, abs=0.08)
    assert hits[3] - hits[2] < 0.06


def test_the_table_agrees_with_playing_the_stop_rule() -> None:
    """Expected drafted and accepted tokens against drafts drawn from the very same curves."""
    sureness = np.zeros(BINS)
    sureness[[4, 9, 14, 19]] = 0.1, 0.2, 0.3, 0.4
    calibration = np.interp(np.arange(BINS), [0, 19], [0.2, 0.97])
    table = Table([Stage(sureness.tolist(), calibration.tolist())] * len(STAGES), np.zeros(8))
    draw = random.Random(3)
    bins = draw.choices(range(BINS), sureness.tolist(), k=40_000)
    for length, level in ((3, LEVELS - 1), (8, 4), (8, 12), (LONGEST, 20)):
        drafted = accepted = rounds = index = 0
        while index < 12_000:
            survival, alive = 1.0, True
            for _ in range(length):
                chance = float(calibration[bins[index]])
                index += 1
                drafted += 1
                survival *= chance
                alive = alive and draw.random() < chance
                accepted += alive
                if survival < THRESHOLDS[level]:
                    break
            rounds += 1
        # Levels are a grid, so that thresholds are met only about.
        assert table.drafted[length, level] == pytest.approx(drafted / rounds, rel=0.08)
        assert table.accepted[length, level] == pytest.approx(accepted / rounds, rel=0.08)


def test_each_version_and_temperature_has_its_own() -> None:
    survivals = Survivals({"T=0": 0.6})
    first = survivals.of("v1", 0.0)
    assert survivals.of("v1", 0.0) is first
    assert survivals.of("v1", 1.0) is not first
    assert survivals.of("", 0.0) is first
    assert [temperature_class(t) for t in (0.0, 0.3, 0.7, 1.0)] == [0, 1, 1, 2]


def test_a_new_version_starts_from_the_last_one_and_learns_sooner() -> None:
    survivals = Survivals({})
    teach(survivals.of("v1", 0.0), 300, 0.9)
    old, new = survivals.of("v1", 0.0), survivals.of("v2", 0.0)
    assert new is not old
    assert new.fresh_table().acceptance == pytest.approx(old.fresh_table().acceptance, abs=0.08)
    assert new.judged < old.judged
    before = old.fresh_table().calibration[12]
    teach(new, 120, 0.2)
    assert new.fresh_table().calibration[12] < before - 0.25
    assert old.fresh_table().calibration[12] == before
