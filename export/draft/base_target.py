"""The base target of the example family: a small Llama, trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from export.data.token_stream import Mixture, TokenStream
from export.data.tokenizer import END_OF_TEXT_ID, PADDING_ID
from export.draft.training import Curve, LossFunction, Plan, Step, fit

# Anything that gives random windows of tokens.
Text = TokenStream | Mixture


@dataclass(frozen=True)
class Shape:
    """Sizes of a target; lengths in tokens."""

    vocabulary: int
    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    def config(self) -> LlamaConfig:
        """The Hugging Face configuration; embedding and head are tied."""
        return LlamaConfig(
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
    shape: Shape,
    text: Text,
    plan: Plan,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    compiled: bool = False,
) -> tuple[PreTrainedModel, Curve]:
    """A new target, float32 on `device`, trained to predict `text`."""
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(shape.config()).to(device)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=PADDING_ID
    )
    curve = fit(model, next_token_loss(model, text, compiled=compiled), plan, label="target v1", checkpoint=checkpoint)
    return model, curve


def next_token_loss(model: torch.nn.Module, text: Text, *, compiled: bool = False) -> LossFunction:
    """Cross-entropy of the next token, in nats, mean over a batch."""
    # Two batch shapes occur, each worth its own kernels.
    forward: Callable[..., object] = torch.compile(model, dynamic=False) if compiled else model

    def loss(step: Step) -> torch.Tensor:
        ids = text.windows(step.rows, step.length + 1, step.random)
        logits = forward(input_ids=ids[:, :-1], use_cache=False).logits  # (rows, length, vocabulary)
        return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return loss


def load_target(directory: Path, device: torch.device) -> PreTrainedModel:
    """The target at `directory` in float32, ready for evaluation: what it computes is what bfloat16 storage kept."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
