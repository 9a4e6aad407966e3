"""Tables and charts of runs, the comparison of two, and the tables in READMEs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cloud_verifier.acceptance.bootstrap import Interval
from edge_runtime.protocol.errors import InputError
from tests.benchmarks.harness.benchmark import Benchmark, Overview, Quantity, RatioGoal, Scenario
from tests.benchmarks.harness.intervals import (
    median_interval,
    paired_ratio_interval,
    quantile_interval,
    ratio_interval,
)
from tests.benchmarks.harness.samples import SampleFile

# Values of all samples by scenario and name.
SampleValues: TypeAlias = Mapping[tuple[str, str], Sequence[float]]

# A change counts if its interval excludes 1 and the ratio of medians is further from 1 than this. Chosen: less is of no
# consequence, and intervals over few repetitions are too narrow.
MIN_CHANGE = 0.05
# What a README has around a table.
MARKS = re.compile(r"(<!-- benchmark: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def format_table(benchmark: Benchmark, file: SampleFile) -> str:
    """Return Markdown tables of medians with 95 % intervals; a goal that is missed is marked.

    Scenarios of one table that measure the same quantities are rows with a column for each quantity; otherwise every
    quantity has a row of its own. With several tables, scenarios that were not measured are left out.
    """
    values = file.values()
    parts = [
        (f"**{title}**\n\n" if title else "") + _format_scenarios(scenarios, values)
        for title, scenarios in _measured_tables(benchmark, values).items()
    ]
    if benchmark.ratio_goals:
        parts.append(_format_goals(benchmark, values))
    return "\n\n".join(parts)


def format_readme(benchmark: Benchmark, file: SampleFile) -> str:
    """Return the Markdown tables for a README: those of `format_table`, or its overviews where there are any."""
    if not benchmark.overviews:
        return format_table(benchmark, file)
    values = file.values()
    tables = _measured_tables(benchmark, values)
    shown = {title for overview in benchmark.overviews for title in overview.columns}
    parts = [
        f"**{title}**\n\n{_format_scenarios(scenarios, values)}"
        for title, scenarios in tables.items()
        if title not in shown
    ]
    for overview in benchmark.overviews:
        columns = {title: heading for title, heading in overview.columns.items() if title in tables}
        if len(columns) > 1:
            parts.append(_format_overview(overview, columns, tables, values))
            goals = {title: benchmark.ratio_goals[title] for title in columns if title in benchmark.ratio_goals}
            parts += [_format_goals_by_column(goals, columns, values)] * bool(goals)
    return "\n\n".join(parts)


def _measured_tables(benchmark: Benchmark, values: SampleValues) -> dict[str, list[Scenario]]:
    """The scenarios of each table; if there are several, those that were measured."""
    measured = {key for key, _ in values}
    tables: dict[str, list[Scenario]] = {}
    for scenario in benchmark.scenarios:
        if not scenario.table or scenario.key in measured:
            tables.setdefault(scenario.table, []).append(scenario)
    return tables


def _format_overview(
    overview: Overview, columns: Mapping[str, str], tables: Mapping[str, Sequence[Scenario]], values: SampleValues
) -> str:
    """A table with a column for each of several tables, by their titles."""
    scenarios = {(title, *scenario.labels.values()): scenario for title in columns for scenario in tables[title]}
    labels = dict.fromkeys(key[1:] for key in scenarios)
    first, *others = overview.quantities

    def cell(scenario: Scenario | None) -> str:
        if scenario is None:
            return "not measured"
        medians = (values.get((scenario.key, quantity.value_name)) for quantity in others)
        figures = (
            quantity.format(median_interval(found).value) if found else "-"
            for quantity, found in zip(others, medians, strict=True)
        )
        return " / ".join([_cell(scenario, first, values), *figures])

    rows = [[*label, *(cell(scenarios.get((title, *label))) for title in columns)] for label in labels]
    headings = " / ".join(quantity.heading for quantity in overview.quantities)
    header = [*next(iter(scenarios.values())).labels, *columns.values()]
    return f"**{overview.title}: {headings}**\n\n{_markdown(header, rows)}"


def _format_goals_by_column(
    goals: Mapping[str, Sequence[RatioGoal]], columns: Mapping[str, str], values: SampleValues
) -> str:
    """A table of goals with a column for each table that they are about."""
    claims: dict[tuple[str, float], dict[str, str]] = {}
    for title, each in goals.items():
        for goal in each:
            claims.setdefault((goal.claim, goal.most), {})[title] = _format_ratio(goal, values) or "not measured"
    rows = [
        [claim, *(cells.get(title, "-") for title in columns), f"at most {most:g}"]
        for (claim, most), cells in claims.items()
    ]
    return _markdown(["ratio of means", *columns.values(), "goal"], rows)


def _format_scenarios(scenarios: Sequence[Scenario], values: SampleValues) -> str:
    first = scenarios[0]
    names = [quantity.name for quantity in first.quantities]
    if all([quantity.name for quantity in scenario.quantities] == names for scenario in scenarios):
        columns = zip(*(scenario.quantities for scenario in scenarios), strict=True)
        header = [*first.labels, *map(_heading_of_column, columns)]
        rows = [
            [*scenario.labels.values(), *(_cell(scenario, quantity, values) for quantity in scenario.quantities)]
            for scenario in scenarios
        ]
    else:
        header = [*first.labels, "what", "measured", "goal"]
        rows = [
            [*scenario.labels.values(), quantity.heading, _cell(scenario, quantity, values), _goal(quantity)]
            for scenario in scenarios
            for quantity in scenario.quantities
        ]
    return _markdown(header, rows)


def _format_goals(benchmark: Benchmark, values: SampleValues) -> str:
    """A table of the goals that compare scenarios."""
    rows = [
        [title, goal.claim, shown, f"at most {goal.most:g}"]
        for title, goals in benchmark.ratio_goals.items()
        for goal in goals
        if (shown := _format_ratio(goal, values))
    ]
    return _markdown(["where", "ratio of means", "measured", "goal"], rows)


def _format_ratio(goal: RatioGoal, values: SampleValues) -> str | None:
    """A ratio with its interval, marked if the goal is missed; None if it was not measured."""
    new = values.get((goal.scenario, goal.value_name), ())
    baselines = [values[key, goal.value_name] for key in goal.baselines if (key, goal.value_name) in values]
    # A run in progress has samples of some scenarios that others lack.
    count = min((len(each) for each in (new, *baselines)), default=0)
    if not count or not baselines:
        return None
    old = min((each[:count] for each in baselines), key=sum)
    interval = paired_ratio_interval(new[:count], old)
    shown = _format_interval(interval, "{:.3f}".format)
    return shown if interval.value <= goal.most else f"**{shown}**"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def describe_run(file: SampleFile) -> str:
    """Return one sentence about where samples come from."""
    counts = {len(values) for values in file.values().values()}
    repetitions = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(file.info.packages.items()))
    return (
        f"Medians of {repetitions} repetitions, with 95 % intervals (of fewer than five: the range); commit "
        f"{file.info.commit}, {file.started}, {file.info.machine}, Python {file.info.python}, {versions}."
    )


def save_chart(benchmark: Benchmark, file: SampleFile, path: Path) -> None:
    """Save a chart of everything measured with intervals and goals: a panel for each quantity of each table."""
    import matplotlib.figure

    values = file.values()
    panels = {
        (scenario.table, quantity.name): quantity
        for scenario in benchmark.scenarios
        for quantity in scenario.quantities
        if (scenario.key, quantity.value_name) in values
    }
    rows = {
        (table, name): [
            (", ".join(scenario.labels.values()), quantile_interval(found, quantity.quantile))
            for scenario in benchmark.scenarios
            if scenario.table == table and (found := values.get((scenario.key, quantity.value_name)))
        ]
        for (table, name), quantity in panels.items()
    }
    heights = [1 + 0.25 * len(each) for each in rows.values()]
    figure = matplotlib.figure.Figure(figsize=(9, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((table, name), quantity) in zip(grid, panels.items(), strict=True):
        intervals = [interval for _, interval in rows[table, name]]
        errors = [
            [max(0.0, interval.value - interval.low) for interval in intervals],
            [max(0.0, interval.high - interval.value) for interval in intervals],
        ]
        axes.errorbar([each.value for each in intervals], range(len(intervals)), xerr=errors, fmt="o", capsize=3)
        axes.set_yticks(range(len(intervals)), [label for label, _ in rows[table, name]])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(quantity.heading)
        axes.set_title(table, fontsize="medium")
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
            if quantity.source:
                # Another view of values that are compared already.
                continue
            key = (scenario.key, quantity.value_name)
            first, second = before.get(key), after.get(key)
            if first and second and median_interval(first).value:
                old_median, new_median = median_interval(first).value, median_interval(second).value
                changes.append(Change(scenario, quantity, old_median, new_median, ratio_interval(second, first)))
    if not changes:
        raise InputError(f"{old.path} and {new.path} have nothing in common: compare two runs of one benchmark")
    return changes


def format_changes(changes: Sequence[Change]) -> str:
    """Return a Markdown table of changes."""
    header = ["scenario", "what", "old", "new", "new / old", "verdict"]
    rows = [
        [
            change.scenario.key,
            change.quantity.heading,
            change.quantity.format(change.old),
            change.quantity.format(change.new),
            str(change.ratio),
            change.verdict,
        ]
        for change in changes
    ]
    return _markdown(header, rows)


def update_readme(text: str, tables: Mapping[str, str], names: Collection[str] = ()) -> str:
    """Return a README with the table of each benchmark between its marks replaced.

    Args:
        names: of the benchmarks; the tables of others stay. Empty: all.

    Raises:
        InputError: it has marks of a benchmark without a table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if names and name not in names:
            return match[0]
        if name not in tables:
            raise InputError(f"a README wants the table of {name!r}, and there is none: run that benchmark first")
        return f"{match[1]}{tables[name]}\n{match[3]}"

    return MARKS.sub(replace, text)


def _heading_of_column(quantities: Sequence[Quantity]) -> str:
    goals = sorted({_goal(quantity) for quantity in quantities} - {"-"})
    return f"{quantities[0].heading}, {' or '.join(goals)}" if goals else quantities[0].heading


def _goal(quantity: Quantity) -> str:
    if quantity.goal is None:
        return "-"
    return f"at {'least' if quantity.higher_is_better else 'most'} {quantity.format(quantity.goal)}"


def _cell(scenario: Scenario, quantity: Quantity, values: SampleValues) -> str:
    samples = values.get((scenario.key, quantity.value_name))
    if not samples:
        return "-" if any(key == scenario.key for key, _ in values) else "not measured"
    interval = quantile_interval(samples, quantity.quantile)
    shown = _format_interval(interval, quantity.format)
    return shown if quantity.is_reached(interval.value) else f"**{shown}**"


def _format_interval(interval: Interval, format_number: Callable[[float], str]) -> str:
    """A value with its interval, unless both ends look like it."""
    low, value, high = map(format_number, (interval.low, interval.value, interval.high))
    return value if low == high else f"{value} ({low} to {high})"
