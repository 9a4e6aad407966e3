"""Weights of few bits while they are still being taught: what a board will hold, as torch sees it.

`rounded` lets a model learn with the very values that `quantize` will store (to nearest, symmetric, blocks of
32 along the input), so that it comes to terms with them: gradients pass to the weights behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from export.bundle.quantize import BLOCK_SIZE


@contextmanager
def rounded(draft: PreTrainedModel, bits: int) -> Iterator[None]:
    """Within it, `draft` computes with weights of `bits`, head and embedding included; matrices that learn, learn.

    Behind it they are back, each moved to the middle of what rounds to the same value: storing them in 8 bits then
    rounds none of them elsewhere.
    """
    with ExitStack() as stack:
        for module in list(draft.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                stack.callback(_put_back, module, bits)
                parametrize.register_parametrization(module, "weight", _Rounded(bits))
        # Tied matrices are rounded by either user, alike.
        yield


def round_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The values that `weight` (rows, columns) has once stored, in its type."""
    steps, scale = _steps(weight, bits)
    return _unblocked(steps * scale, weight)


def centred(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` with all values moved to what they are rounded to, but for the largest of each block, the measure."""
    steps, scale = _steps(weight, bits)
    blocks = _blocked(weight)
    largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
    return _unblocked(torch.where(largest, blocks, steps * scale), weight)


class _Rounded(nn.Module):
    """What a weight looks like from outside: rounded; its gradient goes to the weight as if it were not."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (round_weight(weight.detach(), self._bits) - weight).detach()


def _put_back(module: nn.Module, bits: int) -> None:
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if weight.requires_grad:
        with torch.no_grad():
            weight.copy_(centred(weight, bits))


def _steps(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (rows, blocks, 32) and scales (rows, blocks, 1), in onnxruntime's own float64 arithmetic."""
    blocks = _blocked(weight).double()
    middle = 1 << bits - 1
    # Divided by 2 ^ bits - 1, although the numbers go from -middle to middle - 1: so does onnxruntime.
    scale = blocks.abs().amax(-1, keepdim=True) * 2.0 / (2 * middle - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (blocks / scale + middle).round().clamp(0, 2 * middle - 1) - middle, scale


def _blocked(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns) as (rows, blocks, 32), the last block filled with zeros."""
    missing = -weight.shape[1] % BLOCK_SIZE
    return nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, BLOCK_SIZE))


def _unblocked(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(1)[:, : weight.shape[1]].to(weight.dtype)
