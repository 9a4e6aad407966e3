"""The whole recipe at its smallest, from text on this machine to a measured draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from edge_runtime.contract.errors import InputError
from export.evolution import load_evolved
from export.recipe import STAGES, main, with_steps
from export.sizes import SIZES
from export.target import load_target


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "smoke", "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["target"]["losses"][-1] < record["target"]["losses"][0]
    assert set(record["distill"]["agreement"]) == {"target-v1", "target-v2"}
    assert record["distill"]["agreement"]["target-v1"]["python"]["overlap"] > 0.9
    assert len(AutoTokenizer.from_pretrained(tmp_path / "target-v1")) == SIZES["smoke"].shape.vocabulary

    base = load_target(tmp_path / "target-v1", torch.device("cpu")).state_dict()
    evolved = load_evolved(tmp_path / "target-v2", tmp_path / "target-v1", torch.device("cpu")).state_dict()
    changed = {name for name in base if not torch.equal(base[name], evolved[name])}
    assert changed
    # What drafts share: the last of four blocks, norm, head and embedding.
    assert all(name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.2.")) for name in changed)

    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("nothing to do") == len(STAGES)


def test_steps_can_be_set_by_stage() -> None:
    size = with_steps(SIZES["full"], ["target=7", "distill=9"])
    assert (size.target.steps, size.evolve.steps, size.distill.steps) == (7, 600, 9)
    for wrong in ("target", "target=x", "corpus=3", "evolve=0"):
        with pytest.raises(InputError, match="--steps"):
            with_steps(size, [wrong])


def test_a_missing_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "smoke", "--corpus", str(tmp_path), "--out", str(tmp_path / "out"), "--stage", "target"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: no token stream at")
