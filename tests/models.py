"""Tiny models with random weights, as ordinary Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 300


def byte_tokenizer() -> Tokenizer:
    """One token per byte, `<|endoftext|>` as id 0, and unused ids up to VOCABULARY_SIZE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *alphabet]
    names += [f"<|unused{index}|>" for index in range(VOCABULARY_SIZE - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_target(path: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Saves a model of `model_type` with random weights, sharp enough to have opinions, and its tokenizer."""
    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(model_type, **(settings | changes))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>").save_pretrained(path)
    return path
