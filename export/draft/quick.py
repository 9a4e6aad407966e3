"""A draft in minutes, without a GPU and without text: the implementation of `draft-export quick`.

An existing small model with the target's tokenizer is the better draft if there is one. Otherwise a few blocks of the
target are tuned on chats that the target writes, for as long as the user allows; most of that time the target computes
what the draft is to learn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES
from cloud_verifier.draft_models.layouts import build_draft
from cloud_verifier.registry.checkpoint import base_directory
from edge_runtime.protocol.errors import InputError
from export.draft.agreement import Agreement, measure_agreement
from export.draft.chats import ChatConfig, ChatWriter
from export.draft.distill import distillation_loss
from export.draft.distillation_config import DistillationConfig
from export.draft.distillation_run import distill, load_version
from export.draft.training import TrainingSchedule

# Shares of the allowed time: writing chats, and training on them; the rest is measuring and packing.
WRITING_SHARE, TRAINING_SHARE = 0.3, 0.55
# Chats that are written at once, and the fewest; half of the first ones measure the expected acceptance.
CHATS_AT_ONCE = 32
CHAT_TOKENS = 256
EVALUATED_CHATS = 8
ROWS, LENGTH = 4, CHAT_TOKENS
RATE = 2e-3
FEWEST_STEPS = 20
# Chosen: two blocks reach in minutes what three reach in twice the time.
NEW_BLOCKS = 2


@dataclass(frozen=True)
class QuickConfig:
    """What to make.

    Attributes:
        target: directory of the target.
        output: directory of the draft; must not exist.
        minutes: time to spend.
        seed: seed of chats and training.
    """

    target: Path
    output: Path
    minutes: float
    seed: int = 0


def tune_cut_layers(config: QuickConfig, device: torch.device) -> dict[str, Agreement]:
    """Make a draft of some of the target's blocks, tuned for `minutes`; return its agreement by temperature.

    Raises:
        InputError: the output exists, or the target has no chat template.
        TargetError: the target cannot be loaded.
    """
    seconds = config.minutes * 60
    work = config.output.with_name(config.output.name + ".chats")
    target = load_version(config.target, device)
    writer = ChatWriter(target, base_directory(config.target))
    # One batch of chats is written in any case, and tells how many fit into the time.
    started = time.monotonic()
    writer.write(ChatConfig(CHATS_AT_ONCE, CHAT_TOKENS, seed=config.seed), work)
    batches = max(1, int(seconds * WRITING_SHARE / (time.monotonic() - started)))
    steps = max(FEWEST_STEPS, int(seconds * TRAINING_SHARE / measure_step_seconds(target)))
    del target
    result = distill(
        DistillationConfig(
            target=config.target,
            plan=TrainingSchedule(steps, RATE, ROWS, LENGTH, warm_up=steps // 10 + 1, seed=config.seed),
            chats=batches * CHATS_AT_ONCE,
            chats_directory=work,
            evaluated_chats=EVALUATED_CHATS,
            new_blocks=NEW_BLOCKS,
        ),
        config.output,
        device,
    )
    return result.chats


def measure_step_seconds(target: PreTrainedModel) -> float:
    """Measure how long a training step takes: the target's forward pass, and forward and backward of a draft."""
    draft, _ = build_draft(target, "anchor", new_blocks=NEW_BLOCKS, shared_blocks=0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, target.config.vocab_size, (ROWS, LENGTH)))
    ids = ids.to(target.device)
    durations = []
    for _ in range(2):  # the first one allocates
        started = time.monotonic()
        with torch.no_grad():
            target_logits = target(input_ids=ids, use_cache=False).logits
        draft_logits = draft(input_ids=ids, use_cache=False).logits
        distillation_loss(target_logits, draft_logits, "kl", 0.0).backward()  # type: ignore[no-untyped-call]
        durations.append(time.monotonic() - started)
    return durations[-1]


def measure_sibling(target_directory: Path, sibling: Path, device: torch.device, seed: int) -> dict[str, Agreement]:
    """Measure how an existing model agrees with the target on a few chats that the target writes.

    Raises:
        InputError: the two differ in their number of logits.
        TargetError: one of them cannot be loaded.
    """
    target, draft = load_version(target_directory, device), load_version(sibling, device)
    if draft.config.vocab_size != target.config.vocab_size:
        raise InputError(
            f"{sibling} has {draft.config.vocab_size} logits and {target_directory} {target.config.vocab_size}: a "
            "sibling needs the target's own tokenizer"
        )
    writer = ChatWriter(target, base_directory(target_directory))
    agreements = {}
    for temperature in TEMPERATURES:
        chats = writer.write(ChatConfig(EVALUATED_CHATS, CHAT_TOKENS, (temperature,), seed=seed)).rows()
        agreements[f"T={temperature:g}"] = measure_agreement(target, draft, chats, temperatures=[temperature])
    return agreements
