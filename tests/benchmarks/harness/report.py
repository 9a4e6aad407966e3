"""Tables and charts of runs, the comparison of two, and the tables in READMEs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_verifier.acceptance.bootstrap import Interval
from edge_runtime.protocol.errors import InputError
from tests.benchmarks.harness.benchmark import Benchmark, Quantity, Scenario
from tests.benchmarks.harness.intervals import median_interval, ratio_interval
from tests.benchmarks.harness.samples import SampleFile

# A change counts if its interval excludes 1 and the ratio of medians is further from 1 than this. Chosen: less is of no
# consequence, and intervals over few repetitions are too narrow.
MIN_CHANGE = 0.05
# What a README has around a table.
MARKS = re.compile(r"(<!-- benchmark: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def format_table(benchmark: Benchmark, file: SampleFile) -> str:
    """Return a Markdown table of medians with 95 % intervals; a goal that is missed is marked.

    Scenarios that measure the same quantities are rows with a column for each quantity; otherwise every quantity has a
    row of its own.
    """
    values = file.values()
    first = benchmark.scenarios[0]
    names = [quantity.name for quantity in first.quantities]
    if all([quantity.name for quantity in scenario.quantities] == names for scenario in benchmark.scenarios):
        columns = zip(*(scenario.quantities for scenario in benchmark.scenarios), strict=True)
        header = [*first.labels, *map(_heading_of_column, columns)]
        rows = [
            [
                *scenario.labels.values(),
                *(_cell(quantity, values.get((scenario.key, quantity.name))) for quantity in scenario.quantities),
            ]
            for scenario in benchmark.scenarios
        ]
    else:
        header = [*first.labels, "what", "measured", "goal"]
        rows = [
            [
                *scenario.labels.values(),
                quantity.heading,
                _cell(quantity, values.get((scenario.key, quantity.name))),
                _goal(quantity),
            ]
            for scenario in benchmark.scenarios
            for quantity in scenario.quantities
        ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_run(file: SampleFile) -> str:
    """Return one sentence about where samples come from."""
    counts = {len(values) for values in file.values().values()}
    repetitions = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(file.info.packages.items()))
    return (
        f"Medians of {repetitions} repetitions with 95 % intervals; commit {file.info.commit}, {file.started}, "
        f"{file.info.machine}, Python {file.info.python}, {versions}."
    )


def save_chart(benchmark: Benchmark, file: SampleFile, path: Path) -> None:
    """Save a chart of all medians with intervals and goals, one panel for each quantity."""
    import matplotlib.figure

    values = file.values()
    quantities = {quantity.name: quantity for scenario in benchmark.scenarios for quantity in scenario.quantities}
    figure = matplotlib.figure.Figure(figsize=(9, 1 + 0.32 * len(values)), layout="constrained")
    panels = figure.subplots(len(quantities), squeeze=False)[:, 0]
    for axes, quantity in zip(panels, quantities.values(), strict=True):
        rows = [
            (scenario.key, median_interval(values[scenario.key, quantity.name]))
            for scenario in benchmark.scenarios
            if (scenario.key, quantity.name) in values
        ]
        medians = [interval.value for _, interval in rows]
        errors = [
            [interval.value - interval.low for _, interval in rows],
            [interval.high - interval.value for _, interval in rows],
        ]
        axes.errorbar(medians, range(len(rows)), xerr=errors, fmt="o", capsize=3)
        axes.set_yticks(range(len(rows)), [key for key, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(quantity.heading)
        if quantity.goal is not None:
            axes.axvline(quantity.goal, linestyle="--", color="gray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Change:
    """A quantity of a scenario in two runs.

    Attributes:
        ratio: median of the new run divided by that of the old one.
    """

    scenario: Scenario
    quantity: Quantity
    old: float
    new: float
    ratio: Interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `noise` if the runs do not tell."""
        certain = self.ratio.low > 1 or self.ratio.high < 1
        if not certain or abs(self.ratio.value - 1) < MIN_CHANGE:
            return "noise"
        return "better" if (self.ratio.value > 1) == self.quantity.higher_is_better else "worse"


def compare(benchmark: Benchmark, old: SampleFile, new: SampleFile) -> list[Change]:
    """Compare what both runs measured.

    Raises:
        InputError: they have no quantity in common, or are of different machines.
    """
    if old.info.machine != new.info.machine:
        raise InputError(
            f"{old.path} is of {old.info.machine} and {new.path} of {new.info.machine}: compare runs of one machine"
        )
    before, after = old.values(), new.values()
    changes = []
    for scenario in benchmark.scenarios:
        for quantity in scenario.quantities:
            first, second = before.get((scenario.key, quantity.name)), after.get((scenario.key, quantity.name))
            if first and second and median_interval(first).value:
                old_median, new_median = median_interval(first).value, median_interval(second).value
                changes.append(Change(scenario, quantity, old_median, new_median, ratio_interval(second, first)))
    if not changes:
        raise InputError(f"{old.path} and {new.path} have nothing in common: compare two runs of one benchmark")
    return changes


def format_changes(changes: Sequence[Change]) -> str:
    """Return a Markdown table of changes."""
    header = [*changes[0].scenario.labels, "what", "old", "new", "new / old", "verdict"]
    rows = [
        [
            *change.scenario.labels.values(),
            change.quantity.heading,
            change.quantity.format(change.old),
            change.quantity.format(change.new),
            str(change.ratio),
            change.verdict,
        ]
        for change in changes
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def update_readme(text: str, tables: dict[str, str]) -> str:
    """Return a README with the table of each benchmark between its marks replaced.

    Raises:
        InputError: it has marks of a benchmark without a table.
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise InputError(f"a README wants the table of {match[2]!r}, and there is none: run that benchmark first")
        return f"{match[1]}{tables[match[2]]}\n{match[3]}"

    return MARKS.sub(replace, text)


def _heading_of_column(quantities: Sequence[Quantity]) -> str:
    goals = sorted({_goal(quantity) for quantity in quantities} - {"-"})
    return f"{quantities[0].heading}, {' or '.join(goals)}" if goals else quantities[0].heading


def _goal(quantity: Quantity) -> str:
    if quantity.goal is None:
        return "-"
    return f"at {'least' if quantity.higher_is_better else 'most'} {quantity.format(quantity.goal)}"


def _cell(quantity: Quantity, values: Sequence[float] | None) -> str:
    if not values:
        return "not measured"
    interval = median_interval(values)
    low, value, high = (quantity.format(each) for each in (interval.low, interval.value, interval.high))
    shown = value if low == high else f"{value} ({low} to {high})"
    return shown if quantity.is_reached(interval.value) else f"**{shown}**"
