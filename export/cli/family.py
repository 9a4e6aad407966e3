"""`draft-export family`: the example family from nothing: corpus and tokenizer, target v1, its next versions, draft,
bundle, evaluation.

    draft-export family --size smoke --corpus DIR --out DIR

The corpus and bundle stages need only a CPU; the others take minutes on one GPU. A stage whose result exists is
skipped, and a stage that was killed goes on from its last checkpoint, so the same command may simply be given again.
Futures (what target v1 may become: LoRAs towards several kinds of text) are teachers of the draft; they and the
controls (a standalone draft of the same cost, drafts made anew for each version, drafts taught otherwise) are not
shipped. With several GPUs, run `--stage futures` and `--stage controls` once for each with `--only NAME`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from edge_runtime.protocol.errors import FlexSpecError, InputError
from export.draft.distill import Objective
from export.example_family.recipe import BUNDLE, CONTROLS, DRAFT, EVALUATION, FUTURES, SETTLED, TARGET, TUNED, Recipe
from export.example_family.sizes import SIZES, Size

STAGES = (
    *("corpus", "target", "evolve", "evolve-v3", "evolve-v4", "futures"),
    *("distill", "bundle", "controls", "evaluate"),
)
TRAINED_STAGES = ("target", "evolve", "tune", "distill", "settle", "control")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run."""
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of tokenizer and token streams")
    parser.add_argument("--out", type=Path, required=True, help="directory of the models")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--objective", choices=get_args(Objective), default="mixed", help="what the draft minimises")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the target's training step, and drafts' loss")
    parser.add_argument("--only", metavar="NAME", help="of the futures or controls, this one")
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
        options.only,
    )
    run(recipe, STAGES if options.stage == "all" else (options.stage,))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The same as `draft-export family`, for a training machine that lacks the exporters."""
    parser = argparse.ArgumentParser(prog="python -m export.cli.family", description=__doc__)
    add_arguments(parser)
    try:
        return run_with(parser.parse_args(arguments))
    except FlexSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Runs `stages` in order, leaving out those whose result is there."""
    makers = _makers(recipe)
    for stage in stages:
        result, make = makers[stage]
        if result.exists():
            print(f"{stage}: {result} is there, nothing to do (delete it to make it again)", flush=True)
            continue
        started = time.monotonic()
        make()
        print(f"{stage}: {result} made in {time.monotonic() - started:.0f} s", flush=True)


def _makers(recipe: Recipe) -> dict[str, tuple[Path, Callable[[], None]]]:
    """What each stage leaves behind, and what makes it."""
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


def with_steps(size: Size, overrides: list[str]) -> Size:
    """The size with other numbers of steps.

    Raises:
        InputError: an override is not `STAGE=N` with one of TRAINED_STAGES.
    """
    for override in overrides:
        stage, _, steps = override.partition("=")
        if stage not in TRAINED_STAGES or not steps.isdigit() or int(steps) < 1:
            raise InputError(f"--steps {override}: write one of {', '.join(TRAINED_STAGES)}, =, and a number")
        size = replace(size, **{stage: replace(getattr(size, stage), steps=int(steps))})
    return size


if __name__ == "__main__":
    raise SystemExit(main())
