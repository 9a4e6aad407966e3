"""`draft-export prior`: measures the planner's prior of acceptance on a recorded trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Measures how often draft tokens are accepted, by confidence and by how many were accepted before them, on TRACE
(`draft-export record`), and prints the constants of edge_runtime/planning/acceptance_prior.py: the planner's prior for
drafts and targets that it has no evidence of yet.

examples:
  draft-export record family/bundle --target family/target-v1 --seed 100 --output trace.npz
  draft-export prior trace.npz
"""


def add_parser(commands: Any) -> None:
    """Add `prior` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "prior",
        help="measure the planner's prior of acceptance",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="recorded texts at temperatures 0, 0.7 and 1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.simulation import read_texts
    from export.planner_policy.prior import measure_prior

    prior = measure_prior(read_texts(options.trace))
    print("QUINTILES = (")
    for stages in prior.quintiles:
        print("    (")
        for quintiles in stages:
            pairs = ", ".join(f"({confidence:.4g}, {rate:.3g})" for confidence, rate in quintiles)
            print(f"        ({pairs}),")
        print("    ),")
    print(")")
    for name, values in (("LAST_STAGE_SHARES", prior.last_stage_shares), ("SIBLING_HAZARDS", prior.sibling_hazards)):
        print(f"{name} = ({', '.join(f'{value:.2g}' for value in values)})")
    return 0
