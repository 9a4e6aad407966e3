"""Teachers of a draft: its target, and siblings that stand in for future versions of the target.

A frozen draft has to serve target versions that do not exist yet. A sibling is the target with a random low-rank change
to every matrix that the draft does not share, as a LoRA for an unknown domain would change it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from cloud_verifier.draft_models.layouts import DraftPlan
from edge_runtime.protocol.errors import InputError

# Token ids (rows, length) -> logits (rows, length, vocabulary).
Teacher = Callable[[torch.Tensor], torch.Tensor]
SIBLING_RANK = 8


def target_teacher(target: PreTrainedModel) -> Teacher:
    """Return the target itself as a teacher."""

    def teach(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = target(input_ids=ids, use_cache=False).logits
        return logits

    return teach


def make_siblings(
    target: PreTrainedModel, plan: DraftPlan, count: int, strength: float, *, seed: int = 0
) -> list[PreTrainedModel]:
    """Return `count` perturbed copies of a target, which have only the changed matrices in memory of their own.

    Args:
        target: the model to perturb.
        plan: layout of the draft; the blocks that it shares are the same in every sibling.
        count: number of siblings.
        strength: Frobenius norm of each change relative to that of its matrix.
        seed: seed of the first sibling; each following one adds 1.

    Raises:
        InputError: the strength is negative, or the draft shares every block.
    """
    if strength < 0:
        raise InputError(f"a sibling's strength is at least 0, not {strength:g}")
    shared = {plan.origins[index] for index in plan.shared_range}
    changed = [
        name
        for name, module in target.named_modules()
        if isinstance(module, nn.Linear)
        and (match := re.match(r"model\.layers\.(\d+)\.", name))
        and int(match[1]) not in shared
    ]
    if count and not changed:
        raise InputError("every block is shared with the draft, so no sibling of the target can differ from it")
    return [_perturb(target, changed, strength, seed + index) for index in range(count)]


def _perturb(target: PreTrainedModel, names: list[str], strength: float, seed: int) -> PreTrainedModel:
    """Return a copy of a target with a random change of rank SIBLING_RANK to each of the named linear modules."""
    changed = {id(target.get_parameter(f"{name}.weight")) for name in names}
    kept = {id(tensor): tensor for tensor in (*target.parameters(), *target.buffers()) if id(tensor) not in changed}
    sibling = copy.deepcopy(target, kept)
    random = torch.Generator().manual_seed(seed)
    for name in names:
        weight = sibling.get_parameter(f"{name}.weight").data
        rank = min(SIBLING_RANK, *weight.shape)
        inner = torch.randn(weight.shape[1], rank, generator=random)
        outer = torch.randn(rank, weight.shape[0], generator=random)
        scale = strength * weight.float().norm().cpu() / (inner @ outer).norm()
        # The target's Linear computes x W^T, the change (x inner) outer.
        weight.copy_((weight.float().cpu() + scale * (inner @ outer).T).to(weight.dtype))
    return sibling
