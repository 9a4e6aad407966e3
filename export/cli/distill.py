"""`draft-export distill`: trains a draft for a target."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.protocol.errors import InputError
from export.cli.choices import LAYOUTS, OBJECTIVES

DESCRIPTION = """\
Trains a draft for TARGET by distillation: new blocks learn TARGET's distribution, next to frozen tensors of TARGET.
After an interruption, give the same command again: training resumes from its last checkpoint. The result goes to
--output, with distill.json (parameters, texts, seeds, and agreement on held-out text) and distill.png (the loss);
`draft-export onnx TARGET OUTPUT` packs it for boards.

examples:
  draft-export distill /models/Llama-3.1-8B --text corpus/ --output draft                    # one GPU, hours
  draft-export distill /models/Llama-3.1-8B --text corpus/ --rows 64 --accumulate 16 --output draft
  draft-export distill export/example_family/target-v1 --text corpus/ \\
      --steps 20 --rows 4 --length 64 --output /tmp/draft
  draft-export distill target --text a.txt b/ --siblings 3 --samples 2000000 --layout prefix --output draft
"""


def add_parser(commands: Any) -> None:
    """Add `distill` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "distill",
        help="train a draft for a target",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="Hugging Face directory of the target")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="PATH", help="UTF-8 files, or folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the draft; must not exist")
    parser.add_argument("--layout", choices=LAYOUTS, default="anchor", help="default: %(default)s")
    parser.add_argument("--new-blocks", type=int, default=2, metavar="N", help="trained blocks (default: %(default)s)")
    parser.add_argument(
        "--shared-blocks", type=int, default=1, metavar="N", help="blocks of the target's own (default: %(default)s)"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--objective", choices=OBJECTIVES, default="mixed", help="loss (default: %(default)s)")
    training.add_argument(
        "--siblings", type=int, default=2, metavar="N", help="perturbed targets as further teachers (%(default)s)"
    )
    training.add_argument(
        "--strength", type=float, default=0.1, help="size of the perturbation relative to each matrix (%(default)s)"
    )
    training.add_argument(
        "--samples", type=int, default=0, metavar="TOKENS", help="further training text that the target generates (0)"
    )
    training.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    training.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    training.add_argument("--rows", type=int, default=96, help="texts in a batch (default: %(default)s)")
    training.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    training.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="split a batch into N parts, to save memory (1)"
    )
    training.add_argument("--warm-up", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    training.add_argument("--device", help="of PyTorch (default: cuda if available, else cpu)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    import torch

    from cloud_verifier.draft_models.layouts import LAYOUTS as LAYOUT_DEFINITIONS
    from export.draft.distillation_run import DistillationConfig, distill
    from export.draft.training import TrainingSchedule

    if options.siblings < 0 or options.samples < 0:
        raise InputError("--siblings and --samples must be at least 0")
    plan = TrainingSchedule(
        options.steps,
        options.rate,
        options.rows,
        options.length,
        warm_up=options.warm_up,
        seed=options.seed,
        accumulate=options.accumulate,
    )
    order = DistillationConfig(
        target=options.target,
        texts=tuple(options.text),
        plan=plan,
        layout=options.layout,
        new_blocks=options.new_blocks,
        shared_blocks=options.shared_blocks if LAYOUT_DEFINITIONS[options.layout].shares else 0,
        objective=options.objective,
        samples=options.samples,
        siblings=options.siblings,
        strength=options.strength,
    )
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    agreement = distill(order, options.output, device)
    print(
        f"{options.output}: acceptance on held-out text {agreement.greedy:.1%} at T=0, {agreement.coupled:.1%} at T=1"
    )
    return 0
