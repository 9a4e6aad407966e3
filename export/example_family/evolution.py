"""A target's next versions, which leave alone what drafts share: by LoRA, or by training some blocks in full.

A version of the second kind is stored as the tensors that changed (`CHANGED_TENSORS_FILE`), beside a note of its base (`CHANGES_FILE`);
`cloud_verifier.model.target` puts the two together.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cloud_verifier.draft_models.safetensors_io import read_tensors
from cloud_verifier.registry.delta import CHANGED_TENSORS_FILE, CHANGES_FILE, apply_changes
from cloud_verifier.registry.int8 import pack
from export.draft.base_target import TextSource, load_target, next_token_loss
from export.draft.training import TrainingCurve, TrainingSchedule, fit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def evolve(
    base: PreTrainedModel,
    text: TextSource,
    plan: TrainingSchedule,
    *,
    rank: int,
    frozen_blocks: int,
    checkpoint: Path | None = None,
) -> tuple[PeftModel, TrainingCurve]:
    """Adapts `base` to `text`; it becomes part of the returned model.

    Args:
        rank: of the adapter.
        frozen_blocks: how many of the last blocks stay as they are, because drafts contain them.
    """
    torch.manual_seed(plan.seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(PROJECTIONS),
        layers_to_transform=list(range(base.config.num_hidden_layers - frozen_blocks)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    curve = fit(model, next_token_loss(model, text), plan, label="adapter", checkpoint=checkpoint)
    return model, curve


def tune(
    base: PreTrainedModel,
    text: TextSource,
    plan: TrainingSchedule,
    blocks: Collection[int],
    *,
    checkpoint: Path | None = None,
) -> TrainingCurve:
    """Trains `blocks` of `base` in full, in place, on `text`; everything else stays as it is."""
    torch.manual_seed(plan.seed)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"model.layers.{block}.") for block in blocks))
    return fit(base, next_token_loss(base, text), plan, label="some blocks", checkpoint=checkpoint)


def save_changes(model: PreTrainedModel, base_directory: Path, directory: Path, base_path: str) -> list[str]:
    """Writes the parameters that are no longer those of `base_directory`, matrices in 8 bits; returns their names.

    Args:
        base_path: how the result finds its base, relative to itself.
    """
    parameters = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.named_parameters()}
    stored = read_tensors(base_directory, parameters)
    changed = {name: value for name, value in parameters.items() if not torch.equal(value, stored[name])}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(pack(changed), directory / CHANGED_TENSORS_FILE, metadata={"format": "pt"})
    note = {"format_version": 1, "base": base_path}
    (directory / CHANGES_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return sorted(changed)


def break_contract(base_directory: Path, directory: Path, base_path: str) -> None:
    """Writes a version outside of the contract, for tests: its final norm, which drafts share, is another."""
    (norm,) = read_tensors(base_directory, ["model.norm.weight"]).values()
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"model.norm.weight": norm * 1.25}, directory / CHANGED_TENSORS_FILE, metadata={"format": "pt"})
    (directory / CHANGES_FILE).write_text(json.dumps({"format_version": 1, "base": base_path}) + "\n", encoding="utf-8")


def save_adapter(model: PeftModel, directory: Path, base_path: str) -> None:
    """Writes an ordinary adapter directory in bfloat16; `base_path` is how it finds its base, relative to itself."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    # The base has no place on a hub to compare embeddings with, and the adapter has none.
    model.save_pretrained(directory, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_path}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_evolved(directory: Path, base_directory: Path, device: torch.device) -> PreTrainedModel:
    """The base with the adapter merged into it, or with the tensors that changed; float32."""
    base = load_target(base_directory, device)
    if (directory / CHANGES_FILE).is_file():
        apply_changes(base, directory)
        return base
    merged: PreTrainedModel = PeftModel.from_pretrained(base, directory).float().merge_and_unload()
    return merged.eval()
