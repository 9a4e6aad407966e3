"""The options of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.draft.distill import Objective
from export.draft.training import TrainingSchedule

DEFAULT_LAYOUT = "anchor"


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Options of a distillation. The field names are part of `distill.json`.

    Attributes:
        target: Hugging Face directory, or an adapter or changed tensors next to their base.
        plan: training schedule.
        texts: UTF-8 files, or directories of them; may be empty if there are chats.
        chats: number of chats that the target writes itself as training text.
        text_share: share of `texts` in every batch if there are chats too.
        chats_directory: where the chats are kept for further trainings; None removes them at the end.
        evaluated_chats: number of held-out chats for each temperature; 0 evaluates on the given text alone.
        layout, new_blocks, shared_blocks: see `cloud_verifier.draft_models.layouts`. Without a layout, it is that of
            `start`, or DEFAULT_LAYOUT.
        objective: see `export.draft.distill`.
        samples: tokens to sample from the target after prompts from `texts`, as additional training text.
        versions: directories of further versions of the target (adapters, changed tensors): additional teachers.
        siblings, strength: perturbed targets as additional teachers; see `export.draft.teachers`.
        future_share: share of every batch that versions and siblings teach together.
        start: directory or bundle of a draft to train on, as the layout `standalone` its head too; None starts from
            blocks of the target.
        added_blocks: blocks that `start` gets in addition.
        head_bits: train with head and embedding rounded to 4 bits, as in such a bundle; None: as they are.
        block_bits: the same for the matrices of the blocks.
        minutes: take only as many of the schedule's steps as fit into this time.
        compiled: compile blocks and loss; None: on a GPU.
    """

    target: Path
    plan: TrainingSchedule
    texts: tuple[Path, ...] = ()
    chats: int = 0
    text_share: float = 0.25
    chats_directory: Path | None = None
    evaluated_chats: int = 192
    layout: str | None = None
    new_blocks: int = 3
    shared_blocks: int = 0
    objective: Objective = "mixed"
    samples: int = 0
    versions: tuple[Path, ...] = ()
    siblings: int = 0
    strength: float = 0.1
    future_share: float = 0.3
    start: Path | None = None
    added_blocks: int = 0
    head_bits: int | None = None
    block_bits: int | None = None
    minutes: float | None = None
    compiled: bool | None = None
