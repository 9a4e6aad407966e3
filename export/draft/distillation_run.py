"""Distills a draft for a target on chats that it writes itself, on given text, or on both: `draft-export distill`."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES
from cloud_verifier.draft_models.checkpoint import load_draft, read_description, save_draft
from cloud_verifier.draft_models.layouts import LAYOUTS, DraftPlan, add_blocks, build_draft
from cloud_verifier.model.target import load_model
from cloud_verifier.registry.checkpoint import base_directory
from edge_runtime.protocol.bundle import MANIFEST_NAME
from edge_runtime.protocol.errors import FlexSpecError, InputError
from export.bundle.four_bits import quantize_all
from export.draft.agreement import Agreement, JudgedText, measure_agreement
from export.draft.base_target import TextSource, to_device
from export.draft.bundle_weights import read_draft
from export.draft.distill import TeacherMix, compile_blocks, train_draft
from export.draft.distillation_config import DEFAULT_LAYOUT, DistillationConfig
from export.draft.teachers import make_siblings, target_teacher
from export.draft.training import EVALUATIONS, TrainingCurve, write_json
from export.draft.training_group import ALONE, TrainingGroup
from export.draft.training_text import CHATS_DIRECTORY, SAMPLES_FILE, TrainingText

# Held-out chats that follow the training, and their temperature.
MONITORED_CHATS, MONITORED_TEMPERATURE = 64, 0.7
RECORD_FILE, LOSS_CHART_FILE, OPTIONS_FILE = "distill.json", "distill.png", "options.json"
SCRATCH_FILES = ("checkpoint", SAMPLES_FILE, OPTIONS_FILE)


@dataclass(frozen=True)
class DistillationResult:
    """What a distillation reached on held-out text.

    Attributes:
        text: agreement on held-out pieces of the given text; None without text.
        chats: agreement on the answers of held-out chats, each written and judged at one temperature.
        sampled_chats: agreement, at every temperature, on those of them that were written above temperature 0; None
            without chats.
        doubling_gain: acceptance rate at MONITORED_TEMPERATURE that twice as many steps would add, extrapolated; None
            if the run was too short for an estimate.
    """

    text: Agreement | None
    chats: dict[str, Agreement]
    sampled_chats: Agreement | None
    doubling_gain: float | None

    def record(self) -> dict[str, Any]:
        """Return the values as plain data."""
        return asdict(self)


def distill(
    config: DistillationConfig, output: Path, device: torch.device, group: TrainingGroup = ALONE
) -> DistillationResult:
    """Train a draft and write it to `output`, which appears only when it is complete. A killed run is resumed.

    Args:
        group: the processes that write chats and train together.

    Returns:
        What the draft reached; nothing in processes other than the first.

    Raises:
        InputError: `output` exists, or was started with other options; a text cannot be read or is too short.
        TargetError: the target cannot be loaded.
        FlexSpecError: a file cannot be written, for example because the disk is full.
    """
    if output.exists():
        raise InputError(f"{output} exists: choose another --output or remove it")
    if not config.texts and not config.chats:
        raise InputError("nothing to train on: give --chats, --text or both")
    partial = output.with_name(output.name + ".partial")
    try:
        with group.first_before_others():
            if group.is_first:
                _create_work_directory(config, partial)
        base = base_directory(config.target)
        target = load_version(config.target, device)
        text = TrainingText.gather(config, base, target, partial, device, group=group)
        if config.start is None:
            layout = config.layout or DEFAULT_LAYOUT
            draft, plan = build_draft(target, layout, new_blocks=config.new_blocks, shared_blocks=config.shared_blocks)
        else:
            draft, plan = _continue_draft(config.start, base, config.layout)
            if config.added_blocks:
                plan = add_blocks(draft, plan, config.added_blocks)
        to_device(to_device(draft, torch.float32), device)
        compiled = config.compiled if config.compiled is not None else device.type == "cuda"
        mixes = _make_teachers(config, target, plan, text.training, compiled=compiled)

        def measure(draft: PreTrainedModel, texts: list[JudgedText], temperatures: Sequence[float]) -> Agreement:
            # Each batch has a shape of its own, for which compiling would take longer than running.
            with torch.compiler.set_stance("force_eager"):
                return measure_agreement(target, draft, texts, temperatures=temperatures)

        # Frozen matrices are rounded once, trained ones anew in every step.
        stored_in_4_bits = four_bit_weights(draft, config.head_bits, config.block_bits)
        frozen = [weight for weight in stored_in_4_bits if not weight.requires_grad]
        trained = [weight for weight in stored_in_4_bits if weight.requires_grad]
        rounded = functools.partial(rounded_as_in_bundle, trained, compiled=compiled)

        def monitor() -> float:
            with rounded():
                chats = text.held_out_chats[MONITORED_TEMPERATURE][:MONITORED_CHATS]
                agreement = measure(draft, chats, [MONITORED_TEMPERATURE])
            (score,) = agreement.accepted.values()
            return score

        with rounded_as_in_bundle(frozen):
            curve = train_draft(
                mixes,
                draft,
                config.plan,
                objective=config.objective,
                checkpoint=partial / "checkpoint",
                compiled=compiled,
                evaluate=monitor if config.chats and config.evaluated_chats else None,
                rounded=rounded,
                max_seconds=config.minutes and config.minutes * 60,
                group=group,
            )
        if not group.is_first:
            return DistillationResult(None, {}, None, None)
        save_draft(draft, plan, base, partial)
        # Measured after storing, because bfloat16 keeps fewer bits than training.
        stored = to_device(load_draft(partial, base), device)
        to_device(target, torch.float32)
        sampled = [chat for temperature, chats in text.held_out_chats.items() if temperature > 0 for chat in chats]
        with rounded_as_in_bundle(four_bit_weights(stored, config.head_bits, config.block_bits)):
            result = DistillationResult(
                text=measure(stored, text.held_out_windows, TEMPERATURES) if text.held_out_windows else None,
                chats={
                    f"T={temperature:g}": measure(stored, chats, [temperature])
                    for temperature, chats in text.held_out_chats.items()
                },
                sampled_chats=measure(stored, sampled, TEMPERATURES) if sampled else None,
                doubling_gain=extrapolate_doubling(curve),
            )
        record = _options_as_json(config) | {"curve": asdict(curve), "agreement": result.record()}
        write_json(partial / RECORD_FILE, record | {"tokens": text.tokens})
        save_loss_chart(curve, f"{plan.layout} draft of {config.target.name}", partial / LOSS_CHART_FILE)
        for leftover in SCRATCH_FILES:
            (partial / leftover).unlink(missing_ok=True)
        shutil.rmtree(partial / CHATS_DIRECTORY, ignore_errors=True)
        partial.replace(output)
    except OSError as error:
        raise FlexSpecError(
            f"cannot write {error.filename or partial}: {error.strerror}; free some space and run the command again"
        ) from None
    return result


def extrapolate_doubling(curve: TrainingCurve) -> float | None:
    """Estimate how much acceptance rate twice as many steps would add; None if there are too few evaluations.

    The share of rejected positions falls about as a power of the steps. The exponent comes from the first three
    evaluations, when the learning rate is still high: its decay at the end of training adds a gain of its own, which a
    longer training does not repeat.
    """
    if len(curve.scores) < EVALUATIONS or not all(0 < score < 1 for score in curve.scores):
        return None
    steps = np.log(curve.evaluated_steps[:3])
    exponent = float(np.polyfit(steps, np.log1p(-np.array(curve.scores[:3])), 1)[0])
    return round((1 - curve.scores[-1]) * (1 - 2 ** min(0.0, exponent)), 4)


@contextlib.contextmanager
def rounded_as_in_bundle(weights: Sequence[torch.nn.Parameter], *, compiled: bool = False) -> Iterator[None]:
    """Replace matrices by what a bundle with their 4-bit form computes with, for a while.

    A draft that is trained with the rounded matrices adapts to them, so that rounding costs almost no acceptance.
    """
    originals = [weight.detach().clone() for weight in weights]
    if weights:
        for weight, matrix in zip(weights, quantize_all(weights, compiled=compiled), strict=True):
            weight.data.copy_(matrix.values())
    try:
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)


def four_bit_weights(draft: PreTrainedModel, head_bits: int | None, block_bits: int | None) -> list[torch.nn.Parameter]:
    """Return the matrices of a draft that its bundle stores in 4 bits: of the head and embedding, of the blocks."""
    model: Any = draft
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = [] if head_bits is None else [embedding] if head is embedding else [embedding, head]
    if block_bits is not None:
        linear = [module for module in model.base_model.layers.modules() if isinstance(module, torch.nn.Linear)]
        weights += [module.weight for module in linear]
    return weights


def _continue_draft(start: Path, base: Path, layout: str | None) -> tuple[PreTrainedModel, DraftPlan]:
    """Load a draft to train on, from its directory or from its bundle.

    As `standalone`, what it shared is trained from now on as well.

    Raises:
        InputError: the draft is of another layout, which is not `standalone`, or its bundle does not hold all of it.
    """
    if (start / MANIFEST_NAME).is_file():
        draft, plan = read_draft(start, base)
    else:
        draft, plan = load_draft(start, base), read_description(start).plan
    if layout in (None, plan.layout):
        return draft, plan
    if LAYOUTS[layout].shares:
        raise InputError(f"{start} is a draft of the layout {plan.layout}: leave out --layout, or ask for standalone")
    draft.requires_grad_(True)
    return draft, DraftPlan(layout, plan.blocks, 0, plan.target_blocks)


def save_loss_chart(curve: TrainingCurve, title: str, path: Path) -> None:
    """Save a chart of the loss over the steps."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.steps, curve.losses)
    axes.set(xlabel="steps", ylabel="loss", title=title)
    figure.savefig(path, dpi=120)


