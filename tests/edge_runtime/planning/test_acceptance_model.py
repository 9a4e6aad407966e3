"""The acceptance model and its tables: priors, learning from full information, inheritance, and the stop rule."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_model import (
    AcceptanceModel,
    AcceptanceModels,
    temperature_class,
)
from edge_runtime.planning.acceptance_prior import LAST_STAGE_SHARES, QUINTILES
from edge_runtime.planning.acceptance_table import (
    CONFIDENCE_BINS,
    MAX_DRAFT_LENGTH,
    STAGE_STREAKS,
    THRESHOLD_COUNT,
    THRESHOLDS,
    VERIFIER_DRAFT_LENGTH,
    AcceptanceTable,
    StageAcceptance,
)
from edge_runtime.planning.plan import Conditions
from tests.edge_runtime.planning.rounds import make_outcome, outcomes


def teach(model: AcceptanceModel, rounds: int, acceptance: float, seed: int = 0, length: int = 6) -> None:
    """Feed rounds of constant confidence whose tokens are accepted with a constant probability."""
    draw = random.Random(seed).random
    for _ in range(rounds):
        accepted = 0
        while accepted < length and draw() < acceptance:
            accepted += 1
        model.observe(make_outcome([0.62] * length, accepted))


def check_table(table: AcceptanceTable) -> None:
    """Assert that a table is consistent."""
    assert np.isfinite(table.drafted).all() and np.isfinite(table.accepted).all()
    assert all(0 < low <= high < 1 for low, high in zip(table.calibration, table.calibration[1:], strict=False))
    # Longer drafts and lower thresholds draft and accept more, and no draft accepts more than it drafts.
    assert (np.diff(table.drafted, axis=0) >= -1e-12).all() and (np.diff(table.drafted, axis=1) >= -1e-12).all()
    assert (np.diff(table.accepted, axis=0) >= -1e-12).all() and (np.diff(table.accepted, axis=1) >= -1e-12).all()
    assert (table.accepted <= table.drafted + 1e-12).all()
    assert (table.survival <= table.reach + 1e-12).all() and (table.reach <= 1 + 1e-12).all()
    assert (np.diff(table.sibling_hits) >= 0).all() and table.sibling_hits[-1] <= 1
    assert table.confidence_shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("acceptance", [None, 0.0, 0.3, 0.58, 0.9, 1.0])
def test_priors_are_consistent(kind: int, acceptance: float | None) -> None:
    check_table(AcceptanceModel(kind, acceptance).table())


def test_prior_without_evaluation_matches_the_measured_quintiles() -> None:
    for kind, stages in enumerate(QUINTILES):
        model = AcceptanceModel(kind)
        for quintiles, table in ((stages[0], model.first_stage_table()), (stages[-1], model.last_stage_table())):
            expected = sum(rate for _, rate in quintiles) / len(quintiles)
            assert table.acceptance == pytest.approx(expected, abs=0.03)
        assert model.last_stage_share(100) == pytest.approx(LAST_STAGE_SHARES[kind])


def test_better_evaluation_gives_better_prior() -> None:
    tables = [AcceptanceModel(0, acceptance).table().acceptance for acceptance in (0.3, 0.5, 0.7, 0.9)]
    assert tables == sorted(tables)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(outcomes(), max_size=30))
def test_tables_are_consistent_after_any_rounds(rounds: list) -> None:
    model = AcceptanceModel(0)
    for outcome in rounds:
        model.observe(outcome)
        assert 0.0 <= model.cost_error <= 1.0
        model.follow(outcome.conditions)
        for table in (model.table(), model.first_stage_table(), model.last_stage_table()):
            check_table(table)
        assert 0.0 <= model.last_stage_share(outcome.conditions.left) <= 1.0
        assert 1.0 <= model.tokens_per_forward(outcome.conditions.left) <= 1.0 + VERIFIER_DRAFT_LENGTH


def test_learns_acceptance_and_prefix_survival() -> None:
    model = AcceptanceModel(0)
    teach(model, 2000, 0.7)
    table = model.first_stage_table()
    assert table.calibration[int(0.62 * CONFIDENCE_BINS)] == pytest.approx(0.7, abs=0.08)
    # Nearly all mass is in one bin, so survival is nearly geometric.
    expected = sum(0.7**k for k in range(1, 7))
    assert table.accepted[6, -1] == pytest.approx(expected, rel=0.15)


def test_forgets_old_evidence() -> None:
    model = AcceptanceModel(0)
    teach(model, 300, 0.9)
    before = model.first_stage_table().acceptance
    teach(model, 4000, 0.3, seed=1)
    assert model.first_stage_table().acceptance < before - 0.3
    assert model.cost_error < 0.1


def test_only_judged_tokens_are_evidence() -> None:
    """Tokens after the first rejection are not judged, so a long draft counts no more than its judged part."""
    short, long = AcceptanceModel(0), AcceptanceModel(0)
    for _ in range(50):
        short.observe(make_outcome([0.9, 0.3], 1))
        long.observe(make_outcome([0.9, 0.3, 0.99, 0.99, 0.01], 1))
    assert short.table().calibration == long.table().calibration
    assert short.judged == long.judged


def test_shadow_guesses_count_like_drafted_tokens() -> None:
    drafted, shadowed = AcceptanceModel(0), AcceptanceModel(0)
    for _ in range(60):
        drafted.observe(make_outcome([0.9, 0.8, 0.3], 2, siblings=2, sibling=2))
        stream = make_outcome([], 0, own=3, planned_own=3, siblings=2)
        shadowed.observe(msgspec.structs.replace(stream, shadow_guesses=[(0.9, 0), (0.8, 0), (0.3, 2)]))
    assert shadowed.judged == drafted.judged > 150
    assert drafted.table().calibration == shadowed.table().calibration
    assert drafted.table().sibling_hits.tolist() == shadowed.table().sibling_hits.tolist()


def test_fully_shadowed_stream_continues_the_streak() -> None:
    model = AcceptanceModel(0)
    model.follow(Conditions(150, 50, 1))
    stream = make_outcome([], 0, own=40, planned_own=40, left=150)
    correct = [(0.9, 0)] * 40
    model.observe(msgspec.structs.replace(stream, shadow_guesses=correct))
    model.observe(msgspec.structs.replace(stream, shadow_guesses=correct))
    assert model.streak == 80
    # The guess for the last token is unknown, so the streak ends.
    model.observe(msgspec.structs.replace(stream, shadow_guesses=correct[:39]))
    assert model.streak == 0


def test_evidence_fades_while_nothing_is_guessed() -> None:
    model = AcceptanceModel(0)
    for _ in range(60):
        model.observe(make_outcome([0.9, 0.8, 0.3], 0))
    judged, accepted = model.judged, model.table().acceptance
    for _ in range(3200):
        model.fade()
    assert model.judged == pytest.approx(judged * 0.9997**3200)
    assert model.table().acceptance > accepted


def test_stages_are_learned_separately() -> None:
    """After a long streak the next guess is correct far more often than after a rejection."""
    model = AcceptanceModel(1)
    model.follow(Conditions(1000, 50, 1))
    for index in range(400):
        # Eight rounds of six correct guesses, then eight with at most one accepted token.
        model.observe(make_outcome([0.62] * 6, 6 if index % 16 < 8 else index % 2))
        if index % 16 == 7:
            assert model.streak == 48 and model.table() is model.last_stage_table()
        if index % 16 == 9:
            assert model.streak < STAGE_STREAKS[1] and model.table() is model.first_stage_table()
    assert model.last_stage_table().calibration[12] > 0.9
    assert model.first_stage_table().calibration[12] < 0.8
    assert model.last_stage_share(10) > LAST_STAGE_SHARES[1] + 0.2
    before = model.last_stage_table().accepted[12, -1]
    assert before > 2 * model.first_stage_table().accepted[12, -1]
    # Another text begins without a streak.
    model.observe(make_outcome([0.62] * 20, 20))
    model.follow(Conditions(90, 50, 1))
    assert model.streak == 0 and model.table() is model.first_stage_table()


def test_learns_sibling_hit_rates() -> None:
    model = AcceptanceModel(0)
    for index in range(300):
        model.observe(make_outcome([0.4], 0, siblings=3, sibling=(1, 0, 2, 0)[index % 4]))
    hits = model.table().sibling_hits
    assert hits[1] == pytest.approx(0.25, abs=0.06)
    assert hits[2] == pytest.approx(0.5, abs=0.08)
    assert hits[3] - hits[2] < 0.06


def test_table_agrees_with_simulated_stop_rule() -> None:
    """Compare expected drafted and accepted tokens with drafts drawn from the same distribution."""
    shares = np.zeros(CONFIDENCE_BINS)
    shares[[4, 9, 14, 19]] = 0.1, 0.2, 0.3, 0.4
    calibration = np.interp(np.arange(CONFIDENCE_BINS), [0, 19], [0.2, 0.97])
    stage = StageAcceptance(shares.tolist(), calibration.tolist())
    table = AcceptanceTable([stage] * len(STAGE_STREAKS), np.zeros(8))
    draw = random.Random(3)
    bins = draw.choices(range(CONFIDENCE_BINS), shares.tolist(), k=40_000)
    for length, level in ((3, THRESHOLD_COUNT - 1), (8, 4), (8, 12), (MAX_DRAFT_LENGTH, 20)):
        drafted = accepted = rounds = index = 0
        while index < 12_000:
            survival, alive = 1.0, True
            for _ in range(length):
                probability = float(calibration[bins[index]])
                index += 1
                drafted += 1
                survival *= probability
                alive = alive and draw.random() < probability
                accepted += alive
                if survival < THRESHOLDS[level]:
                    break
            rounds += 1
        # The thresholds are a grid, so they are met approximately.
        assert table.drafted[length, level] == pytest.approx(drafted / rounds, rel=0.08)
        assert table.accepted[length, level] == pytest.approx(accepted / rounds, rel=0.08)


def test_models_are_kept_per_version_and_temperature_class() -> None:
    models = AcceptanceModels({"T=0": 0.6})
    first = models.get("v1", 0.0)
    assert models.get("v1", 0.0) is first
    assert models.get("v1", 1.0) is not first
    assert models.get("", 0.0) is first
    assert [temperature_class(t) for t in (0.0, 0.3, 0.7, 1.0)] == [0, 1, 1, 2]


def test_new_version_inherits_and_learns_faster() -> None:
    models = AcceptanceModels({})
    teach(models.get("v1", 0.0), 300, 0.9)
    old, new = models.get("v1", 0.0), models.get("v2", 0.0)
    assert new is not old
    assert new.first_stage_table().acceptance == pytest.approx(old.first_stage_table().acceptance, abs=0.08)
    assert new.judged < old.judged
    before = old.first_stage_table().calibration[12]
    teach(new, 120, 0.2)
    assert new.first_stage_table().calibration[12] < before - 0.25
    assert old.first_stage_table().calibration[12] == before
