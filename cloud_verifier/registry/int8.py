"""Tensors in half the bytes of bfloat16: matrices in 8 bits, as versions and drafts of the example family are stored.

Blocks of 32 values along the input dimension share a scale. No value is off by more than 1 part in 250 of the largest
of its block, the precision of a board's int8 weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

BLOCK_SIZE = 32
INT8_MAX = 127
# The scales of a packed matrix are stored under its name with this suffix.
SCALES_SUFFIX = ".scales"


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert matrices (rows, columns) to int8 with bfloat16 scales (rows, columns / 32), and the rest to bfloat16."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] % BLOCK_SIZE:
            packed[name] = tensor.to(torch.bfloat16)
            continue
        blocks = _split_blocks(tensor)
        scales = (blocks.abs().amax(-1, keepdim=True) / INT8_MAX).to(torch.bfloat16)
        # A block of zeros has scale 0, by which nothing can be divided.
        divisors = scales.float().clamp_min(torch.finfo(torch.float32).tiny)
        quantized = (blocks / divisors).round().clamp(-INT8_MAX, INT8_MAX)
        packed |= {name: quantized.to(torch.int8).flatten(1), name + SCALES_SUFFIX: scales.squeeze(-1)}
    return packed


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reverse `pack`: packed matrices in float32; other tensors as they are."""
    unpacked = {name: tensor for name, tensor in tensors.items() if name in tensor_names(tensors)}
    for name in unpacked:
        if name + SCALES_SUFFIX in tensors:
            scales = tensors[name + SCALES_SUFFIX].float()[..., None]
            unpacked[name] = (_split_blocks(tensors[name]) * scales).flatten(1)
    return unpacked


def tensor_names(stored: Iterable[str]) -> set[str]:
    """The names of a file that are of tensors themselves, not of scales."""
    return {name for name in stored if not name.endswith(SCALES_SUFFIX)}


def _split_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> (rows, columns / 32, 32) float32."""
    return matrix.float().reshape(matrix.shape[0], -1, BLOCK_SIZE)
