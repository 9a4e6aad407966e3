"""Trains later versions of a target without changing the tensors that drafts share: by LoRA, or some blocks in full.

A version of the second kind is stored as its changed tensors (`CHANGED_TENSORS_FILE`) and a reference to its base
(`CHANGES_FILE`). `cloud_verifier.model.target` combines it with the base.
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
from cloud_verifier.registry.delta import CHANGED_TENSORS_FILE, CHANGES_FILE
from cloud_verifier.registry.int8 import pack
from export.draft.base_target import TextSource, next_token_loss
from export.draft.training import TrainingCurve, TrainingSchedule, fit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def evolve(
    base: PreTrainedModel,
    text: TextSource,
    schedule: TrainingSchedule,
    *,
    rank: int,
    frozen_blocks: int,
    checkpoint: Path | None = None,
) -> tuple[PeftModel, TrainingCurve]:
    """Train a LoRA of `base` on `text`. `base` becomes part of the returned model.

    Args:
        base: the target, changed in place.
        text: training text.
        schedule: training schedule.
        rank: rank of the adapter.
        frozen_blocks: number of last blocks that stay unchanged because drafts may share them.
        checkpoint: file to save to periodically and to resume from.
    """
    torch.manual_seed(schedule.seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(PROJECTIONS),
        layers_to_transform=list(range(base.config.num_hidden_layers - frozen_blocks)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    curve = fit(model, next_token_loss(model, text), schedule, label="adapter", checkpoint=checkpoint)
    return model, curve


def tune(
    base: PreTrainedModel,
    text: TextSource,
    schedule: TrainingSchedule,
    blocks: Collection[int],
    *,
    checkpoint: Path | None = None,
) -> TrainingCurve:
    """Train all parameters of `blocks` of `base` in place on `text`; other parameters stay unchanged."""
    torch.manual_seed(schedule.seed)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"model.layers.{block}.") for block in blocks))
    return fit(base, next_token_loss(base, text), schedule, label="blocks", checkpoint=checkpoint)


def save_changes(model: PreTrainedModel, base_directory: Path, directory: Path, base_path: str) -> list[str]:
    """Write the parameters that differ from those in `base_directory`, matrices in 8 bits; return their names.

    Args:
        model: the changed target.
        base_directory: checkpoint of the base target.
        directory: output.
        base_path: path of the base relative to `directory`.
    """
    parameters = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.named_parameters()}
    stored = read_tensors(base_directory, parameters)
    # A base that is stored in float32 is no change, although bfloat16 rounds it.
    changed = {
        name: value for name, value in parameters.items() if not torch.equal(value, stored[name].to(torch.bfloat16))
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(pack(changed), directory / CHANGED_TENSORS_FILE, metadata={"format": "pt"})
    reference = {"format_version": 1, "base": base_path}
    (directory / CHANGES_FILE).write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")
    return sorted(changed)


def save_adapter(model: PeftModel, directory: Path, base_path: str) -> None:
    """Write a regular PEFT directory in bfloat16; `base_path` is the path of the base relative to it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    # The adapter changes no embeddings, and the base is on no hub with which PEFT could compare them.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_path}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
