"""`draft-export doctor`: diagnoses, before any GPU hours are spent, whether a draft for a target is worthwhile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_flag, add_option, whole_number
from export.cli.choices import DEFAULT_NEW_BLOCKS, DEFAULT_SHARED_BLOCKS, LAYOUTS

DESCRIPTION = """\
Reports what `cloud-verifier check` says of the target, whether a draft can be made for it, whether an existing bundle
fits, how large the draft will be, and how fast on which board (modeled from the boards' memory bandwidth). The weights
are not loaded.

exit codes: 0 no fault; 2 bad input; 3 a fault

examples:
  draft-export doctor /models/Llama-3.1-8B
  draft-export doctor /models/Llama-3.1-8B --layout prefix --new-blocks 1 --shared-blocks 1 --profile raspberry-pi-5
  draft-export doctor family/target-v2 --bundle family/bundle --json
"""


def add_parser(commands: Any) -> None:
    """Add `doctor` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="diagnose a target's draft before it is trained",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="directory of a Hugging Face checkpoint, or of a version of one")
    parser.add_argument("--layout", default="anchor", help=f"{', '.join(LAYOUTS)} (default: %(default)s)")
    parser.add_argument(
        "--new-blocks",
        type=whole_number(),
        default=DEFAULT_NEW_BLOCKS,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--shared-blocks", type=whole_number(), default=DEFAULT_SHARED_BLOCKS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--weights", default="int8", choices=["int4", "int8"], help="default: %(default)s")
    add_option(parser, "--context TOKENS", "longest text (default: the model's)", type=whole_number())
    parser.add_argument(
        "--profile", nargs="+", default=[], metavar="NAME", help="boards (default: all that are shipped)"
    )
    add_option(parser, "--bundle", "an existing draft: check whether it fits this target", type=Path)
    add_flag(parser, "--json", "print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    import msgspec

    from cloud_verifier.model.inspection import print_findings
    from edge_runtime.planning.board_profile import find_profile, shipped_profiles
    from edge_runtime.protocol.errors import TargetError
    from export.evaluate.doctor import DraftQuery, diagnose

    profiles = [find_profile(name) for name in options.profile] or shipped_profiles()
    query = DraftQuery(
        target=options.target,
        layout=options.layout,
        new_blocks=options.new_blocks,
        shared_blocks=options.shared_blocks,
        weights=options.weights,
        context=options.context,
        profiles=tuple(profiles),
        bundle=options.bundle,
    )
    findings = diagnose(query)
    healthy = all(finding.state != "fault" for finding in findings)
    if options.json:
        record = {"target": str(options.target), "healthy": healthy, "findings": findings}
        print(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
    else:
        print_findings(findings, str(options.target))
    return 0 if healthy else TargetError.exit_code
