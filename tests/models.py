"""Tiny models with random weights, in memory and as ordinary Hugging Face directories, and pickled code for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer

# Depth of `make_target`.
BLOCKS = 5

# ChatML, as SmolLM2 and Qwen write it.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_chat_target(path: Path, template: str | None = CHAT_TEMPLATE, seed: int = 0, **config_changes: Any) -> Path:
    """Save a random chat model: one token per printable ASCII character, and the special tokens of ChatML.

    All that it writes is text that encodes to the same tokens again.
    """
    # How ByteLevel writes the printable characters, space, newline and tab.
    names = [*CHAT_SPECIALS, *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "ĉ"]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = {"vocab_size": len(names), "bos_token_id": 1, "eos_token_id": 2}
    save_target(path, seed=seed, **(ids | config_changes))
    unknown, start, end = CHAT_SPECIALS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, chat_template=template
    ).save_pretrained(path)
    return path


def save_target(path: Path, model_type: str = "llama", seed: int = 0, **config_changes: Any) -> Path:
    """Save a model of `model_type` and its tokenizer.

    The weights are random, with a spread that makes the distributions of tokens peaked.
    """
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
    config = AutoConfig.for_model(model_type, **(settings | config_changes))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>").save_pretrained(path)
    return path


def make_target(model_type: str, seed: int = 0, **config_changes: Any) -> PreTrainedModel:
    """A float32 model with bfloat16-exact values, as if loaded from a stored checkpoint."""
    settings = {
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
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(settings | config_changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors are initialized to ones everywhere; with noise, a mixed-up norm shows.
            parameter.add_(torch.randn_like(parameter) * 0.1).copy_(parameter.to(torch.bfloat16))
    return model.eval()


def make_stored_target(
    directory: Path, model_type: str, seed: int = 0, **config_changes: Any
) -> tuple[PreTrainedModel, Path]:
    """A model of `make_target`, and the subdirectory in which it is saved in bfloat16."""
    target = make_target(model_type, seed, **config_changes)
    path = directory / f"{model_type}-{seed}"
    target.to(torch.bfloat16).save_pretrained(path)
    return target.to(torch.float32), path


class CodeInPickle:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._path),)
