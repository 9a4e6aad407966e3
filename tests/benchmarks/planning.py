"""Quality of the planner policies in simulation: `python -m tests.benchmarks.planning`.

    cells       every link preset x board x verifier: cost per token of each policy against the best single plan in
                hindsight, against fixed K, and against streaming, edge-drafted and per-token decoding
    steps       rounds after a change of the link until the plan for a new text has settled
    energy      a budget of 70 % of the power that the unconstrained planner draws: how well it is kept, and its cost
    siblings    tokens per round with siblings for every draft token, or only where the draft is uncertain
    decisions   microseconds per decision

Acceptance is recorded; everything else is modeled. The hindsight plan of a cell is the best one for exactly its texts,
which no planner can know in advance. With `+spec` the verifier itself speculates, and streaming in these cells is
streaming with speculation.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.factory import DEFAULT_POLICY, POLICY_NAMES, make_planner
from edge_runtime.planning.objective import PRESETS, Objective, parse_objective
from edge_runtime.planning.plan import Conditions, FixedPlanner, Outcome, Plan, Planner
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.simulation import oracle
from edge_runtime.simulation.links import LINK_PRESETS
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.verifiers import VERIFIERS
from edge_runtime.simulation.world import ANCHOR_DRAFT_BYTES, SMALL_DRAFT_BYTES, World, make_world
from tests.benchmarks.lower_bound import compute_lower_bound

FAMILY = Path(__file__).parent.parent.parent / "export" / "example_family"
LINKS = (*LINK_PRESETS, "bursty")
# An anchor draft of a 7B target does not fit into the memory of a Zero, and is far too slow on a Pi 4.
BOARDS = (
    ("raspberry-pi-zero-2w", SMALL_DRAFT_BYTES),
    ("raspberry-pi-4", SMALL_DRAFT_BYTES),
    ("raspberry-pi-5", SMALL_DRAFT_BYTES),
    ("raspberry-pi-5", ANCHOR_DRAFT_BYTES),
    ("jetson-orin-nano", SMALL_DRAFT_BYTES),
    ("jetson-orin-nano", ANCHOR_DRAFT_BYTES),
    ("laptop", SMALL_DRAFT_BYTES),
    ("laptop", ANCHOR_DRAFT_BYTES),
    ("server", SMALL_DRAFT_BYTES),
    ("server", ANCHOR_DRAFT_BYTES),
)
TEXT_KINDS = tuple((target, temperature) for temperature in (0.0, 0.7, 1.0) for target in ("target-v1", "target-v2"))
BASELINES = {
    "streaming": Plan(0, oracle.WHOLE_TEXT),
    "edge-drafted K=5": Plan(5),
    "per token": Plan(0),
}
CHANGES = (("4g", "weak-4g"), ("weak-4g", "4g"), ("wifi", "offline:5,wifi"), ("lan", "4g"))
CHANGING = (("laptop", "loaded"), ("raspberry-pi-5", "32b"), ("server", "32b"), ("raspberry-pi-4", "7b+spec"))
CHANGE_AT_SECONDS = 12.0
SETTLING_TEXTS = 8
# A plan has settled once the mean cost of WINDOW plans is at most this factor times the final cost; chosen.
SETTLED = 1.05
WINDOW = 5
# Number of rounds observed after a change of the link, and limit of the texts generated for them; chosen.
ROUNDS_AFTER_CHANGE, MAX_TEXTS = 300, 500
# Length in tokens of the hypothetical new text that is planned for, and of its prompt; chosen.
NEW_TEXT_TOKENS = 100
BUDGET_SHARE = 0.7
# Worlds in which the unconstrained planner drafts so much that streaming draws less than the budget.
BUDGET_WORLDS = (
    ("lan", "raspberry-pi-4", SMALL_DRAFT_BYTES, "32b"),
    ("lan", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded"),
    ("wifi", "raspberry-pi-4", SMALL_DRAFT_BYTES, "loaded"),
    ("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "32b"),
    ("wifi", "raspberry-pi-5", ANCHOR_DRAFT_BYTES, "loaded"),
    ("wifi", "jetson-orin-nano", SMALL_DRAFT_BYTES, "32b"),
    ("4g", "laptop", ANCHOR_DRAFT_BYTES, "loaded"),
)


class Cell(NamedTuple):
    """One simulated world, and the kind of text that is generated in it."""

    link: str
    board: str
    weight_bytes: int
    verifier: str
    kind: tuple[str, float] = TEXT_KINDS[0]
    slower: float = 1.0
    seed: int = 1

    @property
    def name(self) -> str:
        target, temperature = self.kind
        board = f"{self.board} {self.weight_bytes / 1e6:.0f} MB"
        return f"{self.link}, {board}, {self.verifier}, {target} T={temperature:g}"

    def world(self) -> World:
        return make_world(
            self.link, self.board, self.verifier, weight_bytes=self.weight_bytes, slower=self.slower, seed=self.seed
        )

    def profiled_device(self) -> DeviceModel:
        """Return the device model of the board's profile, which the planner starts from."""
        return self._replace(slower=1.0).world().device


