"""The complete recipe at its smallest size: from a chat model to an evaluated draft and its bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cloud_verifier.draft_models.checkpoint import load_draft, read_description
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.bundle import read_bundle
from export.cli.family import STAGES
from export.cli.main import main
from export.draft import chats, training_text
from export.example_family.recipe import FUTURES, VERSIONS
from export.example_family.sizes import SIZES
from tests.cloud_verifier.target_versions import save_incompatible_version
from tests.models import save_chat_target

BLOCKS = 3


@pytest.mark.slow
def test_all_stages_at_smoke_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "MAX_USER_TOKENS", 8)
    monkeypatch.setattr(training_text, "EVALUATED_WINDOWS", 8)
    source = save_chat_target(tmp_path / "source", num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    out = tmp_path / "family"
    command = ["family", str(source), "--size", "smoke", "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    assert set(VERSIONS) | {*FUTURES, "draft", "bundle"} <= {path.name for path in out.iterdir()}
    check_versions(out)
    check_compatibility_gate(out)
    check_records(out)
    check_bundle(out)
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("nothing to do") == len(STAGES)
    # A deleted result is made again.
    (out / "questions.jsonl").unlink()
    assert main([*command, "--stage", "questions", "bundle"]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 1
    questions = [json.loads(line)["messages"] for line in (out / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == SIZES["smoke"].questions
    assert all([message["role"] for message in messages] == ["user"] for messages in questions)


def check_versions(family: Path) -> None:
    """Each version changes the blocks that it may change, and nothing that drafts share."""
    base = load_model(family / "target-v1", "cpu", torch.float32)[0].state_dict()
    changeable = {"target-v2": range(BLOCKS), "target-v3": range(BLOCKS), "target-v4": SIZES["smoke"].tuned_blocks}
    for version, blocks in changeable.items():
        evolved = load_model(family / version, "cpu", torch.float32)[0].state_dict()
        changed = {name for name in base if not torch.equal(base[name], evolved[name])}
        assert {int(name.split(".")[2]) for name in changed} == set(blocks)
        assert all(name.startswith("model.layers.") for name in changed)
        card = (family / version / "README.md").read_text()
        assert card.startswith("---\nlicense: apache-2.0\n") and f"# {version}" in card


def check_compatibility_gate(family: Path) -> None:
    """The gate accepts exactly the versions that kept what a draft shares; the final draft shares nothing."""
    identity = read_description(family / "draft-blocks").shared_identity
    own = read_description(family / "draft").shared_identity
    save_incompatible_version(family / "target-v1", family / "target-v5", "../target-v1")
    for version in (*VERSIONS, "target-v5"):
        target = Target(family / version, device="cpu", dtype=torch.float32)
        assert (target.expected_identity(identity) == identity) == (version != "target-v5")
        assert target.expected_identity(own) == own


def check_records(family: Path) -> None:
    """Training curves of all versions, what each distillation reached, and the evaluation."""
    records = {path.stem: json.loads(path.read_text()) for path in (family / "training").iterdir()}
    assert set(records) == {*VERSIONS[1:], "blocks", "distill", *(f"retrained-{version}" for version in VERSIONS)}
    for version in VERSIONS[1:]:
        assert records[version]["steps"][-1] == SIZES["smoke"].evolve.steps
    for version in VERSIONS:
        assert load_draft(family / "retrained" / version, family / "target-v1").config.num_hidden_layers == 2
    for stage in ("blocks", "distill"):
        assert 0 < records[stage]["text"]["overlap"] <= 1
    evaluation = json.loads((family / "evaluation" / "evaluation.json").read_text())
    assert [*evaluation["texts"]] == ["chats", "everyday", "python", "cpp"]
    rows = {(row["draft"], row["version"]) for row in evaluation["rows"]}
    assert rows == {(draft, version) for draft in ("frozen", "retrained") for version in VERSIONS}
    assert all(row["retention"] for row in evaluation["rows"] if row["draft"] == "frozen")
    assert (family / "evaluation" / "evaluation.png").stat().st_size > 1000


def check_bundle(family: Path) -> None:
    """The bundle has the draft's weights, with a head of 4 bits, and the target's chat template."""
    manifest = read_bundle(family / "bundle").manifest
    assert (manifest.graph.weights, manifest.architecture.layers) == ("int4-fitted", 2)
    assert manifest.shared.identity == read_description(family / "draft").shared_identity
    # Against the draft with the rounded head it would agree everywhere; against the float one it loses a little.
    # Nearly random weights, which rounding to 4 bits changes more than trained ones.
    assert manifest.parity.greedy_agreement > 0.3
