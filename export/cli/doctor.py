"""`draft-export doctor`: whether a draft for a target is worth GPU hours, before any are spent."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Reads a target's configuration, its tokenizer and the names and shapes of its tensors, no weights, and says: whether its
architecture is supported, whether its cache can take tokens back, whether its tokenizer is the bundle's, how large its
draft will be, and how fast on which board (modelled from the boards' memory bandwidth).

Ends with 0 where nothing is in the way, 2 for bad input, 3 where something is.

examples:
  draft-export doctor /models/Llama-3.1-8B
  draft-export doctor /models/Llama-3.1-8B --layout prefix --new-blocks 1 --weights int4 --profile raspberry-pi-5
  draft-export doctor export/example_family/target-v2 --bundle export/example_family/bundle --json
"""
MARKS = {"ok": "green", "warning": "yellow", "fault": "red"}


def add_parser(commands: Any) -> None:
    """Adds `doctor` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="say what a target's draft would be like, before it is trained",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, help="directory of a Hugging Face checkpoint, or of a version of one")
    parser.add_argument("--layout", default="anchor", help="anchor, prefix or standalone (default: %(default)s)")
    parser.add_argument("--new-blocks", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--shared-blocks", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--weights", default="int8", choices=["int4", "int8"], help="default: %(default)s")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="longest text (default: the model's)")
    parser.add_argument(
        "--profile", nargs="+", default=[], metavar="NAME", help="boards (default: all that are shipped)"
    )
    parser.add_argument("--bundle", type=Path, help="a draft that boards have already: would it fit this target?")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.planning.board_profile import find_profile, shipped_profiles
    from edge_runtime.protocol.errors import TargetError
    from export.evaluate.doctor import Question, examine

    profiles = [find_profile(name) for name in options.profile] or shipped_profiles()
    question = Question(
        options.target,
        options.layout,
        options.new_blocks,
        options.shared_blocks,
        options.weights,
        options.context,
        tuple(profiles),
        options.bundle,
    )
    findings = examine(question)
    healthy = all(finding.state != "fault" for finding in findings)
    if options.json:
        record = {"target": str(options.target), "healthy": healthy, "findings": [f.record() for f in findings]}
        print(json.dumps(record, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "what", "found", "what to do", title=str(options.target), title_justify="left")
        for finding in findings:
            mark = Text(finding.state, style=MARKS[finding.state])
            table.add_row(mark, finding.subject, Text(finding.found), Text(finding.advice))
        Console().print(table)
    return 0 if healthy else TargetError.exit_code
