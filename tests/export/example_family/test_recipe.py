"""The complete recipe at its smallest size, from installed text to an evaluated draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cloud_verifier.draft_models.checkpoint import read_description
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import InputError
from export.cli.family import STAGES, override_steps
from export.cli.main import main
from export.draft.base_target import load_target
from export.example_family.evolution import break_contract, load_evolved
from export.example_family.sizes import SIZES


@pytest.mark.slow
def test_all_stages_at_smoke_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "family",
        "--size",
        "smoke",
        "--corpus",
        str(tmp_path / "corpus"),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["target"]["losses"][-1] < record["target"]["losses"][0]
    assert set(record["distill"]["agreement"]) == {"target-v1", "target-v2", "target-v3", "target-v4"}
    assert record["distill"]["agreement"]["target-v1"]["python"]["overlap"] > 0.9
    assert len(AutoTokenizer.from_pretrained(tmp_path / "target-v1")) == SIZES["smoke"].shape.vocabulary

    base = load_target(tmp_path / "target-v1", torch.device("cpu")).state_dict()
    # Blocks that each version may change; drafts share the last of four blocks, norm, head and embedding.
    changeable = {"target-v2": (0, 1, 2), "target-v3": (0, 1, 2), "target-v4": (1,)}
    for version, blocks in changeable.items():
        evolved = load_evolved(tmp_path / version, tmp_path / "target-v1", torch.device("cpu")).state_dict()
        changed = {name for name in base if not torch.equal(base[name], evolved[name])}
        assert changed
        assert all(name.startswith(tuple(f"model.layers.{block}." for block in blocks)) for name in changed)
    check_compatibility_gate(tmp_path)
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {row["draft"] for row in evaluation["rows"]} == {
        *("anchor", "standalone", "retrained", "equal", "kl", "unwarned", "settled")
    }
    assert (tmp_path / "evaluation" / "evaluation.png").stat().st_size > 1000

    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("nothing to do") == len(STAGES)


def check_compatibility_gate(family: Path) -> None:
    """The compatibility gate accepts exactly the versions that kept the shared tensors."""
    identity = read_description(family / "draft-anchor").shared_identity
    break_contract(family / "target-v1", family / "target-v5", "../target-v1")
    for version in ("target-v1", "target-v2", "target-v3", "target-v4", "target-v5"):
        target = Target(family / version, device="cpu", dtype=torch.float32)
        assert (target.expected_identity(identity) == identity) == (version != "target-v5")


def test_steps_can_be_overridden_by_stage() -> None:
    size = override_steps(SIZES["full"], ["target=7", "distill=9"])
    assert (size.target.steps, size.evolve.steps, size.distill.steps) == (7, 600, 9)
    for wrong in ("target", "target=x", "corpus=3", "evolve=0"):
        with pytest.raises(InputError, match="--steps"):
            override_steps(size, [wrong])


def test_a_missing_corpus_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "family",
        "--size",
        "smoke",
        "--corpus",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--stage",
        "target",
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("draft-export: no token stream at")
