"""`draft-export family`: makes the example family, stage by stage."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.common.options import number, whole_number
from edge_runtime.protocol.errors import InputError
from export.cli.choices import FAMILY_SIZES
from export.cli.former_options import add_former_start_option

if TYPE_CHECKING:
    from export.example_family.recipe import FamilyRecipe

DESCRIPTION = """\
Makes the example family from SOURCE, the Hugging Face directory or GGUF file of a chat model: later versions of it, a
frozen draft, its bundle, the drafts that it is compared with, and the comparison.

  draft-export family SmolLM2-135M-Instruct.Q4_1.gguf --output family               # one H200, half an hour
  draft-export family SmolLM2-135M-Instruct.Q4_1.gguf --output family --stage bundle
  draft-export family SmolLM2-135M-Instruct.Q4_1.gguf --output family --stage distill --from-draft bundle --minutes 10

The stages target, corpus and bundle need only a CPU; the others take minutes on one GPU. A stage whose result exists is
skipped, and an interrupted stage resumes, so that the same command can be given again. Stand-ins for future versions
(LoRAs of target v1) teach the draft's blocks; stage distill trains these on, with a head of their own. Stand-ins and
retrained drafts are not shipped.

With several GPUs, run the stages futures, chats and retrain once for each, with `--only NAME`, or let the GPUs share a
stage (chats, blocks, distill, retrain):

  torchrun --nproc-per-node 2 -m export.cli family SmolLM2-135M-Instruct.Q4_1.gguf --output family --stage chats distill
"""

STAGES = (
    *("target", "corpus", "questions", "futures", "evolve-v2", "evolve-v3", "evolve-v4", "chats"),
    *("blocks", "distill", "bundle", "retrain", "evaluate"),
)
# Stages that several processes can share.
SHARED_STAGES = {"chats", "blocks", "distill", "retrain"}


def add_parser(commands: Any) -> None:
    """Add `family` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "family",
        help="make the example family",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="Hugging Face directory, or GGUF file, of target v1")
    parser.add_argument("--output", dest="out", type=Path, required=True, metavar="DIR", help="directory of the models")
    parser.add_argument("--size", choices=FAMILY_SIZES, default="full", help="default: %(default)s")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES, help="default: all")
    parser.add_argument("--device", help="of PyTorch (default: cuda if available, else cpu)")
    parser.add_argument(
        "--from-draft",
        dest="start",
        type=Path,
        metavar="DRAFT",
        help="draft or bundle that stage distill trains on (default: stage blocks')",
    )
    add_former_start_option(parser)
    parser.add_argument(
        "--add-blocks", type=whole_number(), default=0, metavar="N", help="blocks that --from-draft gets in addition"
    )
    parser.add_argument("--minutes", type=number(), metavar="M", help="bound on the training of stage distill")
    parser.add_argument(
        "--only", metavar="NAME", help="only this one of the futures, or this version's chats or retrained draft"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the selected stages that are not done yet. Returns the exit code; raises FlexSpecError."""
    from export.draft.training_group import TrainingGroup, worker_device
    from export.example_family.recipe import FamilyRecipe
    from export.example_family.sizes import SIZES

    device = worker_device(options.device)
    group = TrainingGroup.join(device)
    if group.size > 1 and not set(options.stage) <= SHARED_STAGES:
        raise InputError(f"torchrun is for --stage {', '.join(sorted(SHARED_STAGES))}: run the others with one process")
    recipe = FamilyRecipe(
        size=SIZES[options.size],
        source=options.source,
        out=options.out,
        device=device,
        group=group,
        start=options.start,
        added_blocks=options.add_blocks,
        minutes=options.minutes,
        only=options.only,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    stages = _stage_functions(recipe)
    for stage in options.stage:
        result, make = stages[stage]
        if result.exists():
            print(f"{stage}: {result} exists, nothing to do (delete it to make it again)", flush=True)
            continue
        started = time.monotonic()
        make()
        if group.is_first:
            print(f"{stage}: {result} made in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _stage_functions(recipe: FamilyRecipe) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Result of each stage, and the function that makes it."""
    from export.example_family import recipe as names

    out = recipe.out
    return {
        "target": (out / names.TARGET, recipe.make_target),
        "corpus": (out / "corpus", recipe.make_corpus),
        "questions": (out / "questions.jsonl", recipe.make_questions),
        "futures": (out / (recipe.only or [*names.FUTURES][-1]), recipe.make_futures),
        "evolve-v2": (out / "target-v2", partial(recipe.make_version, "target-v2")),
        "evolve-v3": (out / "target-v3", partial(recipe.make_version, "target-v3")),
        "evolve-v4": (out / names.TUNED, recipe.make_tuned),
        "chats": (recipe.chats_complete(recipe.only or names.VERSIONS[-1]), recipe.make_chats),
        "blocks": (out / names.BLOCKS, recipe.make_blocks),
        "distill": (out / names.DRAFT, recipe.make_draft),
        "bundle": (out / names.BUNDLE, recipe.make_bundle),
        "retrain": (out / names.RETRAINED / (recipe.only or names.VERSIONS[-1]), recipe.make_retrained),
        "evaluate": (out / names.EVALUATION, recipe.make_evaluation),
    }
