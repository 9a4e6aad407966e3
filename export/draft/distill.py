"""Distillation losses, and the training of a draft with them.

The losses compare the next-token distributions of the target, p, and of the draft, q, at every position:

    kl      sum p (log p - log q)
    lk      1 - sum min(p, q), the total variation distance: the share of tokens that an optimal verifier would reject;
            bounded, but its gradient vanishes when q is far from p
    mixed   kl for the first half of training (LK_RAMP_START), then a linear transition to lk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from edge_runtime.protocol.errors import InputError
from export.draft.base_target import TextSource
from export.draft.teachers import Teacher
from export.draft.training import MicroBatch, TrainingCurve, TrainingSchedule, fit
from export.draft.training_group import ALONE, TrainingGroup

Objective = Literal["kl", "lk", "mixed"]
# Training progress at which `mixed` starts to add lk; at the end of training it is lk alone.
LK_RAMP_START = 0.5


def kl_divergence(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) in nats by position; (..., vocabulary) each -> (...)."""
    log_p = target_logits.float().log_softmax(-1)
    log_q = draft_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def overlap(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Return sum min(p, q) by position: the highest acceptance rate of any rule; (..., vocabulary) each -> (...)."""
    return torch.minimum(target_logits.float().softmax(-1), draft_logits.float().softmax(-1)).sum(-1)


def lk_weight(objective: Objective, progress: float) -> float:
    """Return the weight of the lk loss at a training progress in [0, 1].

    Raises:
        InputError: the objective is unknown.
    """
    if objective not in get_args(Objective):
        raise InputError(f"unknown objective {objective!r}: choose one of {', '.join(get_args(Objective))}")
    if objective == "mixed":
        return max(0.0, (progress - LK_RAMP_START) / (1 - LK_RAMP_START))
    return 1.0 if objective == "lk" else 0.0


def distillation_loss(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, objective: Objective, progress: float
) -> torch.Tensor:
    """Return the mean loss over all positions at a training progress in [0, 1]."""
    weight = lk_weight(objective, progress)
    loss = torch.zeros((), device=draft_logits.device)
    if weight < 1:
        loss = loss + (1 - weight) * kl_divergence(target_logits, draft_logits).mean()
    if weight > 0:
        loss = loss + weight * (1 - overlap(target_logits, draft_logits).mean())
    return loss


@dataclass(frozen=True)
class TeacherMix:
    """A teacher, the text that it is distilled on, and its relative share of the rows of every batch."""

    teacher: Teacher
    text: TextSource
    share: float = 1.0


def train_draft(
    mixes: Sequence[TeacherMix],
    draft: PreTrainedModel,
    schedule: TrainingSchedule,
    *,
    objective: Objective = "mixed",
    checkpoint: Path | None = None,
    compiled: bool = False,
    evaluate: Callable[[], float] | None = None,
    rounded: Callable[[], AbstractContextManager[None]] = nullcontext,
    max_seconds: float | None = None,
    group: TrainingGroup = ALONE,
) -> TrainingCurve:
    """Train the parameters of `draft` that require a gradient, in place, to match the teachers on their texts.

    Every batch contains rows of every teacher if it has enough rows, so that the draft also matches plausible future
    versions of its target (see `export.draft.teachers`).

    Args:
        mixes: the teachers and their texts.
        draft: the model to train.
        schedule: length and batches of the training.
        objective: the loss; see the module.
        checkpoint: file to save to periodically and to resume from.
        compiled: compile draft and loss; with a small model the loss alone takes half of the time of a step.
        evaluate, rounded, max_seconds, group: see `export.draft.training.fit`.
    """
    torch.manual_seed(schedule.seed)
    compiled_loss = torch.compile(blended_loss, dynamic=False) if compiled else None
    if compiled:
        compile_blocks(draft)

    def loss(batch: MicroBatch) -> torch.Tensor:
        counts = split_rows(batch.rows, [mix.share for mix in mixes], batch.random)
        texts, target_logits = [], []
        for mix, count in zip(mixes, counts, strict=True):
            if count:
                texts.append(mix.text.random_windows(count, batch.length, batch.random))
                with torch.no_grad():
                    target_logits.append(mix.teacher(texts[-1]))
        draft_logits = draft(input_ids=torch.cat(texts), use_cache=False).logits
        if compiled_loss is None:
            return distillation_loss(torch.cat(target_logits), draft_logits, objective, batch.progress)
        weight = torch.tensor(lk_weight(objective, batch.progress), device=draft_logits.device)
        value: torch.Tensor = compiled_loss(torch.cat(target_logits).flatten(0, 1), draft_logits.flatten(0, 1), weight)
        return value

    return fit(
        draft,
        loss,
        schedule,
        label=f"draft ({objective})",
        checkpoint=checkpoint,
        evaluate=evaluate,
        rounded=rounded,
        max_seconds=max_seconds,
        group=group,
    )


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the transformer blocks of a model in place: seconds, where the whole of a deep model takes minutes."""
    blocks: Any = model.base_model.layers
    for block in blocks:
        block.compile()


def split_rows(rows: int, shares: Sequence[float], random: np.random.Generator) -> list[int]:
    """Divide `rows` by shares into whole numbers whose expectation is exact, also for shares of less than one row."""
    edges = np.cumsum(shares) / np.sum(shares) * rows
    rounded_edges = np.floor(edges + random.random())
    rounded_edges[-1] = rows
    return [int(count) for count in np.diff(rounded_edges, prepend=0)]


def blended_loss(target_logits: torch.Tensor, draft_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return both losses, weighted by a tensor so that one compiled function serves the whole training."""
    lk_loss = 1 - overlap(target_logits, draft_logits).mean()
    return (1 - weight) * kl_divergence(target_logits, draft_logits).mean() + weight * lk_loss
