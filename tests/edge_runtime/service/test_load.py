"""A minute of what an hour of `python -m tests.benchmarks.load` does to a board's service."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.benchmarks.load import Sample, measure, verdict
from tests.emulator.answer_checker import make_cases
from tests.emulator.test_bed import TARGET

SECONDS = 20.0
# So short a run is mostly warming up: what it may add is what the feed's history takes.
GROWTH = 64 << 20


@pytest.mark.slow
async def test_hostile_and_friendly_clients_at_once() -> None:
    def tell(sample: Sample, counts: Counter[str]) -> None: ...

    load, samples = await measure(SECONDS, SECONDS / 12, make_cases(TARGET), tell)
    assert not load.broken
    assert not verdict(samples, GROWTH)
    # All of them came, and were served or refused.
    assert load.counts["right"] >= 5
    for name in ("left", "nonsense refused", "crowd 429", "crowd 200", "read slowly", "vanished", "idle connections"):
        assert load.counts[name], load.counts
