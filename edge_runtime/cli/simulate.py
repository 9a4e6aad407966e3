"""`edge-runtime simulate`: model the speed and cost of decoding with a given board, link and verifier."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from edge_runtime.common.options import add_flag, add_option, number
from edge_runtime.common.terminal import new_console
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import PolicyName

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.planning.objective import Objective
    from edge_runtime.simulation import RecordedText, SimulationResult, World

TRACES = Path(__file__).resolve().parents[2] / "export" / "example_family" / "acceptance.npz"

HELP = "model the speed of a board, a link and a verifier"
# Headings of the table's columns after the first, in two lines.
HEADINGS = (
    "ms per\ntoken",
    "cost",
    "tokens/\nround",
    "accep-\nted",
    "verifier\nms/token",
    "J per\n100",
    "bytes/\ntoken",
)

DESCRIPTION = """\
Simulates the decoding of recorded texts with a modeled board, link and verifier, and compares the planner with fixed
plans. Acceptance is recorded; times, joules and bytes are modeled.

examples:
  edge-runtime simulate --link 4g --profile raspberry-pi-5 --verifier loaded
  edge-runtime simulate --link wifi:20,offline:5,weak-4g --profile jetson-orin-nano --verifier 32b --temperature 0.7
  edge-runtime simulate --link bursty --weights 270e6 --objective balanced --json

links: lan, wifi, 5g, 4g, weak-4g, bursty; a schedule such as wifi:20,offline:5 (seconds; offline is an outage); or
mahimahi:UP:DOWN:MS, two trace files in Mahimahi's format and a round-trip time of MS milliseconds.
verifiers: 7b; 7b-16 and 7b-64 (with that many sessions); 32b; loaded (80 ms per forward pass). Append +spec for a
verifier that also speculates itself, such as 32b+spec.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_option(parser, "--link", "link, see above", default="4g")
    add_option(parser, "--profile", "shipped device profile, or a .toml file", default="raspberry-pi-5")
    add_option(parser, "--verifier NAME", "verifier, see above", default="32b")
    parser.add_argument(
        "--policy", default="", metavar="NAME", help=f"{', '.join(get_args(PolicyName))} (default: analytic)"
    )
    text = "what to minimize: latency, cloud, energy, balanced, or prices such as verifier=2,joule=0.05"
    add_option(parser, "--objective", text, default="latency")
    parser.add_argument(
        "--weights", type=number(), default=40e6, metavar="BYTES", help="size of the draft's weights (default: 40e6)"
    )
    add_option(parser, "--temperature", "recorded temperature to use", default=0.0)
    add_option(parser, "--target", "recorded target to use", default="target-v1")
    add_option(parser, "--texts", "number of texts, one after the other", default=8)
    add_option(parser, "--seed", "same seed, same result", default=0)
    text = "recorded acceptance (default: the file shipped with a source checkout)"
    parser.add_argument("--traces", type=Path, default=TRACES, metavar="FILE", help=text)
    add_flag(parser, "--json", "print one JSON object instead of a table")
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    from edge_runtime.planning.objective import parse_objective
    from edge_runtime.simulation import make_world, read_texts

    if options.texts < 1:
        raise InputError(f"--texts {options.texts}: must be at least 1")
    if not 1 <= options.weights < 1e12:
        raise InputError(f"--weights {options.weights:g}: give the draft's bytes, such as 40e6")
    objective = parse_objective(options.objective)
    texts = read_texts(options.traces, target=options.target, temperature=options.temperature)[: options.texts]

    def world() -> World:
        return make_world(
            options.link,
            options.profile,
            options.verifier,
            weight_bytes=int(options.weights),
            seed=options.seed,
        )

    rows = _simulate_all(options.policy, objective, texts, world)
    name = f"{world().name}, {options.target} T={options.temperature:g}, objective {options.objective}"
    (_print_json if options.json else _print_table)(name, rows)
    return 0