def make_cells(links: list[str], every: int, slower: float, seed: int = 1) -> Iterator[Cell]:
    """Yield every `every`-th cell, each with one kind of text; kinds alternate over links, boards and verifiers."""
    for i, link in enumerate(links):
        for j, board in enumerate(BOARDS):
            for k, name in enumerate(VERIFIERS):
                if ((i * len(BOARDS) + j) * len(VERIFIERS) + k) % every == 0:
                    yield Cell(link, *board, name, TEXT_KINDS[(i + j + k) % len(TEXT_KINDS)], slower, seed)


class TextFootprints(NamedTuple):
    """Texts of one kind, and the footprints of all static plans and of the fixed plans on them."""

    texts: list[RecordedText]
    static: oracle.PlanFootprints
    fixed: oracle.PlanFootprints

    @classmethod
    def from_kind(cls, kind: tuple[str, float], count: int, traces: Path) -> TextFootprints:
        texts = read_texts(traces, target=kind[0], temperature=kind[1])
        plans = oracle.make_static_plans(oracle.measure_calibration(texts))
        selected = texts[:count]
        return cls(
            selected, oracle.PlanFootprints(selected, plans), oracle.PlanFootprints(selected, list(oracle.FIXED_PLANS))
        )


class CellResult(NamedTuple):
    """Costs per token in one cell by policy or baseline; `warm` leaves out the first text."""

    cell: Cell
    costs: dict[str, float]
    warm: dict[str, float]
    best: Plan


