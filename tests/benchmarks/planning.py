"""Quality of the planner's policies in simulation: `python -m tests.benchmarks run planning`.

    cells       every link preset x board x verifier: cost per token of each policy, of the default one with one part
                left out or a draft twice as good as its bundle says, and of fixed K, streaming, edge-drafted and
                per-token decoding, against the best single plan in hindsight; a sample is a seventh of the cells
    steps       rounds after a change of the link until the plan for a new text has settled
    energy      a budget of 70 % of the power that the unconstrained planner draws: how well it is kept, and its cost
    siblings    tokens per round with siblings for every draft token, or only where the draft is uncertain
    decisions   microseconds per decision

Acceptance is recorded; everything else is modeled. The hindsight plan of a cell is the best one for exactly its texts,
which no planner can know in advance. With `+spec` the verifier itself speculates, and streaming in these cells is
streaming with speculation.

Variables of the environment: BENCHMARK_OBJECTIVE (a preset, or prices), BENCHMARK_ACCEPTANCE (another file of recorded
acceptance), BENCHMARK_SLOWER (a factor by which boards are slower than their profiles).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import msgspec

from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.factory import DEFAULT_POLICY, POLICY_NAMES, make_planner
from edge_runtime.planning.objective import PRESETS, parse_objective
from edge_runtime.planning.plan import Conditions, FixedPlanner, Outcome, Plan, Planner
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.simulation import oracle
from edge_runtime.simulation.links import LINK_PRESETS
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.result import SimulationResult
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.verifiers import VERIFIERS
from edge_runtime.simulation.world import ANCHOR_DRAFT_BYTES, SMALL_DRAFT_BYTES, World, make_world
from tests.benchmarks.harness.benchmark import Benchmark, Quantity, Scenario, Values
from tests.benchmarks.lower_bound import compute_lower_bound
from tests.benchmarks.plan_parts import PLAN_PARTS, ChangedPlanner

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
# Samples into which the cells are divided, texts of a cell, and processes that simulate them.
SLICES, CELL_TEXTS, PROCESSES = 7, 96, os.cpu_count() or 1
OBJECTIVE = parse_objective(os.environ.get("BENCHMARK_OBJECTIVE", "latency"))
TRACES = Path(os.environ.get("BENCHMARK_ACCEPTANCE", FAMILY / "acceptance.npz"))
SLOWER = float(os.environ.get("BENCHMARK_SLOWER", "1"))
# A plan has settled once the mean cost of WINDOW plans is at most this factor times the final cost; chosen.
SETTLED = 1.05
WINDOW = 5
# Number of rounds observed after a change of the link, and limit of the texts generated for them; chosen.
ROUNDS_AFTER_CHANGE, MAX_TEXTS = 300, 500
# Length in tokens of the hypothetical new text that is planned for, and of its prompt; chosen.
NEW_TEXT_TOKENS = 100
BUDGET_SHARE = 0.7
# Draft probability up to which a token is uncertain; chosen.
UNSURE = 0.8

CELLS, STEPS = "Cost per token relative to the best single plan in hindsight", "Changes of the link"
HINDSIGHT, STREAMING = "hindsight", "streaming"
MEAN = Quantity("mean", digits=3)
WITHIN_3, WITHIN_8 = (Quantity(f"cells within {percent} %", "%", digits=0, higher_is_better=True) for percent in (3, 8))
WORST = Quantity("worst cell", quantile=1.0)
WORST_STREAMING = Quantity("worst cell / streaming", digits=3, quantile=1.0)
SETTLING = Quantity("rounds to settle, median", digits=0)
SLOWEST = Quantity("slowest", digits=0)
BUDGET = Quantity("budget", "W")
DRAWN = Quantity("drawn of it", "%", digits=1)
PER_TOKEN = Quantity("per token without budget", "ms", digits=1)
PER_TOKEN_LIMITED = Quantity("with it", "ms", digits=1)
JOULES = tuple(
    Quantity(f"100 tokens {how}", "J", digits=1)
    for how in ("without budget", "with it", "streaming", "at objective energy")
)
ALONE = Quantity("tokens per round without")
SIBLINGS = {count: Quantity(f"+{count}", "%", digits=0, higher_is_better=True) for count in (1, 3, 7)}
UNCERTAIN = Quantity("+3 where uncertain", "%", digits=0, higher_is_better=True)
DECISION, OBSERVATION = Quantity("a decision", "us", digits=1), Quantity("an observation", "us", digits=1)
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


def make_cells(part: int) -> Iterator[Cell]:
    """Yield every SLICES-th cell, each with one kind of text; kinds alternate over links, boards and verifiers."""
    for i, link in enumerate(LINKS):
        for j, board in enumerate(BOARDS):
            for k, name in enumerate(VERIFIERS):
                if ((i * len(BOARDS) + j) * len(VERIFIERS) + k) % SLICES == part:
                    yield Cell(link, *board, name, TEXT_KINDS[(i + j + k) % len(TEXT_KINDS)], SLOWER)


def read_kind(kind: tuple[str, float]) -> list[RecordedText]:
    """The recorded texts of a target and a temperature."""
    return read_texts(TRACES, target=kind[0], temperature=kind[1])


class TextFootprints(NamedTuple):
    """Texts of one kind, and the footprints of all static plans and of the fixed plans on them."""

    texts: list[RecordedText]
    static: oracle.PlanFootprints
    fixed: oracle.PlanFootprints

    @classmethod
    def from_kind(cls, kind: tuple[str, float]) -> TextFootprints:
        texts = read_kind(kind)
        plans = oracle.make_static_plans(oracle.measure_calibration(texts))
        selected = texts[:CELL_TEXTS]
        return cls(
            selected, oracle.PlanFootprints(selected, plans), oracle.PlanFootprints(selected, list(oracle.FIXED_PLANS))
        )


@functools.cache
def bundle_acceptance() -> Mapping[str, float]:
    """Acceptance rates of the example family's draft, which a planner starts from."""
    return read_bundle(FAMILY / "bundle", verify=False).manifest.acceptance