class DecodingResult(NamedTuple):
    """The result of one way of decoding, a policy or a fixed plan.

    Attributes:
        result: sum over all texts.
        cost: cost per token, by the objective.
        plan: the last plan, in words.
        hindsight: whether the plan was chosen after the fact, for these texts.
    """

    label: str
    result: SimulationResult
    cost: float
    plan: str
    hindsight: bool = False

    def record(self) -> dict[str, float | int | bool | str]:
        """Return the result as plain data for JSON."""
        result = self.result
        return {
            "plan": self.plan,
            "hindsight": self.hindsight,
            "cost_per_token": self.cost,
            "tokens": result.tokens,
            "rounds": result.rounds,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "seconds_per_token": result.seconds_per_token,
            "verifier_seconds_per_token": result.verifier_seconds / result.tokens,
            "joules_per_token": result.joules / result.tokens,
            "bytes_per_token": (result.sent + result.received) / result.tokens,
        }


def _simulate_all(
    policy: str, objective: Objective, texts: list[RecordedText], world: Callable[[], World]
) -> list[DecodingResult]:
    """Return the results of the policy, which comes first, and of the plans to compare it with."""
    from edge_runtime.planning.factory import DEFAULT_POLICY, make_planner
    from edge_runtime.planning.plan import FixedPlanner, Plan
    from edge_runtime.simulation import oracle, simulate

    planner = make_planner(policy or DEFAULT_POLICY, objective, world().device)
    played = simulate(texts, planner, world(), log=True)
    rows = [DecodingResult(policy or DEFAULT_POLICY, played, played.cost(objective), played.log[-1].plan.reason)]
    for label, plan in (
        ("streaming", Plan(0, oracle.WHOLE_TEXT)),
        ("edge-drafted", Plan(5)),
        ("token by token", Plan(0)),
    ):
        result = simulate(texts, FixedPlanner(plan), world())
        rows.append(DecodingResult(label, result, result.cost(objective), oracle.describe_plan(plan)))
    static_plans = oracle.make_static_plans(oracle.measure_calibration(texts))
    spaces = {"best fixed draft": (list(oracle.FIXED_PLANS), False), "best single plan": (static_plans, True)}
    for label, (space, ahead) in spaces.items():
        best, result = oracle.PlanFootprints(texts, space).find_best(world, objective, ahead=ahead)
        rows.append(DecodingResult(label, result, result.cost(objective), oracle.describe_plan(best), hindsight=True))
    return rows


def _print_json(name: str, rows: list[DecodingResult]) -> None:
    import msgspec

    ways = {row.label: row.record() for row in rows}
    record = {"world": name, "modeled": True, "policy": rows[0].label, "ways": ways}
    print(msgspec.json.format(msgspec.json.encode(record)).decode())


def _print_table(name: str, rows: list[DecodingResult]) -> None:
    from rich.table import Table

    table = Table("", box=None)
    for title in HEADINGS:
        table.add_column(title, justify="right")
    for row in rows:
        result = row.result
        cells = (
            row.label + " *" * row.hindsight,
            f"{1e3 * result.seconds_per_token:.1f}",
            f"{row.cost / rows[0].cost:.2f}",
            f"{result.tokens / result.rounds:.1f}",
            f"{result.accepted / result.drafted:.0%}" if result.drafted else "-",
            f"{1e3 * result.verifier_seconds / result.tokens:.1f}",
            f"{100 * result.joules / result.tokens:.1f}",
            f"{(result.sent + result.received) / result.tokens:.1f}",
        )
        table.add_row(*cells)
    console = new_console(highlight=False)
    console.print(f"{name}: modeled", soft_wrap=True)
    console.print(table)
    for row in rows:
        console.print(f"{row.label}: {row.plan}", soft_wrap=True)
    console.print(
        "cost: per token, by the objective, relative to the first row; *: chosen in hindsight, for these very texts"
    )
