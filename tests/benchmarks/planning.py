"""How good the policies are, in simulation: `python -m tests.benchmarks.planning`.

    cells      every link preset x device profile x verifier cost: cost per token of each policy against the best single
               plan in hindsight, against fixed K, and against streaming, edge-drafted and per-token decoding

Everything is modelled but the acceptance, which was recorded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from edge_runtime.planning.device import Device
from edge_runtime.planning.objective import PRESETS, Objective, parse_objective
from edge_runtime.planning.plan import FixedPlanner, Plan, Planner
from edge_runtime.planning.policies import NAMES, make_planner
from edge_runtime.simulation import oracle
from edge_runtime.simulation.acceptance import Text, read_texts
from edge_runtime.simulation.links import CONDUCTS
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.verifiers import VERIFIERS
from edge_runtime.simulation.world import ANCHOR_DRAFT, SMALL_DRAFT, World, make_world

TRACES = Path(__file__).parent.parent.parent / "export" / "family" / "acceptance.npz"
LINKS = (*CONDUCTS, "bursty")
BOARDS = (
    ("raspberry-pi-zero-2w", SMALL_DRAFT),
    ("raspberry-pi-4", SMALL_DRAFT),
    ("raspberry-pi-5", SMALL_DRAFT),
    ("raspberry-pi-5", ANCHOR_DRAFT),
    ("jetson-orin-nano", SMALL_DRAFT),
    ("jetson-orin-nano", ANCHOR_DRAFT),
    ("laptop", SMALL_DRAFT),
    ("laptop", ANCHOR_DRAFT),
    ("server", SMALL_DRAFT),
    ("server", ANCHOR_DRAFT),
)
KINDS = (
    ("target-v1", 0.0),
    ("target-v2", 0.7),
    ("target-v1", 1.0),
    ("target-v2", 0.0),
    ("target-v1", 0.7),
    ("target-v2", 1.0),
)
BASELINES = {
    "streaming": Plan(0, oracle.WHOLE_TEXT),
    "edge-drafted K=5": Plan(5),
    "per token": Plan(0),
}


class Cell(NamedTuple):
    """One world and the kind of text that is played in it."""

    link: str
    board: str
    weight_bytes: int
    verifier: str
    kind: tuple[str, float]

    @property
    def name(self) -> str:
        target, temperature = self.kind
        return (
            f"{self.link}, {self.board} {self.weight_bytes / 1e6:.0f} MB, {self.verifier}, {target} T={temperature:g}"
        )

    def world(self) -> World:
        return make_world(self.link, self.board, self.verifier, weight_bytes=self.weight_bytes, seed=1)


def cells(quick: bool) -> Iterator[Cell]:
    """All cells, the kinds of text in turn; with `quick` every seventh."""
    worlds = [(link, *board, name) for link in LINKS for board in BOARDS for name in VERIFIERS]
    for index, world in enumerate(worlds):
        if not quick or index % 7 == 0:
            # 7 shares no factor with the table's sides, so no link, board or verifier has always the same kind.
            yield Cell(*world, KINDS[index // 7 * 5 % 6 if quick else (index + index // 60 + index // 6) % 6])


class Row(NamedTuple):
    """Costs in one cell, by name."""

    cell: Cell
    costs: dict[str, float]
    warm: dict[str, float]
    best: Plan


def play(cell: Cell, names: list[str], objective: Objective, prints: dict[tuple[str, float], Prints]) -> Row:
    """Plays all in one cell."""
    plans = prints[cell.kind]
    best, result = plans.every.best(cell.world, objective, ahead=True)
    _, fixed = plans.fixed.best(cell.world, objective, ahead=False)
    costs = {"hindsight": result.cost(objective), "fixed K": fixed.cost(objective)}
    warm = {}
    for name, plan in BASELINES.items():
        costs[name] = simulate(plans.texts, FixedPlanner(plan), cell.world()).cost(objective)
    for name in names:
        world = cell.world()
        results = Simulator(world, policy(name, objective, world.device)).play_all(plans.texts)
        costs[name] = sum(results[1:], results[0]).cost(objective)
        warm[name] = sum(results[2:], results[1]).cost(objective)
    return Row(cell, costs, warm, best)


class Prints(NamedTuple):
    """Texts of one kind, and what every static plan does to them."""

    texts: list[Text]
    every: oracle.Footprints
    fixed: oracle.Footprints


def policy(name: str, objective: Objective, device: Device) -> Planner:
    return make_planner(name, objective, device, acceptance={"T=0": 0.6, "T=0.7": 0.6, "T=1": 0.55})


def print_cells(console: Console, rows: list[Row], names: list[str]) -> None:
    table = Table(
        "policy", "mean / hindsight", "worst", "in the cell", "mean without first text", title="cells", box=None
    )
    for name in ["fixed K", *BASELINES, *names]:
        ratios = [(row.costs[name] / row.costs["hindsight"], row) for row in rows]
        worst, row = max(ratios, key=lambda pair: pair[0])
        warm = [row.warm[name] / row.costs["hindsight"] for row in rows if name in row.warm]
        table.add_row(
            name,
            f"{mean(ratio for ratio, _ in ratios):.3f}",
            f"{worst:.3f}",
            f"{row.cell.name} ({_short(row.best)})",
            f"{mean(warm):.3f}" if warm else "-",
        )
    console.print(table)
    for name in names:
        for other in ["fixed K", *BASELINES]:
            ratios = [row.costs[name] / row.costs[other] for row in rows]
            worst = max(rows, key=lambda row: row.costs[name] / row.costs[other])
            console.print(
                f"{name} / {other}: mean {mean(ratios):.3f}, worst {max(ratios):.3f} in {worst.cell.name}; "
                f"more than 2 % dearer in {sum(ratio > 1.02 for ratio in ratios)} of {len(rows)} cells"
            )


def _short(plan: Plan) -> str:
    own = "all" if plan.own >= oracle.WHOLE_TEXT else plan.own
    text = f"K={plan.draft} n={own}"
    if plan.draft:
        text += f" stop {plan.min_survival:g} siblings {plan.siblings}<{plan.sibling_confidence:g}"
    return text + (f" ahead {plan.ahead} in flight {plan.in_flight}" if plan.ahead else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="latency", help=f"{', '.join(PRESETS)}, or prices (default: latency)")
    parser.add_argument("--policies", nargs="*", default=list(NAMES), metavar="NAME", help="default: all")
    parser.add_argument("--texts", type=int, default=8, help="in each cell (default: %(default)s)")
    parser.add_argument("--traces", type=Path, default=TRACES, help="acceptance traces (default: the family's)")
    parser.add_argument("--quick", action="store_true", help="every seventh cell")
    parser.add_argument("--each", action="store_true", help="a line for every cell")
    options = parser.parse_args()
    objective = parse_objective(options.objective)
    console = Console(width=200, highlight=False)
    started = time.perf_counter()
    prints = {}
    for kind in KINDS:
        texts = read_texts(options.traces, target=kind[0], temperature=kind[1])
        some = texts[: options.texts]
        plans = oracle.static_plans(oracle.calibration(texts))
        prints[kind] = Prints(some, oracle.Footprints(some, plans), oracle.Footprints(some, list(oracle.FIXED)))
    console.print(f"footprints: {time.perf_counter() - started:.0f} s")
    rows = []
    for cell in cells(options.quick):
        rows.append(play(cell, options.policies, objective, prints))
        if options.each:
            costs = "  ".join(f"{name} {1e3 * cost:.1f}" for name, cost in rows[-1].costs.items())
            console.print(f"{cell.name}: {costs}  ({_short(rows[-1].best)})")
    print_cells(console, rows, options.policies)
    console.print(f"{len(rows)} cells in {time.perf_counter() - started:.0f} s; modelled, acceptance recorded")


if __name__ == "__main__":
    main()
