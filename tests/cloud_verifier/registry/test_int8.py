"""Half the bytes, and no value far off."""

from __future__ import annotations

import torch

from cloud_verifier.registry.int8 import BLOCK_SIZE, SCALES, names_of, pack, unpack


def test_eight_bits_are_close_and_the_rest_is_bfloat16() -> None:
    # Rows of very different sizes, one of them nothing at all.
    sizes = torch.logspace(-6, 2, 24)[:, None] * (torch.arange(24) != 3)[:, None]
    matrix = torch.randn(24, 384, generator=torch.Generator().manual_seed(0)) * sizes
    tensors = {"matrix": matrix, "narrow": torch.ones(3, 5), "vector": torch.arange(7.0)}
    packed = pack(tensors)
    assert packed["matrix"].dtype == torch.int8
    assert packed["matrix" + SCALES].shape == (24, 12)
    assert names_of(packed) == tensors.keys()
    again = unpack(packed)
    largest = matrix.unflatten(1, (-1, BLOCK_SIZE)).abs().amax(-1, keepdim=True)
    error = (again["matrix"] - matrix).unflatten(1, (-1, BLOCK_SIZE)).abs()
    assert (error <= largest / 250).all()
    assert torch.equal(again["matrix"][3], torch.zeros(384))
    for name in ("narrow", "vector"):
        assert again[name].dtype == torch.bfloat16
        assert torch.equal(again[name].float(), tensors[name])
    assert unpack(tensors) == tensors
