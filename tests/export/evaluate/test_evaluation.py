"""Evaluation: cases with known results, and refused input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud_verifier.acceptance.measure import Passage
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import CoupledSampler, Sampling
from export.evaluate.evaluation import (
    GIVEN_TEXT,
    MAX_DRAFT_TOKENS,
    OWN_TEXT,
    RETRAINED,
    Evaluation,
    EvaluationConfig,
    evaluate,
)
from export.evaluate.proposers import Proposer, TorchProposer
from export.evaluate.report import format_markdown, save_chart
from export.evaluate.speeds import CLOUD_ALONE, SimulatedDeployment
from tests.models import VOCABULARY_SIZE, save_target

CONFIG = EvaluationConfig(texts=6, prompt=8, tokens=40, resamples=200)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Three models with independent random weights."""
    path = tmp_path_factory.mktemp("evaluation")
    return [load_model(save_target(path / str(seed), seed=seed), "cpu", "float32")[0] for seed in range(3)]


def make_ids(seed: int, length: int = 400) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY_SIZE, length).tolist()


TEXT = {"one": make_ids(0), "two": make_ids(1)}


@pytest.fixture(scope="module")
def evaluation(models: list[Any]) -> Evaluation:
    """Two targets, drafts that are one of them or neither, and a retrained draft for the second."""
    first, second, third = models
    return evaluate(
        {"first": TorchProposer(first, 10_000_000, 1000), "neither": TorchProposer(third)},
        {"v1": first, "v2": lambda: second},
        TEXT,
        retrained={"v2": TorchProposer(second)},
        config=CONFIG,
        deployment=SimulatedDeployment("raspberry-pi-5"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OWN_TEXT, GIVEN_TEXT])
@pytest.mark.parametrize("temperature", CONFIG.temperatures)
def test_a_target_that_drafts_for_itself_is_always_accepted(
    evaluation: Evaluation, kind: str, temperature: float
) -> None:
    row = evaluation.row("first", "v1", temperature, kind)
    assert row.overall_acceptance is not None and row.overall_acceptance.value == 1.0
    # Texts that end early or loop leave fewer positions to count.
    for k, share in enumerate(row.survival):
        assert share is None or share.value == 1.0, k
    counted = {plan: figure.value for plan, figure in row.tokens_per_round.items() if figure is not None}
    assert counted.items() <= {f"K={k}{s}": k + 1.0 for k in CONFIG.lengths for s in ("", " +3")}.items()
    if kind == GIVEN_TEXT:
        assert len(counted) == 8 and row.positions == 6 * CONFIG.tokens and row.looped == 0.0


def test_retention_is_relative_to_the_retrained_draft(evaluation: Evaluation) -> None:
    for temperature in CONFIG.temperatures:
        frozen, retrained = (evaluation.row(name, "v2", temperature, GIVEN_TEXT) for name in ("first", RETRAINED))
        assert frozen.acceptance and retrained.acceptance and frozen.retention
        assert retrained.acceptance.value == 1.0 and retrained.retention is None
        assert frozen.retention.value == pytest.approx(frozen.acceptance.value, abs=1e-4)
        assert frozen.retention.low <= frozen.retention.value <= frozen.retention.high
        assert frozen.acceptance.value < 0.5
    assert evaluation.row("first", "v1").retention is None
    with pytest.raises(KeyError):
        evaluation.row(RETRAINED, "v1")


