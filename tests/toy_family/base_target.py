"""The base target of the toy family: a small Llama that is trained from scratch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from export.draft.base_target import TextSource, next_token_loss, to_device
from export.draft.training import TrainingSchedule, fit
from tests.toy_family.tokenizer import END_OF_TEXT_ID, PADDING_ID

# Chosen below the 16 MB that many hosts and proxies allow per file.
SHARD_SIZE = "15MB"


@dataclass(frozen=True)
class TargetShape:
    """Dimensions of a Llama target; `context` is in tokens."""

    vocabulary: int
    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    def config(self) -> LlamaConfig:
        """Return the Hugging Face configuration; embedding and head are tied."""
        return LlamaConfig(  # type: ignore[no-untyped-call]  # transformers annotates no constructor
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.blocks,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=PADDING_ID,
        )


def pretrain(
    shape: TargetShape,
    text: TextSource,
    schedule: TrainingSchedule,
    device: torch.device,
    *,
    compiled: bool,
) -> PreTrainedModel:
    """Train a new target on `text`; return it in float32 on `device`."""
    torch.manual_seed(schedule.seed)
    model = to_device(LlamaForCausalLM(shape.config()), device)  # type: ignore[no-untyped-call]  # as above
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # as above
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=PADDING_ID
    )
    fit(model, next_token_loss(model, text, compiled=compiled), schedule, label="target v1")
    return model


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Save weights as bfloat16 shards, configuration and generation settings; converts `model` to bfloat16.

    The configuration is written so that transformers 4 and 5, and tools that know neither, read the same model:
    release 5 nests the rotary base and renames the dtype.
    """
    module: Any = model  # transformers wraps `to` without its signature.
    module.to(torch.bfloat16).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        # A plain rotary embedding is fully described by its base; any other kind keeps its description.
        if rope.get("rope_type", "default") == "default":
            del config["rope_parameters"]
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
