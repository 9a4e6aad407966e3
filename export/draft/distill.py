"""Teaching a draft what its target would say.

The losses compare two distributions over the next token, the target's p and the draft's q, at every position:

    kl      sum p (log p - log q): every token that the target might say counts
    lk      1 - sum min(p, q): the share of tokens that a verifier would reject; bounded, but flat where q is far off
    mixed   kl first, then more and more lk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from edge_runtime.protocol.errors import InputError
from export.draft.base_target import Text
from export.draft.teachers import Teacher
from export.draft.training import Curve, Plan, Step, fit

Objective = Literal["kl", "lk", "mixed"]
# Where `mixed` starts to leave kl; at the end of training it is all lk.
MIXED_FROM = 0.5


def kl_divergence(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats by position; (..., vocabulary) each -> (...)."""
    log_p = target_logits.float().log_softmax(-1)
    log_q = draft_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def overlap(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """sum min(p, q) by position, in [0, 1]: the best acceptance that any rule can reach; (..., vocabulary) -> (...)."""
    return torch.minimum(target_logits.float().softmax(-1), draft_logits.float().softmax(-1)).sum(-1)


def lk_weight(objective: Objective, done: float) -> float:
    """Share of the lk loss when `done` of the training, in [0, 1], is over.

    Raises:
        InputError: no such objective.
    """
    if objective not in get_args(Objective):
        raise InputError(f"no objective {objective!r}: choose one of {', '.join(get_args(Objective))}")
    if objective == "mixed":
        return max(0.0, (done - MIXED_FROM) / (1 - MIXED_FROM))
    return 1.0 if objective == "lk" else 0.0


def distillation_loss(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, objective: Objective, done: float
) -> torch.Tensor:
    """The objective, mean over all positions, `done` of the way through training."""
    weight = lk_weight(objective, done)
    loss = torch.zeros((), device=draft_logits.device)
    if weight < 1:
        loss = loss + (1 - weight) * kl_divergence(target_logits, draft_logits).mean()
    if weight > 0:
        loss = loss + weight * (1 - overlap(target_logits, draft_logits).mean())
    return loss


@dataclass(frozen=True)
class Lesson:
    """Who teaches, on what, and how much of every batch."""

    teacher: Teacher
    text: Text
    share: float = 1.0


def distil(
    lessons: Sequence[Lesson],
    draft: PreTrainedModel,
    plan: Plan,
    *,
    objective: Objective = "mixed",
    checkpoint: Path | None = None,
    compiled: bool = False,
) -> Curve:
    """Trains the unfrozen parameters of `draft`, in place, to say what the teachers of `lessons` say on their texts.

    Every batch has some of every lesson, if it has rows for all: a draft that is to outlive its target is not taught
    one target's habits alone (see `export.draft.teachers`).

    Args:
        compiled: the loss becomes one kernel; it is half of a step's time where the model is small.
    """
    torch.manual_seed(plan.seed)
    blended = torch.compile(_blended, dynamic=False) if compiled else None

    def loss(step: Step) -> torch.Tensor:
        counts = divide(step.rows, [lesson.share for lesson in lessons], step.random)
        texts, wanted = [], []
        for lesson, count in zip(lessons, counts, strict=True):
            if count:
                texts.append(lesson.text.windows(count, step.length, step.random))
                with torch.no_grad():
                    wanted.append(lesson.teacher(texts[-1]))
        given = draft(input_ids=torch.cat(texts), use_cache=False).logits
        if blended is None:
            return distillation_loss(torch.cat(wanted), given, objective, step.done)
        weight = torch.tensor(lk_weight(objective, step.done), device=given.device)
        value: torch.Tensor = blended(torch.cat(wanted).flatten(0, 1), given.flatten(0, 1), weight)
        return value

    return fit(draft, loss, plan, label=f"draft ({objective})", checkpoint=checkpoint)


def divide(rows: int, shares: Sequence[float], random: np.random.Generator) -> list[int]:
    """How many of `rows` each share gets: whole numbers, right on average even for shares of less than a row."""
    edges = np.cumsum(shares) / np.sum(shares) * rows
    whole = np.floor(edges + random.random())
    whole[-1] = rows
    return [int(count) for count in np.diff(whole, prepend=0)]


def _blended(target_logits: torch.Tensor, draft_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Both losses in the proportion that a tensor says, so that one compiled function serves a whole training."""
    lost = 1 - overlap(target_logits, draft_logits).mean()
    return (1 - weight) * kl_divergence(target_logits, draft_logits).mean() + weight * lost
