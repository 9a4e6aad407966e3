"""Evaluation: what must come out where the answer is known, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud_verifier.model.target import load_model
from edge_runtime.protocol.errors import InputError
from export.evaluate.evaluation import GIVEN, LONGEST_DRAFT, OWN, RETRAINED, Evaluation, Order, evaluate
from export.evaluate.proposers import Draft, Passage, TorchProposer
from export.evaluate.report import draw, markdown
from export.evaluate.speeds import STREAMED, Scene
from tests.models import VOCABULARY_SIZE, save_target

ORDER = Order(texts=6, prompt=8, tokens=40, resamples=200)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Three random models; a model of twice the noise of another would be no nearer to it."""
    path = tmp_path_factory.mktemp("evaluation")
    return [load_model(save_target(path / str(seed), seed=seed), "cpu", "float32")[0] for seed in range(3)]


def some_text(seed: int, length: int = 400) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY_SIZE, length).tolist()


TEXT = {"one": some_text(0), "two": some_text(1)}


@pytest.fixture(scope="module")
def found(models: list[Any]) -> Evaluation:
    """Two targets, drafts that are one of them or neither, and a retrained draft for the second."""
    mine, theirs, nobodys = models
    return evaluate(
        {"first": TorchProposer(mine, 10_000_000, 1000), "neither": TorchProposer(nobodys)},
        {"v1": mine, "v2": lambda: theirs},
        TEXT,
        retrained={"v2": TorchProposer(theirs)},
        order=ORDER,
        scene=Scene("raspberry-pi-5"),
    )


@pytest.mark.parametrize("kind", [OWN, GIVEN])
@pytest.mark.parametrize("temperature", ORDER.temperatures)
def test_a_target_that_drafts_for_itself_is_always_right(found: Evaluation, kind: str, temperature: float) -> None:
    row = found.row("first", "v1", temperature, kind)
    assert row.overall_acceptance is not None and row.overall_acceptance.value == 1.0
    # What ends early, or loops, leaves less to count.
    for k, share in enumerate(row.survival):
        assert share is None or share.value == 1.0, k
    counted = {plan: figure.value for plan, figure in row.tokens_per_round.items() if figure is not None}
    assert counted.items() <= {f"K={k}{s}": k + 1.0 for k in ORDER.lengths for s in ("", " +3")}.items()
    if kind == GIVEN:
        assert len(counted) == 8 and row.positions == 6 * ORDER.tokens and row.looped == 0.0


def test_retention_is_acceptance_over_the_retrained_drafts(found: Evaluation) -> None:
    for temperature in ORDER.temperatures:
        frozen, retrained = (found.row(name, "v2", temperature, GIVEN) for name in ("first", RETRAINED))
        assert frozen.acceptance and retrained.acceptance and frozen.retention
        assert retrained.acceptance.value == 1.0 and retrained.retention is None
        assert frozen.retention.value == pytest.approx(frozen.acceptance.value, abs=1e-4)
        assert frozen.retention.low <= frozen.retention.value <= frozen.retention.high
        assert frozen.acceptance.value < 0.5
    assert found.row("first", "v1").retention is None
    with pytest.raises(KeyError):
        found.row(RETRAINED, "v1")


def test_all_is_saved_and_shown(found: Evaluation, tmp_path: Path) -> None:
    record = json.loads(json.dumps(found.record()))
    assert len(record["rows"]) == len(found.rows) == 2 * 3 * (2 + 3)
    assert record["rows"][0]["survival"][LONGEST_DRAFT - 1].keys() == {"value", "low", "high"}
    assert record["texts"] == {"one": 3, "two": 3}
    tables = markdown(found)
    assert tables.count("| neither | v2 |") == 2 * 3 * 3
    assert "Expected speed, modelled: raspberry-pi-5, wifi, loaded" in tables and "100.0 %" in tables
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_speed_needs_a_size_and_is_of_what_targets_write(found: Evaluation) -> None:
    speed = found.row("first", "v1", 1.0).speed
    assert speed is not None
    assert speed.step_milliseconds == pytest.approx(1.0, rel=0.01)
    # A draft that is always right beats a verifier that takes 80 ms for each token.
    assert speed.best != STREAMED and speed.milliseconds[speed.best].value < speed.milliseconds[STREAMED].value / 2
    assert found.row("neither", "v1", 1.0).speed is None
    assert found.row("first", "v1", 1.0, GIVEN).speed is None


