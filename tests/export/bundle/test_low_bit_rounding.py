"""Quantization-aware training: weights round as the exporter rounds them, and storing them in 8 bits is lossless."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloud_verifier.draft_models.layouts import build_draft
from cloud_verifier.registry.int8 import pack, unpack
from export.bundle.low_bit_rounding import center_weight, round_weight, simulate_quantization
from export.bundle.quantize import BLOCK_SIZE, quantize_blocks
from tests.models import make_target

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def weights(rows: int = 24, columns: int = 80) -> torch.Tensor:
    """Rows of very different magnitudes, one of them all zeros; the last block is incomplete."""
    sizes = torch.logspace(-6, 2, rows)[:, None] * (torch.arange(rows) != 3)[:, None]
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * sizes


def stored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight that a bundle's graph multiplies by."""
    blocks = quantize_blocks(weight.numpy(), bits, False)
    packed = blocks.packed if bits == 8 else np.stack([blocks.packed & 15, blocks.packed >> 4], -1)
    numbers = packed.reshape(len(weight), -1, BLOCK_SIZE).astype(np.float32) - (1 << bits - 1)
    return torch.from_numpy(numbers * blocks.scales[..., None]).flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("bits", [4, 8])
def test_training_rounds_as_the_exporter_does(bits: int) -> None:
    torch.testing.assert_close(round_weight(weights(), bits), stored(weights(), bits), rtol=1e-6, atol=0)


def test_a_centered_weight_stored_in_8_bits_rounds_to_the_same_value() -> None:
    weight = weights(columns=384)
    before = round_weight(weight, 4)
    (after,) = unpack(pack({"weight": center_weight(weight, 4)})).values()
    # Only the largest value of a block may move: it is equally near to both neighbors.
    step = weight.unflatten(1, (-1, BLOCK_SIZE)).abs().amax(-1, keepdim=True) / 7.5
    moved = (round_weight(after, 4) - before).unflatten(1, (-1, BLOCK_SIZE)).abs() > 0.5 * step
    assert moved.float().mean() < 1 / BLOCK_SIZE
    (uncentered,) = unpack(pack({"weight": weight})).values()
    assert (
        moved.sum() < ((round_weight(uncentered, 4) - before).unflatten(1, (-1, BLOCK_SIZE)).abs() > 0.5 * step).sum()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_trains_with_rounded_weights_and_gets_float_ones_back(tied: bool) -> None:
    target = make_target("llama", tie_word_embeddings=tied)
    draft, _ = build_draft(target, new_blocks=2, shared_blocks=0)
    state = {name: value.clone() for name, value in draft.state_dict().items()}
    plain = draft(input_ids=IDS).logits
    with simulate_quantization(draft, 4):
        coarse = draft(input_ids=IDS).logits
        assert torch.equal(draft.lm_head.weight, round_weight(state["lm_head.weight"], 4))
        coarse.square().mean().backward()
        learning = {name for name, parameter in draft.named_parameters() if parameter.grad is not None}
        assert any("down_proj" in name for name in learning)
        assert not any("embed" in name or "lm_head" in name for name in learning)
    assert (coarse - plain).abs().max() > 1e-3
    for name, value in draft.state_dict().items():
        if "proj" in name:
            assert torch.equal(value, center_weight(state[name], 4))
        else:
            assert torch.equal(value, state[name])
    assert (draft.lm_head.weight is draft.model.embed_tokens.weight) == tied
