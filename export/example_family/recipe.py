"""What the example family is made of and how, stage by stage; `export.cli.family` is the command."""

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
from export.draft.base_target import load_target, pretrain
from export.draft.distill import Objective, TeacherMix, train_draft
from export.draft.samples import sample_texts
from export.draft.teachers import make_siblings, target_teacher
from export.draft.training import TrainingCurve, TrainingSchedule, write_json
from export.example_family import cards
from export.example_family.evolution import evolve, load_evolved, save_adapter, save_changes, tune
from export.example_family.sizes import FamilySize

TARGET, DRAFT, BUNDLE, EVALUATION = "target-v1", "draft-anchor", "bundle", "evaluation"
# The next versions, and what they are for; the last is trained in full where drafts share nothing.
LORAS = {"target-v2": CPP.name, "target-v3": STUBS.name}
TUNED = "target-v4"
# Not the versions: other seeds, ranks and mixtures; but the same kinds of text.
FUTURES: Mapping[str, Mapping[str, float]] = {
    "future-cpp": {"cpp": 0.8, "python": 0.2},
    "future-stubs": {"stubs": 0.8, "python": 0.2},
    "future-all": {"python": 0.4, "cpp": 0.3, "stubs": 0.3},
}
# How much of the draft's lessons each future gives, and how much of its text it wrote itself.
FUTURE_SHARE, FUTURE_SAMPLES = 0.18, 0.4
CONTROLS, STANDALONE = "controls", "standalone"
# Taught otherwise, in as many steps as the drafts made anew: as the shipped one; by KL alone; without futures.
EQUAL, KL, UNWARNED = "equal", "kl", "unwarned"
# The shipped draft, gone on learning with 4 bits.
SETTLED = "settled"
# Shares of the text that the tokenizer, the next version and the draft learn from.
TOKENIZER_CPP_SHARE = 0.15
EVOLVED_SHARE = 0.8
TUNED_SHARES = {"python": 0.4, "cpp": 0.3, "stubs": 0.3}
# Accepted as often as fp32, which fewer bits are not: see the table in `export/example_family/README.md`.
SHIPPED_WEIGHTS = "int8"
# Of the weights with which a control learns on.
SETTLED_BITS = 4
# What a draft reads of its target; the rest the target wrote itself.
DRAFT_SHARES = {"python": 0.45, "cpp": 0.2, "stubs": 0.1}
SAMPLES_SHARE = 0.25


