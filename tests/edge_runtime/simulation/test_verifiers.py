"""Verifier costs: measured points, and lines between them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.messages import MAX_TREE_NODES
from edge_runtime.simulation.verifiers import VERIFIERS, make_verifier


@pytest.mark.parametrize("name", VERIFIERS)
def test_forward_times_meet_the_measured_points_and_never_fall(name: str) -> None:
    verifier = make_verifier(name, 0)
    for width, seconds in VERIFIERS[name].forwards:
        assert verifier.forward_seconds[width] == pytest.approx(seconds)
    assert len(verifier.forward_seconds) == MAX_TREE_NODES + 1
    assert all(before <= after for before, after in pairwise(verifier.forward_seconds))


@pytest.mark.parametrize(("name", "streaming", "speculating"), [("7b", 8, 3.3), ("32b", 26, 8.7), ("loaded", 80, 26)])
def test_server_side_speculation_has_its_measured_speed(name: str, streaming: float, speculating: float) -> None:
    # Tokens per forward at an acceptance of 0.8, 5 drafted: (1 - 0.8^6) / (1 - 0.8).
    tokens = (1 - 0.8**6) / (1 - 0.8)
    milliseconds = 1e3 * make_verifier(f"{name}+spec", 0).continuation_seconds / tokens
    assert milliseconds == pytest.approx(speculating, rel=0.05)
    assert 1e3 * make_verifier(name, 0).continuation_seconds == pytest.approx(streaming, rel=0.2)


def test_queueing_is_uniform_around_its_mean() -> None:
    verifier = make_verifier("loaded", 0)
    waits = [verifier.sample_queue_seconds() for _ in range(5000)]
    assert min(waits) >= 0 and max(waits) <= 0.020
    assert sum(waits) / len(waits) == pytest.approx(0.010, rel=0.05)


def test_an_unknown_verifier_is_refused() -> None:
    with pytest.raises(InputError, match="7b-16"):
        make_verifier("gpt", 0)
