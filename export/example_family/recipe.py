"""The recipe of the example family, one method per stage of `draft-export family`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cloud_verifier.draft_models.checkpoint import load_draft, read_description, save_draft
from cloud_verifier.draft_models.layouts import LAYOUTS, build_draft, plan_draft
from cloud_verifier.draft_models.safetensors_io import save_model
from export.bundle.low_bit_rounding import simulate_quantization
from export.data.corpus import CPP, DOMAINS, PYTHON, STUBS, Corpus, gather_corpus
from export.data.token_stream import MixedStream, TokenStream, read_ids, tokenize_texts, write_ids
from export.data.tokenizer import TOKENIZER_FILES, save_tokenizer, train_tokenizer
from export.draft.agreement import measure_agreement
from export.draft.base_target import load_target, pretrain, to_device
from export.draft.distill import Objective, TeacherMix, train_draft
from export.draft.samples import sample_texts
from export.draft.teachers import make_siblings, target_teacher
from export.draft.training import TrainingCurve, TrainingSchedule, write_json
from export.example_family import cards
from export.example_family.evolution import evolve, load_evolved, save_adapter, save_changes, tune
from export.example_family.sizes import FamilySize

TARGET, DRAFT, BUNDLE, EVALUATION = "target-v1", "draft-anchor", "bundle", "evaluation"
# LoRA versions with their domains; the last version has blocks trained in full that drafts do not share.
LORAS = {"target-v2": CPP.name, "target-v3": STUBS.name}
TUNED = "target-v4"
# Stand-ins for future versions that teach the draft: other seeds, ranks and mixtures than the versions, but the same
# kinds of text. Values are shares by domain.
FUTURES: Mapping[str, Mapping[str, float]] = {
    "future-cpp": {"cpp": 0.8, "python": 0.2},
    "future-stubs": {"stubs": 0.8, "python": 0.2},
    "future-all": {"python": 0.4, "cpp": 0.3, "stubs": 0.3},
}
# Share of a batch that each future teaches, and share of its text that it sampled itself.
FUTURE_SHARE, FUTURE_SAMPLES = 0.18, 0.4
CONTROLS, STANDALONE = "controls", "standalone"
# Controls with as many steps as the retrained drafts: trained like the shipped one, with KL alone, without futures.
EQUAL, KL, UNWARNED = "equal", "kl", "unwarned"
# Control: the shipped draft after quantization-aware training with 4 bits.
SETTLED = "settled"
# Shares of the training text of the tokenizer, of LoRA versions and of the fully trained version.
TOKENIZER_CPP_SHARE = 0.15
EVOLVED_SHARE = 0.8
TUNED_SHARES = {"python": 0.4, "cpp": 0.3, "stubs": 0.3}
# Measured: the acceptance rate of int8 equals that of fp32, fewer bits lose; see the table in README.md.
SHIPPED_WEIGHTS = "int8"
# Bits per weight of the quantization-aware control.
SETTLED_BITS = 4
# Shares of the training text of a draft by domain; the target sampled the rest.
DRAFT_SHARES = {"python": 0.45, "cpp": 0.2, "stubs": 0.1}
SAMPLES_SHARE = 0.25


@dataclass(frozen=True)
class FamilyRecipe:
    """A run of the recipe.

    Attributes:
        size: dimensions and schedules.
        corpus: directory of token streams and tokenizer.
        out: output directory.
        device: training device.
        objective: distillation loss.
        compiled: compile the training losses.
        only: restrict the stages `futures` and `controls` to this member, to run members in parallel.
    """

    size: FamilySize
    corpus: Path
    out: Path
    device: torch.device
    objective: Objective = "mixed"
    compiled: bool = False
    only: str | None = None

    def make_corpus(self) -> None:
        """Collect text, train the tokenizer, and write one token stream per domain and split."""
        gathered = [gather_corpus(domain, max_bytes=self.size.corpus_bytes[domain.name]) for domain in DOMAINS]
        tokenizer = train_tokenizer(self._tokenizer_text(gathered), self.size.shape.vocabulary)
        save_tokenizer(tokenizer, self.corpus / "tokenizer", context=self.size.shape.context)
        tokens = {}
        for corpus in gathered:
            for split, held_out in (("train", False), ("held-out", True)):
                texts = (document.text for document in corpus.documents if document.held_out == held_out)
                ids = tokenize_texts(tokenizer, texts)
                write_ids(self._stream_path(corpus.domain, split), ids)
                tokens[f"{corpus.domain}-{split}"] = len(ids)
                print(f"corpus: {corpus.domain} {split}, {len(ids)} tokens", flush=True)
        record = {"tokens": tokens, "packages": {corpus.domain: corpus.record() for corpus in gathered}}
        write_json(self.corpus / "sources.json", record)

    def make_target(self) -> None:
        """Train target v1 from scratch."""
        text = self._stream(PYTHON.name, "train")
        with self._output_directory(TARGET) as (directory, checkpoint):
            model, curve = pretrain(
                self.size.shape,
                text,
                self.size.target,
                self.device,
                checkpoint=checkpoint,
                compiled=self.compiled,
            )
            parameters = sum(parameter.numel() for parameter in model.parameters())
            save_model(model, directory)
            for name in TOKENIZER_FILES:
                shutil.copy(self.corpus / "tokenizer" / name, directory)
            shutil.copy(self.corpus / "sources.json", directory)
            facts = self._facts(self.size.target, curve) | {
                "parameters": parameters / 1e6,
                "tokens": len(text.ids) / 1e6,
                "context": self.size.shape.context,
                "vocabulary": self.size.shape.vocabulary,
                "sources": cards.source_table(self._packages()),
            }
            cards.write_card(directory, cards.TARGET, facts)
        self._record("target", {"parameters": parameters, **vars(curve)})

    def make_evolved(self, version: str) -> None:
        """Train a LoRA version of target v1 on another domain."""
        domain = LORAS[version]
        text = self._mixed_stream({domain: EVOLVED_SHARE, PYTHON.name: 1 - EVOLVED_SHARE})
        with self._output_directory(version) as (directory, checkpoint):
            model, curve = evolve(
                load_target(self.out / TARGET, self.device),
                text,
                self.size.evolve,
                rank=self.size.rank,
                frozen_blocks=self.size.spared_blocks,
                checkpoint=checkpoint,
            )
            save_adapter(model, directory, f"../{TARGET}")
            facts = self._facts(self.size.evolve, curve) | {
                "name": version,
                "domain": domain,
                "sources": cards.source_table({domain: self._packages()[domain]}),
            }
            cards.write_card(directory, cards.ADAPTER, facts)
        self._record(version, vars(curve))

    def make_tuned(self) -> None:
        """Train some blocks of target v1 in full on text of all domains."""
        model = load_target(self.out / TARGET, self.device)
        with self._output_directory(TUNED) as (directory, checkpoint):
            curve = tune(
                model, self._mixed_stream(TUNED_SHARES), self.size.tune, self.size.tuned_blocks, checkpoint=checkpoint
            )
            changed = save_changes(model, self.out / TARGET, directory, f"../{TARGET}")
            facts = self._facts(self.size.tune, curve) | {
                "blocks": ", ".join(map(str, self.size.tuned_blocks)),
                "tensors": len(changed),
            }
            cards.write_card(directory, cards.TUNED, facts)
        self._record(TUNED, vars(curve))

    def make_futures(self) -> None:
        """Train the stand-ins for future versions; sample text from target v1 and from each of them."""
        if self.only in (None, TARGET):
            self._samples(TARGET, DRAFT_SHARES)
        for number, (name, shares) in enumerate(FUTURES.items(), 1):
            if self.only not in (None, name):
                continue
            if not (self.out / name).exists():
                schedule = replace(self.size.evolve, seed=number)
                with self._output_directory(name) as (directory, checkpoint):
                    base, text = load_target(self.out / TARGET, self.device), self._mixed_stream(shares)
                    rank = 2 * self.size.rank
                    model, _ = evolve(base, text, schedule, rank=rank, frozen_blocks=0, checkpoint=checkpoint)
                    save_adapter(model, directory, f"../{TARGET}")
            self._samples(name, shares)

    def make_draft(self) -> None:
        """Distill the anchor draft from target v1 and its futures; measure its agreement with all versions."""
        schedule = self.size.distill
        with self._output_directory(DRAFT) as (directory, checkpoint):
            curve = self._distill("anchor", self._mixes_with_futures(), schedule, directory, checkpoint, packed=True)
            agreement = self.measure(directory)
            facts = self._facts(schedule, curve) | {
                "new_blocks": self.size.new_blocks,
                "objective": self.objective,
                "futures": ", ".join(FUTURES),
                "agreement": cards.agreement_table(agreement),
            }
            cards.write_card(directory, cards.DRAFT, facts)
        self._record("distill", {"objective": self.objective, **vars(curve), "agreement": agreement})

    def make_bundle(self) -> None:
        """Export the draft for the board, measured on the start of the held-out text."""
        # Imported here because a training machine may lack the build-time exporters.
        from export.bundle.build import BundleConfig, make_bundle

        ids = read_ids(self._stream_path(PYTHON.name, "held-out"))[: self.size.parity_tokens]
        tokenizer = Tokenizer.from_file(str(self.corpus / "tokenizer" / "tokenizer.json"))
        config = BundleConfig(
            self.out / TARGET, self.out / DRAFT, "fused", SHIPPED_WEIGHTS, tokenizer.decode(ids.tolist())
        )
        manifest = make_bundle(config, self.out / BUNDLE, lambda step: print(f"bundle: {step}", flush=True))
        print(f"bundle: {manifest.parity}, acceptance {manifest.acceptance}", flush=True)

    def make_controls(self) -> None:
        """Train the drafts that the shipped one is compared with, all of equal depth and therefore equal cost."""
        short = self.size.control
        for name in (STANDALONE, *LORAS, TUNED, EQUAL, KL, UNWARNED, SETTLED):
            if (self.out / CONTROLS / name).exists() or self.only not in (None, name):
                continue
            with self._output_directory(f"{CONTROLS}/{name}") as (directory, checkpoint):
                if name == STANDALONE:
                    self._distill("standalone", self._mixes_with_futures(), self.size.distill, directory, checkpoint)
                elif name in (EQUAL, KL):
                    objective: Objective = "kl" if name == KL else self.objective
                    self._distill(
                        "anchor", self._mixes_with_futures(), short, directory, checkpoint, objective=objective
                    )
                elif name == SETTLED:
                    self._train_quantized(directory, checkpoint)
                else:
                    # A draft for a single version needs no siblings.
                    version, count = (TARGET, self.size.siblings) if name == UNWARNED else (name, 0)
                    self._distill("anchor", self._mixes(version, count), short, directory, checkpoint)

    def make_evaluation(self) -> None:
        """Compare the frozen draft with the drafts retrained for each version and with the other controls."""
        from export.evaluate.evaluation import EvaluationConfig, evaluate
        from export.evaluate.proposers import TorchProposer
        from export.evaluate.report import format_markdown, save_chart

        def draft(directory: Path) -> TorchProposer:
            return TorchProposer(to_device(load_draft(directory, self.out / TARGET), self.device))

        others = {name: draft(self.out / CONTROLS / name) for name in (STANDALONE, EQUAL, KL, UNWARNED, SETTLED)}
        drafts = {"anchor": draft(self.out / DRAFT), **others}
        versions = {version: partial(self._load, version) for version in (TARGET, *LORAS, TUNED)}
        texts = {domain.name: read_ids(self._stream_path(domain.name, "held-out")).tolist() for domain in DOMAINS}
        # For target v1, the retrained draft is the control with as many steps.
        retrained = {TARGET: drafts[EQUAL]}
        retrained |= {version: draft(self.out / CONTROLS / version) for version in (*LORAS, TUNED)}
        evaluation = evaluate(
            drafts, versions, texts, retrained=retrained, config=EvaluationConfig(*self.size.evaluated)
        )
        scratch = self.out / f"{EVALUATION}.partial"
        scratch.mkdir(exist_ok=True)
        write_json(scratch / "evaluation.json", evaluation.record())
        (scratch / "README.md").write_text(format_markdown(evaluation), encoding="utf-8")
        save_chart(evaluation, scratch / "evaluation.png")
        scratch.replace(self.out / EVALUATION)

    def measure(self, draft_directory: Path) -> dict[str, dict[str, dict[str, float]]]:
        """Measure and print the agreement of a saved draft with each version on the held-out text of each domain."""
        draft = to_device(load_draft(draft_directory, self.out / TARGET), self.device)
        results: dict[str, dict[str, dict[str, float]]] = {}
        length = self.size.distill.length
        for version in (TARGET, *LORAS, TUNED):
            if not (self.out / version).is_dir():
                continue
            target = self._load(version)
            for domain in DOMAINS:
                text = self._stream(domain.name, "held-out")
                agreement = measure_agreement(target, draft, text, windows=self.size.windows, length=length)
                results.setdefault(version, {})[domain.name] = agreement.record()
                print(f"{version} on {domain.name}: {agreement}", flush=True)
        return results

    def _load(self, version: str) -> PreTrainedModel:
        """Load a version in float32, without gradients."""
        if version == TARGET:
            model = load_target(self.out / TARGET, self.device)
        else:
            model = load_evolved(self.out / version, self.out / TARGET, self.device)
        model.requires_grad_(False)
        return model

    def _mixes_with_futures(self) -> list[TeacherMix]:
        """Return the teachers of the frozen draft: target v1, and its futures on their own text."""
        mixes = []
        for name, shares in FUTURES.items():
            text = MixedStream(
                (
                    *(
                        (self._stream(domain, "train"), share * (1 - FUTURE_SAMPLES))
                        for domain, share in shares.items()
                    ),
                    (self._samples(name, shares), FUTURE_SAMPLES),
                )
            )
            mixes.append(TeacherMix(target_teacher(self._load(name)), text, FUTURE_SHARE))
        (own,) = self._mixes(TARGET, 0)
        return [replace(own, share=1 - FUTURE_SHARE * len(mixes)), *mixes]

    def _mixes(self, version: str, count: int) -> list[TeacherMix]:
        """Return a version and `count` siblings as teachers, on text of all domains and on samples of the version."""
        target = self._load(version)
        text = MixedStream(
            (*self._mixed_stream(DRAFT_SHARES).parts, (self._samples(version, DRAFT_SHARES), SAMPLES_SHARE))
        )
        plan = plan_draft(target.config, new_blocks=self.size.new_blocks, shared_blocks=self.size.shared_blocks)
        teachers = [target_teacher(target), *make_siblings(target, plan, count, self.size.strength)]
        return [TeacherMix(teacher, text) for teacher in teachers]

    def _distill(
        self,
        layout: str,
        mixes: list[TeacherMix],
        schedule: TrainingSchedule,
        directory: Path,
        checkpoint: Path,
        *,
        objective: Objective | None = None,
        packed: bool = False,
    ) -> TrainingCurve:
        """Distill a draft whose new blocks are initialized from target v1; save it in `directory`."""
        size = self.size
        shared = size.shared_blocks if LAYOUTS[layout].shares else 0
        new = size.new_blocks + size.shared_blocks - shared
        target = self._load(TARGET)
        draft, draft_plan = build_draft(target, layout, new_blocks=new, shared_blocks=shared)
        curve = train_draft(
            mixes,
            draft,
            schedule,
            objective=objective or self.objective,
            checkpoint=checkpoint,
            compiled=self.compiled,
        )
        save_draft(draft, draft_plan, self.out / TARGET, directory, packed=packed)
        return curve

    def _train_quantized(self, directory: Path, checkpoint: Path) -> None:
        """Continue the training of the shipped draft with weights rounded as in a low-bit bundle."""
        draft = to_device(load_draft(self.out / DRAFT, self.out / TARGET), self.device)
        schedule, compiled = self.size.settle, self.compiled
        with simulate_quantization(draft, SETTLED_BITS):
            train_draft(
                self._mixes_with_futures(), draft, schedule, objective="lk", checkpoint=checkpoint, compiled=compiled
            )
        save_draft(draft, read_description(self.out / DRAFT).plan, self.out / TARGET, directory, packed=True)

    def _mixed_stream(self, shares: Mapping[str, float]) -> MixedStream:
        return MixedStream(tuple((self._stream(name, "train"), share) for name, share in shares.items()))

    @contextmanager
    def _output_directory(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Yield a directory and a checkpoint path; the directory gets its final name only when it is complete."""
        partial, checkpoint = self.out / f"{name}.partial", self.out / f"{name}.checkpoint"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial, checkpoint
        partial.replace(self.out / name)
        checkpoint.unlink(missing_ok=True)

    def _samples(self, version: str, shares: Mapping[str, float]) -> TokenStream:
        """Return text that a version sampled after prompts of these domains, from disk if it exists."""
        path = self.out / "samples" / f"{version}.xz"
        if not path.is_file():
            write_ids(path, sample_texts(self._load(version), self._mixed_stream(shares), self.size.samples))
        return TokenStream.from_ids(read_ids(path), self.device)

    def _tokenizer_text(self, gathered: list[Corpus]) -> Iterator[str]:
        """Yield training documents of each domain up to its share of the tokenizer's text."""
        shares = {PYTHON.name: 1 - TOKENIZER_CPP_SHARE, CPP.name: TOKENIZER_CPP_SHARE}
        for corpus in gathered:
            left = self.size.tokenizer_bytes * shares.get(corpus.domain, 0.0)
            for document in corpus.documents:
                if left <= 0:
                    break
                if not document.held_out:
                    left -= len(document.text)
                    yield document.text

    def _stream_path(self, domain: str, split: str) -> Path:
        return self.corpus / f"{domain}-{split}.xz"

    def _stream(self, domain: str, split: str) -> TokenStream:
        return TokenStream.from_ids(read_ids(self._stream_path(domain, split)), self.device)

    def _packages(self) -> dict[str, list[dict[str, object]]]:
        """Return the contributing packages by domain."""
        sources = json.loads((self.corpus / "sources.json").read_text(encoding="utf-8"))
        packages: dict[str, list[dict[str, object]]] = sources["packages"]
        return packages

    def _record(self, stage: str, content: dict[str, object]) -> None:
        """Add the curve and results of a stage to `training.json`."""
        path = self.out / "training.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, record | {stage: content})

    @staticmethod
    def _facts(schedule: TrainingSchedule, curve: TrainingCurve) -> dict[str, object]:
        return {"steps": schedule.steps, "batch": schedule.rows * schedule.length, "loss": curve.losses[-1]}
