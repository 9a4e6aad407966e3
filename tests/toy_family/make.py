"""Make the toy family: small models that write Python, trained from scratch, for fast tests.

    python -m tests.toy_family.make WORK --out tests/toy_family        # one GPU, ten minutes

WORK keeps text, tokenizer and intermediate models; give the same command again after an interruption. The corpus is
source text of the packages installed for the interpreter, scipy among them. The text stage needs only a CPU.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from cloud_verifier.model.target import load_model
from export.data.corpus import CPP, PYTHON, Domain, Source, gather_corpus
from export.data.token_stream import DOCUMENT_SEPARATOR, MixedStream, TokenStream, tokenize_texts
from export.draft.distillation_config import DistillationConfig
from export.draft.distillation_run import distill
from export.draft.training import TrainingSchedule
from export.example_family.evolution import evolve, save_adapter, save_changes, tune
from tests.toy_family import VOCABULARY_SIZE
from tests.toy_family.base_target import TargetShape, pretrain, save_model
from tests.toy_family.tokenizer import END_OF_TEXT_ID, TOKENIZER_FILES, save_tokenizer, train_tokenizer

STUBS = Domain(
    "stubs",
    (".pyi",),
    (
        # The stubs come from typeshed, which is Apache-2.0 with parts under MIT.
        Source("mypy", "Apache-2.0 AND MIT", "MIT", ("mypy",), 4),
        Source("torch", "BSD-3-Clause", "BSD", ("torch",), 3),
        Source("numpy", "BSD-3-Clause", "BSD", ("numpy",), 2),
        Source("matplotlib", "PSF-2.0", "Python Software Foundation", ("matplotlib",), 1),
        Source("tokenizers", "Apache-2.0", "Apache", ("tokenizers",), 1),
        Source("cryptography", "Apache-2.0", "Apache", ("cryptography",), 1),
        Source("onnx", "Apache-2.0", "Apache", ("onnx",), 1),
        Source("scipy", "BSD-3-Clause", "BSD", ("scipy",), 1),
        Source("pillow", "MIT-CMU", "MIT", ("PIL",), 1),
    ),
)
DOMAINS = (PYTHON, CPP, STUBS)
CORPUS_BYTES = {"python": 16_000_000, "cpp": 5_000_000, "stubs": 3_000_000}
SHAPE = TargetShape(VOCABULARY_SIZE, 192, 4, 448, heads=3, kv_heads=1, head_dim=64, context=2048)
PRETRAINING = TrainingSchedule(2500, 2e-3, 96, 512, long_length=2048, long_share=0.1, warm_up=200)
EVOLUTION = TrainingSchedule(250, 1e-3, 96, 512, warm_up=40, weight_decay=0.0)
TUNING = TrainingSchedule(250, 3e-4, 96, 512, warm_up=40)
DISTILLATION = TrainingSchedule(1500, 1e-3, 96, 512, long_length=2048, long_share=0.1)
RANK, TUNED_BLOCK, NEW_BLOCKS = 8, 2, 2
SAMPLED_TOKENS = 1_000_000
# The text of each LoRA, and of the stand-ins for future versions that teach the draft, as shares by domain.
LORAS = {"target-v2": {"cpp": 0.8, "python": 0.2}, "target-v3": {"stubs": 0.8, "python": 0.2}}
FUTURES = {"future-cpp": {"cpp": 0.7, "python": 0.3}, "future-stubs": {"stubs": 0.7, "python": 0.3}}
TUNED_SHARES = {"python": 0.4, "cpp": 0.3, "stubs": 0.3}
STAGES = ("text", "target", "versions", "draft")


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--speed-up", type=int, default=1, help="divide steps and rows by this, to try the recipe out")
    options = parser.parse_args()
    family = ToyFamily(options.work, options.out, torch.device(options.device), options.speed_up)
    for stage in options.stage:
        getattr(family, f"make_{stage}")()


class ToyFamily:
    """The recipe; see the module."""

    def __init__(self, work: Path, out: Path, device: torch.device, speed_up: int) -> None:
        self._work, self._out, self._device, self._speed_up = work, out, device, speed_up

    def make_text(self) -> None:
        """Collect the text of each domain."""
        for domain in DOMAINS:
            for held_out in (False, True):
                path = self._text_path(domain.name, held_out)
                if not path.exists():
                    documents = gather_corpus(domain, max_bytes=CORPUS_BYTES[domain.name]).documents
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(
                        DOCUMENT_SEPARATOR.join(d.text for d in documents if d.held_out == held_out), encoding="utf-8"
                    )

    def make_target(self) -> None:
        """Train the tokenizer and target v1."""
        tokenizer_path = self._work / "tokenizer"
        if not tokenizer_path.exists():
            texts = [self._text_path(name).read_text(encoding="utf-8") for name in ("python", "cpp")]
            save_tokenizer(
                train_tokenizer(iter([texts[0][:12_000_000], texts[1][:2_000_000]]), SHAPE.vocabulary),
                tokenizer_path,
                context=SHAPE.context,
            )

        def train(directory: Path) -> None:
            text = self._stream({"python": 1.0})
            model = pretrain(SHAPE, text, self._schedule(PRETRAINING), self._device, compiled=self._on_gpu)
            save_model(model, directory)
            for name in TOKENIZER_FILES:
                shutil.copy(tokenizer_path / name, directory)

        self._make(self._out / "target-v1", train)

    def make_versions(self) -> None:
        """Train the LoRAs, the stand-ins for future ones, and the version with a block trained in full."""

        def train_lora(directory: Path, shares: dict[str, float], rank: int, seed: int) -> None:
            schedule = replace(self._schedule(EVOLUTION), seed=seed)
            model, _ = evolve(self._load(), self._stream(shares), schedule, rank=rank, frozen_blocks=1)
            save_adapter(model, directory, "../target-v1")

        for seed, (name, shares) in enumerate([*LORAS.items(), *FUTURES.items()]):
            parent, rank = (self._out, RANK) if name in LORAS else (self._work, 2 * RANK)
            self._make(parent / name, lambda directory, s=shares, r=rank, n=seed: train_lora(directory, s, r, n))

        def train_block(directory: Path) -> None:
            model = self._load()
            tune(model, self._stream(TUNED_SHARES), self._schedule(TUNING), [TUNED_BLOCK])
            save_changes(model, self._out / "target-v1", directory, "../target-v1")

        self._make(self._out / "target-v4", train_block)

    def make_draft(self) -> None:
        """Distill the draft."""
        target = self._work / "target-v1"
        if not target.exists():
            shutil.copytree(self._out / "target-v1", target)
        output = self._out / "draft-anchor"
        if not output.exists():
            config = DistillationConfig(
                target=target,
                plan=self._schedule(DISTILLATION),
                texts=tuple(self._text_path(domain.name) for domain in DOMAINS),
                samples=SAMPLED_TOKENS // self._speed_up,
                new_blocks=NEW_BLOCKS,
                versions=tuple(self._work / name for name in FUTURES),
            )
            distill(config, output, self._device)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _schedule(self, schedule: TrainingSchedule) -> TrainingSchedule:
        steps, rows = max(2, schedule.steps // self._speed_up), max(8, schedule.rows // self._speed_up)
        return replace(schedule, steps=steps, rows=rows)

    def _make(self, output: Path, train: Callable[[Path], None]) -> None:
        if output.exists():
            return
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        train(partial)
        partial.replace(output)

    def _load(self) -> torch.nn.Module:
        model: torch.nn.Module = load_model(self._out / "target-v1", str(self._device), torch.float32)[0]
        return model

    def _text_path(self, domain: str, held_out: bool = False) -> Path:
        return self._work / ("held-out" if held_out else "train") / f"{domain}.txt"

    def _stream(self, shares: dict[str, float]) -> MixedStream:
        parts = []
        for name, share in shares.items():
            path = self._work / f"{name}.npy"
            if not path.exists():
                tokenizer = Tokenizer.from_file(str(self._work / "tokenizer" / "tokenizer.json"))
                text = self._text_path(name).read_text(encoding="utf-8")
                np.save(path, tokenize_texts(tokenizer, text.split(DOCUMENT_SEPARATOR), end_id=END_OF_TEXT_ID))
            parts.append((TokenStream.from_ids(np.load(path), self._device), share))
        return MixedStream(tuple(parts))


if __name__ == "__main__":
    main()
