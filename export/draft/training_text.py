"""The text of a distillation: chats that the target writes itself, given text, and text that the target continues."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES
from edge_runtime.protocol.errors import InputError
from export.data.token_stream import DOCUMENT_SEPARATOR, MixedStream, TokenStream, tokenize_texts
from export.draft.agreement import JudgedText
from export.draft.base_target import TextSource, end_of_text_id
from export.draft.chats import ChatConfig, ChatWriter
from export.draft.distillation_config import DistillationConfig
from export.draft.samples import SampleConfig, sample_texts
from export.draft.training_group import ALONE, TrainingGroup

# Every HELD_OUT_EVERY-th document is held out for the evaluation.
HELD_OUT_EVERY = 20
EVALUATED_WINDOWS = 64
# Longest chat, in tokens.
CHAT_TOKENS = 448
# Seed of the held-out chats, whatever the seed of the training: drafts are measured on the same chats.
HELD_OUT_SEED = 1_000_003
# Share of the given text that the target sampled, and prompt tokens of a sample.
SAMPLES_SHARE = 0.15
SAMPLE_PROMPT_TOKENS = 64
CHATS_DIRECTORY, SAMPLES_FILE = "chats", "samples.npy"


@dataclass(frozen=True)
class TrainingText:
    """The text of a distillation.

    Attributes:
        training: where batches come from.
        tokens: number of tokens of `training`.
        held_out_windows: held-out pieces of the given text.
        held_out_chats: held-out chats by the temperature of their answers.
    """

    training: TextSource
    tokens: int
    held_out_windows: list[JudgedText]
    held_out_chats: dict[float, list[JudgedText]]

    @classmethod
    def gather(
        cls,
        config: DistillationConfig,
        base: Path,
        target: PreTrainedModel,
        partial: Path,
        device: torch.device,
        *,
        group: TrainingGroup = ALONE,
    ) -> TrainingText:
        """Read the given text, and let the target write its share; what an interrupted run wrote is reused.

        Of two processes of `group`, one writes the first chats first, the other the last.
        """
        parts: list[tuple[TokenStream, float]] = []
        windows: list[JudgedText] = []
        if config.texts:
            given, held_out = _read_texts(config, base, end_of_text_id(target), device)
            parts.append((given, config.text_share if config.chats else 1.0))
            rows = held_out.consecutive_windows(min(config.plan.length, len(held_out.ids))).tolist()
            windows = [(row, 1) for row in rows[:: max(1, len(rows) // EVALUATED_WINDOWS)][:EVALUATED_WINDOWS]]
            if config.samples:
                with group.first_before_others():
                    sampled = _load_or_sample(target, given, config, partial, device)
                parts = [(given, parts[0][1] * (1 - SAMPLES_SHARE)), (sampled, parts[0][1] * SAMPLES_SHARE)]
        held_out_chats: dict[float, list[JudgedText]] = {}
        if config.chats:
            writer = ChatWriter(target, base)
            training, *held_out_kinds = chat_kinds(config)
            directory = config.chats_directory or partial / CHATS_DIRECTORY
            chats = writer.write(training, directory, backwards=group.writes_backwards)
            for kind in held_out_kinds if group.is_first else ():
                held_out_chats[kind.temperatures[0]] = [*writer.write(kind, directory).rows()]
            parts.append((TokenStream.from_ids(chats.ids, device), 1 - config.text_share if config.texts else 1.0))
            if len(chats.ids) < config.plan.length:
                raise InputError(
                    f"{config.chats} chats give no text of {config.plan.length} tokens: ask for more chats"
                )
        tokens = sum(len(stream.ids) for stream, _ in parts)
        return cls(MixedStream(tuple(parts)), tokens, windows, held_out_chats)


def chat_kinds(config: DistillationConfig) -> list[ChatConfig]:
    """Return what chats a distillation needs: those to train on, then the held-out ones, one kind a temperature."""
    length = min(CHAT_TOKENS, config.plan.length)
    held_out = TEMPERATURES if config.evaluated_chats else ()
    return [
        ChatConfig(config.chats, length, seed=config.plan.seed),
        *(ChatConfig(config.evaluated_chats, length, (temperature,), seed=HELD_OUT_SEED) for temperature in held_out),
    ]


def _read_texts(
    config: DistillationConfig, base: Path, end_id: int, device: torch.device
) -> tuple[TokenStream, TokenStream]:
    """Return the training stream and the held-out stream."""
    tokenizer_path = base / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise InputError(f"{base} has no tokenizer.json: save its tokenizer there with transformers first")
    files: list[Path] = []
    for path in config.texts:
        if not path.exists():
            raise InputError(f"no text at {path}")
        files += sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            documents += file.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
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
    path = partial / SAMPLES_FILE
    if not path.is_file():
        length, rows = config.plan.length, config.plan.rows
        prompt = min(SAMPLE_PROMPT_TOKENS, length // 2)
        batches = -(-config.samples // (rows * length))
        sampling = SampleConfig(batches, rows, prompt, length, config.plan.seed)
        ids = sample_texts(target, text, sampling, end_id=end_of_text_id(target), padding_id=end_of_text_id(target))
        scratch = path.with_name("samples.partial.npy")
        np.save(scratch, ids)
        shutil.move(scratch, path)
    return TokenStream.from_ids(np.load(path), device)
