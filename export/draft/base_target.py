"""Helpers of all trainings on a target: the loss of next-token prediction, moving models, and the end of a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel

from cloud_verifier.model.pretrained import generation_end_ids
from export.data.token_stream import MixedStream, TokenStream
from export.draft.training import LossFunction, MicroBatch

TextSource = TokenStream | MixedStream


def next_token_loss(model: torch.nn.Module, text: TextSource, *, compiled: bool = False) -> LossFunction:
    """Return the loss function of next-token prediction: mean cross-entropy over a batch, in nats."""
    # Only two batch shapes occur, so that static shapes pay off.
    forward: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def loss(batch: MicroBatch) -> torch.Tensor:
        ids = text.random_windows(batch.rows, batch.length + 1, batch.random)
        logits = forward(input_ids=ids[:, :-1], use_cache=False).logits  # (rows, length, vocabulary)
        return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return loss


def end_of_text_id(target: PreTrainedModel | Path) -> int:
    """Return the id that separates two texts: the first one that ends a text of `target`, a model or its directory."""
    generation = GenerationConfig.from_pretrained(target) if isinstance(target, Path) else target.generation_config
    return next(iter(generation_end_ids(generation)), 0)


def to_device(model: PreTrainedModel, target: torch.device | torch.dtype) -> PreTrainedModel:
    """Move `model` to a device or convert it to a dtype; `PreTrainedModel.to` is annotated wrongly by transformers."""
    moved: PreTrainedModel = nn.Module.to(model, target)
    return moved
