"""Drafts that are read back from their bundles compute what the bundles compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from cloud_verifier.draft_models.checkpoint import load_draft
from edge_runtime.draft import make_runner
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import InputError
from export.bundle.build import BundleConfig, make_bundle
from export.bundle.four_bits import round_to_4_bits
from export.draft.bundle_weights import read_draft
from tests.models import save_target

TOY = Path(__file__).resolve().parents[2] / "toy_family"
TEXT = Path(__file__).read_text()


def ids_of(count: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(0).integers(2, vocabulary, count).tolist()


def test_a_draft_in_8_bits_is_read_back() -> None:
    draft, plan = read_draft(TOY / "bundle", TOY / "target-v1")
    original = load_draft(TOY / "draft-anchor", TOY / "target-v1")
    assert (plan.layout, plan.blocks, plan.shared_blocks) == ("anchor", 2, 0)
    expected = dict(original.named_parameters())
    for name, parameter in draft.named_parameters():
        error = (parameter - expected[name]).abs().max()
        # Shared tensors and norms are exact, matrices within half a step of 8 bits, whose size is rounded.
        exact = not parameter.requires_grad or parameter.ndim == 1
        assert error <= (0 if exact else expected[name].abs().max() * (1 / 254 + 1 / 2048)), name
        assert parameter.requires_grad == expected[name].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "int8-head4", "int4-fitted"])
def test_a_standalone_draft_computes_as_its_bundle(weights: str, tmp_path: Path) -> None:
    target = save_target(tmp_path / "target", hidden_size=64, num_hidden_layers=2)
    make_bundle(BundleConfig(target, target, "fused", weights, TEXT), tmp_path / "bundle", lambda step: None)
    draft, plan = read_draft(tmp_path / "bundle", target)
    assert (plan.layout, plan.blocks) == ("standalone", 2)
    model: Any = draft
    ids = ids_of(48, model.config.vocab_size)
    bundle = read_bundle(tmp_path / "bundle")
    runner = make_runner(ort.InferenceSession(bundle.graph_path), bundle.manifest.architecture)
    expected = np.stack([runner.append([token]).copy() for token in ids])
    with torch.no_grad():
        computed = model(torch.tensor([ids])).logits[0].numpy()
    # The graph rounds activations to 8 bits as well.
    assert np.abs(computed - expected).mean() < (1e-5 if weights == "fp32" else 0.03 * expected.std())
    if weights != "fp32":
        head = model.get_output_embeddings().weight.detach()
        assert torch.allclose(round_to_4_bits(head), head, atol=0.05 * float(head.abs().max()))


def test_a_bundle_without_the_whole_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its graph does not hold the draft's"):
        read_draft(TOY / "bundle", save_target(tmp_path / "other", num_hidden_layers=4))