def make_policy(name: str, device: DeviceModel, budget: EnergyBudget | None = None) -> Planner:
    return make_planner(name, OBJECTIVE, device, acceptance=bundle_acceptance(), budget=budget)


def measure_cells(part: int, kind: tuple[str, float]) -> list[dict[str, float]]:
    """Costs per token, by policy or baseline, in the cells of a part that have one kind of text."""
    footprints = TextFootprints.from_kind(kind)
    return [measure_cell(cell, footprints) for cell in make_cells(part) if cell.kind == kind]


def measure_cell(cell: Cell, footprints: TextFootprints) -> dict[str, float]:
    _, result = footprints.static.find_best(cell.world, OBJECTIVE, ahead=True)
    _, fixed = footprints.fixed.find_best(cell.world, OBJECTIVE, ahead=False)
    costs = {
        HINDSIGHT: result.cost(OBJECTIVE),
        "clairvoyant": compute_lower_bound(footprints.texts, cell.world(), OBJECTIVE),
        "best fixed K in hindsight": fixed.cost(OBJECTIVE),
    }
    for name, plan in BASELINES.items():
        costs[name] = simulate(footprints.texts, FixedPlanner(plan), cell.world()).cost(OBJECTIVE)
    planners = {name: make_policy(name, cell.profiled_device()) for name in POLICY_NAMES}
    for part, changes in PLAN_PARTS.items():
        planners[without(part)] = ChangedPlanner(make_policy(DEFAULT_POLICY, cell.profiled_device()), changes)
    for name, changes in UNDERRATING.items():
        planner = make_planner(DEFAULT_POLICY, OBJECTIVE, cell.profiled_device(), acceptance=HALF_AS_GOOD)
        planners[name] = ChangedPlanner(planner, changes)
    for name, planner in planners.items():
        costs[name] = _sum(Simulator(cell.world(), planner).run_all(footprints.texts)).cost(OBJECTIVE)
    return costs


def without(part: str) -> str:
    """Name in the table of the planner without one of PLAN_PARTS."""
    return f"{DEFAULT_POLICY} without {part}"


