"""The local service under mixed load: a short run of `python -m tests.benchmarks.load`."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.benchmarks.load import Sample, find_broken_guarantees, measure
from tests.emulator.answer_checker import AnswerCase

SECONDS = 7.0
# A run this short is mostly warm-up: the limit allows for filling the event history.
MAX_GROWTH_BYTES = 64 << 20


@pytest.mark.slow
async def test_hostile_and_friendly_clients_at_once(answer_cases: list[AnswerCase]) -> None:
    def ignore(sample: Sample, counts: Counter[str]) -> None: ...

    load, samples = await measure(SECONDS, SECONDS / 12, answer_cases, ignore)
    assert not load.broken
    assert not find_broken_guarantees(samples, MAX_GROWTH_BYTES)
    # Every kind of client ran, and was served or refused.
    assert load.counts["right"] >= 2
    for name in ("left", "nonsense refused", "crowd 429", "crowd 200", "read slowly", "vanished", "idle connections"):
        assert load.counts[name], load.counts
