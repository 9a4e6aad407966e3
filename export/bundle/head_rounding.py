"""The 4-bit form of a tied head and embedding: how its values are rounded, for the exporter and for training.

Blocks of 64 values along the inputs share a float16 scale and a zero point of 4 bits: 0.54 bytes a weight. A draft is
trained with this very head in place of its target's (`round_head`), so that its blocks adapt to the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Chosen: divides the hidden size of all common models, and 32 would need 6 % more bytes for the whole bundle.
HEAD_BLOCK_SIZE = 64
HEAD_LEVELS = 16
# Ranges that are tried for each block, relative to that of its values: a smaller one clips a few values and rounds the
# others more finely.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Weights that are rounded at once: 134 MB in float32, and a few such tensors. On a GPU many small kernels would take
# longer.
WEIGHTS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class QuantizedHead:
    """A head of V rows in B blocks of HEAD_BLOCK_SIZE columns. A value is (level - zero point) * scale.

    Attributes:
        levels: uint8 in [0, 15], shape (V, B, HEAD_BLOCK_SIZE).
        zero_points: uint8 in [0, 15], shape (V, B).
        scales: float32, shape (V, B).
        columns: number of columns; the last block may be padded.
    """

    levels: torch.Tensor
    zero_points: torch.Tensor
    scales: torch.Tensor
    columns: int

    def values(self) -> torch.Tensor:
        """Return the float32 values that a graph computes with, shape (V, columns)."""
        offsets = self.levels.float() - self.zero_points.float()[..., None]
        return (offsets * self.scales[..., None]).flatten(1)[:, : self.columns]


def quantize_head(weight: torch.Tensor) -> QuantizedHead:
    """Quantize a head (V, columns) to 4 bits with the least squared error among RANGES, block by block."""
    rows = weight.detach().float()
    step = max(1, WEIGHTS_AT_ONCE // rows.shape[1])
    parts = [_quantize_rows(rows[start : start + step]) for start in range(0, len(rows), step)]
    levels, zero_points, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedHead(levels, zero_points, round_scales(scales), weight.shape[1])


def round_head(weight: torch.Tensor) -> torch.Tensor:
    """Return the float32 values that a bundle with a 4-bit head computes with, shape (V, columns)."""
    return quantize_head(weight).values()


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """Round the scales of a tensor to what is stored: float16 numbers times `scale_unit`. Returns float32."""
    unit = scale_unit(scales)
    return (scales / unit).half().float() * unit


def scale_unit(scales: torch.Tensor) -> torch.Tensor:
    """The power of two that brings the largest scale into [1, 2), so that small weights do not underflow in float16."""
    exponent = torch.frexp(scales.abs().max()).exponent
    return torch.ldexp(torch.ones((), dtype=torch.float32, device=scales.device), exponent - 1)


def _quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padding = -rows.shape[1] % HEAD_BLOCK_SIZE
    blocks = torch.nn.functional.pad(rows, (0, padding)).reshape(len(rows), -1, HEAD_BLOCK_SIZE)
    lowest = blocks.amin(-1, keepdim=True).clamp_max(0)
    highest = blocks.amax(-1, keepdim=True).clamp_min(0)
    best_error = torch.full_like(lowest, torch.inf)
    best_levels, best_zero, best_scale = torch.zeros_like(blocks), torch.zeros_like(lowest), torch.ones_like(lowest)
    for share in RANGES:
        scale = ((highest - lowest) * share / (HEAD_LEVELS - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-lowest * share / scale).round().clamp(0, HEAD_LEVELS - 1)
        levels = ((blocks / scale).round() + zero).clamp(0, HEAD_LEVELS - 1)
        # The scale with the least squared error for these levels.
        offsets = levels - zero
        fitted = (blocks * offsets).sum(-1, keepdim=True) / offsets.square().sum(-1, keepdim=True).clamp_min(1)
        scale = torch.where(fitted > 0, fitted, scale)
        error = (offsets * scale - blocks).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_levels = torch.where(better, levels, best_levels)
        best_zero, best_scale = torch.where(better, zero, best_zero), torch.where(better, scale, best_scale)
    return best_levels.to(torch.uint8), best_zero.squeeze(-1).to(torch.uint8), best_scale.squeeze(-1)
