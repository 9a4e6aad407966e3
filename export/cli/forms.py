"""`draft-export forms`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Makes every form that DRAFT can have on a board (graphs, weights, trimmed heads), measures each, and says which to take:
size on disk, resident memory and milliseconds per token of one thread on this machine, parity with PyTorch, and
acceptance by TARGET, greedy and with coupled noise at T=0.7 and T=1. The bundles stay in --output, with forms.md and
forms.json. What is there already is not made again: give the same command after a kill.

examples:
  draft-export forms export/example_family/target-v1 export/example_family/draft-anchor --output /tmp/forms
  draft-export forms TARGET DRAFT --text held-out.txt --form fused-int8 --form fused-int4 --output forms
  draft-export forms TARGET DRAFT --trim-vocabulary other.txt --head-size 16000 --tolerance 0.5 --output forms
"""


POSITIONS = 8000
# Logits that are held, of draft and target each: a gigabyte.
LOGITS = 1 << 28


def add_parser(commands: Any) -> None:
    """Adds `forms` to argparse's sub-parsers."""
    forms = commands.add_parser(
        "forms",
        help="compare a draft's graphs and weights, and choose",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms.add_argument("target", type=Path, help="Hugging Face directory of the target")
    forms.add_argument("draft", type=Path, help="directory of the draft, as for `onnx`")
    forms.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the bundles and the table")
    forms.add_argument(
        "--text", type=Path, action="append", metavar="FILE", help="to measure on (default: held-out Python)"
    )
    forms.add_argument(
        "--positions", type=int, help=f"how many tokens of it (default: {POSITIONS}; 2000 of a vocabulary of 128k)"
    )
    forms.add_argument("--context", type=int, metavar="TOKENS", help="longest text (default: the model's)")
    forms.add_argument(
        "--trim-vocabulary", type=Path, metavar="FILE", help="also heads trimmed to this text's tokens; not the --text"
    )
    forms.add_argument("--head-size", type=int, metavar="IDS", help="and to so many of them, the most frequent")
    forms.add_argument(
        "--tolerance", type=float, default=1.0, help="points of acceptance that may be lost (default: %(default)s)"
    )
    forms.add_argument("--form", action="append", metavar="NAME", help="only these, and fp32; may repeat")
    forms.set_defaults(run=_forms)


def _forms(options: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from edge_runtime.protocol.errors import InputError
    from export.bundle.build import BundleOrder
    from export.bundle.compare import MARKDOWN, Comparison, compare, markdown
    from export.data.held_out import held_out

    if not (options.target / "config.json").is_file():
        raise InputError(f"no target at {options.target}: it has no config.json")
    texts = held_out(options.text or ())
    documents = (
        next(iter(texts.values())) if options.text is None else [text for some in texts.values() for text in some]
    )
    positions = options.positions
    if positions is None:
        positions = min(POSITIONS, LOGITS // AutoConfig.from_pretrained(options.target).vocab_size)
    # A piece of each document, so that no single one decides; a token has about four characters.
    size = max(400, 5 * positions // len(documents)) if len(documents) > 1 else None
    head_text = None
    if options.trim_vocabulary is not None:
        ((head_text,),) = held_out([options.trim_vocabulary]).values()
    order = BundleOrder(
        options.target,
        options.draft,
        "fused",
        "fp32",
        "\n".join(document[:size] for document in documents),
        options.context,
        positions,
        head_text=head_text,
        head_size=options.head_size,
    )
    comparison = Comparison(order, options.output, options.tolerance / 100, tuple(options.form or ()))
    table = compare(comparison)
    print(markdown(table), end="")
    print(f"{options.output / MARKDOWN}; the bundle to take is {options.output / table.chosen}")
    return 0