# What a bundle says that underrates the shipped draft by half, and planners that begin with that.
HALF_AS_GOOD = dict.fromkeys(("T=0", "T=0.7", "T=1"), 0.3)
UNDERRATING: dict[str, Mapping[str, Any]] = {
    f"{DEFAULT_POLICY}, draft underrated": {},
    f"{without('guessing along with streams')}, draft underrated": PLAN_PARTS["guessing along with streams"],
}


def describe_costs(cells: Sequence[dict[str, float]], name: str) -> Values:
    """The figures of one policy or baseline in some cells."""
    ratios = [costs[name] / costs[HINDSIGHT] for costs in cells]
    slower = [costs[name] / costs[STREAMING] for costs in cells]
    return {
        MEAN.name: mean(ratios),
        WITHIN_3.name: 100 * mean(ratio <= 1.03 for ratio in ratios),
        WITHIN_8.name: 100 * mean(ratio <= 1.08 for ratio in ratios),
        WORST.name: max(ratios),
        WORST_STREAMING.name: max(slower),
    }


def measure_steps(name: str) -> Values:
    """How fast a policy settles after step changes of the link."""
    texts, settled = read_kind(("target-v1", 0.7))[:SETTLING_TEXTS], []
    for (before, after), (board, verifier) in itertools.product(CHANGES, CHANGING):
        changing = Cell(f"{before}:{CHANGE_AT_SECONDS:g},{after}", board, SMALL_DRAFT_BYTES, verifier)
        after_change = changing._replace(link=after.rpartition(",")[2])
        changed_at = CHANGE_AT_SECONDS + (5.0 if "offline" in after else 0.0)
        recorder = NewTextPlans(make_policy(name, changing.profiled_device()), changed_at)
        simulator = Simulator(changing.world(), recorder)
        # Repeat the texts if all of them are finished before the change.
        for text in itertools.islice(itertools.cycle(texts), MAX_TEXTS):
            simulator.run(text)
            if len(recorder.plans) >= ROUNDS_AFTER_CHANGE:
                break
        cost = functools.cache(functools.partial(_cost_of, texts, after_change))
        settled.append(_rounds_to_settle(recorder.plans, cost))
    return {SETTLING.name: median(settled), SLOWEST.name: max(settled)}


def measure_energy(cell: Cell) -> Values:
    """How well an energy budget is kept, and its cost."""
    texts = [text for kind in TEXT_KINDS[:4] for text in read_kind(kind)[:12]]
    device = cell.profiled_device()
    unlimited = simulate(texts, make_policy("analytic", device), cell.world())
    budget_watts = BUDGET_SHARE * unlimited.joules / unlimited.latency_seconds
    limited = simulate(texts, make_policy("analytic", device, EnergyBudget(budget_watts)), cell.world())
    frugal = make_planner("analytic", PRESETS["energy"], device, acceptance=bundle_acceptance())
    others = (simulate(texts, planner, cell.world()) for planner in (FixedPlanner(BASELINES[STREAMING]), frugal))
    drawn = limited.joules / limited.latency_seconds
    joules = (100 * result.joules / result.tokens for result in (unlimited, limited, *others))
    return {
        BUDGET.name: budget_watts,
        DRAWN.name: 100 * drawn / budget_watts,
        PER_TOKEN.name: 1e3 * unlimited.seconds_per_token,
        PER_TOKEN_LIMITED.name: 1e3 * limited.seconds_per_token,
        **dict(zip((quantity.name for quantity in JOULES), joules, strict=True)),
    }


def measure_siblings(kind: tuple[str, float], length: int) -> Values:
    """Tokens per round with siblings. Times do not matter, so any world will do."""
    world, texts = Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded").world(), read_kind(kind)

    def tokens_per_round(count: int, confidence: float = 1.0) -> float:
        plan = Plan(length, siblings=count, sibling_confidence=confidence)
        result = simulate(texts, FixedPlanner(plan), world)
        return result.tokens / result.rounds

    alone = tokens_per_round(0)
    gains = {quantity.name: 100 * (tokens_per_round(count) / alone - 1) for count, quantity in SIBLINGS.items()}
    return {ALONE.name: alone, **gains, UNCERTAIN.name: 100 * (tokens_per_round(3, UNSURE) / alone - 1)}


