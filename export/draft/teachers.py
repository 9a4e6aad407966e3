"""Teachers of a draft: its target, and siblings that stand in for future versions of the target.

A frozen draft has to serve target versions that do not exist yet. A sibling is the target with a random low-rank change
to every matrix that the draft does not share, as a LoRA for an unknown domain would change it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

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
) -> list[Teacher]:
    """Return `count` perturbed targets; they need almost no memory and leave `target` unchanged.

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
        module
        for name, module in target.named_modules()
        if isinstance(module, nn.Linear)
        and (match := re.match(r"model\.layers\.(\d+)\.", name))
        and int(match[1]) not in shared
    ]
    if count and not changed:
        raise InputError("every block is shared with the draft, so no sibling of the target can differ from it")
    return [PerturbedTarget(target, changed, strength, seed + index) for index in range(count)]


class PerturbedTarget:
    """A target whose matrices are changed during a forward pass: hooks add (x A) B to their outputs."""

    def __init__(self, target: PreTrainedModel, changed: list[nn.Linear], strength: float, seed: int) -> None:
        self._teach = target_teacher(target)
        self._changes: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
        random = torch.Generator().manual_seed(seed)
        for module in changed:
            weight = module.weight
            rank = min(SIBLING_RANK, *weight.shape)
            inner = torch.randn(weight.shape[1], rank, generator=random)
            outer = torch.randn(rank, weight.shape[0], generator=random)
            scale = strength * weight.detach().float().norm().cpu() / (inner @ outer).norm()
            self._changes.append((module, (inner * scale).to(weight), outer.to(weight)))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        # Compiled code ignores the hooks.
        with self._hooks(), torch.compiler.set_stance("force_eager"):
            return self._teach(ids)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, inner, outer in self._changes:

                def add_change(
                    _: nn.Module,
                    inputs: tuple[torch.Tensor],
                    output: torch.Tensor,
                    inner: torch.Tensor = inner,
                    outer: torch.Tensor = outer,
                ) -> torch.Tensor:
                    return output + inputs[0] @ inner @ outer

                stack.callback(module.register_forward_hook(add_change).remove)
            yield
