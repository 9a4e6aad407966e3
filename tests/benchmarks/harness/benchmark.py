"""What a benchmark measures, as data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

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
    """

    name: str
    unit: str = ""
    digits: int = 2
    goal: float | None = None
    higher_is_better: bool = False

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
    """

    labels: Mapping[str, str]
    quantities: tuple[Quantity, ...]

    @property
    def key(self) -> str:
        """Its name in files."""
        return ", ".join(self.labels.values())


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
    """

    name: str
    title: str
    scenarios: tuple[Scenario, ...]
    running: Callable[[], AbstractAsyncContextManager[Measure]]
    repetitions: int = 7
    quick_repetitions: int = 3
