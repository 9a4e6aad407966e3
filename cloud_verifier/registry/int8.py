"""Tensors in half of bfloat16's bytes: matrices in 8 bits, as the example family's versions and drafts are stored.

Blocks of 32 values along the input share a scale, so that no value is off by more than 1 part in 250 of the largest of
its block: what a board's int8 weights are, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

BLOCK_SIZE = 32
LARGEST = 127
# What follows the name of a packed matrix in that of its scales.
SCALES = ".scales"


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices (rows, columns) as int8 beside bfloat16 scales (rows, columns / 32); the rest in bfloat16."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] % BLOCK_SIZE:
            packed[name] = tensor.to(torch.bfloat16)
            continue
        blocks = tensor.float().unflatten(1, (-1, BLOCK_SIZE))
        scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).to(torch.bfloat16)
        # A block of nothing has no scale to divide by.
        steps = (blocks / scales.float().clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-LARGEST, LARGEST)
        packed |= {name: steps.to(torch.int8).flatten(1), name + SCALES: scales.squeeze(-1)}
    return packed


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `pack` was given, matrices in float32; tensors that were never packed as they are."""
    unpacked = {name: tensor for name, tensor in tensors.items() if name in names_of(tensors)}
    for name in unpacked:
        if name + SCALES in tensors:
            blocks = tensors[name].float().unflatten(1, (-1, BLOCK_SIZE))
            unpacked[name] = (blocks * tensors[name + SCALES].float()[..., None]).flatten(1)
    return unpacked


def names_of(stored: Iterable[str]) -> set[str]:
    """Names of the tensors themselves among those of a file."""
    return {name for name in stored if not name.endswith(SCALES)}
