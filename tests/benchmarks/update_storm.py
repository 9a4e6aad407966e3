"""What a new version of the target costs a fleet: `python -m tests.benchmarks run update_storm`.

Computed, not measured: bytes of files, divided by rates. Every board has a link of its own and downloads at its full
rate. Acceptance is that of the shipped recordings (`acceptance.npz`), at the positions of texts that the new version
wrote, with the draft that was frozen before it existed.

    this project       boards download nothing
    the whole bundle   what a board would download if the draft were made anew for every version
    published          sizes that papers give: a draft synchronized again (FlexSpec, arXiv 2601.00644), a delta of every
                       version (EDA, as the same paper quotes it)
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path

from edge_runtime.simulation.recorded_texts import read_texts
from tests.benchmarks.harness.benchmark import Benchmark, Quantity, Scenario, Values

FAMILY = Path(__file__).parents[2] / "export" / "example_family"
BOARDS = 1000
RATES_MBIT = (10, 50, 300)
VERSIONS = ("target-v1", "target-v2", "target-v3", "target-v4")
TEMPERATURE = 0.7


def bundle_bytes() -> int:
    """Bytes of a bundle's files."""
    return sum(path.stat().st_size for path in (FAMILY / "bundle").iterdir())


# By what boards download: a function that returns the bytes of one of them.
DOWNLOADS: dict[str, Callable[[], float]] = {
    "this project": lambda: 0,
    "the whole bundle of the example family": bundle_bytes,
    "published: a draft synchronized again": lambda: 3.2e9,
    "published: a delta of every version": lambda: 127e6,
}
MEGABYTES = Quantity("a board", "MB", digits=1)
GIGABYTES = Quantity(f"{BOARDS:,} boards", "GB", digits=1)
MINUTES = {rate: Quantity(f"minutes at {rate} Mbit/s", digits=2) for rate in RATES_MBIT}
ACCEPTANCE = Quantity(f"positions accepted by the frozen draft at T={TEMPERATURE:g}", "%", digits=1)


async def compute(scenario: Scenario, _repetition: int) -> Values:
    if version := scenario.labels.get("version"):
        texts = read_texts(FAMILY / "acceptance.npz", target=version, temperature=TEMPERATURE)
        return {ACCEPTANCE.name: 100 * statistics.mean(text.acceptance for text in texts)}
    downloaded = DOWNLOADS[scenario.labels["download"]]()
    times = {quantity.name: 8 * downloaded / (1e6 * rate) / 60 for rate, quantity in MINUTES.items()}
    return {MEGABYTES.name: downloaded / 1e6, GIGABYTES.name: downloaded * BOARDS / 1e9, **times}


BENCHMARK = Benchmark(
    name="update_storm",
    title="What a new version of the target costs (computed)",
    scenarios=(
        *(
            Scenario({"download": name}, (MEGABYTES, GIGABYTES, *MINUTES.values()), "Downloads, computed")
            for name in DOWNLOADS
        ),
        *(
            Scenario({"version": version}, (ACCEPTANCE,), "What the frozen draft then has, recorded")
            for version in VERSIONS
        ),
    ),
    running=lambda: contextlib.nullcontext(compute),
    repetitions=1,
    quick_repetitions=1,
)