def _create_work_directory(config: DistillationConfig, partial: Path) -> None:
    """Create the working directory, or accept an existing one that was started with the same options."""
    path = partial / OPTIONS_FILE
    partial.mkdir(parents=True, exist_ok=True)
    previous = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    # A run that failed early, for example because a text does not exist, left nothing to resume.
    if previous != _options_as_json(config) and any(child != path for child in partial.iterdir()):
        raise InputError(f"{partial} was started with other options: use those again or remove it")
    write_json(path, _options_as_json(config))


def _options_as_json(config: DistillationConfig) -> dict[str, Any]:
    """Return the options as JSON stores them."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return content


def load_version(directory: Path, device: torch.device) -> PreTrainedModel:
    """Load a version of the target; adapters are merged in float32, whatever the dtype of the result."""
    model: PreTrainedModel = load_model(directory, str(device), torch.float32)[0]
    model.requires_grad_(False)
    return to_device(model, torch.bfloat16) if device.type == "cuda" else model


def _make_teachers(
    config: DistillationConfig, target: PreTrainedModel, plan: DraftPlan, text: TextSource, *, compiled: bool
) -> list[TeacherMix]:
    """Return the target with its share of every batch, and the teachers that stand in for its future versions."""
    futures = make_siblings(target, plan, config.siblings, config.strength, seed=config.plan.seed)
    futures += [load_version(directory, target.device) for directory in config.versions]
    for model in (target, *futures) if compiled else ():
        compile_blocks(model)
    own = 1 - config.future_share if futures else 1.0
    mixes = [TeacherMix(target_teacher(target), text, own)]
    return mixes + [TeacherMix(target_teacher(model), text, config.future_share / len(futures)) for model in futures]
