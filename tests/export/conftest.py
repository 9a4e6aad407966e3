"""Tiny targets with random weights, one for each architecture that layouts know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCKS = 5


def make_target(model_type: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A float32 target whose values bfloat16 holds exactly, as those of a stored checkpoint would be."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors start as ones everywhere; noise makes a mixed-up norm show.
            parameter.add_(torch.randn_like(parameter) * 0.1).copy_(parameter.to(torch.bfloat16))
    return model.eval()


@pytest.fixture
def save_target(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Makes a target and stores it in bfloat16; gives the float32 model and the directory."""

    def save(model_type: str, seed: int = 0, **settings: object) -> tuple[PreTrainedModel, Path]:
        target = make_target(model_type, seed, **settings)
        directory = tmp_path / f"{model_type}-{seed}"
        target.to(torch.bfloat16).save_pretrained(directory)
        return target.to(torch.float32), directory

    return save
