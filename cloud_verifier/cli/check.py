"""`cloud-verifier check`: says how a target would be served, or why it cannot be, without loading its weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_flag, add_option, whole_number

DESCRIPTION = """\
Reports how `cloud-verifier serve` would run a target: fast or general tier, context, memory of the KV cache,
quantization and missing packages, tokenizer and chat template, the tokens that end a text, and what a draft may share.
The weights are not loaded, and no code of the checkpoint runs. To compare a version of a registry with the version in
use, see `cloud-verifier targets check`.

exit codes: 0: no fault; 1: a fault, which the advice may remove

examples:
  cloud-verifier check /srv/models/Llama-3.1-8B
  cloud-verifier check model.gguf --json                         # converted once, into a cache
  cloud-verifier check family/target-v2 --draft family/bundle    # does this bundle fit?
"""


def add_parser(commands: Any) -> None:
    """Add `check` to argparse's subparsers."""
    parser = commands.add_parser(
        "check",
        help="say how a target would be served, or why not",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "directory of a Hugging Face checkpoint, a PEFT adapter or a version, or a GGUF file"
    parser.add_argument("target", type=Path, metavar="TARGET", help=text)
    text = "a bundle that is to fit it"
    parser.add_argument("--draft", type=Path, action="append", default=[], metavar="BUNDLE", help=text)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: %(default)s"
    )
    add_option(parser, "--max-context TOKENS", "longest text (default: the model's own limit)", type=whole_number(1))
    add_flag(parser, "--json", "print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    import msgspec

    from cloud_verifier.model.inspection import inspect_target, print_findings

    findings = inspect_target(options.target, dtype=options.dtype, context=options.max_context, drafts=options.draft)
    healthy = all(finding.state != "fault" for finding in findings)
    if options.json:
        record = {"target": str(options.target), "healthy": healthy, "findings": findings}
        print(msgspec.json.encode(record).decode())
    else:
        print_findings(findings, str(options.target))
    return 0 if healthy else 1
