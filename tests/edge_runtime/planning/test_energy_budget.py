"""Energy budgets: parsing, and the virtual queue that enforces them."""

from __future__ import annotations

import datetime
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget, EnergyQueue, parse_energy_budget
from edge_runtime.planning.plan import Surroundings
from edge_runtime.protocol.errors import InputError
from tests.edge_runtime.planning.rounds import make_outcome

DEVICE = DeviceModel(idle_watts=2.0, busy_watts=7.0)
NOON = datetime.datetime(2026, 3, 1, 12, 0)
NO_SENSORS = Surroundings()


def test_parses_joules_per_hour_and_times_of_day() -> None:
    assert parse_energy_budget("18000", NOON, 5.0) == EnergyBudget(watts=5.0)
    assert parse_energy_budget("18:00", NOON, 5.0) == EnergyBudget(until=5.0 + 6 * 3600)
    assert parse_energy_budget("until 08:30", NOON, 0.0) == EnergyBudget(until=20.5 * 3600)


@pytest.mark.parametrize("text", ["", "0", "-5", "nan", "inf", "tomorrow", "24:00", "12:60", "until"])
def test_rejects_invalid_text(text: str) -> None:
    with pytest.raises((InputError, ValueError)):
        parse_energy_budget(text, NOON, 0.0)


@given(st.text(max_size=30))
def test_any_text_parses_or_raises_input_error(text: str) -> None:
    try:
        budget = parse_energy_budget(text, NOON, 0.0)
    except InputError:
        return
    assert (budget.watts is None) != (budget.until is None)


def test_budget_needs_either_watts_or_an_end() -> None:
    for arguments in ({}, {"watts": 1.0, "until": 2.0}, {"watts": 0.0}, {"watts": math.nan}):
        with pytest.raises(ValueError):
            EnergyBudget(**arguments)


def test_battery_charge_is_spread_over_the_remaining_time() -> None:
    budget = EnergyBudget(until=1000.0)
    assert budget.allowance(0.0, Surroundings(joules_left=5000.0)) == pytest.approx(5.0)
    assert budget.allowance(500.0, Surroundings(joules_left=5000.0)) == pytest.approx(10.0)
    assert budget.allowance(0.0, NO_SENSORS) is None


def test_overspending_raises_the_price_of_joules_and_lowers_that_of_waiting() -> None:
    queue = EnergyQueue(EnergyBudget(watts=4.0), DEVICE)
    assert queue.prices(1.0) == (1.0, 0.0)
    prices = []
    for second in range(1, 20):
        queue.observe(make_outcome([0.9] * 5, 5), 5.0)
        queue.advance(float(second), NO_SENSORS)
        prices.append(queue.prices(1.0))
    seconds, joules = zip(*prices, strict=True)
    assert list(seconds) == sorted(seconds, reverse=True) and seconds[-1] < 0.1
    assert list(joules) == sorted(joules) and joules[-1] > 0.3


def test_idling_pays_off_the_backlog_and_savings_are_bounded() -> None:
    queue = EnergyQueue(EnergyBudget(watts=4.0), DEVICE)
    queue.advance(0.0, NO_SENSORS)
    queue.observe(make_outcome([0.9] * 5, 5), 30.0)
    assert queue.pressure() > 0
    queue.advance(10.0, NO_SENSORS)
    assert queue.backlog == pytest.approx(30.0 - 10 * (4.0 - 2.0))
    queue.advance(10_000.0, NO_SENSORS)
    assert queue.pressure() == 0.0
    assert queue.backlog >= -20.0


def test_power_sensor_corrects_modeled_energy() -> None:
    queue = EnergyQueue(EnergyBudget(watts=4.0), DEVICE)
    for second in range(200):
        outcome = make_outcome([0.9] * 5, 5)
        conditions = msgspec.structs.replace(
            outcome.conditions, now=float(second), surroundings=Surroundings(watts=9.0)
        )
        queue.advance(conditions.now, conditions.surroundings)
        queue.observe(msgspec.structs.replace(outcome, conditions=conditions), 0.3)
    seconds = outcome.draft_seconds + outcome.exchange_seconds
    assert queue._sensor_ratio == pytest.approx(9.0 / (2.0 + 0.3 / seconds), rel=0.01)


@given(st.lists(st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1e5), st.none() | st.floats(0.0, 1e5)), max_size=40))
def test_prices_are_always_finite(steps: list[tuple[float, float, float | None]]) -> None:
    for budget in (EnergyBudget(watts=0.5), EnergyBudget(watts=50.0), EnergyBudget(until=100.0)):
        queue = EnergyQueue(budget, DEVICE)
        now = 0.0
        for pause, joules, left in steps:
            now += pause
            queue.advance(now, Surroundings(joules_left=left))
            queue.observe(make_outcome([0.9], 1), joules)
            second, joule = queue.prices(1.0)
            assert 0 < second <= 1 and math.isfinite(joule) and joule >= 0
            assert 0 <= queue.pressure() <= 1
