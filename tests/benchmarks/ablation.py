"""One part of this project off at a time: `python -m tests.benchmarks run ablation`.

The processes, links and columns of `systems`; see there what is modeled. At objective `latency` most rounds stream, so
that parts of drafting can only show where the cloud has no draft; at objective `cloud` most rounds draft. What reuse of
prefixes is worth, `prefix_reuse` measures.
"""

from __future__ import annotations

import itertools

from tests.benchmarks.comparison.board import System
from tests.benchmarks.comparison.texts import TOKENS
from tests.benchmarks.harness.benchmark import Benchmark
from tests.benchmarks.plan_parts import PLAN_PARTS
from tests.benchmarks.systems import LINKS, ComparedPlace, make_cases, make_overviews, running


def make_systems(objective: str) -> list[System]:
    """The whole at one objective, and the whole without each of its parts."""

    def system(change: str, **fields: str) -> System:
        options = {"kind": "planner", "cloud": "plain", "objective": objective, **fields}
        return System(f"{objective}: {change}", **options)  # type: ignore[arg-type]

    return [
        system("all"),
        *(system(f"without {part}", off=part) for part in (*PLAN_PARTS, "HTTP/2")),
        system("without a planner: best fixed K", kind="fixed", objective=""),
        system("with a draft in the cloud", cloud="speculating"),
    ]


SYSTEMS = tuple(itertools.chain.from_iterable(map(make_systems, ("latency", "cloud"))))
PLACES = {ComparedPlace(link): link for link in LINKS}
CASES = make_cases(tuple(PLACES), SYSTEMS, quick_places=0)

BENCHMARK = Benchmark(
    name="ablation",
    title=f"Answers of {TOKENS} tokens, one part off at a time",
    scenarios=tuple(scenario for scenario, _ in CASES.values()),
    running=lambda: running(CASES),
    repetitions=8,
    overviews=make_overviews({"Links": PLACES}),
)
