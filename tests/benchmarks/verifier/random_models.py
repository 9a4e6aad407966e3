"""Models of real shapes with random weights, and the engine with one."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.model.target import Target, make_runner
from edge_runtime.common.http_server import SWITCH_SECONDS
from edge_runtime.common.memory import freeze_objects
from tests.benchmarks.verifier.measuring import DEVICE

SHAPES: dict[str, dict[str, int]] = {
    # For a look at whether a benchmark runs, on any machine.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
# Longest text of the models with random weights.
MAX_CONTEXT = 20480


def make_random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Make a Llama of a real shape with random weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=MAX_CONTEXT, tie_word_embeddings=False)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.nn.init.normal_ = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            with torch.no_grad():
                for weights in model.parameters():
                    weights.copy_(torch.empty_like(weights).uniform_(-0.03, 0.03) if weights.ndim > 1 else 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


class RandomTarget(Target):
    """A target with random weights of a real shape, which has no checkpoint and no tokenizer."""

    def __init__(self, shape: str, *, compiled: bool) -> None:
        model = make_random_model(shape, DEVICE)
        self.runner = make_runner(model, MAX_CONTEXT, compiled=compiled)
        self.name, self.version, self.vocabulary = shape, f"{shape}@random", ""
        self.context, self.vocabulary_size, self.end_ids = MAX_CONTEXT, model.config.vocab_size, frozenset()
        self.dtype, self.device = torch.bfloat16, torch.device(DEVICE)
        self.adapter_slot, self.general_tier_reason = 0, ""
        self._adapter_weights, self._rope = None, self.runner.rope


async def start_engine(engine: Scheduler) -> None:
    """Start an engine, and wait until its target is ready."""
    engine.start()
    while engine.target is None:
        if engine.failure:
            raise engine.failure
        await asyncio.sleep(0.01)
    # As `cloud-verifier serve` does.
    freeze_objects()
    sys.setswitchinterval(SWITCH_SECONDS)