@dataclass(frozen=True)
class FamilyRecipe:
    """One run: how big, from where, to where, on what."""

    size: FamilySize
    corpus: Path
    out: Path
    device: torch.device
    objective: Objective = "mixed"
    compiled: bool = False
    only: str | None = None

    def make_corpus(self) -> None:
        """Gathers text, learns the tokenizer, and writes one token stream per domain and split."""
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
        """Trains target v1 from scratch."""
        text = self._stream(PYTHON.name, "train")
        with self._made(TARGET) as (directory, checkpoint):
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
                "sources": cards.source_table(self._sources()["packages"]),
            }
            cards.write_card(directory, cards.TARGET, facts)
        self._record("target", {"parameters": parameters, **vars(curve)})

    def make_evolved(self, version: str) -> None:
        """Adapts target v1 to another domain."""
        domain = LORAS[version]
        text = self._mixture({domain: EVOLVED_SHARE, PYTHON.name: 1 - EVOLVED_SHARE})
        with self._made(version) as (directory, checkpoint):
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
                "sources": cards.source_table({domain: self._sources()["packages"][domain]}),
            }
            cards.write_card(directory, cards.ADAPTER, facts)
        self._record(version, vars(curve))

    def make_tuned(self) -> None:
        """Trains some blocks of target v1 on, in full, on text of all domains."""
        model = load_target(self.out / TARGET, self.device)
        with self._made(TUNED) as (directory, checkpoint):
            curve = tune(
                model, self._mixture(TUNED_SHARES), self.size.tune, self.size.tuned_blocks, checkpoint=checkpoint
            )
            changed = save_changes(model, self.out / TARGET, directory, f"../{TARGET}")
            facts = self._facts(self.size.tune, curve) | {
                "blocks": ", ".join(map(str, self.size.tuned_blocks)),
                "tensors": len(changed),
            }
            cards.write_card(directory, cards.TUNED, facts)
        self._record(TUNED, vars(curve))

    def make_futures(self) -> None:
        """What target v1 may become, and what it writes, and would write then."""
        if self.only in (None, TARGET):
            self._samples(TARGET, DRAFT_SHARES)
        for number, (name, shares) in enumerate(FUTURES.items(), 1):
            if self.only not in (None, name):
                continue
            if not (self.out / name).exists():
                plan = replace(self.size.evolve, seed=number)
                with self._made(name) as (directory, checkpoint):
                    base, text = load_target(self.out / TARGET, self.device), self._mixture(shares)
                    rank = 2 * self.size.rank
                    model, _ = evolve(base, text, plan, rank=rank, frozen_blocks=0, checkpoint=checkpoint)
                    save_adapter(model, directory, f"../{TARGET}")
            self._samples(name, shares)

    def make_draft(self) -> None:
        """Distils the anchor draft from target v1 and its futures, and measures it against all versions."""
        plan = self.size.distill
        with self._made(DRAFT) as (directory, checkpoint):
            curve = self._distil("anchor", self._forewarned(), plan, directory, checkpoint, packed=True)
            agreement = self.measure(directory)
            facts = self._facts(plan, curve) | {
                "new_blocks": self.size.new_blocks,
                "objective": self.objective,
                "futures": ", ".join(FUTURES),
                "agreement": cards.agreement_table(agreement),
            }
            cards.write_card(directory, cards.DRAFT, facts)
        self._record("distill", {"objective": self.objective, **vars(curve), "agreement": agreement})

    def make_bundle(self) -> None:
        """Exports the draft for the board; measured on the beginning of the held-out text."""
        # The exporters are build-time tools that a training machine need not have.
        from export.bundle.build import BundleConfig, make_bundle

        ids = read_ids(self._stream_path(PYTHON.name, "held-out"))[: self.size.parity_tokens]
        tokenizer = Tokenizer.from_file(str(self.corpus / "tokenizer" / "tokenizer.json"))
        order = BundleConfig(
            self.out / TARGET, self.out / DRAFT, "fused", SHIPPED_WEIGHTS, tokenizer.decode(ids.tolist())
        )
        manifest = make_bundle(order, self.out / BUNDLE, lambda step: print(f"bundle: {step}", flush=True))
        print(f"bundle: {manifest.parity}, acceptance {manifest.acceptance}", flush=True)

    def make_controls(self) -> None:
        """Drafts to compare the shipped one with, all as deep, so that they cost a board the same."""
        short = self.size.control
        for name in (STANDALONE, *LORAS, TUNED, EQUAL, KL, UNWARNED, SETTLED):
            if (self.out / CONTROLS / name).exists() or self.only not in (None, name):
                continue
            with self._made(f"{CONTROLS}/{name}") as (directory, checkpoint):
                if name == STANDALONE:
                    self._distil("standalone", self._forewarned(), self.size.distill, directory, checkpoint)
                elif name in (EQUAL, KL):
                    objective: Objective = "kl" if name == KL else self.objective
                    self._distil("anchor", self._forewarned(), short, directory, checkpoint, objective)
                elif name == SETTLED:
                    self._settle(directory, checkpoint)
                else:
                    # A draft that is made for one version need not think of others.
                    version, count = (TARGET, self.size.siblings) if name == UNWARNED else (name, 0)
                    self._distil("anchor", self._lessons(version, count), short, directory, checkpoint)

    def make_evaluation(self) -> None:
        """The table: the frozen draft beside drafts made anew for each version, and beside one that shares nothing."""
        from export.evaluate.evaluation import EvaluationConfig, evaluate
        from export.evaluate.proposers import TorchProposer
        from export.evaluate.report import format_markdown, save_chart

        def draft(directory: Path) -> TorchProposer:
            return TorchProposer(load_draft(directory, self.out / TARGET).to(self.device))

        others = {name: draft(self.out / CONTROLS / name) for name in (STANDALONE, EQUAL, KL, UNWARNED, SETTLED)}
        drafts = {"anchor": draft(self.out / DRAFT), **others}
        versions = {version: partial(self._load, version) for version in (TARGET, *LORAS, TUNED)}
        texts = {domain.name: read_ids(self._stream_path(domain.name, "held-out")) for domain in DOMAINS}
        # For target v1 the draft that had as many steps as those made anew.
        retrained = {TARGET: drafts[EQUAL]}
        retrained |= {version: draft(self.out / CONTROLS / version) for version in (*LORAS, TUNED)}
        evaluation = evaluate(
            drafts, versions, texts, retrained=retrained, config=EvaluationConfig(*self.size.evaluated)
        )
        place = self.out / EVALUATION
        scratch = self.out / f"{EVALUATION}.partial"
        scratch.mkdir(exist_ok=True)
        write_json(scratch / "evaluation.json", evaluation.record())
        (scratch / "README.md").write_text(format_markdown(evaluation), encoding="utf-8")
        save_chart(evaluation, scratch / "evaluation.png")
        scratch.replace(place)

    def measure(self, draft_directory: Path) -> dict[str, dict[str, dict[str, float]]]:
        """Agreement of the saved draft with each version on each domain's held-out text, printed too."""
        draft = load_draft(draft_directory, self.out / TARGET).to(self.device)
        results: dict[str, dict[str, dict[str, float]]] = {}
        length = self.size.distill.length
        for version in (TARGET, *LORAS, TUNED):
            if not (self.out / version).is_dir():
                continue
            target = self._load(version)
            for domain in DOMAINS:
                text = self._stream(domain.name, "held-out")
                found = measure_agreement(target, draft, text, windows=self.size.windows, length=length)
                results.setdefault(version, {})[domain.name] = found.record()
                print(f"{version} on {domain.name}: {found}", flush=True)
        return results

    def _load(self, version: str) -> PreTrainedModel:
        """A version in float32, not to be trained."""
        if version == TARGET:
            model = load_target(self.out / TARGET, self.device)
        else:
            model = load_evolved(self.out / version, self.out / TARGET, self.device)
        model.requires_grad_(False)
        return model

    def _forewarned(self) -> list[TeacherMix]:
        """What the frozen draft is taught: what target v1 says, and what its futures say on text of theirs."""
        lessons = []
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
            lessons.append(TeacherMix(target_teacher(self._load(name)), text, FUTURE_SHARE))
        (own,) = self._lessons(TARGET, 0)
        return [replace(own, share=1 - FUTURE_SHARE * len(lessons)), *lessons]

    def _lessons(self, version: str, count: int) -> list[TeacherMix]:
        """What a version says on text of all domains and its own, and so many siblings of it do."""
        target = self._load(version)
        text = MixedStream((*self._mixture(DRAFT_SHARES).parts, (self._samples(version, DRAFT_SHARES), SAMPLES_SHARE)))
        plan = plan_draft(target.config, new_blocks=self.size.new_blocks, shared_blocks=self.size.shared_blocks)
        teachers = [target_teacher(target), *make_siblings(target, plan, count, self.size.strength)]
        return [TeacherMix(teacher, text) for teacher in teachers]

    def _distil(
        self,
        layout: str,
        lessons: list[TeacherMix],
        plan: TrainingSchedule,
        directory: Path,
        checkpoint: Path,
        objective: Objective | None = None,
        *,
        packed: bool = False,
    ) -> TrainingCurve:
        """Makes a draft that starts as blocks of target v1's."""
        size = self.size
        shared = size.shared_blocks if LAYOUTS[layout].shares else 0
        new = size.new_blocks + size.shared_blocks - shared
        target = self._load(TARGET)
        draft, draft_plan = build_draft(target, layout, new_blocks=new, shared_blocks=shared)
        curve = train_draft(
            lessons,
            draft,
            plan,
            objective=objective or self.objective,
            checkpoint=checkpoint,
            compiled=self.compiled,
        )
        save_draft(draft, draft_plan, self.out / TARGET, directory, packed=packed)
        return curve

    def _settle(self, directory: Path, checkpoint: Path) -> None:
        """Has the draft learn on with the weights that a bundle of few bits stores."""
        draft = load_draft(self.out / DRAFT, self.out / TARGET).to(self.device)
        plan, compiled = self.size.settle, self.compiled
        with simulate_quantization(draft, SETTLED_BITS):
            train_draft(self._forewarned(), draft, plan, objective="lk", checkpoint=checkpoint, compiled=compiled)
        save_draft(draft, read_description(self.out / DRAFT).plan, self.out / TARGET, directory, packed=True)

    def _mixture(self, shares: Mapping[str, float]) -> MixedStream:
        return MixedStream(tuple((self._stream(name, "train"), share) for name, share in shares.items()))

    @contextmanager
    def _made(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Gives a directory to fill and a checkpoint path; the directory appears under its name only when whole."""
        partial, checkpoint = self.out / f"{name}.partial", self.out / f"{name}.checkpoint"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial, checkpoint
        partial.replace(self.out / name)
        checkpoint.unlink(missing_ok=True)

    def _samples(self, version: str, shares: Mapping[str, float]) -> TokenStream:
        """What a version wrote behind such text, from disk if an earlier run got this far."""
        path = self.out / "samples" / f"{version}.xz"
        if not path.is_file():
            write_ids(path, sample_texts(self._load(version), self._mixture(shares), self.size.samples))
        return TokenStream.from_ids(read_ids(path), self.device)

    def _tokenizer_text(self, gathered: list[Corpus]) -> Iterator[str]:
        """Training documents of each domain up to its share of the tokenizer's text."""
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

    def _sources(self) -> dict:
        return json.loads((self.corpus / "sources.json").read_text(encoding="utf-8"))

    def _record(self, stage: str, content: dict[str, object]) -> None:
        """Adds a stage's curve and results to `training.json`."""
        path = self.out / "training.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, record | {stage: content})

    @staticmethod
    def _facts(plan: TrainingSchedule, curve: TrainingCurve) -> dict[str, object]:
        return {"steps": plan.steps, "batch": plan.rows * plan.length, "loss": curve.losses[-1]}
