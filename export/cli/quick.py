"""`draft-export quick`: from a target to a bundle in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_option, whole_number
from edge_runtime.protocol.errors import InputError

DESCRIPTION = """\
Makes a bundle for TARGET in minutes on a CPU, from TARGET and nothing else, and says what acceptance to expect.

With --sibling, the draft is that model: a small one with TARGET's own tokenizer (Llama-3.2-1B for Llama-3.1-8B,
Qwen3-0.6B for larger ones). It is the better draft. Without one, two blocks of TARGET are tuned for --minutes on chats
that TARGET writes itself. `draft-export distill` on a GPU reaches several times the acceptance; until then the planner
on the board streams from the verifier whenever drafting does not pay.

examples:
  draft-export quick family/target-v1 --output bundle
  draft-export quick /models/Llama-3.1-8B-Instruct --sibling /models/Llama-3.2-1B-Instruct --output bundle
  draft-export quick model.gguf --minutes 30 --output bundle
"""


def add_parser(commands: Any) -> None:
    """Add `quick` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "quick",
        help="make a bundle in minutes, on a CPU",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="Hugging Face directory or GGUF file of the target")
    add_option(parser, "--sibling MODEL", "small model with the same tokenizer, as the draft", type=Path)
    add_option(parser, "--output DIR", "the bundle; must not exist", type=Path, required=True)
    add_option(parser, "--minutes", "time for tuning", default=10.0)
    parser.add_argument("--seed", type=whole_number(), default=0, help="default: %(default)s")
    add_option(parser, "--device", "of PyTorch (default: cuda if available, else cpu)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    import shutil

    import torch

    from cloud_verifier.acceptance.measure import read_calibration_text
    from export.bundle.build import BUILD_STEPS, BundleConfig, make_bundle
    from export.common.progress import Progress
    from export.draft.quick import QuickConfig, measure_sibling, tune_cut_layers

    if not options.minutes > 0:
        raise InputError("--minutes must be more than 0")
    if options.output.exists():
        raise InputError(f"{options.output} exists: choose another --output or remove it")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    draft = options.output.with_name(options.output.name + ".draft")
    if options.sibling is not None:
        draft = options.sibling
        agreements = measure_sibling(options.target, draft, device, options.seed)
    else:
        shutil.rmtree(draft, ignore_errors=True)
        agreements = tune_cut_layers(QuickConfig(options.target, draft, options.minutes, options.seed), device)
    config = BundleConfig(options.target, draft, "fused", "int8", read_calibration_text(), acceptance=False)
    with Progress("bundle", len(BUILD_STEPS)) as progress:
        make_bundle(config, options.output, lambda step: progress.update(BUILD_STEPS.index(step), step))
    if options.sibling is None:
        shutil.rmtree(draft)
        shutil.rmtree(draft.with_name(draft.name + ".chats"), ignore_errors=True)
    cells = (f"{agreement.accepted[t]:.0%} at {t}" for t, agreement in agreements.items())
    print(f"{options.output}: expect about {', '.join(cells)} of draft tokens to be accepted in chats")
    print(f"next: edge-runtime bundle install {options.output}; draft-export distill makes a better draft on a GPU")
    return 0
