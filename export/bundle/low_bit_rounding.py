"""Quantization-aware training: a model computes with the values that `export.bundle.quantize` will store.

The rounding is the exporter's: to nearest, symmetric, blocks of 32 along the inputs. Gradients pass through the
rounding to the float weights (straight-through estimator), so the model adapts to the rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from export.bundle.head_rounding import round_scales
from export.bundle.quantize import BLOCK_SIZE


@contextmanager
def simulate_quantization(draft: PreTrainedModel, bits: int) -> Iterator[None]:
    """Within the block, `draft` computes with weights of `bits`, head and embedding included, and stays trainable.

    Afterwards it has float weights again. Each trained weight is moved to the value that it rounds to, so that storing
    the weights in 8 bits changes none of the rounded values.
    """
    with ExitStack() as stack:
        # Tied matrices are rounded by both of their modules, identically.
        for module in list(draft.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                stack.callback(_restore_weight, module, bits)
                parametrize.register_parametrization(module, "weight", _RoundedWeight(bits))
        yield


def round_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round `weight` (rows, columns) to the values that will be stored; keeps the dtype."""
    steps, scale = _quantize(weight, bits)
    return _from_blocks(steps * round_scales(scale), weight)


def center_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Move all values of `weight` to what they round to, except the largest of each block, which defines the scale."""
    steps, scale = _quantize(weight, bits)
    blocks = _to_blocks(weight)
    largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
    return _from_blocks(torch.where(largest, blocks, steps * scale), weight)


class _RoundedWeight(nn.Module):
    """Parametrization: the rounded weight in the forward pass, the identity in the backward pass."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (round_weight(weight.detach(), self._bits) - weight).detach()


def _restore_weight(module: nn.Module, bits: int) -> None:
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if weight.requires_grad:
        with torch.no_grad():
            weight.copy_(center_weight(weight, bits))


def _quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (rows, blocks, 32) and scales (rows, blocks, 1), in float64 as onnxruntime computes them."""
    blocks = _to_blocks(weight).double()
    middle = 1 << bits - 1
    # Divided by 2^bits - 1, although the integers range from -middle to middle - 1: this is onnxruntime's formula.
    scale = blocks.abs().amax(-1, keepdim=True) * 2.0 / (2 * middle - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (blocks / scale + middle).round().clamp(0, 2 * middle - 1) - middle, scale


def _to_blocks(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns) as (rows, blocks, 32); the last block is padded with zeros."""
    padding = -weight.shape[1] % BLOCK_SIZE
    return nn.functional.pad(weight, (0, padding)).reshape(len(weight), -1, BLOCK_SIZE)


def _from_blocks(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(1)[:, : weight.shape[1]].to(weight.dtype)
