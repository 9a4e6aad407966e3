"""The example family from nothing: corpus and tokenizer, target v1, its next versions, draft, bundle, evaluation.

    draft-export family --size smoke --corpus DIR --out DIR

The corpus and bundle stages need only a CPU; the others take minutes on one GPU. A stage whose result exists is
skipped, and a stage that was killed goes on from its last checkpoint, so the same command may simply be given again.
Controls (a standalone draft of the same cost, and drafts that are made anew for each version) are made for the
evaluation alone, and not shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from edge_runtime.contract.errors import FlexSpecError, InputError
from export import cards
from export.agreement import measure
from export.checkpoints import save_model
from export.corpus import CPP, DOMAINS, PYTHON, STUBS, Corpus, gather
from export.distillation import Objective, distil
from export.drafts import load_draft, save_draft
from export.evolution import evolve, load_evolved, save_adapter, save_changes, tune
from export.layouts import LAYOUTS, DraftPlan, build_draft, plan_draft
from export.samples import sample
from export.sizes import SIZES, Size
from export.target import load_target, pretrain
from export.teachers import plain, siblings
from export.tokens import Mixture, TokenStream, read_ids, tokenise, write_ids
from export.training import Curve, Plan, write_json
from export.vocabulary import TOKENIZER_FILES, save_tokenizer, train_tokenizer

STAGES = ("corpus", "target", "evolve", "evolve-v3", "evolve-v4", "distill", "bundle", "controls", "evaluate")
TRAINED_STAGES = ("target", "evolve", "tune", "distill")
TARGET, DRAFT, BUNDLE, EVALUATION = "target-v1", "draft-anchor", "bundle", "evaluation"
# The next versions, and what they are for; the last is trained in full where drafts share nothing.
LORAS = {"target-v2": CPP.name, "target-v3": STUBS.name}
TUNED = "target-v4"
CONTROLS, STANDALONE = "controls", "standalone"
# Shares of the text that the tokenizer, the next version and the draft learn from.
TOKENIZER_CPP_SHARE = 0.15
EVOLVED_SHARE = 0.8
TUNED_SHARES = {"python": 0.4, "cpp": 0.3, "stubs": 0.3}
# Accepted as often as fp32, which fewer bits are not: see the table in `export/family/README.md`.
SHIPPED_WEIGHTS = "int8"
DRAFT_SHARES = {"python": 0.5, "cpp": 0.2, "stubs": 0.1, "samples": 0.2}


@dataclass(frozen=True)
class Recipe:
    """One run: how big, from where, to where, on what."""

    size: Size
    corpus: Path
    out: Path
    device: torch.device
    objective: Objective = "mixed"
    compiled: bool = False

    def make_corpus(self) -> None:
        """Gathers text, learns the tokenizer, and writes one token stream per domain and split."""
        gathered = [gather(domain, most_bytes=self.size.corpus_bytes[domain.name]) for domain in DOMAINS]
        tokenizer = train_tokenizer(self._tokenizer_text(gathered), self.size.shape.vocabulary)
        save_tokenizer(tokenizer, self.corpus / "tokenizer", context=self.size.shape.context)
        tokens = {}
        for corpus in gathered:
            for split, held_out in (("train", False), ("held-out", True)):
                texts = (document.text for document in corpus.documents if document.held_out == held_out)
                ids = tokenise(tokenizer, texts)
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
                frozen_blocks=self.size.shared_blocks,
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

    def make_draft(self) -> None:
        """Distils the anchor draft from target v1 and its siblings, and measures it against all versions."""
        target = load_target(self.out / TARGET, self.device)
        with self._made(DRAFT) as (directory, checkpoint):
            curve, plan = self._distil(target, "anchor", self.size.siblings, directory, checkpoint)
            del target
            agreement = self.measure(directory)
            facts = self._facts(self.size.distill, curve) | {
                "new_blocks": plan.new_blocks,
                "shared_blocks": plan.shared_blocks,
                "objective": self.objective,
                "agreement": cards.agreement_table(agreement),
            }
            cards.write_card(directory, cards.DRAFT, facts)
        self._record("distill", {"objective": self.objective, **vars(curve), "agreement": agreement})

    def make_bundle(self) -> None:
        """Exports the draft for the board; measured on the beginning of the held-out text."""
        # The exporters are build-time tools that a training machine need not have.
        from export.bundling import BundleOrder, make_bundle

        ids = read_ids(self._stream_path(PYTHON.name, "held-out"))[: self.size.parity_tokens]
        tokenizer = Tokenizer.from_file(str(self.corpus / "tokenizer" / "tokenizer.json"))
        order = BundleOrder(
            self.out / TARGET, self.out / DRAFT, "fused", SHIPPED_WEIGHTS, tokenizer.decode(ids.tolist())
        )
        manifest = make_bundle(order, self.out / BUNDLE, lambda step: print(f"bundle: {step}", flush=True))
        print(f"bundle: {manifest.parity}, acceptance {manifest.acceptance}", flush=True)

    def make_controls(self) -> None:
        """Drafts to compare the shipped one with: as deep, and taught in the same way, as far as that can be."""
        size = self.size
        for name in (STANDALONE, *LORAS, TUNED):
            place = self.out / CONTROLS / name
            if place.exists():
                continue
            layout, version = ("standalone", TARGET) if name == STANDALONE else ("anchor", name)
            with self._made(f"{CONTROLS}/{name}") as (directory, checkpoint):
                # A draft that is made for one version need not think of others.
                count = size.siblings if name == STANDALONE else 0
                self._distil(self._load(version), layout, count, directory, checkpoint)

    def make_evaluation(self) -> None:
        """The table: the frozen draft beside drafts made anew for each version, and beside one that shares nothing."""
        from export.contestants import TorchProposer
        from export.evaluation import Order, evaluate

        def draft(directory: Path) -> TorchProposer:
            return TorchProposer(load_draft(directory, self.out / TARGET).to(self.device))

        drafts = {"anchor": draft(self.out / DRAFT), STANDALONE: draft(self.out / CONTROLS / STANDALONE)}
        versions = {version: partial(self._load, version) for version in (TARGET, *LORAS, TUNED)}
        texts = {domain.name: read_ids(self._stream_path(domain.name, "held-out")) for domain in DOMAINS}
        # Made anew for target v1, the draft is itself.
        retrained = {TARGET: drafts["anchor"]}
        retrained |= {version: draft(self.out / CONTROLS / version) for version in (*LORAS, TUNED)}
        evaluation = evaluate(drafts, versions, texts, retrained=retrained, order=Order(*self.size.evaluated))
        place = self.out / EVALUATION
        scratch = self.out / f"{EVALUATION}.partial"
        scratch.mkdir(exist_ok=True)
        write_json(scratch / "evaluation.json", evaluation.record())
        (scratch / "README.md").write_text(evaluation.markdown(), encoding="utf-8")
        evaluation.picture(scratch / "evaluation.png")
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
                found = measure(target, draft, text, windows=self.size.windows, length=length)
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

    def _distil(
        self, target: PreTrainedModel, layout: str, count: int, directory: Path, checkpoint: Path
    ) -> tuple[Curve, DraftPlan]:
        """Makes a draft of `target`, taught by it and by so many siblings of it."""
        size = self.size
        target.requires_grad_(False)
        shared = size.shared_blocks if LAYOUTS[layout].shares else 0
        # All drafts are equally deep, so that they cost the board the same.
        new = size.new_blocks + size.shared_blocks - shared
        draft, plan = build_draft(target, layout, new_blocks=new, shared_blocks=shared)
        domains = {name: share for name, share in DRAFT_SHARES.items() if name != "samples"}
        text = Mixture(
            (*self._mixture(domains).parts, (self._samples(), DRAFT_SHARES["samples"])),
        )
        # What the anchor draft shares stays as it is in every sibling, whoever learns from them.
        anchor = plan_draft(target.config, "anchor", new_blocks=size.new_blocks, shared_blocks=size.shared_blocks)
        teachers = [plain(target), *siblings(target, anchor, count, size.strength)]
        curve = distil(teachers, draft, text, size.distill, objective=self.objective, checkpoint=checkpoint)
        save_draft(draft, plan, self.out / TARGET, directory)
        return curve, plan

    def _mixture(self, shares: Mapping[str, float]) -> Mixture:
        return Mixture(tuple((self._stream(name, "train"), share) for name, share in shares.items()))

    @contextmanager
    def _made(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Gives a directory to fill and a checkpoint path; the directory appears under its name only when whole."""
        partial, checkpoint = self.out / f"{name}.partial", self.out / f"{name}.checkpoint"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial, checkpoint
        partial.replace(self.out / name)
        checkpoint.unlink(missing_ok=True)

    def _samples(self) -> TokenStream:
        """What target v1 wrote, from disk if an earlier run got this far."""
        path = self.out / "samples.xz"
        if not path.is_file():
            ids = sample(self._load(TARGET), self._stream(PYTHON.name, "train"), self.size.samples)
            write_ids(path, ids)
        return TokenStream.of(read_ids(path), self.device)

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
        return TokenStream.of(read_ids(self._stream_path(domain, split)), self.device)

    def _sources(self) -> dict:
        return json.loads((self.corpus / "sources.json").read_text(encoding="utf-8"))

    def _record(self, stage: str, content: dict[str, object]) -> None:
        """Adds a stage's curve and results to `training.json`."""
        path = self.out / "training.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, record | {stage: content})

    @staticmethod
    def _facts(plan: Plan, curve: Curve) -> dict[str, object]:
        return {"steps": plan.steps, "batch": plan.rows * plan.length, "loss": curve.losses[-1]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run."""
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of tokenizer and token streams")
    parser.add_argument("--out", type=Path, required=True, help="directory of the models")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--objective", choices=get_args(Objective), default="mixed", help="what the draft minimises")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the target's training step")
    parser.add_argument("--steps", action="append", default=[], metavar="STAGE=N", help="other than the size's steps")


def run_with(options: argparse.Namespace) -> int:
    """Runs the stages that `options` ask for and that are not yet done. Raises FlexSpecError."""
    recipe = Recipe(
        with_steps(SIZES[options.size], options.steps),
        options.corpus,
        options.out,
        torch.device(options.device),
        options.objective,
        options.compile,
    )
    run(recipe, STAGES if options.stage == "all" else (options.stage,))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The same as `draft-export family`, for a training machine that lacks the exporters."""
    parser = argparse.ArgumentParser(prog="python -m export.recipe", description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        return run_with(parser.parse_args(arguments))
    except FlexSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Runs `stages` in order, leaving out those whose result is there."""
    makers = {
        "corpus": (recipe.corpus / "sources.json", recipe.make_corpus),
        "target": (recipe.out / TARGET, recipe.make_target),
        "evolve": (recipe.out / "target-v2", partial(recipe.make_evolved, "target-v2")),
        "evolve-v3": (recipe.out / "target-v3", partial(recipe.make_evolved, "target-v3")),
        "evolve-v4": (recipe.out / TUNED, recipe.make_tuned),
        "distill": (recipe.out / DRAFT, recipe.make_draft),
        "bundle": (recipe.out / BUNDLE, recipe.make_bundle),
        "controls": (recipe.out / CONTROLS / TUNED, recipe.make_controls),
        "evaluate": (recipe.out / EVALUATION, recipe.make_evaluation),
    }
    for stage in stages:
        result, make = makers[stage]
        if result.exists():
            print(f"{stage}: {result} is there, nothing to do (delete it to make it again)", flush=True)
            continue
        started = time.monotonic()
        make()
        print(f"{stage}: {result} made in {time.monotonic() - started:.0f} s", flush=True)


def with_steps(size: Size, overrides: list[str]) -> Size:
    """The size with other numbers of steps.

    Raises:
        InputError: an override is not `target=N`, `evolve=N`, `tune=N` or `distill=N`.
    """
    for override in overrides:
        stage, _, steps = override.partition("=")
        if stage not in TRAINED_STAGES or not steps.isdigit() or int(steps) < 1:
            raise InputError(f"--steps {override}: write one of {', '.join(TRAINED_STAGES)}, =, and a number")
        size = replace(size, **{stage: replace(getattr(size, stage), steps=int(steps))})
    return size


if __name__ == "__main__":
    raise SystemExit(main())
