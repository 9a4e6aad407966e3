"""Sizes of a run of the recipe: `full`, and `smoke` for tests."""

from __future__ import annotations

from dataclasses import dataclass

from export.draft.training import TrainingSchedule


@dataclass(frozen=True)
class FamilySize:
    """Amounts of text and training schedules of a run.

    Attributes:
        corpus_bytes: bound on the text of each domain.
        chats: chats that target v1 writes for the draft.
        version_chats: chats for each version and each retrained draft.
        evaluated_chats: held-out chats for each temperature that follow a distillation.
        questions: held-out user messages that the evaluation starts from.
        evolve, tune: schedules of a LoRA, and of the version whose `tuned_blocks` are trained in full.
        rank: rank of a LoRA; the stand-ins for future versions that teach the draft have twice this rank.
        blocks: schedule of the draft's blocks, under the target's frozen head.
        distill: schedule of the whole draft, head and embedding too, trained on from those blocks.
        retrain: schedule of the drafts retrained from it for one version each.
        evaluated: texts of the evaluation, prompt tokens of a piece of code, and judged tokens of each.
        new_blocks: blocks of the draft.
    """

    corpus_bytes: int
    chats: int
    version_chats: int
    questions: int
    evolve: TrainingSchedule
    tune: TrainingSchedule
    tuned_blocks: tuple[int, ...]
    rank: int
    blocks: TrainingSchedule
    distill: TrainingSchedule
    retrain: TrainingSchedule
    evaluated: tuple[int, int, int]
    new_blocks: int = 6
    evaluated_chats: int = 192


SIZES = {
    "smoke": FamilySize(
        corpus_bytes=60_000,
        chats=12,
        version_chats=6,
        questions=4,
        evolve=TrainingSchedule(4, 1e-3, 4, 48, warm_up=1),
        tune=TrainingSchedule(4, 5e-4, 4, 48, warm_up=1),
        tuned_blocks=(1,),
        rank=2,
        blocks=TrainingSchedule(8, 3e-3, 4, 48, long_length=96, long_share=0.2, warm_up=2),
        distill=TrainingSchedule(4, 1e-3, 4, 48, long_length=96, long_share=0.2, warm_up=1),
        retrain=TrainingSchedule(4, 1e-3, 4, 48, warm_up=1),
        evaluated=(8, 16, 16),
        new_blocks=2,
        evaluated_chats=4,
    ),
    "full": FamilySize(
        corpus_bytes=20_000_000,
        chats=40_960,
        version_chats=4_000,
        questions=144,
        evolve=TrainingSchedule(250, 5e-4, 32, 512, warm_up=30, weight_decay=0.0),
        tune=TrainingSchedule(250, 1e-4, 32, 512, warm_up=30),
        tuned_blocks=(10, 20),
        rank=4,
        blocks=TrainingSchedule(5200, 1e-3, 64, 512, long_length=2048, long_share=0.1, warm_up=100),
        distill=TrainingSchedule(
            12_000, 5e-4, 128, 512, long_length=2048, long_share=0.1, warm_up=100, seed=1, accumulate=2
        ),
        retrain=TrainingSchedule(400, 3e-4, 64, 512, warm_up=20),
        evaluated=(192, 64, 128),
    ),
}