class PlanningBenchmark:
    """Prints the tables; holds the options that they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.console = Console(width=220, highlight=False)
        self.objective: Objective = parse_objective(options.objective)
        self.names: list[str] = options.policies
        self.options = options
        self.acceptance = read_bundle(FAMILY / "bundle", verify=False).manifest.acceptance

    def make_planner(self, name: str, device: DeviceModel, budget: EnergyBudget | None = None) -> Planner:
        return make_planner(name, self.objective, device, acceptance=self.acceptance, budget=budget)

    def texts(self, kind: tuple[str, float]) -> list[RecordedText]:
        return read_texts(self.options.traces, target=kind[0], temperature=kind[1])

    def cells(self) -> None:
        started = time.perf_counter()
        options = self.options
        all_cells = list(make_cells(options.links, 7 if options.quick else 1, options.slower, options.seed))
        rows: list[CellResult] = []
        with ProcessPoolExecutor(min(options.jobs, len(TEXT_KINDS))) as pool:
            for finished in pool.map(functools.partial(_measure_cells, options, all_cells), TEXT_KINDS):
                rows += finished
                self.console.print(f"{len(rows)} of {len(all_cells)} cells, {time.perf_counter() - started:.0f} s")
                for row in finished if options.each else ():
                    costs = "  ".join(f"{name} {1e3 * cost:.1f}" for name, cost in row.costs.items())
                    self.console.print(f"{row.cell.name}: {costs}  ({oracle.describe_plan(row.best)})")
        self._print_cells(rows)

    def measure_cell(self, cell: Cell, footprints: TextFootprints) -> CellResult:
        best, result = footprints.static.find_best(cell.world, self.objective, ahead=True)
        _, fixed = footprints.fixed.find_best(cell.world, self.objective, ahead=False)
        costs = {
            "hindsight": result.cost(self.objective),
            "clairvoyant": compute_lower_bound(footprints.texts, cell.world(), self.objective),
            "fixed K": fixed.cost(self.objective),
        }
        for name, plan in BASELINES.items():
            costs[name] = simulate(footprints.texts, FixedPlanner(plan), cell.world()).cost(self.objective)
        warm = {}
        for name in self.names:
            results = Simulator(cell.world(), self.make_planner(name, cell.profiled_device())).run_all(footprints.texts)
            costs[name] = _sum(results).cost(self.objective)
            warm[name] = _sum(results[1:]).cost(self.objective)
        return CellResult(cell, costs, warm, best)

    def _print_cells(self, rows: list[CellResult]) -> None:
        table = Table(
            "cost per token relative to hindsight",
            "mean",
            "without first text",
            "within 3 %",
            "within 8 %",
            "worst",
            "in the cell (and its best plan)",
            box=None,
        )
        for name in ["clairvoyant", "fixed K", *BASELINES, *self.names]:
            ratios = [row.costs[name] / row.costs["hindsight"] for row in rows]
            warm = [row.warm[name] / row.costs["hindsight"] for row in rows if name in row.warm]
            worst = rows[ratios.index(max(ratios))]
            table.add_row(
                name,
                f"{mean(ratios):.3f}",
                f"{mean(warm):.3f}" if warm else "-",
                f"{sum(ratio <= 1.03 for ratio in ratios) / len(rows):.0%}",
                f"{sum(ratio <= 1.08 for ratio in ratios) / len(rows):.0%}",
                f"{max(ratios):.3f}",
                f"{worst.cell.name} ({oracle.describe_plan(worst.best)})",
            )
        self.console.print(table)
        table = Table("policy", "relative to", "mean", "more than 2 % higher", "worst", "in the cell", box=None)
        for name in self.names:
            others = [other for other in self.names if other != name] if name == DEFAULT_POLICY else []
            for other in ["fixed K", *BASELINES, *others]:
                ratios = [row.costs[name] / row.costs[other] for row in rows]
                worst = rows[ratios.index(max(ratios))]
                higher = sum(ratio > 1.02 for ratio in ratios)
                table.add_row(
                    name, other, f"{mean(ratios):.3f}", f"{higher} cells", f"{max(ratios):.3f}", worst.cell.name
                )
        self.console.print(table)

    def steps(self) -> None:
        """Print how fast the policies settle after step changes of the link."""
        table = Table("policy", "change", "world", "rounds to settle", box=None)
        texts = self.texts(("target-v1", 0.7))[:SETTLING_TEXTS]
        for name in self.names:
            settled = []
            for (before, after), (board, verifier) in ((c, w) for c in CHANGES for w in CHANGING):
                changing = Cell(f"{before}:{CHANGE_AT_SECONDS:g},{after}", board, SMALL_DRAFT_BYTES, verifier)
                after_change = changing._replace(link=after.rpartition(",")[2])
                changed_at = CHANGE_AT_SECONDS + (5.0 if "offline" in after else 0.0)
                recorder = NewTextPlans(self.make_planner(name, changing.profiled_device()), changed_at)
                simulator = Simulator(changing.world(), recorder)
                # Repeat the texts if all of them are finished before the change.
                for text in itertools.islice(itertools.cycle(texts), MAX_TEXTS):
                    simulator.run(text)
                    if len(recorder.plans) >= ROUNDS_AFTER_CHANGE:
                        break
                plans = recorder.plans
                rounds = _rounds_to_settle(
                    plans, functools.cache(functools.partial(_cost_of, texts, after_change, self.objective))
                )
                settled.append(rounds)
                if name == DEFAULT_POLICY:
                    table.add_row(name, f"{before} to {after}", f"{board}, {verifier}", str(rounds))
            table.add_row(name, "all", "", f"worst {max(settled)}, median {median(settled):g}")
        self.console.print(table)

    def energy(self) -> None:
        """Print how well an energy budget is kept, and its cost."""
        columns = ("W", "J/100 tokens", "ms/token")
        table = Table("world", *columns, "budget: W", "drawn", *columns[1:], box=None)
        table.add_column("streaming: J/100 tokens")
        table.add_column("objective energy: J/100 tokens")
        texts = [text for kind in TEXT_KINDS[:4] for text in self.texts(kind)[:12]]
        for link, board, weight_bytes, verifier in BUDGET_WORLDS:
            cell = Cell(link, board, weight_bytes, verifier)
            unlimited = simulate(texts, self.make_planner("analytic", cell.profiled_device()), cell.world())
            budget_watts = BUDGET_SHARE * unlimited.joules / unlimited.latency_seconds
            limited = simulate(
                texts, self.make_planner("analytic", cell.profiled_device(), EnergyBudget(budget_watts)), cell.world()
            )
            streamed = simulate(texts, FixedPlanner(BASELINES["streaming"]), cell.world())
            frugal = make_planner("analytic", PRESETS["energy"], cell.profiled_device(), acceptance=self.acceptance)
            table.add_row(
                f"{link}, {board} {weight_bytes / 1e6:.0f} MB, {verifier}",
                f"{unlimited.joules / unlimited.latency_seconds:.2f}",
                _joules(unlimited),
                f"{1e3 * unlimited.seconds_per_token:.1f}",
                f"{budget_watts:.2f}",
                f"{limited.joules / limited.latency_seconds / budget_watts:.1%}",
                _joules(limited),
                f"{1e3 * limited.seconds_per_token:.1f}",
                _joules(streamed),
                _joules(simulate(texts, frugal, cell.world())),
            )
        self.console.print(table)
        self.console.print("published reference: 8 J per 100 tokens, and 12 for the alternatives on the paper's board")

    def siblings(self) -> None:
        """Print tokens per round with siblings. Times do not matter, so any world will do."""
        counts, uncertain = (0, 1, 3, 7), 0.8
        table = Table(
            "target, sampling, K", *(f"+{count}" for count in counts), "+3 if uncertain", "ids sent", box=None
        )
        world = Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").world()
        for target, temperature in TEXT_KINDS:
            texts = self.texts((target, temperature))
            for length in (4, 8):
                plans = [Plan(length, siblings=count, sibling_confidence=1.0) for count in counts]
                plans.append(Plan(length, siblings=3, sibling_confidence=uncertain))
                results = [simulate(texts, FixedPlanner(plan), world, log=True) for plan in plans]
                rates = [result.tokens / result.rounds for result in results]
                shown = [f"{rate:.2f} ({rate / rates[0] - 1:+.0%})" for rate in rates[1:]]
                offered = [sum(sum(round.offered) for round in result.log) for result in results]
                share = f"{offered[-1] / offered[2]:.0%} of +3"
                table.add_row(f"{target} T={temperature:g} K={length}", f"{rates[0]:.2f}", *shown, share)
        self.console.print(table)

    def decisions(self) -> None:
        """Print the time per decision and per observation."""
        table = Table(
            "policy", "decision, microseconds: median", "mean", "slowest 1 %", "observation: median", box=None
        )
        texts = self.texts(("target-v1", 0.7))
        for name in self.names:
            timed = TimedPlanner(
                self.make_planner(name, Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").profiled_device())
            )
            simulate(texts, timed, Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").world())
            plans = sorted(timed.plans)
            table.add_row(
                name,
                f"{1e6 * median(plans):.1f}",
                f"{1e6 * mean(plans):.1f}",
                f"{1e6 * plans[len(plans) * 99 // 100]:.1f}",
                f"{1e6 * median(timed.observations):.1f}",
            )
        self.console.print(table)


class NewTextPlans:
    """Wraps a planner and records, after every round from a time on, its plan for a text that would begin now.

    Its actual plans also depend on the current text, which hides the effect of the link.
    """

    def __init__(self, planner: Planner, since: float) -> None:
        self._planner = planner
        self._since = since
        self.plans: list[Plan] = []

    def plan(self, conditions: Conditions) -> Plan:
        return self._planner.plan(conditions)

    def observe(self, outcome: Outcome) -> None:
        self._planner.observe(outcome)
        conditions = outcome.conditions
        now = conditions.now + outcome.draft_seconds + outcome.exchange_seconds
        if conditions.now >= self._since:
            new_text = Conditions(
                NEW_TEXT_TOKENS,
                NEW_TEXT_TOKENS,
                1,
                now=now,
                version=conditions.version,
                temperature=conditions.temperature,
            )
            self.plans.append(copy.deepcopy(self._planner).plan(new_text))


class TimedPlanner:
    """Wraps a planner and times its calls."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.plans: list[float] = []
        self.observations: list[float] = []

    def plan(self, conditions: Conditions) -> Plan:
        started = time.perf_counter()
        plan = self._planner.plan(conditions)
        self.plans.append(time.perf_counter() - started)
        return plan

    def observe(self, outcome: Outcome) -> None:
        started = time.perf_counter()
        self._planner.observe(outcome)
        self.observations.append(time.perf_counter() - started)


