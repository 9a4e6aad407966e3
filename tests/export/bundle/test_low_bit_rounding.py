"""Weights of few bits: in training they are what the quantiser stores, and 8 bits in a file move none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloud_verifier.draft_models.layouts import build_draft
from cloud_verifier.registry.int8 import pack, unpack
from export.bundle.low_bit_rounding import centred, round_weight, rounded
from export.bundle.quantize import BLOCK_SIZE, to_blocks
from tests.export.conftest import make_target

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def weights(rows: int = 24, columns: int = 80) -> torch.Tensor:
    """Rows of very different sizes, one of them nothing at all; the last block is not full."""
    sizes = torch.logspace(-6, 2, rows)[:, None] * (torch.arange(rows) != 3)[:, None]
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * sizes


def stored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What a bundle's graph multiplies by."""
    blocks = to_blocks(weight.numpy(), bits, False)
    packed = blocks.packed if bits == 8 else np.stack([blocks.packed & 15, blocks.packed >> 4], -1)
    numbers = packed.reshape(len(weight), -1, BLOCK_SIZE).astype(np.float32) - (1 << bits - 1)
    return torch.from_numpy(numbers * blocks.scales[..., None]).flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_learned_with_is_what_the_quantiser_stores(bits: int) -> None:
    torch.testing.assert_close(round_weight(weights(), bits), stored(weights(), bits), rtol=1e-6, atol=0)


def test_in_the_middle_a_weight_is_rounded_to_the_same_value() -> None:
    weight = weights(columns=384)
    before = round_weight(weight, 4)
    (after,) = unpack(pack({"weight": centred(weight, 4)})).values()
    # Not more than a step away: of a block's largest value alone, either neighbour is as near.
    step = weight.unflatten(1, (-1, BLOCK_SIZE)).abs().amax(-1, keepdim=True) / 7.5
    moved = (round_weight(after, 4) - before).unflatten(1, (-1, BLOCK_SIZE)).abs() > 0.5 * step
    assert moved.float().mean() < 1 / BLOCK_SIZE
    (uncentred,) = unpack(pack({"weight": weight})).values()
    assert moved.sum() < ((round_weight(uncentred, 4) - before).unflatten(1, (-1, BLOCK_SIZE)).abs() > 0.5 * step).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_learns_with_rounded_weights_and_gets_its_own_back(tied: bool) -> None:
    target = make_target("llama", tie_word_embeddings=tied)
    draft, _ = build_draft(target, new_blocks=2, shared_blocks=0)
    state = {name: value.clone() for name, value in draft.state_dict().items()}
    plain = draft(input_ids=IDS).logits
    with rounded(draft, 4):
        coarse = draft(input_ids=IDS).logits
        assert torch.equal(draft.lm_head.weight, round_weight(state["lm_head.weight"], 4))
        coarse.square().mean().backward()
        learning = {name for name, parameter in draft.named_parameters() if parameter.grad is not None}
        assert any("down_proj" in name for name in learning)
        assert not any("embed" in name or "lm_head" in name for name in learning)
    assert (coarse - plain).abs().max() > 1e-3
    for name, value in draft.state_dict().items():
        if "proj" in name:
            assert torch.equal(value, centred(state[name], 4))
        else:
            assert torch.equal(value, state[name])
    assert (draft.lm_head.weight is draft.model.embed_tokens.weight) == tied
