"""The planner's prior, measured on recorded texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.planning import acceptance_prior
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation import CONTINUATION_TOKENS, RecordedText, write_texts
from export.cli.main import main
from export.planner_policy.prior import measure_prior


def make_text(temperature: float, ranks: list[int], confidences: list[float]) -> RecordedText:
    continuations = [[0.5] * CONTINUATION_TOKENS if rank else [] for rank in ranks]
    return RecordedText("target", temperature, 1.0, 0, 4, confidences, ranks, continuations)


@pytest.fixture
def texts() -> list[RecordedText]:
    """At each temperature 100 texts of 28 accepted guesses, one that its first sibling corrects, and one lost."""
    ranks = [0] * 28 + [1, 255]
    confidences = [index / 30 for index in range(30)]
    return [make_text(temperature, ranks, confidences) for temperature in (0.0, 0.7, 1.0) for _ in range(100)]


def test_quintiles_are_those_of_each_stage(texts: list[RecordedText]) -> None:
    prior = measure_prior(texts)
    # Guesses 0 to 3 and the one after the miss, in order of confidence.
    first = ((0.0, 1.0), (1 / 30, 1.0), (2 / 30, 1.0), (3 / 30, 1.0), (29 / 30, 0.0))
    assert np.array(prior.quintiles[0][0]) == pytest.approx(np.array(first))
    # The last stage begins after 16 accepted guesses: 13 of them up to the miss, which is the most confident.
    last = prior.quintiles[1][2]
    assert [rate for _, rate in last] == pytest.approx([1.0, 1.0, 1.0, 1.0, 1 - 100 / 260])
    assert prior.last_stage_shares == pytest.approx((13 / 30,) * 3)
    assert prior.sibling_hazards == pytest.approx((0.5, 0, 0, 0, 0, 0, 0))


def test_a_rare_stage_is_like_the_one_before() -> None:
    texts = [make_text(temperature, [0] * 5 + [1], [0.5] * 6) for temperature in (0.0, 0.7, 1.0) for _ in range(60)]
    prior = measure_prior(texts)
    first, second, last = prior.quintiles[2]
    assert last == second != first
    assert prior.last_stage_shares == (0, 0, 0)


def test_every_temperature_class_is_needed(texts: list[RecordedText]) -> None:
    with pytest.raises(InputError, match="too few texts of temperature class 2"):
        measure_prior(texts[:200])


def test_the_command_prints_the_constants(
    texts: list[RecordedText], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.npz"
    write_texts(path, texts, {})
    assert main(["prior", str(path)]) == 0
    printed: dict[str, object] = {}
    exec(capsys.readouterr().out, printed)
    for name in ("QUINTILES", "LAST_STAGE_SHARES", "SIBLING_HAZARDS"):
        value, shipped = printed[name], getattr(acceptance_prior, name)
        assert isinstance(value, tuple) and len(value) == len(shipped)
