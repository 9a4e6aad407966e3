"""How good the policies are, in simulation: `python -m tests.benchmarks.planning`.

    cells       every link preset x board x verifier: cost per token of each policy against the best single plan in
                hindsight, against fixed K, and against streaming, edge-drafted and per-token decoding
    steps       rounds until what would be planned for the next text has settled after the link has changed
    energy      a budget of 70 % of what the unconstrained planner draws: how well it is held, and what that costs
    siblings    tokens per round, with siblings beside every drafted token or where the draft is unsure
    decisions   microseconds per decision

Everything is modelled but the acceptance, which was recorded. The hindsight plan is chosen for each cell after playing
its very texts; no planner can know it beforehand. With `+spec` the verifier speculates beside its target, and streaming
in these cells is streaming with speculation.
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
from edge_runtime.simulation.lower_bound import compute_lower_bound
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.verifiers import VERIFIERS
from edge_runtime.simulation.world import ANCHOR_DRAFT_BYTES, SMALL_DRAFT_BYTES, World, make_world

FAMILY = Path(__file__).parent.parent.parent / "export" / "example_family"
LINKS = (*LINK_PRESETS, "bursty")
# An anchor draft of a 7B target does not fit a Zero's memory, and is hopeless on a Pi 4.
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
KINDS = tuple((target, temperature) for temperature in (0.0, 0.7, 1.0) for target in ("target-v1", "target-v2"))
BASELINES = {
    "streaming": Plan(0, oracle.WHOLE_TEXT),
    "edge-drafted K=5": Plan(5),
    "per token": Plan(0),
}
CHANGES = (("4g", "weak-4g"), ("weak-4g", "4g"), ("wifi", "offline:5,wifi"), ("lan", "4g"))
CHANGING = (("laptop", "loaded"), ("raspberry-pi-5", "32b"), ("server", "32b"), ("raspberry-pi-4", "7b+spec"))
CHANGE_AT = 12.0
SETTLING_TEXTS = 8
SETTLED = 1.05
WINDOW = 5
# Of a change of the link: rounds that are looked at behind it, and texts that may be played for them.
ROUNDS_BEHIND, MOST_TEXTS = 300, 500
# Tokens of the text that plans are asked for, and of its prompt.
ASKED = 100
BUDGET_SHARE = 0.7
# Where the unconstrained planner drafts enough that streaming draws less than the budget.
BUDGETED = (
    ("lan", "raspberry-pi-4", SMALL_DRAFT_BYTES, "32b"),
    ("lan", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded"),
    ("wifi", "raspberry-pi-4", SMALL_DRAFT_BYTES, "loaded"),
    ("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "32b"),
    ("wifi", "raspberry-pi-5", ANCHOR_DRAFT_BYTES, "loaded"),
    ("wifi", "jetson-orin-nano", SMALL_DRAFT_BYTES, "32b"),
    ("4g", "laptop", ANCHOR_DRAFT_BYTES, "loaded"),
)


class Cell(NamedTuple):
    """One world and the kind of text that is played in it."""

    link: str
    board: str
    weight_bytes: int
    verifier: str
    kind: tuple[str, float] = KINDS[0]
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

    def believed(self) -> DeviceModel:
        """What the profile says of the board, which the planner starts from."""
        return self._replace(slower=1.0).world().device


def cells(links: list[str], every: int, slower: float, seed: int = 1) -> Iterator[Cell]:
    """Every so-many-th cell of the table, each with one kind of text, so that all kinds come with all parts."""
    for i, link in enumerate(links):
        for j, board in enumerate(BOARDS):
            for k, name in enumerate(VERIFIERS):
                if ((i * len(BOARDS) + j) * len(VERIFIERS) + k) % every == 0:
                    yield Cell(link, *board, name, KINDS[(i + j + k) % len(KINDS)], slower, seed)


class Prints(NamedTuple):
    """Texts of one kind, and what every static plan does to them."""

    texts: list[RecordedText]
    every: oracle.PlanFootprints
    fixed: oracle.PlanFootprints

    @classmethod
    def of(cls, kind: tuple[str, float], count: int, traces: Path) -> Prints:
        texts = read_texts(traces, target=kind[0], temperature=kind[1])
        plans = oracle.make_static_plans(oracle.measure_calibration(texts))
        some = texts[:count]
        return cls(some, oracle.PlanFootprints(some, plans), oracle.PlanFootprints(some, list(oracle.FIXED_PLANS)))


class Row(NamedTuple):
    """Costs in one cell, by name; `warm` without the first text."""

    cell: Cell
    costs: dict[str, float]
    warm: dict[str, float]
    best: Plan


class Bench:
    """What all tables need."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.console = Console(width=220, highlight=False)
        self.objective: Objective = parse_objective(options.objective)
        self.names: list[str] = options.policies
        self.options = options
        self.acceptance = read_bundle(FAMILY / "bundle", verify=False).manifest.acceptance

    def policy(self, name: str, device: DeviceModel, budget: EnergyBudget | None = None) -> Planner:
        return make_planner(name, self.objective, device, acceptance=self.acceptance, budget=budget)

    def texts(self, kind: tuple[str, float]) -> list[RecordedText]:
        return read_texts(self.options.traces, target=kind[0], temperature=kind[1])

    def cells(self) -> None:
        started = time.perf_counter()
        options = self.options
        all_cells = list(cells(options.links, 7 if options.quick else 1, options.slower, options.seed))
        rows: list[Row] = []
        with ProcessPoolExecutor(min(options.jobs, len(KINDS))) as pool:
            for some in pool.map(functools.partial(_rows, options, all_cells), KINDS):
                rows += some
                self.console.print(f"{len(rows)} of {len(all_cells)} cells, {time.perf_counter() - started:.0f} s")
                for row in some if options.each else ():
                    costs = "  ".join(f"{name} {1e3 * cost:.1f}" for name, cost in row.costs.items())
                    self.console.print(f"{row.cell.name}: {costs}  ({oracle.describe_plan(row.best)})")
        self._print_cells(rows)

    def row(self, cell: Cell, prints: Prints) -> Row:
        best, result = prints.every.find_best(cell.world, self.objective, ahead=True)
        _, fixed = prints.fixed.find_best(cell.world, self.objective, ahead=False)
        costs = {
            "hindsight": result.cost(self.objective),
            "clairvoyant": compute_lower_bound(prints.texts, cell.world(), self.objective),
            "fixed K": fixed.cost(self.objective),
        }
        for name, plan in BASELINES.items():
            costs[name] = simulate(prints.texts, FixedPlanner(plan), cell.world()).cost(self.objective)
        warm = {}
        for name in self.names:
            results = Simulator(cell.world(), self.policy(name, cell.believed())).run_all(prints.texts)
            costs[name] = _sum(results).cost(self.objective)
            warm[name] = _sum(results[1:]).cost(self.objective)
        return Row(cell, costs, warm, best)

    def _print_cells(self, rows: list[Row]) -> None:
        table = Table(
            "cost per token against hindsight",
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
        table = Table("policy", "against", "mean", "more than 2 % dearer", "worst", "in the cell", box=None)
        for name in self.names:
            rivals = [other for other in self.names if other != name] if name == DEFAULT_POLICY else []
            for other in ["fixed K", *BASELINES, *rivals]:
                ratios = [row.costs[name] / row.costs[other] for row in rows]
                worst = rows[ratios.index(max(ratios))]
                dearer = sum(ratio > 1.02 for ratio in ratios)
                table.add_row(
                    name, other, f"{mean(ratios):.3f}", f"{dearer} cells", f"{max(ratios):.3f}", worst.cell.name
                )
        self.console.print(table)

    def steps(self) -> None:
        """Step changes of the link."""
        table = Table("policy", "change", "world", "rounds to settle", box=None)
        texts = self.texts(("target-v1", 0.7))[:SETTLING_TEXTS]
        for name in self.names:
            settled = []
            for (before, after), (board, verifier) in ((c, w) for c in CHANGES for w in CHANGING):
                changing = Cell(f"{before}:{CHANGE_AT:g},{after}", board, SMALL_DRAFT_BYTES, verifier)
                then = changing._replace(link=after.rpartition(",")[2])
                back = CHANGE_AT + (5.0 if "offline" in after else 0.0)
                asked = Asked(self.policy(name, changing.believed()), back)
                simulator = Simulator(changing.world(), asked)
                # A world in which all texts are written before the change plays them again.
                for text in itertools.islice(itertools.cycle(texts), MOST_TEXTS):
                    simulator.run(text)
                    if len(asked.plans) >= ROUNDS_BEHIND:
                        break
                plans = asked.plans
                rounds = _settling(plans, functools.cache(functools.partial(_cost_of, texts, then, self.objective)))
                settled.append(rounds)
                if name == DEFAULT_POLICY:
                    table.add_row(name, f"{before} to {after}", f"{board}, {verifier}", str(rounds))
            table.add_row(name, "all", "", f"worst {max(settled)}, median {median(settled):g}")
        self.console.print(table)

    def energy(self) -> None:
        """A budget of energy."""
        columns = ("W", "J/100 tokens", "ms/token")
        table = Table("world", *columns, "budget: W", "drawn", *columns[1:], box=None)
        table.add_column("streaming: J/100 tokens")
        table.add_column("objective energy: J/100 tokens")
        texts = [text for kind in KINDS[:4] for text in self.texts(kind)[:12]]
        for link, board, weight_bytes, verifier in BUDGETED:
            cell = Cell(link, board, weight_bytes, verifier)
            free = simulate(texts, self.policy("analytic", cell.believed()), cell.world())
            wanted = BUDGET_SHARE * free.joules / free.latency_seconds
            held = simulate(texts, self.policy("analytic", cell.believed(), EnergyBudget(wanted)), cell.world())
            streamed = simulate(texts, FixedPlanner(BASELINES["streaming"]), cell.world())
            sparing = make_planner("analytic", PRESETS["energy"], cell.believed(), acceptance=self.acceptance)
            table.add_row(
                f"{link}, {board} {weight_bytes / 1e6:.0f} MB, {verifier}",
                f"{free.joules / free.latency_seconds:.2f}",
                _joules(free),
                f"{1e3 * free.seconds_per_token:.1f}",
                f"{wanted:.2f}",
                f"{held.joules / held.latency_seconds / wanted:.1%}",
                _joules(held),
                f"{1e3 * held.seconds_per_token:.1f}",
                _joules(streamed),
                _joules(simulate(texts, sparing, cell.world())),
            )
        self.console.print(table)
        self.console.print("the paper's line to beat: 8 J per 100 tokens, against 12 for others on its board")

    def siblings(self) -> None:
        """What siblings bring, in tokens per round; no time, so any world will do."""
        counts, unsure = (0, 1, 3, 7), 0.8
        table = Table(
            "target, sampling, K", *(f"+{count}" for count in counts), "+3 where unsure", "ids sent", box=None
        )
        world = Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").world()
        for target, temperature in KINDS:
            texts = self.texts((target, temperature))
            for length in (4, 8):
                plans = [Plan(length, siblings=count, sibling_confidence=1.0) for count in counts]
                plans.append(Plan(length, siblings=3, sibling_confidence=unsure))
                results = [simulate(texts, FixedPlanner(plan), world, log=True) for plan in plans]
                rates = [result.tokens / result.rounds for result in results]
                shown = [f"{rate:.2f} ({rate / rates[0] - 1:+.0%})" for rate in rates[1:]]
                offered = [sum(sum(round.offered) for round in result.log) for result in results]
                few = f"{offered[-1] / offered[2]:.0%} of +3"
                table.add_row(f"{target} T={temperature:g} K={length}", f"{rates[0]:.2f}", *shown, few)
        self.console.print(table)

    def decisions(self) -> None:
        """What a decision costs."""
        table = Table("policy", "decision, microseconds: median", "mean", "slowest 1 %", "learning: median", box=None)
        texts = self.texts(("target-v1", 0.7))
        for name in self.names:
            timed = Timed(self.policy(name, Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").believed()))
            simulate(texts, timed, Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").world())
            plans = sorted(timed.plans)
            table.add_row(
                name,
                f"{1e6 * median(plans):.1f}",
                f"{1e6 * mean(plans):.1f}",
                f"{1e6 * plans[len(plans) * 99 // 100]:.1f}",
                f"{1e6 * median(timed.lessons):.1f}",
            )
        self.console.print(table)


class Asked:
    """A planner that is asked, after every round from a time on, what it would plan for a text that begins now.

    What it does plan depends on the text as well, which no link changes.
    """

    def __init__(self, planner: Planner, since: float) -> None:
        self._planner = planner
        self._since = since
        self.plans: list[Plan] = []

    def plan(self, conditions: Conditions) -> Plan:
        return self._planner.plan(conditions)

    def observe(self, outcome: Outcome) -> None:
        self._planner.observe(outcome)
        told = outcome.conditions
        now = told.now + outcome.draft_seconds + outcome.exchange_seconds
        if told.now >= self._since:
            begins = Conditions(ASKED, ASKED, 1, now=now, version=told.version, temperature=told.temperature)
            self.plans.append(copy.deepcopy(self._planner).plan(begins))


class Timed:
    """A planner with a stopwatch."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.plans: list[float] = []
        self.lessons: list[float] = []

    def plan(self, conditions: Conditions) -> Plan:
        started = time.perf_counter()
        plan = self._planner.plan(conditions)
        self.plans.append(time.perf_counter() - started)
        return plan

    def observe(self, outcome: Outcome) -> None:
        started = time.perf_counter()
        self._planner.observe(outcome)
        self.lessons.append(time.perf_counter() - started)


def _rows(options: argparse.Namespace, all_cells: list[Cell], kind: tuple[str, float]) -> list[Row]:
    """Of all cells with this kind of text, in a process of their own."""
    bench, prints = Bench(options), Prints.of(kind, options.texts, options.traces)
    return [bench.row(cell, prints) for cell in all_cells if cell.kind == kind]


def _settling(plans: list[Plan], cost: Callable[[Plan], float]) -> int:
    """Rounds after which the next WINDOW plans cost what the later half does, within SETTLED."""
    costs = [cost(msgspec.structs.replace(plan, reason="")) for plan in plans]
    final = mean(costs[len(costs) // 2 :])
    for index in range(len(costs) - WINDOW):
        if mean(costs[index : index + WINDOW]) <= SETTLED * final:
            return index
    return len(costs)


def _cost_of(texts: list[RecordedText], cell: Cell, objective: Objective, plan: Plan) -> float:
    """Cost per token of one plan for all rounds."""
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
        help="of the cells; schedules and mahimahi:UP:DOWN:MS too (default: all presets)",
    )
    parser.add_argument("--texts", type=int, default=96, help="in each cell (default: %(default)s, which is all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--traces", type=Path, default=FAMILY / "acceptance.npz", help="default: the family's")
    parser.add_argument("--slower", type=float, default=1.0, help="boards are this much slower than their profiles say")
    parser.add_argument("--seed", type=int, default=1, help="of the cells' links and verifiers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="every seventh cell")
    parser.add_argument("--each", action="store_true", help="a line for every cell")
    tables = ("cells", "steps", "energy", "siblings", "decisions")
    parser.add_argument("--tables", nargs="*", default=tables, choices=tables, help="default: all")
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.tables:
        bench.console.rule(name)
        getattr(bench, name)()
    bench.console.print("times, joules and bytes are modelled; acceptance was recorded")


if __name__ == "__main__":
    main()
