"""`draft-export forms`: compares all variants of a draft's graph, weights and head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_option, whole_number

DESCRIPTION = """\
Builds every form (variant) of DRAFT: kinds of graph, weight types, trimmed heads. It measures each one and recommends
one, int8 unless a smaller one loses no acceptance. Measured are size on disk, resident memory and milliseconds per
token with one thread on this machine, parity with PyTorch, and acceptance by TARGET, greedy and with coupled noise at
T=0.7 and T=1. The bundles stay in --output, with forms.md and forms.json. Existing results are reused: after an
interruption, give the same command again.

examples:
  draft-export forms tests/toy_family/target-v1 tests/toy_family/draft-anchor --output /tmp/forms
  draft-export forms TARGET DRAFT --text held-out.txt --form fused-int8-head4 --form fused-int4 --output forms
  draft-export forms TARGET DRAFT --trim-vocabulary other.txt --head-size 16000 --tolerance 0.5 --output forms
"""

DEFAULT_POSITIONS = 8000
# Bounds the default number of positions. Chosen: 1 GB of float32 logits, of draft and target each.
MAX_LOGITS = 1 << 28
# Characters of a text for one token of it, rounded up.
CHARACTERS_PER_TOKEN = 5
MIN_DOCUMENT_CHARACTERS = 400


def add_parser(commands: Any) -> None:
    """Add `forms` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "forms",
        help="compare a draft's graphs and weights, and choose",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="Hugging Face directory or GGUF file of the target")
    parser.add_argument("draft", type=Path, help="directory of the draft, as for `onnx`")
    add_option(parser, "--output DIR", "for the bundles and the table", type=Path, required=True)
    add_option(parser, "--text FILE", "text to measure on (default: held-out Python)", type=Path, action="append")
    add_option(
        parser,
        "--positions",
        f"tokens of it to measure (default: {DEFAULT_POSITIONS}; 2000 with a vocabulary of 128k)",
        type=whole_number(),
    )
    add_option(parser, "--context TOKENS", "longest text (default: the model's)", type=whole_number())
    add_option(
        parser,
        "--trim-vocabulary FILE",
        "also measure heads trimmed to this text's tokens; it must not be the --text",
        type=Path,
    )
    add_option(parser, "--head-size IDS", "keep at most this many, the most frequent", type=whole_number())
    add_option(parser, "--tolerance", "points of acceptance that may be lost against int8", default=1.0)
    add_option(parser, "--form NAME", "only this form, int8 and fp32; may repeat", action="append")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from transformers import AutoConfig

    from edge_runtime.protocol.errors import InputError
    from export.bundle.build import BundleConfig
    from export.bundle.compare import MARKDOWN_FILE, ComparisonConfig, compare_variants, format_table
    from export.data.held_out import load_held_out

    if not (options.target / "config.json").is_file():
        raise InputError(f"no target at {options.target}: it has no config.json")
    texts = load_held_out(options.text or ())
    # Without --text only the first domain of the held-out files, which is Python.
    documents = (
        next(iter(texts.values())) if options.text is None else [text for some in texts.values() for text in some]
    )
    positions = options.positions
    if positions is None:
        positions = min(DEFAULT_POSITIONS, MAX_LOGITS // AutoConfig.from_pretrained(options.target).vocab_size)
    # Take a part of each document, so that no single one dominates.
    size = None
    if len(documents) > 1:
        size = max(MIN_DOCUMENT_CHARACTERS, CHARACTERS_PER_TOKEN * positions // len(documents))
    head_text = None
    if options.trim_vocabulary is not None:
        ((head_text,),) = load_held_out([options.trim_vocabulary]).values()
    bundle = BundleConfig(
        target=options.target,
        draft=options.draft,
        kind="fused",
        weights="fp32",
        text="\n".join(document[:size] for document in documents),
        context=options.context,
        positions=positions,
        head_text=head_text,
        head_size=options.head_size,
    )
    table = compare_variants(
        ComparisonConfig(bundle, options.output, options.tolerance / 100, tuple(options.form or ()))
    )
    print(format_table(table), end="")
    print(f"{options.output / MARKDOWN_FILE}; the bundle to take is {options.output / table.chosen}")
    return 0
