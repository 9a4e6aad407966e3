"""Who a draft learns from: its target, and what the target may yet become.

A frozen draft meets versions of its target that nobody has trained yet. Their stand-ins are siblings: the target with
a random low-rank change to every matrix that drafts do not share, as a LoRA for some unknown domain would make it.
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


def plain(target: PreTrainedModel) -> Teacher:
    """The target itself."""

    def teach(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = target(input_ids=ids, use_cache=False).logits
        return logits

    return teach


def siblings(target: PreTrainedModel, plan: DraftPlan, count: int, strength: float, *, seed: int = 0) -> list[Teacher]:
    """Perturbed targets; they cost no memory to speak of, and leave `target` as it is.

    Args:
        plan: what drafts share with the target, which stays as it is in every sibling.
        strength: size of each change relative to its matrix, by Frobenius norm.

    Raises:
        InputError: the strength is negative, or nothing is left to change.
    """
    if strength < 0:
        raise InputError(f"a sibling's strength is at least 0, not {strength:g}")
    shared = {plan.origins[index] for index in plan.shared_range}
    changed = [
        (name, module)
        for name, module in target.named_modules()
        if isinstance(module, nn.Linear)
        and (place := re.match(r"model\.layers\.(\d+)\.", name))
        and int(place[1]) not in shared
    ]
    if count and not changed:
        raise InputError("every block is shared with the draft, so no sibling of the target can differ from it")
    return [_Sibling(target, changed, strength, seed + index) for index in range(count)]


class _Sibling:
    """Adds (x A) B to what each changed matrix gives, for the time of one forward."""

    def __init__(
        self, target: PreTrainedModel, changed: list[tuple[str, nn.Linear]], strength: float, seed: int
    ) -> None:
        self._teach = plain(target)
        self._changes: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
        random = torch.Generator().manual_seed(seed)
        for _, module in changed:
            weight = module.weight
            rank = min(SIBLING_RANK, *weight.shape)
            inner = torch.randn(weight.shape[1], rank, generator=random)
            outer = torch.randn(rank, weight.shape[0], generator=random)
            scale = strength * weight.detach().float().norm().cpu() / (inner @ outer).norm()
            self._changes.append((module, (inner * scale).to(weight), outer.to(weight)))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with self._changed():
            return self._teach(ids)

    @contextlib.contextmanager
    def _changed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, inner, outer in self._changes:

                def change(
                    _: nn.Module,
                    given: tuple[torch.Tensor],
                    result: torch.Tensor,
                    inner: torch.Tensor = inner,
                    outer: torch.Tensor = outer,
                ) -> torch.Tensor:
                    return result + given[0] @ inner @ outer

                stack.callback(module.register_forward_hook(change).remove)
            yield
