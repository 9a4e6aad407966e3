"""The local service under link and process faults, with real processes: right texts or typed errors, in time.

A short form of `python -m tests.benchmarks.faults`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.emulator.answer_checker import AnswerCase, AnswerKind
from tests.emulator.faults import run_fault
from tests.emulator.network import Network, missing_requirement
from tests.emulator.test_bed import TestBed

pytestmark = pytest.mark.slow

ANSWERS = 10
# Each of these strikes at least once within ANSWERS answers.
FAULTS = (
    "cable-4s",
    "loss",
    "rtt-jumps",
    "verifier-killed",
    "503",
    "half-open",
    "cut",
    "corrupted",
    "board-killed",
)


@pytest.fixture(scope="module")
def test_bed() -> Iterator[TestBed]:
    reason = missing_requirement()
    if reason:
        pytest.skip(reason)
    with Network(seed=2) as network:
        started = TestBed(network)
        asyncio.run(started.start())
        try:
            yield started
        finally:
            started.stop()


@pytest.mark.parametrize("fault", FAULTS)
async def test_text_is_right_or_error_is_typed_under_every_fault(
    test_bed: TestBed, answer_cases: list[AnswerCase], fault: str
) -> None:
    with test_bed.network.inside("board"):
        # Growth of memory and open files is checked by longer runs.
        row = await run_fault(test_bed, fault, answer_cases, ANSWERS, warm_up=4, settling=0.0)
    assert not row.broken, row.details
    assert row.answers.total() == ANSWERS
    if fault != "board-killed":
        # Requests that wait for the link succeed; errors are for the one in seven that asked to fail instead.
        assert row.answers[AnswerKind.RIGHT] + row.answers[AnswerKind.UNVERIFIED] >= ANSWERS - 3, row.details