def measure_decisions(name: str) -> Values:
    """The time per decision and per observation."""
    cell = Cell("wifi", "raspberry-pi-5", SMALL_DRAFT_BYTES, "loaded")
    timed = TimedPlanner(make_policy(name, cell.profiled_device()))
    simulate(read_kind(("target-v1", 0.7)), timed, cell.world())
    return {DECISION.name: 1e6 * median(timed.plans), OBSERVATION.name: 1e6 * median(timed.observations)}


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


def _rounds_to_settle(plans: list[Plan], cost: Callable[[Plan], float]) -> int:
    """Return after how many rounds the next WINDOW plans cost at most SETTLED times the mean of the second half."""
    costs = [cost(msgspec.structs.replace(plan, reason="")) for plan in plans]
    final = mean(costs[len(costs) // 2 :])
    for index in range(len(costs) - WINDOW):
        if mean(costs[index : index + WINDOW]) <= SETTLED * final:
            return index
    return len(costs)


def _cost_of(texts: list[RecordedText], cell: Cell, plan: Plan) -> float:
    """Return the cost per token of one plan for all rounds."""
    return simulate(texts, FixedPlanner(plan), cell.world()).cost(OBJECTIVE)


def _sum(results: list[SimulationResult]) -> SimulationResult:
    return sum(results[1:], results[0])


# What measures a scenario, by its key: a function of the repetition.
MEASURES: dict[str, tuple[Scenario, Callable[[int], Values]]] = {}


def _add(
    table: str, labels: Mapping[str, str], quantities: tuple[Quantity, ...], measure: Callable[[int], Values]
) -> None:
    scenario = Scenario(labels, quantities, table, quick=table != STEPS, samples=None if table == CELLS else 1)
    MEASURES[scenario.key] = scenario, measure


@functools.cache
def _costs_of_part(part: int) -> list[dict[str, float]]:
    with ProcessPoolExecutor(min(PROCESSES, len(TEXT_KINDS))) as pool:
        return list(itertools.chain.from_iterable(pool.map(measure_cells, [part] * len(TEXT_KINDS), TEXT_KINDS)))


for _name in (
    "clairvoyant",
    "best fixed K in hindsight",
    *BASELINES,
    *POLICY_NAMES,
    *map(without, PLAN_PARTS),
    *UNDERRATING,
):
    _add(
        CELLS,
        {"policy": _name},
        (MEAN, WITHIN_3, WITHIN_8, WORST, WORST_STREAMING),
        lambda part, name=_name: describe_costs(_costs_of_part(part), name),
    )
for _name in POLICY_NAMES:
    _add(STEPS, {"policy": _name}, (SETTLING, SLOWEST), lambda _, name=_name: measure_steps(name))
for _cell in (Cell(*world) for world in BUDGET_WORLDS):
    _add(
        f"Energy budgets of {BUDGET_SHARE:.0%} of what the planner draws without one",
        {"world": f"{_cell.link}, {_cell.board} {_cell.weight_bytes / 1e6:.0f} MB, {_cell.verifier}"},
        (BUDGET, DRAWN, PER_TOKEN, PER_TOKEN_LIMITED, *JOULES),
        lambda _, cell=_cell: measure_energy(cell),
    )
for _kind, _length in itertools.product(TEXT_KINDS, (4, 8)):
    _add(
        "Siblings: more tokens per round",
        {"target": _kind[0], "T": f"{_kind[1]:g}", "K": str(_length)},
        (ALONE, *SIBLINGS.values(), UNCERTAIN),
        lambda _, kind=_kind, length=_length: measure_siblings(kind, length),
    )
for _name in POLICY_NAMES:
    _add("Decisions", {"policy": _name}, (DECISION, OBSERVATION), lambda _, name=_name: measure_decisions(name))


async def measure_planning(scenario: Scenario, repetition: int) -> Values:
    return MEASURES[scenario.key][1](repetition)


BENCHMARK = Benchmark(
    name="planning",
    title="Policies in simulation: times, joules and bytes are modeled, acceptance is recorded",
    scenarios=tuple(scenario for scenario, _ in MEASURES.values()),
    running=lambda: contextlib.nullcontext(measure_planning),
    repetitions=SLICES,
    quick_repetitions=1,
)