def test_all_rows_are_in_the_record_and_the_tables(evaluation: Evaluation, tmp_path: Path) -> None:
    record = json.loads(json.dumps(evaluation.record()))
    assert len(record["rows"]) == len(evaluation.rows) == 2 * 3 * (2 + 3)
    assert record["rows"][0]["survival"][MAX_DRAFT_TOKENS - 1].keys() == {"value", "low", "high"}
    assert record["texts"] == {"one": 3, "two": 3}
    tables = format_markdown(evaluation)
    assert tables.count("| neither | v2 |") == 2 * 3 * 3
    assert "Expected speed, modeled: raspberry-pi-5, wifi, loaded" in tables and "100.0 %" in tables
    save_chart(evaluation, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_speed_needs_a_draft_size_and_the_targets_own_text(evaluation: Evaluation) -> None:
    speed = evaluation.row("first", "v1", 1.0).speed
    assert speed is not None
    assert speed.step_milliseconds == pytest.approx(1.0, rel=0.01)
    # A draft that is always accepted beats a verifier that takes 80 ms for each token.
    assert (
        speed.best != CLOUD_ALONE and speed.milliseconds[speed.best].value < speed.milliseconds[CLOUD_ALONE].value / 2
    )
    assert evaluation.row("neither", "v1", 1.0).speed is None
    assert evaluation.row("first", "v1", 1.0, GIVEN_TEXT).speed is None


def test_evaluations_are_reproducible(models: list[Any]) -> None:
    config = EvaluationConfig(texts=2, prompt=4, tokens=16, temperatures=(0.7,), resamples=50)
    once, again = (evaluate({"d": TorchProposer(models[1])}, {"v": models[0]}, TEXT, config=config) for _ in range(2))
    assert once == again
    arrays = {"one": torch.tensor(TEXT["one"], dtype=torch.int32), "two": np.array(TEXT["two"], np.uint16)}
    assert evaluate({"d": TorchProposer(models[1])}, {"v": models[0]}, arrays, config=config) == once
    other = evaluate(
        {"d": TorchProposer(models[1])}, {"v": models[0]}, TEXT, config=EvaluationConfig(**vars(config) | {"seed": 1})
    )
    assert other.rows != once.rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_are_judged_as_if_alone(models: list[Any], temperature: float) -> None:
    """Compared with each prompt's text by the target, and the tokens of the draft, position by position."""
    target, draft = models[0], copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    prompts = [make_ids(seed, length) for seed, length in enumerate((3, 40, 11, 25))]
    config = EvaluationConfig(texts=4, tokens=20, temperatures=(temperature,), kinds=(OWN_TEXT, GIVEN_TEXT), seed=3)
    (row,) = evaluate({"d": TorchProposer(draft)}, {"v": target}, {"chats": prompts}, config=config).rows
    # Nothing is given after a prompt.
    assert row.kind == OWN_TEXT
    sampler = CoupledSampler(VOCABULARY_SIZE)
    same = []
    for index, prompt in enumerate(prompts):
        sampling = Sampling(temperature=temperature, seed=3 + index)
        ids = prompt + generate_reference(target, prompt, sampling, 20, frozenset({0}))
        with torch.no_grad():
            logits = draft(torch.tensor([ids])).logits[0].numpy()
        same += [sampler.rank(logits[t - 1], sampling, t).ids[0] == ids[t] for t in range(len(prompt), len(ids))]
    assert row.positions == len(same)
    assert row.overall_acceptance is not None
    assert row.overall_acceptance.value == pytest.approx(sum(same) / len(same), abs=1e-4)
    assert 0.2 < row.overall_acceptance.value < 1


def test_prompts_and_texts_are_evaluated_together(models: list[Any]) -> None:
    config = EvaluationConfig(texts=4, prompt=4, tokens=16, temperatures=(1.0,), resamples=50)
    text = {"chats": [make_ids(5, 3), make_ids(6, 9), make_ids(7, 30)], "code": make_ids(8)}
    evaluation = evaluate({"d": TorchProposer(models[0])}, {"v": models[0]}, text, config=config)
    assert evaluation.texts == {"chats": 2, "code": 2}
    own, given = (evaluation.row("d", "v", 1.0, kind) for kind in (OWN_TEXT, GIVEN_TEXT))
    assert [*own.by_text] == ["chats", "code"]
    assert ([*given.by_text], given.positions) == (["code"], 2 * 16)


def test_any_proposer_can_be_evaluated(models: list[Any]) -> None:
    class RecordingProposer(TorchProposer):
        """Records its passages."""

        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.passages: list[Passage] = []

        def propose(self, passages: Any) -> Any:
            self.passages += passages
            return super().propose(passages)

    proposer: Proposer = (draft := RecordingProposer(models[0]))
    config = EvaluationConfig(texts=2, prompt=4, tokens=16, temperatures=(0.0, 1.0), resamples=50)
    evaluate({"d": proposer}, {"v1": models[0], "v2": models[1]}, TEXT, config=config)
    assert len(draft.passages) == 16
    # Own texts differ by version; given texts are the same pieces.
    assert (
        [p.ids for p in draft.passages[4:6]]
        == [p.ids for p in draft.passages[12:14]]
        == [TEXT["one"][:20], TEXT["two"][:20]]
    )
    assert {p.sampling.seed for p in draft.passages} == {0, 1}


def test_bad_input_is_refused(models: list[Any], tmp_path: Path) -> None:
    draft, target = TorchProposer(models[0]), models[0]
    small = load_model(save_target(tmp_path / "small", vocab_size=301, max_position_embeddings=64), "cpu", "float32")[0]
    with pytest.raises(InputError, match="'one' has 47 tokens, but a piece has 48"):
        evaluate({"d": draft}, {"v": target}, {"one": make_ids(0, 47)}, config=CONFIG)
    with pytest.raises(InputError, match="1 piece of 48 tokens; an interval needs 2"):
        evaluate({"d": draft}, {"v": target}, {"one": make_ids(0, 90)}, config=CONFIG)
    with pytest.raises(InputError, match="'v3', which is not evaluated: those evaluated are v"):
        evaluate({"d": draft}, {"v": target}, TEXT, retrained={"v3": draft}, config=CONFIG)
    with pytest.raises(InputError, match="has 301 ids and target 'v' 300"):
        evaluate({"d": TorchProposer(small)}, {"v": target}, TEXT, config=CONFIG)
    with pytest.raises(InputError, match=r"longer than the context of draft 'd' \(64\)"):
        evaluate({"d": TorchProposer(small)}, {"v": small}, TEXT, config=EvaluationConfig(texts=2, prompt=8, tokens=60))
    with pytest.raises(InputError, match="at least one draft"):
        evaluate({RETRAINED: draft}, {"v": target}, TEXT, config=CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 1}, "at least 2"),
        ({"prompt": 0}, "prompt of at least 1"),
        ({"tokens": 15}, "at least 16 tokens after it"),
        ({"temperatures": (-1.0,)}, "temperature -1"),
    ],
)
def test_bad_configurations_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**settings)


@pytest.mark.parametrize("names", [("toaster",), ("server", "tin-can"), ("server", "wifi", "abacus")])
def test_unknown_deployments_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=names[-1]):
        SimulatedDeployment(*names)
