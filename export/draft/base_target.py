"""The base target of the example family: a small Llama that is trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from export.data.token_stream import MixedStream, TokenStream
from export.data.tokenizer import END_OF_TEXT_ID, PADDING_ID
from export.draft.training import LossFunction, MicroBatch, TrainingCurve, TrainingSchedule, fit

TextSource = TokenStream | MixedStream


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
    checkpoint: Path | None = None,
    compiled: bool = False,
) -> tuple[PreTrainedModel, TrainingCurve]:
    """Train a new target on `text`; return it in float32 on `device`, with its training curve."""
    torch.manual_seed(schedule.seed)
    model = to_device(LlamaForCausalLM(shape.config()), device)  # type: ignore[no-untyped-call]  # as above
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # as above
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=PADDING_ID
    )
    curve = fit(
        model, next_token_loss(model, text, compiled=compiled), schedule, label="target v1", checkpoint=checkpoint
    )
    return model, curve


def next_token_loss(model: torch.nn.Module, text: TextSource, *, compiled: bool = False) -> LossFunction:
    """Return the loss function of next-token prediction: mean cross-entropy over a batch, in nats."""
    # Only two batch shapes occur, so that static shapes pay off.
    forward: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def loss(batch: MicroBatch) -> torch.Tensor:
        ids = text.random_windows(batch.rows, batch.length + 1, batch.random)
        logits = forward(input_ids=ids[:, :-1], use_cache=False).logits  # (rows, length, vocabulary)
        return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return loss


def load_target(directory: Path, device: torch.device) -> PreTrainedModel:
    """Load the target in `directory` in float32 on `device`, in eval mode; the values are the stored bfloat16 ones."""
    return for_inference(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), device)


def for_inference(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move `model` to `device` and switch it to eval mode."""
    nn.Module.eval(model)
    return to_device(model, device)


def to_device(model: PreTrainedModel, target: torch.device | torch.dtype) -> PreTrainedModel:
    """Move `model` to a device or convert it to a dtype; `PreTrainedModel.to` is annotated wrongly by transformers."""
    moved: PreTrainedModel = nn.Module.to(model, target)
    return moved
