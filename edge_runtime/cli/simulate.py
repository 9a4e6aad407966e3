"""`edge-runtime simulate`: what a person would get on such a board, over such a link, from such a verifier."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.planning.objective import Objective
    from edge_runtime.simulation.recorded_texts import Text
    from edge_runtime.simulation.result import Result
    from edge_runtime.simulation.world import World

TRACES = Path(__file__).resolve().parents[2] / "export" / "example_family" / "acceptance.npz"

DESCRIPTION = """\
Plays recorded texts on a modelled board, link and verifier, and shows what each way of decoding them would cost. The
acceptance is recorded; times, joules and bytes are modelled.

examples:
  edge-runtime simulate --link 4g --profile raspberry-pi-5 --verifier loaded
  edge-runtime simulate --link wifi:20,offline:5,weak-4g --profile jetson-orin-nano --verifier 32b --temperature 0.7
  edge-runtime simulate --link mahimahi:TRACE.up:TRACE.down:40 --weights 270e6 --objective balanced --json

links: lan, wifi, 5g, 4g, weak-4g, bursty; a schedule of them with seconds, in which offline is an outage; or
mahimahi:UP:DOWN:MS, two recordings in Mahimahi's format behind a round trip of MS milliseconds.
verifiers: 7b, 7b-16 and 7b-64 (sessions), 32b, loaded (80 ms a forward); each with +spec, where the verifier drafts
beside its target by itself.
"""


def add_parser(commands: Any) -> None:
    """Adds `simulate` to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate",
        help="model what a board, a link and a verifier would give",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--link", default="4g", help="see above (default: %(default)s)")
    parser.add_argument(
        "--profile", default="raspberry-pi-5", help="a shipped device profile, or a .toml file (default: %(default)s)"
    )
    parser.add_argument("--verifier", default="32b", metavar="NAME", help="see above (default: %(default)s)")
    parser.add_argument("--policy", default="", metavar="NAME", help="who plans (default: the board's own default)")
    parser.add_argument(
        "--objective", default="latency", help="latency, cloud, energy, balanced, or prices (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", type=float, default=40e6, metavar="BYTES", help="of the draft (default: %(default)g)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="that was recorded (default: %(default)g)")
    parser.add_argument("--target", default="target-v1", help="that was recorded (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=8, help="how many, one after the other (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default: %(default)s)")
    parser.add_argument(
        "--traces",
        type=Path,
        default=TRACES,
        metavar="FILE",
        help="recorded acceptance (default: the example family's, where the source is)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=simulate_command)


async def simulate_command(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.planning.objective import parse_objective
    from edge_runtime.simulation.recorded_texts import read_texts
    from edge_runtime.simulation.world import make_world

    if options.texts < 1:
        raise InputError(f"--texts {options.texts}: at least one text must be played")
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

    rows = _play(options.policy, objective, texts, world)
    name = f"{world().name}, {options.target} T={options.temperature:g}, objective {options.objective}"
    (_print_json if options.json else _print_table)(name, rows)
    return 0


class Row:
    """One way of decoding, and what it costs.

    Attributes:
        label: for people.
        result: of all texts.
        cost: per token, by the objective.
        plan: the last one, in words.
        hindsight: whether it could only be known afterwards.
    """

    def __init__(self, label: str, result: Result, objective: Objective, plan: str, *, hindsight: bool = False) -> None:
        self.label, self.result, self.plan, self.hindsight = label, result, plan, hindsight
        self.cost = result.cost(objective)

    def record(self) -> dict[str, float | int | bool | str]:
        """As plain data, per token where that makes sense."""
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


def _play(policy: str, objective: Objective, texts: list[Text], world: Callable[[], World]) -> list[Row]:
    """All rows, the policy's first."""
    from edge_runtime.planning.factory import DEFAULT, make_planner
    from edge_runtime.planning.plan import FixedPlanner, Plan
    from edge_runtime.simulation import oracle
    from edge_runtime.simulation.simulator import simulate

    planner = make_planner(policy or DEFAULT, objective, world().device)
    played = simulate(texts, planner, world(), log=True)
    rows = [Row(policy or DEFAULT, played, objective, played.log[-1].plan.reason)]
    for label, plan in (
        ("streaming", Plan(0, oracle.WHOLE_TEXT)),
        ("edge-drafted", Plan(5)),
        ("token by token", Plan(0)),
    ):
        rows.append(Row(label, simulate(texts, FixedPlanner(plan), world()), objective, oracle.describe(plan)))
    plans = oracle.static_plans(oracle.calibration(texts))
    for label, space, ahead in (("best fixed draft", list(oracle.FIXED), False), ("best single plan", plans, True)):
        best, result = oracle.Footprints(texts, space).best(world, objective, ahead=ahead)
        rows.append(Row(label, result, objective, oracle.describe(best), hindsight=True))
    return rows


def _print_json(name: str, rows: list[Row]) -> None:
    import msgspec

    record = {
        "world": name,
        "modelled": True,
        "policy": rows[0].label,
        "ways": {row.label: row.record() for row in rows},
    }
    print(msgspec.json.format(msgspec.json.encode(record)).decode())


def _print_table(name: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None)
    for title in (
        "ms per\ntoken",
        "cost",
        "tokens\na round",
        "accep-\nted",
        "verifier\nms/token",
        "J per\n100",
        "bytes/\ntoken",
    ):
        table.add_column(title, justify="right")
    for row in rows:
        result = row.result
        table.add_row(
            row.label + " *" * row.hindsight,
            f"{1e3 * result.seconds_per_token:.1f}",
            f"{row.cost / rows[0].cost:.2f}",
            f"{result.tokens / result.rounds:.1f}",
            f"{result.accepted / result.drafted:.0%}" if result.drafted else "-",
            f"{1e3 * result.verifier_seconds / result.tokens:.1f}",
            f"{100 * result.joules / result.tokens:.1f}",
            f"{(result.sent + result.received) / result.tokens:.1f}",
        )
    console = Console(highlight=False)
    console.print(f"{name}: modelled", soft_wrap=True)
    console.print(table)
    for row in rows:
        console.print(f"{row.label}: {row.plan}", soft_wrap=True)
    console.print(
        "cost is per token, by the objective, against the first row; * chosen afterwards, for these very texts"
    )
