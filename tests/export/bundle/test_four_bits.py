"""Matrices of 4 bits: closer than rounding to nearest, independent of how many are rounded at once, zeros exact."""

from __future__ import annotations

import pytest
import torch

from export.bundle import four_bits
from export.bundle.four_bits import quantize_all, quantize_to_4_bits, round_scales, round_to_4_bits
from export.bundle.quantize import quantize_blocks


def matrix(rows: int = 200, columns: int = 192) -> torch.Tensor:
    """Rows of different magnitudes with a few outliers, and one row of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) ** 3 * torch.logspace(-3, 0, rows)[:, None]
    weight[7] = 0
    return weight


def test_the_error_is_smaller_than_that_of_rounding_to_nearest_in_smaller_blocks() -> None:
    weight = matrix()
    blocks = quantize_blocks(weight.numpy(), 4, False)
    packed = torch.from_numpy(blocks.packed)
    levels = torch.stack([packed & 15, packed >> 4], -1).flatten(2).float() - 8
    nearest = (levels * torch.from_numpy(blocks.scales)[..., None]).flatten(1)
    assert (round_to_4_bits(weight) - weight).square().sum() < 0.9 * (nearest - weight).square().sum()
    assert not round_to_4_bits(weight)[7].any()


def test_the_values_are_levels_and_scales_that_a_bundle_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(columns=100)
    stored = quantize_to_4_bits(weight)
    assert torch.equal(round_scales(stored.scales), stored.scales)
    assert stored.levels.max() <= 15 and stored.zero_points.max() <= 15
    monkeypatch.setattr(four_bits, "WEIGHTS_AT_ONCE", 6400)
    assert torch.equal(round_to_4_bits(weight), stored.values())
    assert round_to_4_bits(weight.bfloat16()).shape == weight.shape


def test_matrices_quantized_together_are_those_quantized_alone() -> None:
    weights = [matrix(), matrix(64, 100)]
    for together, weight in zip(quantize_all(weights), weights, strict=True):
        assert torch.equal(together.values(), round_to_4_bits(weight))
