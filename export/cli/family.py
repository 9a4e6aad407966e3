"""`draft-export family`: builds the example family from scratch, stage by stage."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError
from export.cli.choices import FAMILY_SIZES, OBJECTIVES

if TYPE_CHECKING:
    from export.example_family.recipe import FamilyRecipe
    from export.example_family.sizes import FamilySize

DESCRIPTION = """\
Builds the example family from scratch: corpus and tokenizer, target v1, its next versions, draft, bundle, evaluation.

    draft-export family --size smoke --corpus DIR --out DIR

The corpus and bundle stages need only a CPU; the others take minutes on one GPU. A stage whose result exists is
skipped, and an interrupted stage resumes from its last checkpoint, so the same command can be given again. Futures
(possible later versions of target v1: LoRAs towards several kinds of text) are teachers of the draft. Futures and
controls (a standalone draft of the same cost, drafts retrained for each version, drafts trained otherwise) are not
shipped. With several GPUs, run `--stage futures` and `--stage controls` once for each, with `--only NAME`.
"""

STAGES = (
    *("corpus", "target", "evolve", "evolve-v3", "evolve-v4", "futures"),
    *("distill", "bundle", "controls", "evaluate"),
)
# Stages of a `FamilySize` whose number of steps --steps can change.
TRAINED_STAGES = ("target", "evolve", "tune", "distill", "settle", "control")


def add_parser(commands: Any) -> None:
    """Add `family` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "family",
        help="train the example family from scratch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=FAMILY_SIZES, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of tokenizer and token streams")
    parser.add_argument("--out", type=Path, required=True, help="directory of the models")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="mixed", help="loss of the draft (default: %(default)s)"
    )
    parser.add_argument("--device", help="of PyTorch (default: cuda if available, else cpu)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the target's training step and the loss of drafts"
    )
    parser.add_argument("--only", metavar="NAME", help="only this one of the futures or controls")
    parser.add_argument("--steps", action="append", default=[], metavar="STAGE=N", help="override the size's steps")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the selected stages that are not done yet. Returns the exit code; raises FlexSpecError."""
    import torch

    from export.example_family.recipe import FamilyRecipe
    from export.example_family.sizes import SIZES

    recipe = FamilyRecipe(
        size=override_steps(SIZES[options.size], options.steps),
        corpus=options.corpus,
        out=options.out,
        device=torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        objective=options.objective,
        compiled=options.compile,
        only=options.only,
    )
    stages = _stage_functions(recipe)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        result, make = stages[stage]
        if result.exists():
            print(f"{stage}: {result} exists, nothing to do (delete it to make it again)", flush=True)
            continue
        started = time.monotonic()
        make()
        print(f"{stage}: {result} made in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _stage_functions(recipe: FamilyRecipe) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Result of each stage, and the function that makes it."""
    from export.example_family.recipe import BUNDLE, CONTROLS, DRAFT, EVALUATION, FUTURES, SETTLED, TARGET, TUNED

    return {
        "corpus": (recipe.corpus / "sources.json", recipe.make_corpus),
        "target": (recipe.out / TARGET, recipe.make_target),
        "evolve": (recipe.out / "target-v2", partial(recipe.make_evolved, "target-v2")),
        "evolve-v3": (recipe.out / "target-v3", partial(recipe.make_evolved, "target-v3")),
        "evolve-v4": (recipe.out / TUNED, recipe.make_tuned),
        "futures": (recipe.out / "samples" / f"{recipe.only or [*FUTURES][-1]}.xz", recipe.make_futures),
        "distill": (recipe.out / DRAFT, recipe.make_draft),
        "bundle": (recipe.out / BUNDLE, recipe.make_bundle),
        "controls": (recipe.out / CONTROLS / (recipe.only or SETTLED), recipe.make_controls),
        "evaluate": (recipe.out / EVALUATION, recipe.make_evaluation),
    }


def override_steps(size: FamilySize, overrides: list[str]) -> FamilySize:
    """Return the size with other numbers of steps.

    Raises:
        InputError: an override is not `STAGE=N` with one of TRAINED_STAGES.
    """
    for override in overrides:
        stage, _, steps = override.partition("=")
        if stage not in TRAINED_STAGES or not steps.isdigit() or int(steps) < 1:
            raise InputError(f"--steps {override}: write one of {', '.join(TRAINED_STAGES)}, =, and a number")
        size = replace(size, **{stage: replace(getattr(size, stage), steps=int(steps))})
    return size
