"""`draft-export record`: records acceptance traces for the simulator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_option, number

DESCRIPTION = """\
Records which draft tokens targets accept, and the draft's confidence in them: an acceptance trace, on which
`edge-runtime simulate` simulates plans without running a model. Every target continues every prompt at every
temperature. Default prompts: chats, everyday questions and source code.

examples:
  draft-export record family/bundle --target family/target-v1 --output acceptance.npz
  draft-export record bundle --target /models/Llama-3.1-8B --text prompts.txt --prompts 8 --temperature 0 --output a.npz
"""


def add_parser(commands: Any) -> None:
    """Add `record` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "record",
        help="record a draft's acceptance, for simulations",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="bundle of the draft")
    add_option(parser, "--target DIR", "directory of a target, may repeat", type=Path, action="append", required=True)
    add_option(parser, "--output FILE", "the trace, .npz; overwritten", type=Path, required=True)
    add_option(parser, "--temperature T", "may repeat (default: 0, 0.7 and 1)", type=number(), action="append")
    add_option(parser, "--top-p", "at temperatures above 0", default=1.0)
    add_option(parser, "--prompts", "number of prompts", default=24)
    add_option(parser, "--tokens", "tokens of each text", default=128)
    add_option(parser, "--seed", "seed of prompts and sampling", default=0)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts to cut prompts from")
    parser.add_argument(
        "--chats", type=Path, nargs="+", default=[], metavar="FILE", help="prompts as JSON lines with `messages`"
    )
    add_option(parser, "--threads", "CPU threads", default=1)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from cloud_verifier.acceptance.measure import TEMPERATURES
    from export.evaluate.record import RecordingConfig, record_acceptance

    config = RecordingConfig(
        bundle=options.bundle,
        targets=tuple(options.target),
        temperatures=tuple(options.temperature or TEMPERATURES),
        top_p=options.top_p,
        prompts=options.prompts,
        tokens=options.tokens,
        seed=options.seed,
        texts=tuple(options.text),
        chats=tuple(options.chats),
        threads=options.threads,
    )
    texts = record_acceptance(config, options.output)
    print(f"{options.output}: {len(texts)} texts, {options.output.stat().st_size / 1e3:.0f} kB")
    for target, temperature in dict.fromkeys((text.target, text.temperature) for text in texts):
        some = [text for text in texts if (text.target, text.temperature) == (target, temperature)]
        share = sum(text.acceptance for text in some) / len(some)
        print(f"  {target} T={temperature:g}: {share:.1%} of {sum(map(len, some))} draft tokens are accepted")
    return 0
