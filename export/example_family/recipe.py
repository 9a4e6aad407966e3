"""The recipe of the example family: a chat model, later versions of it, and one frozen draft; one method a stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cloud_verifier.draft_models.checkpoint import load_draft
from cloud_verifier.model.target import load_model
from export.data.corpus import CPP, PYTHON, gather_corpus
from export.data.token_stream import DOCUMENT_SEPARATOR, MixedStream, TokenIds, TokenStream, tokenize_texts
from export.draft.base_target import end_of_text_id, to_device
from export.draft.chats import ChatConfig, Chats, ChatWriter
from export.draft.distillation_config import DistillationConfig
from export.draft.distillation_run import distill, four_bit_weights, rounded_as_in_bundle
from export.draft.training import TrainingCurve, write_json
from export.draft.training_group import ALONE, TrainingGroup
from export.draft.training_text import chat_kinds
from export.evaluate.prompts import load_chats
from export.example_family import cards
from export.example_family.evolution import evolve, save_adapter, save_changes, tune
from export.example_family.sizes import FamilySize

TARGET, BLOCKS, DRAFT, BUNDLE, EVALUATION = "target-v1", "draft-blocks", "draft", "bundle", "evaluation"
# LoRA versions with their domains; the last version has blocks trained in full.
LORAS = {"target-v2": PYTHON, "target-v3": CPP}
TUNED = "target-v4"
VERSIONS = (TARGET, *LORAS, TUNED)
# Stand-ins for future versions that teach the draft along with target v1: the same kinds of text, but other seeds and
# ranks than the versions.
FUTURES = {"future-python": PYTHON, "future-cpp": CPP}
RETRAINED = "retrained"
DOMAINS = (PYTHON, CPP)
TRAINING, HELD_OUT = "train", "held-out"
# Share of code in the text of LoRA versions and of the fully trained version; the rest is chats by target v1, so that a
# version answers questions as before.
EVOLVED_SHARE, TUNED_SHARE = 0.5, 0.3
# The form of the shipped bundle. The draft is trained with such matrices.
SHIPPED_WEIGHTS, HEAD_BITS, BLOCK_BITS = "int4-fitted", 4, 4
# Of a batch: given text, next to chats, and what the stand-ins for future versions teach.
TEXT_SHARE, FUTURE_SHARE = 0.15, 0.2
# Seeds differ by these from that of the draft's own chats.
VERSION_SEED, QUESTION_SEED = 7_000, 9_000


@dataclass(frozen=True)
class FamilyRecipe:
    """A run of the recipe.

    Attributes:
        size: amounts of text and schedules.
        source: Hugging Face directory of target v1.
        out: output directory; also of intermediate results, which are not shipped.
        device: training device.
        start: draft or bundle to train on instead of blocks of this recipe's own.
        added_blocks: blocks that `start` gets in addition.
        minutes: bound on the training of the draft; None takes all of its steps.
        group: processes of torchrun that train the draft together.
        only: restrict the stages `futures` and `retrain` to this member, to run members in parallel.
    """

    size: FamilySize
    source: Path
    out: Path
    device: torch.device
    start: Path | None = None
    added_blocks: int = 0
    minutes: float | None = None
    group: TrainingGroup = ALONE
    only: str | None = None

    def make_target(self) -> None:
        """Copy target v1."""
        with self._output_directory(TARGET) as (directory, _):
            shutil.copytree(self.source, directory, dirs_exist_ok=True)

    def make_corpus(self) -> None:
        """Collect source code as text files, one for each domain and split, with a list of its packages."""
        packages = {}
        with self._output_directory("corpus") as (directory, _):
            for domain in DOMAINS:
                corpus = gather_corpus(domain, max_bytes=self.size.corpus_bytes)
                for split in (TRAINING, HELD_OUT):
                    texts = [d.text for d in corpus.documents if d.held_out == (split == HELD_OUT)]
                    path = directory / split / f"{domain.name}.txt"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(DOCUMENT_SEPARATOR.join(texts), encoding="utf-8")
                packages[domain.name] = corpus.record()
            write_json(directory / "sources.json", packages)

    def make_version(self, version: str) -> None:
        """Train a LoRA version of target v1 on its domain and on chats."""
        with self._output_directory(version) as (directory, checkpoint):
            seed = [*LORAS].index(version)
            curve = self._train_lora(directory, checkpoint, LORAS[version].name, self.size.rank, seed)
            cards.write_card(
                directory, cards.ADAPTER, self._facts(curve) | {"name": version, "domain": LORAS[version].name}
            )
        self._record(version, vars(curve))

    def make_tuned(self) -> None:
        """Train some blocks of target v1 in full on text of all domains and on chats."""
        with self._output_directory(TUNED) as (directory, checkpoint):
            model = self._load(TARGET)
            text = self._mixed_text({domain.name: TUNED_SHARE / len(DOMAINS) for domain in DOMAINS})
            curve = tune(model, text, self.size.tune, self.size.tuned_blocks, checkpoint=checkpoint)
            changed = save_changes(model, self.out / TARGET, directory, f"../{TARGET}")
            blocks = ", ".join(map(str, self.size.tuned_blocks))
            cards.write_card(directory, cards.TUNED, self._facts(curve) | {"blocks": blocks, "tensors": len(changed)})
        self._record(TUNED, vars(curve))

    def make_futures(self) -> None:
        """Train the stand-ins for future versions."""
        for number, (name, domain) in enumerate(FUTURES.items()):
            if self.only not in (None, name) or (self.out / name).exists():
                continue
            with self._output_directory(name) as (directory, checkpoint):
                self._train_lora(directory, checkpoint, domain.name, 2 * self.size.rank, seed=100 + number)

    def make_chats(self) -> None:
        """Let each version write the chats that its draft is trained on, and those that the draft is measured on."""
        for version in VERSIONS:
            if self.only not in (None, version):
                continue
            config = self._draft_config if version == TARGET else self._retraining(version)
            writer = ChatWriter(self._fast(self._load(version)), self.out / TARGET)
            for kind in chat_kinds(config):
                writer.write(kind, config.chats_directory, backwards=self.group.writes_backwards)
            self.chats_complete(version).touch()

    def chats_complete(self, version: str) -> Path:
        """Return the file that exists once the chats of a version are written."""
        return self.out / "chats" / f"{version}.complete"

    def make_blocks(self) -> None:
        """Distill the draft's blocks, under target v1's head, from it and the stand-ins for its future versions."""
        futures = tuple(self.out / name for name in FUTURES)
        config = replace(self._draft_config, plan=self.size.blocks, versions=futures)
        result = distill(config, self.out / BLOCKS, self.device, self.group)
        self._record("blocks", result.record())

    def make_draft(self) -> None:
        """Train the draft on with a head and an embedding of its own, whose rounding they adapt to.

        A perturbed target v1 stands in for its future versions here.
        """
        start = self.start or self.out / BLOCKS
        config = replace(
            self._draft_config,
            layout="standalone",
            siblings=1,
            start=start,
            added_blocks=self.added_blocks,
            minutes=self.minutes,
        )
        result = distill(config, self.out / DRAFT, self.device, self.group)
        self._record("distill", result.record())

    def make_bundle(self) -> None:
        """Export the draft for the board, measured on held-out code and on answers of target v1."""
        # Imported here because a training machine may lack the build-time exporters.
        from cloud_verifier.acceptance.measure import read_calibration_text
        from export.bundle.build import BundleConfig, make_bundle

        config = BundleConfig(self.out / TARGET, self.out / DRAFT, "fused", SHIPPED_WEIGHTS, read_calibration_text())
        manifest = make_bundle(config, self.out / BUNDLE, lambda step: print(f"bundle: {step}", flush=True))
        print(f"bundle: {manifest.parity}, acceptance {manifest.acceptance}", flush=True)

    def make_retrained(self) -> None:
        """Train the draft on for each version: what a board would get if it downloaded a draft for every version."""
        for version in VERSIONS:
            output = self.out / RETRAINED / version
            if self.only not in (None, version) or output.exists():
                continue
            config = self._retraining(version)
            result = distill(config, output, self.device, self.group)
            self._record(f"{RETRAINED}-{version}", result.record())

    def make_questions(self) -> None:
        """Let target v1 write user messages that no training text holds, as a file of chats to be answered."""
        model = self._load(TARGET)
        writer = ChatWriter(self._fast(model), self.out / TARGET)
        chats = writer.write_questions(self.size.questions, QUESTION_SEED)
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats)
        partial_path = self.out / "questions.jsonl.partial"
        partial_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial_path.replace(self.out / "questions.jsonl")

    def make_evaluation(self) -> None:
        """Compare the frozen draft with the drafts retrained for each version."""
        from export.evaluate.evaluation import OWN_TEXT, EvaluationConfig, evaluate
        from export.evaluate.proposers import TorchProposer
        from export.evaluate.report import format_markdown, save_chart

        texts, prompt, tokens = self.size.evaluated
        config = EvaluationConfig(texts=texts, prompt=prompt, tokens=tokens, kinds=(OWN_TEXT,))
        with ExitStack() as roundings:

            def draft(directory: Path) -> TorchProposer:
                model = to_device(load_draft(directory, self.out / TARGET), self.device)
                roundings.enter_context(rounded_as_in_bundle(four_bit_weights(model, HEAD_BITS, BLOCK_BITS)))
                return TorchProposer(model)

            retrained = {
                version: draft(self.out / RETRAINED / version)
                for version in VERSIONS
                if (self.out / RETRAINED / version).is_dir()
            }
            targets = {version: partial(self._load, version) for version in VERSIONS}
            evaluation = evaluate(
                {"frozen": draft(self.out / DRAFT)},
                targets,
                self._evaluated_texts(),
                retrained=retrained,
                config=config,
            )
        with self._output_directory(EVALUATION) as (directory, _):
            write_json(directory / "evaluation.json", evaluation.record())
            (directory / "README.md").write_text(format_markdown(evaluation), encoding="utf-8")
            save_chart(evaluation, directory / "evaluation.png")

    def _evaluated_texts(self) -> Mapping[str, list[int] | list[list[int]]]:
        """Return held-out prompts of chats, everyday questions, and held-out code."""
        chats = load_chats(self.out / TARGET, self.out / "questions.jsonl")
        return chats | {domain.name: self._tokenize(domain.name, HELD_OUT).tolist() for domain in DOMAINS}

    def _train_lora(self, directory: Path, checkpoint: Path, domain: str, rank: int, seed: int) -> TrainingCurve:
        base, text = self._load(TARGET), self._mixed_text({domain: EVOLVED_SHARE})
        schedule = replace(self.size.evolve, seed=seed)
        # An anchor draft without shared blocks depends on no block of its target, so that all of them may change.
        model, curve = evolve(base, text, schedule, rank=rank, frozen_blocks=0, checkpoint=checkpoint)
        save_adapter(model, directory, f"../{TARGET}")
        return curve

    def _mixed_text(self, shares: Mapping[str, float]) -> MixedStream:
        """Return code with these shares by domain, and chats by target v1 for the rest."""
        parts = [
            (TokenStream.from_ids(self._tokenize(name, TRAINING), self.device), share) for name, share in shares.items()
        ]
        return MixedStream((*parts, (TokenStream.from_ids(self._chats().ids, self.device), 1 - sum(shares.values()))))

    def _tokenize(self, domain: str, split: str) -> TokenIds:
        """Return the token ids of a domain's text, kept in a file for the next stage."""
        path = self.out / "corpus" / split / f"{domain}.npy"
        if not path.is_file():
            tokenizer = Tokenizer.from_file(str(self.out / TARGET / "tokenizer.json"))
            text = path.with_suffix(".txt").read_text(encoding="utf-8")
            np.save(
                path,
                tokenize_texts(tokenizer, text.split(DOCUMENT_SEPARATOR), end_id=end_of_text_id(self.out / TARGET)),
            )
        ids: TokenIds = np.load(path)
        return ids

    def _chats(self) -> Chats:
        """Return chats by target v1 that versions are trained on, kept in a file for the next stage."""
        path = self.out / "samples" / f"{TARGET}.npz"
        if not path.is_file():
            writer = ChatWriter(self._fast(self._load(TARGET)), self.out / TARGET)
            length = min(448, self.size.evolve.length)
            writer.write(ChatConfig(self.size.version_chats, length, seed=VERSION_SEED)).save(path)
        return Chats.load(path)

    def _load(self, version: str) -> PreTrainedModel:
        """Load a version in float32, without gradients."""
        model: PreTrainedModel = load_model(self.out / version, str(self.device), torch.float32)[0]
        model.requires_grad_(False)
        return model

    def _fast(self, model: PreTrainedModel) -> PreTrainedModel:
        """Convert a model to the dtype that a verifier serves it in on this device."""
        return to_device(model, torch.bfloat16) if self.device.type == "cuda" else model

    @contextmanager
    def _output_directory(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Yield a directory and a checkpoint path; the directory gets its final name only when it is complete."""
        unfinished, checkpoint = self.out / f"{name}.partial", self.out / f"{name}.checkpoint"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished, checkpoint
        unfinished.replace(self.out / name)
        checkpoint.unlink(missing_ok=True)

    def _record(self, stage: str, content: Mapping[str, object]) -> None:
        """Save the curve and results of a stage; one file each, because stages may run in parallel."""
        if self.group.is_first:
            write_json(self.out / "training" / f"{stage}.json", content)

    @property
    def _draft_config(self) -> DistillationConfig:
        return DistillationConfig(
            target=self.out / TARGET,
            plan=self.size.distill,
            texts=(self.out / "corpus" / TRAINING,),
            chats=self.size.chats,
            chats_directory=self.out / "chats" / TARGET,
            new_blocks=self.size.new_blocks,
            head_bits=HEAD_BITS,
            block_bits=BLOCK_BITS,
            text_share=TEXT_SHARE,
            future_share=FUTURE_SHARE,
            evaluated_chats=self.size.evaluated_chats,
        )

    def _retraining(self, version: str) -> DistillationConfig:
        return replace(
            self._draft_config,
            target=self.out / version,
            plan=self.size.retrain,
            chats=self.size.version_chats,
            chats_directory=self.out / "chats" / f"retrained-{version}",
            start=self.out / DRAFT,
            evaluated_chats=0,
        )

    @staticmethod
    def _facts(curve: TrainingCurve) -> dict[str, object]:
        plan = curve.plan
        batch = int(str(plan["rows"])) * int(str(plan["length"]))
        return {"steps": plan["steps"], "batch": batch, "loss": curve.losses[-1]}
