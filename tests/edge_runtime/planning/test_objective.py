"""Objectives: prices, presets and parsing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.objective import PRESETS, Objective, parse_objective
from edge_runtime.protocol.errors import InputError


def test_parses_presets() -> None:
    for name, objective in PRESETS.items():
        assert parse_objective(name) == objective
    assert parse_objective("latency") == Objective()


def test_parses_prices() -> None:
    assert parse_objective("verifier=2,joule=0.05") == Objective(verifier=2.0, joule=0.05)
    assert parse_objective(" latency = 0 , byte=1e-6") == Objective(latency=0.0, byte=1e-6)


def test_cost_is_the_priced_sum() -> None:
    objective = Objective(latency=1.0, verifier=2.0, joule=0.5, byte=0.01)
    assert objective.cost(3.0, 1.0, 4.0, 100) == pytest.approx(3.0 + 2.0 + 2.0 + 1.0)


@pytest.mark.parametrize(
    "text", ["", "speed", "verifier", "verifier=", "verifier=-1", "verifier=nan", "joule=inf", "latency=0", "a=1,=2"]
)
def test_rejects_invalid_text(text: str) -> None:
    with pytest.raises(InputError):
        parse_objective(text)


@pytest.mark.slow
@given(st.text(max_size=60) | st.from_regex(r"\A(latency|verifier|joule|byte|x)=[-0-9.e]{0,8}(,[a-z]*=[0-9.]*)?\Z"))
def test_any_text_parses_or_raises_input_error(text: str) -> None:
    try:
        objective = parse_objective(text)
    except InputError:
        return
    assert all(
        math.isfinite(price) and price >= 0 for price in (objective.latency, objective.verifier, objective.joule)
    )
