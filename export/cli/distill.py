"""`draft-export distill`: trains a draft for a target."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.common.options import number, whole_number
from edge_runtime.protocol.errors import InputError
from export.cli.choices import DEFAULT_NEW_BLOCKS, DEFAULT_SHARED_BLOCKS, LAYOUTS, OBJECTIVES
from export.cli.former_options import add_former_start_option

if TYPE_CHECKING:
    from export.draft.agreement import Agreement

DESCRIPTION = """\
Trains a draft for TARGET by distillation: new blocks learn TARGET's distribution, next to frozen tensors of TARGET. The
training text is what TARGET writes itself: chats through its chat template (--chats), the user's turns too. Text from
files (--text) replaces or complements it: a model without a chat template needs it, and it prepares the draft for
domains that chats rarely touch. Further versions of TARGET (--versions) teach along, so that the draft fits them too.

After an interruption, give the same command again: it resumes. The result goes to --output, with distill.json
(parameters, seeds, curve, agreement on held-out text) and distill.png (the loss); the last line says what twice the
training would bring. `draft-export onnx TARGET OUTPUT` packs the draft for boards.

examples:
  draft-export distill /models/SmolLM2-135M-Instruct --chats 48000 --steps 8000 --output draft    # 20 minutes, one H200
  draft-export distill /models/Llama-3.1-8B-Instruct --chats 48000 --text docs/ --rows 64 --accumulate 16 --output draft
  torchrun --nproc-per-node 4 -m export.cli distill /models/Llama-3.1-8B-Instruct --chats 48000 \\
      --rows 256 --accumulate 4 --output draft                                          # four GPUs
  draft-export distill /models/base --text corpus/ --samples 2000000 --output draft               # no chat template
  draft-export distill tests/toy_family/target-v1 --text README.md \\
      --steps 20 --rows 4 --length 64 --output /tmp/draft
  draft-export distill /models/chat --chats 12000 --minutes 10 --head-bits 4 \\
      --from-draft draft --layout standalone --output draft2                                 # train its head as well
  draft-export distill /models/v2 --from-draft draft --chats 4000 --steps 800 --output draft-v2  # retrain for a version
