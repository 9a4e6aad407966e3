"""What a benchmark measures, as data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

# Values of one sample by the names of their quantities.
Values = Mapping[str, float]


@dataclass(frozen=True)
class Quantity:
    """Something that is measured.

    Attributes:
        name: as tables show it.
        unit: in which samples are stored and shown; empty for ratios.
        digits: decimals that tables show.
        goal: bound that the median should keep; None for a figure without a goal.
        higher_is_better: the goal is a lower bound, and a comparison takes more for an improvement.
        quantile: what is shown of the samples; 0.5 is the median.
        source: name of the value in samples; empty for `name`.
    """

    name: str
    unit: str = ""
    digits: int = 2
    goal: float | None = None
    higher_is_better: bool = False
    quantile: float = 0.5
    source: str = ""

    @property
    def value_name(self) -> str:
        """The name of its value in samples."""
        return self.source or self.name

    def is_reached(self, value: float) -> bool:
        """Whether `value` keeps the goal, if there is one."""
        return self.goal is None or (value >= self.goal if self.higher_is_better else value <= self.goal)

    def format(self, value: float) -> str:
        """Return a value as text, without the unit."""
        return f"{value:,.{self.digits}f}"

    @property
    def heading(self) -> str:
        """The name with the unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        labels: what distinguishes it, by column.
        quantities: what it measures, in the order of the columns.
        table: heading of the table that it belongs to, if the benchmark has several.
        quick: whether a quick run takes it.
        samples: at most so many samples; None for as many as repetitions. One, where nothing is random.
    """

    labels: Mapping[str, str]
    quantities: tuple[Quantity, ...]
    table: str = ""
    quick: bool = True
    samples: int | None = None

    @property
    def key(self) -> str:
        """Its name in files."""
        return ", ".join([self.table] * bool(self.table) + list(self.labels.values()))


@dataclass(frozen=True)
class RatioGoal:
    """A bound on one scenario relative to others of the same run, sample by sample.

    Attributes:
        claim: as tables show it.
        value_name: of the values that are compared.
        scenario: key of the scenario.
        baselines: keys of those it is compared with: with whichever has the lowest mean.
        most: upper bound of the ratio.
    """

    claim: str
    value_name: str
    scenario: str
    baselines: tuple[str, ...]
    most: float


@dataclass(frozen=True)
class Overview:
    """Several tables in one, for a README: their rows have one cell each, their titles become columns.

    Attributes:
        title: of what the tables differ in.
        columns: short headings, by the title of the table.
        quantities: what a cell shows, the first one with its interval.
    """

    title: str
    columns: Mapping[str, str]
    quantities: tuple[Quantity, ...]


# Takes one sample of a scenario; the number of the repetition, from 0, may serve as a seed.
Measure = Callable[[Scenario, int], Awaitable[Values]]


@dataclass(frozen=True)
class Benchmark:
    """A table.

    Attributes:
        name: of its files, and on the command line.
        title: what the table shows.
        scenarios: its rows; unique keys.
        running: starts what the scenarios share (servers, models), and yields the function that takes samples.
        repetitions, quick_repetitions: samples of each scenario.
        ratio_goals: shown in a table of their own, by the title of the table that they are about.
        overviews: what READMEs show of tables that are too many or too large for them.
    """

    name: str
    title: str
    scenarios: tuple[Scenario, ...]
    running: Callable[[], AbstractAsyncContextManager[Measure]]
    repetitions: int = 7
    quick_repetitions: int = 3
    ratio_goals: Mapping[str, Sequence[RatioGoal]] = field(default_factory=dict)
    overviews: Sequence[Overview] = ()