def test_the_same_again_says_the_same(models: list[Any]) -> None:
    order = Order(texts=2, prompt=4, tokens=16, temperatures=(0.7,), resamples=50)
    once, again = (evaluate({"d": TorchProposer(models[1])}, {"v": models[0]}, TEXT, order=order) for _ in range(2))
    assert once == again
    arrays = {"one": torch.tensor(TEXT["one"], dtype=torch.int32), "two": np.array(TEXT["two"], np.uint16)}
    assert evaluate({"d": TorchProposer(models[1])}, {"v": models[0]}, arrays, order=order) == once
    other = evaluate({"d": TorchProposer(models[1])}, {"v": models[0]}, TEXT, order=Order(**vars(order) | {"seed": 1}))
    assert other.rows != once.rows


def test_a_draft_is_anything_that_proposes(models: list[Any]) -> None:
    class Scribe(TorchProposer):
        """Asks its model, and notes what it is asked."""

        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.passes: list[str] = []
            self.passages: list[Passage] = []

        def begin(self, version: str) -> None:
            self.passes.append(version)

        def guess(self, passages: Any) -> Any:
            self.passages += passages
            return super().guess(passages)

    scribe: Draft = (draft := Scribe(models[0]))
    order = Order(texts=2, prompt=4, tokens=16, temperatures=(0.0, 1.0), resamples=50)
    evaluate({"d": scribe}, {"v1": models[0], "v2": models[1]}, TEXT, order=order)
    assert draft.passes == ["v1"] * 4 + ["v2"] * 4
    assert len(draft.passages) == 16
    # A text of its own for each version, and the same pieces of given text.
    assert (
        [p.ids for p in draft.passages[4:6]]
        == [p.ids for p in draft.passages[12:14]]
        == [TEXT["one"][:20], TEXT["two"][:20]]
    )
    assert {p.sampling.seed for p in draft.passages} == {0, 1}


def test_what_cannot_be_evaluated_is_refused(models: list[Any], tmp_path: Path) -> None:
    draft, target = TorchProposer(models[0]), models[0]
    small = load_model(save_target(tmp_path / "small", vocab_size=301, max_position_embeddings=64), "cpu", "float32")[0]
    with pytest.raises(InputError, match="'one' has 47 tokens, and a piece takes 48"):
        evaluate({"d": draft}, {"v": target}, {"one": some_text(0, 47)}, order=ORDER)
    with pytest.raises(InputError, match="1 piece of 48 tokens, and chance takes 2"):
        evaluate({"d": draft}, {"v": target}, {"one": some_text(0, 90)}, order=ORDER)
    with pytest.raises(InputError, match="'v3', which is not evaluated: those evaluated are v"):
        evaluate({"d": draft}, {"v": target}, TEXT, retrained={"v3": draft}, order=ORDER)
    with pytest.raises(InputError, match="knows 301 ids and target 'v' 300"):
        evaluate({"d": TorchProposer(small)}, {"v": target}, TEXT, order=ORDER)
    with pytest.raises(InputError, match=r"longer than the context of draft 'd' \(64\)"):
        evaluate({"d": TorchProposer(small)}, {"v": small}, TEXT, order=Order(texts=2, prompt=8, tokens=60))
    with pytest.raises(InputError, match="at least one draft"):
        evaluate({RETRAINED: draft}, {"v": target}, TEXT, order=ORDER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 1}, "at least 2"),
        ({"prompt": 0}, "prompt of at least 1"),
        ({"tokens": 15}, "16 behind it"),
        ({"temperatures": (-1.0,)}, "temperature -1"),
    ],
)
def test_impossible_orders_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Order(**settings)


@pytest.mark.parametrize("names", [("toaster",), ("server", "tin-can"), ("server", "wifi", "abacus")])
def test_unknown_scenes_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=names[-1]):
        Scene(*names)