"""

# Chosen: DEFAULT_STEPS gives a usable draft; --minutes reduces MOST_STEPS to what fits.
DEFAULT_STEPS, MOST_STEPS = 3000, 1_000_000


def add_parser(commands: Any) -> None:
    """Add `distill` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "distill",
        help="train a draft for a target",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="Hugging Face directory of the target")
    parser.add_argument(
        "--chats",
        type=whole_number(),
        default=0,
        metavar="N",
        help="chats that TARGET writes as training text; best: 12000 or more",
    )
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="PATH", help="UTF-8 files, or folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the draft; must not exist")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: that of --from-draft, or anchor")
    parser.add_argument(
        "--new-blocks",
        type=whole_number(),
        default=DEFAULT_NEW_BLOCKS,
        metavar="N",
        help="trained blocks (default: %(default)s)",
    )
    parser.add_argument(
        "--shared-blocks",
        type=whole_number(),
        default=DEFAULT_SHARED_BLOCKS,
        metavar="N",
        help="blocks of the target's own (default: %(default)s)",
    )
    parser.add_argument(
        "--from-draft",
        dest="start",
        type=Path,
        metavar="DRAFT",
        help="continue from this draft or bundle instead of TARGET's blocks; with --layout standalone, train its head "
        "too",
    )
    add_former_start_option(parser)
    parser.add_argument(
        "--add-blocks",
        type=whole_number(),
        default=0,
        metavar="N",
        help="blocks that --from-draft gets in addition; the draft is the same function until they are trained",
    )
    parser.add_argument(
        "--head-bits", type=int, choices=(4,), help="train with the head as a bundle `int8-head4` rounds it"
    )
    parser.add_argument(
        "--block-bits",
        type=whole_number(),
        choices=(4,),
        help="train with the blocks as a bundle `int4-fitted` rounds them; that has --head-bits 4 as well",
    )
    teachers = parser.add_argument_group("teachers and text")
    teachers.add_argument(
        "--versions",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="further versions of TARGET that teach along",
    )
    teachers.add_argument(
        "--siblings",
        type=whole_number(),
        default=1,
        metavar="N",
        help="perturbed copies of TARGET that teach along, in memory too (default: %(default)s)",
    )
    teachers.add_argument(
        "--strength",
        type=number(),
        default=0.1,
        help="size of the perturbation relative to each matrix (default: %(default)s)",
    )
    teachers.add_argument(
        "--future-share",
        type=number(),
        default=0.3,
        help="share of versions and siblings in a batch (default: %(default)s)",
    )
    teachers.add_argument(
        "--text-share",
        type=number(),
        default=0.25,
        help="share of --text in a batch if there are chats too (default: %(default)s)",
    )
    teachers.add_argument(
        "--keep-chats", type=Path, metavar="DIR", help="keep the chats there, and reuse those of an earlier training"
    )
    teachers.add_argument(
        "--samples",
        type=whole_number(),
        default=0,
        metavar="TOKENS",
        help="tokens that TARGET writes after pieces of --text (default: 0)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--objective", choices=OBJECTIVES, default="mixed", help="loss (default: %(default)s)")
    training.add_argument(
        "--steps",
        type=whole_number(),
        help=f"default: {DEFAULT_STEPS}, or as many as --minutes allows",
    )
    training.add_argument(
        "--minutes",
        type=number(),
        metavar="M",
        help="train for M minutes, without the writing of chats and the evaluation at the end",
    )
    training.add_argument("--rate", type=number(), default=1e-3, help="peak learning rate (default: %(default)s)")
    training.add_argument("--rows", type=whole_number(), default=64, help="texts in a batch (default: %(default)s)")
    training.add_argument("--length", type=whole_number(), default=512, help="tokens of each (default: %(default)s)")
    training.add_argument(
        "--accumulate",
        type=whole_number(),
        default=1,
        metavar="N",
        help="split a batch into N parts, to save memory (default: 1)",
    )
    training.add_argument("--warm-up", type=whole_number(), default=100, metavar="STEPS", help="default: %(default)s")
    training.add_argument(
        "--held-out-chats",
        type=whole_number(),
        default=192,
        metavar="N",
        help="chats for each temperature that the draft is evaluated on, if there are chats (default: %(default)s)",
    )
    training.add_argument("--seed", type=whole_number(), default=0, help="default: %(default)s")
    training.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile blocks and loss (default: on a GPU)",
    )
    training.add_argument("--device", help="of PyTorch (default: cuda if available, else cpu)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from export.draft.distillation_config import DistillationConfig
    from export.draft.distillation_run import MONITORED_TEMPERATURE, distill
    from export.draft.training import TrainingSchedule
    from export.draft.training_group import TrainingGroup, worker_device

    if not 0 < options.text_share < 1:
        raise InputError(f"--text-share is between 0 and 1, not {options.text_share:g}: without --text, it is not used")
    if options.add_blocks and options.start is None:
        raise InputError("--add-blocks needs --from-draft; a draft of its own has --new-blocks")
    config = DistillationConfig(
        target=options.target,
        plan=TrainingSchedule(
            options.steps or (DEFAULT_STEPS if options.minutes is None else MOST_STEPS),
            options.rate,
            options.rows,
            options.length,
            warm_up=options.warm_up,
            seed=options.seed,
            accumulate=options.accumulate,
        ),
        texts=tuple(options.text),
        chats=options.chats,
        text_share=options.text_share,
        chats_directory=options.keep_chats,
        evaluated_chats=options.held_out_chats,
        layout=options.layout,
        new_blocks=options.new_blocks,
        shared_blocks=options.shared_blocks,
        objective=options.objective,
        samples=options.samples,
        versions=tuple(options.versions),
        siblings=options.siblings,
        strength=options.strength,
        future_share=options.future_share,
        start=options.start,
        added_blocks=options.add_blocks,
        minutes=options.minutes,
        head_bits=options.head_bits,
        block_bits=options.block_bits,
        compiled=options.compile,
    )
    device = worker_device(options.device)
    group = TrainingGroup.join(device)
    result = distill(config, options.output, device, group)
    if not group.is_first:
        return 0
    own_chats = [(agreement, temperature) for temperature, agreement in result.chats.items()]
    rows = []
    for name, agreements in (
        ("given text", _by_temperature(result.text)),
        ("chats, each written and judged at one temperature", own_chats),
        ("chats written at temperatures above 0", _by_temperature(result.sampled_chats)),
    ):
        cells = [f"{a.accepted[t]:.1%} ({a.round_tokens[t]:.2f}) at {t}" for a, t in agreements]
        if cells:
            rows.append(f"  {name}: {', '.join(cells)}")
    if rows:
        print(f"{options.output}: acceptance (tokens per round at K=4) on held-out text", *rows, sep="\n")
    if result.doubling_gain is not None:
        print(
            f"  twice the steps would bring about {result.doubling_gain:+.1%} at T={MONITORED_TEMPERATURE:g} (estimate)"
        )
    return 0


def _by_temperature(agreement: Agreement | None) -> list[tuple[Agreement, str]]:
    """Return an agreement once for each temperature that it was measured at."""
    return [(agreement, temperature) for temperature in agreement.accepted] if agreement else []
