"""Distill a draft for a given target on given text: the implementation of `draft-export distill`."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloud_verifier.draft_models.checkpoint import load_draft, save_draft
from cloud_verifier.draft_models.layouts import build_draft
from edge_runtime.protocol.errors import FlexSpecError, InputError, TargetError
from export.data.token_stream import MixedStream, TokenStream, tokenize_texts
from export.draft.agreement import Agreement, measure_agreement
from export.draft.base_target import TextSource, for_inference, to_device
from export.draft.distill import Objective, TeacherMix, train_draft
from export.draft.samples import SampleConfig, sample_texts
from export.draft.teachers import Teacher, make_siblings, target_teacher
from export.draft.training import TrainingCurve, TrainingSchedule, write_json

# Every HELD_OUT_EVERY-th document is held out for the evaluation.
HELD_OUT_EVERY = 20
EVALUATED_WINDOWS = 64
# Share of the training text that the target sampled, and prompt tokens of a sample.
SAMPLES_SHARE = 0.15
SAMPLE_PROMPT_TOKENS = 64
RECORD_FILE, LOSS_CHART_FILE, OPTIONS_FILE = "distill.json", "distill.png", "options.json"


@dataclass(frozen=True)
class DistillationConfig:
    """Options of a distillation. The field names are part of `distill.json`.

    Attributes:
        target: Hugging Face directory.
        texts: UTF-8 files, or directories of them.
        plan: training schedule.
        layout, new_blocks, shared_blocks: see `cloud_verifier.draft_models.layouts`.
        objective: see `export.draft.distill`.
        samples: tokens to sample from the target as additional training text.
        siblings, strength: perturbed targets as additional teachers; see `export.draft.teachers`.
    """

    target: Path
    texts: tuple[Path, ...]
    plan: TrainingSchedule
    layout: str = "anchor"
    new_blocks: int = 2
    shared_blocks: int = 1
    objective: Objective = "mixed"
    samples: int = 0
    siblings: int = 0
    strength: float = 0.1


def distill(config: DistillationConfig, output: Path, device: torch.device) -> Agreement:
    """Train a draft and write it to `output`, which appears only when it is complete. A killed run is resumed.

    Returns:
        Agreement with the target on held-out text.

    Raises:
        InputError: `output` exists, or was started with other options; a text cannot be read or is too short.
        TargetError: the target cannot be loaded.
        FlexSpecError: a file cannot be written, for example because the disk is full.
    """
    if output.exists():
        raise InputError(f"{output} exists: choose another --output or remove it")
    partial = output.with_name(output.name + ".partial")
    try:
        _create_work_directory(config, partial)
        target = _load_target(config.target, device)
        training, held_out = _read_texts(config, _end_id(target), device)
        draft, plan = build_draft(
            target, config.layout, new_blocks=config.new_blocks, shared_blocks=config.shared_blocks
        )
        to_device(draft, torch.float32)
        teachers: list[Teacher] = [target_teacher(target)]
        teachers += make_siblings(target, plan, config.siblings, config.strength, seed=config.plan.seed)
        text: TextSource = training
        if config.samples:
            sampled = _load_or_sample(target, training, config, partial, device)
            text = MixedStream(((training, 1 - SAMPLES_SHARE), (sampled, SAMPLES_SHARE)))
        mixes = [TeacherMix(teacher, text) for teacher in teachers]
        curve = train_draft(mixes, draft, config.plan, objective=config.objective, checkpoint=partial / "checkpoint")
        save_draft(draft, plan, config.target, partial)
        # Measured after storing, because bfloat16 keeps fewer bits than training.
        stored = to_device(load_draft(partial, config.target), device)
        length = min(config.plan.length, len(held_out.ids))
        agreement = measure_agreement(
            to_device(target, torch.float32), stored, held_out, windows=EVALUATED_WINDOWS, length=length
        )
        record = _options_as_json(config) | {"curve": asdict(curve), "agreement": agreement.record()}
        write_json(partial / RECORD_FILE, record | {"tokens": len(training.ids)})
        save_loss_chart(curve, f"{config.layout} draft of {config.target.name}", partial / LOSS_CHART_FILE)
        for leftover in ("checkpoint", "samples.npy", OPTIONS_FILE):
            (partial / leftover).unlink(missing_ok=True)
        partial.replace(output)
    except OSError as error:
        raise FlexSpecError(
            f"cannot write {error.filename or partial}: {error.strerror}; free some space and run the command again"
        ) from None
    return agreement


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
    if partial.is_dir():
        previous = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if previous != _options_as_json(config):
            raise InputError(f"{partial} was started with other options: use those again or remove it")
        return
    partial.mkdir(parents=True)
    write_json(path, _options_as_json(config))


def _options_as_json(config: DistillationConfig) -> dict[str, Any]:
    """Return the options as JSON stores them."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return content


def _load_target(directory: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TargetError(f"{directory} is not a target that transformers can load: {error}") from None
    model.requires_grad_(False)
    return for_inference(model, device)


def _end_id(target: PreTrainedModel) -> int:
    """Return the token id that separates two texts."""
    ids = target.generation_config.eos_token_id if target.generation_config else None
    first = ids[0] if isinstance(ids, list) else ids
    return first if first is not None else 0


def _read_texts(config: DistillationConfig, end_id: int, device: torch.device) -> tuple[TokenStream, TokenStream]:
    """Return the training stream and the held-out stream."""
    tokenizer_path = config.target / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise InputError(f"{config.target} has no tokenizer.json: save its tokenizer there with transformers first")
    files: list[Path] = []
    for path in config.texts:
        if not path.exists():
            raise InputError(f"no text at {path}")
        files += sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            # A directory may contain binary files, which are skipped.
            if len(files) == len(config.texts):
                raise InputError(f"{file} is not UTF-8 text") from None
    if len(documents) < HELD_OUT_EVERY:
        # Few, long documents: hold out pieces of them instead.
        documents = [piece for document in documents for piece in _split_document(document)]
    held_out_indices = set(range(HELD_OUT_EVERY // 2, len(documents), HELD_OUT_EVERY))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    streams = []
    for held_out in (False, True):
        chosen = [text for index, text in enumerate(documents) if (index in held_out_indices) == held_out]
        ids = tokenize_texts(tokenizer, chosen, end_id=end_id)
        needed = 2 if held_out else config.plan.length
        if len(ids) < needed:
            raise InputError(f"the text is too short: {len(ids)} tokens, but a batch needs {needed} in a row")
        streams.append(TokenStream.from_ids(ids, device))
    return streams[0], streams[1]


def _split_document(document: str) -> list[str]:
    size = max(1, len(document) // (2 * HELD_OUT_EVERY))
    return [document[start : start + size] for start in range(0, len(document), size)]


def _load_or_sample(
    target: PreTrainedModel, text: TokenStream, config: DistillationConfig, partial: Path, device: torch.device
) -> TokenStream:
    """Return text sampled from the target, from disk if an earlier run completed it."""
    path = partial / "samples.npy"
    if not path.is_file():
        length, rows = config.plan.length, config.plan.rows
        prompt = min(SAMPLE_PROMPT_TOKENS, length // 2)
        batches = -(-config.samples // (rows * length))
        sampling = SampleConfig(batches, rows, prompt, length, config.plan.seed)
        ids = sample_texts(target, text, sampling, end_id=_end_id(target), padding_id=_end_id(target))
        scratch = path.with_name("samples.partial.npy")
        np.save(scratch, ids)
        shutil.move(scratch, path)
    return TokenStream.from_ids(np.load(path), device)
