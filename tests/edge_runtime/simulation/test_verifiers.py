"""Verifier costs: measured where measured, on lines elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation.verifiers import VERIFIERS, WIDEST, verifier


@pytest.mark.parametrize("name", VERIFIERS)
def test_forwards_go_through_the_measured_points_and_never_get_cheaper(name: str) -> None:
    found = verifier(name, 0)
    for width, seconds in VERIFIERS[name].forwards:
        assert found.forward[width] == pytest.approx(seconds)
    assert len(found.forward) == WIDEST + 1
    assert all(before <= after for before, after in pairwise(found.forward))


@pytest.mark.parametrize(("name", "streaming", "beside"), [("7b", 8, 3.3), ("32b", 26, 8.7), ("loaded", 80, 26)])
def test_speculation_beside_the_target_is_as_fast_as_designed(name: str, streaming: float, beside: float) -> None:
    # Tokens per forward at an acceptance of 0.8, 5 drafted: (1 - 0.8^6) / (1 - 0.8).
    tokens = (1 - 0.8**6) / (1 - 0.8)
    milliseconds = 1e3 * verifier(f"{name}+spec", 0).own_forward / tokens
    assert milliseconds == pytest.approx(beside, rel=0.05)
    assert 1e3 * verifier(name, 0).own_forward == pytest.approx(streaming, rel=0.2)


def test_waiting_is_uniform_around_its_mean() -> None:
    found = verifier("loaded", 0)
    waits = [found.wait() for _ in range(5000)]
    assert min(waits) >= 0 and max(waits) <= 0.020
    assert sum(waits) / len(waits) == pytest.approx(0.010, rel=0.05)


def test_an_unknown_verifier_is_named() -> None:
    with pytest.raises(InputError, match="7b-16"):
        verifier("gpt", 0)
