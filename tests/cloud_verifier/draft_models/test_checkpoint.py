"""A draft directory holds only the draft's own tensors and loads with its own target only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cloud_verifier.draft_models.checkpoint import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    load_draft,
    read_description,
    save_draft,
)
from cloud_verifier.draft_models.layouts import LAYOUTS, SUPPORTED_MODEL_TYPES, build_draft, parameter_names
from edge_runtime.protocol.bundle import draft_identity, fingerprint_tensor, shared_tensor_names
from edge_runtime.protocol.errors import DraftError, TargetError

SaveTarget = Callable[..., tuple[PreTrainedModel, Path]]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def saved(save_target: SaveTarget, tmp_path: Path) -> tuple[Path, Path]:
    """The directories of an anchor draft and of its target."""
    target, directory = save_target("llama")
    draft, plan = build_draft(target)
    save_draft(draft, plan, directory, tmp_path / "draft")
    return tmp_path / "draft", directory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_round_trip(save_target: SaveTarget, tmp_path: Path, model_type: str, layout: str) -> None:
    target, directory = save_target(model_type)
    draft, plan = build_draft(target, layout)
    save_draft(draft, plan, directory, tmp_path / "draft")
    loaded = load_draft(tmp_path / "draft", directory)
    assert torch.equal(loaded(input_ids=IDS).logits, draft(input_ids=IDS).logits)
    stored = load_file(tmp_path / "draft" / WEIGHTS_FILE)
    shared = plan.shared_tensors(parameter_names(target))
    assert not stored.keys() & shared.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == shared.keys()


def test_the_stored_identity_equals_that_of_the_protocol(saved: tuple[Path, Path]) -> None:
    draft, target = saved
    tensors = load_file(target / "model.safetensors")
    fingerprints = {
        name: fingerprint_tensor(tensors[name].float().numpy())
        for name in shared_tensor_names("anchor", 1, 5, list(tensors))
    }
    assert read_description(draft).shared_identity == draft_identity("anchor", 1, fingerprints)


def test_a_target_with_other_shared_tensors_is_refused(saved: tuple[Path, Path], save_target: SaveTarget) -> None:
    _, other = save_target("llama", seed=1)
    with pytest.raises(DraftError, match="trained with shared tensors anchor/1/"):
        load_draft(saved[0], other)


def test_another_architecture_is_refused(saved: tuple[Path, Path], save_target: SaveTarget) -> None:
    _, other = save_target("qwen3")
    with pytest.raises(DraftError, match="is a qwen3 of 5"):
        load_draft(saved[0], other)


def test_a_target_whose_other_tensors_changed_still_fits(saved: tuple[Path, Path]) -> None:
    draft, target = saved
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    load_draft(draft, target)


def test_a_draft_with_a_changed_shared_tensor_is_not_saved(save_target: SaveTarget, tmp_path: Path) -> None:
    target, directory = save_target("llama")
    draft, plan = build_draft(target)
    with torch.no_grad():
        draft.get_parameter("model.norm.weight").add_(1)
    with pytest.raises(DraftError, match=r"model\.norm\.weight is shared"):
        save_draft(draft, plan, directory, tmp_path / "draft")


@pytest.mark.parametrize("fault", ["lacks", "does not know", "has another shape for"])
def test_an_error_names_the_tensor_that_does_not_fit(saved: tuple[Path, Path], fault: str) -> None:
    draft, target = saved
    tensors = load_file(draft / WEIGHTS_FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if fault != "lacks":
        tensors[name] = weight
        tensors |= {name: weight[1:].clone()} if "shape" in fault else {"model.layers.9.mlp": weight.clone()}
    save_file(tensors, draft / WEIGHTS_FILE)
    with pytest.raises(DraftError, match=f"it {fault} model"):
        load_draft(draft, target)


def test_missing_and_damaged_files_raise_different_errors(saved: tuple[Path, Path], tmp_path: Path) -> None:
    draft, target = saved
    with pytest.raises(TargetError, match="has no safetensors weights"):
        (target / "model.safetensors").rename(target / "elsewhere")
        load_draft(draft, target)
    with pytest.raises(DraftError, match="no draft in"):
        load_draft(tmp_path, target)
    description = json.loads((draft / DESCRIPTION_FILE).read_text())
    (draft / DESCRIPTION_FILE).write_text(json.dumps(description | {"format_version": 9}))
    with pytest.raises(DraftError, match="format 9"):
        load_draft(draft, target)
    (draft / DESCRIPTION_FILE).write_text("{}")
    with pytest.raises(DraftError, match="does not describe a draft"):
        load_draft(draft, target)


def test_a_packed_draft_is_half_as_large_and_nearly_equal(save_target: SaveTarget, tmp_path: Path) -> None:
    target, directory = save_target("llama", hidden_size=64, intermediate_size=96)
    draft, plan = build_draft(target, new_blocks=3, shared_blocks=0)
    for name, packed in (("whole", False), ("packed", True)):
        save_draft(draft, plan, directory, tmp_path / name, packed=packed)
    whole, small = (load_draft(tmp_path / name, directory) for name in ("whole", "packed"))
    assert (tmp_path / "packed" / WEIGHTS_FILE).stat().st_size < 0.6 * (
        tmp_path / "whole" / WEIGHTS_FILE
    ).stat().st_size
    logits, others = whole(input_ids=IDS).logits, small(input_ids=IDS).logits
    assert 0 < (logits - others).abs().max() < 0.05 * logits.abs().max()
