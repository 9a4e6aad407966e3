"""Packing of matrices into 8 bits: size and accuracy."""

from __future__ import annotations

import torch

from cloud_verifier.registry.int8 import BLOCK_SIZE, SCALES_SUFFIX, pack, tensor_names, unpack


def test_matrices_are_close_in_8_bits_and_the_rest_is_bfloat16() -> None:
    # Rows of very different magnitudes, one of them zero.
    magnitudes = torch.logspace(-6, 2, 24)[:, None] * (torch.arange(24) != 3)[:, None]
    matrix = torch.randn(24, 384, generator=torch.Generator().manual_seed(0)) * magnitudes
    tensors = {"matrix": matrix, "narrow": torch.ones(3, 5), "vector": torch.arange(7.0)}
    packed = pack(tensors)
    assert packed["matrix"].dtype == torch.int8
    assert packed["matrix" + SCALES_SUFFIX].shape == (24, 12)
    assert tensor_names(packed) == tensors.keys()
    unpacked = unpack(packed)
    largest = matrix.unflatten(1, (-1, BLOCK_SIZE)).abs().amax(-1, keepdim=True)
    error = (unpacked["matrix"] - matrix).unflatten(1, (-1, BLOCK_SIZE)).abs()
    assert (error <= largest / 250).all()
    assert torch.equal(unpacked["matrix"][3], torch.zeros(384))
    for name in ("narrow", "vector"):
        assert unpacked[name].dtype == torch.bfloat16
        assert torch.equal(unpacked[name].float(), tensors[name])
    assert unpack(tensors) == tensors
