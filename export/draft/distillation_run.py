"""Distills a draft for a given target on given text: the logic of `draft-export distill`."""

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
from export.data.token_stream import Mixture, TokenStream, tokenise
from export.draft.agreement import Agreement, measure
from export.draft.base_target import Text
from export.draft.distill import Lesson, Objective, distil
from export.draft.samples import SamplePlan, sample
from export.draft.teachers import Teacher, plain, siblings
from export.draft.training import Curve, Plan, write_json

# Of the documents of a text, these are kept for the evaluation: every so many-th.
HELD_OUT_EVERY = 20
EVALUATED_WINDOWS = 64
SAMPLES_SHARE = 0.15
SAMPLE_PROMPT = 64
RECORD, PICTURE, ORDER = "distill.json", "distill.png", "order.json"


@dataclass(frozen=True)
class Order:
    """What is to be distilled, from what, and how.

    Attributes:
        target: Hugging Face directory.
        texts: UTF-8 files, or folders of them.
        layout, new_blocks, shared_blocks: see `cloud_verifier.draft_models.layouts`.
        objective: see `export.draft.distill`.
        samples: tokens that the target writes itself, to learn from besides.
        siblings, strength: perturbed targets to learn from besides; see `export.draft.teachers`.
        plan: of the training.
    """

    target: Path
    texts: tuple[Path, ...]
    plan: Plan
    layout: str = "anchor"
    new_blocks: int = 2
    shared_blocks: int = 1
    objective: Objective = "mixed"
    samples: int = 0
    siblings: int = 0
    strength: float = 0.1


def distill(order: Order, output: Path, device: torch.device) -> Agreement:
    """Trains the draft, and writes it to `output` once it is whole.

    Returns:
        How far it agrees with its target on held-out text.

    Raises:
        InputError: `output` exists, or was begun with another order; a text cannot be read or is too short.
        TargetError: the target cannot be read.
        FlexSpecError: the disk is full.
    """
    if output.exists():
        raise InputError(f"{output} exists: choose another --output, or remove it")
    partial = output.with_name(output.name + ".partial")
    try:
        _begin(order, partial)
        target = _load(order.target, device)
        training, held_out = _read_texts(order, _end_id(target), device)
        draft, plan = build_draft(target, order.layout, new_blocks=order.new_blocks, shared_blocks=order.shared_blocks)
        draft.float()
        teachers: list[Teacher] = [plain(target)]
        teachers += siblings(target, plan, order.siblings, order.strength, seed=order.plan.seed)
        text: Text = training
        if order.samples:
            written = _write_samples(target, training, order, partial, device)
            text = Mixture(((training, 1 - SAMPLES_SHARE), (written, SAMPLES_SHARE)))
        lessons = [Lesson(teacher, text) for teacher in teachers]
        curve = distil(lessons, draft, order.plan, objective=order.objective, checkpoint=partial / "checkpoint")
        save_draft(draft, plan, order.target, partial)
        # What is stored is measured, not what was trained: bfloat16 keeps less.
        stored = load_draft(partial, order.target).to(device)
        length = min(order.plan.length, len(held_out.ids))
        agreement = measure(target.float(), stored, held_out, windows=EVALUATED_WINDOWS, length=length)
        record = _plain(order) | {"curve": asdict(curve), "agreement": agreement.record()}
        write_json(partial / RECORD, record | {"tokens": len(training.ids)})
        draw(curve, f"{order.layout} draft of {order.target.name}", partial / PICTURE)
        for leftover in ("checkpoint", "samples.npy", ORDER):
            (partial / leftover).unlink(missing_ok=True)
        partial.replace(output)
    except OSError as error:
        raise FlexSpecError(
            f"cannot write {error.filename or partial}: {error.strerror}; make room, and give the same command again"
        ) from None
    return agreement


def draw(curve: Curve, title: str, path: Path) -> None:
    """The loss over the steps, as a picture."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.steps, curve.losses)
    axes.set(xlabel="steps", ylabel="loss", title=title)
    figure.savefig(path, dpi=120)


def _begin(order: Order, partial: Path) -> None:
    """Makes the working directory, or takes up the one of the same order."""
    place = partial / ORDER
    if partial.is_dir():
        begun = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None
        if begun != _plain(order):
            raise InputError(f"{partial} was begun with other options: give those again, or remove it")
        return
    partial.mkdir(parents=True)
    write_json(place, _plain(order))


def _plain(order: Order) -> dict[str, Any]:
    """The order as JSON has it."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(order), default=str))
    return content


def _load(directory: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TargetError(f"{directory} is no target that transformers loads: {error}") from None
    model.requires_grad_(False)
    return model.to(device).eval()


def _end_id(target: PreTrainedModel) -> int:
    """What stands between two texts."""
    ids = target.generation_config.eos_token_id
    first = ids[0] if isinstance(ids, list) else ids
    return first if first is not None else 0


def _read_texts(order: Order, end_id: int, device: torch.device) -> tuple[TokenStream, TokenStream]:
    """Streams to learn from and to measure on."""
    tokenizer_path = order.target / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise InputError(f"{order.target} has no tokenizer.json: save its tokenizer there with transformers first")
    files: list[Path] = []
    for path in order.texts:
        if not path.exists():
            raise InputError(f"there is no text {path}")
        files += sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            # Folders hold all sorts of files.
            if len(files) == len(order.texts):
                raise InputError(f"{file} is no UTF-8 text") from None
    if len(documents) < HELD_OUT_EVERY:
        # Few, long documents: pieces of them are kept apart instead.
        documents = [piece for document in documents for piece in _pieces(document)]
    kept = set(range(HELD_OUT_EVERY // 2, len(documents), HELD_OUT_EVERY))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    streams = []
    for held_out in (False, True):
        chosen = [text for index, text in enumerate(documents) if (index in kept) == held_out]
        ids = tokenise(tokenizer, chosen, end_id=end_id)
        needed = 2 if held_out else order.plan.length
        if len(ids) < needed:
            raise InputError(f"the text is too short: {len(ids)} tokens, and a batch takes {needed} in a row")
        streams.append(TokenStream.of(ids, device))
    return streams[0], streams[1]


def _pieces(document: str) -> list[str]:
    size = max(1, len(document) // (2 * HELD_OUT_EVERY))
    return [document[start : start + size] for start in range(0, len(document), size)]


def _write_samples(
    target: PreTrainedModel, text: TokenStream, order: Order, partial: Path, device: torch.device
) -> TokenStream:
    """What the target writes, from disk if an earlier run got this far."""
    path = partial / "samples.npy"
    if not path.is_file():
        length, rows = order.plan.length, order.plan.rows
        prompt = min(SAMPLE_PROMPT, length // 2)
        batches = -(-order.samples // (rows * length))
        settings = SamplePlan(batches, rows, prompt, length, order.plan.seed)
        ids = sample(target, text, settings, end_id=_end_id(target), padding_id=_end_id(target))
        scratch = path.with_name("samples.partial.npy")
        np.save(scratch, ids)
        shutil.move(scratch, path)
    return TokenStream.of(np.load(path), device)
