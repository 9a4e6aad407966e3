"""A target's next version: a LoRA adapter for a new domain that leaves alone what the draft shares."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from export.target import Text, load_target, next_token_loss
from export.training import Curve, Plan, fit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def evolve(
    base: PreTrainedModel,
    text: Text,
    plan: Plan,
    *,
    rank: int,
    frozen_blocks: int,
    checkpoint: Path | None = None,
) -> tuple[PeftModel, Curve]:
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
    curve = fit(model, next_token_loss(model, text), plan, label="target v2", checkpoint=checkpoint)
    return model, curve


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
    """The base with the adapter merged into it, float32."""
    base = load_target(base_directory, device)
    merged: PreTrainedModel = PeftModel.from_pretrained(base, directory).float().merge_and_unload()
    return merged.eval()