def _measure_cells(options: argparse.Namespace, all_cells: list[Cell], kind: tuple[str, float]) -> list[CellResult]:
    """Measure all cells with one kind of text; runs in a worker process."""
    benchmark, footprints = PlanningBenchmark(options), TextFootprints.from_kind(kind, options.texts, options.traces)
    return [benchmark.measure_cell(cell, footprints) for cell in all_cells if cell.kind == kind]


def _rounds_to_settle(plans: list[Plan], cost: Callable[[Plan], float]) -> int:
    """Return after how many rounds the next WINDOW plans cost at most SETTLED times the mean of the second half."""
    costs = [cost(msgspec.structs.replace(plan, reason="")) for plan in plans]
    final = mean(costs[len(costs) // 2 :])
    for index in range(len(costs) - WINDOW):
        if mean(costs[index : index + WINDOW]) <= SETTLED * final:
            return index
    return len(costs)


def _cost_of(texts: list[RecordedText], cell: Cell, objective: Objective, plan: Plan) -> float:
    """Return the cost per token of one plan for all rounds."""
    return simulate(texts, FixedPlanner(plan), cell.world()).cost(objective)


def _sum(results: list[SimulationResult]) -> SimulationResult:
    return sum(results[1:], results[0])


def _joules(result: SimulationResult) -> str:
    return f"{100 * result.joules / result.tokens:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="latency", help=f"{', '.join(PRESETS)}, or prices (default: latency)")
    parser.add_argument("--policies", nargs="*", default=list(POLICY_NAMES), metavar="NAME", help="default: all")
    parser.add_argument(
        "--links",
        nargs="*",
        default=list(LINKS),
        metavar="LINK",
        help="links of the cells: presets, schedules, or mahimahi:UP:DOWN:MS (default: all presets)",
    )
    parser.add_argument("--texts", type=int, default=96, help="texts per cell (default: %(default)s, which is all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument(
        "--traces",
        type=Path,
        default=FAMILY / "acceptance.npz",
        help="recorded acceptance (default: the example family's)",
    )
    parser.add_argument(
        "--slower",
        type=float,
        default=1.0,
        help="factor by which boards are slower than their profiles (default: %(default)g)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the links and verifiers of the cells (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="only every seventh cell")
    parser.add_argument("--each", action="store_true", help="print a line for every cell")
    tables = ("cells", "steps", "energy", "siblings", "decisions")
    parser.add_argument("--tables", nargs="*", default=tables, choices=tables, help="default: all")
    options = parser.parse_args()
    benchmark = PlanningBenchmark(options)
    for name in options.tables:
        benchmark.console.rule(name)
        getattr(benchmark, name)()
    benchmark.console.print("times, joules and bytes are modeled; acceptance is recorded")


if __name__ == "__main__":
    main()
