"""Sizes of a run of the recipe: `full`, and `smoke` for tests."""

from __future__ import annotations

from dataclasses import dataclass

from export.draft.base_target import TargetShape
from export.draft.samples import SampleConfig
from export.draft.training import TrainingSchedule


@dataclass(frozen=True)
class FamilySize:
    """Model dimensions, training schedules and amounts of text of a run.

    Attributes:
        shape: dimensions of the target.
        corpus_bytes: bound on the text by domain name; None for all of it.
        tokenizer_bytes: amount of text that the vocabulary is trained on.
        target: schedule of target v1.
        evolve, tune: schedules of a LoRA, and of the version whose `tuned_blocks` are trained in full.
        rank: rank of a LoRA; the stand-ins that teach the draft have twice this rank.
        distill, control, settle: schedules of the draft, of the drafts that it is compared with, and of
            quantization-aware training.
        samples: amount of text sampled from each teacher.
        new_blocks, shared_blocks: blocks of the anchor draft; without shared blocks it shares norm, head and embedding.
        spared_blocks: number of last blocks that later versions leave unchanged.
        siblings, strength: perturbed targets that teach one of the controls; see `export.draft.teachers`.
        windows: windows of held-out text per domain for measuring agreement.
        evaluated: texts of the evaluation over all domains, prompt tokens of each, and evaluated tokens of each.
        parity_tokens: tokens of held-out text on which the exported graph is compared with PyTorch.
    """

    shape: TargetShape
    corpus_bytes: dict[str, float | None]
    tokenizer_bytes: int
    target: TrainingSchedule
    evolve: TrainingSchedule
    tune: TrainingSchedule
    tuned_blocks: tuple[int, ...]
    rank: int
    distill: TrainingSchedule
    settle: TrainingSchedule
    control: TrainingSchedule
    samples: SampleConfig
    new_blocks: int = 3
    shared_blocks: int = 0
    spared_blocks: int = 1
    siblings: int = 2
    strength: float = 0.1
    windows: int = 128
    evaluated: tuple[int, int, int] = (96, 64, 128)
    parity_tokens: int = 2000


SIZES = {
    "smoke": FamilySize(
        shape=TargetShape(512, 64, 4, 128, heads=2, kv_heads=1, head_dim=32, context=128),
        corpus_bytes={"python": 1_500_000, "cpp": 500_000, "stubs": 400_000},
        tokenizer_bytes=400_000,
        target=TrainingSchedule(40, 3e-3, 8, 64, long_length=128, long_share=0.1, warm_up=5),
        evolve=TrainingSchedule(10, 1e-3, 8, 64, warm_up=2),
        tune=TrainingSchedule(10, 5e-4, 8, 64, warm_up=2),
        tuned_blocks=(1,),
        rank=4,
        distill=TrainingSchedule(30, 3e-3, 8, 64, long_length=128, long_share=0.1, warm_up=5),
        settle=TrainingSchedule(5, 3e-4, 8, 64, warm_up=1),
        control=TrainingSchedule(10, 3e-3, 8, 64, warm_up=5),
        samples=SampleConfig(1, 16, prompt=16, length=64),
        windows=8,
        evaluated=(4, 16, 32),
        parity_tokens=100,
    ),
    "full": FamilySize(
        shape=TargetShape(8192, 384, 8, 960, heads=6, kv_heads=2, head_dim=64, context=2048),
        corpus_bytes={"python": None, "cpp": None, "stubs": None},
        tokenizer_bytes=40_000_000,
        target=TrainingSchedule(6000, 1.5e-3, 96, 512, long_length=2048, long_share=0.1, warm_up=200),
        evolve=TrainingSchedule(600, 1e-3, 96, 512, warm_up=50, weight_decay=0.0),
        tune=TrainingSchedule(800, 3e-4, 96, 512, warm_up=50),
        tuned_blocks=(4,),
        rank=8,
        distill=TrainingSchedule(7200, 1e-3, 96, 512, long_length=2048, long_share=0.1, warm_up=100),
        settle=TrainingSchedule(400, 3e-4, 96, 512, long_length=2048, long_share=0.5, warm_up=20),
        control=TrainingSchedule(2400, 1e-3, 96, 512, long_length=2048, long_share=0.1, warm_up=100),
        samples=SampleConfig(2, 1024, prompt=64, length=512),
    ),
}
