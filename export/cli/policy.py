"""`draft-export policy`: trains the policy of the learned planner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.common.options import add_option, whole_number

DESCRIPTION = """\
Trains the policy of the learned planner (`edge-runtime --policy learned`) on simulated rounds: recorded acceptance, and
random links, boards and verifiers around the shipped presets. Writes learned.onnx, learned.json (training parameters
and results on held-out texts), and learned.png (learning curve).

examples:
  draft-export policy --steps 20000 --drills 100 --settings 50 --output /tmp/policy    # a trial run, seconds
  draft-export policy --output /tmp/policy                                             # five minutes on one CPU core
  draft-export policy --objective cloud --seed 1 --output /tmp/policy
"""


def add_parser(commands: Any) -> None:
    """Add `policy` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "policy",
        help="train the learned planner's policy",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser, "--output DIR", "existing files are overwritten", type=Path, required=True)
    add_option(parser, "--steps", "simulated rounds", default=200_000)
    parser.add_argument("--seed", type=whole_number(), default=0, help="default: %(default)s")
    add_option(parser, "--objective", "latency, cloud, energy, balanced, or prices", default="latency")
    add_option(
        parser, "--drills", "settings in which every correction is tried before reinforcement learning", default=6000
    )
    add_option(parser, "--settings", "settings to evaluate on", default=1000)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.planning.objective import parse_objective
    from export.planner_policy.train import PolicyTrainingConfig, make_policy

    config = PolicyTrainingConfig(
        objective=parse_objective(options.objective),
        steps=options.steps,
        seed=options.seed,
        evaluation_scenarios=options.settings,
        pretraining_scenarios=options.drills,
    )
    metadata = make_policy(config, options.output)
    evaluation = metadata.trained["evaluation"]
    print(f"{options.output}: cost on held-out texts, as a multiple of the analytic planner's, modeled:")
    print("  " + ", ".join(f"{name} {value:g}" for name, value in evaluation.items()))
    return 0
