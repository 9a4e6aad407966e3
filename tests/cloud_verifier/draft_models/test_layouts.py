"""Draft layouts: which tensors a draft shares with its target, and that those stay equal."""

from __future__ import annotations

import pytest
import torch

from cloud_verifier.draft_models.layouts import (
    LAYOUTS,
    SUPPORTED_MODEL_TYPES,
    DraftPlan,
    add_blocks,
    build_draft,
    parameter_names,
    plan_draft,
)
from edge_runtime.protocol.errors import InputError
from tests.models import BLOCKS, make_target

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_shared_tensors_equal_the_targets_and_are_frozen(model_type: str, layout: str) -> None:
    target = make_target(model_type)
    draft, plan = build_draft(target, layout)
    shared = plan.shared_tensors(parameter_names(target))
    source, own = target.state_dict(), draft.state_dict()
    for draft_name, target_name in shared.items():
        assert torch.equal(own[draft_name], source[target_name]), draft_name
    for name, parameter in draft.named_parameters():
        assert parameter.requires_grad == (name not in shared), name
    assert bool(shared) == LAYOUTS[layout].shares
    logits = draft(input_ids=IDS).logits
    assert logits.shape == (*IDS.shape, 64)
    assert logits.isfinite().all()


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_a_draft_with_all_blocks_equals_the_target(model_type: str) -> None:
    target = make_target(model_type)
    for layout in ("anchor", "prefix"):
        draft, _ = build_draft(target, layout, new_blocks=BLOCKS - 2, shared_blocks=2)
        assert torch.equal(draft(input_ids=IDS).logits, target(input_ids=IDS).logits)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_training_changes_no_shared_tensor(model_type: str) -> None:
    target = make_target(model_type)
    draft, plan = build_draft(target)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    optimizer = torch.optim.AdamW([value for value in draft.parameters() if value.requires_grad], lr=0.1)
    draft(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    shared = plan.shared_tensors(target.state_dict())
    changed = {name for name, tensor in draft.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not changed & shared.keys()


def test_an_untied_head_is_shared_by_anchor_and_not_by_prefix() -> None:
    target = make_target("llama", tie_word_embeddings=False)
    for layout, shared in (("anchor", True), ("prefix", False)):
        draft, plan = build_draft(target, layout)
        assert ("lm_head.weight" in plan.shared_tensors(parameter_names(target))) == shared
        assert dict(draft.named_parameters())["lm_head.weight"].requires_grad != shared


@pytest.mark.parametrize(
    ("plan", "origins", "shared"),
    [
        (DraftPlan("anchor", 2, 1, 8), (0, 6, 7), [2]),
        (DraftPlan("anchor", 3, 2, 8), (0, 2, 5, 6, 7), [3, 4]),
        (DraftPlan("anchor", 1, 1, 2), (0, 1), [1]),
        (DraftPlan("anchor", 3, 0, 8), (0, 4, 7), []),
        (DraftPlan("prefix", 2, 1, 8), (0, 1, 7), [0]),
        (DraftPlan("standalone", 3, 0, 8), (0, 4, 7), []),
    ],
)
def test_origins_of_blocks(plan: DraftPlan, origins: tuple[int, ...], shared: list[int]) -> None:
    assert plan.origins == origins
    assert list(plan.shared_range) == shared


def test_shared_tensors_are_renumbered() -> None:
    names = ["model.embed_tokens.weight", "model.layers.7.mlp.up_proj.weight", "model.layers.6.mlp.up_proj.weight"]
    assert DraftPlan("anchor", 2, 1, 8).shared_tensors(names) == {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight": "model.layers.7.mlp.up_proj.weight",
    }


def test_an_anchor_without_shared_blocks_shares_norm_head_and_embedding() -> None:
    names = ["model.embed_tokens.weight", "model.layers.7.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert set(DraftPlan("anchor", 3, 0, 8).shared_tensors(names)) == set(names) - {"model.layers.7.mlp.up_proj.weight"}


def test_layer_types_follow_the_blocks() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    target = make_target("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=16)
    draft, plan = build_draft(target)
    assert draft.config.layer_types == [kinds[origin] for origin in plan.origins]


@pytest.mark.parametrize(
    ("layout", "blocks", "message"),
    [
        ("sideways", (2, 1), "choose one of anchor"),
        ("anchor", (0, 1), "at least one new block"),
        ("anchor", (2, BLOCKS), "shares 0 to 4"),
        ("prefix", (2, 0), "shares 1 to 4"),
    ],
)
def test_impossible_plans_are_refused(layout: str, blocks: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_draft(make_target("llama").config, layout, new_blocks=blocks[0], shared_blocks=blocks[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_added_blocks_leave_the_draft_the_same_function(model_type: str, layout: str) -> None:
    target = make_target(model_type)
    shared = 0 if layout == "standalone" else 1
    draft, plan = build_draft(target, layout, new_blocks=2, shared_blocks=shared)
    with torch.no_grad():
        before = draft(input_ids=IDS).logits
        larger = add_blocks(draft, plan, 2)
        assert (larger.new_blocks, larger.shared_blocks) == (4, shared)
        assert len(draft.model.layers) == draft.config.num_hidden_layers == larger.blocks
        assert torch.equal(draft(input_ids=IDS, use_cache=False).logits, before)
        # With a cache, too: every block has a place of its own in it.
        assert torch.allclose(draft(input_ids=IDS, use_cache=True).logits, before)
    names = {name for name, _ in draft.named_parameters()}
    frozen = {name for name, parameter in draft.named_parameters() if not parameter.requires_grad}
    assert frozen == names & set(larger.shared_tensors(parameter_names(target)))
    draft(input_ids=IDS, labels=IDS).loss.backward()
    added = draft.model.layers[larger.shared_range.start - 1 if layout == "anchor" else -1]
    assert added.mlp.down_proj.weight.grad.abs().max() > 0


def test_unknown_architectures_are_refused() -> None:
    config = make_target("llama").config
    config.model_type = "mamba"
    with pytest.raises(InputError, match="'mamba'"):
        plan_draft(config)
