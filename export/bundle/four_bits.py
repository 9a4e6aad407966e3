"""4-bit matrices that a draft can be trained with: how their values are rounded, for the exporter and for training.

Groups of 64 values along the inputs share a float16 scale and a zero point of 4 bits: 0.54 bytes a weight. A draft that
is trained with the rounded matrices (`round_to_4_bits`) adapts to the rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

# Chosen: divides the hidden size of all common models, and 32 would need 6 % more bytes for the whole bundle.
GROUP_SIZE = 64
LEVELS = 16
# Ranges that are tried for each group, relative to that of its values: a smaller one clips a few values and rounds the
# others more finely.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Weights that are rounded at once: 134 MB in float32, and a few such tensors. On a GPU many small kernels would take
# longer.
WEIGHTS_AT_ONCE = 1 << 25

# Groups (n, GROUP_SIZE) -> levels of the same shape, zero points (n, 1), scales (n, 1).
FitFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FourBitMatrix:
    """A matrix of R rows in B groups of GROUP_SIZE columns. A value is (level - zero point) * scale.

    Attributes:
        levels: uint8 in [0, 15], shape (R, B, GROUP_SIZE).
        zero_points: uint8 in [0, 15], shape (R, B).
        scales: float32, shape (R, B).
        columns: number of columns; the last group may be padded.
    """

    levels: torch.Tensor
    zero_points: torch.Tensor
    scales: torch.Tensor
    columns: int

    def values(self) -> torch.Tensor:
        """Return the float32 values that a graph computes with, shape (R, columns)."""
        offsets = self.levels.float() - self.zero_points.float()[..., None]
        return (offsets * self.scales[..., None]).flatten(1)[:, : self.columns]


def quantize_to_4_bits(weight: torch.Tensor) -> FourBitMatrix:
    """Quantize a matrix (R, columns) with the least squared error among RANGES, group by group."""
    return quantize_all([weight])[0]


def round_to_4_bits(weight: torch.Tensor) -> torch.Tensor:
    """Return the float32 values that a bundle computes with instead of a matrix (R, columns)."""
    return quantize_to_4_bits(weight).values()


def quantize_all(weights: Sequence[torch.Tensor], *, compiled: bool = False) -> list[FourBitMatrix]:
    """Quantize matrices together, which on a GPU takes a fraction of the time of one after the other.

    Args:
        compiled: compile the search for levels and scales, which takes half a minute the first time.
    """
    fit = _compiled_fit() if compiled else _fit_groups
    grouped = [_split_into_groups(weight.detach().float()) for weight in weights]
    groups = torch.cat(grouped) if len(grouped) > 1 else grouped[0]
    fitted = [fit(part) for part in torch.split(groups, WEIGHTS_AT_ONCE // GROUP_SIZE)]
    counts = [len(part) for part in grouped]
    parts = [torch.split(torch.cat(tensors), counts) for tensors in zip(*fitted, strict=True)]
    return [
        FourBitMatrix(
            levels.to(torch.uint8).reshape(len(weight), -1, GROUP_SIZE),
            zero_points.to(torch.uint8).reshape(len(weight), -1),
            round_scales(scales.reshape(len(weight), -1)),
            weight.shape[1],
        )
        for weight, levels, zero_points, scales in zip(weights, *parts, strict=True)
    ]


@functools.cache
def _compiled_fit() -> FitFunction:
    fit: FitFunction = torch.compile(_fit_groups, dynamic=True)
    return fit


def _fit_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return levels, zero points and scales of groups (n, GROUP_SIZE), all as float32."""
    lowest = groups.amin(-1, keepdim=True).clamp_max(0)
    highest = groups.amax(-1, keepdim=True).clamp_min(0)
    best_error = torch.full_like(lowest, torch.inf)
    best_levels, best_zero, best_scale = torch.zeros_like(groups), torch.zeros_like(lowest), torch.ones_like(lowest)
    for share in RANGES:
        scale = ((highest - lowest) * share / (LEVELS - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-lowest * share / scale).round().clamp(0, LEVELS - 1)
        levels = ((groups / scale).round() + zero).clamp(0, LEVELS - 1)
        # The scale with the least squared error for these levels.
        offsets = levels - zero
        fitted = (groups * offsets).sum(-1, keepdim=True) / offsets.square().sum(-1, keepdim=True).clamp_min(1)
        scale = torch.where(fitted > 0, fitted, scale)
        error = (offsets * scale - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_levels = torch.where(better, levels, best_levels)
        best_zero, best_scale = torch.where(better, zero, best_zero), torch.where(better, scale, best_scale)
    return best_levels, best_zero, best_scale


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """Round the scales of a tensor to what is stored: float16 numbers times `scale_unit`. Returns float32."""
    unit = scale_unit(scales)
    return (scales / unit).half().float() * unit


def scale_unit(scales: torch.Tensor) -> torch.Tensor:
    """The power of two that brings the largest scale into [1, 2), so that small weights do not underflow in float16."""
    exponent = torch.frexp(scales.abs().max()).exponent
    return torch.ldexp(torch.ones((), dtype=torch.float32, device=scales.device), exponent - 1)


def _split_into_groups(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix (R, columns) as groups (n, GROUP_SIZE); an incomplete last group of a row is padded with 0."""
    return functional.pad(weight, (0, -weight.shape[1] % GROUP_SIZE)).reshape(-1, GROUP_SIZE)
